"""A model whose weights lie in files, run as it is: what its trace must compute, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from irprune.backend.hf_resize import pick
from irprune.backend.proof import Run, flat_inputs, wide_inputs, widened
from irprune.errors import wording
from irprune.frontend.export import not_faithful, same_values
from irprune.ir.program import Program

# What python code asks of a tensor that needs no data.
_SHAPES = ("shape", "ndim", "requires_grad", "layout", "grad", "is_leaf", "itemsize", "nbytes", "size", "dim", "numel", "stride")
_KINDS = ("is_floating_point", "is_complex")


class _Reading(TorchFunctionMode):
    """Every operation that is given a weight gets its values, which are let go with the operation.

    Args:
        names: The weights by ``id``.
        read: Values of a weight.
        wide: Compute in float32 what is in half precision.
    """

    def __init__(self, names: Mapping[int, str], read: Callable[[str], torch.Tensor], wide: bool) -> None:
        super().__init__()
        self._names = names
        self._read = read
        self._wide = wide

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
        first = args[0] if args else None
        if id(first) in self._names and isinstance(first, torch.Tensor):
            if asked in ("device", "is_meta", "dtype"):
                return {"device": torch.device("cpu"), "is_meta": False, "dtype": self._dtype(first)}[asked]
            if asked in (*_SHAPES, *_KINDS):
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self._given, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _given(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and id(value) in self._names:
            return self._read(self._names[id(value)]).to(value.dtype).to(self._dtype(value))  # rounded as it is to be, then computed widely
        return widened(value) if self._wide else value

    def _dtype(self, tensor: torch.Tensor) -> torch.dtype:
        found: torch.dtype = widened(tensor.dtype) if self._wide else tensor.dtype
        return found


def check(model: nn.Module, program: Program) -> str | None:
    """Compare a program whose weights lie in files with its model, on the example inputs.

    Args:
        model: The model, its parameters on the meta device and its buffers in memory.
        program: What was traced from it, with its source.

    Returns:
        Why they could not be compared; ``None`` where they were, and are equal.

    Raises:
        TraceError: The program computes something else.
    """
    source = program.source
    assert source is not None
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, program.interface.example)
    flat, wide = wide_inputs(program, flat_inputs(program, args, kwargs))
    owners = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    names = {id(tensor): name for name, tensor in owners.items()}
    given = pytree.tree_unflatten(flat, pytree.tree_structure((args, kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with _Reading(names, source.read, wide):
                outputs = model(*given[0], **given[1])
            expected = [pick(outputs, name) for name in program.interface.outputs]
        except Exception as error:  # code that needs more of a weight than an operation's operand
            return f"the trace was not compared with the model, which did not run on weights in files: {wording(error)}"
        torch.manual_seed(0)
        found = pytree.tree_leaves(Run(program, wide).run(*flat, enable_io_processing=False))
    for name, want, got in zip(program.interface.outputs, expected, found, strict=True):
        if not same_values(want, got):
            raise not_faithful(name)
    return None
