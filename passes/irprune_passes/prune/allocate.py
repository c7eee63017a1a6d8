"""How many indices go, and which: pure functions of scores, sizes and a cost.

An allocation is a *path*: a sequence of plans in which every step removes at least what the step
before it removed. A ratio of indices or a count picks a step directly; a budget picks the first step
whose cost meets it, by bisection, since the cost never grows along a path.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from irprune.ir.dims import Mask

Counts = dict[str, int]


@dataclass(frozen=True)
class Pool:
    """A group as the allocator sees it.

    Attributes:
        name: The group.
        scores: One float per index; the lowest go first, ties by index.
        unit: Kept counts are multiples of it where that is possible (see :meth:`kept`).
        floor: At least so many indices stay.
        ceiling: At most so many stay (fewer than all once earlier steps have removed some).
        cost: Divides the scores in a ranking over several pools.
    """

    name: str
    scores: npt.NDArray[np.float64]
    unit: int = 1
    floor: int = 1
    ceiling: int | None = None
    cost: float = 1.0

    @property
    def size(self) -> int:
        return len(self.scores)

    def kept(self, removed: int) -> int:
        """How many indices stay when ``removed`` are asked to go.

        The nearest multiple of ``unit``, or all; of two the smaller. A pool without a multiple between
        ``floor`` and its size takes the next smaller power of two as its unit, and so does one of which
        fewer than ``floor`` would stay. The result never grows with ``removed``.
        """
        wanted = max(self.size - removed, self.floor)
        most = self.size if self.ceiling is None else self.ceiling
        if removed <= 0 or wanted >= self.size:
            return most
        rounded = (self._rounded(wanted, unit) for unit in _units(self.unit))
        return min(most, next(count for count in rounded if count is not None))

    def _rounded(self, wanted: int, unit: int) -> int | None:
        last = (self.size - 1) // unit * unit
        if last < self.floor:
            return None
        if wanted > last:
            return self.size if self.size - wanted < wanted - last else last
        nearest = -(-(2 * wanted - unit) // (2 * unit)) * unit
        return nearest if nearest >= self.floor else None

    @property
    def ranking(self) -> npt.NDArray[np.int64]:
        """The indices, the first to go first."""
        return np.argsort(self.scores, kind="stable")

    def keep(self, count: int) -> Mask:
        """The mask that keeps the ``count`` indices of the highest scores."""
        mask = np.ones(self.size, dtype=bool)
        mask[self.ranking[: self.size - count]] = False
        return mask


def _units(unit: int) -> Iterator[int]:
    """``unit``, then the smaller powers of two down to 1."""
    yield unit
    power = 1 << max(unit - 1, 0).bit_length()
    while power > 1:
        power //= 2
        if power < unit:
            yield power


class Path(Protocol):
    """Plans in order of how much they remove: step 0 removes nothing, the last one all it may."""

    def __len__(self) -> int: ...

    def counts(self, step: int) -> Counts:
        """Pool name to the number of indices that stay."""
        ...


class Uniform:
    """The same ratio of indices in every pool, so pools of one size stay of one size.

    Args:
        pools: The groups.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools
        sizes = {pool.size for pool in pools}
        turns = np.unique(np.concatenate([(np.arange(size) + 0.5) / size for size in sorted(sizes)] or [np.empty(0)]))
        self._ratios = [0.0, *((turns[:-1] + turns[1:]) / 2).tolist(), 1.0]

    def __len__(self) -> int:
        return len(self._ratios)

    def counts(self, step: int) -> Counts:
        return self.at(self._ratios[step])

    def at(self, ratio: float) -> Counts:
        """``round(size * ratio)`` go from each pool (half to even, as ``torch.nn.utils.prune``), before rounding to units."""
        return {pool.name: pool.kept(round(pool.size * ratio)) for pool in self.pools}


class Local(Uniform):
    """The same ratio of indices in every pool, as closely as a budget allows.

    Between two common ratios the pools move one after the other, the last one first, so that a plan
    meets a budget within one rounding unit of one pool.
    """

    def __len__(self) -> int:
        return (super().__len__() - 1) * len(self.pools) + 1 if self.pools else 1

    def counts(self, step: int) -> Counts:
        ratio, moved = divmod(step + len(self.pools) - 1, max(len(self.pools), 1))
        after = super().counts(ratio)
        if step == 0 or moved == len(self.pools) - 1:
            return after
        before = super().counts(ratio - 1)
        late = {pool.name for pool in self.pools[len(self.pools) - 1 - moved :]}
        return {name: after[name] if name in late else count for name, count in before.items()}


class Global:
    """One ranking over all pools: step ``n`` removes the ``n`` lowest scores per cost.

    Ties go by the order of the pools, then by index. The ``floor`` indices of the highest scores of
    each pool do not take part.

    Args:
        pools: The groups, their scores comparable with each other.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools
        owners, scores = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        for i, pool in enumerate(pools):
            free = pool.ranking[: max(pool.size - pool.floor, 0)]
            owners.append(np.full(len(free), i))
            scores.append(pool.scores[free] / pool.cost)
        self._owners = np.concatenate(owners)[np.argsort(np.concatenate(scores), kind="stable")]

    def __len__(self) -> int:
        return len(self._owners) + 1

    def counts(self, step: int) -> Counts:
        gone = np.bincount(self._owners[:step], minlength=len(self.pools))
        return {pool.name: pool.kept(int(n)) for pool, n in zip(self.pools, gone, strict=True)}

    def at(self, ratio: float) -> Counts:
        """``round(total * ratio)`` of all indices go, half to even, before rounding to units."""
        return self.counts(round(sum(pool.size for pool in self.pools) * ratio))


def meet(path: Path, cost: Callable[[Counts], int], target: int) -> Counts | None:
    """The first plan of a path whose cost is at most ``target``; ``None`` where not even the last one is."""
    steps = range(len(path))
    step = bisect.bisect_left(steps, True, key=lambda step: cost(path.counts(step)) <= target)
    return path.counts(step) if step < len(path) else None


def masks(pools: Sequence[Pool], counts: Mapping[str, int]) -> dict[str, Mask]:
    """The keep masks of the pools that lose something."""
    return {pool.name: pool.keep(counts[pool.name]) for pool in pools if counts[pool.name] < pool.size}
