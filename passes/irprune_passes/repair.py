"""The pass ``repair``: what is left of a pruned layer is fitted to what the whole layer gave, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import fx

from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, shapes
from irprune.backend.rewrite import Shrink
from irprune.errors import DataError, PipelineError
from irprune.ir.facts import Fact, Note, Original, PruneReport, Task
from irprune.ir.program import Program, set_tensor
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import track
from irprune.rules.infer import typed
from irprune.rules.registry import bind, op_name
from irprune_passes.calibration import flat_batches, seeded
from irprune_passes.given import refuse_void
from irprune_passes.probe import Reader, Walk, damped, readers, spd_solve

_ROUNDING = 1e-12
"""An error below this part of the target's energy is none: it is that of single precision, squared."""
_GAIN = 1e-6
"""A gain below this part of the error may be rounding: it is a sum of products in single precision."""

Method = Literal["bias_fold", "least_squares"]


@dataclass(frozen=True)
class RepairReport(Note):
    """What ``repair`` did.

    Attributes:
        method: The method.
        errors: Name of the operation to the squared error of its output on the calibration data before
            and after, as a part of the target's energy.
        skipped: Why a reader was left as it is, to the weights that this holds for.
    """

    method: str
    errors: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        errors = {name: list(pair) for name, pair in self.errors.items()}
        return {"repair": {"method": self.method, "errors": errors, "skipped": {why: list(names) for why, names in self.skipped.items()}}}


class Repair(Pass):
    """Fit the readers of what was removed to the outputs of the original program.

    Before::  %down: f32[b, s, d0:8] = linear(%hidden, @down.weight)
    After:    the same program with other weights, and the fact ``RepairReport``

    Goes through the pruned and the original program side by side, from reader to reader, so that each
    layer is fitted to what it really reads: the outputs of layers that were pruned and repaired before
    it. With samples ``x`` of the pruned program and targets ``t`` from the original one:

    - ``least_squares`` minimises ``sum |t - W x - b|^2 + damping sum_j |x_j|^2 |W_j - W_kept,j|^2`` over
      ``W``, and over ``b`` where the layer has a bias; ``j`` are features and columns. Without the
      ridge, and for the first layer that was pruned, that is ``W[:, K] = W H[:, K] H[K, K]^-1``.
    - ``bias_fold`` minimises over ``b`` alone: the mean of what was removed goes into the bias.

    The ridge pulls towards the weights that are there, so the error on the calibration data never
    grows. Memory: twice ``8 in^2`` bytes for the layer at work, and the values that are alive between
    two layers, of both programs and for all batches.
    Layers without a bias get none: checkpoint formats know none for them, and ``bias_fold`` leaves
    such a layer as it is and says so.

    The weights that result are not in the recipe. A run that replays it repairs again.

    Raises:
        DataError: There is no calibration data, or it does not fit the model.
    """

    name: ClassVar[str] = "repair"
    needs: ClassVar[tuple[type[Fact], ...]] = (PruneReport,)
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original)
    gives: ClassVar[tuple[type[Fact], ...]] = (RepairReport,)
    changes: ClassVar[bool] = True

    method: Method = Field("least_squares", description="Fit weights and biases, or biases alone.")
    target: Literal["output", "stream"] = Field(
        "stream",
        description="What to match: the original layer's output, or, where the output is added to a stream, the original stream after "
        "the addition, which corrects what earlier layers did to it as well.",
    )
    readers: Literal["pruned", "all"] = Field(
        "pruned", description="Fit the layers that read less than before, or every layer, as all of them read something else than before."
    )
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto",
        description="The ridge, as a part of each feature's energy. auto: for each layer one of four that is best on every "
        "other batch when fitted to the rest; 0.01 where there is only one.",
    )
    batches: int | None = Field(None, ge=1, description="Use at most this many calibration batches. none: all of them.")
    seed: int | None = Field(None, ge=0, description="Seed of operations that draw random numbers. none: that of the run.")

    @model_validator(mode="after")
    def _check_together(self) -> Repair:
        refuse_void(self, {"damping": "method=bias_fold, which fits no weights" if self.method == "bias_fold" else None})
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        task, original = facts.get(Task), facts.get(Original)
        if original is None:
            raise PipelineError("pass 'repair' needs the original program", hint="run it in the same pipeline as `prune` or `apply`")
        before = typed(original.program) if original.program.types is None else original.program
        masks = Recipe(facts[PruneReport].keep, shapes(before)).masks(before, discover(before))
        work = _Work(self, before, program, Shrink(before.typing, masks))
        seed = self.seed if self.seed is not None else task.seed if task is not None else 0
        with seeded(seed), torch.no_grad():
            changed = work.fit(list(flat_batches(before, task, limit=self.batches, purpose="repair")))
        report = RepairReport(self.method, work.errors, {why: tuple(names) for why, names in work.skipped.items()})
        return Result(replaced(program, changed), (report,))


