"""irprune from Python. The command line calls these functions and nothing else.

import irprune

result = irprune.run("model.py", "discover,score,prune{ratio=0.3},export,validate")
result.program, result.manifest, result.path
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx.graph import _PyTreeCodeGen

from irprune.analysis.cost import Cost
from irprune.analysis.plan import PlanRow, plan_table
from irprune.backend.archive import save_pt2
from irprune.backend.checkpoint import Recipe, save_recipe
from irprune.backend.onnx import OnnxFile
from irprune.errors import DataError, OptionError, PipelineError
from irprune.frontend import export
from irprune.frontend.batches import Binding
from irprune.ir.facts import Fact, Groups, Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline import files, manager, manifest, registry
from irprune.pipeline.instruments import Timed, Timing, Untouched
from irprune.pipeline.manager import Instrument
from irprune.pipeline.manifest import Manifest
from irprune.pipeline.parser import parse, parse_toml, unparse, write
from irprune.pipeline.passes import Facts, Pass
from irprune.pipeline.progress import doing
from irprune.report.tables import notes
from irprune.rules.infer import typed

RECIPE, ARCHIVE = "recipe.safetensors", "model.pt2"
ARTEFACTS = (manifest.NAME, RECIPE, ARCHIVE, "vocabulary.json", "model.onnx", "model.onnx.data", "original.onnx", "original.onnx.data")

Target = str | os.PathLike[str] | nn.Module | Program


@dataclass(frozen=True)
class Run:
    """What a run gives.

    Attributes:
        program: The program that the last pass returned.
        manifest: What was done, in numbers.
        path: The run directory; ``None`` where nothing was written.
        facts: What is known about the program.
        steps: The passes that ran, with their times.
        plan: In a dry run: what would go, per group; ``None`` in a real one.
    """

    program: Program
    manifest: Manifest
    path: Path | None
    facts: Facts
    steps: tuple[Timed, ...]
    plan: tuple[PlanRow, ...] | None = None


def trace(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """Trace a model to a program with dimension terms; see :func:`irprune.frontend.export.trace`."""
    return typed(export.trace(module, args, kwargs, dynamic))


@doing("load and trace")
def load(
    target: Target,
    *,
    seed: int = 0,
    calibration: Any = None,
    example_inputs: Any = (),
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    evaluate: Callable[[Callable[..., Any]], dict[str, float]] | None = None,
    **options: Any,
) -> tuple[Program, tuple[Fact, ...]]:
    """A target as a typed program with what is known about it.

    Args:
        target: A model file, ``hf:PATH_OR_ID``, a module or a program.
        seed: Seed of everything random.
        calibration: A file for a target that is named; for a module an iterable of batches that can be
            walked over more than once, or a function that gives one.
        example_inputs: A module's inputs: a tuple, or a dictionary by keyword.
        dynamic: A module's dynamic axes, as :func:`irprune.frontend.export.trace` takes them.
        loss: A module's loss: outputs and batch to a scalar.
        evaluate: A module's metrics: a predictor to numbers by name.
        options: Those of :func:`irprune.frontend.target.load` for a target that is named.
    """
    if isinstance(target, str | os.PathLike):
        from irprune.frontend import target as targets

        own = {"example_inputs": example_inputs, "dynamic": dynamic, "loss": loss, "evaluate": evaluate}
        options.update({name: value for name, value in own.items() if value not in (None, ())})
        program, facts = targets.load(os.fspath(target), calibration=calibration, seed=seed, **options)
        return _typed(program), facts
    if isinstance(target, Program):
        name, program = "program", target
    else:
        name = type(target).__name__
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' for a module", hint="see irprune.api.load for those that exist")
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
        program = export.trace(target, args, kwargs, dynamic)
    codegen = program.module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    binding = Binding(codegen.pytree_info.orig_args[: len(program.interface.example[0])], program.interface)
    batches = calibration if calibration is None or callable(calibration) else lambda: calibration
    task = Task(target=name, calibration=batches, inputs=binding, loss=loss, evaluate=evaluate, seed=seed)
    return _typed(program), (task,)


def run(
    target: Target,
    passes: str | Sequence[Pass] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    instruments: Sequence[Instrument] = (),
    seed: int = 0,
    **options: Any,
) -> Run:
    """Run a pipeline on a target and write the run directory.

    Args:
        target: A model file, ``hf:PATH_OR_ID``, a module or a program.
        passes: The pipeline, as text or as passes.
        config: The pipeline as a TOML file, instead of ``passes``.
        out: The run directory; the first free ``runs/<target>-<n>`` if none is given.
        force: Replace what an earlier run left in ``out``.
        dry_run: Stop at the first pass that would change the program, and give its plan instead.
        instruments: Watchers of the passes.
        seed: Seed of everything random.
        options: As :func:`load` takes them.

    Raises:
        IrpruneError: Anything that the user can do something about. Nothing stays on disk then.
    """
    pipeline = _pipeline(passes, config)
    if dry_run:
        pipeline = _planning(pipeline)
    manager.completed(pipeline, (Task, Original, Workspace))
    if dry_run:
        return _run(*load(target, seed=seed, **options), pipeline, None, instruments)
    place = Path(out) if out is not None else Path("runs") / _stem(target)
    with files.staged(place, numbered=out is None, force=force, artefacts=ARTEFACTS, last=manifest.NAME) as stage:
        done = _run(*load(target, seed=seed, **options), pipeline, stage.folder, instruments)
    return dataclasses.replace(done, path=stage.place)


def validate(
    path: str | os.PathLike[str], target: Target, *, options: str = "", instruments: Sequence[Instrument] = (), **load_options: Any
) -> Run:
    """Check the ONNX file of an earlier run again: parity, latency, quality.

    The program to compare with comes from the target and the run's recipe, so nothing is unpickled.

    Args:
        path: The run directory.
        target: What was pruned.
        options: Options of the pass ``validate``, as ``seconds=2 baseline=false``.
        instruments: Watchers of the passes.
        load_options: As :func:`load` takes them.

    Raises:
        DataError: The directory holds no finished run, or a file is not the one that the run wrote.
        ParityError: The file computes something else.
    """
    folder = Path(path)
    old = Manifest.read(folder)
    if old.onnx is None:
        raise DataError("the run wrote no ONNX file", where=str(folder), hint="run the target again with the pass export")
    _check_files(folder, old)
    replay = "apply{recipe=" + write(folder / RECIPE) + "}," if (folder / RECIPE).exists() else ""
    pipeline = parse(f"{replay}validate{{{options}}}")
    said = old.onnx.model_extra or {}
    file = OnnxFile(folder / said["file"], said["opset"], said["inputs"], said["outputs"], said["size_bytes"], tuple(said["external_data"]))
    program, facts = load(target, **load_options)
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        return _run(program, (*facts, file, Workspace(Path(scratch))), pipeline, None, instruments)


def groups(target: Target, *, freeze: Sequence[str] = (), **options: Any) -> tuple[Program, Groups]:
    """A target's typed program and its groups, as the pass ``discover`` finds them."""
    program, facts = load(target, **options)
    discover = registry.find("discover").model_validate({"freeze": freeze})
    program, found = manager.run([discover], program, facts)
    return program, found[Groups]


