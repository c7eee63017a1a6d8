"""irprune from Python. The command line calls these functions and nothing else.

import irprune

result = irprune.run("model.py", "discover,score,prune{ratio=0.3},export,validate")
result.program, result.manifest, result.path
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from irprune.analysis.cost import Cost
from irprune.analysis.plan import PlanRow, plan_table
from irprune.backend.archive import save_pt2
from irprune.backend.checkpoint import Recipe, save_recipe
from irprune.backend.generate import Decoder, Speed
from irprune.backend.onnx import OnnxFile
from irprune.backend.runtime import Provider
from irprune.errors import DataError, OptionError, PipelineError, ResumeError
from irprune.evaluate import Predictor, evaluation
from irprune.evaluate.evaluation import Evaluation
from irprune.evaluate.perplexity import WINDOW
from irprune.evaluate.tasks import named as tasks_named
from irprune.frontend import export
from irprune.frontend.batches import Binding
from irprune.ir.facts import Fact, Groups, Note, Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program, digest_tensors
from irprune.pipeline import files, manager, manifest, processes, registry
from irprune.pipeline.instruments import Timed, Timing, Untouched
from irprune.pipeline.journal import Journal
from irprune.pipeline.manager import Instrument
from irprune.pipeline.manifest import Manifest
from irprune.pipeline.parser import parse, parse_toml, unparse, write
from irprune.pipeline.passes import Facts, Pass
from irprune.pipeline.progress import doing
from irprune.report import compare as comparing
from irprune.report import data as report_data
from irprune.report import html
from irprune.report.tables import notes
from irprune.rules.infer import typed

RECIPE, ARCHIVE = "recipe.safetensors", "model.pt2"
ONNX = tuple(f"{stem}.onnx{data}" for stem in ("model", "model.int8", "original") for data in ("", ".data"))
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
PAGES = (manifest.NAME, evaluation.NAME, report_data.NAME, html.NAME)
ARTEFACTS = (*PAGES, RECIPE, ARCHIVE, "vocabulary.json", *ONNX, *ADAPTERS, "hf")

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


def load_pretrained(path: str | os.PathLike[str], *, verify: bool = True, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a Hugging Face checkpoint that a run wrote; see :func:`irprune.frontend.hf_pretrained.load_pretrained`."""
    from irprune.frontend import hf_pretrained

    return hf_pretrained.load_pretrained(path, verify=verify, trust_remote_code=trust_remote_code, **options)


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
    source: tuple[Fact, ...] = ()
    if isinstance(target, Program):
        name, program = "program", target
    else:
        name = type(target).__name__
        source = _source(target)
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' for a module", hint="see irprune.api.load for those that exist")
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
        program = export.trace(target, args, kwargs, dynamic)
    codegen = program.module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    binding = Binding(codegen.pytree_info.orig_args[: len(program.interface.example[0])], program.interface)
    batches = calibration if calibration is None or callable(calibration) else lambda: calibration
    task = Task(target=name, calibration=batches, inputs=binding, loss=loss, evaluate=evaluate, seed=seed)
    return _typed(program), (task, *source)


def _source(module: nn.Module) -> tuple[Fact, ...]:
    """A model of transformers can be written as one."""
    if "transformers" not in sys.modules:
        return ()
    from irprune.frontend import hf_pretrained

    return (hf_pretrained.pretrained(module),) if hf_pretrained.is_pretrained(module) else ()


