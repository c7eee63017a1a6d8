"""The structure graph of a group, and LLM-Pruner's dependency rules read off it.

LLM-Pruner (arXiv 2305.11627, section 3.1) couples structures by the degrees of a graph::

    N_j in Out(N_i) and in-degree(N_j) = 1   =>  N_j depends on N_i        (1)
    N_i in In(N_j)  and out-degree(N_i) = 1  =>  N_i depends on N_j        (2)

"Depends on" means: must go when the other goes. At a node with several producers or consumers the
rules stop; the *shape rule* then couples the rest, as all operands of an elementwise operation share
their axis. The fixpoint from any trigger is the group that unification finds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import networkx as nx
from torch import fx

from irprune.analysis.groups import derived_values, uses_of
from irprune.ir.dims import resolve, variables
from irprune.ir.facts import Group
from irprune.ir.program import Program
from irprune.rules.registry import op_name


def structure(program: Program, group: Group) -> nx.DiGraph:
    """The structure graph of a group.

    Nodes are its members (``tensor:axis``, with the attribute ``role``) and the operations that carry
    it (``%name``, role ``operation``). Edges follow the data: writers and per-index data into the
    operations that use them, operations into operations, and operations into readers.
    """
    graph: nx.DiGraph = nx.DiGraph()
    carriers = set(group.carriers)
    derived_nodes = derived_values(program)
    derived = {node.name for node in derived_nodes}
    types = program.typing

    def carries(node: fx.Node) -> bool:
        axes = types.axes.get(node.name)
        return isinstance(axes, tuple) and any(group.var in set(variables(resolve(term))) for term in axes)

    for name in carriers - derived:
        node = program.by_name[name]
        graph.add_node(f"%{name}", role="operation", label=op_name(node.target).removeprefix("aten::"), node=name)
    for name in carriers - derived:
        node = program.by_name[name]
        for operand in node.all_input_nodes:
            if operand.name in carriers - derived:
                graph.add_edge(f"%{operand.name}", f"%{name}")
    for member in group.members:
        graph.add_node(str(member), role=member.role, label=str(member))
        for _, user in uses_of(program.holders[member.tensor], derived_nodes):
            if member.role != "read":
                if user.name in carriers:
                    graph.add_edge(str(member), f"%{user.name}")
                continue
            for operand in user.all_input_nodes:
                if operand.name in carriers - derived and carries(operand):
                    graph.add_edge(f"%{operand.name}", str(member))
    return graph


def dependencies(graph: nx.DiGraph) -> nx.DiGraph:
    """Rules (1) and (2), literally.

    Returns:
        A graph over the same nodes. An edge ``a -> b`` says that ``b`` must go when ``a`` goes; its
        attribute ``rules`` holds the numbers of the rules that say so.
    """
    out: nx.DiGraph = nx.DiGraph()
    out.add_nodes_from(graph.nodes(data=True))
    for i, j in graph.edges:
        if graph.in_degree(j) == 1:
            _say(out, i, j, 1)
        if graph.out_degree(i) == 1:
            _say(out, j, i, 2)
    return out


def _say(graph: nx.DiGraph, trigger: Hashable, dependent: Hashable, rule: int) -> None:
    if graph.has_edge(trigger, dependent):
        graph.edges[trigger, dependent]["rules"].append(rule)
    else:
        graph.add_edge(trigger, dependent, rules=[rule])


def closure(graph: nx.DiGraph, triggers: Iterable[Hashable], *, shape_rule: bool = True) -> set[Hashable]:
    """Everything that must go when the triggers go.

    Args:
        graph: A structure graph.
        triggers: Its nodes that are removed.
        shape_rule: Also couple what a join or a fan-out shares. Without it the rules stop there.
    """
    directed = dependencies(graph)
    found: set[Hashable] = set()
    pending = list(triggers)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        pending.extend(directed.successors(node))
        if shape_rule:
            pending.extend(graph.successors(node))
            pending.extend(graph.predecessors(node))
    return found


def stops(graph: nx.DiGraph) -> dict[str, list[Hashable]]:
    """Where the directed rules stop: fan-in points (several producers) and fan-out points."""
    return {
        "fan_in": [node for node in graph if graph.in_degree(node) > 1],
        "fan_out": [node for node in graph if graph.out_degree(node) > 1],
    }
