"""Runs that were stopped go on from their last finished pass, and end as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import small_model
import torch
from typer.testing import CliRunner

import irprune
from irprune.api import finished
from irprune.cli import app
from irprune.errors import OutputError, ResumeError
from irprune.ir.facts import Fact, Importance, Note, Workspace
from irprune.ir.program import Program
from irprune.pipeline.files import PART, PARTIAL, Interrupted, staged
from irprune.pipeline.passes import Facts, Pass, Result

# What tells how long things took.
TIMED = ("manifest.json", "report.json", "report.html")
TWICE = "score{criterion=taylor},prune{ratio=0.2 round_to=2},score{criterion=taylor},prune{ratio=0.2 round_to=2 steps=2}"


class Stopped(BaseException):
    """As a kill: nothing catches it."""


@dataclass(frozen=True)
class Measured(Note):
    values: np.ndarray
    path: Path
    odd: dict[Any, Any] = field(default_factory=dict)


class Stop(Pass):
    """Stop the process the first time, as often as it is told; note what it saw."""

    name: ClassVar = "stop"
    needs: ClassVar = (Workspace,)
    uses: ClassVar = (Importance,)
    gives: ClassVar = (Measured,)

    times: ClassVar[list[int]] = [0]
    runs: ClassVar[list[list[str]]] = []

    def run(self, program: Program, facts: Facts) -> Result:
        own = facts[Workspace].progress
        assert own is not None
        own.mkdir(parents=True, exist_ok=True)
        self.runs.append(sorted(path.name for path in own.iterdir()))
        (own / f"step{len(self.runs)}").write_text("x")
        if self.times[0]:
            self.times[0] -= 1
            raise Stopped
        return Result(program, (Measured(np.arange(3.0), facts[Workspace].path / "x", {1: (2, float("inf"))}),))


def run(out: Path, passes: Any, **options: Any) -> irprune.api.Run:
    torch.manual_seed(0)
    given = {"example_inputs": small_model.example_inputs(), "calibration": list(small_model.calibration()), "loss": small_model.loss}
    return irprune.run(small_model.Small(), passes, out=out, **{**given, **options})


def passes(text: str, stop_before: int) -> list[Pass]:
    from irprune.pipeline.parser import parse

    pipeline = parse(text)
    return [*pipeline[:stop_before], Stop(), *pipeline[stop_before:]]


def contents(out: Path) -> dict[str, Any]:
    told = json.loads((out / "manifest.json").read_text())
    for one in told["passes"]:
        del one["seconds"]
    told["files"] = {name: file for name, file in told["files"].items() if name not in TIMED}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.name not in TIMED}
    return {**files, "manifest": told}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stop, "times", [0])
    monkeypatch.setattr(Stop, "runs", [])


@pytest.mark.parametrize("stop_before", [1, 2, 4])
def test_a_run_goes_on_where_it_was_stopped(stop_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(tmp_path / "undisturbed", passes(TWICE, stop_before))
    Stop.runs.clear()
    Stop.times[0] = 2
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path / "out", passes(TWICE, stop_before), resume=True)
    assert not finished(tmp_path / "out")
    scored: list[str] = []
    from irprune_passes.score import Score

    measure = Score._measure
    monkeypatch.setattr(Score, "_measure", lambda self, *rest: scored.append(self.criterion) or measure(self, *rest))
    done = run(tmp_path / "out", passes(TWICE, stop_before), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert Stop.runs == [[], ["step1"], ["step1", "step2"]], "a pass finds its own progress again"
    # The scores before the stop are read and not measured again; those in steps are measured in any case.
    assert len(scored) == {1: 2, 2: 2, 4: 0}[stop_before]
    assert done.facts[Measured].path == (tmp_path / f".out{PART}" / "x")
    assert np.array_equal(done.facts[Measured].values, np.arange(3.0))
    assert done.facts[Measured].odd == {1: (2, float("inf"))}
    for name, tensor in wanted.program.tensors.items():
        assert torch.equal(done.program.tensors[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def shown(out: Path) -> Any:
    """What the report shows beyond the manifest, without times."""
    told = json.loads((out / "report.json").read_text())
    for share in told["shares"]:
        del share["ms"]
    return told


FROZEN = "discover{freeze=[conv.weight]},score{criterion=taylor},prune{ratio=0.2 round_to=2}"


@pytest.mark.parametrize(
    ("text", "stop_before"),
    [(TWICE, 2), (TWICE, 4), (FROZEN, 3), (f"{FROZEN},score,prune{{ratio=0.2 round_to=2}},export", 6)],
)
def test_the_report_shows_what_passes_saw_that_are_not_repeated(text: str, stop_before: int, tmp_path: Path) -> None:
    run(tmp_path / "undisturbed", passes(text, stop_before))
    Stop.times[0] = 1
    with pytest.raises(Stopped):
        run(tmp_path / "out", passes(text, stop_before), resume=True)
    run(tmp_path / "out", passes(text, stop_before), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    told = shown(tmp_path / "out")
    assert told["criterion"].startswith("taylor")
    assert sum(told["spreads"][0]["removed"]) > 0
    assert told == shown(tmp_path / "undisturbed")


def test_scores_that_are_measured_again_are_after_a_stop(tmp_path: Path) -> None:
    """``prune`` in steps needs the function that a score cannot store."""
    text = "score{criterion=taylor},prune{ratio=0.3 round_to=2 steps=2}"
    run(tmp_path / "undisturbed", passes(text, 1))
    Stop.times[0] = 1
    with pytest.raises(Stopped):
        run(tmp_path / "out", passes(text, 1), resume=True)
    run(tmp_path / "out", passes(text, 1), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_without_resume_a_failure_leaves_nothing(tmp_path: Path) -> None:
    Stop.times[0] = 1
    with pytest.raises(Stopped):
        run(tmp_path / "out", passes(TWICE, 2))
    assert list(tmp_path.iterdir()) == []


def stopped(out: Path, text: str = TWICE) -> None:
    Stop.times[0] = 1
    with pytest.raises(Stopped):
        run(out, passes(text, 2), resume=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "its seed was '0' and is '1'"),
        ({"passes": passes("score,prune{ratio=0.5 round_to=2}", 2)}, "its pipeline was '"),
        ({"example_inputs": (torch.randn(2, 1, 9, 9),)}, "its model is another one"),
        ({"calibration": list(small_model.calibration())[:1]}, "its calibration is another one"),
    ],
)
def test_another_run_is_not_gone_on_with(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    given = {"passes": passes(TWICE, 2), **changed}
    if "example_inputs" in changed:
        torch.manual_seed(1)
        model = small_model.Small()
        with pytest.raises(ResumeError, match=message):
            irprune.run(model, given["passes"], out=tmp_path / "out", resume=True, example_inputs=small_model.example_inputs())
    else:
        with pytest.raises(ResumeError, match=message) as caught:
            run(tmp_path / "out", resume=True, **given)
        assert "run it as before, or start anew with --force" in str(caught.value)
    run(tmp_path / "out", passes(TWICE, 2), resume=True)
    assert finished(tmp_path / "out") is not None


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_journal_is_said(damage: str, tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    path = sorted((tmp_path / f".out{PART}" / PARTIAL).glob("0*/tensors.safetensors"))[-1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    with pytest.raises(ResumeError, match="does not have the checksum" if damage == "cut" else "is missing"):
        run(tmp_path / "out", passes(TWICE, 2), resume=True)


def test_a_finished_run_is_said(tmp_path: Path) -> None:
    run(tmp_path / "out", "score,prune{ratio=0.3 round_to=2}", resume=True)
    with pytest.raises(ResumeError, match="the run has finished"):
        run(tmp_path / "out", "score,prune{ratio=0.3 round_to=2}", resume=True)


def test_a_disk_that_is_full_while_the_journal_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    run(tmp_path / "undisturbed", passes(TWICE, 2))
    with monkeypatch.context() as patch:
        patch.setattr("irprune.pipeline.journal.save_file", full)
        with pytest.raises(OutputError, match="No space left on device"):
            run(tmp_path / "out", passes(TWICE, 2), resume=True)
    run(tmp_path / "out", passes(TWICE, 2), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_two_processes_do_not_write_one_directory(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match="another process is writing this directory")
    with staged(tmp_path / "out", resume=True), refused, staged(tmp_path / "out", resume=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_resume_what_a_kill_left_goes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / f".out{PART}" / PARTIAL).mkdir(parents=True)
    with staged(tmp_path / "out"):
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with staged(tmp_path / "new", resume=True), pytest.raises(OutputError, match="another process is writing"), staged(tmp_path / "new"):
        pass


def test_an_interruption_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="what is done is kept for --resume"), staged(tmp_path / "out", resume=True):
        raise KeyboardInterrupt
    assert (tmp_path / f".out{PART}").is_dir()


@pytest.mark.parametrize("there", [False, True])
def test_the_last_steps_can_be_stopped_too(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the moves of single files into a directory that was there, or before the only one."""
    out = tmp_path / "out"
    if there:
        out.mkdir()
    run(tmp_path / "undisturbed", "score,prune{ratio=0.3 round_to=2}")
    moves = 0
    replace = os.replace

    def stopping(source: Any, target: Any) -> None:
        nonlocal moves
        if PART in str(source) and PART not in str(target):
            moves += 1
            if moves in (1, 3):
                raise Stopped
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    for _ in range(2 if there else 1):
        with pytest.raises(Stopped):
            run(out, "score,prune{ratio=0.3 round_to=2}", resume=True)
    run(out, "score,prune{ratio=0.3 round_to=2}", resume=True)
    assert contents(out) == contents(tmp_path / "undisturbed")


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import irprune, small_model, torch
from irprune.pipeline.journal import Journal
keep = Journal.keep
def killing(self, number, *rest):
    keep(self, number, *rest)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.keep = killing
