"""Runs side by side: what each kept, how fast it is and how good, and which ones no other beats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from irprune.errors import OptionError
from irprune.evaluate import evaluation
from irprune.pipeline.manifest import Manifest
from irprune.report import figure
from irprune.report.html import evaluation_figures, page, safe
from irprune.report.tables import Justify, table_of

SIZE = "parameters kept"
LATENCY = "onnxruntime latency, ms"
_MOST_CHARTS = 8


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        name: Short and unique among the runs.
        path: Its directory.
        target: What was pruned.
        pipeline: How.
        params: Parameters after.
        kept: Share of the parameters, and of the multiply-accumulates, that is left.
        figures: What was measured of the result, by name: latency, metrics, evaluation.
        before: The same of the original, where it was measured.
    """

    name: str
    path: Path
    target: str
    pipeline: str
    params: int
    kept: tuple[float, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs, and for each measurement those that no other run beats in size and in it.

    Attributes:
        entries: The runs, as given.
        measured: Names of what at least one run measured.
        fronts: Name of a measurement to the numbers of the best runs, by size.
    """

    entries: tuple[Entry, ...]
    measured: tuple[str, ...]
    fronts: Mapping[str, tuple[int, ...]]


def compare(folders: Sequence[Path]) -> Comparison:
    """Read runs and compare them.

    Raises:
        OptionError: Fewer than two directories, or one of them twice.
        DataError: A directory holds no finished run.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise OptionError("two or more different runs can be compared", hint="name the directories of two runs or more")
    entries = tuple(_entry(folder, name) for folder, name in zip(folders, _names(folders), strict=True))
    measured = tuple(dict.fromkeys(name for entry in entries for name in entry.figures))
    fronts = {}
    for name in measured:
        among = [number for number, entry in enumerate(entries) if name in entry.figures]
        best = pareto([(entries[number].kept[0], entries[number].figures[name]) for number in among], larger=larger_is_better(name))
        fronts[name] = tuple(among[place] for place in best)
    return Comparison(entries, measured, fronts)


def larger_is_better(name: str) -> bool:
    """Whether more of a measurement is better: of all but losses, perplexities, errors and latencies."""
    return not any(word in name.lower() for word in ("loss", "perplexity", "error", "latency"))


def pareto(points: Iterable[tuple[float, float]], larger: bool) -> list[int]:
    """Which points no other one beats: smaller in the first number and better in the second.

    Args:
        points: Size and quality.
        larger: Whether a larger quality is better.

    Returns:
        Their numbers, in order of size; of equal points the first.
    """
    found = [(x, -y if larger else y) for x, y in points]
    best: list[int] = []
    for number in sorted(range(len(found)), key=lambda one: found[one]):
        if not best or found[number][1] < found[best[-1]][1]:
            best.append(number)
    return best


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _entry(folder: Path, name: str) -> Entry:
    of = Manifest.read(folder)
    before, after = of.model.before, of.model.after
    figures: dict[str, float] = {}
    first: dict[str, float] = dict(of.metrics.before or {})
    if of.onnx is not None and of.onnx.latency_ms is not None:
        figures[LATENCY] = of.onnx.latency_ms.after
        if of.onnx.latency_ms.before is not None:
            first[LATENCY] = of.onnx.latency_ms.before
    figures.update(of.metrics.after or {})
    said = evaluation.read(folder)
    if said is not None:
        figures.update(evaluation_figures(said))
    kept = (after.params / before.params if before.params else 1.0, after.macs / before.macs if before.macs else 1.0)
    return Entry(name, folder, of.target, of.pipeline, after.params, kept, figures, first)


# -- what people read -----------------------------------------------------------------------------


def table(of: Comparison) -> Table:
    """A row for each run; a star marks those that no other run beats in size and that measurement."""
    right: Justify = "right"
    out = table_of("run", ("parameters", right), ("kept", right), ("MACs kept", right), *((name, right) for name in of.measured))
    for row in _rows(of):
        out.add_row(*(escape(cell) for cell in row))
    return out


def _rows(of: Comparison) -> Iterator[list[str]]:
    for number, entry in enumerate(of.entries):
        cells = [_figure(entry.figures.get(name), number in of.fronts[name] and len(of.fronts[name]) > 0) for name in of.measured]
        yield [entry.name, f"{entry.params:,}", f"{entry.kept[0]:.3f}", f"{entry.kept[1]:.3f}", *cells]


def _figure(value: float | None, best: bool) -> str:
    return "" if value is None else f"{value:,.4g}{' *' if best else '  '}"


def lines(of: Comparison) -> Iterator[str]:
    """What the stars mean, and a warning where runs are of different models."""
    if of.measured:
        yield "* no other run is both smaller and better in this"
    targets = dict.fromkeys(entry.target for entry in of.entries)
    if len(targets) > 1:
        yield f"note: the runs are of different targets: {', '.join(targets)}"


def render(of: Comparison) -> str:
    """The comparison as a page of its own."""
    from irprune import __version__

    charts = []
    for number, name in enumerate(of.measured[:_MOST_CHARTS]):
        having = [place for place, entry in enumerate(of.entries) if name in entry.figures]
        if len(having) < 2:
            continue
        points = [(of.entries[place].name, of.entries[place].kept[0], of.entries[place].figures[name]) for place in having]
        before = next((entry.before[name] for entry in of.entries if name in entry.before), None)
        better = "more is better" if larger_is_better(name) else "less is better"
        front = [having.index(place) for place in of.fronts[name]]
        svg = figure.scatter(points, front, SIZE, name, better, f"compare-{number}", before=before)
        charts.append(safe(svg))
    rows: list[dict[str, Any]] = []
    for entry, cells in zip(of.entries, _rows(of), strict=True):
        rows.append({"entry": entry, "cells": [cell.strip() for cell in cells[1:]]})
    headings = ["parameters", "kept", "MACs kept", *of.measured]
    return page(
        "compare.html.j2",
        title=f"{len(of.entries)} runs of irprune side by side",
        version=__version__,
        rows=rows,
        headings=headings,
        charts=charts,
        lines=list(lines(of)),
    )
