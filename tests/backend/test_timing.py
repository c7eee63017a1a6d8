"""Speed-ups with their intervals, and multiples that kernels like."""

from __future__ import annotations

import numpy as np
import pytest

from irprune.backend.multiples import CANDIDATES, Multiples, best, stored
from irprune.backend.timing import Latency, Speedup


def test_a_speedup_is_the_median_of_the_rounds_ratios() -> None:
    found = Speedup.of([10, 20, 30, 40, 1000], [5, 10, 15, 20, 500])
    assert (found.ratio, found.low, found.high) == (2, 2, 2)
    assert found.verdict == "faster by 100.0% (95% interval +100.0% to +100.0%)"


def test_noise_is_not_faster() -> None:
    random = np.random.default_rng(0)
    found = Speedup.of(random.normal(10, 1, 40).tolist(), random.normal(10, 1, 40).tolist())
    assert found.low < 1 < found.high
    assert found.verdict.startswith("not faster (95% interval -")


def test_slower_is_said() -> None:
    assert Speedup.of([9.0, 9.1, 9.2, 9.0, 9.1], [10.0] * 5).verdict.startswith("slower by 9.0%")


def test_the_interval_narrows_with_more_rounds() -> None:
    random = np.random.default_rng(0)
    before, after = random.normal(12, 1, 400), random.normal(10, 1, 400)
    few, many = Speedup.of(before[:10].tolist(), after[:10].tolist()), Speedup.of(before.tolist(), after.tolist())
    assert many.high - many.low < few.high - few.low
    assert many.low < 1.2 < many.high


def test_latency_quantiles() -> None:
    found = Latency.of(list(range(1, 102)))
    assert (found.median_ms, found.p95_ms, found.iqr_ms, found.rounds) == (51, 96, 50, 101)


@pytest.mark.parametrize(
    ("slow", "wanted"),
    [((), 1), ((1, 2), 4), ((1, 2, 4, 8), 16), ((8,), 16), (CANDIDATES, 32)],
)
def test_the_best_multiple_has_nothing_slow_above_it(slow: tuple[int, ...], wanted: int) -> None:
    assert best({multiple: 1.2 if multiple in slow else 1.01 for multiple in CANDIDATES}) == wanted


def test_the_table_knows_this_provider() -> None:
    assert isinstance(stored("cpu"), Multiples)
    assert stored("cpu").product == 8
