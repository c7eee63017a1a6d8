"""Time functions side by side, and say how sure a speed-up is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from irprune.pipeline.progress import track

CONFIDENCE = 0.95
_RESAMPLES = 2000
_WARM_UP = 3
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """How long one call takes, in milliseconds.

    Attributes:
        median_ms: Median over the rounds.
        iqr_ms: Interquartile range: the spread that outliers do not move.
        p95_ms: What 95 of 100 rounds stay below.
        rounds: How many rounds were timed.
    """

    median_ms: float
    iqr_ms: float
    p95_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Latency:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, high - low, float(np.percentile(samples, 95)), len(samples))


@dataclass(frozen=True)
class Speedup:
    """How many times faster, with a confidence interval of 95 %.

    Attributes:
        ratio: Median over the rounds of the time before over the time after.
        low, high: Bootstrap over the rounds (Efron 1979, percentile interval): a round's two times were
            taken one right after the other, so what disturbed one disturbed both.
    """

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Speedup:
        pairs = np.asarray(before) / np.asarray(after)
        draws = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
        tail = (1 - CONFIDENCE) / 2 * 100
        low, high = np.percentile(np.median(pairs[draws], axis=1), [tail, 100 - tail])
        return cls(float(np.median(pairs)), float(low), float(high))

    @property
    def verdict(self) -> str:
        """In words, with the interval; *not faster* unless the whole interval is above one."""
        interval = f"{CONFIDENCE:.0%} interval {self.low - 1:+.1%} to {self.high - 1:+.1%}"
        if self.low > 1:
            return f"faster by {self.ratio - 1:.1%} ({interval})"
        return f"slower by {1 - self.ratio:.1%} ({interval})" if self.high < 1 else f"not faster ({interval})"

    def __str__(self) -> str:
        return f"{self.ratio:.3f} times faster ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Paired:
    """Milliseconds of two functions, round by round."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def speedup(self) -> Speedup:
        return Speedup.of(self.before, self.after)


def compared(before: Callable[[], Any], after: Callable[[], Any], **options: Any) -> Paired:
    """Two functions side by side; options as :func:`sampled` takes them."""
    first, second = sampled(before, after, **options)
    return Paired(tuple(first), tuple(second))


def sampled(
    *calls: Callable[[], Any],
    rounds: int = 100,
    seconds: float = 10.0,
    sample_ms: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time functions side by side: every round times each of them, in alternating order.

    What disturbs the machine for a while disturbs all of them alike. A sample repeats a fast function
    until it fills ``sample_ms``, which hides the clock's grain and the cost of changing over.

    Args:
        calls: The functions; what they return is dropped.
        rounds: Most rounds.
        seconds: No round starts after this time, but there are at least five.
        sample_ms: Least duration of a sample, in milliseconds.
        clock: Seconds: elapsed ones, or processor time where one thread does the work.

    Returns:
        Milliseconds of each function, one entry a round.
    """
    start = clock()
    repeats = []
    for call in calls:
        for _ in range(_WARM_UP):
            began = clock()
            call()
            took = clock() - began
        repeats.append(max(1, round(sample_ms / 1000 / took)) if took > 0 else 1000)
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for number in track(range(rounds), "latency"):
        if number >= _FEWEST_ROUNDS and clock() - start > seconds:
            break
        for which in order if number % 2 == 0 else reversed(order):
            call, repeat = calls[which], repeats[which]
            began = clock()
            for _ in range(repeat):
                call()
            samples[which].append((clock() - began) / repeat * 1000)
    return samples
