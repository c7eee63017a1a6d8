"""Inference: one visit of the operations in execution order gives every axis its term."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from irprune.errors import OptionError
from irprune.ir.dims import UNIT, Concat, Freeze, Size, Term, as_size, concat, resolve, term_size, variables
from irprune.ir.program import Axes, Diagnostic, Event, Program, Types
from irprune.rules import unlock
from irprune.rules.registry import bind, op_name, registry

UNIFORM_NAMES = """
zeros ones full empty rand randn new_zeros new_ones new_full new_empty scalar_tensor empty_like zeros_like ones_like full_like
"""
UNIFORM = frozenset(f"aten::{name}" for name in UNIFORM_NAMES.split())

# Of these, all positions hold one number.
FILLED = UNIFORM - {f"aten::{name}" for name in ("empty", "rand", "randn", "new_empty", "empty_like")}

# What moves numbers about and leaves them as they are: their first operand's positions are the result's.
MOVES_NAMES = """
view reshape flatten unflatten to _to_copy clone contiguous detach alias unsqueeze squeeze transpose permute t expand select slice
index gather repeat repeat_interleave sort
"""
MOVES = frozenset(f"aten::{name}" for name in MOVES_NAMES.split())

MOST_CELLS = 1 << 14
"""An axis longer than this is not taken apart into single positions."""


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

    def __init__(self, node: fx.Node, types: Types, results: list[Any], program: Program) -> None:
        self.node = node
        self.types = types
        self.results = results
        self._program = program
        self._followed: set[fx.Node] = set()
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

    def uniform(self, value: Value) -> bool:
        """Whether an operand holds one number everywhere, and nothing writes to it."""
        return op_name(value.node.target) in FILLED and value.node not in _written(value.node.graph)

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

    def constant(self, value: Value) -> torch.Tensor | None:
        """The contents of an operand of whole numbers that no input decides; ``None`` if they are not known here."""
        return known(value.node, self._program, self.types)

    def pick(self, value: Value, dim: int, positions: Sequence[int]) -> Term | None:
        """The axis made of an operand's positions in a given order, repetitions allowed; ``None`` where it stays whole.

        The call is written anew with the positions that are left (:meth:`irprune.backend.rewrite.Resize.repick`).
        """
        term = resolve(value.axes[dim])
        size = term_size(term)
        if not isinstance(size, int) or max(size, len(positions)) > MOST_CELLS or len(positions) > 2 * size:
            return None
        if all(var.frozen for var in variables(term)):
            return None
        cells = self.unroll(term)
        if cells is None:
            return None
        self.types.picks[self.node.name] = (dim % value.ndim, tuple(positions))
        return concat(cells[i] for i in positions)

    def look_up(self, table: Value, dim: int, message: str) -> None:
        """Positions of a table's axis are read by numbers: it stays whole, unless the user unlocked it."""
        kind = self.types.lookups.get(self.node.name)
        if kind is None:
            self.freeze(table.axes[dim], "data-dependent", message)
            return
        rows = self.types.unlocked[kind]
        if kind == "vocabulary" and rows:
            self.unify(rows[0], table.axes[dim])
        rows.append(table.axes[dim])

    def pointed(self, value: Any) -> Term | None:
        """The axis whose positions an operand's numbers are, if they are any's. The rule sees to it that they stay so."""
        term = self.types.points.get((value.node.name, 0)) if isinstance(value, Value) else None
        if term is not None:
            self._followed.add(value.node)
        return term

    def points(self, which: int, term: Term) -> None:
        """The numbers of a result are positions along an axis."""
        self.types.points[self.node.name, which] = term

    def need(self, term: Term, count: int) -> None:
        """At least so many positions of an axis must stay."""
        self.types.least.append((term, count))

    def settle(self) -> None:
        """Positions that no rule followed hold their axis as it is."""
        for operand in self.node.all_input_nodes:
            term = self.types.points.get((operand.name, 0))
            if term is None or operand in self._followed:
                continue
            moved = op_name(self.node.target) in MOVES and self.node.target is not torch.ops.aten.view.dtype
            if moved and operand is self.node.args[0] and self._holds_numbers():
                self.points(0, term)
            else:
                self.freeze(term, "data-dependent", "computed positions along it are calculated with")

    def _holds_numbers(self) -> bool:
        """Whether whole numbers pass into the result as they are, which truth values would not let them."""
        return isinstance(self.results[0], torch.Tensor) and self.results[0].dtype is not torch.bool

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
                if found is axes[position]:
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


