"""``report.json``: what the report of a run shows beyond its manifest, as plain data."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import fx

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.errors import DataError
from irprune.ir.facts import Group, Groups, Importance, PruneReport
from irprune.ir.program import Program, module_path
from irprune.pipeline.files import write_text
from irprune.pipeline.manager import Instrument, Step
from irprune.pipeline.passes import Facts
from irprune.report.tables import members

NAME = "report.json"
BINS = 40
_SHOWN_MEMBERS = 4
_TIMING_SECONDS = 0.3
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 20
_MOST_TIMED_BYTES = 2**32
_OWN = "the model itself"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class GroupRow(_Part):
    """What became of a group.

    Attributes:
        name: Its name.
        kind: Its kind.
        block: Path of the numbered block that writes it, as ``model.layers.3``; ``None`` where none or several do.
        size: Indices before.
        kept: Indices after.
        exact: Whether removing is the same as zeroing.
        members: The first of its tensors.
    """

    name: str
    kind: str
    block: str | None
    size: int
    kept: int
    exact: bool
    members: tuple[str, ...]


class Frozen(_Part):
    """Axes that stay whole for one reason.

    Attributes:
        why: The reason, numbers blanked where they differ.
        axes: How many.
        params: Parameters that lie in such an axis and in no prunable group.
        members: The first of their tensors.
    """

    why: str
    axes: int
    params: int
    members: tuple[str, ...]


class Spread(_Part):
    """How the scores of one kind of groups are distributed around what decided.

    Attributes:
        kind: The kind of the groups.
        groups: How many of them lost indices.
        log: Scores are given as the logarithm to base 10 of score over cut-off; otherwise as their
            difference, in standard deviations. The cut-off lies at zero.
        edges: Of the bins.
        removed: Indices in each bin that went.
        kept: Indices in each bin that stayed.
    """

    kind: str
    groups: int
    log: bool
    edges: tuple[float, ...]
    removed: tuple[int, ...]
    kept: tuple[int, ...]


class Share(_Part):
    """What one place of the model takes, before and after; ``None`` where it was not measured.

    Attributes:
        path: The module's path, with ``*`` for the numbers of repeated blocks.
        modules: How many modules that is.
        params: Parameters.
        macs: Multiply-accumulates of the example call.
        ms: Milliseconds of the example call in torch, operation by operation.
    """

    path: str
    modules: int
    params: tuple[int, int]
    macs: tuple[int, int]
    ms: tuple[float, float] | None = None


class Data(_Part):
    """What the report shows beyond the manifest.

    Attributes:
        criterion: What was scored by; empty where nothing was.
        prunable_params: Parameters in prunable groups before.
        groups: Prunable groups, in order of execution; empty where nothing was pruned.
        frozen: What was not prunable.
        spreads: Scores by kind.
        shares: Where parameters and time go.
    """

    criterion: str = ""
    prunable_params: int = 0
    groups: tuple[GroupRow, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    spreads: tuple[Spread, ...] = ()
    shares: tuple[Share, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write ``report.json``. Raises OutputError where that fails."""
        write_text(folder / NAME, self.model_dump_json() + "\n")
        return folder / NAME

    @classmethod
    def read(cls, folder: Path) -> Data:
        """The data of a run directory; empty where an older run left none.

        Raises:
            DataError: The file is not one that a run wrote.
        """
        path = folder / NAME
        if not path.is_file():
            return cls()
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            found = f"the file is no data of a report: {str(error).splitlines()[0]}"
            raise DataError(found, where=str(path), hint="run the target again") from error


class Observed(Instrument):
    """Keeps what the first pruning pass saw: groups and scores are dropped when the program changes."""

    def __init__(self) -> None:
        self.groups: Groups | None = None
        self.importance: Importance | None = None
        self._done = False

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        yield
        if self._done or step.result is None or not any(isinstance(fact, PruneReport) for fact in step.result.facts):
            return
        self.groups, self.importance = step.facts.get(Groups), step.facts.get(Importance)
        self._done = True


