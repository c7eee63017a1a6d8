"""What an index is worth: the contract of a criterion, and those that need nothing but weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from irprune.errors import DataError
from irprune.ir.facts import Group, Task
from irprune.ir.program import Program
from irprune.pipeline.progress import track
from irprune_passes.probe import Reader, readers
from irprune_passes.score.reduce import Array, Quantity, Reduction, Structure, fold, reduce, structures

ENTRY_POINTS = "irprune.criteria"


@dataclass(frozen=True)
class Study:
    """What a criterion may look at.

    Attributes:
        program: The program; a criterion leaves it as it is.
        groups: The groups to score.
        task: Calibration data and loss, if the target has any.
        reduction: How the structures of a group become one score per index.
        batches: At most this many calibration batches, or ``None`` for all.
        seed: Seed of everything random.
    """

    program: Program
    groups: tuple[Group, ...]
    task: Task | None = None
    reduction: Reduction = "sum"
    batches: int | None = None
    seed: int = 0

    @cached_property
    def structures(self) -> tuple[Structure, ...]:
        return structures(self.program, self.groups)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """What reads dimensions, in order of execution."""
        return readers(self.program)

    @cached_property
    def by_tensor(self) -> dict[str, list[int]]:
        """Parameter name to the numbers of its structures."""
        out: dict[str, list[int]] = {}
        for number, structure in enumerate(self.structures):
            out.setdefault(structure.member.tensor, []).append(number)
        return out

    @cached_property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The parameters that have structures, detached; read when they are asked for where the program does not hold them.

        Raises:
            DataError: A parameter is on the meta device: it has a shape and no values.
        """
        if not self.program.has_data:
            name = next(name for name in self.by_tensor if self.program.tensors[name].is_meta)
            raise DataError(
                "the parameter is on the meta device and has no values to score",
                where=name,
                hint="load the model with its weights, or score with criterion=random",
            )
        return _Weights(self.program, tuple(self.by_tensor))

    def folded(self, name: str, quantity: Quantity, *tensors: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The numbers of a parameter's structures, each with the sums of a quantity per index (:func:`fold`)."""
        numbers = self.by_tensor[name]
        return zip(numbers, fold([self.structures[number] for number in numbers], quantity, *tensors), strict=True)

    def reduced(self, measured: Sequence[Array]) -> dict[str, Array]:
        """One score per index of each group from one array per structure; zeros where a group has no parameter.

        A group whose reduction does not rank is left out.

        Raises:
            DataError: A measured value is NaN or infinite.
        """
        rows: dict[str, list[int]] = {group.name: [] for group in self.groups}
        for number, structure in enumerate(self.structures):
            if not np.isfinite(measured[number]).all():
                raise DataError(
                    "the score of the parameter is not finite: its values are NaN, infinite or too large",
                    where=str(structure.member),
                    hint="check the checkpoint, or load it in single precision",
                )
            rows[structure.group].append(number)
        scores = {group.name: np.zeros(group.size) for group in self.groups if not rows[group.name]}
        for name, numbers in rows.items():
            if numbers:
                found = reduce(
                    np.stack([measured[number] for number in numbers]), [self.structures[number] for number in numbers], self.reduction
                )
                if found is not None:
                    scores[name] = found
        return scores


class _Weights(Mapping[str, torch.Tensor]):
    """Parameters by name, none of them kept."""

    def __init__(self, program: Program, names: tuple[str, ...]) -> None:
        self._program = program
        self._names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._program.value(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Criterion(BaseModel):
    """A way to score; its fields are its options, set as options of the pass ``score``.

    A package adds one by the entry point group ``irprune.criteria``: name to a subclass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]

    def score(self, study: Study) -> Mapping[str, Array]:
        """One score per index of each group of ``study.groups``; the lowest go first.

        A group that the criterion cannot measure is left out.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self)])


def names() -> tuple[str, ...]:
    """The names of all registered criteria, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=ENTRY_POINTS)}))


def find(name: str) -> type[Criterion]:
    """The criterion of a name.

    Raises:
        ValueError: There is none, or it cannot be loaded (a pydantic validator's error: the pass
            that asks reports it as an option that is not allowed).
    """
    points = entry_points(group=ENTRY_POINTS, name=name)
    if not points:
        raise ValueError(f"there is no criterion of this name; known: {', '.join(names())}")
    try:
        found = next(iter(points)).load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the criterion cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Criterion)):
        raise ValueError(f"{next(iter(points)).value} is not a subclass of irprune_passes.score.criteria.Criterion")
    return found


Power: TypeAlias = Annotated[int, Field(ge=1, le=2, description="Magnitude: 1 for the L1 norm, 2 for the L2 norm.")]


class Random(Criterion):
    """Uniform in ``[0, 1)``: the baseline that every criterion must beat.

    The numbers of a group depend on the seed and the group's key only, not on what else is scored.
    """

    name: ClassVar[str] = "random"

    def score(self, study: Study) -> dict[str, Array]:
        return {
            group.name: np.random.default_rng([study.seed, zlib.crc32(group.key.encode())]).random(group.size) for group in study.groups
        }


class Magnitude(Criterion):
    """The norm of an index's weights (Li et al. 2017, arXiv 1608.08710, for filters).

    Each structure gives ``sum(|w|^p)``; these are reduced, and the root is taken last: with
    ``reduce=sum`` the score is the norm of all slices of the index as one vector. For the other
    reductions the order does not matter, but for ``mean``, which becomes a power mean. LLM-Pruner and
    Torch-Pruning leave the root out; within a group that ranks the same.
    """

    name: ClassVar[str] = "magnitude"

    p: Power = 2

    def score(self, study: Study) -> dict[str, Array]:
        power = torch.abs if self.p == 1 else torch.square
        measured: list[Array] = [np.empty(0)] * len(study.structures)
        for name, weight in track(study.weights.items(), "magnitude"):
            for number, sums in study.folded(name, power, weight):
                measured[number] = sums.cpu().numpy()
        return {name: score ** (1 / self.p) for name, score in study.reduced(measured).items()}
