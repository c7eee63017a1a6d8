"""`irprune eval` as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import PLACES
from typer.testing import CliRunner, Result

from irprune import api
from irprune.cli import app
from irprune.errors import DataError, OptionError, TargetError
from irprune.evaluate import Predictor, evaluation, read_text, tokenised
from irprune.evaluate.renumbered import Renumbered
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


def test_what_a_line_is_as_a_sample(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("  a cat sat  \n" * 40)
    count = {}
    for samples in ("lines", "stripped"):
        result = call("eval", f"hf:{checkpoint}", "--text", text, "--window", 16, "--samples", samples, "--json")
        assert result.exit_code == 0, result.output
        count[samples] = json.loads(result.stdout)["texts"]["text"]["windows"]
        assert count[samples] == len(tokenised(tokenizer, read_text(text, samples))) // 16
    assert count["lines"] > count["stripped"]
    assert call("eval", f"hf:{checkpoint}", "--text", text, "--samples", "words").exit_code == 2


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


# -- a vocabulary that was cut ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed(checkpoint: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps the tokens of the text, every second of which has another number then."""
    folder = tmp_path_factory.mktemp("trimmed")
    used = transformers.AutoTokenizer.from_pretrained(checkpoint)(words.read_text())["input_ids"]
    (folder / "ids.json").write_text(json.dumps(sorted(set(used))))
    api.run(f"hf:{checkpoint}", f"trim{{vocabulary={folder / 'ids.json'}}},export", out=folder / "out")
    return folder / "out"


@pytest.mark.parametrize("target", ["torch", "onnx", "file"])
def test_a_cut_vocabulary_is_measured_in_its_own_ids(checkpoint: Path, trimmed: Path, words: Path, target: str) -> None:
    kept = json.loads((trimmed / "vocabulary.json").read_text())["kept"]
    assert kept != list(range(len(kept)))
    place, backend = (trimmed / "model.onnx", "auto") if target == "file" else (trimmed, target)
    have = api.evaluate(place, texts={"w": words}, window=16, windows=4, backend=backend).texts["w"]
    # Over the kept tokens alone the probabilities of the whole model are larger, all by the same rule.
    ids = tokenised(transformers.AutoTokenizer.from_pretrained(checkpoint), read_text(words))[:64].reshape(4, 16)
    logits = Predictor.of(api.load(f"hf:{checkpoint}")[0])(ids)[..., kept]
    wanted = torch.tensor([kept.index(token) for token in ids[:, 1:].flatten().tolist()])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted)
    assert have.loss == pytest.approx(float(loss), rel=1e-4)


def test_a_tokenizer_made_for_the_kept_tokens_is_taken_as_it_is(trimmed: Path, words: Path, tokenizer: Any) -> None:
    kept = json.loads((trimmed / "vocabulary.json").read_text())["kept"]

    class Own(Renumbered):
        def __len__(self) -> int:
            return len(kept)

    given = {"texts": {"w": words}, "window": 16, "windows": 2}
    assert api.evaluate(trimmed, tokenizer=Own(tokenizer, kept), **given).texts == api.evaluate(trimmed, **given).texts


def test_a_removed_token_is_named(trimmed: Path, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "other.txt").write_text("^ and ^ and ~")
    said = rf"3 of the 8 tokens of .* by trim, 2 different ones; the first is '\^' \(id {tokenizer.convert_tokens_to_ids('^')}\)"
    with pytest.raises(DataError, match=said) as caught:
        api.evaluate(trimmed, texts={"w": tmp_path / "other.txt"}, window=2)
    assert caught.value.hint == "keep it in trim's `vocabulary`, or measure on text of kept tokens"
    pytest.importorskip("lm_eval", reason="SKIPPED: zero-shot accuracy needs irprune[eval]")
    (tmp_path / "task.jsonl").write_text('{"query": "The sky is", "choices": ["blue", "^"], "gold": 0}\n')
    with pytest.raises(DataError, match="1 of the"):
        api.evaluate(trimmed, tasks={"t": tmp_path / "task.jsonl"})


def test_a_run_without_its_map_is_refused(trimmed: Path, words: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text((trimmed / "manifest.json").read_text())
    with pytest.raises(DataError, match="the kept tokens cannot be read"):
        api.evaluate(tmp_path, texts={"w": words})
    (tmp_path / "vocabulary.json").write_text('{"kept": [1, 2]}')
    with pytest.raises(DataError, match="the file has 2 tokens, the manifest"):
        api.evaluate(tmp_path, texts={"w": words})


# -- rows that are too long ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_windows_beyond_a_table_of_positions_are_refused(with_places: Path, words: Path, tmp_path: Path, backend: str) -> None:
    api.run(f"hf:{with_places}", "trim{positions=20},export", out=tmp_path / "out", sequence=16)
    for target, most in ((f"hf:{with_places}", PLACES), (tmp_path / "out", 20)):
        with pytest.raises(OptionError, match=f"a window has 128 tokens, the model reads {most} at most") as caught:
            api.evaluate(target, texts={"w": words}, backend=backend)
        assert (caught.value.where, caught.value.hint) == ("--window", f"give {most} or less")
        assert api.evaluate(target, texts={"w": words}, backend=backend, window=most, windows=2).texts["w"].windows == 2


def test_positions_that_are_computed_have_no_end(checkpoint: Path, words: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.max_position_embeddings = 16
    torch.manual_seed(0)
    program = api.trace(
        transformers.LlamaForCausalLM(config).eval(),
        (),
        {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "use_cache": False, "return_dict": False},
        {"input_ids": {0: "batch", 1: "sequence"}},
    )
    assert api.evaluate(program, texts={"w": words}, window=64, windows=1, tokenizer=checkpoint).texts["w"].window == 64


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_contexts_lose_their_beginning_before_a_table_of_positions(with_places: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip("lm_eval", reason="SKIPPED: zero-shot accuracy needs irprune[eval]")
    end = "the grey cat sat on the wall and watched the boats"
    for name, query in (("long", f"Once upon a time, before all this came to pass, {end}"), ("short", end[10:])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": query, "choices": ["come in", "go"], "gold": 0}) + "\n")
    found = api.evaluate(f"hf:{with_places}", tasks_dir=tmp_path, backend=backend).tasks
    assert {name: one.documents for name, one in found.items()} == {"long": 1, "short": 1}


def test_a_token_that_the_model_does_not_have_is_named(program: Program) -> None:
    predict = Predictor.of(program)
    with pytest.raises(DataError, match="the model fails on token 300: IndexError"):
        predict.reach(torch.tensor([1, 2, 300, 4]))
    assert predict.reach(torch.tensor([1, 2, 299, 4])) == 4


# -- weights that are not in memory -------------------------------------------------------------------


def test_weights_that_stay_in_their_files(checkpoint: Path, words: Path) -> None:
    given = {"texts": {"w": words}, "window": 16, "windows": 3}
    lazy, whole = (api.evaluate(f"hf:{checkpoint}", **given, **options).texts["w"] for options in ({"lazy": True}, {}))
    assert lazy.loss == pytest.approx(whole.loss, rel=1e-6)
    with pytest.raises(OptionError, match="an ONNX file needs the weights in memory"):
        api.evaluate(f"hf:{checkpoint}", **given, backend="onnx", lazy=True)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_model_without_weights_is_refused(checkpoint: Path, words: Path, backend: str) -> None:
    with pytest.raises(TargetError, match="has no weights") as caught:
        api.evaluate(f"hf:{checkpoint}", texts={"w": words}, backend=backend, meta=True)
    assert caught.value.hint == "leave out meta=true"
