#!/usr/bin/env python3
"""Greedy decoding with a key-value cache in onnxruntime: the same tokens as torch, and how many a second.

    python tools/bench_decode.py --checkpoint DIR             SmolLM2-135M-Instruct, for one
    python tools/bench_decode.py --checkpoint DIR --keep OUT  keeps the files in OUT, and takes them from there
    python tools/bench_decode.py --checkpoint DIR --keep OUT --forms --text FILE

The checkpoint is exported with a cache, whole and pruned. For each of ten prompts the pruned file writes 64
tokens. They must be those that the pruned torch program gives: run on the prompt and the tokens at once, its
most probable next token at each position must be the one that was written. Then both files write tokens in
turn, on one thread, and the ratio of their processor times is compared with that of the bytes that a token
reads (every matrix once): at least 90 % of it is wanted. Exits 1 where a target is missed.

With --forms it prints another table: what `validate` says of the original, and of the pruned model in float32, in
eight bits and in float16, with one fifth of the text held out for the perplexity. The runs go to OUT, and one that is
there is not repeated.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import irprune.api as irprune
from irprune.analysis.cost import Cost
from irprune.backend.cache import cached
from irprune.backend.generate import Decoder
from irprune.backend.onnx import export
from irprune.backend.timing import compared
from irprune.frontend.hf_checkpoint import tokenizer_of
from irprune.ir.program import Program
from irprune.pipeline.manifest import Manifest

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "My favourite colour is",
    "In 1969, astronauts",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "To make bread you need",
    "A triangle has",
)
TOKENS, SHARE = 64, 0.9
PRUNED = "score{criterion=activation},prune{ratio=0.2 kinds=ffn},repair"
TIMED = "validate{batch_sizes=[1] lengths=[128] threads=1 clock=processor seconds=15 baseline=%s}"
FORMS = {"int8": ("quantise=int8", "true"), "float16": ("precision=float16", "false")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="DIR", default=os.environ.get("IRPRUNE_SMOLLM2"), help="default: IRPRUNE_SMOLLM2")
    parser.add_argument("--ratios", metavar="R", nargs="+", type=float, default=[0.2], help="parts of the parameters to remove")
    parser.add_argument("--keep", metavar="OUT", type=Path, help="a directory for the files")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--forms", action="store_true", help="compare float32, int8 and float16 instead")
    parser.add_argument("--text", metavar="FILE", type=Path, help="with --forms: calibration text")
    options = parser.parse_args()
    if not options.checkpoint or not Path(options.checkpoint).is_dir():
        print("SKIPPED: no checkpoint; give --checkpoint DIR or IRPRUNE_SMOLLM2")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if options.forms:
            print("\n".join(table({form: ran(options, form, folder / form) for form in FORMS})))
            return 0
        return measured(options.checkpoint, options.ratios, options.rounds, folder)


def measured(checkpoint: str, ratios: list[float], rounds: int, folder: Path) -> int:
    program, _ = irprune.load(f"hf:{checkpoint}", sequence=32)
    tokenizer = tokenizer_of(checkpoint)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    original = written(program, folder / "original.onnx")
    missed = 0
    for ratio in ratios:
        smaller = irprune.run(
            program, f"score{{criterion=magnitude}},prune{{ratio={ratio}}}", out=folder / f"run-{ratio}", force=True
        ).program
        path = written(smaller, folder / f"pruned-{ratio}.onnx")
        decoder = Decoder(path, threads=1)
        same = 0
        for prompt in prompts:
            found = list(decoder.greedy(prompt, TOKENS))
            with torch.no_grad():
                logits = torch.utils._pytree.tree_leaves(smaller(input_ids=torch.tensor([[*prompt, *found]] * 2)))[0]
            same += logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == found
        good = same == len(prompts)
        print(f"{'ok' if good else 'MISSED'}  ratio {ratio}: {same} of {len(prompts)} prompts, {TOKENS} tokens each, as torch", flush=True)
        missed += not good
        ideal = read_bytes(program) / read_bytes(smaller)
        speedup, speeds = faster(original, path, prompts[0], rounds)
        good = speedup.ratio >= SHARE * ideal
        missed += not good
        print(
            f"{'ok' if good else 'MISSED'}  ratio {ratio}: {speeds[0]:.1f} to {speeds[1]:.1f} tokens a second of processor time, {speedup} "
            f"of {ideal:.3f} in bytes = {speedup.ratio / ideal:.1%} (at least {SHARE:.0%})",
            flush=True,
        )
    return 1 if missed else 0


def ran(options: argparse.Namespace, form: str, folder: Path) -> Manifest:
    """The run of a form: the one that is there, or a new one."""
    if (done := irprune.finished(folder)) is not None:
        return done
    how, baseline = FORMS[form]
    passes = f"{PRUNED},export{{cache=true {how}}},{TIMED % baseline}"
    given = {"calibration": str(options.text)} if options.text else {}
    target = f"hf:{options.checkpoint}"
    said = ["--passes", passes, *(["--calibration", given["calibration"]] if given else []), "--set", "windows=80", "--out", str(folder)]
    print(f"irprune run {target} {shlex.join(said)}", file=sys.stderr, flush=True)
    return irprune.run(target, passes, out=folder, force=True, windows=80, **given).manifest


def table(runs: dict[str, Manifest]) -> list[str]:
    """Markdown: a line for each file."""
    lines = [
        "| file | MB | prompt of 128, ms (p95) | tokens/s | next token, ms (p95) | tokens/s | memory, MB | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = (("original, float32", "int8", "before"), ("pruned, float32", "int8", "after"), ("pruned, int8", "int8", "int8"))
    for label, form, when in (*rows, ("pruned, float16", "float16", "after")):
        said = runs[form].model_dump(mode="json")
        points = {point["kind"]: point["files"][when] for point in said["onnx"]["points"]}
        cells = [label, f"{said['onnx']['file_bytes'][when] / 1e6:.0f}"]
        for kind in ("prefill", "decode"):
            cells += [f"{points[kind]['p50_ms']:.3g} ({points[kind]['p95_ms']:.3g})", f"{points[kind]['per_second']:.3g}"]
        cells += [f"{points['decode']['memory_bytes'] / 1e6:.0f}", f"{said['metrics'][when]['perplexity']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    after = runs["int8"].model_dump(mode="json")["onnx"]
    half = runs["float16"].model_dump(mode="json")["onnx"]
    lines += [
        "",
        f"Largest difference from the program: float32 {after['parity_max_abs_err']:.1e}, float16 {half['parity_max_abs_err']:.1e}; "
        f"int8 {after['int8_relative_err']:.1%} of the largest output.",
    ]
    return lines


def written(program: Program, path: Path) -> Path:
    if not path.is_file():
        start = time.process_time()
        export(cached(program).program, path)
        print(
            f"{path.name}: exported in {time.process_time() - start:.0f} s of processor time, {path.stat().st_size / 1e6:.0f} MB",
            flush=True,
        )
    return path


def read_bytes(program: Program) -> int:
    """Bytes of the parameters that one token reads: all, but of a table that is only looked up."""
    cost = Cost(program).bytes()
    looked_up = 0
    for name, node in program.holders.items():
        if {str(user.target) for user in node.users} == {"aten.embedding.default"}:
            looked_up += program.tensors[name].numel() * program.tensors[name].element_size()
    return cost - looked_up


def faster(before: Path, after: Path, prompt: list[int], rounds: int):  # type: ignore[no-untyped-def]
    """The speed-up with its interval, and tokens a second before and after."""
    decoders = [Decoder(path, threads=1) for path in (before, after)]

    def call(decoder: Decoder):  # type: ignore[no-untyped-def]
        return lambda: list(decoder.greedy(prompt, 9))

    found = compared(call(decoders[0]), call(decoders[1]), rounds=rounds, seconds=120, clock=time.process_time, sample_ms=1)
    return found.speedup, [9000 / statistics.median(samples) for samples in (found.before, found.after)]


if __name__ == "__main__":
    sys.exit(main())
