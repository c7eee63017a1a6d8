"""Memory and time of a Taylor score against the plain way.

Peak resident memory (Linux) is read in a fresh process for each way, above what the process with the
traced model holds before it, with the counter set back and freed memory returned. Three figures matter:

- ``activations``: forward and backward through all activations to one small bias of the first layer,
  so that no other weight's gradient is made (for a batch, and for one sample, which is what scores
  of second order run);
- ``plain``: forward and backward with every gradient kept, which is how scores are usually made;
- the pass ``score`` with Taylor criteria.

The exit status is 1 if a streamed score needs more than its activations + 1.5 x the largest single
gradient, or takes more than 1.3 x the time of as many plain forward and backward passes.

    python tools/bench_taylor_memory.py [--layers 16] [--width 512] [--tokens 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from irprune_passes.score import Score
from torch import nn
from torch.nn import functional as F

from irprune.analysis.groups import discover
from irprune.frontend.export import trace
from irprune.ir.facts import Groups, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

MEMORY_FACTOR, TIME_FACTOR = 1.5, 1.3
VOCABULARY, LENGTH, BATCHES = 8192, 64, 2
MEMORY_TOKENS = 2 * LENGTH  # few, so that the gradients stand out from the activations that they replace
SCORES: dict[str, dict[str, Any]] = {
    "element": {},
    "vector": {"mode": "vector"},
    "fisher": {"order": 2},
    "mixed, 256 MiB": {"order": "mixed", "accumulator_mib": 256},
    "mixed": {"order": "mixed"},
}
BOUNDED = ("element", "vector", "fisher")


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (one(y).unflatten(-1, (self.heads, 64)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)))


def loss(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def subject(options: argparse.Namespace, tokens: int) -> tuple[Program, Groups, Task, list[torch.Tensor]]:
    torch.manual_seed(0)
    size = tokens // LENGTH
    data = [torch.randint(VOCABULARY, (size, LENGTH)) for _ in range(BATCHES)]
    program = typed(trace(Transformer(options.layers, options.width), (data[0],)))
    return program, discover(program), Task("bench", lambda: data, lambda batch: ((batch,), {}), loss), data


# -- one way, in a process of its own -----------------------------------------------------------------


def ways(program: Program, groups: Groups, task: Task, data: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    def activations(size: int | None = None) -> None:
        for batch in data:
            torch.autograd.grad(loss(program(batch[:size]), batch[:size]), program.tensors["blocks.0.norm1.bias"])

    def plain() -> None:
        for batch in data:
            for tensor in program.tensors.values():
                tensor.grad = None
            loss(program(batch), batch).backward()

    def score(one: Score) -> Callable[[], object]:
        return lambda: one.run(program, Facts([groups, task]))

    scores = {name: score(Score(criterion="taylor", **how)) for name, how in SCORES.items()}
    return {"activations": activations, "one sample's": lambda: activations(1), "plain": plain, **scores}


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its highest value) in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace) -> int:
    """Bytes at the peak above those before."""
    program, groups, task, data = subject(options, MEMORY_TOKENS)
    run = ways(program, groups, task, data)[options.measure]
    ways(program, groups, task, [batch[:2, :8] for batch in data])["activations"]()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident("VmHWM") - before


def seconds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Processor seconds on one thread, which other processes disturb little; the ways take turns."""
    torch.set_num_threads(1)
    program, groups, task, data = subject(options, options.tokens)
    pair = {name: run for name, run in ways(program, groups, task, data).items() if name in ("plain", *SCORES)}
    taken: dict[str, list[float]] = {name: [] for name in ("plain", "element", "vector")}
    for one in range(options.rounds + 1):
        for name, found in taken.items():
            start = time.process_time()
            pair[name]()
            if one:
                found.append(time.process_time() - start)
    return taken


def child(options: argparse.Namespace, way: str) -> Any:
    command = [sys.executable, __file__, *(f"--{key}={getattr(options, key)}" for key in ("layers", "width", "tokens", "rounds"))]
    # Freed tensors go back to the system at once, so that the figures are of live tensors and not of what malloc keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"} if way != "time" else None
    done = subprocess.run([*command, f"--measure={way}"], stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return json.loads(done.stdout)


# -- the report ---------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 16, "width": 512, "tokens": 512, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(seconds(options) if options.measure == "time" else measure(options)))
        return 0
    mib = 2**20
    sizes = [parameter.numel() * parameter.itemsize for parameter in Transformer(options.layers, options.width).parameters()]
    print(
        f"weights {sum(sizes) / mib:.0f} MiB, largest gradient {max(sizes) / mib:.1f} MiB, {BATCHES} batches of "
        f"{MEMORY_TOKENS} tokens for memory, {options.tokens} for time\n"
    )
    found = {way: child(options, way) for way in ("activations", "one sample's", "plain", *SCORES)}
    ok = True
    print(f"{'peak, MiB':<18}{'above weights':>16}{'above activations':>20}{'in gradients':>14}")
    for way, peak in found.items():
        per_sample = SCORES.get(way, {}).get("order", 1) != 1
        above = peak - found["one sample's" if per_sample else "activations"]
        exceeds = way in BOUNDED and above > MEMORY_FACTOR * max(sizes)
        ok &= not exceeds
        print(f"{way:<18}{peak / mib:>16.1f}{above / mib:>20.1f}{above / max(sizes):>14.2f}{'  EXCEEDS' if exceeds else ''}")
    taken = child(options, "time")
    print(f"\n{'CPU time, s':<18}{'median':>8}{'least':>8}{'most':>8}{'ratio':>8}")
    for way, some in taken.items():
        ratio = statistics.median(a / b for a, b in zip(some, taken["plain"], strict=True))
        ok &= ratio <= TIME_FACTOR
        print(f"{way:<18}{statistics.median(some):>8.2f}{min(some):>8.2f}{max(some):>8.2f}{ratio:>8.2f}")
    print(f"\n{'ok' if ok else 'FELL SHORT'}: at most {MEMORY_FACTOR} gradients above activations, at most {TIME_FACTOR} x the time")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