def _run(program: Program, facts: Iterable[Fact], pipeline: Sequence[Pass], folder: Path | None, instruments: Sequence[Instrument]) -> Run:
    """Run a pipeline on a loaded target and fill the run directory, if there is one."""
    original, timing = program, Timing()
    known: list[Fact] = [*facts, Original(original)]
    if folder is not None:
        known.append(Workspace(folder))
    program, found = manager.run(pipeline, program, known, [timing, Untouched(), *instruments])
    program = _typed(program)
    task, report, plan = found.get(Task), found.get(PruneReport), found.get(Plan)
    if folder is not None and report is not None:
        save_recipe(folder / RECIPE, Recipe.of(report, original, task.target if task else ""))
    if folder is not None and not any(tensor.is_meta for tensor in program.tensors.values()):
        with doing("archive"):
            save_pt2(program, folder / ARCHIVE)
    written = Manifest.model_validate(
        {
            "target": task.target if task else "",
            "seed": task.seed if task else 0,
            "pipeline": unparse(step.of for step in timing.steps),
            "passes": manifest.applied(timing.steps),
            "model": {"before": _size(original), "after": _size(program)},
            "files": manifest.hashes(folder) if folder is not None else {},
            "notes": notes(original),
            **manifest.noted(found),
        }
    )
    if folder is not None:
        written.write(folder)
    rows = tuple(plan_table(plan, found[Groups], Cost(program))) if plan is not None else None
    return Run(program, written, None, found, tuple(timing.steps), rows)


def _pipeline(passes: str | Sequence[Pass] | None, config: str | os.PathLike[str] | None) -> list[Pass]:
    if (passes is None) == (config is None):
        found = "no pipeline is given" if passes is None else "the pipeline is given twice"
        raise OptionError(found, hint='give it as text with --passes "discover,score,prune{ratio=0.2}" or as a TOML file with --config')
    if config is not None:
        return parse_toml(Path(config))
    return parse(passes) if isinstance(passes, str) else list(passes or ())


def _planning(pipeline: Sequence[Pass]) -> list[Pass]:
    """The pipeline up to its first pass that changes the program, which is told to plan only."""
    for number, one in enumerate(pipeline):
        if one.changes and "dry_run" in type(one).model_fields:
            return [*pipeline[:number], one.model_copy(update={"dry_run": True})]
        if one.changes:
            raise PipelineError(f"pass '{one.name}' cannot plan without changing the program", hint="leave out --dry-run")
    raise PipelineError("no pass of the pipeline changes the program, so there is nothing to plan", hint="add prune{ratio=...}")


def _check_files(folder: Path, of: Manifest) -> None:
    """The files are those that the run wrote."""
    for name, file in of.files.items():
        path = folder / name
        problem = "is missing" if not path.is_file() else "is not the one that the run wrote" if files.sha256(path) != file.sha256 else None
        if problem is not None:
            raise DataError(f"the file {problem}", where=str(path), hint="run the target again")


def _typed(program: Program) -> Program:
    return program if program.types is not None else typed(program)


def _size(program: Program) -> dict[str, int]:
    cost = Cost(program)
    return {"params": cost.params(), "macs": cost.macs(), "bytes": cost.bytes()}


def _stem(target: Target) -> str:
    """The name of a target in that of its run directory."""
    if isinstance(target, str | os.PathLike):
        return Path(os.fspath(target).removeprefix("hf:")).name.removesuffix(".py") or "run"
    return "program" if isinstance(target, Program) else type(target).__name__.lower()
