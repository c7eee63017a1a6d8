"""Which index of the original program an index of a smaller one was.

Groups of two programs are matched by position: the smaller tensor's positions are the kept positions
of the original one, so each index of a smaller group shows which original index it stands for. Names
of variables and of groups play no part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from irprune.errors import PipelineError
from irprune.ir.dims import Mask, Var, mask_of
from irprune.ir.facts import Group, Groups, Member
from irprune.ir.program import Program

Indices = npt.NDArray[np.int64]
Ancestors = dict[str, list[tuple[Group, Indices]]]


def ancestors(before: Program, groups: Groups, keep: Mapping[Var, Mask], smaller: Groups) -> Ancestors:
    """For each group of the smaller program the original groups it is, index by index.

    Args:
        before: The typed original.
        groups: Its groups.
        keep: What was kept of it.
        smaller: The groups of what was left.

    Returns:
        Name of the smaller group to ``(original group, its index for each smaller index)``; several
        where analysis of the smaller program ties what was apart, none where the groups do not match
        one to one.
    """
    holders: dict[tuple[str, int], list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.members:
            holders.setdefault((member.tensor, member.axis), []).append((group, member))
    kept = {(tensor, axis): np.flatnonzero(mask_of(before.typing.of(before.holders[tensor].name)[axis], keep)) for tensor, axis in holders}
    out: Ancestors = {}
    for small in smaller:
        matches: dict[str, tuple[Group, Indices | None]] = {}
        for member in small.members:
            place = (member.tensor, member.axis)
            for group, original in holders.get(place, ()):
                found = _bijection(small, member, group, original, kept[place], keep)
                known = matches.get(group.name)
                if known is not None and (known[1] is None or found is None or (known[1] != found).any()):
                    found = None
                matches[group.name] = (group, found)
        out[small.name] = [(group, found) for group, found in matches.values() if found is not None]
    return out


def _bijection(
    small: Group, member: Member, group: Group, original: Member, positions: Indices, keep: Mapping[Var, Mask]
) -> Indices | None:
    """Original index by smaller index, if an axis that both groups lie on pairs them one to one."""
    left = np.flatnonzero(keep[group.var]) if group.var in keep else np.arange(group.size)
    if len(left) != small.size or len(member.maps) != len(original.maps):
        return None
    pairs = [np.stack([new, old[positions]]) for new, old in zip(member.maps, original.maps, strict=True) if len(new) == len(positions)]
    if len(pairs) != len(member.maps):
        return None
    both = np.concatenate(pairs, axis=1)
    both = np.unique(both[:, (both >= 0).all(axis=0)], axis=1)
    if both.shape[1] != small.size or not (both[0] == np.arange(small.size)).all() or not (np.sort(both[1]) == left).all():
        return None
    return both[1]


def scores_before(
    groups: Groups, keep: Mapping[Var, Mask], back: Ancestors, scores: Mapping[str, npt.NDArray[np.float64]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Scores of the smaller program as scores of the original one.

    What is gone has minus infinity, what the smaller program has no score for plus infinity: it stays.
    """
    out = {}
    for group in groups:
        found = np.zeros(group.size)
        known = np.zeros(group.size, dtype=bool)
        for name, values in scores.items():
            for original, indices in back.get(name, ()):
                if original.name == group.name:
                    found[indices] += values
                    known[indices] = True
        found[~known] = np.inf
        if group.var in keep:
            found[~keep[group.var]] = -np.inf
        out[group.name] = found
    return out


def compose(
    before: Program, groups: Groups, keep: Mapping[Var, Mask], back: Ancestors, further: Mapping[str, Mask], after: Program
) -> dict[Var, Mask]:
    """Two removals as one over the original indices.

    Args:
        before: The typed original.
        groups: Its groups.
        keep: What the first removal kept.
        back: The second program's groups, from :func:`ancestors`.
        further: What the second removal kept of them, by name.
        after: What is left, to check against.

    Raises:
        PipelineError: The second removal took apart what the original program ties together.
    """
    out = dict(keep)
    for name, mask in further.items():
        for original, indices in back.get(name, ()):
            joint = out.get(original.var, np.ones(original.size, dtype=bool)).copy()
            joint[indices[~mask]] = False
            out[original.var] = joint
    for tensor, node in before.holders.items():
        if tensor not in after.holders:
            continue
        expected = tuple(int(mask_of(term, out).sum()) for term in before.typing.of(node.name))
        if expected != tuple(after.tensors[tensor].shape):
            raise PipelineError(
                f"the two prunings do not add up to one of the original model: {tensor} would be {list(expected)} "
                f"and is {list(after.tensors[tensor].shape)}",
                hint="prune once, with `steps` if it is to be done gradually",
            )
    return out
