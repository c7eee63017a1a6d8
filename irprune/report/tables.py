"""Tables of runs, plans and groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover, kept_by
from irprune.analysis.plan import PlanRow
from irprune.backend.timing import Speedup
from irprune.evaluate.evaluation import Evaluation
from irprune.evaluate.tasks import averages
from irprune.ir.facts import Group, Groups, Member
from irprune.ir.program import Program, location
from irprune.pipeline.manifest import Manifest

# -- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table of a run.

    Attributes:
        label: What was measured, with its unit.
        before: The figure of the program as traced; ``None`` where it was not measured.
        after: The figure of the result.
        form: How the figures are written.
    """

    label: str
    before: float | None
    after: float
    form: str = ",.4g"

    @property
    def ratio(self) -> float | None:
        """After over before."""
        return self.after / self.before if self.before else None


def run_rows(of: Manifest) -> Iterator[Row]:
    """What a run measured, before and after."""
    before, after = of.model.before, of.model.after
    yield Row("parameters", before.params, after.params, ",d")
    yield Row("multiply-accumulates", before.macs, after.macs, ",d")
    yield Row("weights, bytes", before.bytes, after.bytes, ",d")
    said: dict[str, Any] = of.model_dump()
    onnx, torch = said.get("onnx") or {}, said.get("torch_eager") or {}
    yield from _measured("ONNX file, bytes", onnx.get("file_bytes"), ",d")
    yield from _measured("torch latency, ms", torch.get("latency_ms"))
    yield from _measured("onnxruntime latency, ms", onnx.get("latency_ms"))
    first, last = said["metrics"]["before"] or {}, said["metrics"]["after"] or {}
    for name in last:
        yield Row(name, first.get(name), last[name])


def _measured(label: str, pair: Mapping[str, float] | None, form: str = ",.4g") -> Iterator[Row]:
    if pair:
        yield Row(label, pair.get("before"), pair["after"], form)


def run_table(of: Manifest) -> Table:
    """Only what was measured: each before, after and after over before."""
    table = table_of("", ("before", "right"), ("after", "right"), ("ratio", "right"))
    for row in run_rows(of):
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(escape(row.label), "" if row.before is None else format(row.before, row.form), format(row.after, row.form), ratio)
    return table


def run_lines(of: Manifest) -> Iterator[str]:
    """What was asked, reached and proven, one line each."""
    if of.prune is not None:
        asked = " ".join(f"{key}={value}" for key, value in of.prune.requested.items())
        yield f"asked for {asked}; reached {of.prune.achieved['ratio']:.4f}"
    numbers = of.checks.numbers
    if of.checks.shapes:
        found = "no weights to compare"
        if numbers is not None and numbers.max_abs_err is not None:
            found = f"numbers within {numbers.max_abs_err:.2g} (allowed {numbers.tolerance:.2g})"
            ties = (numbers.model_extra or {}).get("ties")
            found += f", {ties} choices among equals taken over" if ties else ""
            found += ", compared in float64" if (numbers.model_extra or {}).get("float64") else ""
        yield f"proven: shapes, interface, {found}"
    elif of.prune is not None:
        yield "not proven: the proof was switched off"
    if of.onnx is not None and of.onnx.parity_max_abs_err is not None:
        yield f"onnxruntime agrees with torch within {of.onnx.parity_max_abs_err:.2g}"
    hf = (of.model_extra or {}).get("huggingface")
    if hf is not None:
        what = f"{hf['folder']}: {hf.get('model_class', 'a checkpoint')}"
        what += f", outputs within {hf['max_abs_err']:.2g} of the program's" if "max_abs_err" in hf else ""
        yield f"{what}; from_pretrained loads it without irprune" if hf["layout"] == "plain" else what
        yield from hf.get("notes", ())
    yield from _int8_lines(of)
    yield from _speed_lines(of)


def _int8_lines(of: Manifest) -> Iterator[str]:
    """What the file in eight bits costs and gives up."""
    said = of.model_dump(mode="json")
    onnx = said.get("onnx") or {}
    if "int8_relative_err" in onnx:
        found = f"in eight bits: {onnx['file_bytes']['int8']:,} bytes, outputs off by {onnx['int8_relative_err']:.2%}"
        left = onnx["int8"].get("products_in_float32", 0)
        found += f", {left} product{'s' if left > 1 else ''} left in float32" if left else ""
        metrics = (said.get("metrics") or {}).get("int8") or {}
        yield ", ".join([found, *(f"{name} {value:.4g}" for name, value in metrics.items())])


