#!/usr/bin/env python3
"""Prune every architecture of a zoo and write what came of it.

Each entry runs in a process of its own, with a limit of time and memory: trace, discover, prune 30 %
of every prunable group's indices (magnitude, all kinds), proof, ONNX export, onnxruntime against
torch. Results are kept one file per entry, so an interrupted run goes on where it stopped.

    python tools/zoo.py --zoo ../shared/zoo                 all entries, writes docs/coverage.md
    python tools/zoo.py --only dec_llama vis_swin           some of them
    python tools/zoo.py --peer torch-pruning                Torch-Pruning on the same entries, beside

A zoo is a folder with ``zoo.py`` that has ``ENTRIES``: ``name``, ``family``, ``build(**kw)``,
``example_inputs() -> (args, kwargs)``, ``dynamic`` (one ``{axis: name}`` per argument). The last line
is ``N passed, M failed of T traceable``; the exit code is 1 if M > 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import json
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RATIO = 0.3
FLOOR = 0.7
PEER_SECONDS = 20


def main() -> int:
    options = _arguments()
    if not (options.zoo / "zoo.py").is_file():
        print(f"skipped: there is no zoo at {options.zoo}; name one with --zoo or IRPRUNE_SHARED")
        return 0
    entries = _load(options.zoo)
    chosen = [entry for entry in entries if not options.only or any(entry.name == name for name in options.only)]
    unknown = set(options.only) - {entry.name for entry in entries}
    if unknown:
        print(f"no entry is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    jobs = [(entry, kind) for entry in chosen for kind in (["irprune", options.peer] if options.peer else ["irprune"])]
    records = _run(jobs, options)
    ours = [record for record in records if record["tool"] == "irprune"]
    if not options.only:
        options.out.write_text(page(ours, [record for record in records if record["tool"] != "irprune"]), encoding="utf-8")
        print(f"wrote {options.out}")
    print(verdict(ours))
    return 1 if any(record["verdict"] == "failed" for record in ours) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("IRPRUNE_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--zoo", type=Path, default=shared / "zoo", help="folder with zoo.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="entries to run; the page is not written then")
    parser.add_argument("--peer", choices=["torch-pruning"], help="run this tool on the same entries, too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md", help="the page")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "zoo", help="one JSON file per entry; delete to start afresh")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds", type=int, default=200, help="limit of processor time per entry; of time by the clock, four times as much"
    )
    parser.add_argument("--gib", type=float, default=12.0, help="limit of address space growth per entry")
    return parser.parse_args()


def _load(zoo: Path) -> list[Any]:
    """The entries. What takes long to import or to start is started here, once: entries run in forks."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(zoo))
    import onnxruntime
    import transformers
    import zoo as module  # type: ignore[import-not-found]

    import irprune.api as api
    from irprune.backend import onnx

    onnx.convert(api.trace(torch.nn.Linear(2, 2), (torch.zeros(2, 2),)))
    del onnxruntime, transformers
    return list(module.ENTRIES)


# -- running -----------------------------------------------------------------------------------------


