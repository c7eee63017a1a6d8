"""Calibration batches: where they come from and how they become a model's inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from irprune.errors import DataError
from irprune.ir.program import Interface

SUFFIXES = (".safetensors", ".npz", ".jsonl")


class Binding:
    """Turns a batch into ``(args, kwargs)`` of one model, and says clearly where it does not fit.

    A mapping gives the inputs by name, other entries are for the loss; a tuple or list gives them by
    position, the rest is for the loss; a tensor is the only input. Constants among the example inputs
    are part of the program and not of a batch.

    Args:
        positional: Parameter names of the positional example inputs.
        interface: The program's interface.
    """

    def __init__(self, positional: list[str], interface: Interface) -> None:
        args, kwargs = interface.example
        self.example: dict[str, Any] = {**dict(zip(positional, args, strict=True)), **kwargs}
        self._count = len(args)
        self._interface = interface

    @property
    def batch_size(self) -> int:
        """Size of the first axis of the first tensor of the example inputs."""
        first = next(leaf for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, torch.Tensor))
        return int(first.shape[0]) if first.ndim else 1

    def __call__(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = self._values(batch)
        named = list(values.items())
        bound = tuple(value for _, value in named[: self._count]), dict(named[self._count :])
        self._check(bound)
        return bound

    def _values(self, batch: Any) -> dict[str, Any]:
        """The inputs by name, in the order of the example inputs."""
        constants = {name: value for name, value in self.example.items() if not _has_tensor(value)}
        wanted = [name for name in self.example if name not in constants]
        if isinstance(batch, Mapping):
            missing = [name for name in wanted if name not in batch]
            if missing:
                raise DataError(
                    f"a calibration batch has no '{missing[0]}'; it has {', '.join(map(str, batch)) or 'nothing'}",
                    hint=f"give the inputs by name: {', '.join(wanted)}",
                )
            return {name: batch[name] if name in wanted else constants[name] for name in self.example}
        parts = [batch] if isinstance(batch, torch.Tensor) else batch
        if not isinstance(parts, (tuple, list)):
            raise DataError(
                f"a calibration batch is a {type(batch).__name__}",
                hint="yield a tensor, a tuple of tensors (inputs first, then what the loss needs), or a dict by input name",
            )
        if len(parts) < len(wanted):
            raise DataError(
                f"a calibration batch has {len(parts)} of the {len(wanted)} inputs {', '.join(wanted)}",
                hint="yield a tuple of all inputs in their order, then what the loss needs",
            )
        given = dict(zip(wanted, parts, strict=False))
        return {name: given[name] if name in given else constants[name] for name in self.example}

    def _check(self, bound: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Structure, dtype and static sizes are those of the example inputs; no NaN."""
        spec = pytree.tree_structure(self._interface.example)
        leaves, found = pytree.tree_flatten(bound)
        if found != spec:
            raise DataError(
                "a calibration batch is not built like the example inputs", hint="yield inputs nested as example_inputs() gives them"
            )
        examples = pytree.tree_leaves(self._interface.example)
        for name, leaf, example, dynamic in zip(self._interface.inputs, leaves, examples, self._interface.dynamic, strict=True):
            if not isinstance(example, torch.Tensor):
                continue
            wanted = [dynamic.get(axis, int(size)) for axis, size in enumerate(example.shape)]
            if not isinstance(leaf, torch.Tensor) or leaf.dtype != example.dtype or not _fits(leaf, wanted):
                is_now = f"{leaf.dtype} of shape {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"a {type(leaf).__name__}"
                shape = ", ".join(map(str, wanted))
                raise DataError(
                    f"input '{name}' of a calibration batch is {is_now}, the model takes {example.dtype} of shape [{shape}]",
                    hint="yield batches like example_inputs(), and declare the axes that differ in dynamic_axes()",
                )
            if leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise DataError(f"input '{name}' of a calibration batch holds NaN", hint="clean the calibration data")


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _fits(leaf: torch.Tensor, wanted: list[int | str]) -> bool:
    return leaf.ndim == len(wanted) and all(isinstance(want, str) or want == size for want, size in zip(wanted, leaf.shape, strict=True))


def counted(batches: Iterable[Any], source: str) -> Iterator[Any]:
    """The batches; none at all is an error that names where they come from."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise DataError(
            f"{source} gives no calibration batch", hint="give at least one batch, and a fresh iterable each time it is asked for"
        )


# -- files ----------------------------------------------------------------------------------------


def read(path: Path, binding: Binding) -> list[dict[str, torch.Tensor]]:
    """Batches from a file of samples, as many in each as the example inputs have.

    ``.safetensors`` and ``.npz`` hold one tensor per input name, samples along the first axis;
    ``.jsonl`` holds one sample a line, an object of nested lists. Entries that are no input are kept
    for the loss.

    Raises:
        DataError: The file is missing, not of these kinds, empty, or does not fit the inputs.
    """
    if not path.is_file():
        raise DataError("there is no such calibration file", where=str(path), hint="check the path after --calibration")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix)
    if reader is None:
        text = "; plain text needs an hf: target with a tokenizer" if path.suffix == ".txt" else ""
        raise DataError(
            f"calibration data of kind '{path.suffix}' is not understood{text}", where=str(path), hint=f"give {_either(SUFFIXES)}"
        )
    columns = reader(path)
    wanted = [name for name, value in binding.example.items() if isinstance(value, torch.Tensor)]
    missing = [name for name in wanted if name not in columns]
    if missing and columns:
        raise DataError(
            f"the file has no '{missing[0]}'; it has {', '.join(columns)}", where=str(path), hint=f"name the tensors {', '.join(wanted)}"
        )
    sizes = {name: len(column) if column.ndim else 0 for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"the tensors differ in their number of samples: {listed}", where=str(path), hint="give one sample per first index")
    total = next(iter(sizes.values()), 0)
    for name in wanted:
        if name in columns:
            dtype = binding.example[name].dtype
            if not torch.can_cast(columns[name].dtype, dtype):
                raise DataError(f"'{name}' is {columns[name].dtype}, the model takes {dtype}", where=str(path), hint=f"store it as {dtype}")
            columns[name] = columns[name].to(dtype)
    size = binding.batch_size
    return [{name: column[start : start + size] for name, column in columns.items()} for start in range(0, total, size)]


def _either(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DataError(f"not a safetensors file: {error}", where=str(path), hint="write it with safetensors.torch.save_file") from error


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, OSError, AttributeError) as error:
        raise DataError(f"not an .npz file of plain arrays: {error}", where=str(path), hint="write it with numpy.savez") from error


def _read_jsonl(path: Path) -> dict[str, torch.Tensor]:
    columns: dict[str, list[Any]] = {}
    count = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", where=where, hint="write one JSON object a line") from error
        if not isinstance(sample, dict) or (count and sample.keys() != columns.keys()):
            raise DataError("every line must be an object with the same keys", where=where, hint="write one JSON object a line")
        count += 1
        for name, value in sample.items():
            columns.setdefault(name, []).append(value)
    worded = [name for name, values in columns.items() if any(isinstance(value, str) for value in values)]
    if worded:
        raise DataError(
            f"the samples hold text under {', '.join(worded)}",
            where=str(path),
            hint="name it prompt and response, or text, and use an hf: target with a tokenizer; or give numbers by input name",
        )
    try:
        return {name: torch.tensor(values) for name, values in columns.items()}
    except (ValueError, TypeError) as error:
        raise DataError(f"samples do not form tensors: {error}", where=str(path), hint="give every sample the same shape") from error
