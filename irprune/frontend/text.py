"""Text as calibration data: a file's or the short one shipped here, cut into windows of tokens."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch

from irprune.errors import DataError

HELD_OUT = 0.2


def shipped() -> str:
    """Thirty short paragraphs of stories, facts, letters and instructions, written for this package."""
    return importlib.resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


def read(path: Path) -> str | None:
    """The text of a ``.txt`` file, or of the key ``text`` of a ``.jsonl`` file; ``None`` for any other file."""
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        return None
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not a text in UTF-8: {error}", where=str(path), hint="convert it to UTF-8") from error
    if path.suffix == ".jsonl":
        try:
            samples = [json.loads(line) for line in content.splitlines() if line.strip()]
        except json.JSONDecodeError:
            return None
        if not samples or not all(isinstance(sample, dict) and isinstance(sample.get("text"), str) for sample in samples):
            return None
        content = "\n\n".join(sample["text"] for sample in samples)
    if not content.strip():
        raise DataError("the calibration text is empty", where=str(path), hint="give some paragraphs of text")
    return content


def windows(tokenizer: Any, text: str, length: int, *, framed: bool) -> torch.Tensor:
    """The text's tokens in rows of equal length; the rest that fills no row is dropped.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        text: The text.
        length: Tokens in a row.
        framed: Put the tokenizer's first and last special token (``[CLS]``, ``[SEP]``) around each row.

    Returns:
        int64, ``(rows, length)``.

    Raises:
        DataError: The text is too short for two rows.
    """
    left, right = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if framed else ([], [])
    left, right = [[token for token in side if token is not None] for side in (left, right)]
    inner = length - len(left) - len(right)
    tokens = tokenizer(text, add_special_tokens=not framed, verbose=False)["input_ids"]
    rows = [[*left, *tokens[start : start + inner], *right] for start in range(0, len(tokens) - inner + 1, inner)]
    if inner < 1 or len(rows) < 2:
        raise DataError(
            f"the text has {len(tokens)} tokens, too few for two windows of {length}",
            hint="give a longer text, or ask for shorter windows (sequence)",
        )
    return torch.tensor(rows, dtype=torch.int64)


def parted(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to calibrate with, and the last fifth of them, which is held out for measuring."""
    cut = len(rows) - max(1, round(len(rows) * HELD_OUT))
    return rows[:cut], rows[cut:]
