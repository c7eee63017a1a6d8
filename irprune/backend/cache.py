"""A decoder that goes on from the keys and values of earlier calls.

:func:`cached` rewrites a traced program so that one graph does prefill and decoding: it takes the new
tokens and, for each attention, the keys and values of all earlier ones, and gives them back extended.

Nothing is known of model families. Every axis whose size is that of the sequence gets one of two
colours: ``new`` (the positions of this call) or ``all`` (those of earlier calls before them).

- What depends on sizes only (positions, masks, rotary angles) is computed for all positions and then
  cut to the new ones where rows are wanted; the cut is moved up as far as it goes. So whatever a mask
  or a position table is made of, its values are those of the whole sequence.
- What depends on tokens is coloured ``new``. Where an operation needs it for ``all`` positions (the keys and
  values of an attention, contracted or compared with every row), it is kept in the cache: ``cat(past, value)``.

The result is compared with the program on its own inputs, split at several places; and the program must
be causal: other tokens later on change nothing before them, not even the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from irprune.backend.onnx import Call, Signature, flattened
from irprune.backend.runtime import RELATIVE_TOLERANCE, dynamic_sizes, fresh_inputs, precision
from irprune.errors import ExportError
from irprune.frontend.export import trace
from irprune.ir.dims import as_size
from irprune.ir.program import Interface, Program, location
from irprune.rules.infer import UNIFORM
from irprune.rules.pointwise import NARY, UNARY
from irprune.rules.registry import bind, op_name

Colour = str
Colours = tuple[Colour | None, ...]

PAST, TOTAL = "past", "total"
_MAX = 2**63 - 1
_ATTENTION = "scaled_dot_product_attention"
_POINTWISE = frozenset((*NARY.split(), *UNARY.split(), "dropout"))
# They move or repeat what they read, and compute nothing.
_LAYOUT = frozenset(("transpose", "permute", "t", "clone", "contiguous", "alias", "squeeze", "unsqueeze", "flatten", "unflatten")).union(
    ("view", "reshape", "_unsafe_view", "expand", "repeat_interleave")
)
_SIZED = frozenset(("view", "reshape", "_unsafe_view", "expand"))


@dataclass(frozen=True)
class State:
    """One tensor of the cache.

    Attributes:
        past: Name of the input with the earlier positions.
        present: Name of the output with the new ones behind them.
        axis: The axis of the positions.
    """

    past: str
    present: str
    axis: int


@dataclass(frozen=True)
class Cached:
    """A program with a cache.

    Attributes:
        program: Takes the flat inputs of the original, then the cache; gives the flat outputs of the
            original for the new positions, then the cache.
        states: The cache, in the order of inputs and outputs.
        sequence: Label of the axis of the new positions.
        whole: Names of the inputs that span the earlier positions too (a padding mask).
    """

    program: Program
    states: tuple[State, ...]
    sequence: str
    whole: tuple[str, ...] = ()


def cached(program: Program, *, check: bool = True) -> Cached:
    """The program with a key-value cache.

    Args:
        program: A decoder with one dynamic sequence axis; its weights are shared.
        check: Compare with the program, split at several places.

    Raises:
        ExportError: The program cannot go on from earlier positions; says which operation is in the way.
    """
    flat = flattened(program, Signature.of(program))
    work = _Rewriter(flat, program)
    graph = work.rewritten()
    example = _example(work, flat)
    dynamic = {node.name: labels for node, labels in zip(graph.find_nodes(op="placeholder"), work.labels, strict=True)}
    traced = trace(fx.GraphModule(flat.module, graph), example, {}, dynamic)
    names = (*flat.interface.inputs, *(state.past for state in work.states))
    outputs = (*flat.interface.outputs, *(state.present for state in work.states))
    interface = dataclasses.replace(traced.interface, inputs=names, outputs=outputs)
    found = Cached(dataclasses.replace(traced, interface=interface), tuple(work.states), work.label, tuple(work.whole))
    return _compared(program, flat, found) if check else found


def real_inputs(found: Cached, sizes: Mapping[str, int] | None = None, *, seed: int = 0) -> Call:
    """Random inputs whose cache is one: what the program itself keeps of random earlier positions.

    Noise in its place leads a deep model where it amplifies every rounding.

    Args:
        found: The program with its cache.
        sizes: Label of a dynamic axis to its size; the example's size where it is missing.
        seed: Seed of the draw.
    """
    interface = found.program.interface
    wanted = {**dynamic_sizes(interface), **(sizes or {})}
    past, new = wanted[PAST], wanted[found.sequence]
    drawn, _ = fresh_inputs(interface, {**wanted, found.sequence: past + new, PAST: 0, TOTAL: past + new}, seed=seed)
    count = len(drawn) - len(found.states)
    values, cache = drawn[:count], drawn[count:]
    given = dataclasses.replace(interface, inputs=interface.inputs[:count], dynamic=_relabelled(interface.dynamic[:count], found.sequence))
    if past:
        with torch.no_grad():
            cache = found.program(*_cut(values, given, found.sequence, found.whole, 0, past), *cache)[-len(found.states) :]
    return (*_cut(values, given, found.sequence, found.whole, past, past + new), *cache), {}


def _relabelled(dynamic: Sequence[Mapping[int, str]], label: str) -> tuple[dict[int, str], ...]:
    """The axes of the inputs as the program without a cache has them."""
    return tuple({axis: label if one == TOTAL else one for axis, one in labels.items()} for labels in dynamic)


# -- rewriting --------------------------------------------------------------------------------------


class _Rewriter:
    """Builds the new graph beside the old one.

    Args:
        flat: The program with flat tensors in and out.
        program: The program that it came from, with its types where it has them.
    """

    def __init__(self, flat: Program, program: Program) -> None:
        self.old = flat.module.graph
        self.new = fx.Graph()
        self.states: list[State] = []
        self.whole: list[str] = []
        self.labels: list[dict[int, str]] = []
        self.past_shapes: list[tuple[Any, ...]] = []
        self._mixed = {(e.node, e.operand, e.axis): e.how for e in program.types.events if not e.exact} if program.types is not None else {}
        self._inputs = list(self.old.find_nodes(op="placeholder"))
        self.label, self.main = _sequence(flat, self._inputs)
        axis = next(axis for axis, label in self._labels(flat, self.main).items() if label == self.label)
        self.symbol = as_size(self.main.meta["val"].shape[axis])
        if not isinstance(self.symbol, sympy.Symbol):
            raise _refused("the length of its sequence is not free", self.main)
        self._axis = axis
        self.hints = _hints(self._inputs, flat)
        self._lanes: dict[fx.Node, tuple[fx.Node, Any]] = {}
        self._context: dict[fx.Node, fx.Node] = {}
        self._rows: dict[tuple[fx.Node, int], fx.Node] = {}
        self._sizes: dict[tuple[Any, Colour], Any] = {}
        self._kept: dict[fx.Node, tuple[fx.Node, Colours]] = {}
        self._presents: list[fx.Node] = []
        self._causal: fx.Node | None = None
        self._flat = flat

    def _labels(self, flat: Program, node: fx.Node) -> dict[int, str]:
        return flat.interface.dynamic[self._inputs.index(node)]

    def rewritten(self) -> fx.Graph:
        """The new graph: inputs, then pasts; outputs, then presents."""
        spans = self._spanning()
        self._data = self._depending({node for node in self._inputs if self._carries(node) and node not in spans})
        new = [self.new.placeholder(node.name) for node in self._inputs]
        for node, made in zip(self._inputs, new, strict=True):
            labels = dict(self._labels(self._flat, node))
            if node in spans:
                self.whole.append(self._flat.interface.inputs[self._inputs.index(node)])
                labels = {axis: TOTAL if label == self.label else label for axis, label in labels.items()}
            self.labels.append(labels)
            if node in self._data:
                self._lanes[node] = (made, self._plain(node, "new"))
            else:
                self._context[node] = made
        self._first = self.new.placeholder("past_length")
        self._past = self._first
        for node in self.old.nodes:
            if node.op == "call_function" and node in self._data:
                self._lanes[node] = self._visit(node)
        if not self.states:
            raise _refused("it has no attention over earlier positions, so there is nothing to keep", self.main)
        results: Any = self.old.output_node().args[0]
        self.new.output((*(self._result(leaf) for leaf in results), *self._presents))
        first = next(node for node in self.new.nodes if node.op == "placeholder" and node.name == "past_0")
        with self.new.inserting_after(next(node for node in reversed(self.new.nodes) if node.op == "placeholder")):
            length = self.new.call_function(torch.ops.aten.sym_size.int, (first, self.states[0].axis))
        self._first.replace_all_uses_with(length)
        self.new.erase_node(self._first)
        self.new.eliminate_dead_code()
        self.new.lint()
        return self.new

    # -- what depends on what

    def _carries(self, value: fx.Node) -> bool:
        """Whether an axis of a value has the length of the sequence."""
        return bool(self._axes(value))

    def _axes(self, node: fx.Node) -> list[int]:
        return _sequence_axes(node.meta.get("val"), self.symbol)

    def _plain(self, node: fx.Node, colour: Colour) -> Any:
        def one(value: Any) -> Colours:
            axes = _sequence_axes(value, self.symbol)
            return tuple(colour if axis in axes else None for axis in range(value.ndim)) if isinstance(value, torch.Tensor) else ()

        value = node.meta["val"]
        return [one(part) for part in value] if isinstance(value, (tuple, list)) else one(value)

    def _depending(self, sources: set[fx.Node]) -> set[fx.Node]:
        """The sources and what is computed from their contents, not from their sizes."""
        out = set(sources)
        for node in self.old.nodes:
            if node.op == "call_function" and not _reads_sizes_only(node) and any(operand in out for operand in node.all_input_nodes):
                out.add(node)
        return out

    def _spanning(self) -> set[fx.Node]:
        """Inputs beside the tokens that are compared with themselves: a mask of rows against columns needs all of it."""
        tokens = self._depending({self.main})
        out = set()
        for node in self._inputs:
            if node is not self.main and self._carries(node):
                reached = self._depending({node}) - tokens
                if any(len(self._axes(one)) > 1 for one in reached):
                    out.add(node)
        return out

    # -- sizes

    def _size(self, value: Any, colour: Colour) -> Any:
        """An integer of the old graph, the sequence as long as the colour says."""
        if not isinstance(value, fx.Node):
            return value
        key = (value, colour)
        if key not in self._sizes:
            if getattr(value.target, "overloadpacket", None) is torch.ops.aten.sym_size:
                self._sizes[key] = self._expression(as_size(value.meta["val"]), colour, value)
            elif value in self._data:
                raise _refused("a size depends on the contents of the tokens", value)
            else:
                args, kwargs = fx.map_arg((value.args, dict(value.kwargs)), lambda node: self._of_context(node, colour))
                self._sizes[key] = self.new.create_node(value.op, value.target, args, kwargs)
        return self._sizes[key]

    def _of_context(self, node: fx.Node, colour: Colour) -> Any:
        return self._all(node) if isinstance(node.meta.get("val"), torch.Tensor) or node.op == "get_attr" else self._size(node, colour)

    def _expression(self, size: Any, colour: Colour, place: fx.Node) -> Any:
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size == self.symbol:
            new = self._length(self.main, self._axis)
            return new if colour == "new" else self._total()
        if isinstance(size, sympy.Symbol):
            for node in self._inputs:
                for axis, given in enumerate(node.meta["val"].shape):
                    if as_size(given) == size:
                        return self._length(node, axis)
        if isinstance(size, (sympy.Add, sympy.Mul)):
            parts = [self._expression(part, colour, place) for part in size.args]
            function = operator.add if isinstance(size, sympy.Add) else operator.mul
            result = parts[0]
            for part in parts[1:]:
                result = self.new.call_function(function, (result, part))
            return result
        raise _refused(f"the size {size} is not a sum or product of the inputs' sizes", place)

    def _length(self, node: fx.Node, axis: int) -> Any:
        key = ((node, axis), "new")
        if key not in self._sizes:
            made = self._lanes[node][0] if node in self._lanes else self._context[node]
            self._sizes[key] = self._call(torch.ops.aten.sym_size.int, made, axis)
        return self._sizes[key]

    def _total(self) -> Any:
        key = (None, "all")
        if key not in self._sizes:
            self._sizes[key] = self.new.call_function(operator.add, (self._past, self._length(self.main, self._axis)))
        return self._sizes[key]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.new.call_function(target, args)

    # -- what depends on sizes only

    def _all(self, node: fx.Node) -> fx.Node:
        """A value that depends on no token, for all positions."""
        if node not in self._context:
            if node.op == "get_attr":
                made = self.new.get_attr(str(node.target))
            elif any(operand in self._data for operand in node.all_input_nodes if _is_tensor(operand)):
                made = self._like(node)
            else:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: self._of_context(operand, "all"))
                made = self.new.create_node(node.op, node.target, args, kwargs)
            self._context[node] = made
        return self._context[node]

    def _like(self, node: fx.Node) -> fx.Node:
        """A constant tensor shaped like one that depends on tokens."""
        name, value, bound = _name(node), node.meta["val"], bind(node.target, node.args, dict(node.kwargs))
        fill = {"zeros": 0, "ones": 1, "empty": 0}.get(name.removeprefix("new_").removesuffix("_like"), bound.get("fill_value"))
        if not isinstance(fill, (int, float, bool)):
            raise _refused("it fills a tensor with a value of its own", node)
        sizes = [self._expression(as_size(size), "all", node) for size in value.shape]
        return self.new.call_function(torch.ops.aten.full.default, (sizes, fill), {"dtype": value.dtype, "device": value.device})

    def _row(self, node: fx.Node, axis: int) -> fx.Node:
        """A value that depends on no token, cut to the new positions of an axis."""
        key = (node, axis)
        if key not in self._rows:
            self._rows[key] = self._row_above(node, axis) or self._call(
                torch.ops.aten.slice.Tensor, self._all(node), axis, self._past, _MAX
            )
        return self._rows[key]

    def _row_above(self, node: fx.Node, axis: int) -> fx.Node | None:
        """The same, cut before the operation, where that is known to give the same."""
        if node.op != "call_function" or any(operand in self._data for operand in node.all_input_nodes):
            return None
        name, ndim = _name(node), node.meta["val"].ndim
        bound = bind(node.target, node.args, dict(node.kwargs))
        moved: Callable[[fx.Node], int | None]
        sized: list[Any] | None = None
        if name in _POINTWISE or name == "expand":

            def moved(operand: fx.Node) -> int | None:
                return _aligned(operand, ndim, axis)

            sized = bound.get("size") if name == "expand" else None
        elif name == "unsqueeze":
            at = bound["dim"] % ndim

            def moved(operand: fx.Node) -> int | None:
                return axis - (axis > at)
        elif name in ("transpose", "permute"):
            order = _permutation(node)

            def moved(operand: fx.Node) -> int | None:
                return order[axis]
        elif (
            name == "index" and all(isinstance(one, fx.Node) for one in bound["indices"]) and len(bound["indices"]) == _ndim(bound["self"])
        ):

            def moved(operand: fx.Node) -> int | None:
                return None if operand is bound["self"] else _aligned(operand, ndim, axis)
        elif name == "embedding" and axis < ndim - 1:

            def moved(operand: fx.Node) -> int | None:
                return axis if operand is bound["indices"] else None
        elif name == "cat" and bound["dim"] % ndim != axis:

            def moved(operand: fx.Node) -> int | None:
                return axis
        elif name == "matmul" and axis >= ndim - 2 and min(_ndim(bound["self"]), _ndim(bound["other"])) > 1:

            def moved(operand: fx.Node) -> int | None:
                wanted = bound["self"] if axis == ndim - 2 else bound["other"]
                return _ndim(operand) - ndim + axis if operand is wanted else None
        else:
            return None

        def operand_of(operand: fx.Node) -> Any:
            if not _is_tensor(operand):
                return self._size(operand, "all")
            place = moved(operand)
            return self._row(operand, place) if place is not None and place in self._axes(operand) else self._all(operand)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand_of)
        if sized is not None:
            sizes = [self._size(size, "new" if place == axis else "all") for place, size in enumerate(sized)]
            args = (args[0], sizes, *args[2:])
        return self.new.create_node(node.op, node.target, args, kwargs)

    # -- what depends on tokens

    def _use(self, node: fx.Node, colours: Mapping[int, Colour], role: str = "state") -> fx.Node:
        """A tensor with its axes in these colours; the role names it where it has to be kept."""
        wanted = {axis: colour for axis, colour in colours.items() if axis in self._axes(node)}
        if node not in self._data:
            rows = [axis for axis, colour in wanted.items() if colour == "new"]
            if not rows:
                return self._all(node)
            made = self._row(node, rows[0])
            for axis in rows[1:]:
                made = self._call(torch.ops.aten.slice.Tensor, made, axis, self._past, _MAX)
            return made
        made, have = self._lanes[node]
        other = [axis for axis, colour in wanted.items() if have[axis] != colour]
        if not other:
            return made
        if len(other) > 1 or have[other[0]] == "all":
            raise _refused("it gives all positions where only new ones can be used", node)
        return self._keep(node, role)[0]

    def _keep(self, node: fx.Node, role: str) -> tuple[fx.Node, Colours]:
        """A value for all positions: the cache stands as far up as the value only moves and repeats."""
        if node in self._kept:
            return self._kept[node]
        chain = [node]
        while _name(chain[-1]) in _LAYOUT:
            operands = [operand for operand in chain[-1].all_input_nodes if _is_tensor(operand)]
            if len(operands) != 1 or operands[0] not in self._data or len(self._axes(operands[0])) != 1:
                break
            chain.append(operands[0])
            if operands[0] in self._kept:
                break
        place = len(chain) - 1 if chain[-1] in self._kept else self._best(chain)
        if chain[place] not in self._kept:
            self._kept[chain[place]] = self._append(chain[place], role)
        for one in reversed(chain[:place]):
            self._kept[one] = self._apply(one, lambda operand: self._kept[operand])
        return self._kept[node]

    def _best(self, chain: Sequence[fx.Node]) -> int:
        """Where the cache is smallest; of equals the usual (batch, heads, positions, size), then the nearest to the use."""

        def rank(place: int) -> tuple[int, bool, int]:
            sizes = [as_size(size) for size in chain[place].meta["val"].shape]
            numel = 1
            for size in sizes:
                numel *= size if isinstance(size, int) else int(size.subs(self.hints))
            return numel, not (len(sizes) == 4 and self._axes(chain[place]) == [2]), place

        free = [place for place, node in enumerate(chain) if len(self._axes(node)) == 1 and self._is_free(node)]
        if not free:
            raise _refused("its positions share an axis with something else, so they cannot be kept", chain[0])
        return min(free, key=rank)

    def _is_free(self, node: fx.Node) -> bool:
        sizes = [as_size(size) for size in node.meta["val"].shape]
        known = {as_size(size) for one in self._inputs for size in one.meta["val"].shape}
        return all(isinstance(size, int) or (isinstance(size, sympy.Symbol) and size in known) for size in sizes)

    def _append(self, node: fx.Node, role: str) -> tuple[fx.Node, Colours]:
        (axis,) = self._axes(node)
        number, block = len(self.states), sum(state.past.endswith(f".{role}") for state in self.states)
        with self.new.inserting_before(self._first):
            past = self.new.placeholder(f"past_{number}")
        present = self._call(torch.ops.aten.cat.default, [past, self._lanes[node][0]], axis)
        self.states.append(State(f"past_key_values.{block}.{role}", f"present.{block}.{role}", axis))
        self._presents.append(present)
        self.past_shapes.append((tuple(as_size(size) for size in node.meta["val"].shape), node.meta["val"].dtype, node.meta["val"].device))
        self.labels.append(
            {axis: PAST, **{a: self._label_of(size) for a, size in enumerate(self.past_shapes[-1][0]) if self._is_other(size)}}
        )
        return present, tuple("all" if a == axis else None for a in range(node.meta["val"].ndim))

    def _is_other(self, size: Any) -> bool:
        return not isinstance(size, int) and size != self.symbol

    def _label_of(self, size: Any) -> str:
        """The label of a dynamic size that an input has too."""
        found = (
            label
            for node, labels in zip(self._inputs, self._flat.interface.dynamic, strict=True)
            for axis, label in labels.items()
            if as_size(node.meta["val"].shape[axis]) == size
        )
        return next(found)

    def _result(self, leaf: Any) -> Any:
        if leaf in self._data:
            made, colours = self._lanes[leaf]
            if "all" in colours:
                raise _refused("it is an output over all positions", leaf)
            return made
        if self._carries(leaf):
            axes = self._axes(leaf)
            return self._use(leaf, dict.fromkeys(axes[:1], "new"))
        return self._all(leaf)

    # -- operations on tokens

    def _visit(self, node: fx.Node) -> tuple[fx.Node, Any]:
        name = _name(node)
        if name == "getitem":
            made, colours = self._lanes[node.args[0]]  # type: ignore[index]
            return self._call(node.target, made, node.args[1]), colours[node.args[1]]
        if name.endswith("_") and not name.endswith("__"):
            node = _out_of_place(node)
            name = _name(node)
        if name == _ATTENTION:
            return self._attention(node)
        if name in ("matmul", "bmm", "baddbmm"):
            return self._product(node)
        if name in _POINTWISE or name == "cat":
            return self._broadcast(node)
        if name == "select":
            return self._select(node)
        return self._apply(node, self._lanes.__getitem__)

    def _attention(self, node: fx.Node) -> tuple[fx.Node, Colours]:
        bound = bind(node.target, node.args, dict(node.kwargs))
        query, key, value, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
        colours = self._plain(node, "new")
        over = self._axes(key) == [_ndim(key) - 2]
        if over != (self._axes(value) == [_ndim(value) - 2]) or self._axes(query) not in ([], [_ndim(query) - 2]):
            raise _refused("its keys and values have no positions of their own", node)
        args: list[Any] = [self._use(query, {_ndim(query) - 2: "new"})]
        args += [self._use(one, {_ndim(one) - 2: "all"}, role) for one, role in ((key, "key"), (value, "value"))]
        if mask is not None:
            rows = {_ndim(mask) - 2: "new", _ndim(mask) - 1: "all"}
            args.append(self._use(mask, rows))  # type: ignore[arg-type]
        elif bound["is_causal"] and over:
            args.append(self._triangle(node))
        else:
            args.append(None)
        kwargs = {name: bound[name] for name in ("scale", "enable_gqa") if bound.get(name)}
        dropout, causal = bound["dropout_p"], bound["is_causal"] and not over
        return self.new.create_node(node.op, node.target, (*args, dropout, causal), kwargs), colours

    def _triangle(self, node: fx.Node) -> fx.Node:
        """The causal mask of the new rows against all columns."""
        if self._causal is None:
            device = {"device": node.meta["val"].device}
            columns = self.new.call_function(torch.ops.aten.arange.default, (self._total(),), device)
            rows = self._call(torch.ops.aten.slice.Tensor, columns, 0, self._past, _MAX)
            self._causal = self._call(torch.ops.aten.le.Tensor, columns, self._call(torch.ops.aten.unsqueeze.default, rows, 1))
        return self._causal

    def _product(self, node: fx.Node) -> tuple[fx.Node, Colours]:
        """``a @ b``: what is summed over, and the columns beside rows of the sequence, are all positions."""
        bound = bind(node.target, node.args, dict(node.kwargs))
        names = {"matmul": ("self", "other"), "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2")}[_name(node)]
        left, right = (bound[name] for name in names)
        if min(_ndim(left), _ndim(right)) < 2:
            return self._apply(node, self._lanes.__getitem__)
        ndim = _ndim(node)
        rows, inner, columns = _ndim(left) - 2, (_ndim(left) - 1, _ndim(right) - 2), _ndim(right) - 1
        wanted: dict[fx.Node, dict[int, Colour]] = {
            left: {rows: "new", inner[0]: "all", **dict.fromkeys(range(rows), "new")},
            right: {inner[1]: "all", columns: "all" if rows in self._axes(left) else "new", **dict.fromkeys(range(columns - 1), "new")},
        }
        if left is right:
            raise _refused("it multiplies a value with itself", node)
        colours = tuple(
            None if axis not in self._axes(node) else "all" if axis == ndim - 1 and ndim - 2 in self._axes(node) else "new"
            for axis in range(ndim)
        )

        def operand_of(operand: fx.Node) -> Any:
            if operand in wanted:
                return self._use(operand, wanted[operand], "value" if inner[0] in self._axes(left) else "key")
            return self._use(operand, {a - ndim + _ndim(operand): c for a, c in enumerate(colours) if c is not None})

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand_of)
        return self.new.create_node(node.op, node.target, args, kwargs), colours

    def _broadcast(self, node: fx.Node) -> tuple[fx.Node, Colours]:
        """Aligned axes have one colour; the last of two is that of the columns."""
        self._check_mixing(node)
        axes, ndim = self._axes(node), _ndim(node)
        operands = [operand for operand in node.all_input_nodes if _is_tensor(operand)]
        colours: list[Colour | None] = [None] * ndim
        for axis in axes:
            found = {
                self._lanes[one][1][place]
                for one in operands
                if one in self._data and (place := axis - ndim + _ndim(one)) >= 0 and place in self._axes(one)
            }
            colours[axis] = "all" if "all" in found or (len(axes) > 1 and axis == axes[-1]) else "new"

        def operand_of(operand: fx.Node) -> Any:
            if not _is_tensor(operand):
                return self._size(operand, "new")
            return self._use(operand, {a - ndim + _ndim(operand): c for a, c in enumerate(colours) if c is not None})

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand_of)
        return self.new.create_node(node.op, node.target, args, kwargs), tuple(colours)

    def _select(self, node: fx.Node) -> tuple[fx.Node, Colours]:
        bound = bind(node.target, node.args, dict(node.kwargs))
        made, colours = self._lanes.get(bound["self"], (None, ()))
        axis = bound["dim"] % _ndim(bound["self"])
        if made is None or colours[axis] is None:
            return self._apply(node, self._lanes.__getitem__)
        if bound["index"] != -1:
            raise _refused("it takes one position out of the sequence", node)
        return self._call(node.target, made, axis, -1), (*colours[:axis], *colours[axis + 1 :])

    def _apply(self, node: fx.Node, lane: Callable[[fx.Node], tuple[fx.Node, Any]]) -> tuple[fx.Node, Any]:
        """Any other operation on one tensor with positions: they stay in their order, the operation works row by row."""
        self._check_mixing(node)
        carriers = [operand for operand in node.all_input_nodes if _is_tensor(operand) and self._carries(operand)]
        if len(carriers) > 1:
            raise _refused("it combines several values over the sequence in a way that is not understood", node)
        have: Colours = ()
        if carriers:
            have = lane(carriers[0])[1] if carriers[0] in self._data else self._plain(carriers[0], "new")
        order = range(len(have))
        if _name(node) in ("transpose", "permute", "t"):
            order = _permutation(node)  # type: ignore[assignment]
        present = [have[axis] for axis in order if have[axis] is not None]

        def coloured(value: Any) -> Colours:
            if not isinstance(value, torch.Tensor):
                return ()
            axes = _sequence_axes(value, self.symbol)
            if len(axes) != len(present):
                raise _refused("it changes the axis of the sequence", node)
            of = dict(zip(axes, present, strict=True))
            return tuple(of.get(axis) for axis in range(value.ndim))

        value = node.meta["val"]
        colours: Any = [coloured(part) for part in value] if isinstance(value, (tuple, list)) else coloured(value)

        def operand_of(operand: fx.Node) -> Any:
            if not _is_tensor(operand):
                return self._size(operand, self._only(node, have))
            if operand in self._data:
                return lane(operand)[0]
            return self._use(operand, dict.fromkeys(self._axes(operand), "new"))

        bound = bind(node.target, node.args, dict(node.kwargs))
        if _name(node) in _SIZED:
            sizes = bound["shape" if "shape" in bound else "size"]
            literals = [self._size(size, colours[axis] or "new") for axis, size in enumerate(sizes)]
            return self._call(node.target, operand_of(bound["self"]), literals), colours
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand_of)
        return self.new.create_node(node.op, node.target, args, kwargs), colours

    def _only(self, node: fx.Node, colours: Colours) -> Colour:
        """The colour of a size in a call whose operand has one colour."""
        found = {colour for colour in colours if colour is not None} or {"new"}
        if len(found) > 1:
            raise _refused("one of its sizes may be that of rows or of columns", node)
        return found.pop()  # type: ignore[return-value]

    def _check_mixing(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            for axis in self._axes(operand) if operand in self._lanes else ():
                how = self._mixed.get((node.name, operand.name, axis))
                if how is not None and self._lanes[operand][1][axis] == "new":
                    raise _refused(f"it reads across the sequence ({how})", node)


def _sequence(flat: Program, inputs: Sequence[fx.Node]) -> tuple[str, fx.Node]:
    """The label of the sequence axis, and the input whose positions are new in each call."""
    found: dict[str, fx.Node] = {}
    for node, labels in zip(inputs, flat.interface.dynamic, strict=True):
        for axis, label in labels.items():
            if axis > 0:
                found.setdefault(label, node)
    if len(found) != 1:
        problem = f"several axes are dynamic beside the batch ({', '.join(found)})" if found else "no axis is dynamic beside the batch"
        raise ExportError(f"a cache needs one axis of positions, and {problem}", hint=_HINT)
    return next(iter(found.items()))


def _hints(inputs: Sequence[fx.Node], flat: Program) -> dict[Any, int]:
    """The sizes of the example by symbol."""
    values = pytree.tree_leaves(flat.interface.example)
    out: dict[Any, int] = {}
    for node, value in zip(inputs, values, strict=True):
        for size, number in zip(node.meta["val"].shape, value.shape, strict=True):
            if isinstance(as_size(size), sympy.Symbol):
                out[as_size(size)] = int(number)
    return out


def _sequence_axes(value: Any, symbol: Any) -> list[int]:
    if not isinstance(value, torch.Tensor):
        return []
    sizes = [as_size(size) for size in value.shape]
    return [axis for axis, size in enumerate(sizes) if not isinstance(size, int) and size.has(symbol)]


def _reads_sizes_only(node: fx.Node) -> bool:
    name = _name(node)
    value = node.meta.get("val")
    return name == "sym_size" or (op_name(node.target) in UNIFORM and isinstance(value, torch.Tensor) and name != "scalar_tensor")


def _name(node: fx.Node) -> str:
    return op_name(node.target).removeprefix("aten::") if node.op == "call_function" else ""


def _out_of_place(node: fx.Node) -> fx.Node:
    """The call with a result of its own, where nobody else sees what it writes to."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    packet = getattr(torch.ops.aten, _name(node)[:-1], None)
    target = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    later = any(user is not node and node < user for user in written.users)
    if target is None or later or _name(written) in _LAYOUT or written.op != "call_function":
        raise _refused("it writes in place", node)
    node.target = target
    return node


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" or isinstance(value, (torch.Tensor, tuple, list))


