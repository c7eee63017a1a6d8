"""What a run has done so far, on disk, so that it can go on after it was killed.

The journal is the hidden folder ``.partial`` of a run directory in the making. ``run.json`` says which run
it is; ``NNN`` is what pass ``NNN`` returned: the program, where it changed, and the facts, as JSON and
safetensors; ``work-NNN`` is the pass's own, for progress of its own. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from irprune.errors import ResumeError
from irprune.ir.facts import Fact, PruneReport, Task
from irprune.ir.program import Program, content
from irprune.ir.snapshot import NotStorable, decode, encode, pack, texts, unpack
from irprune.pipeline.files import PARTIAL, checksum, flush, sha256, unwritable, write_text
from irprune.pipeline.parser import unparse
from irprune.pipeline.passes import Facts, Pass, Result

_HINT = "run it as before, or start anew with --force"


@dataclass
class Recalled:
    """What a pass returned in an earlier process.

    Attributes:
        result: Program and facts; ``None`` where the facts have no form as data and the pass is to run again.
        seconds: How long it took.
        changed: Whether the program is another one.
    """

    result: Result | None
    seconds: float
    changed: bool


@dataclass
class Journal:
    """The journal of one run.

    Attributes:
        folder: ``.partial`` in the directory in the making.
        original: The program as traced.
        entries: Number of a finished pass to its ``entry.json``.
        open: Whether passes are still written down: not after one whose program has no form as data.
    """

    folder: Path
    original: Program
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    open: bool = True

    @classmethod
    def at(
        cls,
        place: Path,
        original: Program,
        passes: Iterable[Pass],
        task: Task | None,
        *,
        resume: bool,
        given: Mapping[str, str] = MappingProxyType({}),
    ) -> Journal:
        """The journal of a directory in the making: the one that is there, or a new one.

        Args:
            place: The directory.
            original: The program as traced.
            passes: The pipeline.
            task: What the target says about data.
            resume: Go on with what is there.
            given: What else must be the same for that, by name.

        Raises:
            ResumeError: The one that is there is of another run, or damaged.
            OutputError: It cannot be written.
        """
        folder = place / PARTIAL
        known = {**given, **fingerprint(original, passes, task)}
        journal = cls(folder, original)
        if resume and (folder / "run.json").is_file():
            journal._check(known)
            journal._read()
        else:
            shutil.rmtree(folder, ignore_errors=True)
            write_text(folder / "run.json", json.dumps(known, indent=1) + "\n")
        return journal

    def _check(self, known: Mapping[str, str]) -> None:
        path = self.folder / "run.json"
        old = _json(path)
        for key in {**known, **old}:
            was, now = old.get(key), known.get(key)
            if was != now:
                told = f"was '{was}' and is '{now}'" if not _is_digest(now or was or "") else "is another one"
                raise ResumeError(f"the interrupted run is not this one: its {key} {told}", where=str(self.folder.parent), hint=_HINT)

    def _read(self) -> None:
        for number in range(1, 1000):
            place = self.folder / f"{number:03}"
            if not place.is_dir():
                break
            entry = _json(place / "entry.json")
            for name, digest in entry["files"].items():
                file = place / name
                if not file.is_file() or checksum(file) != digest:
                    problem = "is missing" if not file.is_file() else "does not have the checksum that the journal notes"
                    raise ResumeError(f"a file of the interrupted run {problem}", where=str(file), hint="start anew with --force")
            self.entries[number] = entry

    @property
    def _base(self) -> int:
        """The last finished pass that changed the program."""
        return max((number for number, entry in self.entries.items() if entry["program"] is not None), default=0)

    @property
    def _pruned(self) -> int:
        """The first finished pass that pruned."""
        pruning = (number for number, entry in self.entries.items() if any(_is(data, PruneReport) for data in entry["facts"] or ()))
        return min(pruning, default=0)

    def work(self, number: int) -> Path:
        """The folder of a pass for progress of its own."""
        return self.folder / f"work-{number:03}"

    # -- reading ----------------------------------------------------------------------------------

    def recall(self, number: int, one: Pass, program: Program, facts: Facts) -> Recalled | None:
        """What a pass returned, if it had finished.

        Before the last pass that changed the program only lasting facts are of use, and only they are read; but before
        the first one that pruned everything is, since the report shows what that one decided by.
        """
        entry = self.entries.get(number)
        if entry is None:
            return None
        place = self.folder / f"{number:03}"
        early = self._pruned <= number < self._base
        tensors = _tensors(place / "tensors.safetensors") if (place / "tensors.safetensors").is_file() and not early else {}
        if entry["program"] is not None and not early:
            own = {name.removeprefix("program/"): value for name, value in tensors.items() if name.startswith("program/")}
            program = unpack(entry["program"], own, self.original)
            from irprune.rules.infer import typed

            program = typed(program)
        if entry["facts"] is None:
            return Recalled(None, entry["seconds"], False) if not early else Recalled(Result(program), entry["seconds"], False)
        if early:
            tensors = _tensors(place / "tensors.safetensors") if any(_lasts(data) for data in entry["facts"]) else {}
        wanted = [data for data in entry["facts"] if not early or _lasts(data)]
        given = tuple(_fact(data, tensors, self.folder.parent) for data in wanted)
        given = one.revived(program, facts, given)
        return Recalled(Result(program, given), entry["seconds"], entry["program"] is not None and not early)

    # -- writing ----------------------------------------------------------------------------------

    def keep(self, number: int, one: Pass, before: Program, result: Result, seconds: float) -> None:
        """Write down what a pass returned, and remove its own progress.

        Raises:
            OutputError: It cannot be written.
        """
        if self.open and number not in self.entries:
            try:
                self._write(number, one, before, result, seconds)
            except NotStorable:
                self.open = False
            except OSError as error:
                raise unwritable(self.folder, error.strerror or str(error)) from error
            except SafetensorError as error:
                raise unwritable(self.folder, str(error)) from error
        shutil.rmtree(self.work(number), ignore_errors=True)

    def _write(self, number: int, one: Pass, before: Program, result: Result, seconds: float) -> None:
        tensors: dict[str, torch.Tensor] = {}
        data = None
        if result.program is not before:
            data, own = pack(result.program, self.original)
            tensors |= {f"program/{name}": value for name, value in own.items()}
        given: list[Any] | None = []
        for fact in result.facts:
            try:
                given.append(_data(fact, one, tensors, self.folder.parent))  # type: ignore[union-attr]
            except NotStorable:
                if type(fact).lasting or data is not None:
                    raise
                given = None
                break
        place, part = self.folder / f"{number:03}", self.folder / f"new-{number:03}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if tensors and given is not None:
            save_file(_apart(tensors), part / "tensors.safetensors")
            flush(part / "tensors.safetensors")
        files = {path.name: checksum(path) for path in part.iterdir()}
        entry = {"pass": str(one), "seconds": seconds, "program": data, "facts": given, "files": files}
        (part / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        flush(part / "entry.json")
        os.replace(part, place)
        flush(self.folder)


def fingerprint(original: Program, passes: Iterable[Pass], task: Task | None) -> dict[str, str]:
    """What must be the same for a run to go on: pipeline, seed, target, weights, versions."""
    weights = hashlib.sha256()
    for text in texts(original):
        weights.update(text.encode())
    if original.source is not None:
        weights.update(original.source.identity().encode())
    for name, tensor in original.tensors.items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            weights.update(content(tensor))
    out = {
        "pipeline": unparse(passes),
        "seed": str(task.seed if task is not None else 0),
        "target": task.target if task is not None else "",
        "model": weights.hexdigest(),
    }
    target = Path(out["target"])
    if target.suffix == ".py" and target.is_file():
        out["model file"] = sha256(target)
    return {**out, **{name: version(name) for name in ("irprune", "torch")}}


def _is_digest(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"a file of the interrupted run cannot be read: {error}", where=str(path), hint="start anew with --force"
        ) from error
    assert isinstance(data, dict)
    return data


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, each in memory that torch allocated."""
    try:
        return {name: value.clone() for name, value in load(path.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise ResumeError(
            f"a file of the interrupted run cannot be read: {error}", where=str(path), hint="start anew with --force"
        ) from error


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which no two share memory: safetensors refuses those."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        start = value.untyped_storage().data_ptr()
        out[name] = value.clone() if start in seen else value
        seen.add(start)
    return out


# -- facts ------------------------------------------------------------------------------------------


def _data(fact: Fact, one: Pass, tensors: dict[str, torch.Tensor], place: Path) -> Any:
    """A fact as JSON; its arrays go to ``tensors``.

    A field that is marked ``live`` is left out: the pass puts it in again (:meth:`Pass.revived`).
    """

    def other(value: Any) -> Any:
        if isinstance(value, Path):
            return {"path": value.relative_to(place).as_posix()} if value.is_relative_to(place) else {"elsewhere": str(value)}
        if isinstance(value, np.generic):
            value = np.asarray(value)
            return {"scalar": [value.dtype.name, value.item()]}
        if isinstance(value, np.ndarray | torch.Tensor):
            if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
                raise NotStorable(f"array of {value.dtype}")
            key = f"fact/{len(tensors)}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.detach().cpu()
                return {"tensor": key}
            tensors[key] = torch.from_numpy(np.ascontiguousarray(value))
            return {"array": key}
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__module__ in sys.modules:
            held = {}
            for each in dataclasses.fields(value):
                item = getattr(value, each.name)
                if each.metadata.get("live"):
                    if item is not each.default and type(one).revived is Pass.revived:
                        raise NotStorable(f"{type(value).__name__}.{each.name}")
                else:
                    held[each.name] = encode(item, other)
            return {"data": [type(value).__module__, type(value).__qualname__, held, bool(getattr(value, "lasting", False))]}
        raise NotStorable(type(value).__name__)

    return other(fact) if dataclasses.is_dataclass(fact) else _refuse(fact)


def _refuse(fact: Fact) -> Any:
    raise NotStorable(type(fact).__name__)


def _lasts(data: Mapping[str, Any]) -> bool:
    return bool(data["data"][3])


def _is(data: Mapping[str, Any], kind: type[Fact]) -> bool:
    return data["data"][:2] == [kind.__module__, kind.__qualname__]


def _fact(data: Any, tensors: Mapping[str, torch.Tensor], place: Path) -> Any:
    def other(tag: str, inner: Any) -> Any:
        match tag:
            case "path":
                return place / inner
            case "elsewhere":
                return Path(inner)
            case "scalar":
                return np.dtype(inner[0]).type(inner[1])
            case "array":
                return tensors[inner].numpy()
            case "tensor":
                return tensors[inner]
        module, name, held, _ = inner
        kind: Any = sys.modules.get(module)
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ResumeError(f"the interrupted run holds a {module}.{name}, which is not known here", where=str(place), hint=_HINT)
        return kind(**{key: decode(item, other) for key, item in held.items()})

    return decode(data, other)
