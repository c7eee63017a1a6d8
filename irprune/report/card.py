"""The model card of a Hugging Face checkpoint: what was done to the model, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from irprune.pipeline.manifest import Manifest

if TYPE_CHECKING:
    from irprune.backend.hf_export import HfCheckpoint


def model_card(of: HfCheckpoint, manifest: Manifest) -> str:
    """``README.md`` of a checkpoint directory: metadata of the hub, then plain text."""
    return "\n".join(_lines(of, manifest)) + "\n"


def _lines(of: HfCheckpoint, manifest: Manifest) -> Iterator[str]:
    name = manifest.target.removeprefix("hf:")
    yield from ("---", "library_name: transformers", "tags:", "- pruned", "- irprune", "---", "")
    yield from (f"# {name.rstrip('/').rpartition('/')[2] or of.model_class}, pruned", "")
    before, after = manifest.model.before, manifest.model.after
    share = f" ({after.params / before.params:.1%})" if before.params else ""
    yield f"Structurally pruned with irprune {manifest.irprune} from `{name}`: {after.params:,} of {before.params:,} parameters{share}."
    yield "The result is dense and numerically checked; nothing is masked."
    yield from ("", "## Load it", "", "```python")
    if of.layout == "plain":
        yield from (f"from transformers import {of.model_class}", "", f'model = {of.model_class}.from_pretrained("PATH")')
    else:
        yield from ("import irprune", "", f'model = irprune.load_pretrained("PATH")  # a transformers.{of.model_class}')
    yield from ("```", "")
    if of.layout == "plain" and of.changed:
        told = ", ".join(f"`{field}` = {json.dumps(value)}" for field, value in of.changed.items())
        yield from (f"Its configuration differs from the original's in {told}.", "")
    if of.layout != "plain":
        yield from ("Its layers have sizes of their own, which stand in `config.json` under `irprune`.", "")
    yield from ("## What was done", "", "```text", manifest.pipeline, "```", "")
    if manifest.prune is not None:
        asked = ", ".join(f"{key} {value}" for key, value in manifest.prune.requested.items())
        reached = ", ".join(f"{key} {value:.4g}" for key, value in manifest.prune.achieved.items() if key != "ratio")
        yield from (f"Asked: {asked}. Removed, as parts of the original: {reached}.", "")
    yield from ("## What was measured", "", "| | before | after |", "|---|---:|---:|")
    for label, a, b in (
        ("parameters", before.params, after.params),
        ("multiply-accumulates of one call", before.macs, after.macs),
        ("bytes of weights", before.bytes, after.bytes),
    ):
        yield f"| {label} | {a:,} | {b:,} |"
    old, new = manifest.metrics.before or {}, manifest.metrics.after or {}
    for metric, value in new.items():
        yield f"| {metric} | {f'{old[metric]:.6g}' if metric in old else ''} | {value:.6g} |"
    yield ""
    if not new:
        yield from ("The quality of the pruned model was not measured in this run.", "")
    yield f"The outputs of this directory, loaded again, differ from the pruned program's by at most {of.max_abs_err:.2g}."
    if manifest.checks.numbers is not None and manifest.checks.numbers.max_abs_err is not None:
        yield f"The pruned program differs from the masked original by at most {manifest.checks.numbers.max_abs_err:.2g}."
    for note in of.notes:
        yield f"Note: {note}."
    yield from ("", f"Written with torch {manifest.torch} and transformers {_version()}.")


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")
