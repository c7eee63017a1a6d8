"""``score``: what every index of every prunable group is worth."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from irprune.ir.facts import Fact, Groups, Importance, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.registry import suggestion
from irprune_passes.score.activation import Statistic, Weighting
from irprune_passes.score.criteria import Criterion, Power, Study, find
from irprune_passes.score.obs import AtOnce, Damping
from irprune_passes.score.reduce import Normaliser, Reduction, normalise
from irprune_passes.score.taylor import AccumulatorMib, Combine, Fisher, Mode, Order


class Score(Pass):
    """Give every index of every prunable group a score; ``prune`` removes the lowest first.

    A criterion measures the slice of each parameter that an index owns, a reduction makes one number
    of the slices of all parameters of the group, and a normaliser makes groups comparable. Buffers do
    not count. Criteria that look at activations measure what reads the group in the place of its
    parameters. A group that a criterion cannot measure has no score.

    Before::  the fact ``Groups``
              ffn0  d1:16  writes fc1.weight:0 fc1.bias:0  reads fc2.weight:1
    After::   the same program, and the fact ``Importance``
              ffn0  16 scores, magnitude p=2, sum

    The options of a criterion are options of this pass. One that the chosen criterion does not have
    is an error; a criterion from another package (entry point ``irprune.criteria``) brings its own.
    """

    model_config = ConfigDict(extra="allow")

    name: ClassVar[str] = "score"
    needs: ClassVar = (Groups,)
    uses: ClassVar = (Task,)
    gives: ClassVar = (Importance,)

    criterion: str = Field(
        "magnitude",
        description="random, magnitude, fpgm, slimming; activation, obs (need calibration data); taylor (needs a loss as well); "
        "or one of another package.",
    )
    reduce: Reduction = Field(
        "sum",
        description="How the parameters of a group become one score per index. first and last: of the operations that produce or "
        "consume the dimension, in order of execution.",
    )
    normalize: Normaliser = Field("none", description="Make the scores of different groups comparable, for global allocation.")
    batches: int | None = Field(None, ge=1, description="Use at most this many calibration batches. none: all of them.")
    seed: int | None = Field(None, ge=0, description="Seed of everything random. none: that of the run.")
    p: Power = 2
    mode: Mode = "element"
    order: Order = 1
    combine: Combine = "batch"
    fisher: Fisher = "mean"
    accumulator_mib: AccumulatorMib = None
    statistic: Statistic = "norm"
    weighting: Weighting = "l2"
    damping: Damping = 0.01
    at_once: AtOnce = 0.02

    @field_validator("criterion")
    @classmethod
    def _exists(cls, criterion: str) -> str:
        find(criterion)
        return criterion

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        self.chosen()
        return self

    def chosen(self) -> Criterion:
        """The criterion with its options.

        Raises:
            ValueError: An option is none of the criterion's, or has a value that it does not take.
        """
        kind = find(self.criterion)
        extra = self.model_extra or {}
        changed = [key for key in _CRITERION_OPTIONS if getattr(self, key) != Score.model_fields[key].default]
        for key in (*changed, *extra):
            if key not in kind.model_fields:
                of_pass = [name for name in Score.model_fields if name not in _CRITERION_OPTIONS]
                raise ValueError(f"criterion '{self.criterion}' has no option '{key}'; {suggestion(key, [*kind.model_fields, *of_pass])}")
        try:
            return kind(**{key: getattr(self, key) for key in _CRITERION_OPTIONS if key in kind.model_fields}, **extra)
        except ValidationError as error:
            finding = error.errors()[0]
            if not finding["loc"]:
                raise ValueError(f"criterion '{self.criterion}': {finding['msg'].removeprefix('Value error, ')}") from error
            raise ValueError(f"option '{finding['loc'][0]}' of criterion '{self.criterion}': {finding['msg']}") from error

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (self._measure(program, facts[Groups], facts.get(Task)),))

    def revived(self, program: Program, facts: Facts, given: tuple[Fact, ...]) -> tuple[Fact, ...]:
        task = facts.restricted(self).get(Task)

        def again(smaller: Program, found: Groups) -> Importance:
            return self._measure(smaller, found, task)

        return tuple(dataclasses.replace(fact, rescore=again) if isinstance(fact, Importance) else fact for fact in given)

    def _measure(self, program: Program, groups: Groups, task: Task | None) -> Importance:
        criterion = self.chosen()
        seed = self.seed if self.seed is not None else task.seed if task else 0
        study = Study(program, groups.prunable, task, self.reduce, self.batches, seed)
        measured = criterion.score(study)
        scores = {group.name: normalise(measured[group.name], self.normalize) for group in study.groups if group.name in measured}
        return Importance(scores, f"{criterion}, {self.reduce}", lambda smaller, found: self._measure(smaller, found, task))


_CRITERION_OPTIONS = ("p", "mode", "order", "combine", "fisher", "accumulator_mib", "statistic", "weighting", "damping", "at_once")
