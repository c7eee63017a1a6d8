"""The protocol, on predictors whose loss is known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from irprune.errors import DataError, OptionError
from irprune.evaluate import perplexity, read_text

VOCAB = 8


def next_number(ids: torch.Tensor) -> torch.Tensor:
    """Half of the probability on the token after the current one, the rest evenly on the others."""
    likely = torch.nn.functional.one_hot((ids + 1) % VOCAB, VOCAB).bool()
    return torch.where(likely, 0.5, 0.5 / (VOCAB - 1)).log()


def test_a_uniform_model_has_the_size_of_its_vocabulary_as_perplexity() -> None:
    found = perplexity(lambda ids: torch.zeros(*ids.shape, VOCAB), torch.arange(64) % VOCAB, 16)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert (found.windows, found.window, found.tokens) == (4, 16, 60)


def test_the_first_token_of_a_window_is_not_predicted() -> None:
    # 0 1 2 | 5 6 7: within windows each token follows; from 2 to 5 it does not, which does not count.
    found = perplexity(next_number, torch.tensor([0, 1, 2, 5, 6, 7]), 3)
    assert found.perplexity == pytest.approx(2, rel=1e-6)


def test_the_mean_is_over_tokens() -> None:
    # Windows 0 1 2 (both right) and 0 0 0 (both wrong).
    found = perplexity(next_number, torch.tensor([0, 1, 2, 0, 0, 0]), 3)
    assert found.loss == pytest.approx((2 * math.log(2) + 2 * math.log(2 * (VOCAB - 1))) / 4, rel=1e-6)


def test_what_fills_no_window_is_dropped_and_windows_limit() -> None:
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
    assert perplexity(next_number, tokens, 3) == perplexity(next_number, tokens[:6], 3)
    assert perplexity(next_number, torch.tensor([0, 1, 2, 0, 0, 0]), 3, windows=1).perplexity == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_changes_nothing(batch: int) -> None:
    tokens = torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def predict(ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return next_number(ids)

    assert perplexity(predict, tokens, 10, batch=batch).loss == pytest.approx(perplexity(next_number, tokens, 10).loss, rel=1e-9)
    assert max(seen) == batch


@pytest.mark.parametrize(("count", "window"), [(9, 10), (0, 2), (9, 1)])
def test_a_text_shorter_than_a_window_is_refused(count: int, window: int) -> None:
    with pytest.raises(DataError, match=f"{count} tokens, which is no window of {window}"):
        perplexity(next_number, torch.zeros(count, dtype=torch.int64), window)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="loss on the text is nan"):
        perplexity(lambda ids: torch.full((*ids.shape, VOCAB), math.nan), torch.zeros(8, dtype=torch.int64), 4)


# -- texts ----------------------------------------------------------------------------------------


def test_samples_are_joined_with_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n  \ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"sentence": "two"}\n')
    assert read_text(tmp_path / "a.txt") == "one\n\n\n\ntwo\n\n"
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"


def test_lines_as_the_loaders_of_data_sets_give_them(tmp_path: Path) -> None:
    """``wikitext`` keeps the newline of a row with text, ``ptb_text_only`` strips; neither has a row after the last newline."""
    (tmp_path / "a.txt").write_text(" one \n  \n two\x0b \n")
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt", "lines") == " one \n\n\n\n two\x0b \n\n"
    assert read_text(tmp_path / "a.txt", "rows") == " one \n\n\n\n\n two\x0b \n"
    assert read_text(tmp_path / "a.txt", "stripped") == "one\n\n\n\ntwo"
    (tmp_path / "a.jsonl").write_text('{"text": " one "}\n')
    assert read_text(tmp_path / "a.jsonl", "stripped") == " one "
    with pytest.raises(OptionError, match="there are no samples 'words'") as caught:
        read_text(tmp_path / "a.txt", "words")
    assert caught.value.hint == "give lines, rows, stripped"


def test_a_table_is_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="SKIPPED: pyarrow comes with irprune[eval]")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["one", "", "two"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "b.parquet")
    assert read_text(tmp_path / "a.parquet") == "one\n\n\n\ntwo"
    with pytest.raises(DataError, match="the table has the columns words"):
        read_text(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.md", "x", "a '.md' file"),
        ("a.txt", " \n ", "empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": 1}\n', "no text or sentence"),
        ("a.jsonl", "{", "not JSON"),
        ("a.txt", None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        read_text(tmp_path / name)
    assert name in str(caught.value.where)


def test_bytes_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not a text in UTF-8"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}))
    assert read_text(tmp_path / "a.jsonl") == "one"
