"""Criteria that look at filters: how replaceable one is, and how a batch norm scales it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from irprune.rules.registry import bind, op_name
from irprune_passes.score.criteria import Criterion, Study
from irprune_passes.score.reduce import Array, Structure, reduce

_BLOCK = 1 << 24


class Fpgm(Criterion):
    """The sum of an index's distances to all others: the most replaceable go first (He et al. 2019, arXiv 1811.00250).

    Distances are Euclidean, between the slices of the weights that write the dimension (filters of a
    convolution, rows of a linear layer); several such weights are put together by ``reduce``. The
    source prunes the filters nearest to the geometric median, which these sums find. A group that no
    weight writes has no score, and ``prune`` refuses it.
    """

    name: ClassVar[str] = "fpgm"

    def score(self, study: Study) -> dict[str, Array]:
        def writes(structure: Structure) -> bool:
            return structure.member.role == "write" and study.weights[structure.member.tensor].ndim > 1

        return _scored(study, writes, lambda slices: _distances(slices.double()))


class Slimming(Criterion):
    """The size of the batch norm's factor (network slimming, Liu et al. 2017, arXiv 1708.06519).

    It says something in networks that were trained with an L1 penalty on these factors. The rule of
    the source, one threshold over all layers, is ``prune{allocation=global of=indices}``. A group
    without a batch norm has no score, and ``prune`` refuses it.
    """

    name: ClassVar[str] = "slimming"

    def score(self, study: Study) -> dict[str, Array]:
        scales = set()
        for node in study.program.nodes:
            if node.op == "call_function" and "batch_norm" in op_name(node.target):
                weight = bind(node.target, node.args, dict(node.kwargs)).get("weight")
                scales.add(str(weight.target) if isinstance(weight, torch.fx.Node) else None)
        return _scored(study, lambda structure: structure.member.tensor in scales, lambda slices: slices.double().abs().sum(1))


def _scored(study: Study, counts: Callable[[Structure], bool], worth: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Array]:
    """Scores from the slices ``(indices, elements)`` of those structures that count."""
    rows: dict[str, list[tuple[Structure, Array]]] = {}
    for structure in study.structures:
        if counts(structure):
            slices = study.weights[structure.member.tensor].transpose(0, structure.member.axis)[structure.positions]
            found = worth(slices.reshape(structure.size, -1))
            rows.setdefault(structure.group, []).append((structure, found.cpu().numpy()))
    reduced = {
        name: reduce(np.stack([scores for _, scores in found]), [structure for structure, _ in found], study.reduction)
        for name, found in rows.items()
    }
    return {name: scores for name, scores in reduced.items() if scores is not None}


def _distances(slices: torch.Tensor) -> torch.Tensor:
    """The sum of distances of each row to all others, a block of rows at a time."""
    step = max(1, _BLOCK // len(slices))
    return torch.cat([torch.cdist(part, slices, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for part in slices.split(step)])
