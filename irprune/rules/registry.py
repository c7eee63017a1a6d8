"""Where op rules are kept and found.

A rule belongs to an operation name without overload (``aten::add`` serves ``add.Tensor`` and
``add.Scalar``, and ``add_`` where that has none of its own). It has up to three functions:

- *infer* relates the operands' axes to the results' axes;
- *resize* recomputes literal sizes in the call when axes have shrunk;
- *renormalise* computes the operation over the kept indices of a mixed axis at full size: the
  reference that translation validation compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import torch


@dataclass(frozen=True)
class OpRule:
    """The functions of one operation. See the module's text."""

    infer: Callable[..., Any] | None = None
    resize: Callable[..., None] | None = None
    renormalise: Callable[..., Any] | None = None


class Registry:
    """Op rules by name."""

    def __init__(self) -> None:
        self._rules: dict[str, OpRule] = {}

    def add(self, names: tuple[str, ...], **functions: Callable[..., Any]) -> None:
        for name in names:
            self._rules[name] = replace(self._rules.get(name, OpRule()), **functions)

    def find(self, target: Any) -> OpRule | None:
        """The rule of an operation, or ``None``."""
        name = op_name(target)
        found = self._rules.get(name)
        return self._rules.get(name[:-1]) if found is None and name.endswith("_") and not name.endswith("__") else found


def op_name(target: Any) -> str:
    """``namespace::name`` of an operation, without its overload."""
    schema = getattr(target, "_schema", None)
    return str(schema.name) if schema is not None else getattr(target, "__name__", str(target))


def bind(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of the operation's schema, defaults filled in."""
    if not isinstance(target, torch._ops.OpOverload):
        return {**{f"arg{i}": value for i, value in enumerate(args)}, **kwargs}
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


_registry = Registry()
_loaded = False


def registry() -> Registry:
    """The registry with all installed rules (entry points ``irprune.rules``)."""
    global _loaded
    if not _loaded:
        _loaded = True
        points = entry_points(group="irprune.rules")
        if not any(point.name == "aten" for point in points):
            from irprune.rules import register_all

            register_all()
        for point in points:
            point.load()()
    return _registry


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an *infer* function: ``infer(op, **arguments of the operation's schema) -> axes``.

    The function names those schema arguments that it needs, after ``op``; tensors arrive as
    :class:`~irprune.rules.infer.Value`. It returns the axes of the result, or a list of them for
    several results.
    """
    return _decorator("infer", names)


def resize(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a *resize* function: ``resize(rw, **arguments)`` edits the call through ``rw``."""
    return _decorator("resize", names)


def renormalise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a *renormalise* function: ``renormalise(keep, **arguments) -> result``."""
    return _decorator("renormalise", names)


def _decorator(slot: str, names: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.add(tuple(name if "::" in name else f"aten::{name}" for name in names), **{slot: function})
        return function

    return decorate
