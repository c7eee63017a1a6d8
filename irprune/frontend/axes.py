"""Dynamic axes: what the user wants, what the tracer is told, what is left after tracing."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from irprune.errors import TargetError, TraceError
from irprune.frontend import blame
from irprune.ir.dims import as_size

Dynamic = Mapping[str, Mapping[int, str]]
Specialised = dict[Any, tuple[Any, str | None]]


def positional_names(signature: inspect.Signature, count: int) -> list[str]:
    """The parameters that positional arguments go to."""
    positional: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}.{i}" for i in range(count - len(positional))]
        elif len(positional) < count:
            positional.append(parameter.name)
    return positional


def leaf_names(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The dotted path of each flat input: the parameter, then keys and positions inside it."""
    positional = positional_names(signature, len(args))
    heads = {"0": dict(zip(map(str, range(len(args))), positional, strict=True)), "1": {key: key for key in kwargs}}
    names = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        side, head, *rest = (key_of(entry) for entry in path)
        names.append(".".join((heads[side][head], *rest)))
    return names


def key_of(entry: Any) -> str:
    """One step of a pytree path: a key, a position or a field."""
    for field in ("key", "idx", "name"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)


def wanted(names: list[str], leaves: list[Any], dynamic: Dynamic) -> tuple[list[dict[int, str]], set[str]]:
    """Labels of the dynamic axes of each flat input, and the names of the inputs that the user spoke of."""
    unused = set(dynamic)
    axes: list[dict[int, str]] = []
    explicit: set[str] = set()
    sizes: dict[str, tuple[int, str]] = {}
    first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            unused.discard(name)
            axes.append({})
            continue
        entry = next((key for key in _ancestors(name) if key in dynamic), None)
        if entry is not None:
            unused.discard(entry)
            explicit.add(name)
            of = {_axis(name, leaf, axis): str(label) for axis, label in dynamic[entry].items()}
        else:
            of = {0: "batch"} if leaf.ndim and first.ndim and leaf.shape[0] == first.shape[0] else {}
        for axis, label in of.items():
            size = int(leaf.shape[axis])
            if size < 2:
                raise TargetError(
                    f"axis {axis} ('{label}') of input '{name}' is dynamic, but its example size is {size}",
                    hint=f"give an example of size 2 or more there (a trace takes 0 and 1 for constants), "
                    f"or make the input static: dynamic_axes() -> {{'{name}': {{}}}}",
                )
            other, where = sizes.setdefault(label, (size, f"axis {axis} of '{name}'"))
            if other != size:
                raise TargetError(
                    f"axes labelled '{label}' differ in the example inputs: {other} at {where}, {size} at axis {axis} of '{name}'",
                    hint="give them one size, or different labels",
                )
        axes.append(of)
    if unused:
        raise TargetError(
            f"dynamic axes name '{sorted(unused)[0]}', which is not an input; the inputs are {', '.join(names)}",
            hint="name the parameters of forward",
        )
    return axes, explicit


def _ancestors(name: str) -> list[str]:
    """The name itself, then the containers around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _axis(name: str, leaf: torch.Tensor, axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
        raise TargetError(
            f"dynamic axes of input '{name}' name axis {axis!r}, its example has shape {tuple(leaf.shape)}",
            hint=f"name axes 0 to {leaf.ndim - 1}",
        )
    return axis % leaf.ndim


@contextlib.contextmanager
def marked(leaves: list[Any], axes: list[dict[int, str]]) -> Iterator[None]:
    """Mark axes as dynamic for the tracer; an axis that the model makes constant is no error for it.

    Marks on the tensors, unlike ``dynamic_shapes``, go with every container and signature.
    """
    for leaf, of in zip(leaves, axes, strict=True):
        for axis in of:
            torch._dynamo.maybe_mark_dynamic(leaf, axis)
    try:
        yield
    finally:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                vars(leaf).clear()


@contextlib.contextmanager
def tied(module: torch.nn.Module, axes: list[dict[int, str]]) -> Iterator[None]:
    """Say to the tracer, before the model runs, that axes with equal labels have one size."""

    def tie(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        sizes: dict[str, Any] = {}
        for leaf, of in zip(pytree.tree_leaves((args, kwargs)), axes, strict=True):
            for axis, label in of.items():
                torch._check(sizes.setdefault(label, leaf.shape[axis]) == leaf.shape[axis])

    handle = module.register_forward_pre_hook(tie, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def watched() -> Iterator[Specialised]:
    """Note for each symbolic size what it is replaced by, and the line of the model where that happens.

    The tracer's own record of these places leaves out the user's frames and cuts paths short.
    """
    seen: Specialised = {}
    original = ShapeEnv._set_replacement

    def noted(self: ShapeEnv, symbol: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        seen.setdefault(symbol, (target, blame.innermost(traceback.walk_stack(None), reverse=True)))
        original(self, symbol, target, *args, **kwargs)

    with mock.patch.object(ShapeEnv, "_set_replacement", noted):
        yield seen


def found(
    placeholders: list[fx.Node], names: list[str], axes: list[dict[int, str]], explicit: set[str], specialised: Specialised
) -> tuple[tuple[dict[int, str], ...], tuple[str, ...]]:
    """The axes that stayed dynamic after tracing; a constant one that was asked for is an error."""
    found: list[dict[int, str]] = []
    notes: list[str] = []
    labels: dict[Any, str] = {}
    for node, name, of in zip(placeholders, names, axes, strict=True):
        stayed = {}
        for axis, label in of.items():
            size = node.meta["val"].shape[axis]
            term = as_size(size)
            if not isinstance(term, int):
                stayed[axis] = labels.setdefault(term, label)
                if stayed[axis] != label:
                    notes.append(f"axis {axis} ('{label}') of input '{name}' always has the size of '{stayed[axis]}' in this model")
                elif not term.is_Symbol:
                    notes.append(f"axis {axis} ('{label}') of input '{name}' always has the size {term} in this model")
                continue
            where = _decided(size, specialised)
            message = f"axis {axis} ('{label}') of input '{name}' is not dynamic: the model works for size {int(size)} only"
            if name in explicit:
                raise TraceError(
                    message, where=where, hint="take sizes from the input's shape there, or leave the axis out of dynamic_axes()"
                )
            notes.append(message + (f" ({where})" if where else ""))
        found.append(stayed)
    return tuple(found), tuple(notes)


def _decided(size: Any, specialised: Specialised) -> str | None:
    """``file:line`` of the operation that made a symbolic size constant."""
    symbol = getattr(getattr(size, "node", None), "_expr", None)
    while symbol in specialised:
        symbol, where = specialised[symbol]
        if symbol.is_Integer:
            return where
    return None
