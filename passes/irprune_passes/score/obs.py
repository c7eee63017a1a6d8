"""Optimal brain surgery on structures: what an index is worth when the others make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from irprune.errors import OptionError
from irprune.pipeline.progress import track
from irprune_passes.calibration import flat_batches, seeded
from irprune_passes.probe import Reader, Walk, damped
from irprune_passes.score.activation import reading
from irprune_passes.score.criteria import Criterion, Study
from irprune_passes.score.reduce import Array

Damping: TypeAlias = Annotated[float, Field(gt=0, description="OBS: this part of each diagonal element of a Gram matrix is added to it.")]
AtOnce: TypeAlias = Annotated[
    float,
    Field(ge=0, le=1, description="OBS: this part of a group's indices goes at a time before the rest is scored again; 0: one by one."),
]


class Obs(Criterion):
    """Greedy structured optimal brain surgery from Gram matrices (ZipLM, Kurtic et al. 2023, arXiv 2302.04089).

    For a reader ``y = W x`` with ``H = X X^T`` of the calibration inputs, removing the features ``S`` of
    an index and refitting all others costs ``tr(W_S (H^-1_SS)^-1 W_S^T)`` of squared output error. The
    cheapest indices go, ``W`` and ``H^-1`` are updated, and so on until none is left: an index that is
    a copy of another is worth nothing until the other is gone. The score of an index is the error that
    its removal adds in this order, and more than that of the one before, so that ranking by score is
    the order of removal. The refitted weights themselves are left to the pass ``repair``, whose
    least squares are the same algebra.

    Scored are groups that are exact and have readers; the errors of several readers are added. A
    group that is not scored is refused by ``prune``.

    Deviation: ZipLM takes single structures one by one; ``at_once`` lets several go between two updates.

    Memory: ``8 in^2`` bytes twice for each reader of the group at work, and what is alive between two
    readers for all calibration batches.
    """

    name: ClassVar[str] = "obs"

    damping: Damping = 0.01
    at_once: AtOnce = 0.02

    def score(self, study: Study) -> dict[str, Array]:
        of = {group.name: reading(study, group) for group in study.groups if group.exact}
        sizes = {group.name: group.size for group in study.groups}
        waiting = {name: {reader.node for reader, _ in found} for name, found in of.items() if found}
        grams: dict[tuple[object, ...], torch.Tensor] = {}
        scores: dict[str, Array] = {}
        wanted = [reader for reader in study.readers if any(reader.node in nodes for nodes in waiting.values())]
        with seeded(study.seed), torch.no_grad():
            walk = Walk(study.program, list(flat_batches(study.program, study.task, limit=study.batches, purpose="scoring by OBS")))
            for reader in track(wanted, "obs"):
                if reader.view not in grams:
                    grams[reader.view] = _gram(reader, walk)
                for name in [name for name, nodes in waiting.items() if reader.node in nodes]:
                    waiting[name].remove(reader.node)
                    if not waiting[name]:
                        del waiting[name]
                        layers = [Layer.of(one, study, grams[one.view], features, self.damping) for one, features in of[name]]
                        scores[name] = eliminate(layers, sizes[name], max(1, round(self.at_once * sizes[name])))
                needed = {one.view for name in waiting for one, _ in of[name]}
                grams = {view: gram for view, gram in grams.items() if view in needed}
        return scores


def _gram(reader: Reader, walk: Walk) -> torch.Tensor:
    total: torch.Tensor | None = None
    for value in walk.advance(reader.node):
        x = reader.samples(value(reader.operand))
        product = (x.mT @ x).double()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


class Layer:
    """One reader under elimination.

    Args:
        weight: ``(G, out, in)``, double.
        inverse: ``H^-1``, ``(G, in, in)``, double.
        features: ``(indices, k)``: the features of each index.
    """

    def __init__(self, weight: torch.Tensor, inverse: torch.Tensor, features: npt.NDArray[np.int64]) -> None:
        self.weight = weight.clone()
        self.inverse = inverse.clone()
        self.features = torch.from_numpy(features).to(weight.device)

    @classmethod
    def of(cls, reader: Reader, study: Study, gram: torch.Tensor, features: npt.NDArray[np.int64], damping: float) -> Layer:
        """A reader with the Gram matrix of what it reads."""
        weight = reader.matrix(study.weights[reader.weight].double())
        weight = weight * (gram.diagonal(dim1=-2, dim2=-1) > 0)[:, None]  # what reads nothing costs nothing
        factor, failed = torch.linalg.cholesky_ex(damped(gram, damping))
        if bool(failed.any()):
            raise OptionError(
                f"damping={damping:g} is too little for {gram.shape[-1]} features: their Gram matrix has no inverse in rounding",
                where=f"pass score, the reader {reader.weight}",
                hint="raise `damping`, or give more calibration samples than features",
            )
        return cls(weight, torch.cholesky_inverse(factor), features)

    def costs(self, indices: torch.Tensor) -> torch.Tensor:
        """What removing each of the indices would add to the squared error, the others refitted."""
        at = self.features[indices]
        columns = self.weight[:, :, at].permute(0, 2, 1, 3)  # (G, indices, out, k)
        blocks = self.inverse[:, at[:, :, None], at[:, None, :]]  # (G, indices, k, k)
        return (columns * torch.linalg.solve(blocks, columns.mT).mT).sum((0, 2, 3))

    def remove(self, indices: torch.Tensor) -> None:
        """Let indices go and refit the others."""
        at = self.features[indices].flatten()
        rows = self.inverse[:, at]  # (G, s, in)
        solved = torch.linalg.solve(rows[:, :, at], rows)
        self.weight -= self.weight[:, :, at] @ solved
        self.inverse -= rows.mT @ solved
        self.weight[:, :, at] = 0


def eliminate(layers: Sequence[Layer], size: int, at_once: int) -> Array:
    """The score of each index: the squared error that its removal adds, in the order in which they go."""
    scores = np.empty(size)
    alive = torch.arange(size, device=layers[0].weight.device)
    floor = 0.0
    while len(alive):
        costs = torch.stack([layer.costs(alive) for layer in layers]).sum(0).clamp_min(0)
        order = torch.argsort(costs, stable=True)
        going = order[:at_once]
        for cost, index in zip(costs[going].tolist(), alive[going].tolist(), strict=True):
            floor = max(cost, np.nextafter(floor, np.inf))
            scores[index] = floor
        gone, alive = alive[going], alive[torch.sort(order[at_once:]).values]
        if len(alive):
            for layer in layers:
                layer.remove(gone)
    return scores