def replaced(program: Program, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The program with other values in some tensors; all else is shared, and the program stays as it is."""
    if not tensors:
        return program
    new = program.clone()
    for name, value in tensors.items():
        set_tensor(new.module, name, value)
    return typed(new)


class _Work:
    """One run of the pass.

    Args:
        options: The options.
        before: The original program.
        after: The pruned program.
        shrink: What was kept.
    """

    def __init__(self, options: Repair, before: Program, after: Program, shrink: Shrink) -> None:
        self.options = options
        self.before = before
        self.after = after
        self.shrink = shrink
        self.errors: dict[str, tuple[float, float]] = {}
        self.skipped: dict[str, list[str]] = {}
        for name, tensor in after.tensors.items():
            if tensor.is_meta and after.source is None:
                raise DataError(
                    "the parameter is on the meta device and has no values to fit", where=name, hint="load the model with its weights"
                )

    def fit(self, batches: Sequence[list[Any]]) -> dict[str, torch.Tensor]:
        """The new tensors by name."""
        changed: dict[str, torch.Tensor] = {}
        whole, pruned = Walk(self.before, batches), Walk(self.after, batches)
        for together in track(self._stops(), "repair"):
            systems = {reader: (self._system(reader, pruned), self._system(reader, pruned)) for reader in together}
            first = together[0]
            pairs = zip(whole.advance(first.node, through=True), pruned.advance(first.node), strict=True)
            fitted, shift = self.options.method == "least_squares", None
            for number, (wanted, found) in enumerate(pairs):
                x = first.samples(found(first.operand))
                if fitted and all(reader.bias is not None for reader in systems):
                    shift = x.mean(1, keepdim=True) if shift is None else shift
                    x = x - shift
                gram = x.mT @ x if fitted else None
                for reader, folds in systems.items():
                    folds[number % 2].add(x, reader.results(self._target(reader, wanted, found)), gram, shift)
            for reader, folds in systems.items():
                changed.update(self._solved(reader, folds, pruned))
        return changed

    def _stops(self) -> list[list[Reader]]:
        """The readers to fit, those together that read the same."""
        out: dict[tuple[Any, ...], list[Reader]] = {}
        for reader in readers(self.after):
            if reader.node not in self.before.by_name or not self._reads_less(reader):
                continue
            why = None if reader.own else "the weight has another use as well"
            if self.options.method == "bias_fold" and reader.bias is None:
                why = why or "the layer has no bias"
            if why is None:
                out.setdefault(reader.view, []).append(reader)
            else:
                self.skipped.setdefault(why, []).append(reader.weight)
        return list(out.values())

    def _reads_less(self, reader: Reader) -> bool:
        if self.options.readers == "all":
            return True
        axes = self.before.typing.axes.get(reader.operand)
        return isinstance(axes, tuple) and self.shrink.touched(axes[reader.axis])

    def _target(self, reader: Reader, wanted: Any, found: Any) -> torch.Tensor:
        """What the reader is to give: the kept part of what the original gives."""
        target = self.shrink.slice(wanted(reader.node), self.before.typing.of(reader.node))
        other = self._added(reader) if self.options.target == "stream" else None
        if other is None:
            return target
        return target + (self.shrink.slice(wanted(other), self.before.typing.of(other)) - found(other))

    def _added(self, reader: Reader) -> str | None:
        """What the output is added to, if that is its only use and was computed before, in both programs."""
        other = _partner(self.after, reader.node)
        return other if other is not None and _partner(self.before, reader.node) == other else None

    def _system(self, reader: Reader, pruned: Walk) -> System:
        matrix = reader.matrix(pruned.tensor(reader.weight).double())
        bias = None if reader.bias is None else pruned.tensor(reader.bias).double().reshape(matrix.shape[0], -1)
        return System(matrix, bias, self.options.method)

    def _solved(self, reader: Reader, folds: tuple[System, System], pruned: Walk) -> dict[str, torch.Tensor]:
        """The new tensors of a reader, if they are better as they are stored."""
        damping = chosen(*folds) if self.options.damping == "auto" else self.options.damping
        system = folds[0].merged(folds[1])
        weight, bias = system.solve(damping)
        old = pruned.tensor(reader.weight)
        new = {reader.weight: reader.weight_of(weight, old).contiguous()}
        if reader.bias is not None and bias is not None:
            new[reader.bias] = bias.reshape(pruned.tensor(reader.bias).shape).to(pruned.tensor(reader.bias).dtype)
        stored = reader.matrix(new[reader.weight].double())
        held = None if reader.bias is None else new[reader.bias].double().reshape(stored.shape[0], -1)
        error, fitted = system.error(system.weight, system.bias), system.error(stored, held)
        energy = max(system.energy, torch.finfo(torch.float64).tiny)
        better = fitted < (1 - _GAIN) * error and error > _ROUNDING * energy
        self.errors[reader.node] = (error / energy, (fitted if better else error) / energy)
        if not better:  # nothing to gain, or lost again in rounding to the weight's type
            return {}
        if self.options.method == "bias_fold":
            del new[reader.weight]
        pruned.replaced.update(new)
        return new


def _partner(program: Program, name: str) -> str | None:
    """The other operand of the addition that is a value's only use, if it is computed before that value and of its shape."""
    node = program.by_name[name]
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if op_name(user.target) not in ("aten::add", "aten::add_"):
        return None
    bound = bind(user.target, user.args, dict(user.kwargs))
    operands = [bound["self"], bound["other"]]
    if bound.get("alpha", 1) != 1 or node not in operands:
        return None
    other = operands[1 - operands.index(node)]
    if not isinstance(other, fx.Node) or other.op == "get_attr":
        return None
    places = {node.name: place for place, node in enumerate(program.nodes)}
    if places[other.name] > places[name] or other.meta["val"].shape != node.meta["val"].shape:
        return None
    return other.name


class System:
    """The least squares problem ``sum |t - W x - b|^2`` of one layer, added up sample by sample.

    What is added up is what the layer as it is leaves over, ``r = t - W x - b``, and the unknown is the step from
    it: products are taken in single precision, and as differences of sums of ``t`` a small error would be lost in
    their rounding. For the same reason inputs may be given about a point near their mean.

    All sums are ``G`` matrices or vectors in double precision; the largest is ``X X^T`` with
    ``8 G in^2`` bytes.

    Args:
        weight: ``(G, out, in)``, double.
        bias: ``(G, out)``, double, or ``None`` where the layer has none.
        method: ``bias_fold`` keeps ``W`` as it is and leaves the large sums out.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, method: Method = "least_squares") -> None:
        self.weight = weight
        self.bias = bias
        self.method = method
        self.count = 0
        self.energy = 0.0
        self._shift: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, x: torch.Tensor, t: torch.Tensor, gram: torch.Tensor | None, shift: torch.Tensor | None = None) -> None:
        """Add samples.

        Args:
            x: Inputs ``(G, n, in)``, less ``shift``.
            t: Targets ``(G, n, out)``.
            gram: ``X X^T`` of these ``x``, where weights are to be fitted.
            shift: ``(G, 1, in)``, the same each time; only of a layer with a bias.
        """
        self.count += x.shape[1]
        self.energy += float(t.square().sum(dtype=torch.float64))
        if shift is not None and self._shift is None:
            self._shift = shift.double()
        wide = x.dtype if gram is not None else torch.float64
        offset = torch.zeros((), dtype=torch.float64) if self.bias is None else self.bias[:, None]
        if self._shift is not None:
            offset = offset + self._shift @ self.weight.mT
        rest = t.to(wide) - (x.to(wide) @ self.weight.to(wide).mT + offset.to(wide))
        self._add("square", rest.square().sum(dtype=torch.float64))
        if self.bias is not None:
            self._add("rest", rest.sum(1, dtype=torch.float64))
        if gram is not None:
            self._add("x", x.sum(1, dtype=torch.float64))
            self._add("xx", gram)
            self._add("rx", rest.mT @ x)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name].add_(value) if name in self._sums else value.double()

    def merged(self, other: System) -> System:
        """This problem with the samples of another one of the same layer, which must not be used any more."""
        if other.count:
            self.count += other.count
            self._shift = self._shift if self._shift is not None else other._shift
            self.energy += other.energy
            for name, value in other._sums.items():
                self._add(name, value)
        return self

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        """The squared error of a weight (with ``bias_fold`` always the layer's own) and a bias."""
        found, means, step = self._sums["square"], self._sums.get("rest"), None
        if self.method == "least_squares":
            step = weight - self.weight
            found = found - 2 * (step * self._sums["rx"]).sum() + ((step @ self._sums["xx"]) * step).sum()
        if bias is not None:
            assert means is not None
            assert self.bias is not None
            moved = bias - self.bias
            if step is not None:
                means = means - _times(step, self._sums["x"])
                moved = moved if self._shift is None else moved + _times(step, self._shift[:, 0])
            found = found - 2 * (moved * means).sum() + self.count * moved.square().sum()
        return max(float(found), 0.0)

    def solve(self, damping: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias that minimise the error, with a ridge of ``damping`` times the diagonal of ``X X^T``.

        With a bias, ``X X^T`` is taken about the mean. The ridge pulls the weight towards the layer's own.
        """
        if self.method == "bias_fold":
            assert self.bias is not None
            return self.weight, self.bias + self._sums["rest"] / self.count
        xx, rx, x = self._sums["xx"], self._sums["rx"], self._sums["x"]
        if self.bias is None:
            return self.weight + spd_solve(damped(xx, damping), rx.mT).mT, None
        rest = self._sums["rest"]
        xx = xx - x[..., :, None] * x[..., None, :] / self.count
        rx = rx - rest[..., :, None] * x[..., None, :] / self.count
        step = spd_solve(damped(xx, damping), rx.mT).mT
        bias = self.bias + (rest - _times(step, x)) / self.count
        return self.weight + step, bias if self._shift is None else bias - _times(step, self._shift[:, 0])


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``(G, out, in)`` times ``(G, in)``."""
    return (matrix @ vector[..., None])[..., 0]


def chosen(first: System, second: System) -> float:
    """The damping that is best on samples that were not fitted: fitted on the first problem, measured on the second."""
    if not (first.count and second.count) or first.method == "bias_fold":
        return DAMPING
    return min(DAMPINGS, key=lambda damping: second.error(*first.solve(damping)))


DAMPING = 0.01
DAMPINGS = (0.003, 0.03, 0.3, 3.0)
