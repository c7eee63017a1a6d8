"""Gradients of a model whose weights do not fit in memory: one segment of the graph at a time.

The forward pass runs segment by segment without gradients and keeps the few values that cross from
one to the next (in a transformer: the residual stream between blocks, the mask, the rotary angles).
Then the segments are run again in reverse, each with its own weights read from the source, and
gradients flow back through the kept values. What is in memory at a time are the weights and gradients
of one segment and the kept values; every weight is read twice (Chen et al., arXiv 1604.06174, with
segments chosen by the weights that they hold).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from irprune.analysis.cost import hints
from irprune.ir.dims import as_size
from irprune.ir.program import Program, Runner
from irprune_passes.cuts import unsafe_cuts

RESIDENT = 256 * 2**20
Fold = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class Segment:
    """Consecutive operations.

    Attributes:
        nodes: The operations, in order.
        inputs: Values from before that they read.
        tensors: Names of the parameters and buffers that they read.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    tensors: frozenset[str]


def segments(program: Program, resident: int = RESIDENT) -> list[Segment]:
    """Cut a program where little crosses, so that the tensors of a segment take at most ``resident`` bytes.

    A single operation may need more. There is no cut where running a segment again would write twice
    (:func:`irprune_passes.cuts.unsafe_cuts`), nor between an operation of several results and what takes them apart.
    """
    known = hints(program)
    nodes = [node for node in program.nodes if node.op == "call_function"]
    place = {node: number for number, node in enumerate(nodes)}
    crossing = [0] * (len(nodes) + 1)  # bytes that are alive between operation i - 1 and i
    whole = [False] * (len(nodes) + 1)
    for node in program.nodes:
        last = max((place.get(user, len(nodes)) for user in node.users), default=-1)
        if node.op in ("get_attr", "output") or last < 0:
            continue
        first = place.get(node, -1)
        size = _bytes(node, known)
        for cut in range(first + 1, min(last, len(nodes) - 1) + 1):
            crossing[cut] += size
    for cut in unsafe_cuts(program):
        whole[cut] = True
    for node in nodes:
        if isinstance(node.meta.get("val"), list | tuple):
            for cut in range(place[node] + 1, max((place.get(user, 0) for user in node.users), default=0) + 1):
                whole[cut] = True
    out: list[Segment] = []
    start, held, seen = 0, 0, set[str]()
    best: int | None = None
    for number, node in enumerate(nodes):
        new = {str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"} - seen
        size = sum(program.tensors[name].numel() * program.tensors[name].itemsize for name in new)
        if held + size > resident and best is not None:
            out.append(_segment(nodes[start:best]))
            start, best = best, None
            seen = {name for one in nodes[start:number] for name in _tensors(one)}
            held = sum(program.tensors[name].numel() * program.tensors[name].itemsize for name in seen)
            new = _tensors(node) - seen
            size = sum(program.tensors[name].numel() * program.tensors[name].itemsize for name in new)
        held += size
        seen |= new
        cut = number + 1
        if cut < len(nodes) and not whole[cut] and (best is None or crossing[cut] <= crossing[best]):
            best = cut
    out.append(_segment(nodes[start:]))
    return out


def _segment(nodes: list[fx.Node]) -> Segment:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand.op != "get_attr":
                inputs.setdefault(operand)
    return Segment(tuple(nodes), tuple(inputs), frozenset(name for node in nodes for name in _tensors(node)))


def _tensors(node: fx.Node) -> set[str]:
    return {str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"}


def _bytes(node: fx.Node, known: Mapping[Any, int]) -> int:
    value = node.meta.get("val")
    total = 0
    for leaf in value if isinstance(value, list | tuple) else [value]:
        if isinstance(leaf, torch.Tensor):
            size: Any = leaf.itemsize
            for length in leaf.shape:
                found = as_size(length)
                size = size * (found if isinstance(found, int) else found.subs(known))
            total += int(size)
    return total


@dataclass
class Segmented:
    """Forward and backward passes of a program, a segment at a time.

    Attributes:
        program: The program.
        names: The parameters whose gradients are wanted.
        fold: Called with a parameter's name and its gradient, as soon as it is complete.
        parts: The segments.
    """

    program: Program
    names: Collection[str]
    fold: Fold
    parts: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = self.parts or segments(self.program)
        self.output = next(node for node in self.program.nodes if node.op == "output")
        self.results = list(self.output.all_input_nodes)
        self._uses = {name: sum(name in part.tensors for part in self.parts) for part in self.parts for name in part.tensors}

    def forward(self, *flat: Any) -> tuple[list[Any], Callable[[list[Any]], None]]:
        """The flat outputs, and a function that takes their gradients and runs backward.

        Args:
            flat: The inputs as the graph's placeholders take them.
        """
        placeholders = [node for node in self.program.nodes if node.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(placeholders, flat, strict=True))
        last: dict[fx.Node, int] = {}
        for number, part in enumerate(self.parts):
            for node in part.inputs:
                last[node] = number
        results = self.results
        kept: list[dict[fx.Node, Any]] = []
        states = []
        for number, part in enumerate(self.parts):
            states.append(torch.get_rng_state())
            entry = {node: values[node] for node in part.inputs}
            kept.append(entry)
            wanted = {node for node in part.nodes if last.get(node, -1) > number or node in results}
            with torch.no_grad():
                values.update(_run(self.program, part, entry, {}, wanted))
            for node in [node for node in values if last.get(node, -1) <= number and node not in results]:
                del values[node]

        def backward(gradients: list[Any]) -> None:
            self._backward(dict(zip(results, gradients, strict=True)), kept, states)

        return [values[node] for node in results], backward

    def _backward(self, flowing: dict[fx.Node, Any], kept: list[dict[fx.Node, Any]], states: list[torch.Tensor]) -> None:
        partial: dict[str, torch.Tensor] = {}
        waiting = dict(self._uses)
        for part in reversed(self.parts):
            entry, state = kept.pop(), states.pop()
            ends = [node for node in part.nodes if flowing.get(node) is not None]
            if ends:
                self._reverse(part, entry, state, ends, flowing, partial)
            for node in part.nodes:
                flowing.pop(node, None)
            for name in part.tensors & set(self.names):
                waiting[name] -= 1
                if waiting[name] == 0 and name in partial:
                    self.fold(name, partial.pop(name))

    def _reverse(
        self,
        part: Segment,
        entry: dict[fx.Node, Any],
        state: torch.Tensor,
        ends: list[fx.Node],
        flowing: dict[fx.Node, Any],
        partial: dict[str, torch.Tensor],
    ) -> None:
        """Run one segment again with gradients, and backward."""
        leaves = {
            node: value.detach().requires_grad_()
            for node, value in entry.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and node.op != "placeholder"
        }
        weights: dict[str, torch.Tensor] = {}
        for name in sorted(part.tensors):
            weights[name] = self.program.value(name).detach()
            if name in self.names:
                weights[name].requires_grad_()
                weights[name].register_post_accumulate_grad_hook(self._taker(name, partial))
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            done = _run(self.program, part, {**entry, **leaves}, weights, set(ends))
        roots = [(done[node], flowing[node]) for node in ends if done[node].requires_grad]
        del done
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        for node, leaf in leaves.items():
            if leaf.grad is not None:
                flowing[node] = leaf.grad if flowing.get(node) is None else flowing[node] + leaf.grad

    def _taker(self, name: str, partial: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
        """Takes a gradient as it appears: folds it at once if the parameter is used in this segment only."""

        def take(weight: torch.Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            if self._uses[name] == 1:
                self.fold(name, gradient)
            else:
                partial[name] = partial[name] + gradient if name in partial else gradient

        return take


def _run(
    program: Program, part: Segment, entry: Mapping[fx.Node, Any], weights: Mapping[str, torch.Tensor], wanted: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """The wanted values of a segment's operations; weights that are not given are read as they are needed."""
    runner = Runner(program)
    env = runner.env
    env.update(entry)
    last = {operand: node for node in part.nodes for operand in node.all_input_nodes}
    for node in part.nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                name = str(operand.target)
                env[operand] = weights[name] if name in weights else None if program.source is not None else program.value(name).detach()
        env[node] = runner.run_node(node)
        for operand in node.all_input_nodes:
            if last[operand] is node and operand not in wanted:
                env.pop(operand, None)
    return {node: env[node] for node in wanted}
