#!/usr/bin/env python3
"""Discovery against tracing, and against Torch-Pruning, in processor seconds.

    python tools/bench_discover.py            both parts
    python tools/bench_discover.py --shapes LLaMA-7B   the first part, one shape
    python tools/bench_discover.py --shapes --rounds 0 --whole   a whole run with its ONNX file, which traces once

First, LLaMA shapes on the meta device, each in a fresh process: inference and discovery are to take
under 3 % of the time of a trace in which every layer is run (irprune's own runs equal layers once), and the process
under 1 GiB. Then a 32-layer multi-head LLaMA of width
256 with weights, a quarter of heads, neurons and the width: inference, discovery and removal, against
building Torch-Pruning's dependency graph and pruning every group as its own example for language models does
(``pip install --no-deps torch-pruning``; skipped where it is not there), at least ten times faster, medians of
interleaved rounds. Torch-Pruning's time includes its scores, so the ratio with ours is told beside; tracing and
the proof, which it has none of, are told and not counted. With ``--whole``, tracing, pruning and export of the
same model, and the export as torch's exporter does it left alone, which traces again. Exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

SHARE, GIB, FASTER = 0.03, 1.0, 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["LLaMA-7B", "LLaMA-70B"], help="shapes of the first part")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the second part; 0 leaves it out")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--whole", action="store_true", help="a whole run down to ONNX as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(analysed(options.one)))
        return 0
    missed = 0
    for shape in options.shapes:
        answer = subprocess.run([sys.executable, __file__, "--one", shape], check=True, capture_output=True, text=True)
        found = json.loads(answer.stdout.splitlines()[-1])
        share = found["discover"] / found["whole"]
        good = share < SHARE and found["gib"] < GIB
        missed += not good
        print(
            f"{'ok' if good else 'MISSED'}  {shape}: trace {found['trace']:.1f} s, {found['whole']:.1f} s with every layer run; "
            f"discovery {found['discover']:.2f} s = {share:.1%} of that (under {SHARE:.0%}), peak {found['gib']:.2f} GiB (under {GIB:g})",
            flush=True,
        )
    if options.rounds:
        missed += beside(options.layers, options.rounds)
    if options.whole:
        whole(options.layers)
    return 1 if missed else 0


def analysed(shape: str) -> dict[str, float]:
    """Processor seconds and peak memory of one shape."""
    from unittest import mock

    from shapes import DYNAMIC, on_meta

    from irprune.analysis.groups import discover
    from irprune.frontend.export import trace
    from irprune.frontend.repeats import Repeats
    from irprune.rules.infer import typed

    module, inputs = on_meta(shape)
    clock = time.process_time
    start = clock()
    program = trace(module, (), inputs, DYNAMIC)
    traced = clock()
    discover(typed(program))
    done = clock()
    with mock.patch.object(Repeats, "possible", False):
        trace(module, (), inputs, DYNAMIC)
    return {
        "trace": traced - start,
        "discover": done - traced,
        "whole": clock() - done,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _model(layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, use_cache=False, **sizes)).eval()


PARTS = ("discovery", "scores", "removal", "tracing", "proof")


def beside(layers: int, rounds: int) -> int:
    """Both tools on one model, a quarter of heads, neurons and the width; returns 1 if the target is missed."""
    import torch

    torch.set_num_threads(1)
    try:
        import torch_pruning  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"skipped: Torch-Pruning cannot be imported ({error}); pip install --no-deps torch-pruning")
        return 0
    ids = torch.randint(0, 1000, (2, 16))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_irprune(layers, ids))
        theirs.append(_torch_pruning(layers, ids))
    mine = {name: statistics.median(parts[name] for parts in ours) for name in PARTS}
    build, step = (statistics.median(parts[i] for parts in theirs) for i in (0, 1))
    if {parts["params"] for parts in ours} != {parts[2] for parts in theirs}:
        print(f"note: {ours[0]['params']:,} parameters are left, by Torch-Pruning {theirs[0][2]:,}")
    counted = mine["discovery"] + mine["removal"]
    ratio, whole = (build + step) / counted, sum(mine.values()) - mine["proof"]
    good = ratio >= FASTER
    print(
        f"{'ok' if good else 'MISSED'}  LLaMA of {layers} layers, width 256: discovery {mine['discovery']:.2f} s and removal "
        f"{mine['removal']:.2f} s; Torch-Pruning {torch_pruning.__version__} builds in {build:.2f} s and prunes in {step:.2f} s = "
        f"{ratio:.1f} times (at least {FASTER:g}; {(build + step) / (counted + mine['scores']):.1f} with our scores of "
        f"{mine['scores']:.2f} s)\n    in all, with tracing {mine['tracing']:.1f} s: {whole:.1f} s against {build + step:.1f} s; "
        f"the proof, which Torch-Pruning has none of, takes {mine['proof']:.1f} s more"
    )
    return 0 if good else 1


def _irprune(layers: int, ids: Any) -> dict[str, float]:
    """Seconds of each part, and the parameters that are left."""
    from irprune.analysis.groups import discover
    from irprune.backend.proof import prove
    from irprune.backend.rewrite import remove
    from irprune.frontend.export import trace
    from irprune.ir.facts import Importance
    from irprune.pipeline import manager
    from irprune.pipeline.parser import parse
    from irprune.rules.infer import typed

    clock = time.process_time
    module = _model(layers)
    times = [clock()]
    program = trace(module, (), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    tracing = clock() - times[0]
    gc.collect()  # what tracing leaves behind is not for discovery to pay, nor is what Torch-Pruning leaves behind counted
    times = [clock()]
    program = typed(program)
    groups = discover(program)
    times.append(clock())
    _, facts = manager.run(parse("score{criterion=magnitude}"), program, [groups])
    scores = facts[Importance].scores
    keep = {g.var: scores[g.name].argsort().argsort() >= g.size // 4 for g in groups.prunable if g.kind in ("heads", "ffn", "residual")}
    times.append(clock())
    smaller = remove(program, keep)
    times.append(clock())
    prove(program, smaller, keep)
    times.append(clock())
    seconds = (b - a for a, b in itertools.pairwise(times))
    parts = dict(zip(("discovery", "scores", "removal", "proof"), seconds, strict=True))
    left = sum(tensor.numel() for name, tensor in smaller.tensors.items() if smaller.is_parameter(name))
    return {**parts, "tracing": tracing, "params": left}


def whole(layers: int) -> None:
    """Tell the seconds of ``discover,score,prune`` and of the ONNX file, and of the file with the exporter's own second trace."""
    import contextlib
    import tempfile
    from pathlib import Path
    from unittest import mock

    import torch

    from irprune.backend.onnx import export
    from irprune.frontend.export import trace
    from irprune.pipeline import manager
    from irprune.pipeline.parser import parse
    from irprune.rules.infer import typed

    torch.set_num_threads(1)
    clock = time.process_time
    module = _model(layers)
    times = [clock()]
    program = trace(module, (), {"input_ids": torch.randint(0, 1000, (2, 16))}, {"input_ids": {0: "batch", 1: "sequence"}})
    times.append(clock())
    smaller, _ = manager.run(parse("discover,score{criterion=magnitude},prune{ratio=0.3}"), typed(program), [])
    times.append(clock())
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        export(smaller, Path(scratch) / "once.onnx")
        times.append(clock())
        with (
            mock.patch("irprune.backend.onnx.as_it_is", lambda exported: exported),
            mock.patch("irprune.backend.onnx.quick_rules", contextlib.nullcontext),
        ):
            export(smaller, Path(scratch) / "again.onnx")
        times.append(clock())
    tracing, pruning, once, again = (b - a for a, b in itertools.pairwise(times))
    print(
        f"LLaMA of {layers} layers, width 256: trace {tracing:.1f} s, discover, score, prune and prove {pruning:.1f} s, "
        f"ONNX {once:.1f} s = {tracing + pruning + once:.1f} s; with the exporter's second trace "
        f"{tracing + pruning + again:.1f} s (ONNX {again:.1f} s)"
    )


def _torch_pruning(layers: int, ids: Any) -> tuple[float, float, int]:
    """Seconds of building and of pruning every group, as in Torch-Pruning's own examples/LLMs/prune_llm.py; parameters left."""
    import torch_pruning as tp

    clock = time.process_time
    module = _model(layers)
    heads = {p: 8 for layer in module.model.layers for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
        start = clock()
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=ids,
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            output_transform=lambda outputs: outputs.logits,
            pruning_ratio=0.25,
            ignored_layers=[module.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.25,
            round_to=4,
        )
        built = clock()
        for group in pruner.step(interactive=True):
            group.prune()
        done = clock()
    module(ids)  # what is left must run
    return built - start, done - built, sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    sys.exit(main())
