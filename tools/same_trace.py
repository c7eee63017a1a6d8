#!/usr/bin/env python3
"""Is a trace that runs equal layers once the same as one that runs them all?

    python tools/same_trace.py [--zoo ../shared/zoo] [--only NAME ...]

Every entry of a zoo (a folder with ``zoo.py``, as ``tools/zoo.py`` describes it) is traced both ways. Compared are
the operations in their order with their operands, sizes and modules, and names and axes of the interface; constants
by their contents. Prints the processor seconds of both, a line per entry, and exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.fx.node import map_aggregate

from irprune.errors import IrpruneError
from irprune.frontend.export import trace
from irprune.frontend.repeats import Repeats
from irprune.ir.program import Program, attribute, content

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("IRPRUNE_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--zoo", type=Path, default=shared / "zoo", help="folder with zoo.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="entries to trace")
    options = parser.parse_args()
    if not (options.zoo / "zoo.py").is_file():
        print(f"skipped: there is no zoo at {options.zoo}; name one with --zoo or IRPRUNE_SHARED")
        return 0
    torch.set_num_threads(1)
    sys.path.insert(0, str(options.zoo))
    import zoo  # type: ignore[import-not-found]

    same, total, seconds = 0, 0, [0.0, 0.0]
    for entry in zoo.ENTRIES:
        if options.only and entry.name not in options.only:
            continue
        module = entry.build()
        args, kwargs = entry.example_inputs()
        with mock.patch.object(Repeats, "possible", False):
            whole, all_run = traced(module, args, kwargs)
        found, once = traced(module, args, kwargs)
        total += 1
        same += found == whole
        seconds = [seconds[0] + all_run, seconds[1] + once]
        print(f"{'same' if found == whole else 'DIFFERS'}  {entry.name}  {all_run:.1f} s, equal layers once {once:.1f} s", flush=True)
    print(f"{same} of {total} traces are the same; {seconds[0]:.0f} s with every layer run, {seconds[1]:.0f} s with equal layers once")
    return 0 if same == total else 1


def traced(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
    """What is compared of a trace, or the error that it ends with, and its processor seconds."""
    start = time.process_time()
    try:
        program = trace(module, args, kwargs)
    except IrpruneError as error:
        return str(error), time.process_time() - start
    return text(program, dict(module.named_parameters()) | dict(module.named_buffers())), time.process_time() - start


def text(program: Program, weights: dict[str, torch.Tensor]) -> Any:
    """A program without the names of its values."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            names[node] = name if name in weights else hashlib.sha256(content(attribute(program.module, name))).hexdigest()
            continue
        names[node] = f"%{len(lines)}"
        operands = map_aggregate((node.args, node.kwargs), lambda value: names[value] if isinstance(value, fx.Node) else value)
        value = node.meta.get("val")
        modules = tuple((node.meta.get("nn_module_stack") or {}).values())
        lines.append((node.op, str(node.target), str(operands), str(getattr(value, "shape", value)), modules))
    interface = program.interface
    return lines, interface.inputs, interface.outputs, interface.dynamic, interface.notes, dict(program.aliases)


if __name__ == "__main__":
    sys.exit(main())
