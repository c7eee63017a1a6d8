"""A program run for training: on tensors that are handed in, segment by segment, inner values among the results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from irprune.analysis.cost import hints
from irprune.backend.proof import wide_tensor, widened
from irprune.ir.dims import as_size
from irprune.ir.program import Program, copied, module_path
from irprune_passes.cuts import unsafe_cuts


@dataclass(frozen=True)
class _Segment:
    """Consecutive operations, the values that they read from outside and those that are wanted of them."""

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]


class Engine:
    """Runs a copy of a program's graph.

    Args:
        program: The program. Its tensors are not used.
        capture: Names of values to give besides the outputs.
        segments: Gradient checkpointing: so many parts, of which only the values at their ends are kept for
            the backward pass; 1 keeps everything.
        device: Where it runs: devices that the trace has written into operations are replaced.
        dropout: Draw what the adapters' dropout drops.
        wide: Compute in float32 what the trace has in half precision: inputs and casts are widened. The tensors
            are the caller's.
    """

    def __init__(
        self,
        program: Program,
        capture: Sequence[str] = (),
        *,
        segments: int = 1,
        device: torch.device | None = None,
        dropout: bool = False,
        wide: bool = False,
    ) -> None:
        self._graph = copied(program.module.graph)
        nodes = {node.name: node for node in self._graph.nodes}
        if device is not None:
            relocate(self._graph, device)
        self._wide = wide
        if wide:
            _replace(self._graph, widened)
        for node in nodes.values():
            if dropout and node.target is torch.ops.aten.dropout.default:
                node.args = (*node.args[:2], True)
        self._captured = [nodes[name] for name in capture]
        self._inputs = [node for node in nodes.values() if node.op == "placeholder"]
        self._output = self._graph.output_node()
        calls = [node for node in nodes.values() if node.op == "call_function"]
        cuts = [0, *_cuts(program, calls, segments), len(calls)]
        self._segments = [self._segment(calls[start:stop]) for start, stop in itertools.pairwise(cuts)]

    def __call__(
        self, tensors: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[torch.Tensor]]:
        """The program's outputs as its callers know them, and the captured values.

        Args:
            tensors: Parameters and buffers by name.
            args: Positional inputs.
            kwargs: Inputs by keyword.
        """
        flat = pytree.tree_leaves((args, dict(kwargs)))
        if self._wide:
            flat = [wide_tensor(value) for value in flat]
        values: dict[fx.Node, Any] = dict(zip(self._inputs, flat, strict=True))

        def look_up(node: fx.Node) -> Any:
            return tensors[str(node.target)] if node.op == "get_attr" else values[node]

        for segment in self._segments:
            given = [values[node] for node in segment.reads]
            if len(self._segments) > 1 and torch.is_grad_enabled():
                found = checkpoint(_run, segment, tensors, *given, use_reentrant=False)
            else:
                found = _run(segment, tensors, *given)
            values.update(zip(segment.gives, found, strict=True))
        results = fx.map_arg(self._output.args[0], look_up)
        return self._graph.process_outputs(results), [look_up(node) for node in self._captured]

    def _segment(self, nodes: Sequence[fx.Node]) -> _Segment:
        within = set(nodes)
        reads = dict.fromkeys(
            operand for node in nodes for operand in node.all_input_nodes if operand not in within and operand.op != "get_attr"
        )
        wanted = {*self._captured, self._output}
        gives = tuple(node for node in nodes if node in wanted or any(user not in within for user in node.users))
        return _Segment(tuple(nodes), tuple(reads), gives)


def _run(segment: _Segment, tensors: Mapping[str, torch.Tensor], *given: Any) -> tuple[Any, ...]:
    values: dict[fx.Node, Any] = dict(zip(segment.reads, given, strict=True))
    kept = {*segment.gives, *segment.reads}
    last: dict[fx.Node, fx.Node] = {operand: node for node in segment.nodes for operand in node.all_input_nodes}

    def look_up(node: fx.Node) -> Any:
        return tensors[str(node.target)] if node.op == "get_attr" else values[node]

    for node in segment.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), look_up)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for operand in node.all_input_nodes:
            if last[operand] is node and operand not in kept:
                values.pop(operand, None)
    return tuple(values[node] for node in segment.gives)


def relocate(graph: fx.Graph, device: torch.device) -> None:
    """Replace every device that is written into an operation."""
    _replace(graph, lambda value: device if isinstance(value, torch.device) else value)


def _replace(graph: fx.Graph, change: Callable[[Any], Any]) -> None:
    """Change what is written into operations: each leaf of their arguments."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, change)
            node.kwargs = fx.node.map_aggregate(node.kwargs, change)


