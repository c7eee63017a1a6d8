"""Is a run that was killed and resumed the same, bit for bit, as one that nobody disturbed?

A process runs a pipeline and is ended with SIGKILL: half of the time after a random delay, half of the time
right before a random one of its file operations (opening for writing, renaming, removing, making a
directory). It is started again with ``resume`` and killed again, a random number of times, and then left to
end. Every file of the run directory must be that of an undisturbed run; of the manifest, times are left out.

Two runs take turns: a small network, pruned twice and written as ONNX, and a language model whose weights stay
in their files (``lazy=true``), pruned, repaired and written as a checkpoint of many shards.

    python tools/bench_kill.py --kills 40
    python tools/bench_kill.py --kills 12 --target hf:PATH --lazy --passes 'score,prune{ratio=0.2},export{format=hf}'

Prints a line per run and in the end how many resumed to a bit-identical result; the exit code is 1 if not all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.up, self.down = nn.Linear(12, 64), nn.Linear(64, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image))).mean((2, 3))
        return self.head(x + self.down(torch.relu(self.up(x))))


def model():
    return Net()


def example_inputs():
    return (torch.randn(2, 1, 8, 8),)


def calibration():
    for _ in range(3):
        yield torch.randn(4, 1, 8, 8), torch.randint(5, (4,))


def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])
"""
PASSES = "score{criterion=taylor},prune{ratio=0.2 round_to=2},score{criterion=taylor},prune{ratio=0.2 round_to=2},export"
LAZY = "score,prune{ratio=0.5 of=indices allocation=uniform},repair,export{format=hf shard=20KB}"
_WRITING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class FileOperations:
    """Counts file operations of this process, and ends it right before one of them.

    Args:
        last: Number of the operation before which the process is killed; ``None``: never.
        folder: Only operations that name a path in here count.
    """

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count = 0
        self._last = last
        self._folder = str(folder)
        sys.addaudithook(self._seen)

    def _seen(self, event: str, args: Any) -> None:
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or not str(args[0]).startswith(self._folder):
                return
        elif event not in _WRITING or self._folder not in str(args[0]):
            return
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Case:
    """What is run and killed.

    Attributes:
        name: For the lines that are printed.
        target: The target.
        passes: The pipeline.
        options: Of :func:`irprune.run`.
        home: Its own directory.
        wanted: Checksums of the files of an undisturbed run.
        operations: How many file operations that has.
        seconds: How long it takes.
    """

    name: str
    target: str
    passes: str
    options: dict[str, Any]
    home: Path
    wanted: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    seconds: float = 0.0


def cases(given: argparse.Namespace, home: Path) -> list[Case]:
    """The target of the command line, or the two that this file has."""
    if given.target is not None:
        return [Case("given", given.target, given.passes or PASSES, {"lazy": True} if given.lazy else {}, home / "given")]
    (home / "net.py").write_text(MODEL)
    checkpoint = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(home / "llama", home / "tokens.safetensors"))
    checkpoint.start()
    checkpoint.join()
    options = {"lazy": True, "calibration": str(home / "tokens.safetensors")}
    return [
        Case("network", str(home / "net.py"), given.passes or PASSES, {}, home / "network"),
        Case("lazy", f"hf:{home / 'llama'}", LAZY, options, home / "lazy"),
    ]


def write_checkpoint(folder: Path, tokens: Path) -> None:
    """A language model of LLaMA's shape in a dozen files, and tokens to calibrate with."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    save_file({"input_ids": torch.randint(64, (8, 16))}, tokens)


def start(case: Case, out: Path, last: int | None, counted: Path | None) -> int:
    """Run in a process of its own; gives its id. ``counted`` gets the number of its file operations."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import irprune.api

        operations = FileOperations(out.parent, last)
        if irprune.api.finished(out) is None:
            irprune.run(case.target, case.passes, out=out, resume=True, **case.options)
        if counted is not None:
            counted.write_text(str(operations.count))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


REPORT = ("report.json", "report.html")
TIMED = ("seconds", "speedup", "points", *REPORT)


def contents(out: Path) -> dict[str, str]:
    """Checksum of every file of a run but the report, times in the manifest left out."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in REPORT:
            data = path.read_bytes()
            if path.name == "manifest.json":
                data = json.dumps(timeless(json.loads(data)), sort_keys=True).encode()
            found[path.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if "latency" not in key and key not in TIMED}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="so many kills in all")
    parser.add_argument("--target", help="what to run instead of the two that are built in")
    parser.add_argument("--passes", help="its pipeline")
    parser.add_argument("--lazy", action="store_true", help="leave its weights in their files")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="irprune-kill-") as scratch:
        chosen = cases(given, Path(scratch))
        for case in chosen:
            undisturbed(case)
            print(
                f"{case.name}, undisturbed: {len(case.wanted)} files, {case.operations} file operations, {case.seconds:.1f} s", flush=True
            )
        kills = runs = same = lazy = 0
        while kills < given.kills:
            case = chosen[runs % len(chosen)]
            runs += 1
            points = [point(rng, case) for _ in range(rng.randint(1, 3))]
            done, wrong = disturbed(case, case.home / f"run{runs}" / "out", points)
            kills, same = kills + done, same + (wrong is None)
            lazy += done if case.options.get("lazy") else 0
            told = ", ".join(f"operation {last}" if last else f"{delay:.2f} s" for last, delay in points)
            print(f"run {runs}, {case.name}: {done} kills at {told}: {wrong or 'identical'}", flush=True)
    print(f"{same} of {runs} runs, killed {kills} times ({lazy} times with lazy weights), resumed to a bit-identical result")
    return 0 if same == runs else 1


def disturbed(case: Case, out: Path, points: list[tuple[int | None, float]]) -> tuple[int, str | None]:
    """Kill a run at each of some points and let it end. How many kills met it, and what is wrong with the result."""
    done = sum(killed(start(case, out, last, None), delay) for last, delay in points)
    if os.waitpid(start(case, out, None, None), 0)[1]:
        return done, "FAILED"
    found = contents(out)
    differs = [name for name in sorted({*case.wanted, *found}) if case.wanted.get(name) != found.get(name)]
    left = [path.name for path in out.parent.iterdir() if path != out]
    return done, f"DIFFERS in {differs}" if differs else f"LEFT {left}" if left else None


def undisturbed(case: Case) -> None:
    """Note the files of a run that ends by itself, its file operations and seconds; a second one must give the same files."""
    found = []
    count = case.home / "count"
    for name in ("first", "second"):
        (case.home / name).mkdir(parents=True)
        begin = time.perf_counter()
        code = os.waitpid(start(case, case.home / name / "out", None, count), 0)[1]
        case.seconds = time.perf_counter() - begin
        if code:
            raise SystemExit("the run fails without being killed")
        found.append(contents(case.home / name / "out"))
    if found[0] != found[1]:
        differs = [name for name in found[0] if found[0][name] != found[1].get(name)]
        raise SystemExit(f"two undisturbed runs differ in {', '.join(differs)}")
    case.wanted, case.operations = found[0], int(count.read_text())


def point(rng: random.Random, case: Case) -> tuple[int | None, float]:
    """Where to kill: before a file operation, or after a delay in seconds."""
    return (rng.randint(1, case.operations), 0.0) if rng.random() < 0.5 else (None, rng.uniform(0, case.seconds))


def killed(child: int, delay: float) -> int:
    """Wait for a process that kills itself, or kill it after a delay; whether it was killed before its end."""
    if delay:
        end = time.monotonic() + delay
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return 0
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return int(os.WIFSIGNALED(status))


if __name__ == "__main__":
    raise SystemExit(main())
