"""The passes ``export`` and ``validate``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from irprune_passes.export import Export
from irprune_passes.validate import Validate, Validation
from onnx import numpy_helper
from torch.onnx._internal.exporter._registration import ONNXRegistry

from irprune.backend import runtime
from irprune.backend.onnx import OnnxFile
from irprune.errors import DataError, OptionError, OutputError, ParityError, PipelineError, SpeedError, TargetError
from irprune.ir.facts import Fact, Original, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.instruments import fingerprint
from irprune.pipeline.manager import run
from irprune.pipeline.manifest import Onnx, noted
from irprune.pipeline.parser import parse
from irprune.pipeline.passes import Facts
from tests.backend.onnx_toys import cnn, llama

QUICK = "rounds=5 seconds=0.1 threads=1 memory=false"


@pytest.fixture(scope="module", autouse=True)
def _translations_read_once() -> Iterator[None]:
    """The exporter parses its five hundred translations anew for every file, which takes most of a test's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


def evaluate(predict: Any) -> dict[str, float]:
    """Something that depends on weights, called with another batch size than the example's."""
    generator = torch.Generator().manual_seed(0)
    scores = predict(torch.randn(5, 3, 12, 12, generator=generator))
    return {"spread": scores.std(), "batch": len(scores)}


def pipeline(text: str, program: Program, folder: Path, task: Task | None = None) -> tuple[Program, Facts]:
    known: list[Fact] = [Workspace(folder), Original(program)]
    return run(parse(text), program, [*known, task] if task is not None else known)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Facts]:
    folder = tmp_path_factory.mktemp("run")
    text = f"discover,score{{criterion=magnitude}},prune{{ratio=0.4}},export,validate{{{QUICK}}}"
    return pipeline(text, cnn(), folder, Task("toy", evaluate=evaluate))


def validated(pruned: tuple[Program, Facts], options: str, *facts: Fact) -> Validation:
    """``validate`` alone on the pruned program, without the original."""
    program, known = pruned
    before = fingerprint(program)
    chosen = {type(fact): fact for fact in (known[Workspace], known[OnnxFile], *facts)}
    _, after = run(parse(f"validate{{{QUICK} {options}}}"), program, chosen.values())
    assert fingerprint(program) == before
    return after[Validation]


def test_the_manifest_says_before_and_after(pruned: tuple[Program, Facts]) -> None:
    program, facts = pruned
    found = noted(facts)
    part = found["onnx"]
    assert Onnx.model_validate(part).parity_max_abs_err == part["parity_max_abs_err"]
    assert 0 <= part["parity_max_abs_err"] <= part["tolerance"] < 1e-2
    assert part["parity_sizes"] == [{"batch": 2}, {"batch": 3}, {"batch": 1}]
    assert part["file"] == "model.onnx"
    assert part["file_bytes"]["after"] == part["size_bytes"] == (facts[Workspace].path / "model.onnx").stat().st_size
    assert part["file_bytes"]["before"] > part["file_bytes"]["after"]
    for times in (part, found["torch_eager"]):
        assert set(times["latency_ms"]) == set(times["latency_iqr_ms"]) == {"before", "after"}
        assert times["latency_rounds"] == {"before": 5, "after": 5}
        assert min(times["latency_ms"].values()) > 0
    widths = {name: tensor.shape[0] for name, tensor in program.tensors.items() if name in ("0.weight", "3.weight")}
    first, second = widths["0.weight"], widths["3.weight"]
    macs = {"before": 144 * 27 * 16 + 100 * 144 * 8 + 80, "after": 144 * 27 * first + 100 * 9 * first * second + second * 10}
    assert found["speedup"]["ideal"] == pytest.approx(macs["before"] / macs["after"])
    low, high = found["speedup"]["onnx_interval"]
    assert low <= found["speedup"]["onnx"] <= high


def test_evaluate_runs_on_both_files(pruned: tuple[Program, Facts]) -> None:
    program, facts = pruned
    with torch.no_grad():
        expected = {"before": evaluate(cnn()), "after": evaluate(program)}
    assert expected["before"]["spread"] != pytest.approx(float(expected["after"]["spread"]), rel=1e-3)
    for when, values in noted(facts)["metrics"].items():
        assert values == {"spread": pytest.approx(float(expected[when]["spread"]), rel=1e-4), "batch": 5.0}
        assert all(type(value) is float for value in values.values())


