"""``make demo-llm``: the pipeline of the Makefile on the example, trained for a moment only."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from irprune import api

ROOT = Path(__file__).parents[1]


def test_the_pipeline_runs_and_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The exporter parses its translations anew for every file, which takes most of a test's time.
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
    source = (ROOT / "examples" / "tiny_llama.py").read_text()
    assert source.count('num_hidden_layers": 4') == 1
    source = source.replace('num_hidden_layers": 4', 'num_hidden_layers": 1')
    for name, value in {"STEPS": 4, "BATCHES": 4, "BATCH": 2, "LENGTH": 24, "WORDS": 3}.items():
        source, count = re.subn(rf"^{name} = \d+$", f"{name} = {value}", source, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "tiny_llama.py").write_text(source)
    (pipeline,) = re.findall(r"^LLM := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    pipeline = pipeline.replace("batches=8", "batches=2").replace("seconds=2", "seconds=0.1 rounds=5")
    done = api.run(tmp_path / "tiny_llama.py", pipeline, out=tmp_path / "run")
    assert [line[:15] for line in capsys.readouterr().out.splitlines()] == ["· The following"] * 2
    assert done.manifest.metrics.before is not None
    assert done.manifest.metrics.after is not None
    assert done.manifest.model.after.params < 0.76 * done.manifest.model.before.params
    assert done.manifest.checks.shapes
    assert not any("lora_" in name for name in done.program.tensors)
    assert (tmp_path / "run" / "model.onnx").is_file()