def collect(original: Program, program: Program, seen: Observed, facts: Facts) -> Data:
    """The data of a run that has ended.

    Args:
        original: The program as traced.
        program: The result.
        seen: What was watched.
        facts: What is known at the end.
    """
    shares = tuple(_shares(original, program))
    report = facts.get(PruneReport)
    if report is None:
        return Data(shares=shares)
    groups = seen.groups if seen.groups is not None else discover(original)
    masks = {
        group.name: report.keep[group.key] for group in groups if group.key in report.keep and len(report.keep[group.key]) == group.size
    }
    rows = tuple(_row(group, masks.get(group.name)) for group in groups.prunable)
    inside = {member.tensor for group in groups.prunable for member in group.members}
    scores = seen.importance
    return Data(
        criterion=scores.criterion if scores is not None else "",
        prunable_params=_params(original, inside),
        groups=rows,
        frozen=tuple(_frozen(original, groups, inside)),
        spreads=tuple(_spreads(groups, masks, scores.scores)) if scores is not None else (),
        shares=shares,
    )


# -- groups ---------------------------------------------------------------------------------------


def _row(group: Group, mask: npt.NDArray[np.bool_] | None) -> GroupRow:
    tensors = [member.tensor for member in group.members if member.role != "read"] or [member.tensor for member in group.members]
    blocks = {_block(tensor) for tensor in tensors}
    block = next(iter(blocks)) if len(blocks) == 1 else None
    kept = group.size if mask is None else int(mask.sum())
    return GroupRow(name=group.name, kind=group.kind, block=block, size=group.size, kept=kept, exact=group.exact, members=_members([group]))


def _block(tensor: str) -> str | None:
    """The path up to its first part that is a number."""
    parts = tensor.split(".")
    place = next((number for number, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: place + 1]) if place is not None else None


def _members(groups: Iterable[Group]) -> tuple[str, ...]:
    found = members([member for group in groups for member in group.members])
    more = len(found) - _SHOWN_MEMBERS
    return (*found[:_SHOWN_MEMBERS], *([f"{more} more"] if more > 0 else []))


def _params(program: Program, names: Iterable[str]) -> int:
    return sum(program.tensors[name].numel() for name in names if name in program.tensors and program.is_parameter(name))


def _frozen(program: Program, groups: Groups, inside: set[str]) -> Iterator[Frozen]:
    reasons: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.frozen is not None:
            reasons[re.sub(r"\d+", "*", group.frozen.message)].append(group)
    found = []
    for alike in reasons.values():
        messages = {group.frozen.message for group in alike if group.frozen is not None}
        why = messages.pop() if len(messages) == 1 else re.sub(r"\d+", "*", messages.pop())
        tensors = {member.tensor for group in alike for member in group.members} - inside
        found.append(Frozen(why=why, axes=len(alike), params=_params(program, tensors), members=_members(alike)))
    yield from sorted(found, key=lambda one: (-one.params, -one.axes))


# -- scores ---------------------------------------------------------------------------------------


def _spreads(groups: Groups, masks: Mapping[str, npt.NDArray[np.bool_]], scores: Mapping[str, npt.NDArray[np.float64]]) -> Iterator[Spread]:
    kinds: dict[str, list[tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]]] = defaultdict(list)
    for group in groups.prunable:
        mask, values = masks.get(group.name), scores.get(group.name)
        if mask is not None and values is not None and not mask.all() and mask.any():
            kinds[group.kind].append((np.asarray(values, dtype=np.float64), mask))
    for kind, found in kinds.items():
        log = all(bool((values >= 0).all()) and _cut(values, mask) > 0 for values, mask in found)
        placed = np.concatenate([_placed(values, _cut(values, mask), log) for values, mask in found])
        stays = np.concatenate([mask for _, mask in found])
        low, high = np.quantile(placed[np.isfinite(placed)], [0.002, 0.998])
        # Zero, where the cut-off lies, is an edge.
        step = max(high - min(low, 0.0), 1e-6) / BINS
        below, above = int(np.ceil(max(-low, step) / step)), int(np.ceil(max(high, step) / step))
        edges = np.arange(-below, above + 1) * step
        inner = np.clip(np.nan_to_num(placed, nan=0.0, posinf=edges[-1], neginf=edges[0]), edges[0], edges[-1])
        counts = [np.histogram(inner[which], edges)[0].tolist() for which in (~stays, stays)]
        yield Spread(kind=kind, groups=len(found), log=log, edges=tuple(map(float, edges)), removed=tuple(counts[0]), kept=tuple(counts[1]))


