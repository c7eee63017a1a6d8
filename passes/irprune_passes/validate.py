"""Check the ONNX file against the program, and measure what pruning gained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from irprune.analysis.cost import Cost
from irprune.backend.cache import PAST, Cached, cached, real_inputs
from irprune.backend.onnx import Call, OnnxFile
from irprune.backend.runtime import (
    RELATIVE_TOLERANCE,
    Parity,
    Provider,
    Session,
    dynamic_sizes,
    error_of,
    fresh_inputs,
    parity,
    peak_memory,
    precision,
    runner,
    torch_threads,
)
from irprune.backend.timing import Latency, Speedup, sampled
from irprune.errors import IrpruneError, PipelineError, SpeedError, TargetError
from irprune.ir.facts import Note, Original, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.files import unwritable
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import doing
from irprune.rules.infer import typed
from irprune_passes.export import written_as


@dataclass(frozen=True)
class Point:
    """One size at which files were timed.

    Attributes:
        kind: ``call``; with a cache ``prefill`` (all tokens are new) and ``decode`` (one is).
        sizes: Label of each dynamic axis to its size.
        latency: File to latency: ``before``, ``after``, ``int8``.
        speedup: File to speed-up over ``before``, where that was timed.
        ideal: The speed-up if time were arithmetic (multiply-accumulates; for ``decode`` bytes of weights).
        memory_bytes: File to the memory that loading it and one call add to a process of its own.
    """

    kind: Literal["call", "prefill", "decode"]
    sizes: Mapping[str, int]
    latency: Mapping[str, Latency]
    speedup: Mapping[str, Speedup] = field(default_factory=dict)
    ideal: float | None = None
    memory_bytes: Mapping[str, int] = field(default_factory=dict)

    def per_second(self, file: str) -> float:
        """Samples a second; with a cache tokens."""
        each = self.sizes.get("batch", 1)
        if self.kind != "call":
            each *= next((size for label, size in self.sizes.items() if label not in ("batch", PAST)), 1)
        return each * 1000 / self.latency[file].median_ms

    @property
    def place(self) -> str:
        sizes = ", ".join(f"{label} {size}" for label, size in self.sizes.items())
        return f"{self.kind}{f' at {sizes}' if sizes else ''}"

    def described(self) -> dict[str, Any]:
        """As plain data."""
        files = {
            when: {
                "p50_ms": each.median_ms,
                "p95_ms": each.p95_ms,
                "iqr_ms": each.iqr_ms,
                "rounds": each.rounds,
                "per_second": self.per_second(when),
                **({"memory_bytes": self.memory_bytes[when]} if when in self.memory_bytes else {}),
                **({"speedup": dataclasses.asdict(self.speedup[when])} if when in self.speedup else {}),
            }
            for when, each in self.latency.items()
        }
        return {"kind": self.kind, "sizes": dict(self.sizes), "ideal_speedup": self.ideal, "files": files}


@dataclass(frozen=True)
class Validation(Note):
    """What ``validate`` found. ``before`` is the program as traced, ``after`` the one that was exported.

    Attributes:
        parity: onnxruntime against torch, after.
        points: Latency, throughput and memory in onnxruntime by size.
        torch: Latency in torch, before and after.
        file_bytes: Size of the ONNX file with its external data, before and after.
        metrics: What the user's ``evaluate`` says of the ONNX files, before and after.
        int8_error: Error of the file in eight bits over its output, both root mean square, of the worst output.
    """

    parity: Parity
    points: tuple[Point, ...]
    torch: Mapping[str, Latency]
    file_bytes: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    int8_error: float | None = None

    @property
    def onnx(self) -> Mapping[str, Latency]:
        """Latency in onnxruntime at the first size."""
        return self.points[0].latency

    @property
    def ideal_speedup(self) -> float | None:
        """Multiply-accumulates before over after: the speed-up if time were arithmetic."""
        return self.points[0].ideal

    def manifest(self) -> dict[str, Any]:
        speedup: dict[str, Any] = {"ideal": self.ideal_speedup, "torch": _speedup(self.torch)}
        for name, key in (("onnx", "after"), ("int8", "int8")):
            found = self.points[0].speedup.get(key)
            if found is not None:
                speedup |= {name: found.ratio, f"{name}_interval": [found.low, found.high], f"{name}_verdict": found.verdict}
        out: dict[str, Any] = {
            "onnx": {
                "parity_max_abs_err": self.parity.max_abs_err,
                "tolerance": self.parity.tolerance,
                "parity_sizes": [dict(sizes) for sizes in self.parity.sizes],
                "file_bytes": dict(self.file_bytes),
                "points": [point.described() for point in self.points],
                **_times(self.onnx),
            },
            "torch_eager": _times(self.torch),
            "speedup": {name: value for name, value in speedup.items() if value is not None},
        }
        if self.int8_error is not None:
            out["onnx"]["int8_relative_err"] = self.int8_error
        if self.metrics:
            out["metrics"] = {when: dict(values) for when, values in self.metrics.items()}
        return out


def _times(latencies: Mapping[str, Latency]) -> dict[str, dict[str, float]]:
    return {
        "latency_ms": {when: each.median_ms for when, each in latencies.items()},
        "latency_p95_ms": {when: each.p95_ms for when, each in latencies.items()},
        "latency_iqr_ms": {when: each.iqr_ms for when, each in latencies.items()},
        "latency_rounds": {when: each.rounds for when, each in latencies.items()},
    }


def _speedup(latencies: Mapping[str, Latency]) -> float | None:
    return latencies["before"].median_ms / latencies["after"].median_ms if "before" in latencies else None


@dataclass(frozen=True)
class _Subject:
    """A file with what it computes.

    Attributes:
        program: The program.
        cache: The same with a cache, where the file has one.
        session: The file in onnxruntime, called as what it computes.
        size_bytes: Its size.
    """

    program: Program
    cache: Cached | None
    session: Session
    size_bytes: int

    @property
    def computed(self) -> Program:
        return self.cache.program if self.cache is not None else self.program

    @property
    def predict(self) -> Session:
        """The file, called as the program."""
        return self.session.whole(self.program, self.cache) if self.cache is not None else self.session


class Validate(Pass):
    """Compare the ONNX file with the program, then measure file size, latency, memory and quality.

    Parity: onnxruntime against torch on fresh random inputs, every output, at several sizes of every
    dynamic axis; the run fails where they differ. A file in eight bits is not equal; its error is told.
    Latency: the program as traced and the one exported, round by round in turn, in torch and in onnxruntime,
    next to the ideal that the multiply-accumulates promise. The speed-up comes with a bootstrap interval over the
    rounds: *not faster* unless all of it is above one. Quality: the user's ``evaluate`` runs on the ONNX files.

    Raises:
        ParityError: onnxruntime gives something else than torch.
        SpeedError: The speed-up that was required is not sure to be there.
    """

    name: ClassVar = "validate"
    needs: ClassVar = (Workspace, OnnxFile)
    uses: ClassVar = (Task, Original)
    gives: ClassVar = (Validation,)

    batch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Batch sizes for parity; empty: the example's, one more, and 1. Every second one comes with other sizes elsewhere."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Allowed error over an output's largest magnitude; none: by dtype (float32 1e-4, float16 1e-2, bfloat16 5e-2), "
        "or four times what torch itself is off from float64, where that is more.",
    )
    baseline: bool = Field(True, description="Measure the program as traced too.")
    keep_original: bool = Field(False, description="Keep its ONNX file as original.onnx.")
    evaluate: bool = Field(True, description="Run the user's evaluate on the ONNX files.")
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="Batch sizes to time; empty: the example's.")
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Sizes of the other dynamic axes to time, with every batch size; empty: the example's. With a cache: tokens before."
    )
    rounds: int = Field(100, ge=5, description="Most rounds of a latency measurement.")
    seconds: float = Field(5.0, gt=0, description="Time for a latency measurement; there are at least five rounds.")
    clock: Literal["wall", "processor"] = Field(
        "wall", description="Elapsed time, or processor time, which other work on the machine disturbs less; that needs threads=1."
    )
    memory: bool = Field(True, description="Measure the memory that loading the file and one call add to a process.")
    require_speedup: float | None = Field(
        None,
        gt=0,
        description="Fail unless the speed-up in onnxruntime is surely (lower end of its interval) at least this, at every size.",
    )
    threads: int = Field(0, ge=0, description="Threads of torch and of onnxruntime; 0: their own choice.")
    provider: Provider = Field("auto", description="Where onnxruntime runs; auto takes CUDA where it is offered.")

    @model_validator(mode="after")
    def _check_together(self) -> Validate:
        if self.clock == "processor" and self.threads != 1:
            raise ValueError("`clock=processor` adds up all threads: it needs `threads=1`")
        if self.require_speedup is not None and not self.baseline:
            raise ValueError("`require_speedup` needs `baseline`")
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        file, task, original = facts[OnnxFile], facts.get(Task), facts.get(Original)
        seed = task.seed if task is not None else 0
        after = self._subject(file, program)
        coarser = _TOLERANCE[file.precision]
        relative = self.tolerance or (coarser if coarser > RELATIVE_TOLERANCE[precision(program)] else None)
        draw = functools.partial(real_inputs, after.cache, seed=seed) if after.cache is not None else None
        agreed = parity(after.computed, after.session, batch=self.batch, relative_tolerance=relative, seed=seed, inputs=draw)
        subjects = {"after": after}
        error = None
        if file.quantised is not None:
            subjects["int8"] = dataclasses.replace(
                after, session=self._session(file.quantised.path, after.computed), size_bytes=file.quantised.size_bytes
            )
            error = error_of(after.program, subjects["int8"].predict, seed=seed)
        with _beside(facts[Workspace].path, self.keep_original) as path:
            if self.baseline and original is not None and original.program.module is not program.module:
                written = written_as(original.program, path, like=(file.cache, file.precision), opset=file.opset)
                subjects = {"before": self._subject(written, original.program), **subjects}
            elif self.require_speedup is not None:
                raise PipelineError("nothing was pruned, so no speed-up can be required", hint="put `prune` before `export`")
            points = tuple(self._point(subjects, sizes, kind, seed) for kind, sizes in self._sizes(after))
            programs = {when: each.program for when, each in subjects.items() if when != "int8"}
            args, kwargs = fresh_inputs(program.interface, seed=seed)
            with torch_threads(self.threads):
                in_torch = self._latency({when: runner(each, args, kwargs) for when, each in programs.items()})
            metrics = {}
            if self.evaluate and task is not None and task.evaluate is not None:
                metrics = {when: _metrics(task.evaluate, each.predict) for when, each in subjects.items()}
        self._check_speed(points)
        times = {when: Latency.of(samples) for when, samples in in_torch.items()}
        file_bytes = {when: each.size_bytes for when, each in subjects.items()}
        return Result(program, (Validation(agreed, points, times, file_bytes, metrics, error),))

    def _subject(self, file: OnnxFile, program: Program) -> _Subject:
        of = None
        if file.cache:
            made = file.computes
            with doing("cache"):
                of = made[1] if made is not None and made[0].module is program.module else cached(program)
        return _Subject(program, of, self._session(file.path, of.program if of is not None else program), file.size_bytes)

    def _session(self, path: Path, program: Program) -> Session:
        return Session(path, program, threads=self.threads, provider=self.provider)

    def _latency(self, calls: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
        clock = time.process_time if self.clock == "processor" else time.perf_counter
        return dict(zip(calls, sampled(*calls.values(), rounds=self.rounds, seconds=self.seconds, clock=clock), strict=True))

    def _sizes(self, subject: _Subject) -> Iterator[tuple[Literal["call", "prefill", "decode"], dict[str, int]]]:
        """What to time: every batch size with every length."""
        example = dynamic_sizes(subject.program.interface)
        if subject.cache is not None:
            label = subject.cache.sequence
            for batch, length in itertools.product(self.batch_sizes or (example.get("batch", 1),), self.lengths or (example[label],)):
                yield "prefill", {"batch": batch, label: length, PAST: 0}
                yield "decode", {"batch": batch, label: 1, PAST: length}
            return
        others = [label for label in example if label != "batch"]
        batches = self.batch_sizes if "batch" in example else ()
        lengths = self.lengths if others else ()
        for given in itertools.product([{"batch": size} for size in batches] or [{}], [dict.fromkeys(others, n) for n in lengths] or [{}]):
            yield "call", {**example, **given[0], **given[1]}

    def _point(
        self, subjects: Mapping[str, _Subject], sizes: dict[str, int], kind: Literal["call", "prefill", "decode"], seed: int
    ) -> Point:
        calls: dict[str, Call] = {}
        for when, each in subjects.items():
            interface = each.computed.interface
            calls[when] = fresh_inputs(interface, {**sizes, "total": sum(sizes.get(x, 0) for x in sizes if x != "batch")}, seed=seed)
        taken = self._latency({when: each.session.runner(*calls[when][0], **calls[when][1]) for when, each in subjects.items()})
        before = taken.get("before")
        speedup = {when: Speedup.of(before, samples) for when, samples in taken.items() if when != "before"} if before else {}
        memory: dict[str, int] = {}
        if self.memory:
            with doing("memory"):
                for when, each in subjects.items():
                    found = peak_memory(each.session, *calls[when], threads=self.threads)
                    if found is not None:
                        memory[when] = found
        ideal = None
        if "before" in subjects:
            costs = [_cost(subjects[when].program, sizes, kind) for when in ("before", "after")]
            ideal = costs[0] / costs[1] if costs[1] else None
        return Point(kind, sizes, {when: Latency.of(samples) for when, samples in taken.items()}, speedup, ideal, memory)

    def _check_speed(self, points: tuple[Point, ...]) -> None:
        wanted = self.require_speedup
        for point in points if wanted is not None else ():
            found = point.speedup["after"]
            if wanted is not None and found.low < wanted:
                ideal = f"; the ideal is {point.ideal:.3g} times" if point.ideal is not None else ""
                raise SpeedError(
                    f"a speed-up of {wanted:g} is required, and the file is {found.verdict}{ideal}",
                    where=f"onnxruntime, {point.place}",
                    hint="prune more, keep sizes on the provider's multiples with prune{round_to=auto}, or measure longer with `seconds`",
                )


# Converted arithmetic has the tolerance of its type, whatever the program's is.
_TOLERANCE = {"float32": 0.0, "float16": 1e-2}


def _cost(program: Program, sizes: Mapping[str, int], kind: str) -> int:
    """What a call costs: multiply-accumulates at these sizes, or bytes of weights where each serves one token only."""
    of = program if program.types is not None else typed(program)
    if kind == "decode":
        looked_up = sum(
            of.tensors[name].nbytes
            for name, node in of.holders.items()
            if {str(user.target) for user in node.users} == {"aten.embedding.default"}
        )
        return Cost(of).bytes() - looked_up
    example = fresh_inputs(of.interface, sizes)
    return Cost(dataclasses.replace(of, interface=dataclasses.replace(of.interface, example=example))).macs()


@contextmanager
def _beside(folder: Path, keep: bool) -> Iterator[Path]:
    """Where the original's ONNX file goes: into the run directory, or into a folder there that vanishes."""
    if keep:
        yield folder / "original.onnx"
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        vanishing = tempfile.TemporaryDirectory(prefix=".original.", dir=folder)
    except OSError as error:
        raise unwritable(folder, error.strerror or str(error)) from error
    with vanishing as inner:
        yield Path(inner) / "original.onnx"


def _metrics(evaluate: Callable[[Callable[..., Any]], dict[str, float]], session: Session) -> dict[str, float]:
    """The user's metrics of one file, checked."""
    try:
        found = evaluate(session)
    except IrpruneError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TargetError(
            f"evaluate() fails with {type(error).__name__}: {error}",
            where=f"{frame.filename}:{frame.lineno}",
            hint="repair it, or give validate{evaluate=false}",
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) and _is_number(value) for name, value in found.items()):
        raise TargetError(f"evaluate() gives {found!r}, not a dictionary of numbers by name", hint="return a dict[str, float]")
    return {name: float(value) for name, value in found.items()}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
