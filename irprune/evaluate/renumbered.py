"""The tokens of a model whose vocabulary was cut: a tokenizer that gives its ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irprune.errors import DataError
from irprune.pipeline.manifest import Manifest


class Renumbered:
    """A ``transformers`` tokenizer that gives the ids of the kept tokens.

    Args:
        tokenizer: The tokenizer of the whole vocabulary.
        kept: The old id of each new one.
    """

    def __init__(self, tokenizer: Any, kept: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._new = {old: new for new, old in enumerate(kept)}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The new ids of a text.

        Raises:
            DataError: The text has tokens that were removed.
        """
        ids: list[int] = self._tokenizer(text, **options)["input_ids"]
        lost = [old for old in ids if old not in self._new]
        if lost:
            token = self._tokenizer.convert_ids_to_tokens(lost[0])
            start = text[:_SHOWN] + ("…" if len(text) > _SHOWN else "")
            raise DataError(
                f"{len(lost)} of the {len(ids)} tokens of the text {start!r} were removed by trim, "
                f"{len(set(lost))} different ones; the first is {token!r} (id {lost[0]})",
                hint="keep it in trim's `vocabulary`, or measure on text of kept tokens",
            )
        return {"input_ids": [self._new[old] for old in ids]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def eos_token_id(self) -> int | None:
        """The new id of the end of text; ``None`` where it was removed."""
        return self._new.get(self._tokenizer.eos_token_id)

    @property
    def bos_token_id(self) -> int | None:
        """The new id of the beginning of text; ``None`` where it was removed."""
        return self._new.get(self._tokenizer.bos_token_id)


_SHOWN = 40


def kept_ids(run: Path) -> list[int] | None:
    """The old id of each token of a run's vocabulary; ``None`` where the run did not cut it.

    Raises:
        DataError: The file that says so is missing or damaged, or speaks of the last of several cuts only.
    """
    done = Manifest.read(run)
    cut = (done.model_extra or {}).get("trim", {}).get("vocabulary")
    if cut is None:
        return None
    path, hint = run / cut["map"], "run the target again with the pass trim"
    cuts = sum(step.name == "trim" and step.options.get("vocabulary") is not None for step in done.passes)
    if cuts > 1:
        raise DataError(
            f"the vocabulary was cut {cuts} times, the file has the ids of the last only", where=str(path), hint="cut it in one pass"
        )
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the kept tokens cannot be read: {error}", where=str(path), hint=hint) from error
    if len(kept) != cut["tokens"]:
        raise DataError(f"the file has {len(kept)} tokens, the manifest {cut['tokens']}", where=str(path), hint=hint)
    return list(kept)
