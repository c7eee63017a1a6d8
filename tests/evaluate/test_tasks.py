"""Task files, likelihoods of continuations, and what lm-eval makes of them."""

from __future__ import annotations

import bz2
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from irprune.errors import DataError, OptionError
from irprune.evaluate import Predictor
from irprune.evaluate.tasks import Accuracy, accuracy, averages, documents, likelihoods, named, prompt
from irprune.ir.program import Program

CHOICES = [
    {"query": "Question: What is wet?\n", "choices": ["Water", "A stone in the sun"], "gold": 0},
    {"query": "The sky is", "choices": ["blue", "made of old cheese"], "gold": 1},
    {"query": "Question: Which one?", "choices": ["a", "b", "c"], "gold": 2},
]
SCHEMA = [
    {"context_options": ["Ann thanked Bea as Ann", "Ann thanked Bea as Bea"], "continuation": "had helped.", "gold": 1},
    {"context_options": ["The cup broke as the cup", "The cup broke as the floor"], "continuation": "was thin.", "gold": 0},
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# -- files ----------------------------------------------------------------------------------------


def test_the_forms_of_files(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", CHOICES)) == CHOICES
    assert documents(write(tmp_path / "b.jsonl", SCHEMA)) == SCHEMA
    six = "A man sits. he\n3\nflies.\nsings.\nreads.\nstands up.\n"
    (tmp_path / "c.txt").write_text(six)
    (tmp_path / "d.txt.bz2").write_bytes(bz2.compress(six.encode()))
    want = [{"query": "A man sits. he", "choices": ["flies.", "sings.", "reads.", "stands up."], "gold": 3}]
    assert documents(tmp_path / "c.txt") == documents(tmp_path / "d.txt.bz2") == want


@pytest.mark.parametrize(
    ("name", "content", "where", "said"),
    [
        ("a.jsonl", "{", ":1", "not JSON"),
        ("a.jsonl", '{"query": "q", "choices": ["a"], "gold": 0}', ":1", "known form"),
        ("a.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 2}', ":1", "known form"),
        ("a.jsonl", json.dumps(CHOICES[0]) + '\n{"context": "c", "continuation": "d"}', ":2", "known form"),
        ("a.jsonl", json.dumps(CHOICES[0]) + "\n" + json.dumps(SCHEMA[0]), "", "more than one form"),
        ("a.jsonl", "\n", "", "no documents"),
        ("a.txt", "context\n4\na\nb\nc\nd\n", ":1", "six lines"),
        ("a.txt", "context\n1\na\nb\nc\nd\nanother\n", ":7", "six lines"),
        ("a.txt.bz2", "not packed", "", "cannot be read"),
        ("a.jsonl", None, "", "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str | None, where: str, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        documents(tmp_path / name)
    assert caught.value.where == f"{tmp_path / name}{where}"


def test_tasks_by_name(tmp_path: Path) -> None:
    piqa, boolq = write(tmp_path / "piqa.jsonl", CHOICES), write(tmp_path / "boolq.jsonl", CHOICES)
    (tmp_path / "README.md").write_text("")
    assert named([], tmp_path) == {"boolq": boolq, "piqa": piqa}
    assert named(["piqa"], tmp_path) == {"piqa": piqa}
    assert named(["mine=x/y.jsonl", "boolq"], tmp_path) == {"mine": Path("x/y.jsonl"), "boolq": boolq}
    assert named([], None) == {}
    with pytest.raises(OptionError, match="the task 'arc' has no file"):
        named(["arc"], tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        named([], tmp_path / "nowhere")


def test_questions_ask_for_an_answer() -> None:
    assert prompt("Question: What is wet?\n") == "Question: What is wet?\nAnswer:"
    assert prompt("Passage: a\nQuestion: b?") == "Passage: a\nQuestion: b?\nAnswer:"
    assert prompt("Question: b?\nAnswer:") == "Question: b?\nAnswer:"
    assert prompt("The sky is ") == "The sky is"


# -- likelihoods ----------------------------------------------------------------------------------


def next_number(ids: torch.Tensor) -> torch.Tensor:
    likely = torch.nn.functional.one_hot((ids + 1) % 8, 8).bool()
    return torch.where(likely, 0.5, 0.5 / 7).log()


@pytest.mark.parametrize("batch_tokens", [1, 6, 100])
def test_likelihoods_by_hand(batch_tokens: int) -> None:
    pairs = [([0, 1], [2, 3]), ([4], [4]), ([0, 1, 2], [3, 3]), ([5], [6])]
    right, wrong = math.log(0.5), math.log(0.5 / 7)
    want = [(2 * right, True), (wrong, False), (right + wrong, False), (right, True)]
    have = likelihoods(next_number, pairs, batch_tokens=batch_tokens)
    assert [greedy for _, greedy in have] == [greedy for _, greedy in want]
    assert [value for value, _ in have] == pytest.approx([value for value, _ in want], rel=1e-6)


def test_a_context_loses_its_beginning_where_the_model_reads_less() -> None:
    seen: list[list[int]] = []

    def predict(ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return next_number(ids)

    likelihoods(predict, [([0, 1, 2, 3, 4], [5, 6])], longest=3)
    assert seen == [[3, 4, 5]]


def test_a_row_is_asked_once_and_beside_rows_of_its_length() -> None:
    seen: list[tuple[int, ...]] = []

    def predict(ids: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return next_number(ids)

    long, short = [0, 1, 2, 3, 4, 5, 6, 7], [3, 4]
    have = likelihoods(predict, [(long, [0]), (short, [5]), (long, [1]), (long[1:], [0]), (short, [6, 7])])
    assert seen == [(2, 8), (1, 3), (1, 2)]  # 7 of 8 tokens go along, 3 of 8 do not
    assert [greedy for _, greedy in have] == [True, True, False, True, False]


def test_likelihoods_are_those_of_the_model(program: Program, tokenizer: Any) -> None:
    pairs = [
        (tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]) for a, b in (("The sky is", " blue"), ("A longer text about", " a dog"))
    ]
    have = likelihoods(Predictor.of(program), pairs)
    for (context, continuation), (value, _) in zip(pairs, have, strict=True):
        ids = torch.tensor([context + continuation])
        logits = Predictor.of(program)(ids)[0].log_softmax(-1)
        want = sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(continuation))
        assert value == pytest.approx(want, abs=1e-4)


def test_averages() -> None:
    tasks = {"a": Accuracy(0.5, 0.75, 0.1, 4, 0.5), "b": Accuracy(0.25, None, 0.1, 4, 0.25)}
    assert averages(tasks) == {"acc": 0.375, "acc_norm": 0.5, "chance": 0.375}
    assert averages({}) == {}


# -- lm-eval --------------------------------------------------------------------------------------


def test_without_lm_eval_the_way_to_it_is_said(program: Program, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match="lm-eval, which is not installed") as caught:
        accuracy(Predictor.of(program), tokenizer, {"a": CHOICES})
    assert caught.value.hint == "install it with `pip install 'irprune[eval]'`"


def best(predict: Predictor, tokenizer: Any, pairs: list[tuple[str, str]], *, by_length: bool = False) -> int:
    """The likeliest of some continuations, each asked alone."""
    scores = []
    for context, text in pairs:
        whole, before = tokenizer(context + " " + text)["input_ids"], tokenizer(context)["input_ids"]
        ((score, _),) = likelihoods(predict, [(before, whole[len(before) :])])
        scores.append(score / len(text) if by_length else score)
    return max(range(len(scores)), key=scores.__getitem__)


def test_accuracy_with_lm_eval(program: Program, run: Path, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="SKIPPED: zero-shot accuracy needs irprune[eval]")
    predict = Predictor.of(program)
    found = accuracy(predict, tokenizer, {"choices": CHOICES, "schema": SCHEMA})
    asked = [[(prompt(one["query"]), choice) for choice in one["choices"]] for one in CHOICES]
    acc = [best(predict, tokenizer, pairs) == one["gold"] for pairs, one in zip(asked, CHOICES, strict=True)]
    norm = [best(predict, tokenizer, pairs, by_length=True) == one["gold"] for pairs, one in zip(asked, CHOICES, strict=True)]
    after = [best(predict, tokenizer, [(c, one["continuation"]) for c in one["context_options"]]) == one["gold"] for one in SCHEMA]
    assert found["choices"].acc == pytest.approx(sum(acc) / 3)
    assert found["choices"].acc_norm == pytest.approx(sum(norm) / 3)
    assert found["choices"].documents == 3
    assert [found[name].chance for name in ("choices", "schema")] == pytest.approx([(1 / 2 + 1 / 2 + 1 / 3) / 3, 0.5])
    assert (found["schema"].acc, found["schema"].acc_norm) == (pytest.approx(sum(after) / 2), None)
    tasks = {"choices": CHOICES, "schema": SCHEMA}
    pruned = [accuracy(each, tokenizer, tasks) for each in (Predictor.archive(run / "model.pt2"), Predictor.onnx(run / "model.onnx"))]
    assert pruned[0] == pruned[1]
    one = accuracy(predict, tokenizer, {"choices": CHOICES}, limit=1)["choices"]
    assert (one.documents, one.acc, one.stderr) == (1, float(acc[0]), None)
