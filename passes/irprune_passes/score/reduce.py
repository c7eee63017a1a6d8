"""From elements to indices: structures, reductions over a group's structures, normalisers.

A *structure* is what LLM-Pruner (arXiv 2305.11627) calls ``W_i``: one parameter axis that carries a
group's variable. Index ``u`` of the variable owns a slice of each structure; a quantity of a slice is
the sum over its elements, and the quantities of all structures are reduced to one number per index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from irprune.errors import DataError
from irprune.ir.facts import Group, Member
from irprune.ir.program import Program

Array: TypeAlias = npt.NDArray[np.float64]
Quantity: TypeAlias = Callable[..., torch.Tensor]
Reduction: TypeAlias = Literal["sum", "mean", "prod", "max", "first", "last"]
Normaliser: TypeAlias = Literal["none", "mean", "sum", "max", "min-max", "z-score", "l2", "lamp"]

# Small enough for the processor's cache, and for the allocator to use the same memory again.
_BLOCK = 1 << 18


@dataclass(frozen=True, eq=False)
class Structure:
    """One parameter axis of a group.

    Attributes:
        group: The group's name.
        size: Number of indices of the group.
        member: The axis.
        positions: Positions of the axis, sorted by the index that they belong to.
        lengths: How many positions each index has.
        weights: How many elements the whole parameter has.
    """

    group: str
    size: int
    weights: int
    member: Member
    positions: torch.Tensor
    lengths: torch.Tensor

    def gather(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums per position of the axis to sums per index (always in the same order of addition)."""
        return torch.segment_reduce(sums[self.positions], "sum", lengths=self.lengths, initial=0, unsafe=True)