def _speed_lines(of: Manifest) -> Iterator[str]:
    """How sure the speed-up is, at every size that was timed."""
    points = ((of.onnx.model_extra or {}) if of.onnx is not None else {}).get("points", ())
    for point in points:
        at = ", ".join(f"{label} {size}" for label, size in point["sizes"].items())
        for name, file in point["files"].items():
            if "speedup" not in file:
                continue
            found = Speedup(**file["speedup"])
            what = "onnxruntime" if name == "after" else f"onnxruntime, {name}"
            kind = "" if point["kind"] == "call" else f", {point['kind']}"
            ideal = f"; ideal {point['ideal_speedup'] - 1:+.1%}" if point["ideal_speedup"] is not None and name == "after" else ""
            yield f"{what}{kind}{f' at {at}' if at else ''}: {found.verdict}{ideal}"


# -- evaluations ----------------------------------------------------------------------------------


def evaluation_table(of: Evaluation) -> Table:
    """Perplexity of each text, accuracy on each task, and the averages over tasks."""
    rows: list[dict[str, str]] = []
    for name, text in of.texts.items():
        rows.append({"": name, "perplexity": f"{text.perplexity:,.4g}", "measured on": f"{text.windows:,} x {text.window} tokens"})
    for name, task in of.tasks.items():
        row = {"": name, "acc": f"{task.acc:.4f}", "chance": f"{task.chance:.4f}", "measured on": f"{task.documents:,} documents"}
        rows.append(row | ({} if task.acc_norm is None else {"acc_norm": f"{task.acc_norm:.4f}"}))
        rows[-1] |= {} if task.stderr is None else {"±": f"{task.stderr:.4f}"}
    if len(of.tasks) > 1:
        means = {name: f"{mean:.4f}" for name, mean in averages(of.tasks).items()}
        rows.append({"": "average", **means, "measured on": f"{len(of.tasks)} tasks"})
    columns = [name for name in ("perplexity", "acc", "acc_norm", "±", "chance", "measured on") if any(name in row for row in rows)]
    table = table_of("", *((name, "right") for name in columns))
    for row in rows:
        table.add_row(*(escape(row.get(name, "")) for name in ("", *columns)))
    return table


# -- plans ----------------------------------------------------------------------------------------


def plan_table(rows: Iterable[PlanRow]) -> Table:
    """What would go, per group."""
    table = table_of("group", "kind", ("layer", "right"), ("indices", "right"), ("kept", "right"), ("parameters removed", "right"))
    for row in rows:
        layer = "" if row.layer is None else str(row.layer)
        table.add_row(row.group, row.kind, layer, f"{row.size:,}", f"{row.kept:,}", f"{row.params_removed:,}")
    return table


def plan_lines(of: Manifest, rows: Iterable[PlanRow]) -> Iterator[str]:
    """What was asked for, and what the plan reaches."""
    rows = list(rows)
    if of.prune is not None:
        asked = " ".join(f"{key}={value}" for key, value in of.prune.requested.items())
        reached = ", ".join(f"{of.prune.achieved[unit]:.4f} of the {unit}" for unit in ("params", "macs") if unit in of.prune.achieved)
        yield f"asked for {asked}; the plan removes {reached}"
    yield f"{sum(row.size - row.kept for row in rows):,} indices of {len(rows)} groups would go; nothing was changed or written"


# -- groups ---------------------------------------------------------------------------------------


def group_data(program: Program, group: Group) -> dict[str, Any]:
    """A group as plain data, for machines."""
    frozen = None
    if group.frozen is not None:
        node = program.by_name.get(group.frozen.node or "")
        place = location(node) if node is not None else None
        frozen = {"code": group.frozen.code, "message": group.frozen.message, "node": group.frozen.node, "location": place}
    return {
        "name": group.name,
        "key": group.key,
        "kind": group.kind,
        "size": group.size,
        "exact": group.exact,
        "params_per_index": group.params_per_index,
        "macs_per_index": group.macs_per_index,
        "members": [{"tensor": member.tensor, "axis": member.axis, "role": member.role} for member in group.members],
        "carriers": list(group.carriers),
        "mixers": list(group.mixers),
        "frozen": frozen,
    }


def inspection(program: Program, groups: Groups) -> dict[str, Any]:
    """A program and its groups as plain data, for machines."""
    cost = Cost(program)
    return {
        "params": cost.params(),
        "macs": cost.macs(),
        "bytes": cost.bytes(),
        "prunable_params": prunable_params(program, groups),
        "groups": [group_data(program, group) for group in groups],
        "notes": notes(program, groups),
    }