def _cut(values: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_]) -> float:
    """Where as many scores lie below as indices went: between the highest that went and the lowest that stayed, if they do not mix."""
    ordered, gone = np.sort(values), int((~mask).sum())
    return float((ordered[gone - 1] + ordered[gone]) / 2)


def _placed(values: npt.NDArray[np.float64], cut: float, log: bool) -> npt.NDArray[np.float64]:
    if log:
        with np.errstate(divide="ignore"):
            return np.log10(values / cut)
    deviation = float(values.std())
    return (values - cut) / (deviation if deviation > 0 else 1.0)


# -- where parameters and time go -----------------------------------------------------------------


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _shares(original: Program, program: Program) -> Iterator[Share]:
    params = [_params_by_module(one) for one in (original, program)]
    macs = [_by_module(one, Cost(one).macs_by_operation()) for one in (original, program)]
    times = _times(original, program)
    ms = [_by_module(one, each) for one, each in zip((original, program), times, strict=True)] if times is not None else None
    paths = list(dict.fromkeys(path for found in (*params, *macs, *(ms or ())) for path in found))
    patterns: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        patterns[_pattern(path)].append(path)
    for pattern, alike in patterns.items():

        def total(found: Mapping[str, float], alike: list[str] = alike) -> float:
            return sum(found.get(path, 0) for path in alike)

        yield Share(
            path=pattern or _OWN,
            modules=len(alike),
            params=(int(total(params[0])), int(total(params[1]))),
            macs=(int(total(macs[0])), int(total(macs[1]))),
            ms=(total(ms[0]), total(ms[1])) if ms is not None else None,
        )


def _params_by_module(program: Program) -> dict[str, int]:
    out: dict[str, int] = defaultdict(int)
    for name, tensor in program.tensors.items():
        if program.is_parameter(name):
            out[name.rpartition(".")[0]] += tensor.numel()
    return out


def _by_module(program: Program, values: Mapping[str, float]) -> dict[str, float]:
    out: dict[str, float] = defaultdict(float)
    for name, value in values.items():
        path = module_path(program.by_name[name])
        # What torch itself inserted belongs to no module.
        out["" if path.startswith("_empty_nn_module_stack") else path] += value
    return out


class _Timer(fx.Interpreter):
    """Runs a graph and notes how long each operation takes, in milliseconds."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.taken: dict[str, list[float]] = defaultdict(list)
        self._wait = torch.cuda.synchronize if any(tensor.is_cuda for tensor in program.tensors.values()) else None

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        if n.op == "call_function":
            if self._wait is not None:
                self._wait()
            self.taken[n.name].append((time.perf_counter() - start) * 1000)
        return value


def _times(*programs: Program) -> list[dict[str, float]] | None:
    """Least milliseconds of each operation on the example inputs over some rounds, the programs in turn.

    The least, since whatever disturbs a single operation makes it slower.
    ``None`` where that cannot be measured (no weights) or would take long.
    """
    for program in programs:
        tensors = program.tensors.values()
        if any(tensor.is_meta for tensor in tensors) or sum(tensor.nbytes for tensor in tensors) > _MOST_TIMED_BYTES:
            return None
    timers = [_Timer(program) for program in programs]
    start = time.perf_counter()
    with torch.no_grad():
        for number in range(_MOST_ROUNDS):
            for timer, program in zip(timers, programs, strict=True):
                args, kwargs = program.interface.example
                timer.run(*args, *kwargs.values())
            if number + 1 >= _FEWEST_ROUNDS and time.perf_counter() - start > _TIMING_SECONDS:
                break
    return [{name: min(taken) for name, taken in timer.taken.items()} for timer in timers]