def structures(program: Program, groups: Iterable[Group]) -> tuple[Structure, ...]:
    """The structures of all groups, in the order of their members.

    Every parameter axis counts, whatever its role. Buffers do not: running statistics, frequencies
    and masks are no weights. A position that two occurrences of a variable give to the same index
    counts once.
    """
    found = []
    shared: dict[tuple[bytes, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
    for group in groups:
        for member in group.members:
            if program.is_parameter(member.tensor):
                tensor = program.tensors[member.tensor]
                device = torch.device("cpu") if tensor.is_meta else tensor.device
                length = tensor.shape[member.axis]
                owned = [index_of[here] * length + here for index_of in member.maps for here in [np.flatnonzero(index_of >= 0)]]
                indices, positions = np.divmod(np.unique(np.concatenate(owned)), length)
                lengths = np.bincount(indices, minlength=group.size)
                moved = torch.from_numpy(positions).to(device), torch.from_numpy(lengths).to(device)
                moved = shared.setdefault((positions.tobytes() + lengths.tobytes(), device), moved)
                found.append(Structure(group.name, group.size, tensor.numel(), member, *moved))
    return tuple(found)


def fold(of: Sequence[Structure], quantity: Quantity, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Sum an elementwise quantity over the slices of structures of one tensor.

    The quantity is taken block by block in at least single precision, so that what is needed at a
    time is a fraction of the tensor, and summed in double precision. A complex number counts as the
    two real ones that it is made of, in the weight as in its gradient.

    Args:
        of: Structures of the same tensor.
        quantity: Function of as many tensors as are given, elementwise.
        tensors: Equally shaped; usually a weight and its gradient.

    Returns:
        For each structure a double tensor with one sum per index.
    """
    tensors = tuple(torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors)
    shape, count = tensors[0].shape, tensors[0].numel()
    along = 0 if count <= _BLOCK * shape[0] else max(range(len(shape)), key=shape.__getitem__)
    step = max(1, _BLOCK * shape[along] // max(1, count))
    axes = {structure.member.axis for structure in of}
    sums = {axis: tensors[0].new_zeros(shape[axis], dtype=torch.float64) for axis in axes}
    for start in range(0, shape[along], step):
        part = quantity(*(_wide(tensor.narrow(along, start, min(step, shape[along] - start))) for tensor in tensors))
        for axis, total in sums.items():
            others = [other for other in range(part.ndim) if other != axis]
            here = total[start : start + step] if axis == along else total
            here += part.sum(dim=others) if others else part
    return [structure.gather(sums[structure.member.axis]) for structure in of]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduce(scores: Array, of: Sequence[Structure], how: Reduction) -> Array | None:
    """The scores of a group's structures to one score per index; ``None`` as :func:`combine` says.

    ``first`` and ``last`` take the first or last executing structure (``Member.order``) among those
    that produce or consume the dimension, as LLM-Pruner's "last-only" (``down_proj``, ``o_proj``);
    what only carries it, as a norm's weights, is passed over unless there is nothing else. Of an
    operation's weight and bias the weight is taken.

    Args:
        scores: One row per structure, one column per index; at least one row.
        of: The structures.
        how: The reduction.
    """
    if how in ("first", "last"):
        ends = [row for row, structure in enumerate(of) if structure.member.role != "carry"] or range(len(of))
        orders = [of[row].member.order for row in ends]
        order = min(orders) if how == "first" else max(orders)
        return scores[max((row for row in ends if of[row].member.order == order), key=lambda row: (of[row].weights, row))]
    return combine(scores, how)


def combine(scores: Array, how: Reduction) -> Array | None:
    """Rows of scores in order of execution to one row; ``first`` and ``last`` take that row.

    ``None`` where a product leaves the range of double precision, so that it no longer ranks: such a
    group has no scores, and only who wants to prune it is told so.
    """
    if how == "prod":
        with np.errstate(over="ignore", under="ignore"):
            product = scores.prod(axis=0)
        ranks = np.isfinite(product).all() and (product == 0).sum() <= (scores == 0).any(axis=0).sum()
        return product if ranks else None
    whole: dict[str, Array] = {
        "sum": scores.sum(axis=0),
        "mean": scores.mean(axis=0),
        "max": scores.max(axis=0),
        "first": scores[0],
        "last": scores[-1],
    }
    return whole[how]


def normalise(scores: Array, how: Normaliser) -> Array:
    """Scores of one group made comparable with those of others; the order within the group stays.

    ``mean``, ``sum``, ``max`` and ``l2`` divide by that of the absolute scores, ``min-max`` maps to
    ``[0, 1]``, ``z-score`` to zero mean and unit deviation, and ``lamp`` is
    ``s_u^2 / sum(s_v^2 for s_v >= s_u)`` (Lee et al., arXiv 2010.07611, with the score in the place of
    the weight). Where all scores are equal and the divisor would be zero, the result is all zeros.

    Raises:
        DataError: Scores that are not finite, or ``lamp`` on negative scores, whose order squaring would change.
    """
    if not np.isfinite(scores).all():
        raise DataError("a criterion gave scores that are NaN or infinite", hint="take another criterion or reduction")
    if how == "none":
        return scores
    if how == "lamp":
        if (scores < 0).any():
            raise DataError("the normaliser 'lamp' needs scores that are not negative", hint="take another one, as z-score")
        ordered = np.sort(scores)
        tails = np.cumsum(ordered[::-1] ** 2)[::-1]
        return _divided(scores**2, tails[np.searchsorted(ordered, scores, side="left")])
    if how == "min-max":
        return _divided(scores - scores.min(), np.ptp(scores))
    if how == "z-score":
        return _divided(scores - scores.mean(), scores.std())
    size = np.abs(scores)
    divisors = {"mean": size.mean(), "sum": size.sum(), "max": size.max(), "l2": np.linalg.norm(scores)}
    return _divided(scores, float(divisors[how]))


def _divided(scores: Array, by: Array | float) -> Array:
    return np.divide(scores, by, out=np.zeros_like(scores), where=np.asarray(by) > 0)
