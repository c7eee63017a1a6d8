"""Is a run that was killed and resumed the same, bit for bit, as one that nobody disturbed?

A process runs a pipeline and is ended with SIGKILL: half of the time after a random delay, half of the time
right before a random one of its file operations (opening for writing, renaming, removing, making a
directory). It is started again with ``resume`` and killed again, a random number of times, and then left to
end. Every file of the run directory must be that of an undisturbed run; of the manifest, times are left out.

    python tools/bench_kill.py --kills 40
    python tools/bench_kill.py --kills 12 --target hf:PATH --passes 'score,prune{ratio=0.2},export{format=hf}'

Prints a line per run and in the end how many resumed to a bit-identical result; the exit code is 1 if not all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
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


def start(given: argparse.Namespace, out: Path, last: int | None, counted: Path | None) -> int:
    """Run in a process of its own; gives its id. ``counted`` gets the number of its file operations."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import irprune

        operations = FileOperations(out.parent, last)
        if irprune.api.finished(out) is None:
            irprune.run(given.target, given.passes, out=out, resume=True)
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
    parser.add_argument("--target", help="what to run; a small network by default")
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="irprune-kill-") as scratch:
        home = Path(scratch)
        if given.target is None:
            (home / "net.py").write_text(MODEL)
            given.target = str(home / "net.py")
        wanted, operations, seconds = undisturbed(given, home)
        print(f"undisturbed: {len(wanted)} files, {operations} file operations, {seconds:.1f} s", flush=True)
        kills = runs = same = 0
        while kills < given.kills:
            runs += 1
            out = home / f"run{runs}" / "out"
            points = [point(rng, operations, seconds) for _ in range(rng.randint(1, 3))]
            done = 0
            for last, delay in points:
                done += killed(start(given, out, last, None), delay)
            code = os.waitpid(start(given, out, None, None), 0)[1]
            found = contents(out) if code == 0 else {}
            good = code == 0 and found == wanted and sorted(path.name for path in out.parent.iterdir()) == ["out"]
            kills, same = kills + done, same + good
            told = ", ".join(f"operation {last}" if last else f"{delay:.2f} s" for last, delay in points)
            differs = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
            print(f"run {runs}: {done} kills at {told}: {'identical' if good else f'DIFFERS in {differs}'}", flush=True)
    print(f"{same} of {runs} runs, killed {kills} times, resumed to a bit-identical result")
    return 0 if same == runs else 1


def undisturbed(given: argparse.Namespace, home: Path) -> tuple[dict[str, str], int, float]:
    """Files of a run that ends by itself, its file operations and seconds; a second one must give the same files."""
    found = []
    for name in ("first", "second"):
        begin = time.perf_counter()
        code = os.waitpid(start(given, home / name / "out", None, home / "count"), 0)[1]
        seconds = time.perf_counter() - begin
        if code:
            raise SystemExit("the run fails without being killed")
        found.append(contents(home / name / "out"))
    if found[0] != found[1]:
        differs = [name for name in found[0] if found[0][name] != found[1].get(name)]
        raise SystemExit(f"two undisturbed runs differ in {', '.join(differs)}")
    return found[0], int((home / "count").read_text()), seconds


def point(rng: random.Random, operations: int, seconds: float) -> tuple[int | None, float]:
    """Where to kill: before a file operation, or after a delay in seconds."""
    return (rng.randint(1, operations), 0.0) if rng.random() < 0.5 else (None, rng.uniform(0, seconds))


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
