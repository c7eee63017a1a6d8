"""Watchers of a run: progress, timing, printing of the program, proof that inputs stay untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from irprune.ir.facts import Groups
from irprune.ir.program import Program, attribute
from irprune.pipeline.manager import Instrument, Step
from irprune.pipeline.passes import Pass
from irprune.pipeline.progress import Label, reporting

T = TypeVar("T")


class Progress(Instrument):
    """Bars with the remaining time for passes and their loops, while it is :meth:`live`.

    It shows nothing where the console is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show what happens in a block."""
        with self._bars, reporting(self):
            yield

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        task = self._bars.add_task(f"{step.number}/{step.total} {step.of.name}", total=None)
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def track(self, items: Iterable[T], label: Label, total: int | None) -> Iterator[T]:
        """Show one loop of a pass below the pass."""

        def told() -> str:
            return f"    {label if isinstance(label, str) else label()}"

        task = self._bars.add_task(told(), total=total)
        try:
            for item in items:
                yield item
                self._bars.update(task, advance=1, description=told())
        finally:
            self._bars.remove_task(task)


@dataclass(frozen=True)
class Timed:
    """A pass that has run, with its time in seconds."""

    of: Pass
    seconds: float


class Timing(Instrument):
    """Collects how long each pass took."""

    def __init__(self) -> None:
        self.steps: list[Timed] = []

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        yield
        self.steps.append(Timed(step.of, step.seconds))


def timing_table(steps: Sequence[Timed]) -> Table:
    """Pass, seconds and share of the total."""
    table = Table("pass", "seconds", "share")
    total = sum(step.seconds for step in steps)
    for step in steps:
        table.add_row(escape(str(step.of)), f"{step.seconds:.3f}", f"{step.seconds / total:.1%}" if total else "")
    table.add_row("total", f"{total:.3f}", "")
    return table


class PrintIR(Instrument):
    """Prints the program after the passes of the given names."""

    def __init__(self, after: Collection[str], console: Console) -> None:
        self._after = after
        self._console = console

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        yield
        if step.of.name in self._after and step.result is not None and not step.recalled:
            from irprune.ir.text import dump

            facts = step.facts.updated(step.result.facts)
            groups = facts.get(Groups) if step.result.program is step.program else None
            self._console.print(f"// after {step.of}", markup=False, highlight=False, soft_wrap=True)
            self._console.print(dump(step.result.program, groups), markup=False, highlight=False, soft_wrap=True)


class Untouched(Instrument):
    """Asserts that a pass leaves its input as it was."""

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        if step.recalled:
            yield
            return
        before = fingerprint(step.program)
        yield
        assert fingerprint(step.program) == before, f"pass {step.of.name} modified its input"


def fingerprint(program: Program) -> tuple[str, tuple[tuple[str, int, int, bool], ...]]:
    """What changes when a program is modified: its graph, and its tensors' identities and versions.

    Cheap: no weight is read. An in-place write through ``tensor.data`` goes unseen.
    """
    lines = (f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n" for node in program.nodes)
    graph = hashlib.sha256("".join(lines).encode()).hexdigest()
    names = sorted({str(node.target) for node in program.nodes if node.op == "get_attr"})
    tensors = [(name, attribute(program.module, name)) for name in names]
    return graph, tuple((name, id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors)
