"""Facts: what analysis passes find and later passes read. Facts are nouns and never change.

An *analysis* describes one version of the program and is dropped when the program changes; a
*lasting* fact (the task, the original program, the run's files) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from irprune.ir.dims import Freeze, Mask, Var
from irprune.ir.program import Program

Role = Literal["write", "read", "carry"]


class Fact:
    """Base of all facts."""

    lasting: ClassVar[bool] = False


@dataclass(frozen=True)
class Member:
    """One parameter or buffer axis that carries a group's variable.

    Attributes:
        tensor: Fully qualified name.
        axis: The axis.
        role: ``write`` (the operation that uses the tensor produces the dimension, as rows of a
            linear), ``read`` (it contracts the dimension, as columns), ``carry`` (per-index data:
            bias, norm weight, running statistics, positional table).
        maps: Position of the axis to index of the variable, or -1; one array per occurrence.
        order: Place of the first operation that uses the tensor in execution order.
    """

    tensor: str
    axis: int
    role: Role
    maps: tuple[npt.NDArray[np.int64], ...] = field(repr=False, compare=False)
    order: int = 0

    def __str__(self) -> str:
        return f"{self.tensor}:{self.axis}"


@dataclass(frozen=True)
class Group:
    """A variable with everything that carries it: what must be removed together.

    Attributes:
        name: Short and unique, stable for one model (``ffn0``, ``heads3``).
        key: The variable's identity for recipes: first tensor, axis and place in it.
        var: The variable.
        size: Number of indices.
        kind: ``ffn``, ``heads``, ``query_heads``, ``head_dim``, ``conv``, ``residual``,
            ``norm_groups``, ``experts``, ``other``; where unlocked ``vocabulary``, ``positions``.
        exact: Removing an index gives the same function as zeroing it.
        members: Parameter and buffer axes, in execution order of their use.
        carriers: Names of the operations whose results carry the variable.
        mixers: Names of the operations that mix along it (empty if exact).
        params_per_index: Parameters that go with one index while nothing else is removed.
        macs_per_index: The same for multiply-accumulates at the example input's sizes.
        frozen: Why it may not be pruned, or ``None``.
        least: At least so many indices must stay (two experts, where each token goes to two).
    """

    name: str
    key: str
    var: Var = field(repr=False)
    size: int
    kind: str
    exact: bool
    members: tuple[Member, ...] = field(repr=False)
    carriers: tuple[str, ...] = field(default=(), repr=False)
    mixers: tuple[str, ...] = field(default=(), repr=False)
    params_per_index: int = 0
    macs_per_index: int = 0
    frozen: Freeze | None = None
    least: int = 1

    @property
    def prunable(self) -> bool:
        return self.frozen is None


@dataclass(frozen=True)
class Groups(Fact):
    """All groups of a program, prunable and frozen, in order of execution."""

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    @property
    def prunable(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.prunable)


@dataclass(frozen=True)
class Importance(Fact):
    """A score per index of each prunable group; the lowest go first.

    Attributes:
        scores: Group name to float64 array of the group's size.
        criterion: What was measured, for reports.
        rescore: The same measurement on a smaller version of the program, for pruning in steps;
            ``None`` where the scores cannot be measured again.
    """

    scores: Mapping[str, npt.NDArray[np.float64]]
    criterion: str = ""
    rescore: Callable[[Program, Groups], Importance] | None = field(default=None, repr=False, compare=False, metadata={"live": True})


@dataclass(frozen=True)
class Plan(Fact):
    """Which indices stay: group name to keep mask. A group without a mask stays whole."""

    keep: Mapping[str, Mask]


@dataclass(frozen=True)
class Original(Fact):
    """The program as traced, before any pass changed it."""

    program: Program
    lasting: ClassVar[bool] = True


@dataclass(frozen=True)
class Pretrained(Fact):
    """The Hugging Face model that the original program was traced from.

    Attributes:
        model: The model, whose tensors are the original program's.
        config: Its configuration as the checkpoint has it.
        companions: Writes what lies beside the weights (tokenizer, preprocessor, generation settings) into
            a directory; gives notes for the user.
        retrace: Traces a model of the same class, without weights, as the original was traced.
    """

    model: Any
    config: Any = field(repr=False)
    companions: Callable[[Path], list[str]] = field(repr=False)
    retrace: Callable[[Any], Program] | None = field(default=None, repr=False)
    lasting: ClassVar[bool] = True


@dataclass(frozen=True)
class Task(Fact):
    """What the user's target says about data and quality. Any part may be missing.

    Attributes:
        target: What the user named (a path, ``hf:…``), for messages and the manifest.
        calibration: Fresh iterable of batches. A batch is ``(args, kwargs)`` for the model plus
            whatever ``loss`` needs: ``loss(outputs, batch)`` gets the batch as the user yielded it,
            ``inputs(batch)`` gives ``(args, kwargs)``.
        inputs: Batch to ``(args, kwargs)`` of the model.
        loss: Outputs and batch to a scalar tensor.
        evaluate: Takes ``predict(*args, **kwargs) -> outputs as the model returns them`` and gives
            metrics by name (larger is better unless the name says ``loss`` or ``perplexity``).
        positions: Batch to a boolean tensor over the leading axes of the first output: what counts in the
            loss. ``None``, also as a result, where all do.
        read: Fresh batches from another file, as the loader reads calibration data.
        said: What reading files had to say, one sentence each; ``read`` adds to it.
        seed: Seed of everything random.
        tokenizer: What turns text into the model's tokens; an exported decoder gets a copy beside it.
    """

    target: str
    calibration: Callable[[], Iterable[Any]] | None = None
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Callable[..., Any]], dict[str, float]] | None = None
    positions: Callable[[Any], Any] | None = None
    read: Callable[[Path], Callable[[], Iterable[Any]]] | None = None
    said: list[str] = field(default_factory=list, compare=False)
    seed: int = 0
    tokenizer: Any = field(default=None, repr=False, compare=False)
    lasting: ClassVar[bool] = True


@dataclass(frozen=True)
class Workspace(Fact):
    """Where a run writes. Files appear under their name only when whole.

    Attributes:
        path: The run directory.
        progress: A folder for the progress of the pass that runs, which it makes when it needs it. What a
            pass leaves there it finds again when a killed run goes on; when it has finished, the folder goes.
            ``None`` where nothing is kept.
    """

    path: Path
    progress: Path | None = None
    lasting: ClassVar[bool] = True


@dataclass(frozen=True)
class Note(Fact):
    """Base of what a pass adds to the manifest and the report (a lasting fact with plain values)."""

    lasting: ClassVar[bool] = True


@dataclass(frozen=True)
class PruneReport(Note):
    """What ``prune`` did.

    Attributes:
        requested: The asked ratio and its unit.
        achieved: The reached ratio in the same unit.
        keep: Group *key* to keep mask: the recipe.
        kept: Group name to (kept, size).
        checks: ``shapes``, ``numbers`` (``max_abs_err``, ``tolerance``), ``interface``.
    """

    requested: Mapping[str, Any]
    achieved: Mapping[str, float]
    keep: Mapping[str, Mask] = field(repr=False)
    kept: Mapping[str, tuple[int, int]] = field(repr=False)
    checks: Mapping[str, Any] = field(default_factory=dict)
