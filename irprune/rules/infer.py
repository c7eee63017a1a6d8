"""Inference: one visit of the operations in execution order gives every axis its term."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from irprune.ir.dims import UNIT, Freeze, Size, Term, as_size, resolve, term_size, variables
from irprune.ir.program import Axes, Diagnostic, Event, Program, Types
from irprune.rules.registry import bind, op_name, registry

UNIFORM_NAMES = """
zeros ones full empty rand randn new_zeros new_ones new_full new_empty scalar_tensor empty_like zeros_like ones_like full_like
"""
UNIFORM = frozenset(f"aten::{name}" for name in UNIFORM_NAMES.split())


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor operand of an operation: its node, its axes and their sizes."""

    node: fx.Node
    axes: Axes
    shape: tuple[Size, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.axes)

    def axis(self, dim: int) -> Term:
        return self.axes[dim]


class Op:
    """What a rule may do: unify, freeze, make fresh axes, and say where axes are read across."""

    def __init__(self, node: fx.Node, types: Types, results: list[Any]) -> None:
        self.node = node
        self.types = types
        self.results = results
        self._why = Freeze("misaligned", f"its pieces do not line up in {op_name(node.target)}", node.name)

    @property
    def shape(self) -> tuple[Size, ...]:
        """Sizes of the first result."""
        return sizes(self.results[0])

    @property
    def name(self) -> str:
        """The operation's name without namespace and overload."""
        return op_name(self.node.target).rpartition("::")[2]

    def argument(self, name: str) -> Any:
        """An argument by its name in the operation's schema."""
        return bind(self.node.target, self.node.args, dict(self.node.kwargs))[name]

    def operands(self) -> list[Value]:
        """All tensor operands in order of position."""
        bound = bind(self.node.target, self.node.args, dict(self.node.kwargs))
        return [value for item in bound.values() for value in _flat(_operand(self.types, item))]

    def first(self) -> Value:
        return self.operands()[0]

    def unify(self, a: Term, b: Term) -> bool:
        return self.types.dims.unify(a, b, self._why)

    def freeze(self, term: Term, code: str, message: str) -> None:
        self.types.dims.freeze(term, Freeze(code, message, self.node.name))

    def fresh(self, size: Size) -> Term:
        """A new free axis."""
        return self.types.dims.fresh(size)

    def solid(self, size: Size, code: str, message: str) -> Term:
        """A new axis that is never pruned."""
        return self.types.dims.fresh(size, Freeze(code, message, self.node.name))

    def factor(self, term: Term, minor: Size) -> tuple[Term, Term] | None:
        return self.types.dims.factor(term, minor, self._why)

    def pieces(self, term: Term, sizes: Sequence[int]) -> list[Term] | None:
        """Consecutive blocks of an axis; if it cannot be cut there it is frozen and ``None`` returned."""
        cut = self.types.dims.pieces(term, sizes, self._why) if isinstance(term_size(resolve(term)), int) else None
        if cut is None:
            self.types.dims.freeze(term, self._why)
        return cut

    def unroll(self, term: Term) -> list[Term] | None:
        return self.types.dims.unroll(term, self._why)

    def contract(self, value: Value, *dims: int) -> None:
        """The axes are summed over: a zero at an index removes it exactly."""
        self._event(value, dims, "contract")

    def mix(self, value: Value, how: str, *dims: int) -> None:
        """Results depend on the set of indices along the axes, not only on their sum of products.

        Without a *renormalise* function to compare a removal with, they stay whole.
        """
        entry = registry().find(self.node.target)
        if entry is None or entry.renormalise is None:
            for dim in dims:
                self.freeze(value.axes[dim], "mixed", f"{op_name(self.node.target)} reads across it and has no renormalised form")
            return
        self._event(value, dims, how)

    def _event(self, value: Value, dims: Iterable[int], how: str) -> None:
        for dim in dims:
            if value.axes[dim]:
                self.types.events.append(Event(self.node.name, value.node.name, dim % value.ndim, how))

    def macs(self, *products: Term) -> None:
        """Multiply-accumulates: the sum of the sizes of these products."""
        self.types.macs[self.node.name] = products

    def note(self, key: str, term: Term) -> None:
        """Keep a term under a name for the operation's *resize* function or for analyses."""
        self.types.notes[self.node.name, key] = term

    def broadcast(self, *operands: Axes) -> Axes:
        """The axes of an elementwise result: aligned from the right, equal where both are there."""
        rank = max((len(axes) for axes in operands), default=0)
        out: list[Term] = []
        for position in range(-rank, 0):
            found: Term = UNIT
            for axes in operands:
                if -position > len(axes) or not axes[position]:
                    continue
                if not found:
                    found = axes[position]
                    continue
                one, other = (term_size(resolve(term)) == 1 for term in (found, axes[position]))
                if one == other:
                    self.unify(found, axes[position])
                    continue
                self.freeze(found if one else axes[position], "unit", "a single position is broadcast")
                found = axes[position] if one else found
            out.append(found)
        return tuple(out)


