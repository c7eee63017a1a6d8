"""LLM-Pruner's dependency rules on graphs that a reader can check by hand, and against unification."""

from __future__ import annotations

import networkx as nx
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from irprune.analysis.dependency import closure, dependencies, stops, structure
from irprune.analysis.groups import discover
from irprune.ir.facts import Group
from irprune.ir.program import Program

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def _edges(graph: nx.DiGraph) -> dict[tuple[str, str], list[int]]:
    return {(str(a), str(b)): graph.edges[a, b]["rules"] for a, b in graph.edges}


def test_in_a_chain_everything_depends_on_everything() -> None:
    """w -> a -> r: in-degrees and out-degrees are one, so both rules fire at both edges."""
    chain = nx.DiGraph([("w", "a"), ("a", "r")])
    assert _edges(dependencies(chain)) == {("w", "a"): [1], ("a", "r"): [1], ("a", "w"): [2], ("r", "a"): [2]}
    assert closure(chain, ["w"], shape_rule=False) == {"w", "a", "r"}


def test_a_join_stops_rule_one() -> None:
    """p -> j <- q -> nothing else: the join has in-degree 2, so it does not depend on p alone."""
    join = nx.DiGraph([("p", "j"), ("q", "j"), ("j", "r")])
    directed = _edges(dependencies(join))
    assert ("p", "j") not in directed
    assert directed["j", "p"] == directed["j", "q"] == [2]
    assert closure(join, ["p"], shape_rule=False) == {"p"}
    assert closure(join, ["j"], shape_rule=False) == {"p", "q", "j", "r"}
    assert closure(join, ["p"]) == {"p", "q", "j", "r"}
    assert stops(join) == {"fan_in": ["j"], "fan_out": []}


def test_a_fan_out_stops_rule_two() -> None:
    """w -> a -> {r, s}: a feeds two readers, so it does not depend on either of them."""
    fan = nx.DiGraph([("w", "a"), ("a", "r"), ("a", "s")])
    directed = _edges(dependencies(fan))
    assert ("r", "a") not in directed
    assert directed["a", "r"] == directed["a", "s"] == [1]
    assert closure(fan, ["r"], shape_rule=False) == {"r"}
    assert closure(fan, ["w"], shape_rule=False) == {"w", "a", "r", "s"}
    assert closure(fan, ["r"]) == {"w", "a", "r", "s"}
    assert stops(fan) == {"fan_in": [], "fan_out": ["a"]}


def _only(program: Program) -> Group:
    (group,) = discover(program).prunable
    return group


def test_hidden_neurons_of_two_linears() -> None:
    graph = structure(program := toys.program(toys.Mlp(), X), _only(program))
    assert sorted(graph.edges) == [
        ("%linear", "%relu"),
        ("%relu", "fc2.weight:1"),
        ("fc1.bias:0", "%linear"),
        ("fc1.weight:0", "%linear"),
    ]
    assert stops(graph)["fan_in"] == ["%linear"]
    assert closure(graph, ["fc2.weight:1"], shape_rule=False) == set(graph)


class Gated(nn.Module):
    """SwiGLU: the product has two producers, so the rules alone do not couple gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((4, 6), (4, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_gated_product_needs_the_shape_rule() -> None:
    program = toys.program(Gated(), X)
    graph = structure(program, _only(program))
    assert stops(graph)["fan_in"] == ["%mul"]
    assert closure(graph, ["gate.weight:0"], shape_rule=False) == {"gate.weight:0", "%linear", "%silu"}
    assert (
        closure(graph, ["gate.weight:0"])
        == set(graph)
        == {"gate.weight:0", "up.weight:0", "down.weight:1", "%linear", "%silu", "%linear_1", "%mul"}
    )


def test_the_residual_stream_fans_out_and_in() -> None:
    program = toys.program(toys.Residual(), X)
    stream = next(group for group in discover(program).prunable if group.kind == "residual")
    graph = structure(program, stream)
    assert "%add" in stops(graph)["fan_in"]
    assert "%linear" in stops(graph)["fan_out"]
    assert {n for n in graph if not str(n).startswith("%")} == {
        "stem.weight:0",
        "stem.bias:0",
        "fc1.weight:1",
        "fc2.weight:0",
        "fc2.bias:0",
        "head.weight:1",
    }


# -- rules and unification agree ------------------------------------------------------------------


class Random(nn.Module):
    """A straight-line program over values of one width: linear, relu, add or mul of earlier values."""

    def __init__(self, steps: list[tuple[str, int, int]], width: int) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Linear(4, width, bias=False)
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False) for kind, _, _ in steps if kind == "linear")
        self.head = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values, linears = [self.stem(x)], iter(self.linears)
        for kind, i, j in self.steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(next(linears)(a) if kind == "linear" else a.relu() if kind == "relu" else a + b if kind == "add" else a * b)
        return self.head(values[-1])


def _slots(steps: list[tuple[str, int, int]]) -> nx.DiGraph:
    """The structure graph of every dimension at once, from the steps alone: no terms, no unification.

    Nodes are ``v<n>`` (the width of value n) and parameter axes; only what reaches the head counts,
    as a trace drops the rest.
    """
    graph = nx.DiGraph([("stem.weight:0", "v0")])
    reads: dict[int, list[int]] = {0: []}
    linear = 0
    edges: list[tuple[int, list[tuple[str, str]]]] = []
    for n, (kind, i, j) in enumerate(steps, start=1):
        a, b = f"v{i % n}", f"v{j % n}"
        reads[n] = [i % n] if kind in ("linear", "relu") else [i % n, j % n]
        if kind == "linear":
            name = f"linears.{linear}.weight"
            linear += 1
            edges.append((n, [(a, f"{name}:1"), (f"{name}:0", f"v{n}")]))
        elif kind == "relu":
            edges.append((n, [(a, f"v{n}")]))
        else:
            edges.append((n, [(a, f"v{n}"), (b, f"v{n}")]))
    live, pending = set(), [len(steps)]
    while pending:
        n = pending.pop()
        if n not in live:
            live.add(n)
            pending.extend(reads[n])
    for n, found in edges:
        if n in live:
            graph.add_edges_from(found)
    graph.add_edge(f"v{len(steps)}", "head.weight:1")
    return graph


steps = st.lists(st.tuples(st.sampled_from(["linear", "relu", "add", "mul"]), st.integers(0, 7), st.integers(0, 7)), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps, st.data())
def test_the_fixpoint_of_the_rules_is_the_group(plan: list[tuple[str, int, int]], data: st.DataObject) -> None:
    program = toys.program(Random(plan, 5), X, dynamic={})
    slots = _slots(plan)
    for group in discover(program).prunable:
        members = {str(member) for member in group.members}
        trigger = data.draw(st.sampled_from(sorted(members)))
        assert {node for node in closure(slots, [trigger]) if not str(node).startswith("v")} == members
        graph = structure(program, group)
        assert closure(graph, [trigger]) == set(graph)
        assert closure(graph, [trigger], shape_rule=False) <= set(graph)
