"""Text as calibration data: a file's or the short one shipped here, cut into windows of tokens."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch

from irprune.errors import DataError
from irprune.frontend.objectives import IGNORED

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
        samples = _samples(content, path, ("text",))
        if samples is None:
            return None
        content = "\n\n".join(text for (text,) in samples)
    if not content.strip():
        raise DataError("the calibration text is empty", where=str(path), hint="give some paragraphs of text")
    return content


def pairs(path: Path) -> list[tuple[str, str]] | None:
    """Instruction data: the keys ``prompt`` and ``response`` of each line of a ``.jsonl`` file; ``None`` for any other file."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    samples = _samples(content, path, ("prompt", "response"))
    return None if samples is None else [(prompt, response) for prompt, response in samples]


def _samples(content: str, path: Path, keys: tuple[str, ...]) -> list[tuple[str, ...]] | None:
    """The texts under some keys in each line of JSON; ``None`` where no line has them all.

    Raises:
        DataError: Some lines have them and one has not, or has no text there.
    """
    try:
        lines = [(number, json.loads(line)) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError:
        return None
    if not any(isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in keys) for _, sample in lines):
        return None
    for number, sample in lines:
        found = sample if isinstance(sample, dict) else {}
        missing = next((key for key in keys if key not in found), None)
        if missing is not None:
            said = f"the sample has no `{missing}`, as others have; it has {', '.join(found) or 'no keys'}"
            raise DataError(said, where=f"{path}:{number}", hint="mend the line")
        # What a model is to say must be there; what it is asked, or a sample of plain text, may be empty.
        if not all(isinstance(found[key], str) for key in keys) or ("response" in keys and not found["response"]):
            wanted = "`prompt` and `response` must be texts, the response not empty" if len(keys) > 1 else f"`{keys[0]}` must be a text"
            raise DataError(wanted, where=f"{path}:{number}", hint="mend the line")
    return [tuple(sample[key] for key in keys) for _, sample in lines]


def masked(tokenizer: Any, samples: list[tuple[str, str]], length: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each sample: prompt, response and end of text, of which the prompt does not count (-100).

    A sample that is longer is cut at its end; one whose response is cut off wholly is left out.
    """
    out = []
    for prompt, response in samples:
        asked = tokenizer(prompt, verbose=False)["input_ids"]
        if asked and asked[-1] == tokenizer.eos_token_id:
            asked = asked[:-1]
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer = [*answer, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]
        tokens = [*asked, *answer][:length]
        labels = [*[IGNORED] * len(asked), *answer][:length]
        if len(tokens) > 1 and any(label != IGNORED for label in labels[1:]):
            out.append((tokens, labels))
    return out


def padded(rows: list[tuple[list[int], list[int]]], filler: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of tokens and labels, filled up on the right to the longest row, or to a length."""
    width = length or max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([[*tokens, *[filler] * (width - len(tokens))] for tokens, _ in rows], dtype=torch.int64),
        "labels": torch.tensor([[*labels, *[IGNORED] * (width - len(labels))] for _, labels in rows], dtype=torch.int64),
    }


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