irprune.run(sys.argv[2] + "/small_model.py", "score{criterion=taylor},prune{ratio=0.3 round_to=2},export", out=sys.argv[1])
"""


def test_a_process_that_was_killed_goes_on_from_the_command_line(tmp_path: Path) -> None:
    """Killed without ``--resume``; resumed twice, the second time with nothing left to do."""
    here = str(Path(small_model.__file__).parent)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "out"), here], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    command = ["run", f"{here}/small_model.py", "--passes", "score{criterion=taylor},prune{ratio=0.3 round_to=2},export"]
    for out in ("out", "undisturbed", "out"):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / out), "--resume"])
        assert result.exit_code == 0, result.output
        assert str(tmp_path / out) in result.output.replace("\n", "")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


LAZY = "score,prune{ratio=0.5 of=indices kinds=[heads,ffn] allocation=uniform round_to=1},repair,export{format=hf shard=4KB}"
LAZY_SCRIPT = """
import os, signal, sys
import irprune
from irprune.backend import stream
shard, count = stream._shard, 0
def killing(*given):
    global count
    count += 1
    if count == 4:
        stream._write_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return shard(*given)
stream._shard = killing
irprune.run("hf:" + sys.argv[2], sys.argv[3], out=sys.argv[1], lazy=True, calibration=sys.argv[4])
"""


def test_a_process_that_was_killed_while_it_wrote_shards_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pruned and refitted comes from the journal; shards that were whole are not written again, others leave nothing."""
    import transformers
    from irprune_passes.repair import Repair
    from safetensors.torch import save_file

    from irprune.backend import stream
    from irprune.pipeline.files import sha256

    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model", max_shard_size="5KB")
    save_file({"input_ids": torch.randint(60, (6, 12))}, tmp_path / "tokens.safetensors")
    given = [str(tmp_path / name) for name in ("out", "model")] + [LAZY, str(tmp_path / "tokens.safetensors")]
    done = subprocess.run([sys.executable, "-c", LAZY_SCRIPT, *given], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    calls: list[str] = []
    write, repair = stream._shard, Repair.run
    monkeypatch.setattr(stream, "_shard", lambda path, *rest: calls.append(path.name) or write(path, *rest))
    monkeypatch.setattr(Repair, "run", lambda *args: calls.append("repair") or repair(*args))
    command = ["run", f"hf:{tmp_path / 'model'}", "--passes", LAZY, "--set", "lazy=true", "--calibration", given[3], "--resume"]
    found = []
    for out in ("out", "undisturbed"):
        calls.clear()
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        found.append((list(calls), {path.name: sha256(path) for path in sorted((tmp_path / out / "hf").iterdir())}))
    (resumed, files), (undisturbed, wanted) = found
    assert files == wanted
    assert undisturbed[0] == "repair"
    assert resumed == undisturbed[4:]


def test_the_newest_unfinished_run_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / f".net-1{PART}").mkdir()
    (tmp_path / f".net-3{PART}").mkdir()
    with staged(tmp_path / "net", numbered=True, resume=True) as stage:
        assert stage.place.name == "net-3"
        assert stage.resumed
    with staged(tmp_path / "net", numbered=True, resume=True) as stage:
        assert stage.place.name == "net-1"
    with staged(tmp_path / "net", numbered=True, resume=True) as stage:
        assert stage.place.name == "net-2"
        assert not stage.resumed


def test_a_fact_of_a_kind_that_is_not_known() -> None:
    from irprune.pipeline.journal import _fact

    with pytest.raises(ResumeError, match=r"holds a os.system, which is not known here"):
        _fact({"data": ["os", "system", {}, False]}, {}, Path("x"))


def test_facts_stay_facts() -> None:
    assert issubclass(Measured, Fact)
