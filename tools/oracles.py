#!/usr/bin/env python3
"""Compare pruned parameter counts with published ones, on full-size models without weights.

The numbers are those of LLM-Pruner (arXiv 2305.11627): the paper's 5.42, 3.35, 5.39 and 3.37 billion for
LLaMA-7B and its repository's figures for Llama-3-8B and TinyLlama, all exact. Each model is traced once on
the meta device and pruned as a user would: discover, score, prune. The removal is carried out and its shapes
are proven; the parameters are counted on the tensors of what is left, and the cost model must agree.

Exits with 1 where a number differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from shapes import DYNAMIC, SHAPES, on_meta

import irprune.api as irprune
from irprune.analysis.cost import Cost
from irprune.errors import IrpruneError
from irprune.ir.facts import Groups, PruneReport
from irprune.ir.program import Program
from irprune.pipeline import manager
from irprune.pipeline.parser import parse


@dataclass(frozen=True)
class Oracle:
    """A published count.

    Attributes:
        shape: The model.
        setting: What goes, in words.
        prune: The same as options of the pass.
        expected: Parameters that are left.
    """

    shape: str
    setting: str
    prune: str
    expected: int


def _blocks(part: float, layers: str) -> str:
    return f"ratio={part} of=indices kinds=[heads,ffn] layers={layers} round_to=1"


ORACLES = (
    Oracle("LLaMA-7B", "25 % of heads and ffn in layers [4, 30)", _blocks(0.25, "4:30"), 5_422_977_024),
    Oracle("LLaMA-7B", "60 % of heads and ffn in layers [3, 31)", _blocks(0.6, "3:31"), 3_350_188_032),
    Oracle("LLaMA-7B", "hidden size 4096 to 3276", "count=820 kinds=residual", 5_389_416_396),
    Oracle("LLaMA-7B", "hidden size 4096 to 2048", "ratio=0.5 of=indices kinds=residual round_to=1", 3_369_207_808),
    Oracle("Llama-3-8B", "25 % of heads and ffn in layers [4, 30)", _blocks(0.25, "4:30"), 6_612_586_496),
    Oracle("TinyLlama-1.1B", "25 % of heads and ffn in layers [4, 18)", _blocks(0.25, "4:18"), 945_907_712),
)


def check(oracle: Oracle, program: Program, groups: Groups) -> bool:
    """Prune by one setting, print a line and say whether the count is the published one."""
    start = time.perf_counter()
    try:
        after, facts = manager.run(parse(f"score{{criterion=random}},prune{{{oracle.prune}}}"), program, [groups])
    except IrpruneError as error:
        print(f"FAILED  {oracle.shape:14}  {oracle.setting:40}  {error}", flush=True)
        return False
    found = sum(tensor.numel() for name, tensor in after.tensors.items() if after.is_parameter(name))
    modelled = Cost(after).params()
    proven = facts[PruneReport].checks.get("shapes") is True
    fine = found == modelled == oracle.expected and proven
    print(
        f"{'ok' if fine else 'FAILED':6}  {oracle.shape:14}  {oracle.setting:40}  expected {oracle.expected:>13,}  found {found:>13,}"
        f"{'' if modelled == found else f', cost model says {modelled:,}'}  shapes {'proven' if proven else 'NOT PROVEN'}"
        f"  {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return fine


def run(shapes: list[str]) -> Iterator[bool]:
    for shape in shapes:
        start = time.perf_counter()
        model, inputs = on_meta(shape)
        program, groups = irprune.groups(model, example_inputs=inputs, dynamic=DYNAMIC)
        print(
            f"        {shape:14}  {Cost(program).params():,} parameters, traced and analysed in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for oracle in ORACLES:
            if oracle.shape == shape:
                yield check(oracle, program, groups)


def main() -> int:
    known = [shape for shape in SHAPES if any(oracle.shape == shape for oracle in ORACLES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="SHAPE", nargs="+", choices=known, default=known, help=f"of {', '.join(known)}")
    results = list(run(parser.parse_args().only))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
