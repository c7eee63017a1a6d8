"""What a model without a user's loss is scored and measured by, derived from the kind of its task.

============  ==========================================================  =================================
kind          loss                                                        metric on held-out data
============  ==========================================================  =================================
causal-lm     cross-entropy of the next token                             ``perplexity``
masked-lm     cross-entropy of every seventh token, replaced by the mask  ``perplexity`` of those tokens
seq2seq-lm    cross-entropy of the decoder's next token, on the text that ``perplexity``
              the encoder reads
classifier    cross-entropy against the unpruned model's own decision     ``agreement`` with its decisions
encoder       mean magnitude of the output (there is no target for it)    ``cosine`` similarity to its output
============  ==========================================================  =================================

A batch is a dict of the model's inputs. Where it holds ``labels`` these are used instead: token or
class indices, -100 for those that do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

Kind = Literal["causal-lm", "masked-lm", "seq2seq-lm", "classifier", "encoder"]
Batch = dict[str, torch.Tensor]

IGNORED = -100
MASK_EVERY = 7


@dataclass(frozen=True)
class Objective:
    """Loss and metric of one kind of task.

    Attributes:
        kind: The task.
        teacher: The unpruned model as a function of its keyword inputs.
        mask: Token index of the mask, for ``masked-lm``.
        special: Token indices that are never masked.
    """

    kind: Kind
    teacher: Callable[..., Any]
    mask: int | None = None
    special: tuple[int, ...] = ()

    def prepared(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """The batch with the ``labels`` that the loss compares with."""
        made = dict(batch)
        if "labels" in made:
            return made
        if self.kind == "causal-lm":
            made["labels"] = made["input_ids"]
        elif self.kind == "masked-lm" and self.mask is not None:
            ids = made["input_ids"]
            place = torch.arange(ids.shape[1]) % MASK_EVERY == MASK_EVERY // 2
            hidden = place & ~torch.isin(ids, torch.tensor(self.special))
            made["labels"] = ids.masked_fill(~hidden, IGNORED)
            made["input_ids"] = ids.masked_fill(hidden, self.mask)
        elif self.kind == "seq2seq-lm":
            made["labels"] = functional.pad(made["decoder_input_ids"][:, 1:], (0, 1), value=IGNORED)
        elif self.kind != "encoder":
            made["labels"] = self._decisions(made)
        return made

    def _decisions(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return _first(self.teacher(**batch)).argmax(-1)

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A scalar, the mean over tokens or samples."""
        output = _first(outputs)
        if self.kind == "encoder":
            return output.float().abs().mean()
        labels = batch["labels"]
        if self.kind == "causal-lm":
            output, labels = output[:, :-1], labels[:, 1:]
        return functional.cross_entropy(output.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)

    def positions(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Which positions of the output count in the loss, ``(batch, sequence)``; ``None`` where there are no positions."""
        if self.kind not in ("causal-lm", "masked-lm", "seq2seq-lm"):
            return None
        counts = batch["labels"] != IGNORED
        return functional.pad(counts[:, 1:], (0, 1)) if self.kind == "causal-lm" else counts

    def evaluate(self, predict: Callable[..., Any], batches: Iterable[Batch], names: Iterable[str]) -> dict[str, float]:
        """The metric of a predictor on held-out batches.

        Args:
            predict: Takes the model's keyword inputs, gives what the model gives.
            batches: Prepared batches.
            names: The model's inputs.
        """
        total, count = 0.0, 0
        for batch in batches:
            inputs = {name: batch[name] for name in names}
            with torch.no_grad():
                output = torch.as_tensor(_first(predict(**inputs))).cpu()
                if self.kind == "encoder":
                    values = functional.cosine_similarity(output.float(), _first(self.teacher(**inputs)).float(), dim=-1)
                elif self.kind == "classifier":
                    values = (output.argmax(-1) == batch["labels"])[batch["labels"] != IGNORED].float()
                else:
                    weight = int((batch["labels"][:, 1 if self.kind == "causal-lm" else 0 :] != IGNORED).sum())
                    values = self.loss(output, batch).expand(weight)
            total += float(values.double().sum())
            count += values.numel()
        mean = total / max(count, 1)
        if self.kind == "encoder":
            return {"cosine": mean}
        if self.kind == "classifier":
            return {"agreement": mean}
        return {"perplexity": float(torch.tensor(mean, dtype=torch.float64).exp())}


def _first(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
