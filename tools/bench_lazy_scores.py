#!/usr/bin/env python3
"""Scores of a checkpoint whose weights take 60 % of the memory that they may use.

A sharded LLaMA-shaped checkpoint of random weights is written (``--keep DIR`` keeps it). Each way runs in
a process of its own, and its peak memory is measured (resident pages, those of mapped files included):

- ``plain``: transformers loads the model; forward and backward with every gradient kept;
- ``taylor``, ``activation``, ``obs``: ``score`` with ``lazy=true``, on the same number of windows;
- ``taylor, in memory``: the same pass with the weights in memory.

    python tools/bench_lazy_scores.py [--layers 16] [--width 2048] [--windows 4] [--sequence 64]

Exits with 1 where a lazy score takes more than the size of the weights over 0.6.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_stream import generate

SHARE = 0.6
WAYS = {
    "plain": None,
    "taylor, in memory": "score{criterion=taylor}",
    "taylor": "score{criterion=taylor}",
    "activation": "score{criterion=activation}",
    "obs": "score{criterion=obs}",
}


def measured(way: str, folder: Path, windows: int, sequence: int) -> dict[str, Any]:
    """One way in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    start = time.perf_counter()
    passes = WAYS[way]
    if passes is None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for _ in range(windows // 2):
            ids = torch.randint(0, model.config.vocab_size, (2, sequence))
            model(input_ids=ids, labels=ids).loss.backward()
    else:
        import numpy as np

        import irprune.api as irprune

        calibration = folder / "calibration.npz"
        np.savez(calibration, input_ids=np.random.default_rng(0).integers(0, 32000, (windows, sequence)))
        sizes = {"windows": windows, "batch": 2, "sequence": sequence, "calibration": str(calibration)}
        irprune.run(f"hf:{folder}", passes, lazy=way != "taylor, in memory", dtype="auto", **sizes)
    return {"seconds": time.perf_counter() - start, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="hidden size, a multiple of 512")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--keep", type=Path, help="directory of the generated checkpoint")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child[0], Path(options.child[1]), options.windows, options.sequence)))
        return 0
    missed = 0
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        folder = (options.keep or Path(scratch)) / f"llama-{options.width}-{options.layers}"
        generate(folder, options.layers, options.width)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        limit = size / SHARE
        print(f"weights {size / 2**30:.2f} GiB; allowed {limit / 2**30:.2f} GiB", flush=True)
        for way in options.ways:
            sizes = ["--windows", str(options.windows), "--sequence", str(options.sequence)]
            command = [sys.executable, __file__, "--child", way, str(folder), *sizes]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            judged = way not in ("plain", "taylor, in memory")
            good = found["peak"] <= limit
            missed += judged and not good
            word = ("ok" if good else "MISSED") if judged else "-"
            share = found["peak"] / size
            print(
                f"{word:6}  {way:18}  peak {found['peak'] / 2**30:.2f} GiB, {share:.2f} times the weights  [{found['seconds']:.0f} s]",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
