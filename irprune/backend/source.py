"""Weights that stay in their files and are read by rows when they are needed.

A checkpoint larger than memory is analysed on the meta device; what needs numbers reads them from
here, one block of one tensor at a time. A file is mapped anew for each read, so that what was read is
not resident longer than the tensor that it gave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from irprune.errors import DataError, TargetError
from irprune.ir.program import content

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Tensors in safetensors files, and a few in memory.

    Attributes:
        places: Name to the file and the name in it.
        held: Tensors that no file has (buffers that a model computes when it is built).
        states: File to its :func:`state` when it was first looked at: a file that changes while it is in use is refused.
    """

    places: Mapping[str, tuple[Path, str]]
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    states: Mapping[Path, str] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor, on pages of the file that are let go with it.

        Raises:
            DataError: The file is gone, cut off, or not the one that it was.
        """
        if name in self.held:
            return self.held[name][start:stop] if start or stop is not None else self.held[name]
        path, key = self.places[name]
        self._check(path)
        with opened(path) as file:
            if start == 0 and stop is None:
                return file.get_tensor(key)
            return file.get_slice(key)[start:stop]

    def has(self, name: str) -> bool:
        return name in self.held or name in self.places

    def _check(self, path: Path) -> None:
        if path in self.states and state(path) != self.states[path]:
            hint = "let nothing write to the checkpoint during a run, and run again"
            raise DataError("the file changed while the run was reading it", where=str(path), hint=hint)

    def identity(self) -> str:
        """Names, sizes and times of the files: the time of the last change too, which nobody can set back.

        Raises:
            DataError: A file is gone, or not the one that it was.
        """
        digest = hashlib.sha256()
        for path in sorted({path for path, _ in self.places.values()}):
            self._check(path)
            digest.update(f"{path.resolve()} {self.states.get(path) or state(path)}\n".encode())
        digest.update(repr(sorted((name, key) for name, (_, key) in self.places.items())).encode())
        for name, tensor in sorted(self.held.items()):
            digest.update(name.encode())
            digest.update(content(tensor))
        return digest.hexdigest()


def state(path: Path) -> str:
    """Size, time of the last writing and time of the last change of any kind.

    Raises:
        DataError: The file is gone.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _unreadable(path: Path, error: OSError) -> DataError:
    cause = error.strerror or "no such file"
    return DataError(f"the file cannot be read: {cause}", where=str(path), hint="repair the checkpoint")


class opened:
    """A safetensors file, open for one read; what is wrong with it is an error that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> safe_open:
        try:
            self._file = safe_open(str(self._path), framework="pt")
            return self._file.__enter__()
        except OSError as error:
            raise _unreadable(self._path, error) from error
        except SafetensorError as error:
            raise DataError(
                f"the file is cut off or not a safetensors file: {error}", where=str(self._path), hint="download the checkpoint again"
            ) from error

    def __exit__(self, *what: object) -> None:
        self._file.__exit__(*what)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order.

    Raises:
        TargetError: It has none.
        DataError: Its index is damaged or names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(f"the index is damaged: {error}", where=str(index), hint="download the checkpoint again") from error
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing is not None:
            raise DataError(f"the index names {missing}, which is not there", where=str(index), hint="download the checkpoint again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise TargetError(
        "the directory holds no safetensors weights", where=str(folder), hint="save the model with save_pretrained, or load it without lazy"
    )


def listed(folder: Path) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """Name, file and shape of every tensor of a checkpoint directory, file by file."""
    for path in shards(folder):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                yield key, path, tuple(file.get_slice(key).get_shape())


def stored(
    folder: Path,
    wanted: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    held: Mapping[str, torch.Tensor],
    needed: Collection[str],
) -> Stored:
    """Where a program's tensors lie in a checkpoint directory.

    Args:
        folder: The directory.
        wanted: Name to the names that it may have in the files, the likeliest first.
        shapes: Name to its shape.
        held: Tensors in memory for names that no file has.
        needed: The names that must be there.

    Raises:
        TargetError: A needed tensor is in no file under any of its names, or has another shape there: the
            checkpoint is in a form that is converted when it is loaded.
    """
    states = {path: state(path) for path in shards(folder)}
    there = {key: (path, shape) for key, path, shape in listed(folder)}
    places = {}
    for name, names in wanted.items():
        key = next((key for key in names if key in there), None)
        if key is None:
            if name in held or name not in needed:
                continue
            raise TargetError(
                f"the checkpoint has no tensor {name}",
                where=str(folder),
                hint="it is in a form that transformers converts when it loads it: load it without lazy, and save it with save_pretrained",
            )
        path, shape = there[key]
        if shape != shapes[name] and name not in needed:
            continue
        if shape != shapes[name]:
            raise TargetError(
                f"tensor {key} has shape {list(shape)} in {path.name}, and the model wants {list(shapes[name])}",
                where=str(folder),
                hint="it is in a form that transformers converts when it loads it: load it without lazy, and save it with save_pretrained",
            )
        places[name] = (path, key)
    return Stored(places, held, states)
