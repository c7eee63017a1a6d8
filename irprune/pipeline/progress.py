"""Progress of long loops: a pass says what it walks over, an instrument shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")
Label = str | Callable[[], str]


class Reporter(Protocol):
    """Shows the progress of a loop. ``total`` is ``None`` where it is not known; a label that is a function is asked each time."""

    def track(self, items: Iterable[T], label: Label, total: int | None) -> Iterator[T]: ...


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def track(items: Iterable[T], label: Label, total: int | None = None) -> Iterator[T]:
    """Walk over ``items``, shown by the reporter in charge, if there is one."""
    reporter = _reporter.get()
    if total is None and isinstance(items, Sized):
        total = len(items)
    return iter(items) if reporter is None else reporter.track(items, label, total)


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Put a reporter in charge for the duration of a block."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def doing(label: str) -> Iterator[None]:
    """One piece of work that is no loop, shown by the reporter in charge."""
    for _ in track((None,), label):
        yield
