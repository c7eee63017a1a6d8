"""Taylor criteria: how much the loss changes when an index goes, from gradients."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import BeforeValidator, Field, model_validator

from irprune.errors import DataError
from irprune_passes.score.criteria import Criterion, Study
from irprune_passes.score.gradients import Fold, backward
from irprune_passes.score.reduce import Array


def _number(value: Any) -> Any:
    return int(value) if value in ("1", "2") else value


Mode: TypeAlias = Annotated[
    Literal["vector", "element"], Field(description="Taylor: take absolute values per slice (vector) or per weight (element).")
]
Order: TypeAlias = Annotated[
    Literal[1, 2, "mixed"],
    BeforeValidator(_number),
    Field(description="Taylor: first order, second order (Fisher diagonal, per-sample gradients), or their difference (mixed)."),
]
Combine: TypeAlias = Annotated[
    Literal["batch", "total"],
    Field(
        description="Taylor, element-wise first order over several batches: mean of the batches' scores (batch; no memory), "
        "or score of the mean gradient (total; one number per weight)."
    ),
]
Fisher: TypeAlias = Annotated[
    Literal["mean", "sum"], Field(description="Taylor, second order: squared gradients are averaged or summed over the samples.")
]
AccumulatorMib: TypeAlias = Annotated[
    int | None,
    Field(
        ge=1,
        description="Taylor with order=mixed or combine=total: at most so many MiB of accumulators at a time (a single parameter "
        "may need more); the data is then passed over several times. none: no limit, one pass.",
    ),
]


class Taylor(Criterion):
    """First and second order terms of the loss in the weights of an index (LLM-Pruner, arXiv 2305.11627, section 3.2).

    With weights ``w`` of a structure's slice and ``t_j = g_j w`` for the gradient ``g_j`` of step
    ``j``, averages ``m1 = mean_j t_j`` and ``m2 = mean_j t_j^2``, and ``k`` running over the slice:

    ======== ================= ================== ==========================
    mode     order=1           order=2            order=mixed
    ======== ================= ================== ==========================
    vector   ``|sum_k m1_k|``  ``mean_j (sum_k    ``|mean_j s_j - mean_j
                               t_jk)^2``          s_j^2 / 2|``, ``s_j =
                                                  sum_k t_jk``
    element  ``sum_k |m1_k|``  ``sum_k m2_k``     ``sum_k |m1_k - m2_k/2|``
    ======== ================= ================== ==========================

    Steps are batches for ``order=1``, each with the gradient of its own loss and equal weight, and
    single samples otherwise. ``element`` and 1 is LLM-Pruner's ``Element1`` (``param_first``), 2 its
    code's ``param_second``, ``w^2 F`` with the Fisher diagonal ``F``, and ``mixed`` equation 5
    (``param_mix``); ``vector`` and 1 its vector-wise form, 2 the squared gate gradient of Molchanov et
    al. 2019 (arXiv 1906.10771) with mini-batches of one.

    Memory: gradients are folded one by one as they appear, so the weights, the activations and little
    more than the largest gradient are enough, except where an absolute value is taken of something
    averaged per weight: ``element`` with ``mixed`` needs two single-precision numbers per weight, and
    with ``order=1 combine=total`` one. ``accumulator_mib`` bounds those.

    Deviations from the paper, each with its option:

    - ``Element1`` takes one backward pass over all samples. One batch of all samples is exactly that.
      Over several batches the mean of ``sum_k |g_b w|`` is an upper bound of it that keeps to the
      memory bound; ``combine=total`` is exact.
    - Equation 5 sums the squares over the samples while its first term belongs to the whole data.
      ``fisher=mean`` averages both, which is the equation for the mean of the samples' losses and what
      LLM-Pruner's code does; ``fisher=sum`` is the literal text.
    - The first-order term of ``mixed`` is the mean of the samples' gradients, which is the batch's
      gradient where the loss is a mean over samples.
    """

    name: ClassVar[str] = "taylor"

    mode: Mode = "element"
    order: Order = 1
    combine: Combine = "batch"
    fisher: Fisher = "mean"
    accumulator_mib: AccumulatorMib = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        # `score` gives every option, so one that was left out is known by its value alone.
        if self.combine != "batch" and (self.mode, self.order) != ("element", 1):
            raise ValueError(f"`combine` needs mode=element order=1, found mode={self.mode} order={self.order}")
        if self.fisher != "mean" and self.order == 1:
            raise ValueError("`fisher` needs order=2 or order=mixed: the first order squares no gradients")
        if self.accumulator_mib is not None and not self._accumulates:
            raise ValueError("`accumulator_mib` needs mode=element with order=mixed or combine=total: nothing else accumulates per weight")
        return self

    @property
    def _accumulates(self) -> bool:
        """Whether numbers are kept for each weight."""
        return self.mode == "element" and (self.order == "mixed" or (self.order == 1 and self.combine == "total"))

    def score(self, study: Study) -> dict[str, Array]:
        names = [name for name in study.weights if study.program.tensors[name].is_floating_point()]
        sums = [structure.lengths.new_zeros(structure.size, dtype=torch.float64) for structure in study.structures]
        measure = self._accumulate if self._accumulates else self._stream
        if names and not measure(study, names, sums):
            raise DataError(
                "the loss depends on no parameter that is to be scored",
                where=study.task.target if study.task else None,
                hint="compute `loss(outputs, batch)` from the outputs, without no_grad() or detach()",
            )
        return study.reduced([one.cpu().numpy() for one in sums])

    def _stream(self, study: Study, names: list[str], out: list[torch.Tensor]) -> bool:
        """Moments per index of each structure: no memory to speak of. Whether any gradient came."""
        moments = [[torch.zeros_like(one) for _ in self._powers] for one in out]

        def terms(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            term = weight * gradient
            return term if self.mode == "vector" else term.abs_() if self.order == 1 else term.square_()

        def keep(name: str, gradient: torch.Tensor) -> None:
            for number, value in study.folded(name, terms, study.weights[name], gradient):
                for power, moment in zip(self._powers, moments[number], strict=True):
                    moment += value.square() if self.mode == "vector" and power == 2 else value

        steps, reached = self._backward(study, names, keep)
        for number, found in enumerate(moments):
            out[number] = self._salience(*found, steps=steps)
        return reached

    def _accumulate(self, study: Study, names: list[str], out: list[torch.Tensor]) -> bool:
        """Moments per weight, for as many parameters at a time as the limit allows. Whether any gradient came."""
        reached = False
        for chunk in self._chunks(study, names):
            moments = {name: [_zeros(study.weights[name]) for _ in self._powers] for name in chunk}

            def keep(name: str, gradient: torch.Tensor, moments: dict[str, list[torch.Tensor]] = moments) -> None:
                for power, moment in zip(self._powers, moments[name], strict=True):
                    moment.add_(gradient) if power == 1 else moment.addcmul_(gradient, gradient)

            steps, some = self._backward(study, chunk, keep)
            reached = reached or some

            def salience(weight: torch.Tensor, *found: torch.Tensor, steps: int = steps) -> torch.Tensor:
                scaled = [moment * weight**power for power, moment in zip(self._powers, found, strict=True)]
                return self._salience(*scaled, steps=steps)

            for name in chunk:
                for number, value in study.folded(name, salience, study.weights[name], *moments.pop(name)):
                    out[number] = value
        return reached

    @property
    def _powers(self) -> tuple[int, ...]:
        """Of the terms whose sums the order needs."""
        return (1, 2) if self.order == "mixed" else (self.order,)

    def _salience(self, *moments: torch.Tensor, steps: int) -> torch.Tensor:
        """The entry of the table, from the sums of the terms' powers."""
        samples = 1 if self.fisher == "sum" else steps
        if self.order == 1:
            return (moments[0] / steps).abs()
        if self.order == 2:
            return moments[0] / samples
        return (moments[0] / steps - moments[1] / (2 * samples)).abs()

    def _chunks(self, study: Study, names: list[str]) -> list[list[str]]:
        """Parameters whose accumulators fit in the limit together: the largest first, each where there is room."""
        limit = float("inf") if self.accumulator_mib is None else self.accumulator_mib * 2**20
        tensors = study.program.tensors
        sizes = {name: len(self._powers) * tensors[name].numel() * _wide(tensors[name]).itemsize for name in names}
        chunks: list[list[str]] = []
        for name in sorted(names, key=sizes.__getitem__, reverse=True):
            room = next((chunk for chunk in chunks if sum(sizes[other] for other in chunk) + sizes[name] <= limit), None)
            if room is None:
                chunks.append(room := [])
            room.append(name)
        return chunks

    def _backward(self, study: Study, names: list[str], keep: Fold) -> tuple[int, bool]:
        """The number of backward passes, and whether any gradient came."""
        seen: set[str] = set()

        def fold_one(name: str, gradient: torch.Tensor) -> None:
            seen.add(name)
            keep(name, gradient)

        label = "taylor batches" if self.order == 1 else "taylor samples"
        steps = backward(
            study.program,
            study.task,
            names,
            fold_one,
            batches=study.batches,
            per_sample=self.order != 1,
            seed=study.seed,
            label=label,
        )
        return steps, bool(seen)


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight, dtype=_wide(weight))
