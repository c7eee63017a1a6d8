"""Perplexity of a text by the protocol of LLM-Pruner (arXiv 2305.11627, ``LLMPruner/evaluator/ppl.py``)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from irprune.errors import DataError, OptionError
from irprune.evaluate.predictor import Predictor
from irprune.pipeline.progress import track

WINDOW = 128
KEYS = ("text", "sentence")
SAMPLES = ("lines", "rows", "stripped")


@dataclass(frozen=True)
class Perplexity:
    """What was measured on a text.

    Attributes:
        perplexity: The exponential of the loss.
        loss: Mean negative log-likelihood of the predicted tokens, in nats.
        windows: Number of windows.
        window: Tokens in each; the first of them is not predicted.
        tokens: Number of predicted tokens.
    """

    perplexity: float
    loss: float
    windows: int
    window: int
    tokens: int


def perplexity(
    predict: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    window: int = WINDOW,
    windows: int | None = None,
    *,
    batch: int = 8,
    label: str = "perplexity",
) -> Perplexity:
    """The perplexity of a causal language model on a text.

    The tokens are cut into windows that do not overlap, the rest that fills none is dropped, and the
    loss is the mean over all predicted tokens: each window's but its first.

    Args:
        predict: Token indices ``(rows, window)`` to logits ``(rows, window, vocabulary)``, as a
            :class:`~irprune.evaluate.predictor.Predictor` does.
        tokens: The whole text, int64 ``(tokens,)``.
        window: Tokens in a window, 2 or more.
        windows: Most windows to take, from the beginning; ``None`` takes all.
        batch: Windows in one call.
        label: What progress is shown as.

    Raises:
        DataError: The text is too short for one window, or the model gives no numbers.
        OptionError: The windows are longer than what the model reads.
    """
    count = len(tokens) // window if window > 1 else 0
    count = count if windows is None else min(count, windows)
    if count < 1:
        raise DataError(f"the text has {len(tokens)} tokens, which is no window of {window}", hint="give a longer text, or shorter windows")
    rows = tokens[: count * window].reshape(count, window)
    most = predict.reach(rows[0]) if isinstance(predict, Predictor) else window
    if most < window:
        raise OptionError(f"a window has {window} tokens, the model reads {most} at most", where="--window", hint=f"give {most} or less")
    total = 0.0
    with torch.inference_mode():
        for part in track(rows.split(batch), label):
            logits = predict(part)
            for row, scores in zip(part, logits, strict=True):
                total += float(functional.cross_entropy(scores[:-1].float(), row[1:].to(scores.device), reduction="sum"))
    loss = total / (count * (window - 1))
    if not math.isfinite(loss):
        raise DataError(f"the model's loss on the text is {loss}", hint="it gives values that are not finite; evaluate it in float32")
    # What overflows a float is no perplexity that anybody compares.
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, window, count * (window - 1))


def tokenised(tokenizer: Any, text: str) -> torch.Tensor:
    """The whole text as token indices, int64 ``(tokens,)``, with the special tokens that the tokenizer adds by default."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def read_text(path: str | os.PathLike[str], samples: str = "lines") -> str:
    """A text file's samples, joined with blank lines.

    The samples are the lines of a ``.txt`` file (empty ones too, as the data sets have them), the keys
    ``text`` or ``sentence`` in the lines of a ``.jsonl`` file, or the column of that name of a
    ``.parquet`` file.

    Args:
        path: The file.
        samples: What a line of a ``.txt`` file is as a sample. ``lines``: the line without its newline, blanks
            around it kept, and what follows the last newline, too. ``rows``: the line with its newline, or
            nothing where it is blank, as the loader of ``wikitext`` gives it. ``stripped``: the line without
            blanks around it, as that of ``ptb_text_only`` gives it. Other files say what their samples are.

    Raises:
        DataError: The file is not there, not of one of these forms, or empty.
        OptionError: There are no such samples.
    """
    if samples not in SAMPLES:
        raise OptionError(f"there are no samples '{samples}'", where="--samples", hint=f"give {', '.join(SAMPLES)}")
    path = Path(path)
    lines = {"lines": _lines, "rows": _rows, "stripped": _stripped}[samples]
    readers: dict[str, Callable[[Path], Iterable[str]]] = {".txt": lines, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"the text is a '{path.suffix}' file", where=str(path), hint=f"give a {', '.join(readers)} file")
    try:
        text = "\n\n".join(readers[path.suffix](path))
    except OSError as error:
        raise DataError(f"the text cannot be read: {error.strerror or error}", where=str(path), hint="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not a text in UTF-8: {error}", where=str(path), hint="convert it to UTF-8") from error
    if not text.strip():
        raise DataError("the text is empty", where=str(path), hint="give a file with text")
    return text


def _lines(path: Path) -> list[str]:
    return ["" if line.isspace() else line for line in path.read_text(encoding="utf-8").split("\n")]


def _rows(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return ["" if line.isspace() else line for line in file]


def _stripped(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [line.strip() for line in file]


def _json_lines(path: Path) -> Iterable[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                sample = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"the line is not JSON: {error.msg}", where=f"{path}:{number}", hint="write one object a line") from error
            yield _sample(sample, f"{path}:{number}")


def _sample(sample: Any, where: str) -> str:
    found = [sample[key] for key in KEYS if isinstance(sample, dict) and isinstance(sample.get(key), str)]
    if not found:
        raise DataError(f"the sample has no {' or '.join(KEYS)}", where=where, hint='write objects as {"text": "…"}')
    return str(found[0])


def _parquet(path: Path) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        hint = "install it with `pip install 'irprune[eval]'`, or convert the file to .jsonl"
        raise DataError("reading parquet needs pyarrow, which is not installed", where=str(path), hint=hint) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"not a parquet file: {str(error).splitlines()[0]}", where=str(path), hint="give another file") from error
    names = [name for name in KEYS if name in table.column_names]
    if not names:
        raise DataError(f"the table has the columns {', '.join(table.column_names)}", where=str(path), hint=f"name one {' or '.join(KEYS)}")
    return [value or "" for value in table.column(names[0]).to_pylist()]