def inspection_lines(program: Program, groups: Groups) -> Iterator[str]:
    """How much of a program is prunable, and what analysis could not use."""
    total, within = Cost(program).params(), prunable_params(program, groups)
    share = f" ({within / total:.1%})" if total else ""
    yield f"{len(groups.prunable)} prunable groups, {len(groups) - len(groups.prunable)} that stay whole"
    yield f"{within:,} of {total:,} parameters{share} lie in a prunable group"
    yield from note_lines(notes(program, groups), "--json lists them")


SHOWN_NOTES = 8


def note_lines(of: Sequence[str], rest: str) -> Iterator[str]:
    """The first notes, and where the others are."""
    yield from (f"note: {note}" for note in of[:SHOWN_NOTES])
    if len(of) > SHOWN_NOTES:
        yield f"note: {len(of) - SHOWN_NOTES} more; {rest}"


def notes(program: Program, groups: Groups | None = None) -> list[str]:
    """What the trace and the analysis want to say, once each.

    Args:
        program: A typed program.
        groups: Its groups, if they are known already.
    """
    by_message: dict[str, list[str]] = {}
    for one in program.typing.diagnostics:
        by_message.setdefault(one.freeze.message, []).append(one.node)
    cost = kept_by(groups if groups is not None else discover(program)) if by_message else {}
    found = [_unused(program, message, nodes, cost) for message, nodes in by_message.items()]
    return list(dict.fromkeys([*program.interface.notes, *found]))


def _unused(program: Program, message: str, nodes: Sequence[str], cost: Mapping[str, frozenset[str]]) -> str:
    """``model.py:14 and 3 more places: operation lib::op has no rule; 1,024 parameters are kept from pruning …``."""
    places = list(dict.fromkeys((location(program.by_name[node]) if node in program.by_name else None) or f"%{node}" for node in nodes))
    more = f" and {len(nodes) - 1} more calls" if len(nodes) > 2 else " and another call" if len(nodes) == 2 else ""
    kept = {tensor for node in nodes for tensor in cost.get(node, ()) if program.is_parameter(tensor)}
    count = sum(program.tensors[tensor].numel() for tensor in kept)
    what = f"{count:,} parameters are kept from pruning" if count else "no parameter is kept from pruning by it alone"
    return f"{places[0]}{more}: {message}; {what} (add one: docs/how-to/add-an-op-rule.md)"


def prunable_params(program: Program, groups: Groups) -> int:
    """Number of parameters that lie in at least one prunable group."""
    within = {member.tensor for group in groups.prunable for member in group.members}
    return sum(tensor.numel() for name, tensor in program.tensors.items() if name in within and program.is_parameter(name))


def groups_table(groups: Iterable[Group], *, every: bool = False) -> Table:
    """Groups with their members.

    Args:
        groups: What to list.
        every: One row for each; otherwise groups that differ in the number of their block only share
            a row.
    """
    table = table_of("group", "kind", ("indices", "right"), "exact", ("parameters per index", "right"), "members, or why it stays whole")
    shown = [[group] for group in groups] if every else alike(groups)
    for run in shown:
        first = run[0]
        name = first.name if len(run) == 1 else f"{first.name} … {run[-1].name} ({len(run)} x)"
        listed = [*map(str, first.members)] if every else members([member for group in run for member in group.members])
        told = first.frozen.message if first.frozen is not None else " ".join(listed)
        exact = "yes" if first.exact else "no"
        table.add_row(name, first.kind, f"{first.size:,}", exact, f"{first.params_per_index:,}", escape(told))
    return table


def alike(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups in runs that differ only in the number of their repeated block."""
    runs: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        frozen = (group.frozen.code, re.sub(r"\d+", "*", group.frozen.message)) if group.frozen is not None else None
        members = tuple((_blank(member.tensor), member.axis, member.role) for member in group.members)
        runs.setdefault((group.kind, group.size, group.exact, group.params_per_index, frozen, members), []).append(group)
    return list(runs.values())


def _blank(name: str) -> str:
    """A dotted name with ``*`` for each part that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def members(of: Sequence[Member]) -> list[str]:
    """Tensors with their axes; those of repeated blocks stand together as ``layers.*.weight:0``."""
    shapes = [f"{_blank(member.tensor)}:{member.axis}" for member in of]
    several = {shape for shape, count in Counter(shapes).items() if count > 1}
    return list(dict.fromkeys(shape if shape in several else str(member) for shape, member in zip(shapes, of, strict=True)))


Justify = Literal["left", "right"]


def table_of(*columns: str | tuple[str, Justify]) -> Table:
    """An empty table with these columns, each a label or a label with its side."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        if isinstance(column, str):
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column[0], justify=column[1], overflow="fold")
    return table
