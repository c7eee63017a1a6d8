"""Check the ONNX file against the program, and measure what pruning gained."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from irprune.analysis.cost import Cost
from irprune.backend.onnx import OnnxFile, export
from irprune.backend.runtime import Latency, Parity, Provider, Session, fresh_inputs, latency, parity, runner, torch_threads
from irprune.errors import IrpruneError, TargetError
from irprune.ir.facts import Note, Original, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.files import unwritable
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.rules.infer import typed


@dataclass(frozen=True)
class Validation(Note):
    """What ``validate`` found. ``before`` is the program as traced, ``after`` the one that was exported.

    Attributes:
        parity: onnxruntime against torch, after.
        onnx: Latency in onnxruntime, before and after.
        torch: Latency in torch, before and after.
        file_bytes: Size of the ONNX file with its external data, before and after.
        metrics: What the user's ``evaluate`` says of the ONNX files, before and after.
        ideal_speedup: Multiply-accumulates before over after: the speed-up if time were arithmetic.
    """

    parity: Parity
    onnx: Mapping[str, Latency]
    torch: Mapping[str, Latency]
    file_bytes: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ideal_speedup: float | None = None

    def manifest(self) -> dict[str, Any]:
        speedup = {"ideal": self.ideal_speedup, "onnx": _speedup(self.onnx), "torch": _speedup(self.torch)}
        found: dict[str, Any] = {
            "onnx": {
                "parity_max_abs_err": self.parity.max_abs_err,
                "tolerance": self.parity.tolerance,
                "parity_sizes": [dict(sizes) for sizes in self.parity.sizes],
                "file_bytes": dict(self.file_bytes),
                **_times(self.onnx),
            },
            "torch_eager": _times(self.torch),
            "speedup": {name: ratio for name, ratio in speedup.items() if ratio is not None},
        }
        if self.metrics:
            found["metrics"] = {when: dict(values) for when, values in self.metrics.items()}
        return found


def _times(latencies: Mapping[str, Latency]) -> dict[str, dict[str, float]]:
    return {
        "latency_ms": {when: each.median_ms for when, each in latencies.items()},
        "latency_iqr_ms": {when: each.iqr_ms for when, each in latencies.items()},
        "latency_rounds": {when: each.rounds for when, each in latencies.items()},
    }


def _speedup(latencies: Mapping[str, Latency]) -> float | None:
    return latencies["before"].median_ms / latencies["after"].median_ms if "before" in latencies else None


class Validate(Pass):
    """Compare the ONNX file with the program, then measure file size, latency and quality.

    Parity: onnxruntime against torch on fresh random inputs, every output, at several sizes of every
    dynamic axis; the run fails where they differ. Latency: the program as traced and the one exported,
    side by side in torch and in onnxruntime, next to the ideal that the multiply-accumulates promise.
    Quality: the user's ``evaluate`` runs on both ONNX files.
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
        description="Allowed error over an output's largest magnitude; none: by dtype (float32 1e-4, float16 1e-2, bfloat16 5e-2).",
    )
    baseline: bool = Field(True, description="Measure the program as traced too.")
    keep_original: bool = Field(False, description="Keep its ONNX file as original.onnx.")
    evaluate: bool = Field(True, description="Run the user's evaluate on the ONNX files.")
    rounds: int = Field(100, ge=5, description="Most rounds of a latency measurement.")
    seconds: float = Field(5.0, gt=0, description="Time for a latency measurement; there are at least five rounds.")
    threads: int = Field(0, ge=0, description="Threads of torch and of onnxruntime; 0: their own choice.")
    provider: Provider = Field("auto", description="Where onnxruntime runs; auto takes CUDA where it is offered.")

    def run(self, program: Program, facts: Facts) -> Result:
        file, task, original = facts[OnnxFile], facts.get(Task), facts.get(Original)
        session = self._session(file.path, program)
        seed = task.seed if task is not None else 0
        agreed = parity(program, session, batch=self.batch, relative_tolerance=self.tolerance, seed=seed)
        programs, sessions, sizes = {"after": program}, {"after": session}, {"after": file.size_bytes}
        with _beside(facts[Workspace].path, self.keep_original) as path:
            if self.baseline and original is not None and original.program.module is not program.module:
                written = export(original.program, path, opset=file.opset)
                programs = {"before": original.program, **programs}
                sessions = {"before": self._session(path, original.program), **sessions}
                sizes = {"before": written.size_bytes, **sizes}
            args, kwargs = fresh_inputs(program.interface, seed=seed)
            with torch_threads(self.threads):
                in_torch = self._latency({when: runner(each, args, kwargs) for when, each in programs.items()})
            in_onnx = self._latency({when: each.runner(*args, **kwargs) for when, each in sessions.items()})
            metrics = {}
            if self.evaluate and task is not None and task.evaluate is not None:
                metrics = {when: _metrics(task.evaluate, each) for when, each in sessions.items()}
        macs = {when: Cost(each if each.types is not None else typed(each)).macs() for when, each in programs.items()}
        ideal = macs["before"] / macs["after"] if "before" in macs and macs["after"] else None
        return Result(program, (Validation(agreed, in_onnx, in_torch, sizes, metrics, ideal),))

    def _session(self, path: Path, program: Program) -> Session:
        return Session(path, program, threads=self.threads, provider=self.provider)

    def _latency(self, calls: Mapping[str, Callable[[], None]]) -> dict[str, Latency]:
        return dict(zip(calls, latency(*calls.values(), rounds=self.rounds, seconds=self.seconds), strict=True))


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
