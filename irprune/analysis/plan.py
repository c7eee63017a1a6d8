"""A plan in plain data: what would go, per group and layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from irprune.analysis.cost import Cost
from irprune.ir.facts import Group, Groups, Plan


@dataclass(frozen=True)
class PlanRow:
    """One group that loses indices.

    Attributes:
        group: Name of the group.
        kind: Its kind.
        layer: The repeated block that it belongs to; ``None`` where it is in none or in several.
        size: Number of its indices.
        kept: How many of them stay.
        params_removed: Parameters that go when nothing else is removed. Where two groups share a
            weight, what they remove together is less than the sum.
    """

    group: str
    kind: str
    layer: int | None
    size: int
    kept: int
    params_removed: int


def plan_table(plan: Plan, groups: Groups, cost: Cost) -> list[PlanRow]:
    """One row for each group that loses something, in order of execution."""
    rows = []
    whole = cost.params()
    for group in groups:
        mask = plan.keep.get(group.name)
        if mask is None or mask.all():
            continue
        kept = int(mask.sum())
        within = layers_of(group)
        layer = next(iter(within)) if len(within) == 1 else None
        rows.append(PlanRow(group.name, group.kind, layer, group.size, kept, whole - cost.params({group.var: kept})))
    return rows


def layer_of(name: str) -> int | None:
    """The number of the repeated block in a dotted name: its first part that is a number, if any."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def layers_of(group: Group) -> frozenset[int | None]:
    """The repeated blocks in which a group is produced: those of its tensors that do not just read it."""
    producers = [member.tensor for member in group.members if member.role != "read"]
    return frozenset(layer_of(tensor) for tensor in producers or [member.tensor for member in group.members])


def modules_of(tensors: Iterable[str]) -> frozenset[str]:
    """The tensors' names and the dotted paths of all modules around them."""
    paths: set[str] = set()
    for name in tensors:
        parts = name.split(".")
        paths.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return frozenset(paths)