def typed(program: Program, unlocked: Iterable[str] = ()) -> Program:
    """The program with types: a dimension term for every axis of every tensor value.

    Args:
        program: The program.
        unlocked: Axes of the interface that may be cut: ``vocabulary``, ``positions`` (:mod:`irprune.rules.unlock`).

    Raises:
        OptionError: The program has no such axis.
    """
    return dataclasses.replace(program, types=inferred(program, unlocked))


def inferred(program: Program, unlocked: Iterable[str] = ()) -> Types:
    """A dimension term for every axis of every tensor value of a program; arguments as for :func:`typed`."""
    types = Types()
    types.constants = constants(program.module.graph)
    for kind in unlocked:
        _unlock(kind, program, types)
    for node in program.nodes:
        _visit(node, program, types)
    for term, _ in types.least:
        # Of a product only the major factor may go: how many of the minor ones a choice leaves is not known.
        why = Freeze("chosen", "positions are chosen among it and a factor before it")
        types.dims.freeze(resolve(term)[1:], why)
    _join(program, types)
    return types


def _join(program: Program, types: Types) -> None:
    """Blocks of a tensor's axis that stand together everywhere (as after a flip) become one variable."""
    wanted: dict[Any, None] = {}
    for node in program.holders.values():
        for term in types.of(node.name):
            blocks = (atom for atom in resolve(term) if isinstance(atom, Concat))
            for found in (dict.fromkeys(v for v in variables((atom,)) if v.frozen is None and isinstance(v.size, int)) for atom in blocks):
                wanted |= found if len(found) > 1 else {}
    for term, _ in types.least:  # of which so many must stay is known of the variable alone
        for var in variables(resolve(term)):
            wanted.pop(var, None)
    if not wanted:
        return
    places = itertools.chain(
        (term for axes in types.axes.values() for item in (axes if isinstance(axes, list) else [axes]) for term in item or ()),
        types.notes.values(),
        (product for products in types.macs.values() for product in products),
    )
    if not types.dims.join(places, wanted):
        return
    for name, axes in types.axes.items():
        new = [item if item is None else tuple(resolve(term) for term in item) for item in (axes if isinstance(axes, list) else [axes])]
        types.axes[name] = new if isinstance(axes, list) else new[0]  # type: ignore[assignment]


def _unlock(kind: str, program: Program, types: Types) -> None:
    """Note the tables of a kind before anything is inferred: a look-up leaves their rows free then."""
    ids = unlock.tokens(program) if kind == "vocabulary" else None
    if isinstance(ids, unlock.Tokens):
        types.ids, nodes = ids.input, ids.nodes
    elif kind == "positions":
        nodes = unlock.positional(program)
    else:
        nodes = frozenset()
    if not nodes:
        why = (
            ids
            if isinstance(ids, str)
            else "no table is indexed by places"
            if kind in unlock.KINDS
            else f"one of {', '.join(unlock.KINDS)}"
        )
        raise OptionError(f"the program has no axis '{kind}' that could be cut: {why}")
    types.unlocked[kind] = []
    types.lookups |= dict.fromkeys(nodes, kind)


def _unlocked_outputs(node: fx.Node, types: Types) -> None:
    """The last axis of an output over the tokens is the vocabulary."""
    for term in types.unlocked.get("vocabulary", ())[:1]:
        for operand in node.all_input_nodes:
            for axes in _all_axes(types, operand):
                if axes and operand.meta["val"].is_floating_point() and term_size(resolve(axes[-1])) == term_size(resolve(term)):
                    types.dims.unify(term, axes[-1], Freeze("misaligned", "it does not line up with the vocabulary", node.name))


