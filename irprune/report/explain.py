"""Why a parameter, a module or a group is prunable, or why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from irprune.analysis.groups import kept_by
from irprune.errors import OptionError
from irprune.ir.dims import Var, resolve, variables
from irprune.ir.facts import Group, Groups
from irprune.ir.program import Program, location
from irprune.ir.text import names, term_text
from irprune.report.tables import alike, members
from irprune.rules.registry import op_name


@dataclass(frozen=True)
class Line:
    """One line of an explanation, with how deep it stands."""

    depth: int
    text: str


def explain(program: Program, groups: Groups, name: str) -> list[Line]:
    """Say of a parameter, a module or a group whether it is prunable, and what decides it.

    Args:
        program: A typed program.
        groups: Its groups.
        name: A fully qualified parameter or buffer, a module or a group.

    Raises:
        OptionError: There is no such thing.
    """
    tensor = program.aliases.get(name, name)
    inner = [path for path in program.tensors if path.startswith(name + ".")]
    found: list[Line] = []
    if tensor in program.tensors:
        found += _tensor(program, groups, name, tensor)
    if inner:
        found += _module(program, groups, name, inner)
    for group in groups:
        if group.name == name:
            found += _group(program, groups, group)
    if found:
        return found
    modules = {path.rsplit(".", depth)[0] for path in program.tensors for depth in range(1, path.count(".") + 1)}
    near = difflib.get_close_matches(name, [*(group.name for group in groups), *sorted(modules), *program.tensors], n=1)
    meant = f"; did you mean '{near[0]}'?" if near else ""
    raise OptionError(
        f"the program has no parameter, module or group '{name}'{meant}",
        hint="`irprune inspect TARGET` lists the groups with their parameters",
    )


def _group(program: Program, groups: Groups, group: Group) -> Iterator[Line]:
    exact = "exact" if group.exact else "not exact: what is left is normalised anew"
    yield Line(0, f"{group.name}: a group of {group.size} indices, kind {group.kind}, {exact}")
    yield from _decision(program, groups, group, group.members[0].tensor, 1, "")
    yield Line(1, f"with one index go {group.params_per_index:,} parameters and {group.macs_per_index:,} multiply-accumulates")
    for role, verb in (("write", "written by"), ("carry", "carried by"), ("read", "read by")):
        found = members([member for member in group.members if member.role == role])
        if found:
            yield Line(1, f"{verb} {', '.join(found)}")
    for mixer in group.mixers:
        yield Line(1, f"mixed by {_operation(program, mixer)}")


def _tensor(program: Program, groups: Groups, name: str, tensor: str) -> Iterator[Line]:
    kind = "parameter" if program.is_parameter(tensor) else "buffer"
    shape = " x ".join(map(str, program.tensors[tensor].shape))
    yield Line(0, f"{name}: a {kind} of shape {shape or '()'}" + (f", the same as {tensor}" if name != tensor else ""))
    named = names(program, groups)
    of_var = {group.var: group for group in groups}
    for axis, term in enumerate(program.typing.of(program.holders[tensor].name)):
        yield Line(1, f"axis {axis} ({term_text(term, named)})")
        for var in dict.fromkeys(variables(resolve(term))):
            group = of_var.get(var)
            if group is None:
                yield Line(2, f"{var.size} positions stay: {var.frozen.message if var.frozen else 'no parameter shares them'}")
                continue
            others = ", ".join(members([member for member in group.members if member.tensor != tensor]))
            yield from _decision(program, groups, group, tensor, 2, f", together with {others}" if others else "")


def _module(program: Program, groups: Groups, name: str, tensors: Sequence[str]) -> Iterator[Line]:
    touching = [group for group in groups if any(member.tensor in tensors for member in group.members)]
    count = sum(program.tensors[tensor].numel() for tensor in tensors if program.is_parameter(tensor))
    prunable = [group for group in touching if group.prunable]
    yield Line(
        0, f"{name}: a module with {count:,} parameters in {len(tensors)} tensors, {len(prunable)} of {len(touching)} groups prunable"
    )
    for run in alike(touching):
        tensor = next(member.tensor for member in run[0].members if member.tensor in tensors)
        yield from _decision(program, groups, run[0], tensor, 1, f" ({len(run)} groups like it)" if len(run) > 1 else "")


def _decision(program: Program, groups: Groups, group: Group, tensor: str, depth: int, also: str) -> Iterator[Line]:
    """Whether a group is prunable, and the way from a tensor to the operation that decides it."""
    if group.frozen is None:
        yield Line(depth, f"{group.name}: prunable, {group.size} indices{also}")
        return
    yield Line(depth, f"{group.name}: stays whole ({group.frozen.code}): {group.frozen.message}{also}")
    if group.frozen.node is None or group.frozen.node not in program.by_name:
        return
    way = path(program, group.var, tensor, group.frozen.node)
    decider = _operation(program, group.frozen.node)
    if program.by_name[group.frozen.node].op == "output" and len(way) > 2:
        decider = f"the output, which is {_operation(program, way[-2])}"
    yield Line(depth + 1, f"decided by {decider}")
    if group.frozen.code == "no-rule":
        kept = [name for name in kept_by(groups).get(group.frozen.node, ()) if program.is_parameter(name)]
        count = sum(program.tensors[name].numel() for name in kept)
        yield Line(
            depth + 1, f"which keeps {count:,} parameters from pruning; a rule for it would free them (docs/how-to/add-an-op-rule.md)"
        )
    if len(way) > 2:
        yield Line(depth + 1, "by way of " + " - ".join(_short(program, step) for step in way[1:-1]))


def path(program: Program, var: Var, tensor: str, end: str) -> list[str]:
    """The shortest way from a tensor to an operation along values that carry a variable.

    Returns:
        Names of nodes, both ends included; empty where no such way is left after inference.
    """
    start = program.holders[tensor].name
    axes = program.typing.axes
    carrying = [name for name in program.graph if any(var in variables(resolve(term)) for term in _terms(axes.get(name)))]
    between = program.graph.subgraph({*carrying, start, end}).to_undirected(as_view=True)
    try:
        return list(nx.shortest_path(between, start, end))
    except nx.NetworkXNoPath:
        return []


def _terms(axes: object) -> Iterator[tuple]:
    """The terms of a node's axes, all results together."""
    if isinstance(axes, list):
        for item in axes:
            yield from item or ()
    elif isinstance(axes, tuple):
        yield from axes


def _operation(program: Program, name: str) -> str:
    node = program.by_name[name]
    what = {"placeholder": "the input", "output": "the output"}.get(node.op)
    place = location(node)
    if what is not None:
        return what if node.op == "output" else f"{what} {name}"
    return f"{_short(program, name)}" + (f" at {place}" if place else "")


def _short(program: Program, name: str) -> str:
    node = program.by_name[name]
    if node.op == "get_attr":
        return f"@{node.target}"
    return f"%{name}" + (f" = {op_name(node.target).removeprefix('aten::')}" if node.op == "call_function" else "")
