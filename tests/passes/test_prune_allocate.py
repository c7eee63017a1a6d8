"""How many indices go, and which: hand-checkable cases and the invariants of an allocation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from irprune_passes.prune.allocate import Counts, Global, Local, Pool, Uniform, masks, meet


def pool(name: str, *scores: float, **options: object) -> Pool:
    return Pool(name, np.array(scores, dtype=np.float64), **options)  # type: ignore[arg-type]


def ramp(name: str, size: int, **options: object) -> Pool:
    return pool(name, *range(size), **options)


# -- rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "removed", "kept"),
    [
        (64, 0, 64),  # nothing asked, nothing goes
        (64, 16, 48),
        (64, 13, 48),  # 51 is nearer to 48 than to 56
        (64, 12, 48),  # 52 lies between: the smaller
        (64, 11, 56),
        (64, 3, 64),  # 61 is nearer to all than to 56
        (64, 57, 8),
        (64, 60, 4),  # 4 would round to 0 for 8, which leaves nothing: multiples of 4
        (64, 62, 2),
        (64, 63, 1),
        (64, 64, 1),  # the floor
        (12, 3, 8),
        (12, 2, 8),  # 10 lies between 8 and all
        (12, 1, 12),
        (8, 2, 4),  # a multiple of 8 would be nothing or all: multiples of 4
        (8, 1, 8),
        (4, 1, 2),
        (3, 1, 2),
        (2, 1, 1),
    ],
)
def test_rounding_to_eight(size: int, removed: int, kept: int) -> None:
    assert ramp("g", size, unit=8).kept(removed) == kept


def test_floor_and_ceiling_bound_the_kept_count() -> None:
    assert ramp("g", 10, floor=4).kept(10) == 4
    assert ramp("g", 10, floor=20).kept(5) == 10
    assert ramp("g", 64, unit=8, floor=10).kept(60) == 10
    assert ramp("g", 10, ceiling=6).kept(0) == 6
    assert ramp("g", 10, ceiling=6).kept(2) == 6
    assert ramp("g", 10, ceiling=6).kept(7) == 3


@given(size=st.integers(2, 200), unit=st.integers(1, 40), floor=st.integers(1, 30))
def test_kept_never_grows_and_stays_within_one_unit(size: int, unit: int, floor: int) -> None:
    group = ramp("g", size, unit=unit, floor=floor)
    kept = [group.kept(removed) for removed in range(size + 1)]
    assert kept[0] == size
    assert all(before >= after for before, after in itertools.pairwise(kept))
    for removed in range(1, size + 1):
        wanted = min(max(size - removed, floor), size)
        assert min(floor, size) <= kept[removed] <= size
        assert abs(kept[removed] - wanted) <= unit / 2


@given(size=st.integers(2, 200), unit=st.sampled_from([1, 2, 4, 8, 16]), removed=st.integers(0, 200))
def test_kept_is_all_or_a_multiple_unless_it_is_smaller_than_the_unit(size: int, unit: int, removed: int) -> None:
    kept = ramp("g", size, unit=unit).kept(removed)
    assert kept == size or kept % unit == 0 or kept < unit


# -- selection ----------------------------------------------------------------------------------------


def test_lowest_scores_go_first_and_ties_go_by_index() -> None:
    assert pool("g", 3, 1, 2, 1, 0).keep(3).tolist() == [True, False, True, True, False]
    assert pool("g", 1, 1, 1, 1).keep(2).tolist() == [False, False, True, True]


def test_only_pools_that_lose_something_get_a_mask() -> None:
    pools = [ramp("a", 4), ramp("b", 4)]
    assert set(masks(pools, {"a": 4, "b": 3})) == {"b"}


# -- local --------------------------------------------------------------------------------------------


def test_local_removes_the_same_ratio_everywhere() -> None:
    assert Local([ramp("a", 10), ramp("b", 20), ramp("c", 100)]).at(0.3) == {"a": 7, "b": 14, "c": 70}


@pytest.mark.parametrize(("size", "ratio", "removed"), [(25, 0.5, 12), (5, 0.5, 2), (7, 0.5, 4), (1, 0.5, 0)])
def test_halves_go_to_even_as_in_torch(size: int, ratio: float, removed: int) -> None:
    assert Local([ramp("g", size)]).at(ratio)["g"] == size - removed


def test_uniform_path_visits_every_plan_once() -> None:
    path = Uniform([ramp("a", 2), ramp("b", 4)])
    assert [path.counts(step) for step in range(len(path))] == [
        {"a": 2, "b": 4},
        {"a": 2, "b": 3},
        {"a": 1, "b": 3},
        {"a": 1, "b": 2},
        {"a": 1, "b": 1},
        {"a": 1, "b": 1},
        {"a": 1, "b": 1},
    ]


# -- global -------------------------------------------------------------------------------------------


def test_global_takes_the_lowest_scores_wherever_they_are() -> None:
    pools = [pool("a", 0.1, 0.2, 0.9), pool("b", 0.3, 0.8, 0.7)]
    path = Global(pools)
    assert path.counts(3) == {"a": 1, "b": 2}
    assert path.at(0.5) == path.counts(3)


def test_global_per_cost_prefers_expensive_units() -> None:
    cheap, dear = pool("cheap", 1, 1, cost=1), pool("dear", 5, 5, cost=10)
    assert Global([cheap, dear]).counts(1) == {"cheap": 2, "dear": 1}


def test_global_ties_go_by_pool_then_index() -> None:
    assert Global([pool("a", 1, 1), pool("b", 1, 1)]).counts(1) == {"a": 1, "b": 2}


def test_scaling_one_pool_changes_the_global_but_not_the_local_choice() -> None:
    a, b = pool("a", 4, 3, 2, 1), pool("b", 2.5, 1.5, 3.5, 0.5)
    scaled = Pool("b", b.scores * 100)
    assert Global([a, b]).at(0.5) == {"a": 2, "b": 2}
    assert Global([a, scaled]).at(0.5) == {"a": 1, "b": 3}
    assert Local([a, b]).at(0.5) == Local([a, scaled]).at(0.5)
    assert b.keep(2).tolist() == scaled.keep(2).tolist()


# -- budgets ------------------------------------------------------------------------------------------


def coupled(counts: Counts) -> int:
    """A chain of matrices: the cost of one pool depends on what its neighbours keep."""
    sizes = [3, *counts.values(), 5]
    return sum(a * b for a, b in itertools.pairwise(sizes))


pools_of = st.lists(st.integers(1, 16), min_size=1, max_size=3).flatmap(
    lambda sizes: st.tuples(
        *(st.lists(st.floats(0, 10), min_size=size, max_size=size) for size in sizes),
    )
)


@pytest.mark.parametrize("kind", [Local, Uniform, Global])
@settings(max_examples=50)
@given(scores=pools_of, unit=st.sampled_from([1, 2, 8]), share=st.floats(0.01, 0.99))
def test_budget_is_met_and_the_step_before_does_not_meet_it(
    kind: type[Local] | type[Global], scores: tuple[list[float], ...], unit: int, share: float
) -> None:
    pools = [pool(str(i), *row, unit=unit) for i, row in enumerate(scores)]
    path = kind(pools)
    target = int(share * coupled(path.counts(0)))
    counts = meet(path, coupled, target)
    plans = [path.counts(step) for step in range(len(path))]
    enough = [plan for plan in plans if coupled(plan) <= target]
    if counts is None:
        assert not enough
    else:
        assert counts == enough[0]
        assert coupled(counts) <= target
        assert all(coupled(plan) > target for plan in plans[: plans.index(counts)])


@pytest.mark.parametrize("kind", [Local, Global])
@given(scores=pools_of, unit=st.sampled_from([1, 8]))
def test_a_step_changes_one_pool_by_at_most_one_unit(kind: type[Local] | type[Global], scores: tuple[list[float], ...], unit: int) -> None:
    path = kind([pool(str(i), *row, unit=unit) for i, row in enumerate(scores)])
    for step in range(1, len(path)):
        before, after = path.counts(step - 1), path.counts(step)
        drops = [before[name] - after[name] for name in before if before[name] != after[name]]
        assert len(drops) <= 1
        assert all(0 < drop <= unit for drop in drops)


@pytest.mark.parametrize("kind", [Local, Global])
@settings(max_examples=50)
@given(scores=pools_of, unit=st.sampled_from([1, 4]), ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_what_a_larger_ratio_keeps_a_smaller_ratio_keeps(
    kind: type[Local] | type[Global], scores: tuple[list[float], ...], unit: int, ratios: tuple[float, float]
) -> None:
    pools = [pool(str(i), *row, unit=unit) for i, row in enumerate(scores)]
    path = kind(pools)
    less, more = path.at(min(ratios)), path.at(max(ratios))
    for group in pools:
        assert not (group.keep(more[group.name]) & ~group.keep(less[group.name])).any()


@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=30, unique=True), ratio=st.floats(0, 1), data=st.data())
def test_permuting_indices_permutes_the_choice(scores: list[float], ratio: float, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(scores)))))
    one, other = pool("g", *scores), Pool("g", np.array(scores)[order])
    count = Local([one]).at(ratio)["g"]
    assert one.keep(count)[order].tolist() == other.keep(count).tolist()


def test_an_unreachable_budget_has_no_plan() -> None:
    assert meet(Local([ramp("g", 4, floor=2)]), lambda counts: counts["g"], 1) is None
    assert meet(Local([]), lambda counts: 7, 7) == {}


def test_local_path_moves_the_pools_one_after_the_other() -> None:
    path = Local([ramp("a", 2), ramp("b", 2)])
    assert [tuple(path.counts(step).values()) for step in range(len(path))] == [(2, 2), (2, 1), (1, 1), (1, 1), (1, 1)]