def _visit(node: fx.Node, program: Program, types: Types) -> None:
    if node.op == "output":
        _unlocked_outputs(node, types)
        cut = {var for term in types.unlocked.get("vocabulary", ()) for var in variables(resolve(term))}
        for position, operand in enumerate(node.all_input_nodes):
            if (operand.name, 0) in types.points:
                why = Freeze("interface", f"output {position} of the model tells positions along it", node.name)
                types.dims.freeze(types.points[operand.name, 0], why)
            for axes in _all_axes(types, operand):
                free = bool(axes) and not cut.isdisjoint(variables(resolve(axes[-1])))
                for term in axes[:-1] if free else axes:
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
        source, place = node.args
        if isinstance(source, fx.Node) and isinstance(place, int):
            parts = types.axes.get(source.name)
            part = parts[place] if isinstance(parts, list) else None
            if part is not None:
                types.axes[node.name] = part
            if (source.name, place) in types.points:
                types.points[node.name, 0] = types.points[source.name, place]
        return
    results = results_of(node)
    if not any(isinstance(result, torch.Tensor) for result in results):
        _scalar(node, types)
        return
    op = Op(node, types, results, program)
    if node.name in types.constants and op_name(node.target) not in UNIFORM:
        found: Any = [tuple(types.dims.fresh(size) for size in sizes(r)) if isinstance(r, torch.Tensor) else None for r in results]
        found = found if len(found) > 1 else found[0]
    else:
        entry = registry().find(node.target)
        if entry is None or entry.infer is None:
            found = _unknown(op)
        else:
            found = _call(entry.infer, op, node)
    op.settle()
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
        known = term_size(resolve(term))
        if known is size or known == size:
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
        for axes in [*_all_axes(types, operand), (types.points.get((operand.name, 0), UNIT),)]:
            for term in axes:
                types.dims.freeze(term, Freeze("data-dependent", "a number is computed from its contents", node.name))


def _all_axes(types: Types, node: fx.Node) -> list[Axes]:
    axes = types.axes.get(node.name)
    if axes is None:
        return []
    return [a for a in axes if a is not None] if isinstance(axes, list) else [axes]


def known(node: fx.Node, program: Program, types: Types) -> torch.Tensor | None:
    """Whole numbers that depend on constants and buffers only, small enough to be read at once."""
    held = node.meta.get("val")
    if not isinstance(held, torch.Tensor) or held.is_floating_point() or held.is_complex() or not _small(held):
        return None
    upstream: set[fx.Node] = set()
    pending = [node]
    while pending:
        value = pending.pop()
        if value in upstream:
            continue
        upstream.add(value)
        if value.op == "get_attr":
            tensor = program.tensors[str(value.target)]
            if isinstance(tensor, torch.nn.Parameter) or tensor.is_meta or not _small(tensor):
                return None
        elif value.op != "call_function" or not (value.name in types.constants or _repeatable(value)):
            return None
        pending.extend(value.all_input_nodes)
    if not upstream.isdisjoint(_written(program.module.graph)):
        return None
    values: dict[fx.Node, Any] = {}
    for value in (value for value in program.nodes if value in upstream):
        if value.op == "get_attr":
            values[value] = program.tensors[str(value.target)]
        else:
            args, kwargs = fx.map_arg((value.args, dict(value.kwargs)), values.__getitem__)
            values[value] = value.target(*args, **kwargs)  # type: ignore[operator]
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _small(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= MOST_CELLS


def _repeatable(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Values that an in-place operation writes to, directly or through a view."""
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
    return written


def constants(graph: fx.Graph) -> frozenset[str]:
    """Names of tensor operations that depend on no input, parameter, buffer or symbolic size.

    A value that an in-place operation writes to, directly or through a view, is not constant.
    """
    written = _written(graph)
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
