"""`irprune eval` as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from irprune import api
from irprune.cli import app
from irprune.errors import DataError
from irprune.evaluate import evaluation
from irprune.ir.program import Program


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_checkpoint_and_a_run_in_both_backends(checkpoint: Path, run: Path, words: Path, backend: str) -> None:
    for target in (f"hf:{checkpoint}", run):
        result = call("eval", target, "--text", words, "--window", 16, "--windows", 4, "--backend", backend, "--json")
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert said["backend"] == backend
        assert said["texts"]["words"]["tokens"] == 60
        want = api.evaluate(str(target), texts={"words": words}, window=16, windows=4, backend="torch").texts["words"]
        assert said["texts"]["words"]["loss"] == pytest.approx(want.loss, rel=1e-5)


def test_pruning_shows(checkpoint: Path, run: Path, words: Path) -> None:
    before, after = (api.evaluate(target, texts={"w": words}, windows=4).texts["w"].loss for target in (f"hf:{checkpoint}", run))
    assert abs(before - after) > 1e-2


def test_an_onnx_file_and_a_program_with_a_tokenizer_of_their_own(checkpoint: Path, run: Path, program: Program, words: Path) -> None:
    file = api.evaluate(run / "model.onnx", texts={"w": words}, windows=2, tokenizer=checkpoint)
    assert file.texts == api.evaluate(run, texts={"w": words}, windows=2, backend="onnx").texts
    dense = api.evaluate(program, texts={"w": words}, windows=2, tokenizer=checkpoint)
    assert dense.texts == api.evaluate(f"hf:{checkpoint}", texts={"w": words}, windows=2).texts


def test_a_file_with_a_cache_has_the_perplexity_of_its_program(checkpoint: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.run(f"hf:{checkpoint}", "prune{ratio=0.2 round_to=1},export{cache=true quantise=int8}", out=out)
    given = {"texts": {"w": words}, "window": 16, "windows": 5, "batch": 2}
    wanted = api.evaluate(out, backend="torch", **given).texts["w"]
    assert wanted.tokens == 75
    # The last call holds one window, so the batch of the empty cache follows that of the tokens.
    for target, backend in ((out, "onnx"), (out / "model.onnx", "auto")):
        assert api.evaluate(target, backend=backend, **given).texts["w"].loss == pytest.approx(wanted.loss, rel=1e-5)
    assert api.evaluate(out / "model.int8.onnx", **given).texts["w"].loss == pytest.approx(wanted.loss, rel=0.05)


def test_the_table(checkpoint: Path, words: Path) -> None:
    result = call("eval", f"hf:{checkpoint}", "--text", f"mine={words}", "--windows", 3)
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == ["perplexity", "measured", "on"]
    assert lines[2][0] == "mine"
    assert lines[2][2:] == ["3", "x", "128", "tokens"]
    assert lines[-1] == ["in", "torch", "on", "cpu"]


def test_an_evaluation_is_saved_in_its_run(run: Path, words: Path) -> None:
    assert evaluation.read(run) is None
    result = call("eval", run, "--text", words, "--windows", 2, "--save", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    said = evaluation.read(run)
    assert said is not None
    assert said["texts"]["words"]["windows"] == 2
    (run / evaluation.NAME).write_text("[]")
    with pytest.raises(DataError, match="the file is no evaluation"):
        evaluation.read(run)
    (run / evaluation.NAME).unlink()


def test_bad_input_is_refused_before_the_model_is_loaded(checkpoint: Path, run: Path, words: Path, tmp_path: Path) -> None:
    target = f"hf:{checkpoint}"
    cases = {
        "nothing to evaluate on": [target],
        "window is 1": [target, "--text", words, "--window", 1],
        "limit is 0": [target, "--text", words, "--limit", 0],
        "there is no backend 'tf'": [target, "--text", words, "--backend", "tf"],
        "two texts are named 'words'": [target, "--text", words, "--text", words],
        "only the evaluation of a run directory": [target, "--text", words, "--save"],
        "the target has no tokenizer": ["model.py", "--text", words],
        "the manifest cannot be read": [tmp_path, "--text", words],
        "runs in onnxruntime only": [run / "model.onnx", "--text", words, "--tokenizer", checkpoint, "--backend", "torch"],
        "there is no tokenizer": [target, "--text", words, "--tokenizer", tmp_path],
        "which is no window of 99999": [target, "--text", words, "--window", 99999],
    }
    for said, arguments in cases.items():
        result = call("eval", *arguments)
        assert result.exit_code == 2, said
        assert said in result.stderr


def test_stories260k_has_the_perplexity_that_transformers_gives(tmp_path: Path) -> None:
    shared = Path(os.environ.get("IRPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
    folder, source = shared / "data" / "stories260k", shared / "data" / "wikitext2" / "test.txt"
    if not folder.is_dir() or not source.is_file():
        pytest.skip(f"SKIPPED: no stories260k and wikitext2 in {shared}; set IRPRUNE_SHARED")
    import torch
    import transformers

    from irprune.evaluate import read_text

    text = tmp_path / "text.txt"
    text.write_text(source.read_text()[:20_000])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(read_text(text), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: 8 * 128].reshape(8, 128)
    with torch.no_grad():
        want = float(model(rows, labels=rows).loss)
    found = api.evaluate(f"hf:{folder}", texts={"wikitext2": text}, windows=8).texts["wikitext2"]
    assert found.loss == pytest.approx(want, rel=1e-5)
