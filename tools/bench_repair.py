"""What a least squares repair of a whole model costs, against the forward passes of its calibration data.

A LLaMA-like model with random weights is pruned and repaired. Measured in processor time of one
thread, the best of the rounds: the forward passes of the original model over all calibration batches,
the pass ``repair``, and what of it are the solves: normal equations, factorisations, the choice of the
damping. The exit status is 1 if repair without the solves takes more than twice the forward passes.

    python tools/bench_repair.py [--layers 8] [--width 384] [--batches 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from irprune_passes import repair as repairing
from irprune_passes.prune import Prune
from irprune_passes.repair import Repair, System
from irprune_passes.score import Score
from transformers import LlamaConfig, LlamaForCausalLM

from irprune.analysis.groups import discover
from irprune.frontend.export import trace
from irprune.ir.facts import Groups, Importance, Original, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

ROWS, LENGTH, VOCABULARY, FACTOR = 8, 128, 8192, 2.0


class Logits(torch.nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = [torch.randint(VOCABULARY, (ROWS, LENGTH)) for _ in range(options.batches)]
    program = typed(trace(Logits(options.layers, options.width), (ids[0],), dynamic={"input_ids": {0: "batch"}}, strict=False))
    task = Task("bench", calibration=lambda: ids, inputs=lambda batch: ((batch,), {}))
    pruned, facts = prepared(program, task)

    def forward() -> None:
        with torch.no_grad():
            for batch in ids:
                program(batch)

    def repair(readers: str) -> Callable[[], object]:
        return lambda: Repair(readers=readers).run(pruned, facts)  # type: ignore[arg-type]

    spent = [0.0]
    depth = [0]

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            depth[0] += 1
            try:
                return work(*arguments, **options)
            finally:
                depth[0] -= 1
                spent[0] += time.process_time() - start if not depth[0] else 0.0

        return run

    System.add = timed(System.add)  # type: ignore[method-assign]
    System.solve = timed(System.solve)  # type: ignore[method-assign]
    System.error = timed(System.error)  # type: ignore[method-assign]
    repairing.chosen = timed(repairing.chosen)
    forward()
    plain = min(seconds(forward) for _ in range(options.rounds))
    print(f"forward passes {plain:.2f} s ({options.batches} batches of {ROWS} x {LENGTH} tokens)")
    failed = False
    for readers in ("pruned", "all"):
        rounds = []
        for _ in range(options.rounds):
            spent[0] = 0.0
            whole = seconds(repair(readers))
            rounds.append((whole - spent[0], spent[0]))
        rest, solves = min(rounds)
        late = readers == "pruned" and rest > FACTOR * plain
        failed |= late
        print(f"repair{{readers={readers}}} {rest:.2f} s + {solves:.2f} s of solves: {rest / plain:.2f} x{' TOO SLOW' if late else ''}")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    sys.exit(failed)


def prepared(program: Program, task: Task) -> tuple[Program, Facts]:
    """The pruned program and what ``repair`` reads."""
    groups: Groups = discover(program)
    (scores,) = Score().run(program, Facts([groups, task])).facts
    assert isinstance(scores, Importance)
    result = Prune(ratio=0.2, prove=False).run(program, Facts([groups, scores, task]))
    return result.program, Facts([*result.facts, task, Original(program)])


if __name__ == "__main__":
    main()