def _run(jobs: list[tuple[Any, str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what has no result yet, ``--jobs`` at a time; results in order."""
    context = multiprocessing.get_context("fork")
    waiting = [job for job in jobs if not _file(options, *job).is_file()]
    total, done = len(waiting), 0
    running: list[tuple[Any, str, Any, float]] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            entry, tool = waiting.pop(0)
            process = context.Process(target=_child, args=(entry, tool, options))
            process.start()
            running.append((entry, tool, process, time.monotonic()))
        time.sleep(0.2)
        for item in list(running):
            entry, tool, process, started = item
            seconds = time.monotonic() - started
            late = seconds >= 4 * options.seconds
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            file = _file(options, entry, tool)
            if not file.is_file():
                late = late or process.exitcode == -signal.SIGXCPU
                why = f"no result within {options.seconds} s" if late else f"the process ended with {process.exitcode}"
                _save(
                    file, {"name": entry.name, "family": entry.family, "tool": tool, "verdict": "failed", "error": why, "seconds": seconds}
                )
            running.remove(item)
            done += 1
            record = json.loads(file.read_text())
            print(f"[{done}/{total}] {tool} {line(record)}", flush=True)
    return [json.loads(_file(options, *job).read_text()) for job in jobs]


def _file(options: argparse.Namespace, entry: Any, tool: str) -> Path:
    return options.results / f"{entry.name}.{tool}.json"


def _save(file: Path, record: dict[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.rename(file)


def _child(entry: Any, tool: str, options: argparse.Namespace) -> None:
    log = options.results / f"{entry.name}.{tool}.log"
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else 0
        if used:
            limit = used + int(options.gib * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds + 10))
        started = time.monotonic()
        record: dict[str, Any] = {"name": entry.name, "family": entry.family, "tool": tool}
        try:
            (ours if tool == "irprune" else torch_pruning)(entry, record)
        except Exception as error:
            traceback.print_exc()
            record.setdefault("verdict", "failed")
            record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        record["seconds"] = time.monotonic() - started
        _save(_file(options, entry, tool), record)


# -- irprune -----------------------------------------------------------------------------------------


def ours(entry: Any, record: dict[str, Any]) -> None:
    """The whole chain on one entry; ``record`` says how far it came."""
    import irprune.api as api
    from irprune.analysis.cost import Cost
    from irprune.backend import onnx, runtime
    from irprune.ir.facts import PruneReport

    program = _traced(entry, record)
    if program is None:
        return
    before = Cost(program)
    clock = time.process_time()
    pipeline = f"discover,score{{criterion=magnitude}},prune{{ratio={RATIO} of=indices kinds=all round_to=1}}"
    with tempfile.TemporaryDirectory() as folder:
        result = api.run(program, pipeline, out=f"{folder}/run")
    record["prune_cpu_seconds"] = time.process_time() - clock
    after = Cost(result.program)
    report = next(fact for fact in result.facts if isinstance(fact, PruneReport))
    record |= {"params": [before.params(), after.params()], "macs": [before.macs(), after.macs()], "checks": dict(report.checks)}
    record["share"], record["frozen"] = _share(program)
    record["unknown"] = dict(collections.Counter(d.freeze.message for d in program.typing.diagnostics))
    record["proven"] = True
    record["onnx"] = _exported(entry, program, result.program, onnx, runtime)
    record["verdict"] = "failed" if record["onnx"].startswith("failed") else "passed"


def _traced(entry: Any, record: dict[str, Any]) -> Any:
    """The typed program; with eager attention or static axes where the model allows no other way."""
    import irprune.api as api

    errors = []
    for build, note in (({}, ""), ({"attn": "eager"}, "eager attention")):
        for static in (False, True):
            try:
                module = entry.build(**build)
                args, kwargs = entry.example_inputs()
                names = list(inspect.signature(module.forward).parameters)
                dynamic = {} if static else dict(zip(names, entry.dynamic, strict=False))
                clock = time.process_time()
                program = api.trace(module, args, kwargs, dynamic)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
                continue
            record["trace_cpu_seconds"] = time.process_time() - clock
            record["note"] = ", ".join(filter(None, [note, "static axes" if static else ""]))
            return program
    record["verdict"], record["error"] = "not traceable", errors[0]
    return None


def _share(program: Any) -> tuple[float, dict[str, int]]:
    """The share of parameters that lie in a prunable group, and what froze the others."""
    from irprune.analysis.groups import discover
    from irprune.ir.dims import resolve, variables
    from irprune.rules.registry import op_name

    groups = discover(program)
    free = {group.var for group in groups.prunable}
    inside = total = 0
    reasons: collections.Counter[str] = collections.Counter()
    for name, node in program.holders.items():
        if not program.is_parameter(name):
            continue
        numel = program.tensors[name].numel()
        total += numel
        own = [var for term in program.typing.of(node.name) for var in variables(resolve(term))]
        if any(var in free for var in own):
            inside += numel
        else:
            held = [var.frozen for var in own if var.frozen is not None]
            why = min(held, key=lambda freeze: freeze.code in ("spatial", "unit", "position"), default=None)
            by = op_name(program.by_name[why.node].target) if why is not None and why.node in program.by_name else None
            told = f"{why.code}: {why.message}" if why is not None else "single: it has one index only"
            reasons[f"{told} ({by})" if by and why is not None and why.code != "interface" else told] += numel
    return inside / max(total, 1), dict(reasons)


def _exported(entry: Any, program: Any, pruned: Any, onnx: Any, runtime: Any) -> str:
    """Export and compare; a model whose unpruned program does not export is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = onnx.export(pruned, Path(folder) / "pruned.onnx")
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            try:
                onnx.export(program, Path(folder) / "original.onnx")
            except Exception:
                return f"unpruned does not export: {text}"
            return f"failed to export: {text}"
        try:
            found = runtime.parity(pruned, runtime.Session(file.path, pruned))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            with contextlib.suppress(Exception):
                original = onnx.export(program, Path(folder) / "original.onnx")
                try:
                    runtime.parity(program, runtime.Session(original.path, program))
                except Exception:
                    return f"unpruned does not agree: {text}"
            return f"failed parity: {text}"
        return f"parity {found.max_abs_err:.2g}, allowed {found.tolerance:.2g}"


# -- the peer ----------------------------------------------------------------------------------------


def torch_pruning(entry: Any, record: dict[str, Any]) -> None:
    """Torch-Pruning on the same entry; see ``zoo_peer.py`` beside this file."""
    import zoo_peer

    zoo_peer.run(entry, record, RATIO, PEER_SECONDS, functools.cache(lambda: _traced(entry, {})))


# -- writing -----------------------------------------------------------------------------------------


def line(record: dict[str, Any]) -> str:
    parts = [record["name"], record["verdict"]]
    if "share" in record:
        parts.append(f"prunable {record['share']:.0%}")
    if record.get("onnx"):
        parts.append(f"onnx {record['onnx']}")
    if record.get("error"):
        parts.append(record["error"])
    return "  ".join([*parts, f"{record['seconds']:.0f} s"])


def verdict(records: list[dict[str, Any]]) -> str:
    passed = sum(record["verdict"] == "passed" for record in records)
    failed = sum(record["verdict"] == "failed" for record in records)
    return f"{passed} passed, {failed} failed of {passed + failed} traceable"


def page(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> str:
    """The coverage page."""
    import torch
    import transformers

    traced = [record for record in ours if record["verdict"] != "not traceable"]
    shares = sorted(record["share"] for record in traced if "share" in record)
    exported = [record for record in traced if record.get("onnx", "").startswith("parity")]
    lines = [
        "# Coverage",
        "",
        f"Generated by `python tools/zoo.py{' --peer torch-pruning' if peer else ''}` with torch {torch.__version__.partition('+')[0]} "
        f"and transformers {transformers.__version__}. Tiny random weights; {RATIO:.0%} of the indices of every prunable group removed, "
        "all kinds; proven against the masked, renormalised original; exported to ONNX and compared in onnxruntime. Prunable is the "
        "share of parameters that lie in some prunable group; what holds the others is named with the operation that decided it. "
        "Seconds are of processor time, to trace and to discover, score, prune and prove.",
        "",
        f"- {verdict(ours)}; {len(ours) - len(traced)} of {len(ours)} cannot be traced by `torch.export`.",
        f"- ONNX: {len(exported)} agree with torch; {sum('unpruned' in r.get('onnx', '') for r in traced)} do not export unpruned.",
    ]
    if shares:
        low = [record for record in traced if record.get("share", 1) < FLOOR]
        lines.append(f"- Share of parameters in a prunable group: median {statistics.median(shares):.1%}, least {shares[0]:.1%}.")
        lines.append(f"- Under {FLOOR:.0%}: {', '.join(record['name'] for record in low) or 'none'}.")
    if peer:
        counted = collections.Counter(_peer_class(record) for record in peer)
        lines.append(
            f"- Torch-Pruning on {len(peer)} of these entries by its documentation (`tools/zoo_peer.py` says how): "
            + ", ".join(f"{n} {what}" for what, n in counted.most_common())
            + "."
        )
    beside = {record["name"]: record for record in peer}
    head = ["entry", "verdict", "parameters", "prunable", "frozen or unknown, with parameters", "ONNX", "seconds"] + (
        ["Torch-Pruning"] if peer else []
    )
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in ours:
        before, after = record.get("params", (None, None))
        reasons = [f"{why} ({count:,})" for why, count in sorted(record.get("frozen", {}).items(), key=lambda item: -item[1])]
        reasons += [f"{what} ({count} times)" for what, count in record.get("unknown", {}).items()]
        cells = [
            record["name"] + (f" ({record['note']})" if record.get("note") else ""),
            record["verdict"],
            f"{before:,} → {after:,}" if before else "",
            f"{record['share']:.1%}" if "share" in record else "",
            "; ".join(reasons) or _without_paths(record.get("error", "")),
            _without_paths(record.get("onnx", "")),
            " + ".join(f"{record[key]:.1f}" for key in ("trace_cpu_seconds", "prune_cpu_seconds") if key in record),
        ]
        if peer:
            cells.append(_peer_cell(beside[record["name"]]) if record["name"] in beside else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, "", verdict(ours), ""])


def _without_paths(text: str) -> str:
    """A message without the folders of the machine that it came from."""
    return re.sub(r"/[^ ():]*/(?=[^/ ():]+)", "", text)


def _peer_cell(record: dict[str, Any]) -> str:
    outcome, error = _peer_class(record), _without_paths(record.get("error", ""))
    left = f" ({record['params'][1]:,})" if outcome in ("exact", "runs, numbers not comparable") and "params" in record else ""
    return f"{outcome}{left}" + (f": {error[:90]}" if error and outcome != "does not end" else "")


def _peer_class(record: dict[str, Any]) -> str:
    return record.get("outcome", "does not end" if record.get("error", "").startswith("no result") else "exception")


if __name__ == "__main__":
    sys.exit(main())
