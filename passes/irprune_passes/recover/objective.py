"""What is minimised: a weighted sum of the task's loss and of distances to the unpruned program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from irprune.analysis.cost import hints
from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, shapes
from irprune.backend.proof import wide_tensor
from irprune.backend.rewrite import Shrink, shape_of
from irprune.errors import DataError, OptionError
from irprune.ir.facts import PruneReport
from irprune.ir.program import Axes, Program
from irprune.rules.infer import typed
from irprune_passes.recover.engine import Engine, trunk


class Teacher:
    """The unpruned program: its outputs, and its values along the trunk as the pruned program has them.

    Args:
        original: The program as traced.
        pruned: The program that is trained.
        report: What was removed from the one to get the other; ``None`` if nothing was.
        hidden: Whether values along the trunk are wanted.
        device: Where it runs.
        wide: Compute in float32 what the trace has in half precision.
    """

    def __init__(
        self, original: Program, pruned: Program, report: PruneReport | None, *, hidden: bool, device: torch.device, wide: bool = False
    ) -> None:
        original = original if original.types is not None else typed(original)
        self.points: list[str] = []
        self._axes: list[Axes] = []
        if hidden:
            keep = {} if report is None else Recipe(report.keep, shapes(original)).masks(original, discover(original))
            self._shrink = Shrink(original.typing, keep, hints(original))
            self._find(original, pruned)
        self._engine = Engine(original, self.points, device=device, wide=wide)
        held = {name: tensor.detach().to(device) for name, tensor in original.tensors.items()}
        self._tensors = {name: wide_tensor(tensor) if wide else tensor for name, tensor in held.items()}

    def _find(self, original: Program, pruned: Program) -> None:
        """The values of the trunk that both programs have, by their names: removal keeps them."""
        for name in trunk(original):
            node, axes = pruned.by_name.get(name), original.typing.axes.get(name)
            if node is None or not isinstance(axes, tuple) or node.target is not original.by_name[name].target:
                continue
            if tuple(self._shrink.size(term) for term in axes) == shape_of(node.meta["val"]):
                self.points.append(name)
                self._axes.append(axes)
        if not self.points:
            raise OptionError(
                "the program has no value that everything flows through and that the original has too",
                where="pass recover",
                hint="use hidden=0; logits=1 compares the outputs",
            )

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, list[torch.Tensor]]:
        """Outputs, and the kept part of the values along the trunk; no gradients."""
        with torch.no_grad():
            outputs, values = self._engine(self._tensors, args, kwargs)
        return outputs, [self._shrink.slice(value, axes) for value, axes in zip(values, self._axes, strict=True)]


@dataclass(frozen=True)
class Objective:
    """The weighted sum.

    Attributes:
        loss: Weight of the task's loss.
        logits: Weight of the divergence from the teacher's outputs.
        hidden: Weight of the distance from its inner values.
        temperature: Divides the logits on both sides.
        classes: Axis of the first output that holds the scores of the classes.
        task_loss: The task's loss; it may be missing if its weight is 0.
        positions: What counts, as :attr:`irprune.ir.facts.Task.positions`.
        scales: What the distance at each place is divided by; none: by the batch's own mean squares.
    """

    loss: float
    logits: float
    hidden: float
    temperature: float
    classes: int
    task_loss: Callable[[Any, Any], Any] | None
    positions: Callable[[Any], Any] | None
    scales: tuple[torch.Tensor, ...] | None = None

    def parts(
        self, outputs: Any, inner: list[torch.Tensor], teacher: tuple[Any, list[torch.Tensor]] | None, batch: Any
    ) -> dict[str, torch.Tensor]:
        """Each part without its weight, as a scalar."""
        out: dict[str, torch.Tensor] = {}
        if self.loss:
            assert self.task_loss is not None
            out["loss"] = self.task_loss(outputs, batch)
        counts = self.counts(batch)
        if teacher is not None and self.logits:
            out["logits"] = divergence(_scores(outputs), _scores(teacher[0]), self.temperature, self.classes, counts)
        if teacher is not None and self.hidden:
            out["hidden"] = distance(inner, teacher[1], counts, self.scales)
        return out

    def counts(self, batch: Any) -> torch.Tensor | None:
        """Which positions of a batch count; ``None`` where all do."""
        return self.positions(batch) if self.positions is not None else None

    def total(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([getattr(self, name) * value for name, value in parts.items()]).sum()

    def weight(self, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """How much a batch counts among others: its positions in the loss, else its samples."""
        counts = self.counts(batch)
        if counts is not None:
            return int(counts.sum())
        first = next((leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor) and leaf.ndim), None)
        return 1 if first is None else int(first.shape[0])


def _scores(outputs: Any) -> torch.Tensor:
    found = next((leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)
    if found is None:
        raise DataError("the program has no output of scores to compare", where="pass recover", hint="use logits=0")
    return found


def check_classes(program: Program, classes: int) -> None:
    """Refuse an axis that the scores do not have.

    Raises:
        OptionError: It is out of range.
    """
    (output,) = (node for node in program.nodes if node.op == "output")
    leaves = (leaf.meta.get("val") for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node))
    scores = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)
    if scores is None or -scores.ndim <= classes < scores.ndim:
        return
    if scores.ndim == 0:
        raise OptionError("the first output is a single number and has no axis of classes", where="pass recover", hint="use logits=0")
    raise OptionError(
        f"option 'classes': {classes} is no axis of the first output, which has {scores.ndim}",
        where="pass recover",
        hint=f"give a whole number from {-scores.ndim} to {scores.ndim - 1}",
    )


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, classes: int = -1, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over positions (Hinton et al. 2015, arXiv 1503.02531)."""
    student, teacher = (scores.movedim(classes, -1).float() / temperature for scores in (student, teacher))
    if counts is not None:
        student, teacher = student[counts], teacher[counts]
    student, teacher = (scores.flatten(0, -2).log_softmax(-1) for scores in (student, teacher))
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distance(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    counts: torch.Tensor | None = None,
    scales: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean squared error over the teacher's mean square, the mean over the places that are compared.

    Args:
        student: A value for each place.
        teacher: The same of the teacher.
        counts: What counts, over the leading axes; a value with other ones counts whole.
        scales: The mean square of each place; none: that of these values.
    """
    squares = mean_squares(teacher, counts) if scales is None else scales
    each = [
        functional.mse_loss(counted(s, counts).float(), counted(t, counts).float()) / square.clamp_min(1e-12)
        for s, t, square in zip(student, teacher, squares, strict=True)
    ]
    return torch.stack(each).mean()


def mean_squares(values: Sequence[torch.Tensor], counts: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The mean square of each value, over the positions that count."""
    return [counted(value, counts).float().square().mean() for value in values]


def counted(value: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The positions of an inner value that count; all of them where its leading axes are not those of the mask."""
    return value if counts is None or value.shape[: counts.ndim] != counts.shape else value[counts]
