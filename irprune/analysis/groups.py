"""Groups: variables with everything that carries them."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from irprune.analysis.cost import Cost
from irprune.ir.dims import Freeze, Term, Var, index_maps, resolve, term_size, variables
from irprune.ir.facts import Group, Groups, Member, Role
from irprune.ir.program import Axes, Program, Types
from irprune.rules.registry import op_name

KINDS = ("vocabulary", "positions", "heads", "query_heads", "head_dim", "experts", "norm_groups", "residual", "conv", "ffn", "other")


@dataclass
class _Found:
    """What one walk over the program collects for a variable."""

    members: list[Member] = field(default_factory=list)
    carriers: list[str] = field(default_factory=list)
    mixers: list[str] = field(default_factory=list)
    traits: set[str] = field(default_factory=set)


def discover(program: Program, freeze: Sequence[str] = ()) -> Groups:
    """All groups of a typed program, prunable and frozen, in order of execution.

    Args:
        program: A typed program.
        freeze: Name patterns of tensors; every axis of a matching tensor stays whole.

    Returns:
        One group per variable that a parameter axis carries.
    """
    types = program.typing
    found: dict[Var, _Found] = {}
    derived = derived_values(program)
    _members(program, found, derived)
    _walk(program, found, derived)
    cost = Cost(program)
    least = _least(types)
    user = {
        var: Freeze("user", f"{tensor} is named to stay whole")
        for tensor, node in program.holders.items()
        if any(fnmatch.fnmatch(tensor, pattern) for pattern in freeze)
        for term in types.of(node.name)
        for var in variables(resolve(term))
    }
    groups: list[Group] = []
    counts: dict[str, int] = {}
    ordered = sorted(((v, f) for v, f in found.items() if f.members), key=lambda item: (item[1].members[0].order, item[0].uid))
    for var, info in ordered:
        if not isinstance(var.size, int):
            continue
        if not any(program.is_parameter(member.tensor) for member in info.members):
            continue
        kind = _kind(info)
        label = kind if var.frozen is None else "fixed"
        number = counts.get(label, 0)
        counts[label] = number + 1
        first = info.members[0]
        params, macs = cost.per_index(var)
        groups.append(
            Group(
                name=f"{label}{number}",
                key=_key(program, var, first),
                var=var,
                size=var.size,
                kind=kind,
                exact=not info.mixers,
                members=tuple(info.members),
                carriers=tuple(info.carriers),
                mixers=tuple(dict.fromkeys(info.mixers)),
                params_per_index=params,
                macs_per_index=macs,
                frozen=var.frozen or user.get(var) or _whole(var.size, least.get(var, 1)),
                least=least.get(var, 1),
            )
        )
    return Groups(tuple(groups))


def _least(types: Types) -> dict[Var, int]:
    """How many indices of a variable must stay for every choice among its positions to have enough."""
    out: dict[Var, int] = {}
    for term, count in types.least:
        term = resolve(term)
        if not term:
            continue
        minor = term_size(term[1:])
        for var in variables(term[:1]):
            if isinstance(minor, int):
                out[var] = max(out.get(var, 1), min(-(-count // minor), int(var.size)))
    return out


def _whole(size: int, least: int) -> Freeze | None:
    """Why all indices stay, if they must."""
    if size == 1:
        return Freeze("single", "it has one index only")
    return Freeze("chosen", f"{least} of its positions are chosen, and it has no more") if size <= least else None


def _key(program: Program, var: Var, first: Member) -> str:
    """First tensor, axis and the variable's place among the axis's variables."""
    term = resolve(program.typing.of(program.holders[first.tensor].name)[first.axis])
    place = list(dict.fromkeys(variables(term))).index(var)
    return f"{first.tensor}:{first.axis}#{place}"


# -- members ---------------------------------------------------------------------------------------


def _members(program: Program, found: dict[Var, _Found], derived: set[fx.Node]) -> None:
    """Parameter and buffer axes by variable, with their roles, in order of first use."""
    types = program.typing
    maps: dict[tuple[Term, Var], tuple[npt.NDArray[np.int64], ...]] = {}
    contracted = {(event.node, event.operand, event.axis) for event in types.events if event.how == "contract"}
    positions = {node: i for i, node in enumerate(program.nodes)}
    members: list[tuple[Var, Member]] = []
    for tensor, holder in program.holders.items():
        axes = types.of(holder.name)
        uses = uses_of(holder, derived)
        if not uses:
            continue
        order = min(positions[user] for _, user in uses)
        for axis, term in enumerate(axes):
            term = resolve(term)
            for var in dict.fromkeys(variables(term)):
                if not isinstance(var.size, int):
                    continue
                role = _role(types, var, (holder, axis), uses, contracted, derived)
                if (term, var) not in maps:
                    maps[term, var] = tuple(index_maps(term, var))
                members.append((var, Member(tensor, axis, role, maps[term, var], order)))
    for var, member in sorted(members, key=lambda item: (item[1].order, item[1].tensor, item[1].axis)):
        found.setdefault(var, _Found()).members.append(member)


LOOKUPS = frozenset({"aten::index", "aten::index_select", "aten::embedding", "aten::gather"})


def derived_values(program: Program) -> set[fx.Node]:
    """Values that are made of weights: a transposed weight, an initial state, the matrices of chosen experts.

    They depend on parameters, constants or sizes only, or on which whole matrices of a stack of them an input chooses
    (chosen vectors, as the rows of an embedding, are activations).
    """
    out: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "call_function":
            made = all(o in out or _is_size(o) for o in node.all_input_nodes)
            made = made or (op_name(node.target) in LOOKUPS and node.args[0] in out and _rank(node.args[0]) > 2)
        else:
            made = node.op == "get_attr"
        if made:
            out.add(node)
    return out


def _rank(node: Any) -> int:
    held = node.meta.get("val")
    return held.ndim if isinstance(held, torch.Tensor) else 0


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def uses_of(holder: fx.Node, derived: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """``(value, operation)`` where a tensor, or what is computed from it alone, meets an activation."""
    out: list[tuple[fx.Node, fx.Node]] = []
    pending, seen = [holder], {holder}
    while pending:
        value = pending.pop()
        for user in value.users:
            if user.op == "output" or user not in derived:
                out.append((value, user))
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return out


def _role(
    types: Types,
    var: Var,
    place: tuple[fx.Node, int],
    uses: list[tuple[fx.Node, fx.Node]],
    contracted: set[tuple[str, str, int]],
    derived: set[fx.Node],
) -> Role:
    written = False
    for value, user in uses:
        axes = types.axes.get(value.name)
        if not isinstance(axes, tuple):
            continue
        carrying = [axis for axis, term in enumerate(axes) if var in set(variables(resolve(term)))]
        summed = [axis for axis in carrying if (user.name, value.name, axis) in contracted]
        if value is not place[0] or place[1] in summed:
            if summed:
                return "read"
        elif summed:
            written = True  # the other side of a matrix reads the same variable: this side writes it anew
    if written:
        return "write"
    for value, user in uses:
        others = [operand for operand in user.all_input_nodes if operand is not value and operand not in derived]
        if any(var in _vars(types.axes.get(operand.name)) for operand in others):
            return "carry"
    return "write"


def _vars(axes: Axes | list[Axes | None] | None) -> set[Var]:
    if isinstance(axes, list):
        return {var for item in axes for var in _vars(item)}
    return {var for term in axes or () for var in variables(resolve(term))}


# -- traits ----------------------------------------------------------------------------------------


def _walk(program: Program, found: dict[Var, _Found], derived: set[fx.Node]) -> None:
    """Carriers, mixers and the traits that decide the kind of each variable."""
    types = program.typing
    held: dict[fx.Node, set[Var]] = {}
    for node in program.nodes:
        if node.op == "output":
            continue
        held[node] = {var for var in _vars(types.axes.get(node.name)) if var in found}
        if node.op == "call_function":
            for var in held[node]:
                found[var].carriers.append(node.name)
    for event in types.events:
        term = types.of(event.operand)[event.axis]
        if event.exact:
            continue
        mixed = variables(resolve(term))
        if event.how == "group_norm":
            mixed = variables(resolve(types.notes[event.node, "each"]))
        for var in mixed:
            if var in found:
                found[var].mixers.append(event.node)
    for kind, rows in types.unlocked.items():
        for var in {var for term in rows for var in variables(resolve(term))} & found.keys():
            found[var].traits.add(kind)
    for (name, key), term in types.notes.items():
        for var in set(variables(resolve(term))):
            if var not in found:
                continue
            op = op_name(program.by_name[name].target)
            if key.startswith("broadcast"):
                found[var].traits.add("repeated")
            elif key.startswith("batch"):
                found[var].traits.add("heads")
            elif key in ("head_dim", "value_dim"):
                found[var].traits.add("head_dim")
            elif key in ("chosen", "classes"):
                found[var].traits.add("experts")
            elif key == "groups" and "group_norm" in op:
                found[var].traits.add("norm_groups")
    _products(program, found, held, derived)
    _skips(program, found, held)
    for info in found.values():
        names = {op_name(user.target) for m in info.members for _, user in uses_of(program.holders[m.tensor], derived) if m.role == "write"}
        if any("conv" in name for name in names):
            info.traits.add("conv")
        if any(member.role == "write" for member in info.members) and any(member.role == "read" for member in info.members):
            info.traits.add("ffn")


PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::einsum", "aten::baddbmm"})


def _products(program: Program, found: dict[Var, _Found], held: dict[fx.Node, set[Var]], derived: set[fx.Node]) -> None:
    """Products of two activations: shared axes that stay are heads, summed or appended ones head dimensions."""
    for node in program.nodes:
        if node.op != "call_function" or op_name(node.target) not in PRODUCTS:
            continue
        operands = [operand for operand in node.all_input_nodes if operand in held]
        if len(operands) < 2 or any(operand in derived for operand in operands[-2:]):
            continue
        a, b = held[operands[-2]], held[operands[-1]]
        for var in a & b:
            found[var].traits.add("heads" if var in held[node] else "head_dim")
        for var in (a ^ b) & held[node]:
            found[var].traits.add("head_dim")


ADDS = frozenset({"aten::add", "aten::add_", "aten::sub"})


def _skips(program: Program, found: dict[Var, _Found], held: dict[fx.Node, set[Var]]) -> None:
    """An addition of a value and something that sums of products made of it is a skip connection along their axes.

    Without such a sum on the way, both sides are functions of the value index by index, and the addition is part of an
    activation (GELU by its tangent) or of a norm.
    """
    ancestors: dict[fx.Node, int] = {}
    worked: dict[fx.Node, int] = {}  # the ancestors with a sum of products between
    bits = {node: 1 << i for i, node in enumerate(program.nodes)}
    sums = {event.node for event in program.typing.events if event.how == "contract"}
    for node in program.nodes:
        behind = through = 0
        for operand in node.all_input_nodes:
            behind |= ancestors[operand]
            through |= worked[operand]
        ancestors[node] = behind | bits[node]
        worked[node] = behind if node.name in sums and len(node.all_input_nodes) > 1 else through
        if node.op != "call_function" or op_name(node.target) not in ADDS:
            continue
        operands = [operand for operand in node.all_input_nodes if held.get(operand)]
        if len(operands) != 2:
            continue
        shared = held[operands[0]] & held[operands[1]]
        if not shared:
            continue
        for a, b in (operands, operands[::-1]):
            trunk = _source(a)
            if worked[b] & bits[trunk] and trunk.op == "call_function":
                for var in shared & held[trunk]:
                    found[var].traits.add("residual")


def _source(node: fx.Node) -> fx.Node:
    """Behind casts, copies and dropout."""
    transparent = ("aten::to", "aten::clone", "aten::contiguous", "aten::dropout", "aten::alias", "aten::detach", "aten::_to_copy")
    while node.op == "call_function" and node.target is not operator.getitem and op_name(node.target) in transparent:
        node = node.all_input_nodes[0]
    return node


def _kind(info: _Found) -> str:
    """The kind that the traits say, the most telling first."""
    traits = info.traits
    for kind in ("vocabulary", "positions"):
        if kind in traits:
            return kind
    if "experts" in traits:
        return "experts"
    if "heads" in traits:
        return "query_heads" if "repeated" in traits else "heads"
    for kind in ("head_dim", "norm_groups", "residual", "conv", "ffn"):
        if kind in traits:
            return kind
    return "other"


def kept_by(groups: Groups) -> dict[str, frozenset[str]]:
    """What each operation costs that freezes: its name to the tensors that no group but those it froze holds.

    A tensor counts for the operation that decided first; one with a prunable axis counts for none.
    """
    free = {member.tensor for group in groups.prunable for member in group.members}
    found: dict[str, set[str]] = {}
    for group in groups:
        if group.frozen is not None and group.frozen.node is not None:
            found.setdefault(group.frozen.node, set()).update(m.tensor for m in group.members if m.tensor not in free)
    return {node: frozenset(tensors) for node, tensors in found.items()}


def summary(groups: Iterable[Group]) -> dict[str, int]:
    """Number of prunable groups by kind."""
    out: dict[str, int] = {}
    for group in groups:
        if group.prunable:
            out[group.kind] = out.get(group.kind, 0) + 1
    return out
