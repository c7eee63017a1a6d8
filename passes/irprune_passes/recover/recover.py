"""The pass ``recover``."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import distributed
from torch.utils import _pytree as pytree

from irprune.backend.proof import needs_half, wide_tensor, widened
from irprune.errors import DataError, OptionError
from irprune.ir.facts import Fact, Note, Original, PruneReport, Task, Workspace
from irprune.ir.program import Program, set_tensor
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import track
from irprune.rules.infer import typed
from irprune.rules.registry import op_name
from irprune_passes.given import refuse_void
from irprune_passes.lora.adapters import adapters
from irprune_passes.recover import state
from irprune_passes.recover.engine import Engine
from irprune_passes.recover.objective import Objective, Teacher, check_classes, mean_squares

STATE = "recover.safetensors"


@dataclass(frozen=True)
class Recovery(Note):
    """What ``recover`` did, one entry for each time that it ran.

    Attributes:
        runs: What the manifest says of each: ``losses`` by step, ``parts`` of them by name, ``held_out`` as pairs
            of step and objective, ``best``, ``best_step``, ``steps``, ``samples``, ``tokens``, ``trained``
            (parameters), ``seconds``.
    """

    runs: tuple[Mapping[str, Any], ...] = field(default=())

    def manifest(self) -> dict[str, Any]:
        return {"recovery": [dict(run) for run in self.runs]}


class Recover(Pass):
    """Train what is trainable, against the task, against the unpruned program, or both.

    The objective is ``loss * task loss + logits * divergence + hidden * distance``. The divergence is that
    of the first output's class scores from those of the program as traced. The distance is between the
    values that everything flows through (in residual networks, the residual stream at the borders of
    modules) and the original's, of which the kept indices are taken.

    A batch of the calibration data is one micro-batch; micro-batches of a step are weighted by how many
    positions, or else samples, they hold. The last part of the data is held out; the parameters that do best on
    it are what is returned, the ones at the start included. Training is in single precision whatever the
    type of the weights, which are rounded at the end. Norms use their running statistics.

    A training that was killed goes on from its last evaluation if it finds its ``state``. Under ``torchrun`` the
    micro-batches of a step are shared out and gradients are summed: the result is that of one process with
    the whole step.

    Before::  %y = linear(%x, @up.weight)
    After::   the same operations with other weights, and the fact ``Recovery``

    Raises:
        DataError: There is no data or no loss, the weights are not in memory, or the objective is not finite.
        OptionError: There is nothing to train, or an option does not fit the program.
    """

    name: ClassVar[str] = "recover"
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original, PruneReport, Workspace, Recovery)
    gives: ClassVar[tuple[type[Fact], ...]] = (Recovery,)
    changes: ClassVar[bool] = True

    train: Literal["auto", "lora", "all", "norms_and_biases"] = Field(
        "auto", description="Which parameters; auto: adapters where there are any, else all; norms_and_biases: those of one axis."
    )
    loss: float = Field(1.0, ge=0, allow_inf_nan=False, description="Weight of the task's loss.")
    logits: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of the divergence from the unpruned program's class scores.")
    hidden: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of the distance from the unpruned program's inner values.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Divides the class scores that are compared.")
    classes: int = Field(-1, description="Axis of the first output that holds class scores.")
    data: Path | None = Field(None, description="A file of training data, read as calibration data is; none: the calibration data.")
    epochs: float = Field(2.0, gt=0, allow_inf_nan=False, description="How often the data is walked over.")
    steps: int | None = Field(None, ge=1, description="Instead: exactly so many steps.")
    accumulate: int = Field(1, ge=1, description="Micro-batches in a step, of each process.")
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False, description="Highest learning rate; AdamW.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Part of the steps in which the rate rises; then it falls as a cosine, to 0.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Of AdamW.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the gradient of a step.")
    held_out: float = Field(0.1, ge=0, lt=1, description="Part of the batches that is held out; 0: the last parameters are returned.")
    evaluate_every: int | None = Field(None, ge=1, description="Steps between evaluations; none: a tenth of all.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations in a row without a better one.")
    segments: int = Field(1, ge=1, description="Gradient checkpointing: keep activations at the borders of so many segments only.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the arithmetic. bfloat16: by autocast; float32: also where weights or casts of the model are in half precision; "
        "auto: bfloat16 on a GPU that has it, else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto: a GPU where there is one.")
    state: Path | None = Field(None, description="Where the state is kept for going on; none: where --resume finds it (one process).")
    seed: int | None = Field(None, ge=0, description="Seed of order and dropout; none: that of the run.")

    @model_validator(mode="after")
    def _check_together(self) -> Recover:
        if not (self.loss or self.logits or self.hidden):
            raise ValueError("one of `loss`, `logits` and `hidden` must have a weight")
        void = {
            "patience": "held_out=0, which evaluates nothing" if not self.held_out else None,
            "epochs": "`steps`, which says how long to train" if self.steps is not None else None,
            "temperature": "logits=0, which compares no class scores" if not self.logits else None,
            "classes": "logits=0, which compares no class scores" if not self.logits else None,
        }
        refuse_void(self, void)
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        training = _Training(self, program, facts)
        trained, log = training.run()
        out = program.clone()
        for name, tensor in trained.items():
            old = program.tensors[name]
            set_tensor(out.module, name, tensor.detach().to(device=old.device, dtype=old.dtype, copy=True))
        earlier = facts.get(Recovery)
        said = {
            "objective": {name: getattr(self, name) for name in ("loss", "logits", "hidden") if getattr(self, name)},
            "losses": log.losses,
            "parts": log.parts,
            "held_out": [list(pair) for pair in log.held_out],
            "best": log.best,
            "best_step": log.best_step,
            "steps": log.step,
            "samples": log.samples,
            "tokens": log.tokens,
            "trained": sum(tensor.numel() for tensor in trained.values()),
            "seconds": log.seconds,
        }
        return Result(typed(out.clone()), (Recovery((*(earlier.runs if earlier is not None else ()), said)),))


class _Training:
    """One training.

    Args:
        options: The pass.
        program: What is trained.
        facts: Data, loss, the original.
    """

    def __init__(self, options: Recover, program: Program, facts: Facts) -> None:
        self.options = options
        _check_file(options.state)
        _check_data(program)
        self.task = _task(options, facts.get(Task))
        self.seed = options.seed if options.seed is not None else self.task.seed
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        self.device = _device(options.device, program)
        self.batches, self.held = _data(options, self.task)
        names = _trainable(options.train, program)
        self.wide = self._widens(program)
        held = {name: self._widened(tensor.detach().to(self.device)) for name, tensor in program.tensors.items()}
        self.types = {name: held[name].dtype for name in names}
        self.trained = {
            name: (tensor := held.pop(name)).to(torch.promote_types(tensor.dtype, torch.float32), copy=True).requires_grad_()
            for name in names
        }
        self.fixed = held
        self.objective = Objective(
            options.loss, options.logits, options.hidden, options.temperature, options.classes, self.task.loss, self.task.positions
        )
        original = facts.get(Original)
        self.teacher: Teacher | None = None
        if options.logits or options.hidden:
            if original is None:
                raise OptionError("there is no original program to compare with", where="pass recover", hint="use logits=0 hidden=0")
            _check_data(original.program)
            if options.logits:
                check_classes(original.program, options.classes)
            self.teacher = Teacher(
                original.program,
                program,
                facts.get(PruneReport),
                hidden=options.hidden > 0,
                device=self.device,
                wide=self._widens(original.program),
            )
        points = self.teacher.points if self.teacher is not None else []
        self.engine = Engine(program, points, segments=options.segments, device=self.device, dropout=True, wide=self.wide)
        self.tester = Engine(program, points, device=self.device, wide=self.wide)
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=options.lr, weight_decay=options.weight_decay)
        whole = len(self.batches) / (options.accumulate * self.world)
        self.total = options.steps if options.steps is not None else max(1, math.ceil(options.epochs * whole))
        self.every = options.evaluate_every or max(1, self.total // 10)
        # Processes find a state together only where the user named a place that all of them see.
        work = facts.get(Workspace) if self.world == 1 else None
        kept = work.progress / STATE if work is not None and work.progress is not None else None
        self.file = options.state if options.state is not None else kept
        skipped = {"state", "device", "evaluate_every"}
        self.key = state.key_of(
            {**options.model_dump(mode="json", exclude=skipped), "seed": self.seed, "world": self.world, "every": self.every},
            [*self.batches, *self.held],
            {name: program.tensors[name] for name in program.tensors},
        )

    def run(self) -> tuple[dict[str, torch.Tensor], state.Log]:
        """The best parameters, and what happened."""
        self._agree()
        if self.teacher is not None and self.options.hidden:
            self.objective = dataclasses.replace(self.objective, scales=self._scales(self.teacher))
        best = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        found = state.load(self.file, self.key, self.trained, best, self.optimiser) if self.file is not None else None
        log = found or state.Log()
        if found is None and self.held:
            log.held_out.append((0, self._held_out()))
        started = time.monotonic() - log.seconds
        shown = {"loss": float("nan")}

        def label() -> str:
            best_text = f", held out {log.best:.4g}" if log.best is not None else ""
            return f"training, loss {shown['loss']:.4g}{best_text}"

        for step in track(range(log.step, self.total), label, self.total - log.step):
            if self._stopped(log):
                break
            parts = self._step(step, log)
            shown["loss"] = sum(getattr(self.options, name) * value for name, value in parts.items())
            log.losses.append(shown["loss"])
            for name, value in parts.items():
                log.parts.setdefault(name, []).append(value)
            log.step = step + 1
            log.seconds = time.monotonic() - started
            if log.step % self.every == 0 or log.step == self.total:
                self._evaluate(log, best)
                if self.file is not None and self.rank == 0:
                    state.save(self.file, self.key, log, self.trained, best, self.optimiser)
        return best, log

    def _evaluate(self, log: state.Log, best: dict[str, torch.Tensor]) -> None:
        better = True
        if self.held:
            known = log.best
            now = self._held_out()
            log.held_out.append((log.step, now))
            better = known is None or now < known
        if better:
            log.best_step = log.step
            for name, tensor in self.trained.items():
                best[name] = tensor.detach().clone()

    def _stopped(self, log: state.Log) -> bool:
        since = sum(step > log.best_step for step, _ in log.held_out)
        return self.options.patience is not None and since >= self.options.patience

    # -- one step ---------------------------------------------------------------------------------

    def _step(self, step: int, log: state.Log) -> dict[str, float]:
        """One step over all processes. Returns the parts of the objective."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.lr * rate(step, self.total, self.options.warmup)
        chosen = [(place, _moved(self.batches[self._at(place)], self.device)) for place in self._places(step)]
        bound = [(place, batch, *self._inputs(batch)) for place, batch in chosen]
        weights = [self.objective.weight(batch, args, kwargs) for _, batch, args, kwargs in bound]
        whole = sum(weights)
        if whole == 0:
            raise DataError(
                "no position of a step counts in the loss", where="pass recover", hint="shorten the prompts, or raise `sequence`"
            )
        log.samples += sum(_samples(args, kwargs) for _, _, args, kwargs in bound)
        log.tokens += whole if self.task.positions is not None else 0
        self.optimiser.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for number, (place, batch, args, kwargs) in enumerate(bound):
            if number % self.world != self.rank or weights[number] == 0:
                continue
            with _seeded(self.seed, place, self.device):
                parts = self._forward(self.engine, batch, args, kwargs)
                share = weights[number] / whole
                (self.objective.total(parts) * share).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach().float() * share
        return self._updated(step, sums)

    def _updated(self, step: int, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sum over the processes, check, and let the optimiser step."""
        for name in ("loss", "logits", "hidden"):
            if getattr(self.options, name):
                sums.setdefault(name, torch.zeros((), device=self.device))
        for tensor in self.trained.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        if self.world > 1:
            for value in (*(tensor.grad for tensor in self.trained.values()), *(sums[name] for name in sorted(sums))):
                distributed.all_reduce(value)
        parts = {name: float(value) for name, value in sums.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf)
        if not (math.isfinite(sum(parts.values())) and bool(norm.isfinite())):
            told = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
            raise DataError(
                f"the objective is not finite at step {step + 1}: {told}, norm of the gradient {float(norm):.4g}",
                where="pass recover",
                hint="lower `lr`, or use precision=float32",
            )
        self.optimiser.step()
        return parts

    def _forward(self, engine: Engine, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        tensors = {**self.fixed, **{name: tensor.to(self.types[name]) for name, tensor in self.trained.items()}}
        with self._autocast():
            outputs, inner = engine(tensors, args, kwargs)
            teacher = self.teacher(args, kwargs) if self.teacher is not None else None
        # Targets are widened with the outputs: a loss may take one type only.
        return self.objective.parts(outputs, inner, teacher, pytree.tree_map_only(torch.Tensor, self._widened, batch))

    def _held_out(self) -> float:
        """The objective on the held-out batches."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad(), _seeded(self.seed, 0, self.device):
            for number, raw in enumerate(self.held):
                batch = _moved(raw, self.device)
                args, kwargs = self._inputs(batch)
                weight = self.objective.weight(batch, args, kwargs)
                if number % self.world == self.rank and weight:
                    value = self.objective.total(self._forward(self.tester, batch, args, kwargs))
                    sums += torch.tensor([float(value) * weight, weight], dtype=torch.float64, device=self.device)
        if self.world > 1:
            distributed.all_reduce(sums)
        return float(sums[0] / sums[1]) if sums[1] else math.inf

    def _scales(self, teacher: Teacher) -> tuple[torch.Tensor, ...]:
        """The teacher's mean square at each place, on the batches of the first step: the same for every micro-batch."""
        sums, whole = [torch.zeros((), device=self.device) for _ in teacher.points], 0
        for place in self._places(0):
            batch = _moved(self.batches[self._at(place)], self.device)
            args, kwargs = self._inputs(batch)
            weight = self.objective.weight(batch, args, kwargs)
            if weight:
                with _seeded(self.seed, place, self.device), self._autocast():
                    _, values = teacher(args, kwargs)
                found = mean_squares(values, self.objective.counts(batch))
                sums, whole = [total + weight * square for total, square in zip(sums, found, strict=True)], whole + weight
        return tuple(total / max(1, whole) for total in sums)

    # -- which batches ----------------------------------------------------------------------------

    def _places(self, step: int) -> range:
        size = self.options.accumulate * self.world
        return range(step * size, (step + 1) * size)

    def _at(self, place: int) -> int:
        """The batch of a place in the endless sequence of shuffled epochs."""
        epoch, position = divmod(place, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.batches), generator=generator)[position])

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.task.inputs is not None
        return self.task.inputs(batch)

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the type of the arithmetic."""
        return wide_tensor(tensor) if self.wide else tensor

    # -- surroundings -----------------------------------------------------------------------------

    def _agree(self) -> None:
        """All processes start from the first one's parameters."""
        if self.world > 1:
            for tensor in self.trained.values():
                distributed.broadcast(tensor.data, 0)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self._precision == "bfloat16" else contextlib.nullcontext()

    @property
    def _precision(self) -> str:
        if self.options.precision != "auto":
            return self.options.precision
        return "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"

    def _widens(self, program: Program) -> bool:
        """Whether a program computes in half precision somewhere and is to do it in float32."""
        values = (leaf for node in program.nodes for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
        if self._precision != "float32" or all(widened(value.dtype) is value.dtype for value in values):
            return False
        node = needs_half(program)
        if node is not None and self.options.precision == "float32":
            raise OptionError(
                f"option 'precision': float32 is not possible, {op_name(node.target)} needs the types of the trace",
                where=f"pass recover, %{node.name}",
                hint="use precision=auto, or load the model in float32",
            )
        return node is None


def rate(step: int, total: int, warmup: float) -> float:
    """The learning rate of a step over the highest: a linear rise, then half a cosine to 0."""
    rising = round(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _check_file(path: Path | None) -> None:
    """Refuse a place for the state where no file can be, before any work."""
    if path is not None and path.is_dir():
        raise OptionError(f"option 'state': {path} is a directory", where="pass recover", hint=f"name a file, as state={path / STATE}")
    above = next((folder for folder in path.parents if folder.exists()), None) if path is not None else None
    if above is not None and not above.is_dir():
        raise OptionError(f"option 'state': {above} is no directory", where="pass recover", hint="name a file in a directory")


def _check_data(program: Program) -> None:
    """Refuse a program whose weights are not in memory."""
    name = next((name for name, tensor in program.tensors.items() if tensor.is_meta), None)
    if name is None:
        return
    if program.source is not None:
        raise DataError(
            f"training needs the weights in memory, and {name} lies in its file",
            where="pass recover",
            hint="load the model without lazy=true, or use `repair`, which reads weights from their files",
        )
    raise DataError(
        f"{name} is on the meta device and has no values to train", where="pass recover", hint="load the model with its weights"
    )


def _task(options: Recover, task: Task | None) -> Task:
    data = task is not None and (task.calibration is not None or options.data is not None)
    if task is None or task.inputs is None or not data or (options.loss and task.loss is None):
        missing = "a loss" if data else "calibration data"
        raise DataError(
            f"training needs {missing}, which the target does not give",
            where=task.target if task is not None else None,
            hint="add `def calibration()` and `def loss(outputs, batch)` to the model file; without a loss, distil with loss=0 logits=1",
        )
    return task


def _data(options: Recover, task: Task) -> tuple[list[Any], list[Any]]:
    """Batches to train with, and the last ones, which are held out."""
    source = task.calibration
    if options.data is not None:
        if task.read is None:
            raise OptionError("the target reads no data from files", where="pass recover", hint="leave out `data`")
        source = task.read(options.data)
    assert source is not None
    batches = list(source())
    count = max(1, round(len(batches) * options.held_out)) if options.held_out else 0
    if len(batches) <= count:
        raise DataError(
            f"{len(batches)} batches are too few to train with and to hold out {count}",
            where=str(options.data or task.target),
            hint="give more data, or held_out=0",
        )
    return batches[: len(batches) - count], batches[len(batches) - count :]


def _device(wanted: str, program: Program) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OptionError("there is no CUDA device", where="pass recover", hint="use device=auto")
    return torch.device("cuda", torch.cuda.current_device())


def _trainable(which: str, program: Program) -> list[str]:
    parameters = [name for name in program.tensors if program.is_parameter(name) and program.tensors[name].is_floating_point()]
    factors = [name for adapter in adapters(program) for name in (adapter.a, adapter.b)]
    if which == "lora" or (which == "auto" and factors):
        names = factors
    elif which == "norms_and_biases":
        names = [name for name in parameters if program.tensors[name].ndim <= 1]
    else:
        names = parameters
    if not names:
        hint = "put `lora` before it, or choose train=all" if which == "lora" else "choose train=all"
        raise OptionError(f"train={which} finds nothing to train in the program", where="pass recover", hint=hint)
    return names


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    first = next((leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor) and leaf.ndim), None)
    return 1 if first is None else int(first.shape[0])


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(batch)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)


@contextlib.contextmanager
def _seeded(seed: int, place: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the place of a batch only, not on the process that has it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + place) % 2**63)
        yield


__all__: Sequence[str] = ("Recover", "Recovery", "rate")