def sizes(value: Any) -> tuple[Size, ...]:
    return tuple(as_size(size) for size in value.shape)


def results_of(node: fx.Node) -> list[Any]:
    """The tensors (or other values) that an operation gives, from the trace's metadata."""
    value = node.meta.get("val")
    return list(value) if isinstance(value, tuple | list) else [value]


def typed(program: Program) -> Program:
    """The program with types: a dimension term for every axis of every tensor value."""
    types = Types()
    types.constants = constants(program.module.graph)
    for node in program.nodes:
        _visit(node, program, types)
    return dataclasses.replace(program, types=types)


def _visit(node: fx.Node, program: Program, types: Types) -> None:
    if node.op == "output":
        for position, operand in enumerate(node.all_input_nodes):
            for axes in _all_axes(types, operand):
                for term in axes:
                    types.dims.freeze(term, Freeze("interface", f"it is an axis of output {position} of the model", node.name))
        return
    if node.op == "placeholder":
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            why = Freeze("interface", f"it is an axis of input {node.name} of the model", node.name)
            types.axes[node.name] = tuple(types.dims.fresh(size, why) for size in sizes(value))
        return
    if node.op == "get_attr":
        tensor = program.tensors[str(node.target)]
        axes = tuple(types.dims.fresh(int(size)) for size in tensor.shape)
        types.axes[node.name] = axes
        for axis, why in node.meta.get("freeze", {}).items():
            types.dims.freeze(axes[axis], why)
        return
    if node.target is operator.getitem:
        parts = types.axes.get(node.args[0].name) if isinstance(node.args[0], fx.Node) else None
        if isinstance(parts, list) and isinstance(node.args[1], int):
            part = parts[node.args[1]]
            if part is not None:
                types.axes[node.name] = part
        return
    results = results_of(node)
    if not any(isinstance(result, torch.Tensor) for result in results):
        _scalar(node, types)
        return
    op = Op(node, types, results)
    if node.name in types.constants and op_name(node.target) not in UNIFORM:
        found: Any = [tuple(types.dims.fresh(size) for size in sizes(r)) if isinstance(r, torch.Tensor) else None for r in results]
        found = found if len(found) > 1 else found[0]
    else:
        entry = registry().find(node.target)
        if entry is None or entry.infer is None:
            found = _unknown(op)
        else:
            found = _call(entry.infer, op, node)
    several = isinstance(node.meta.get("val"), tuple | list)
    checked = [_checked(op, axes, result) for axes, result in zip(found if several else [found], results, strict=True)]
    types.axes[node.name] = checked if several else checked[0]  # type: ignore[assignment]


