#!/usr/bin/env python3
"""Prune a checkpoint that does not fit in the memory it may take, and compare with copying its files.

A sharded LLaMA-shaped checkpoint of random weights is written once (``--keep DIR`` keeps it for the next
time). A process of its own prunes it with ``lazy=true``: trace on the meta device, magnitude scores, proof
and Hugging Face export, all reading the weights as they are needed. Measured are its peak memory (resident
pages, those of mapped files included), the whole time, and the time of writing the pruned shards against
a plain copy of the input files.

Both begin after an untimed copy that is removed again: the input is in the page cache, nothing waits to be
written, and there is memory for new pages that was in use a moment ago (in a virtual machine memory that was
not is several times as slow). Both end with every file flushed to the disk. A round is a copy, a pruning and
another copy, and the pruning is compared with the mean of the two; the median round counts.

The result is compared with the in-memory path, tensor by tensor, on a smaller checkpoint of the same shape
(``--layers 1`` of it), since the other path needs the memory.

    python tools/bench_stream.py                  about 4 GB
    python tools/bench_stream.py --layers 28      about 12 GB: the same peak

Exits with 1 where the peak is above 1.5 GiB, the writing takes more than 1.5 times the copy, or a tensor differs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_GIB, FACTOR = 1.5, 1.5
PASSES = "score{criterion=magnitude},prune{ratio=0.25 of=indices allocation=uniform},export{format=hf shard=1GB}"


def generate(folder: Path, layers: int, width: int) -> None:
    """A checkpoint as transformers would write it, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    heads = width // 128
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(str(folder))
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for name, tensor in shapes.items():
        shard = f"layer-{name.split('.')[2]}" if name.startswith("model.layers.") else name
        groups.setdefault(shard, {})[name] = tensor
    total = 0
    for number, part in enumerate(groups.values()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        made = {}
        for name, tensor in part.items():
            made[name] = (torch.ones(tensor.shape) if tensor.ndim == 1 else torch.empty(tensor.shape)).bfloat16()
            if tensor.ndim > 1:
                made[name].normal_(0, 0.02, generator=generator)
            weight_map[name] = file
            total += made[name].numel() * 2
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(folder: Path, out: Path, lazy: bool) -> dict[str, Any]:
    """Prune in this process; where the time went, and how much memory there was at the peak."""
    import torch

    import irprune.api as irprune
    from irprune.backend import stream

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    written = {"seconds": 0.0}
    write = stream.write

    def timed(*args: Any, **kwargs: Any) -> Any:
        settle(folder, out.parent)
        start = time.perf_counter()
        try:
            return write(*args, **kwargs)
        finally:
            written["seconds"] += time.perf_counter() - start

    stream.write = timed
    start = time.perf_counter()
    done = irprune.run(f"hf:{folder}", PASSES, out=out, lazy=lazy, dtype="auto")
    checks = done.manifest.checks
    return {
        "seconds": time.perf_counter() - start,
        "write": written["seconds"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "params": [done.manifest.model.before.params, done.manifest.model.after.params],
        "proof": checks.model_dump() if checks is not None else None,
        "passes": {step.name: step.seconds for step in done.manifest.passes},
    }


def child(folder: Path, out: Path, lazy: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(out), *(["--lazy"] if lazy else [])]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def settle(folder: Path, scratch: Path) -> None:
    """Bring page cache, free memory and disk into the state that both measurements begin with."""
    files = sorted(folder.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        for file in files:
            shutil.copyfile(file, Path(place) / file.name)
    os.sync()


def copied(folder: Path, out: Path) -> float:
    """Seconds of a plain copy of the same files, each flushed to the disk; the copy is removed."""
    settle(folder, out.parent)
    start = time.perf_counter()
    out.mkdir()
    for file in sorted(folder.glob("*.safetensors")):
        shutil.copyfile(file, out / file.name)
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def same(one: Path, other: Path) -> tuple[int, int]:
    """Tensors of two checkpoints that differ, and all of them."""
    import torch
    from safetensors import safe_open

    held: list[dict[str, torch.Tensor]] = []
    for folder in (one, other):
        tensors = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        held.append(tensors)
    names = held[0].keys() | held[1].keys()
    differ = [name for name in names if name not in held[0] or name not in held[1] or not torch.equal(held[0][name], held[1][name])]
    return len(differ), len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512")
    parser.add_argument("--rounds", type=int, default=2, help="a copy, a pruning and another copy each; the median counts")
    parser.add_argument("--keep", type=Path, help="directory of the generated checkpoints")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lazy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(prune(*options.child, lazy=options.lazy)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        base = options.keep or Path(scratch)
        large, small = (base / f"llama-{options.width}-{layers}" for layers in (options.layers, 1))
        generate(large, options.layers, options.width)
        generate(small, 1, options.width)
        size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(large.glob('*.safetensors')))} files", flush=True)
        runs, ratios = [], []
        for number in range(options.rounds):
            before = copied(large, Path(scratch) / "copy")
            runs.append(child(large, Path(scratch) / "run", lazy=True))
            shutil.rmtree(Path(scratch) / "run")
            after = copied(large, Path(scratch) / "copy")
            wrote = runs[-1]["write"]
            ratios.append(2 * wrote / (before + after))
            told = f"copies {before:.1f} and {after:.1f} s, writing the pruned shards {wrote:.1f} s, {ratios[-1]:.2f} times"
            print(f"round {number + 1}: {told}; the whole run {runs[-1]['seconds']:.0f} s", flush=True)
        run, ratio = runs[-1], statistics.median(ratios)
        peak = max(found["peak"] for found in runs) / 2**30
        print(f"parameters: {run['params'][0]:,} to {run['params'][1]:,}; proof {run['proof']}")
        print(f"seconds of the last run: {', '.join(f'{name} {s:.1f}' for name, s in run['passes'].items())}")
        print(f"writing took {ratio:.2f} times a plain copy, the median of {options.rounds} (at most {FACTOR})")
        print(f"peak memory {peak:.2f} GiB (at most {LIMIT_GIB})")
        child(small, Path(scratch) / "lazy", lazy=True)
        whole = child(small, Path(scratch) / "whole", lazy=False)
        differ, count = same(Path(scratch) / "lazy" / "hf", Path(scratch) / "whole" / "hf")
        print(f"against the in-memory path (one layer, peak {whole['peak'] / 2**30:.2f} GiB): {count - differ} of {count} tensors equal")
    fine = peak <= LIMIT_GIB and ratio <= FACTOR and differ == 0
    print("ok" if fine else "FAILED")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
