#!/usr/bin/env python3
"""Speed-up in onnxruntime against what the multiply-accumulates promise, on one thread.

    python tools/bench_ort.py                          every model, every ratio
    python tools/bench_ort.py --only resnet50 --ratios 0.05 0.5

A convolutional network (the shape of ResNet-50), an encoder (the shape of BERT-base) and a decoder on a prompt
(the shape of SmolLM2-135M, or the checkpoint that IRPRUNE_SMOLLM2 names; decoding is tools/bench_decode.py's). Each is
pruned to a part of its multiply-accumulates, exported, and timed with the original round by round in turn, by
processor time. The speed-up is to be at least 95 % of the ideal at every ratio; a target counts as missed where the
whole interval is below it. Beside ResNet-50 the same of Torch-Pruning, at equal multiply-accumulates (``pip install
--no-deps torch-pruning``; skipped where it is not there). Exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from shapes import resnet50
from torch import nn

import irprune.api as irprune
from irprune.analysis.cost import Cost
from irprune.backend.onnx import export
from irprune.backend.runtime import Session
from irprune.backend.timing import Speedup, compared
from irprune.ir.program import Program

RATIOS = (0.05, 0.2, 0.35, 0.5)
SHARE = 0.95
TOKENS = 128


def image_network() -> tuple[Program, dict[str, Any]]:
    return irprune.trace(resnet50(), (torch.randn(2, 3, 224, 224),)), {"x": torch.randn(1, 3, 224, 224)}


def encoder() -> tuple[Program, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=6), add_pooling_layer=False).eval()
    return _language(model, 30522)


def decoder() -> tuple[Program, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = os.environ.get("IRPRUNE_SMOLLM2")
    if path and Path(path).is_dir():
        return _language(LlamaForCausalLM.from_pretrained(path, use_cache=False).eval(), 49152)
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 10}
    return _language(LlamaForCausalLM(LlamaConfig(vocab_size=8192, use_cache=False, **sizes)).eval(), 8192)


def _language(model: nn.Module, vocabulary: int) -> tuple[Program, dict[str, Any]]:
    ids = torch.randint(vocabulary, (2, 16))
    program = irprune.trace(model, (), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    return program, {"input_ids": torch.randint(vocabulary, (1, TOKENS))}


MODELS: Mapping[str, Callable[[], tuple[Program, dict[str, Any]]]] = {"resnet50": image_network, "encoder": encoder, "decoder": decoder}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="MODEL", nargs="+", choices=MODELS, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--ratios", metavar="R", nargs="+", type=float, default=list(RATIOS), help="parts of the multiply-accumulates")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each timing")
    parser.add_argument("--round-to", default="auto", help="as of the pass prune")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    missed = 0
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
            missed += bench(name, options, Path(scratch))
    return 1 if missed else 0


def bench(name: str, options: argparse.Namespace, scratch: Path) -> int:
    program, inputs = MODELS[name]()
    before = scratch / "before.onnx"
    export(program, before)
    whole, missed = macs(program, inputs), 0
    for ratio in options.ratios:
        passes = f"score{{criterion=magnitude}},prune{{ratio={ratio} of=macs round_to={options.round_to}}},export"
        done = irprune.run(program, passes, out=scratch / f"{ratio}")
        assert done.path is not None
        left = macs(done.program, inputs)
        ideal = whole / left
        found = measured(before, program, done.path / "model.onnx", done.program, inputs, options.rounds)
        good = found.high >= SHARE * ideal
        missed += not good
        print(
            f"{'ok' if good else 'MISSED'}  {name} {ratio}: {found} of {ideal:.3f} = {found.ratio / ideal:.1%} (at least {SHARE:.0%})",
            flush=True,
        )
        if name == "resnet50" and not options.no_peer:
            peer(program, before, inputs, left / whole, options.rounds, scratch / f"peer-{ratio}.onnx")
    return missed


def macs(program: Program, inputs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one call with these inputs."""
    import dataclasses

    example = ((), dict(inputs)) if program.interface.example[1] else (tuple(inputs.values()), {})
    return Cost(dataclasses.replace(program, interface=dataclasses.replace(program.interface, example=example))).macs()


def measured(before: Path, old: Program, after: Path, new: Program, inputs: Mapping[str, Any], rounds: int) -> Speedup:
    """How many times faster, by processor time on one thread."""
    runners = []
    for path, program in ((before, old), (after, new)):
        session = Session(path, program, threads=1, provider="cpu")
        args, kwargs = ((), dict(inputs)) if program.interface.example[1] else (tuple(inputs.values()), {})
        runners.append(session.runner(*args, **kwargs))
    return compared(*runners, rounds=rounds, seconds=120, clock=time.process_time, sample_ms=1).speedup


def peer(program: Program, before: Path, inputs: Mapping[str, Any], part: float, rounds: int, path: Path) -> None:
    """The same of Torch-Pruning with its defaults, its ratio searched for until as many multiply-accumulates are left."""
    try:
        import torch_pruning  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"skipped: Torch-Pruning cannot be imported ({error}); pip install --no-deps torch-pruning")
        return
    example = next(iter(inputs.values()))

    def pruned(ratio: float) -> nn.Module:
        model = resnet50()
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, example, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=ratio, ignored_layers=[model[-1]]
        )
        pruner.step()
        return model

    whole, _ = torch_pruning.utils.count_ops_and_params(resnet50(), example)
    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        left, _ = torch_pruning.utils.count_ops_and_params(pruned(middle), example)
        low, high = (middle, high) if left / whole > part else (low, middle)
    smaller = irprune.trace(pruned(high), (torch.randn(2, 3, 224, 224),))
    export(smaller, path)
    found = measured(before, program, path, smaller, inputs, rounds)
    ideal = macs(program, inputs) / macs(smaller, inputs)
    print(f"        Torch-Pruning at its ratio {high:.3f}: {found} of {ideal:.3f} = {found.ratio / ideal:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