def _call(infer: Callable[..., Any], op: Op, node: fx.Node) -> Any:
    bound = bind(node.target, node.args, dict(node.kwargs))
    wanted = _parameters(infer)
    return infer(op, **{name: _operand(op.types, bound[name]) for name in wanted if name in bound})


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def _operand(types: Types, argument: Any) -> Any:
    """Nodes become values (tensors), sizes (symbolic integers) or stay nodes; lists are walked."""
    if isinstance(argument, fx.Node):
        held = argument.meta.get("val")
        if isinstance(held, torch.Tensor):
            return Value(argument, types.of(argument.name), sizes(held), held.dtype)
        return as_size(held) if isinstance(held, int | torch.SymInt) else argument
    if isinstance(argument, list | tuple):
        return [_operand(types, item) for item in argument]
    return argument


def _flat(item: Any) -> list[Value]:
    if isinstance(item, list):
        return [value for inner in item for value in _flat(inner)]
    return [item] if isinstance(item, Value) else []


def _checked(op: Op, axes: Axes | None, result: Any) -> Axes | None:
    """Guard against a rule that gets a rank or size wrong: such an axis is frozen on both sides."""
    if not isinstance(result, torch.Tensor):
        return None
    wanted = sizes(result)
    if axes is None or len(axes) != len(wanted):
        for term in axes or ():
            op.freeze(term, "rule-mismatch", "a rule gave the wrong number of axes")
        axes = tuple(op.solid(size, "rule-mismatch", "a rule gave the wrong number of axes") for size in wanted)
    out = []
    for term, size in zip(axes, wanted, strict=True):
        if term_size(resolve(term)) == size:
            out.append(term)
            continue
        op.freeze(term, "symbolic", "its size cannot be compared")
        out.append(op.solid(size, "symbolic", "its size cannot be compared"))
    return tuple(out)


def _unknown(op: Op) -> Any:
    """No rule: every axis of every operand and result is frozen, and the diagnostics say so."""
    why = Freeze("no-rule", f"operation {op_name(op.node.target)} has no rule", op.node.name)
    op.types.diagnostics.append(Diagnostic(op.node.name, why))
    for operand in op.node.all_input_nodes:
        for axes in _all_axes(op.types, operand):
            for term in axes:
                op.types.dims.freeze(term, why)
    found = [tuple(op.types.dims.fresh(s, why) for s in sizes(r)) if isinstance(r, torch.Tensor) else None for r in op.results]
    return found if isinstance(op.node.meta.get("val"), tuple | list) else found[0]


def _scalar(node: fx.Node, types: Types) -> None:
    """A number read from tensor contents (``item``) depends on every position."""
    if "sym_size" in str(node.target):
        return
    for operand in node.all_input_nodes:
        for axes in _all_axes(types, operand):
            for term in axes:
                types.dims.freeze(term, Freeze("data-dependent", "a number is computed from its contents", node.name))


def _all_axes(types: Types, node: fx.Node) -> list[Axes]:
    axes = types.axes.get(node.name)
    if axes is None:
        return []
    return [a for a in axes if a is not None] if isinstance(axes, list) else [axes]


def constants(graph: fx.Graph) -> frozenset[str]:
    """Names of tensor operations that depend on no input, parameter, buffer or symbolic size.

    A value that an in-place operation writes to, directly or through a view, is not constant.
    """
    written: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if (
            node.op == "call_function"
            and schema is not None
            and schema.is_mutable
            and isinstance(node.args[0] if node.args else None, fx.Node)
        ):
            pending = [node.args[0]]
            while pending:
                value = pending.pop()
                if value not in written:
                    written.add(value)
                    pending.extend(value.all_input_nodes)
    found: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in written:
            continue
        if op_name(node.target) == "aten::empty" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        results = results_of(node)
        if all(operand.name in found for operand in node.all_input_nodes) and all(
            isinstance(r, torch.Tensor) and all(isinstance(s, int) for s in r.shape) for r in results
        ):
            found.add(node.name)
    return frozenset(found)


def free_variables(types: Types, axes: Axes) -> Iterable[Any]:
    """The free variables of some axes."""
    for term in axes:
        yield from variables(resolve(term))