# -- where few values are alive -------------------------------------------------------------------


def trunk(program: Program) -> list[str]:
    """Values that everything flows through: the only activation alive where they are, at the border of a module.

    An activation depends on an input and on a parameter, so masks and positional tables do not count. In a
    network of residual blocks these are the values of its residual stream. Outputs are left out.
    """
    calls = [node for node in program.nodes if node.op == "call_function"]
    ended = {operand for node in program.nodes if node.op == "output" for operand in node.all_input_nodes}
    found = []
    for position, alive in enumerate(_alive(program, calls)):
        if len(alive) != 1 or position + 1 >= len(calls):
            continue
        (node,) = alive
        if node not in ended and node.name not in found and module_path(node) != module_path(calls[position + 1]):
            found.append(node.name)
    return found


def _alive(program: Program, calls: Sequence[fx.Node]) -> Iterator[set[fx.Node]]:
    """After each operation: the floating-point activations that are read later."""
    source: dict[fx.Node, tuple[bool, bool]] = {}
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr"):
            source[node] = (node.op == "placeholder", node.op == "get_attr" and program.is_parameter(str(node.target)))
        else:
            parts = [source[operand] for operand in node.all_input_nodes]
            source[node] = (any(part[0] for part in parts), any(part[1] for part in parts))
    order = {node: position for position, node in enumerate(program.nodes)}
    ends = {node: max((order[user] for user in node.users), default=-1) for node in calls}
    alive: set[fx.Node] = set()
    for node in calls:
        alive = {value for value in alive if ends[value] > order[node]}
        value = node.meta.get("val")
        several = isinstance(value, list | tuple)
        if all(source[node]) and ends[node] > order[node] and (several or (isinstance(value, torch.Tensor) and value.is_floating_point())):
            alive = {*alive, node}
        yield alive


def _cuts(program: Program, calls: Sequence[fx.Node], segments: int) -> list[int]:
    """Where to cut into segments of about equal activations: in reach of each even place, where the fewest bytes are alive."""
    if segments < 2 or len(calls) < 2 * segments:
        return []
    originals = [program.by_name[node.name] for node in calls]
    known = hints(program)
    cost = [sum(_bytes(value, known) for value in alive) for alive in _alive(program, originals)]
    reached, total = [0], 0
    for node in originals:
        total += _bytes(node, known)
        reached.append(total)
    unsafe = unsafe_cuts(program)
    out: list[int] = []
    for number in range(1, segments):
        window = [
            position
            for position in range(1, len(calls))
            if position not in unsafe
            and (number - 0.5) * total <= reached[position] * segments <= (number + 0.5) * total
            and position > (out[-1] if out else 0)
        ]
        if window:
            even = number * total / segments
            out.append(min(window, key=lambda position: (cost[position - 1], abs(reached[position] - even))))
    return out


def _bytes(node: fx.Node, known: Mapping[Any, int]) -> int:
    total = 0
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor):
            sizes = (as_size(size) for size in value.shape)
            total += math.prod(size if isinstance(size, int) else int(size.subs(known)) for size in sizes) * value.element_size()
    return total