def _ndim(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _aligned(operand: fx.Node, ndim: int, axis: int) -> int | None:
    """The axis of a broadcast operand under an axis of the result."""
    place = axis - ndim + _ndim(operand)
    return place if place >= 0 else None


def _permutation(node: fx.Node) -> list[int]:
    """For each axis of the result that of the operand."""
    bound, ndim = bind(node.target, node.args, dict(node.kwargs)), _ndim(node)
    if _name(node) == "permute":
        return [axis % ndim for axis in bound["dims"]]
    first, second = (bound["dim0"] % ndim, bound["dim1"] % ndim) if _name(node) == "transpose" else (0, ndim - 1)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


_HINT = "export without a cache (export{cache=false})"


def _refused(reason: str, node: fx.Node) -> ExportError:
    operation = "" if node.op == "placeholder" else f"operation '{getattr(node.target, 'overloadpacket', node.target)}': "
    return ExportError(
        f"the program cannot go on from a cache: {operation}{reason}",
        where=f"%{node.name} ({location(node) or 'line unknown'})",
        hint=_HINT,
    )


# -- examples and the check -------------------------------------------------------------------------


def _whole_example(flat: Program, label: str, seed: int = 0) -> list[torch.Tensor]:
    """Inputs like the example's, long enough to be split."""
    sizes = dynamic_sizes(flat.interface)
    if sizes[label] < 8:
        sizes[label] = 8
    return list(pytree.tree_leaves(fresh_inputs(flat.interface, sizes, seed=seed)))


def _cut(
    values: Sequence[torch.Tensor], interface: Interface, label: str, whole: Sequence[str], start: int, stop: int
) -> list[torch.Tensor]:
    """The inputs of one call: positions from start to stop, those that span everything from zero."""
    out = []
    for name, value, labels in zip(interface.inputs, values, interface.dynamic, strict=True):
        for axis, one in labels.items():
            if one == label:
                first = 0 if name in whole else start
                value = value.narrow(axis, first, stop - first)
        out.append(value)
    return out


def _example(work: _Rewriter, flat: Program) -> tuple[torch.Tensor, ...]:
    """Inputs to trace with: sizes that are all different, so that none is taken for another."""
    values = _whole_example(flat, work.label)
    sizes = dynamic_sizes(flat.interface)
    length = max(sizes[work.label], 8)
    taken = set(sizes.values()) - {sizes[work.label]}
    new = next(n for n in itertools.chain(range(3, length - 2), (2,)) if (n != length - n and not {n, length - n} & taken) or n == 2)
    generator = torch.Generator().manual_seed(0)
    hints = {**work.hints, work.symbol: length - new}
    pasts = []
    for shape, dtype, device in work.past_shapes:
        concrete = [size if isinstance(size, int) else int(size.subs(hints)) for size in shape]
        noise = torch.randn(concrete, generator=generator)
        pasts.append((noise if dtype.is_floating_point else noise.abs()).to(dtype).to(device))
    return (*_cut(values, flat.interface, work.label, work.whole, length - new, length), *pasts)


def _splits(length: int) -> Iterator[list[int]]:
    """Where calls end: one by one after a first call, and in chunks."""
    half = length // 2
    yield [half, half + 1, half + 2, length]
    yield [1, 2, max(3, length - 2), length]


def _compared(program: Program, flat: Program, found: Cached) -> Cached:
    """Prefill and decoding against the program on all tokens so far; the example's cache becomes a real one."""
    relative = RELATIVE_TOLERANCE[precision(program)]
    values = _whole_example(flat, found.sequence)
    length = next(
        value.shape[axis]
        for value, labels in zip(values, flat.interface.dynamic, strict=True)
        for axis, label in labels.items()
        if label == found.sequence
    )
    _check_causal(flat, found.sequence, values, length)
    outputs = len(flat.interface.outputs)
    with torch.no_grad():
        wanted: dict[int, Any] = {length: flat(*values)}
    example = pytree.tree_leaves(found.program.interface.example)
    empty = [value.narrow(state.axis, 0, 0) for state, value in zip(found.states, example[len(values) :], strict=True)]
    kept = example
    noise = dict.fromkeys(flat.interface.outputs, 0.0)
    with torch.no_grad():
        for end in {end for ends in _splits(length) for end in ends} - {length}:
            wanted[end] = flat(*_cut(values, flat.interface, found.sequence, (), 0, end))
            for name, whole, part in zip(flat.interface.outputs, wanted[length], wanted[end], strict=True):
                noise[name] = max(noise[name], _rounding(whole, part))
        for ends in _splits(length):
            pasts, start = empty, 0
            for end in ends:
                given = [*_cut(values, flat.interface, found.sequence, found.whole, start, end), *pasts]
                if start and end == ends[-1]:
                    kept = given
                results = found.program(*given)
                for name, want, got in zip(flat.interface.outputs, wanted[end], results[:outputs], strict=True):
                    _same(name, want, got, (relative, _NOISES * noise[name]), start, end)
                pasts, start = list(results[outputs:]), end
    interface = dataclasses.replace(found.program.interface, example=(tuple(kept), {}))
    return dataclasses.replace(found, program=dataclasses.replace(found.program, interface=interface))


def _check_causal(flat: Program, label: str, values: Sequence[torch.Tensor], length: int) -> None:
    """Rows of the first half must be what they are whatever stands in the second."""
    other = _whole_example(flat, label, seed=1)
    half = length // 2
    mixed = []
    for value, later, labels in zip(values, other, flat.interface.dynamic, strict=True):
        for axis, one in labels.items():
            if one == label:
                value = torch.cat([value.narrow(axis, 0, half), later.narrow(axis, half, length - half)], axis)
        mixed.append(value)
    sequence = _sequence_symbol(flat, label)
    with torch.no_grad():
        leaves: Any = flat.module.graph.output_node().args[0]
        pairs = zip(flat.interface.outputs, leaves, flat(*values), flat(*mixed), strict=True)
        for name, node, want, got in pairs:
            for axis in _sequence_axes(node.meta["val"], sequence)[:1]:
                want, got = want.narrow(axis, 0, half), got.narrow(axis, 0, half)
                if not torch.equal(want, got):
                    raise ExportError(
                        "the program cannot go on from a cache: later tokens change what it computes for earlier ones "
                        f"(by {float((want.double() - got.double()).abs().max()):.3g})",
                        where=f"output {name}",
                        hint=_HINT,
                    )


def _sequence_symbol(flat: Program, label: str) -> Any:
    for node, labels in zip(flat.module.graph.find_nodes(op="placeholder"), flat.interface.dynamic, strict=True):
        for axis, one in labels.items():
            if one == label:
                return as_size(node.meta["val"].shape[axis])
    raise AssertionError(label)


# A program that amplifies rounding differs by as much from itself at another length. So much more is allowed then, but
# no more than a tenfold tolerance: what depends on the length itself differs, too.
_NOISES, _MOST = 8.0, 10.0


def _rounding(whole: torch.Tensor, part: torch.Tensor) -> float:
    """How far the same rows of a causal program are apart at two lengths."""
    for axis, (long, short) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if long != short:
            return float((whole.narrow(axis, 0, short).double() - part.double()).abs().max())
    return 0.0


def _same(name: str, want: torch.Tensor, got: torch.Tensor, tolerance: tuple[float, float], start: int, end: int) -> None:
    """New rows against the last ones of the whole; the tolerance is relative, and what rounding may add to it."""
    for axis, (whole, part) in enumerate(zip(want.shape, got.shape, strict=True)):
        if whole != part:
            want = want.narrow(axis, whole - part, part)
    error = float((want.double() - got.double()).abs().max()) if want.numel() else 0.0
    allowed = tolerance[0] * max(float(want.double().abs().max()), 1e-2) if want.is_floating_point() else 0.0
    allowed = min(max(allowed, tolerance[1]), _MOST * allowed)
    if not error <= allowed:
        raise ExportError(
            f"the program cannot go on from a cache: after {start} positions, the next {end - start} differ by {error:.3g} from "
            f"those of the whole sequence, allowed is {allowed:.3g}",
            where=f"output {name}",
            hint=_HINT,
        )