def run(
    target: Target,
    passes: str | Sequence[Pass] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    require_speedup: float | None = None,
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
        resume: Go on with what a killed run left in ``out`` (without one, in the newest unfinished
            ``runs/<target>-<n>``), from its last finished pass; start where nothing was left. What is done
            stays on disk if this process is stopped too, by an error or otherwise.
        require_speedup: The same option of the pass ``validate``.
        instruments: Watchers of the passes.
        seed: Seed of everything random.
        options: As :func:`load` takes them.

    Under ``torchrun`` every process runs the pipeline, passes that train share the work, and the first
    process alone writes the run directory.

    Raises:
        IrpruneError: Anything that the user can do something about. Nothing stays on disk then, except
            with ``resume``.
        ResumeError: What was left is of another run, or damaged; or the run has finished.
    """
    pipeline = _pipeline(passes, config)
    if require_speedup is not None:
        pipeline = _gated(pipeline, require_speedup)
    if dry_run:
        pipeline = _planning(pipeline)
    manager.completed(pipeline, (Task, Original, Workspace))
    if dry_run:
        return _run(*load(target, seed=seed, **options), pipeline, None, instruments)
    place = Path(out) if out is not None else Path("runs") / _stem(target)
    if resume and not force and out is not None and finished(out) is not None:
        raise ResumeError("the run has finished", where=str(out), hint="read its manifest.json, or run it again with --force")
    if not processes.leads():
        with processes.joined(), tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
            return _run(*load(target, seed=seed, **options), pipeline, Path(scratch), instruments)
    staging = files.staged(place, numbered=out is None, force=force, artefacts=ARTEFACTS, last=manifest.NAME, resume=resume)
    with processes.joined(), staging as stage:
        done = _run(*load(target, seed=seed, **options), pipeline, stage.folder, instruments, stage, _given(target, options))
    return dataclasses.replace(done, path=stage.place)


def finished(out: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a directory's run if that has finished; leftovers of its making are removed."""
    place = Path(out)
    if not (place / manifest.NAME).is_file() or (place / files.PART).is_dir():
        return None
    shutil.rmtree(place / files.PARTIAL, ignore_errors=True)
    return Manifest.read(place)


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
    changed = [verb for key, verb in (("recovery", "trained"), ("repair", "repaired")) if key in (old.model_extra or {})]
    changed += ["adapted"] if any(one.name == "lora" for one in old.passes) else []
    if changed:
        raise DataError(
            f"the run {' and '.join(changed)} the weights, which its recipe does not replay",
            where=str(folder),
            hint="put `validate` into the pipeline of the run itself",
        )
    _check_files(folder, old)
    replay = "apply{recipe=" + write(folder / RECIPE) + "}," if (folder / RECIPE).exists() else ""
    pipeline = parse(f"{replay}validate{{{options}}}")
    file = OnnxFile.read(folder, old.onnx.model_extra or {})
    program, facts = load(target, **load_options)
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        return _run(program, (*facts, file, Workspace(Path(scratch))), pipeline, None, instruments)


def report(path: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a run again, from its manifest and its ``report.json``.

    Raises:
        DataError: The directory holds no finished run.
    """
    return html.write(Path(path))


def compare(paths: Sequence[str | os.PathLike[str]], *, out: str | os.PathLike[str] | None = None) -> comparing.Comparison:
    """Runs side by side: sizes, speed and quality, and which of them no other one beats.

    Args:
        paths: Run directories, two or more.
        out: Where a page with the table and its charts goes, if anywhere.

    Raises:
        DataError: A directory holds no finished run.
    """
    done = comparing.compare([Path(path) for path in paths])
    if out is not None:
        files.write_text(out, comparing.render(done))
    return done


def evaluate(
    target: Target,
    *,
    texts: Mapping[str, Path] | Sequence[str] = (),
    tasks: Mapping[str, Path] | Sequence[str] = (),
    tasks_dir: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    tokenizer: Any = None,
    samples: str = "lines",
    window: int = WINDOW,
    windows: int | None = None,
    batch: int = 8,
    limit: int | None = None,
    save: bool = False,
    **options: Any,
) -> Evaluation:
    """Measure a causal language model: perplexity of texts, zero-shot accuracy on tasks.

    Args:
        target: A model file, ``hf:PATH_OR_ID``, a module, a program, a run directory (its ``model.pt2``
            or ``model.onnx``) or an ONNX file.
        texts: Text files by name, or ``FILE`` and ``NAME=FILE``.
        tasks: Task files by name, or ``NAME=FILE``, or names in ``tasks_dir``; needs the extra ``eval``.
        tasks_dir: A directory of task files; all of them, where ``tasks`` names none.
        backend: ``torch``, ``onnx``, or ``auto``: torch where there is a program.
        tokenizer: A ``transformers`` tokenizer, or where one lies; the target's own if it has one.
        samples: What a line of a ``.txt`` file is as a sample: ``lines``, ``rows`` or ``stripped``; see
            :func:`irprune.evaluate.read_text`.
        window: Tokens in a window of text.
        windows: Most windows of each text.
        batch: Windows of text in one call.
        limit: Most documents of each task.
        save: Write ``evaluation.json`` into the run directory.
        options: As :func:`load` takes them.

    Raises:
        IrpruneError: The target, a text or a task cannot be used.
    """
    named = texts if isinstance(texts, Mapping) else evaluation.named_texts(texts)
    chosen = tasks if isinstance(tasks, Mapping) else tasks_named(tasks, Path(tasks_dir) if tasks_dir is not None else None)
    sizes = {"window": window, "windows": windows, "batch": batch, "limit": limit}
    questions = evaluation.Questions.read(named, chosen, samples=samples, **sizes)
    if backend not in evaluation.BACKENDS:
        raise OptionError(f"there is no backend '{backend}'", hint=f"give {', '.join(evaluation.BACKENDS)}")
    place = Path(os.fspath(target)) if isinstance(target, str | os.PathLike) else None
    folder = place if place is not None and place.is_dir() else None
    if save and folder is None:
        raise OptionError("only the evaluation of a run directory can be saved in it", hint="print it with --json instead")
    name = os.fspath(target) if isinstance(target, str | os.PathLike) else type(target).__name__
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        tokenizer = evaluation.tokenizer_of(name, None if tokenizer is None else os.fspath(tokenizer), **options)
    if place is not None:
        tokenizer = evaluation.as_trimmed(tokenizer, name)
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        if folder is not None:
            predict, used = evaluation.of_run(folder, backend)
        elif place is not None and place.suffix == ".onnx":
            if backend == "torch":
                raise OptionError("an ONNX file runs in onnxruntime only", hint="leave out --backend, or name its run directory")
            predict, used = Predictor.onnx(place), "onnx"
        else:
            predict, used = evaluation.of_program(load(target, **options)[0], backend, Path(scratch))
        done = evaluation.evaluated(predict, tokenizer, questions, target=name, backend=used)
    if save and folder is not None:
        done.write(folder)
    return done


@dataclass(frozen=True)
class Generated:
    """What a decoder wrote.

    Attributes:
        tokens: The new tokens.
        text: Prompt and new tokens as text; ``None`` without a tokenizer.
        speed: How long it took.
    """

    tokens: tuple[int, ...]
    text: str | None
    speed: Speed


def generate(
    model: str | os.PathLike[str],
    prompt: str | Sequence[int],
    *,
    tokens: int = 64,
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int = 0,
    provider: Provider = "auto",
) -> Generated:
    """Go on from a prompt with an ONNX file that has a key-value cache, by greedy decoding.

    Args:
        model: The file, written with ``export{cache=true}``.
        prompt: Text, or tokens.
        tokens: Most new tokens; the tokenizer's end token ends it sooner.
        tokenizer: Directory or hub id of the tokenizer; the model's own directory by default.
        threads: Threads of onnxruntime; 0: its own choice.
        provider: Where it runs.

    Raises:
        DataError: The file has no cache, or there is no tokenizer for a text.
    """
    path = Path(model)
    decoder = Decoder(path, threads=threads, provider=provider)
    reads = None
    if isinstance(prompt, str) or tokenizer is not None:
        from irprune.frontend.hf_checkpoint import tokenizer_of

        reads = tokenizer_of(os.fspath(tokenizer) if tokenizer is not None else os.fspath(path.parent))
    ids = [int(token) for token in (reads(prompt)["input_ids"] if reads is not None and isinstance(prompt, str) else prompt)]
    stop = () if reads is None or reads.eos_token_id is None else (int(reads.eos_token_id),)
    found = tuple(decoder.greedy(ids, tokens, stop))
    return Generated(found, reads.decode([*ids, *found], skip_special_tokens=True) if reads is not None else None, decoder.speed)


def groups(target: Target, *, freeze: Sequence[str] = (), **options: Any) -> tuple[Program, Groups]:
    """A target's typed program and its groups, as the pass ``discover`` finds them."""
    program, facts = load(target, **options)
    discover = registry.find("discover").model_validate({"freeze": freeze})
    program, found = manager.run([discover], program, facts)
    return program, found[Groups]


def _run(
    program: Program,
    facts: Iterable[Fact],
    pipeline: Sequence[Pass],
    folder: Path | None,
    instruments: Sequence[Instrument],
    stage: files.Stage | None = None,
    given: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Run a pipeline on a loaded target and fill the run directory, if there is one."""
    original, timing, seen = program, Timing(), report_data.Observed()
    known: list[Fact] = [*facts, Original(original)]
    if folder is not None:
        known.append(Workspace(folder))
    journal = None
    if stage is not None:
        steps = manager.completed(pipeline, [type(fact) for fact in known])
        journal = Journal.at(stage.folder, original, steps, Facts(known).get(Task), resume=stage.resumed, given=given)
    program, found = manager.run(pipeline, program, known, [timing, Untouched(), seen, *instruments], journal)
    program = _typed(program)
    if stage is not None and stage.complete:
        told = Manifest.read(stage.folder if (stage.folder / manifest.NAME).is_file() else stage.place)
        return Run(program, told, None, found, tuple(timing.steps))
    task, report, plan = found.get(Task), found.get(PruneReport), found.get(Plan)
    if folder is not None and report is not None:
        save_recipe(folder / RECIPE, Recipe.of(report, original, task.target if task else ""))
    if folder is not None and not any(tensor.is_meta for tensor in program.tensors.values()):
        with doing("archive"):
            save_pt2(program, folder / ARCHIVE)
    if folder is not None:
        with doing("figures"):
            report_data.collect(original, program, seen, found).write(folder)
    told = Manifest.model_validate(
        {
            "target": task.target if task else "",
            "seed": task.seed if task else 0,
            "pipeline": unparse(step.of for step in timing.steps),
            "passes": manifest.applied(timing.steps),
            "model": {"before": _size(original), "after": _size(program)},
            "notes": list(dict.fromkeys([*notes(original), *(task.said if task else ())])),
            **manifest.noted(found),
        }
    )
    if folder is not None:
        for fact in found:
            if isinstance(fact, Note) and hasattr(fact, "complete"):
                fact.complete(told)
        told = told.model_copy(update={"files": manifest.hashes(folder)})
        with doing("report"):
            html.write(folder, told)
        # Last, so that a run with a manifest is a whole one.
        told.write(folder)
    rows = tuple(plan_table(plan, found[Groups], Cost(program))) if plan is not None else None
    return Run(program, told, None, found, tuple(timing.steps), rows)


def _given(target: Target, options: Mapping[str, Any]) -> dict[str, str]:
    """What a run was started with and its program does not show: how a target that is named is loaded, and its calibration.

    Batches that can be read only in turn (a loader, a function) may come in another order each time and are not compared.
    """
    calibration = options.get("calibration")
    found = {}
    if isinstance(calibration, str | os.PathLike) and Path(calibration).is_file():
        found["calibration"] = files.sha256(calibration)
    elif isinstance(calibration, list | tuple):
        digest = hashlib.sha256()
        for leaf in pytree.tree_leaves(calibration):
            if isinstance(leaf, torch.Tensor):
                digest_tensors(digest, [("", leaf)])
            else:
                digest.update(repr(leaf).encode())
        found["calibration"] = digest.hexdigest()
    if isinstance(target, str | os.PathLike):
        plain = (f"{name}={value}" for name, value in sorted(options.items()) if name != "calibration" and isinstance(value, _PLAIN))
        found["setting"] = " ".join(plain)
    return found


_PLAIN = (bool, int, float, str)


def _pipeline(passes: str | Sequence[Pass] | None, config: str | os.PathLike[str] | None) -> list[Pass]:
    if (passes is None) == (config is None):
        found = "no pipeline is given" if passes is None else "the pipeline is given twice"
        raise OptionError(found, hint='give it as text with --passes "discover,score,prune{ratio=0.2}" or as a TOML file with --config')
    if config is not None:
        return parse_toml(Path(config))
    return parse(passes) if isinstance(passes, str) else list(passes or ())


def _gated(pipeline: Sequence[Pass], speedup: float) -> list[Pass]:
    """The pipeline whose pass ``validate`` requires a speed-up."""
    if not any(one.name == "validate" for one in pipeline):
        raise PipelineError("a speed-up can be required only where it is measured", hint="put `export,validate` at the end of the pipeline")
    gate = {"require_speedup": speedup}
    return [type(one).model_validate({**one.model_dump(), **gate}) if one.name == "validate" else one for one in pipeline]


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