def test_the_original_leaves_nothing_behind(pruned: tuple[Program, Facts]) -> None:
    assert [path.name for path in pruned[1][Workspace].path.iterdir()] == ["model.onnx"]


def test_the_original_can_be_kept(pruned: tuple[Program, Facts], tmp_path: Path) -> None:
    found = validated(pruned, "keep_original=true", Original(cnn()), Workspace(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["original.onnx"]
    assert found.file_bytes["before"] == (tmp_path / "original.onnx").stat().st_size


@pytest.mark.parametrize("options", ["baseline=false", ""])
def test_without_a_baseline_only_the_result_is_measured(pruned: tuple[Program, Facts], options: str) -> None:
    original = Original(cnn() if options else pruned[0])
    found = validated(pruned, options, original, Task("toy", evaluate=evaluate)).manifest()
    assert set(found["onnx"]["latency_ms"]) == set(found["onnx"]["file_bytes"]) == set(found["metrics"]) == {"after"}
    assert found["speedup"] == {}


def test_options_reach_parity(pruned: tuple[Program, Facts]) -> None:
    found = validated(pruned, "batch=[4,6] tolerance=1e-3 evaluate=false", Task("toy", evaluate=evaluate))
    assert found.parity.sizes == ({"batch": 4}, {"batch": 6})
    assert found.parity.tolerance == pytest.approx(validated(pruned, "batch=[4,6]").parity.tolerance * 10)
    assert found.metrics == {}


def test_measured_rounding_is_allowed_unless_a_tolerance_is_given(pruned: tuple[Program, Facts], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that rounds much itself passes by default; whoever names a tolerance gets that one."""
    monkeypatch.setattr(runtime, "RELATIVE_TOLERANCE", {torch.float32: 1e-12})
    monkeypatch.setattr(runtime, "_rounding", lambda *_: 0.5)
    assert validated(pruned, "").parity.tolerance == 0.5 * runtime.ROUNDINGS
    with pytest.raises(ParityError, match="onnxruntime differs from torch"):
        validated(pruned, "tolerance=1e-12")


def test_a_corrupted_file_fails_the_run(pruned: tuple[Program, Facts], tmp_path: Path) -> None:
    _, facts = pruned
    model = onnx.load(facts[OnnxFile].path)
    weight = next(each for each in model.graph.initializer if each.name == "3.weight")
    value = numpy_helper.to_array(weight).copy()
    value[0, 0, 0, 0] += 0.5
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    corrupted = OnnxFile(tmp_path / "model.onnx", 20, {}, {}, 0)
    with pytest.raises(ParityError) as caught:
        validated(pruned, "", corrupted)
    assert str(caught.value).startswith("[parity] at output output0, batch = 2: onnxruntime differs from torch by ")
    assert "do not use this file" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_file_of_another_program_fails_the_run(pruned: tuple[Program, Facts]) -> None:
    with pytest.raises(ParityError):
        run(parse(f"validate{{{QUICK}}}"), cnn(), [pruned[1][Workspace], pruned[1][OnnxFile]])


def broken(predict: Any) -> dict[str, float]:
    raise KeyError("accuracy")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (broken, TargetError, "evaluate() fails with KeyError: 'accuracy'"),
        (lambda predict: 0.9, TargetError, "evaluate() gives 0.9, not a dictionary of numbers by name"),
        (lambda predict: {"accuracy": "good"}, TargetError, "evaluate() gives {'accuracy': 'good'}, not a dictionary of numbers by name"),
        (lambda predict: predict(torch.ones(1)), DataError, "onnxruntime cannot run the model on input_1 float[1]"),
    ],
)
def test_an_evaluate_that_does_not_work(pruned: tuple[Program, Facts], function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        validated(pruned, "", Task("toy", evaluate=function))
    assert message in str(caught.value)


def test_where_evaluate_fails(pruned: tuple[Program, Facts]) -> None:
    with pytest.raises(TargetError) as caught:
        validated(pruned, "", Task("toy", evaluate=broken))
    assert caught.value.where == f"{__file__}:{broken.__code__.co_firstlineno + 1}"
    assert isinstance(caught.value.__cause__, KeyError)


def test_validate_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="OnnxFile"):
        pipeline("validate", cnn(), tmp_path)


def test_a_run_directory_that_cannot_be_written(pruned: tuple[Program, Facts], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        pipeline("export", cnn(), tmp_path / "file")
    with pytest.raises(OutputError):
        validated(pruned, "", Original(cnn()), Workspace(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_external_data_is_an_option(tmp_path: Path) -> None:
    _, facts = pipeline("export{external_data=true file=small.onnx}", cnn(), tmp_path)
    assert facts[OnnxFile].external == ("small.onnx.data",)
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.onnx.data"}


@pytest.mark.parametrize(
    "text",
    [
        "export{opset=17}",
        "export{opset=99}",
        "export{external_data=perhaps}",
        "export{file=a/b.onnx}",
        "validate{rounds=1}",
        "validate{batch=[0]}",
    ],
)
def test_options_out_of_range(text: str) -> None:
    with pytest.raises(OptionError):
        parse(text)


@pytest.mark.parametrize("text", ["export{external_data=true}", "export{external_data=auto}", "validate{batch=[1,3] baseline=false}"])
def test_options_survive_their_text_form(text: str) -> None:
    (one,) = parse(text)
    assert parse(str(one)) == parse(text)
    assert isinstance(one, Export | Validate)


def llama_perplexity(predict: Any) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (3, 12), generator=generator)
    logits = predict(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return {"perplexity": float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())}


def test_a_language_model(tmp_path: Path) -> None:
    text = f"discover,score{{criterion=magnitude}},prune{{ratio=0.2}},export,validate{{{QUICK}}}"
    program, facts = pipeline(text, llama(), tmp_path, Task("toy", evaluate=llama_perplexity))
    found: Mapping[str, Any] = facts[Validation].manifest()
    assert found["onnx"]["parity_sizes"] == [{"batch": 2, "sequence": 10}, {"batch": 3, "sequence": 11}, {"batch": 1, "sequence": 10}]
    assert found["metrics"]["after"] == pytest.approx(llama_perplexity(torch.no_grad()(program)), rel=1e-4)
    assert found["metrics"]["before"] == pytest.approx(llama_perplexity(torch.no_grad()(llama())), rel=1e-4)
    assert found["speedup"]["ideal"] > 1.05
    names = {each.name.removesuffix(".T"): each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    gate = np.array(names["model.layers.0.mlp.gate_proj.weight"].dims)
    assert sorted(gate) == sorted(program.tensors["model.layers.0.mlp.gate_proj.weight"].shape)


def test_a_required_speedup_is_a_gate(tmp_path: Path) -> None:
    text = f"prune{{ratio=0.4}},export{{quantise=int8}},validate{{{QUICK} batch_sizes=[1,2] require_speedup=%g}}"
    with pytest.raises(SpeedError) as caught:
        pipeline(text % 1000, cnn(), tmp_path)
    assert "a speed-up of 1000 is required, and the file is " in str(caught.value)
    assert caught.value.where == "onnxruntime, call at batch 1"
    _, facts = pipeline(text % 1e-3, cnn(), tmp_path)
    found = facts[Validation].manifest()
    assert [point["sizes"] for point in found["onnx"]["points"]] == [{"batch": 1}, {"batch": 2}]
    assert set(found["onnx"]["file_bytes"]) == {"before", "after", "int8"}
    assert found["speedup"]["onnx_verdict"].split(" (")[0].startswith(("faster by", "slower by", "not faster"))
    assert (tmp_path / "model.int8.onnx").is_file()


def test_a_speedup_over_nothing_cannot_be_required(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="nothing was pruned"):
        pipeline(f"export,validate{{{QUICK} require_speedup=1}}", cnn(), tmp_path)


def test_half_precision_agrees_at_its_own_tolerance(tmp_path: Path) -> None:
    _, facts = pipeline(
        f"prune{{ratio=0.4}},export{{precision=float16}},validate{{{QUICK.removesuffix(' memory=false')}}}", cnn(), tmp_path
    )
    found = facts[Validation]
    assert 1e-6 < found.parity.max_abs_err < found.parity.tolerance
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert {each.data_type for each in weights if len(each.dims) > 1} == {onnx.TensorProto.FLOAT16}
    assert all(0 < size < 2**30 for size in found.points[0].memory_bytes.values())
