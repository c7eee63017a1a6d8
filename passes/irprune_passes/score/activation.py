"""Activation criteria: what an index is worth to its readers, from what they read."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field

from irprune.ir.facts import Group
from irprune_passes.probe import Moment, Moments, Reader, observe
from irprune_passes.score.criteria import Criterion, Study
from irprune_passes.score.reduce import Array, combine

Statistic: TypeAlias = Annotated[
    Literal["norm", "std", "abs", "nonzero"],
    Field(
        description="Activation: root mean square of what is read, its standard deviation (what a mean in the next bias cannot replace), "
        "mean magnitude, or how often it is not zero."
    ),
]
Weighting: TypeAlias = Annotated[
    Literal["l2", "l1", "none"],
    Field(description="Activation: times the L2 or the L1 norm of the weights that read it (columns of the reader), or alone."),
]

_MOMENTS: dict[str, tuple[Moment, ...]] = {"norm": ("square",), "std": ("sum", "square"), "abs": ("abs",), "nonzero": ("nonzero",)}


class Activation(Criterion):
    """Size of an activation times the weights that read it, at the inputs of a group's readers.

    With ``s_j`` the statistic of feature ``j`` and ``W_ij`` the weight that takes it to output ``i``, an
    index with features ``J`` in a reader scores

    - ``weighting=l2``: ``sqrt(sum_J s_j^2 sum_i W_ij^2)``; for ``statistic=norm`` the norm of what the
      index adds to the reader's output, were its features uncorrelated;
    - ``weighting=l1``: ``sum_J s_j sum_i |W_ij|``; for ``statistic=norm`` Wanda (Sun et al. 2023, arXiv
      2306.11695) summed over the reader's column, as its structured form Wanda-sp does;
    - ``weighting=none``: ``sum_J s_j / |J|``; for ``statistic=nonzero`` one minus APoZ (Hu et al. 2016,
      arXiv 1607.03250, from memory), the average percentage of zeros.

    ``statistic=std`` with ``l2`` ranks as the fluctuation metric of FLAP (An et al. 2023, arXiv
    2312.11983, from memory) does: the variance times the column's squared norm.

    Several readers are put together by ``reduce``. A group that no linear layer, matrix product or
    convolution reads has no score, and ``prune`` refuses it.
    """

    name: ClassVar[str] = "activation"

    statistic: Statistic = "norm"
    weighting: Weighting = "l2"

    def score(self, study: Study) -> dict[str, Array]:
        of = {group.name: reading(study, group) for group in study.groups}
        wanted = list(dict.fromkeys(reader for found in of.values() for reader, _ in found))
        moments = observe(
            study.program,
            study.task,
            wanted,
            _MOMENTS[self.statistic],
            batches=study.batches,
            seed=study.seed,
            purpose="scoring by activations",
        )
        columns = {reader: self._columns(study, reader, moments[reader.node]) for reader in wanted}
        scores = {}
        for name, found in of.items():
            if found:
                rows = [self._totals(columns[reader], features) for reader, features in found]
                combined = combine(np.stack(rows), study.reduction)
                if combined is not None:
                    scores[name] = combined
        return scores

    def _columns(self, study: Study, reader: Reader, moments: Moments) -> torch.Tensor:
        """What each feature is worth, ``(G, in)``: squared for ``l2``."""
        statistic = {
            "norm": lambda: moments.mean("square").sqrt(),
            "std": lambda: moments.variance.sqrt(),
            "abs": lambda: moments.mean("abs"),
            "nonzero": lambda: moments.mean("nonzero"),
        }[self.statistic]()
        if self.weighting == "none":
            return statistic
        weight = reader.matrix(study.weights[reader.weight].double())
        return statistic.square() * weight.square().sum(1) if self.weighting == "l2" else statistic * weight.abs().sum(1)

    def _totals(self, columns: torch.Tensor, features: np.ndarray) -> Array:
        gathered = columns[:, torch.from_numpy(features).to(columns.device)]  # (G, indices, k)
        if self.weighting == "none":
            return gathered.mean((0, 2)).cpu().numpy()
        total = gathered.sum((0, 2))
        return (total.sqrt() if self.weighting == "l2" else total).cpu().numpy()


def reading(study: Study, group: Group) -> list[tuple[Reader, np.ndarray]]:
    """The readers of a group, each with the features of every index."""
    found = []
    for reader in study.readers:
        if reader.reads(study.program, group):
            features = reader.features(study.program, group)
            if features is not None:
                found.append((reader, features))
    return found
