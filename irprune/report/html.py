"""``report.html``: a run at a glance, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irprune.errors import OptionError
from irprune.evaluate import evaluation
from irprune.pipeline.files import write_text
from irprune.pipeline.manifest import Manifest
from irprune.report import figure
from irprune.report.data import Data, GroupRow, Share
from irprune.report.tables import run_lines, run_rows

NAME = "report.html"
# One hue, from few to all: readable in black and white and by the colour-blind, on light and dark pages.
SCALE = ("#f3e9d8", "#e3e5e3", "#cddce8", "#b3cde4", "#97bee0", "#7aadd9", "#5d9bd0", "#4388c4", "#2f74b3", "#1f609f", "#124d8a")
_MOST_SHARES = 24


def write(folder: Path, manifest: Manifest | None = None) -> Path:
    """Write the report of a run directory, from what lies there.

    Args:
        folder: The run directory.
        manifest: Its manifest, where that is not written yet.

    Raises:
        DataError: The directory holds no finished run, or its data cannot be read.
        OutputError: The file cannot be written.
    """
    page = render(manifest if manifest is not None else Manifest.read(folder), Data.read(folder), folder)
    write_text(folder / NAME, page)
    return folder / NAME


def render(manifest: Manifest, data: Data, folder: Path) -> str:
    """The report as a page.

    Args:
        manifest: Of the run.
        data: Of the run.
        folder: The run directory, for what can be loaded.
    """
    said: dict[str, Any] = manifest.model_dump(mode="json")
    shares, timed = _shown_shares(data.shares)
    columns = ["parameters", "time" if timed else "multiply-accumulates"]
    losses = _losses(said)
    return page(
        "report.html.j2",
        title=f"{manifest.target or 'A program'}: pruned with irprune",
        version=manifest.irprune,
        manifest=manifest,
        data=data,
        summary=_summary(manifest),
        tiles=list(_tiles(manifest)),
        lines=list(run_lines(manifest)),
        rows=list(run_rows(manifest)),
        map=_map(data.groups),
        scale=SCALE,
        spreads=safe(figure.spreads(data.spreads)) if data.spreads else "",
        shares=[_share(share, shares, timed) for share in shares],
        columns=columns,
        timed=timed,
        checks=list(_checks(manifest)),
        speed=list(_speed(said)),
        points=list(_points(said)),
        curves=safe(figure.curves(losses)) if losses else "",
        evaluation=_evaluation(evaluation.read(folder)),
        extras=list(_extras(said)),
        artefacts=list(_artefacts(folder, said)),
        passes=[{"text": _pass_text(one.name, one.options), "seconds": one.seconds} for one in manifest.passes],
    )


def page(template: str, **values: Any) -> str:
    """A template of this package with values; what is text is escaped."""
    import jinja2

    loader = jinja2.PackageLoader("irprune.report")
    made = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    made.filters["figure"] = lambda value, form: format(int(value) if form.endswith("d") else value, form)
    return made.get_template(template).render(**values)


def safe(svg: str) -> Any:
    """Markup of our own making, not to be escaped."""
    import markupsafe

    return markupsafe.Markup(svg)


# -- the top --------------------------------------------------------------------------------------


def _summary(of: Manifest) -> str:
    if of.prune is None:
        return "Nothing was pruned in this run."
    before, after = of.model.before, of.model.after
    return f"{1 - after.params / before.params:.1%} of {before.params:,} parameters removed." if before.params else ""


def _tiles(of: Manifest) -> Iterator[dict[str, str]]:
    for row in run_rows(of):
        if row.label in ("weights, bytes", "ONNX file, bytes", "torch latency, ms") or row.before is None:
            continue
        short = _short if row.form.endswith("d") else (lambda value: f"{value:.4g}")
        change = (
            f"{row.ratio - 1:+.1%}" if row.ratio is not None and (row.form.endswith("d") or "latency" in row.label) else short(row.after)
        )
        yield {"label": row.label, "value": change, "note": f"{short(row.before)} to {short(row.after)}"}


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


# -- the map --------------------------------------------------------------------------------------


def _map(groups: Sequence[GroupRow]) -> dict[str, Any]:
    """Blocks by kinds; groups of no single block have rows of their own."""
    pruned = {group.kind for group in groups if group.kept < group.size}
    kinds = [kind for kind in dict.fromkeys(group.kind for group in groups) if kind in pruned]
    rows: dict[str, dict[str, list[GroupRow]]] = {}
    for group in groups:
        if group.kind in pruned:
            label = group.block if group.block is not None else group.name
            rows.setdefault(label, {}).setdefault(group.kind, []).append(group)
    whole: dict[str, int] = {}
    for group in groups:
        if group.kind not in pruned:
            whole[group.kind] = whole.get(group.kind, 0) + 1
    listed = [
        {"label": label, "cells": [[_cell(group) for group in cells.get(kind, ())] for kind in kinds]} for label, cells in rows.items()
    ]
    told = ", ".join(f"{count} {kind}" for kind, count in whole.items())
    return {"kinds": kinds, "rows": listed, "whole": told}


def _cell(group: GroupRow) -> dict[str, Any]:
    share = group.kept / group.size if group.size else 1.0
    colour = SCALE[min(int(share * (len(SCALE) - 1) + 0.5), len(SCALE) - 1)]
    title = f"{group.name}: {group.kept:,} of {group.size:,} kept\n" + "\n".join(group.members)
    return {
        "kept": group.kept,
        "size": group.size,
        "share": share,
        "colour": colour,
        "ink": "#ffffff" if _luminance(colour) < 0.18 else "#000000",
        "title": title,
    }


def _luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# -- shares ---------------------------------------------------------------------------------------


def _shown_shares(of: Sequence[Share]) -> tuple[list[Share], bool]:
    """The places that take most, in the order of the model, and the rest as one; whether times are known."""
    timed = bool(of) and all(one.ms is not None for one in of)
    totals = (sum(one.params[0] for one in of) or 1, sum(one.macs[0] for one in of) or 1, sum(one.ms[0] for one in of if one.ms) or 1.0)

    def weight(one: Share) -> float:
        return max(one.params[0] / totals[0], one.macs[0] / totals[1], one.ms[0] / totals[2] if one.ms else 0.0)

    some = [one for one in of if weight(one) > 0.001]
    shown = set(map(id, sorted(some, key=weight, reverse=True)[:_MOST_SHARES]))
    rest = [one for one in of if id(one) not in shown]
    listed = [one for one in of if id(one) in shown]
    if rest:
        listed.append(
            Share(
                path=f"{sum(one.modules for one in rest):,} smaller ones",
                modules=1,
                params=(sum(one.params[0] for one in rest), sum(one.params[1] for one in rest)),
                macs=(sum(one.macs[0] for one in rest), sum(one.macs[1] for one in rest)),
                ms=(sum(one.ms[0] for one in rest if one.ms), sum(one.ms[1] for one in rest if one.ms)) if timed else None,
            )
        )
    return listed, timed


def _share(share: Share, among: Sequence[Share], timed: bool) -> dict[str, Any]:
    def bar(pair: tuple[float, float], most: float, form: str, unit: str) -> dict[str, Any]:
        before, after = (format(value, form) if form else _short(value) for value in pair)
        scale = 100 / most if most else 0.0
        told = f"{pair[0]:,.4g} to {pair[1]:,.4g}{unit}" if form else f"{pair[0]:,} to {pair[1]:,}{unit}"
        text = f"{before} → {after}{unit}" if any(pair) else "none"
        return {"text": text, "drawn": any(pair), "title": told, "before": pair[0] * scale, "after": pair[1] * scale}

    bars = [bar(share.params, max(max(one.params) for one in among), "", "")]
    if timed and share.ms is not None:
        bars.append(bar(share.ms, max(max(one.ms or (0.0,)) for one in among), ".3g", " ms"))
    else:
        bars.append(bar(share.macs, max(max(one.macs) for one in among), "", ""))
    return {"path": share.path, "modules": share.modules, "bars": bars}


# -- checks and measurements ----------------------------------------------------------------------


def _checks(of: Manifest) -> Iterator[dict[str, Any]]:
    checks, numbers = of.checks, of.checks.numbers
    yield {"label": "shapes are as predicted", "passed": checks.shapes, "found": ""}
    found, passed = "", None
    if numbers is not None and numbers.max_abs_err is not None and numbers.tolerance is not None:
        passed = numbers.max_abs_err <= numbers.tolerance
        found = f"largest difference {numbers.max_abs_err:.2g}, allowed {numbers.tolerance:.2g}"
    elif checks.shapes:
        found = "no weights to compare"
    yield {"label": "numbers equal those of the masked original", "passed": passed, "found": found}
    yield {"label": "inputs and outputs are unchanged", "passed": checks.interface, "found": ""}
    said = of.onnx.model_extra or {} if of.onnx is not None else {}
    error = of.onnx.parity_max_abs_err if of.onnx is not None else None
    found = ""
    if error is not None:
        sizes = [", ".join(f"{label} {size}" for label, size in one.items()) for one in said.get("parity_sizes", []) if one]
        allowed = f", allowed {said['tolerance']:.2g}" if said.get("tolerance") else ""
        found = f"largest difference {error:.2g}{allowed}" + (f"; at {'; '.join(sizes)}" if sizes else "")
    yield {"label": "onnxruntime computes what torch computes", "passed": None if error is None else True, "found": found}


_SPEEDS = {"ideal": "ideal, from the multiply-accumulates", "onnx": "measured in onnxruntime", "torch": "measured in torch"}
_FILES = {"before": "unpruned", "after": "pruned", "int8": "pruned, int8"}


def _speed(said: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for name, value in (said.get("speedup") or {}).items():
        if _number(value):
            interval = said["speedup"].get(f"{name}_interval") or []
            spread = f" ({interval[0]:.2f} to {interval[1]:.2f})" if len(interval) == 2 else ""
            yield {
                "label": _SPEEDS.get(name, name),
                "value": f"{value:.2f} x{spread}",
                "verdict": said["speedup"].get(f"{name}_verdict", ""),
            }


def _points(said: Mapping[str, Any]) -> Iterator[list[str]]:
    """Latency in onnxruntime at each size: where, file, median, 95th percentile, throughput, memory."""
    for point in (said.get("onnx") or {}).get("points") or ():
        sizes = ", ".join(f"{label} {size}" for label, size in point.get("sizes", {}).items())
        where = " ".join(part for part in (point.get("kind", "").replace("call", ""), sizes) if part)
        for file, found in point.get("files", {}).items():
            memory = f"{_short(found['memory_bytes'])}B" if "memory_bytes" in found else ""
            times = [f"{found[name]:,.4g}" for name in ("p50_ms", "p95_ms", "per_second")]
            yield [where, _FILES.get(file, file), *times, memory]


def _losses(said: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Every curve of a loss that a pass noted, at any depth: numbers or pairs by step, or records with a step."""
    out: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, points: list[tuple[float, float]]) -> None:
        if points in out.values():
            return  # the only part of a sum is the sum
        name = name.replace("_", " ")
        out[name if name not in out else f"{name} {sum(key.startswith(name) for key in out) + 1}"] = points

    def visit(value: Any, name: str, near_losses: bool = False) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(inner, str(key), any("loss" in str(other) for other in value))
        elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            if len(value) > 1 and all(_number(one.get("step")) for one in value):
                for key in dict.fromkeys(key for one in value for key in one if "loss" in key):
                    points = [(float(one["step"]), float(one[key])) for one in value if _number(one.get(key))]
                    if len(points) > 1:
                        add(key, points)
            else:
                for one in value:
                    visit(one, name)
        elif isinstance(value, list) and len(value) > 1 and (near_losses or "loss" in name):
            if all(isinstance(one, list) and len(one) == 2 and all(map(_number, one)) for one in value):
                add(name, [(float(x), float(y)) for x, y in value])
            elif "loss" in name and all(map(_number, value)):
                add(name, [(float(step), float(y)) for step, y in enumerate(value, 1)])

    visit({key: value for key, value in said.items() if key not in Manifest.model_fields}, "")
    return out


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _evaluation(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = [{"label": label, "value": f"{value:,.4g}"} for label, value in evaluation_figures(found).items()]
    return {"heading": f"in {found['backend']}", "rows": rows}


def evaluation_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an ``evaluation.json`` by name."""
    out = {f"{name} perplexity": float(one["perplexity"]) for name, one in found["texts"].items()}
    for name, one in found["tasks"].items():
        out[f"{name} acc"] = float(one["acc"])
        if one.get("acc_norm") is not None:
            out[f"{name} acc_norm"] = float(one["acc_norm"])
    average = {name: float(value) for name, value in found.get("average", {}).items() if name != "chance"}
    out.update({f"average {name}": value for name, value in average.items() if len(found["tasks"]) > 1})
    return out


_SHOWN = {*Manifest.model_fields, "torch_eager", "speedup"}
_MOST_EXTRAS = 30


def _extras(said: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What other passes noted, as far as it is plain figures and words."""
    for key, value in said.items():
        if key not in _SHOWN:
            rows = list(_flat(value, "" if isinstance(value, Mapping | list) else key))
            if rows:
                more = len(rows) - _MOST_EXTRAS
                shown = [*rows[:_MOST_EXTRAS], *([("…", f"{more} more in manifest.json")] if more > 0 else [])]
                yield {"title": f"Noted: {key.replace('_', ' ')}", "rows": shown}


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        if len(value) == 2 and all(map(_number, value)):
            yield name, f"{value[0]:.4g} → {value[1]:.4g}"
        elif all(isinstance(one, Mapping) and "step" not in one for one in value):
            for number, one in enumerate(value, 1):
                yield from _flat(one, name if len(value) == 1 else f"{name} {number}".strip())
    elif isinstance(value, bool):
        yield name, "yes" if value else "no"
    elif _number(value):
        yield name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    elif isinstance(value, str) and value:
        yield name, value


# -- what can be loaded ---------------------------------------------------------------------------


def _artefacts(folder: Path, said: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    def one(path: Path, about: str, code: str) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        return {"name": path.name, "size": f"{_short(size)}B", "about": about, "code": code}

    if (path := folder / "model.pt2").is_file():
        yield one(path, "in torch; neither irprune nor the model's source is needed", 'torch.export.load("model.pt2").module()')
    for path in sorted(folder.glob("*.onnx")):
        about = "the unpruned model" if path.stem == "original" else "in onnxruntime, wherever that runs"
        yield one(path, about, f'onnxruntime.InferenceSession("{path.name}")')
    hf = said.get("huggingface")
    if isinstance(hf, Mapping) and (path := folder / str(hf.get("folder"))).is_dir():
        plain = hf.get("layout") == "plain"
        code = f'transformers.{hf.get("model_class", "AutoModel")}.from_pretrained("{path.name}")'
        yield one(path, "in transformers", code if plain else f'irprune.load_pretrained("{path.name}")')
    if (path := folder / "recipe.safetensors").is_file():
        target = said.get("target") or "TARGET"
        yield one(path, "what was kept: repeats the pruning", f"irprune apply recipe.safetensors {target}")


def _pass_text(name: str, options: Mapping[str, Any]) -> str:
    """A pass with the options that it was given, as the pipeline has them."""
    from irprune.pipeline.parser import unparse
    from irprune.pipeline.registry import find

    try:
        return unparse(find(name).model_validate(options))
    except (OptionError, ValueError):
        return name  # a pass of a package that is not installed here, or of another version of it
