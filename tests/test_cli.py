"""The command line, on a small model and with the built-in passes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

import irprune
from irprune.backend import proof
from irprune.cli import app
from irprune.pipeline.manifest import Manifest

MODEL = str(Path(__file__).with_name("small_model.py"))
PIPELINE = "discover,score{criterion=taylor},prune{ratio=0.4 round_to=4},export,validate{rounds=5 seconds=0.1}"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One whole run, which several tests look at."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, call(
        "run", MODEL, "--passes", PIPELINE, "--out", out, "--timing", "--print-ir-after", "discover", "--print-ir-after", "prune"
    )


def test_a_run_writes_its_directory(done: tuple[Path, Result]) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    assert listing(out.parent) == [
        "out",
        *(f"out/{name}" for name in ("manifest.json", "model.onnx", "model.pt2", "recipe.safetensors", "report.html", "report.json")),
    ]
    manifest = Manifest.read(out)
    assert manifest.pipeline == PIPELINE
    assert [one.name for one in manifest.passes] == ["discover", "score", "prune", "export", "validate"]
    assert manifest.model.before.params == 387
    assert manifest.prune is not None
    assert manifest.prune.achieved["ratio"] == pytest.approx(1 - manifest.model.after.params / 387)
    assert manifest.prune.achieved["ratio"] >= 0.4
    assert (manifest.checks.shapes, manifest.checks.interface) == (True, True)
    assert manifest.onnx is not None
    assert manifest.onnx.parity_max_abs_err is not None
    assert manifest.onnx.parity_max_abs_err < 1e-4
    assert manifest.metrics.before is not None
    assert manifest.metrics.before.keys() == {"first class"}
    assert set(manifest.files) == {"model.onnx", "model.pt2", "recipe.safetensors", "report.json"}


def test_its_files_compute_the_same(done: tuple[Path, Result]) -> None:
    out, _ = done
    x = torch.randn(5, 1, 6, 6)
    want = torch.export.load(str(out / "model.pt2")).module()(x)
    (have,) = onnxruntime.InferenceSession(str(out / "model.onnx")).run(None, {"image": x.numpy()})
    np.testing.assert_allclose(have, want.detach().numpy(), atol=1e-5)


def test_a_run_ends_with_what_it_measured(done: tuple[Path, Result]) -> None:
    out, result = done
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[-1] == str(out)
    labels = [line.split("  ")[0] for line in lines]
    assert labels[2:9] == [
        *("parameters", "multiply-accumulates", "weights, bytes", "ONNX file, bytes"),
        *("torch latency, ms", "onnxruntime latency, ms", "first class"),
    ]
    manifest = Manifest.read(out)
    ratio = manifest.model.after.params / manifest.model.before.params
    assert lines[2].split() == ["parameters", "387", str(manifest.model.after.params), f"{ratio:.3f}"]
    assert lines[-5].startswith("asked for ratio=0.4 of=params allocation=local; reached 0.")
    assert lines[-4].startswith("proven: shapes, interface, numbers within")
    assert lines[-3].startswith("onnxruntime agrees with torch within")


def test_timing_and_the_program_go_to_stderr(done: tuple[Path, Result]) -> None:
    _, result = done
    before, after = result.stderr.split("// after prune{ratio=0.4 round_to=4}\n")
    assert before.startswith("// after discover\n")
    assert "%linear = linear(%mean, @hidden.weight, @hidden.bias) : f32[batch, ffn0:24]" in before
    assert "%linear = linear(%mean, @hidden.weight, @hidden.bias) : f32[batch, d" in after
    assert "score{criterion=taylor}" in result.stderr
    assert "share" in result.stderr
    assert "@hidden.weight" not in result.stdout
    assert "\x1b" not in result.output


def test_apply_replays_the_recipe_bit_by_bit(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = done
    result = call("apply", out / "recipe.safetensors", MODEL, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "proven: shapes, interface, numbers within" in result.stdout
    first, second = (torch.export.load(str(folder / "model.pt2")).state_dict for folder in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {k: v.tolist() for k, v in load_file(out / "recipe.safetensors").items()} == {
        k: v.tolist() for k, v in load_file(tmp_path / "again" / "recipe.safetensors").items()
    }


def test_validate_checks_an_old_run_again(done: tuple[Path, Result]) -> None:
    out, _ = done
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = call("validate", out, MODEL, "--options", "seconds=0.1 rounds=5")
    assert result.exit_code == 0, result.output
    assert "onnxruntime latency, ms" in result.stdout
    assert "onnxruntime agrees with torch within" in result.stdout
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_validate_refuses_a_file_that_is_not_the_runs_own(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = done
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"something else")
    result = call("validate", tmp_path, MODEL)
    assert result.exit_code == 2
    assert result.stderr == (
        f"[data] at {tmp_path}/model.onnx: the file is not the one that the run wrote\n  to go on: run the target again\n"
    )


def test_validate_fails_where_the_weights_are_others(done: tuple[Path, Result]) -> None:
    out, _ = done
    result = call("validate", out, MODEL, "--seed", 1, "--options", "seconds=0.1 rounds=5")
    assert result.exit_code == 4
    assert result.stderr.startswith("[parity]")


def test_validate_refuses_a_run_whose_weights_its_recipe_does_not_replay(tmp_path: Path) -> None:
    assert call("run", MODEL, "--passes", "lora{r=2},merge,export", "--out", tmp_path / "merged").exit_code == 0
    result = call("validate", tmp_path / "merged", MODEL)
    assert result.exit_code == 2
    assert "the run adapted the weights, which its recipe does not replay" in result.stderr


def test_toml_runs_the_same_pipeline(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text('[[passes]]\nname = "prune"\nratio = 0.4\nround_to = 4\n')
    assert call("run", MODEL, "--config", config, "--out", tmp_path / "a", "--quiet").output == ""
    assert call("run", MODEL, "--passes", "prune{ratio=0.4 round_to=4}", "--out", tmp_path / "b").exit_code == 0
    a, b = Manifest.read(tmp_path / "a"), Manifest.read(tmp_path / "b")
    assert a.pipeline == b.pipeline == "discover,score,prune{ratio=0.4 round_to=4}"
    assert a.files["recipe.safetensors"] == b.files["recipe.safetensors"]


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [call("run", MODEL, "--passes", "discover").stdout.splitlines()[-1] for _ in range(2)]
    assert paths == ["runs/small_model-1", "runs/small_model-2"]
    assert listing(tmp_path / "runs" / "small_model-2") == ["manifest.json", "model.pt2", "report.html", "report.json"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("run", MODEL, "--passes", PIPELINE, "--dry-run")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert rows[0] == ["group", "kind", "layer", "indices", "kept", "parameters", "removed"]
    assert {row[0] for row in rows[2:-2]} <= {"conv0", "ffn0"}
    assert "nothing was changed or written" in result.stdout
    assert listing(tmp_path) == []


def test_inspect_lists_groups(tmp_path: Path) -> None:
    result = call("inspect", MODEL)
    assert result.exit_code == 0, result.output
    (ffn,) = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("ffn0")]
    assert ffn == ["ffn0", "ffn", "24", "yes", "12", "hidden.bias:0", "hidden.weight:0", "head.weight:1"]
    assert "it is an axis of output 0 of the model" in result.stdout
    assert "of 387 parameters" in result.stdout


def test_inspect_as_json() -> None:
    found = json.loads(call("inspect", MODEL, "--json").stdout)
    assert found["params"] == 387
    ffn = next(group for group in found["groups"] if group["name"] == "ffn0")
    assert (ffn["kind"], ffn["size"], ffn["exact"], ffn["params_per_index"], ffn["frozen"]) == ("ffn", 24, True, 12, None)
    assert ffn["members"][0] == {"tensor": "hidden.bias", "axis": 0, "role": "write"}
    frozen = [group["frozen"]["code"] for group in found["groups"] if group["frozen"]]
    assert "interface" in frozen


def test_inspect_freezes_by_pattern() -> None:
    found = json.loads(call("inspect", MODEL, "--json", "--freeze", "hidden.*").stdout)
    frozen = {group["name"]: group["frozen"]["message"] for group in found["groups"] if group["frozen"]}
    assert frozen["ffn0"] == "hidden.bias is named to stay whole"


def test_inspect_draws_a_group(tmp_path: Path) -> None:
    result = call("inspect", MODEL, "--svg", tmp_path / "conv.svg", "--group", "conv0")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/conv.svg\n")
    texts = [element.text for element in ET.parse(tmp_path / "conv.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "conv0: 8 indices, conv, exact"
    assert {"conv.weight:0", "norm.running_mean:0", "hidden.weight:1", "conv2d", "relu"} <= set(texts)


def test_explain_names_the_line_that_decides() -> None:
    source = Path(MODEL).read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if "self.head(torch.relu" in text)
    result = call("explain", MODEL, "head.weight")
    assert result.stdout.splitlines() == [
        "head.weight: a parameter of shape 3 x 24",
        "  axis 0 (3)",
        "    fixed2: stays whole (interface): it is an axis of output 0 of the model, together with head.bias:0",
        f"      decided by the output, which is %linear_1 = linear at {MODEL}:{line}",
        "      by way of %linear_1 = linear",
        "  axis 1 (ffn0:24)",
        "    ffn0: prunable, 24 indices, together with hidden.bias:0, hidden.weight:0",
    ]


def test_passes_are_listed_and_documented() -> None:
    listed = call("passes").stdout
    assert all(f" {name} " in listed for name in ("discover", "score", "prune", "export", "validate"))
    page = call("passes", "prune").stdout
    assert "a number, at least 0 and less than 1" in page
    markdown = call("passes", "prune", "--markdown").stdout
    assert markdown.startswith("# prune\n")
    assert "| `ratio` | a number, at least 0 and less than 1 | `0.2` |" in markdown


def test_help_comes_at_once() -> None:
    script = "import sys; from irprune.cli import app; assert 'torch' not in sys.modules; print('pydantic' in sys.modules)"
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert time.process_time() - start < 1


def test_help_documents_the_exit_codes() -> None:
    for arguments in (("--help",), ("run", "--help")):
        text = call(*arguments).stdout
        assert all(f"\n {code}" in text for code in ("0 done", "1 a fault", "2 bad input", "3 cannot", "4 a check", "5 the output", "130"))
    assert call("--version").stdout == f"{irprune.__version__}\n"


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "no pipeline": (
        [],
        2,
        "[option]: no pipeline is given\n"
        '  to go on: give it as text with --passes "discover,score,prune{ratio=0.2}" or as a TOML file with --config',
    ),
    "two pipelines": (["--passes", "discover", "--config", "x.toml"], 2, "[option]: the pipeline is given twice"),
    "unknown pass": (["--passes", "prun"], 2, "[option] at pipeline text, column 1: there is no pass 'prun'; did you mean 'prune'?"),
    "unknown option": (["--passes", "prune{ratoi=1}"], 2, "[option] at pipeline text, column 7: pass 'prune' has no option 'ratoi'"),
    "ratio": (
        ["--passes", "prune{ratio=1.0}"],
        2,
        "[option] at pipeline text, column 7: pass 'prune', option 'ratio': 1.0 is not allowed; "
        "it takes a number, at least 0 and less than 1\n",
    ),
    "unfit pipeline": (["--passes", "validate"], 2, "[pipeline]: pass 'validate' needs OnnxFile, which no pass before it gives"),
    "missing config": (["--config", "none.toml"], 2, "[option] at none.toml: the pipeline file cannot be read: No such file or directory"),
    "print after nothing": (["--passes", "discover", "--print-ir-after", "x"], 2, "[option] at --print-ir-after: there is no pass 'x'"),
    "nothing to plan": (["--passes", "discover", "--dry-run"], 2, "[pipeline]: no pass of the pipeline changes the program"),
    "setting": (["--passes", "discover", "--set", "x"], 2, "[option] at --set: 'x' is not KEY=VALUE"),
    "unknown setting": (["--passes", "discover", "--set", "x=1"], 2, "[option]: unknown target option 'x'"),
    "unwritable": (["--passes", "discover", "--out", "/proc/none/out"], 5, "[output] at /proc/none/out: cannot write: No such file"),
    "out is a file": (["--passes", "discover", "--out", MODEL], 5, f"[output] at {MODEL}: cannot write: File exists"),
    "budget": (["--passes", "prune{ratio=0.9 min_keep=8}"], 3, "[budget]"),
    "nothing prunable": (["--passes", "prune{kinds=experts}"], 3, "[nothing-prunable]"),
    "missing calibration": (["--passes", "score{criterion=taylor}", "--calibration", "none.npz"], 2, "[data] at none.npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_leaves_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    result = call("run", MODEL, *arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith(message), result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert listing(tmp_path) == []


OTHER = {
    "missing model": (["run", "none.py", "--passes", "discover"], 2, "[target] at none.py"),
    "missing recipe": (["apply", "none.safetensors", MODEL], 2, "[recipe] at none.safetensors: the recipe cannot be read"),
    "no run": (["validate", "none", MODEL], 2, "[data] at none/manifest.json: the manifest cannot be read: No such file or directory"),
    "svg alone": (["inspect", MODEL, "--svg", "x.svg"], 2, "[option]: --svg and --group go together"),
    "unknown group": (["inspect", MODEL, "--svg", "x.svg", "--group", "ffn9"], 2, "[option] at --group: there is no group 'ffn9'; did you"),
    "unknown name": (
        ["explain", MODEL, "hiden.weight"],
        2,
        "[option]: the program has no parameter, module or group 'hiden.weight'; did you mean 'hidden.weight'?\n",
    ),
    "unknown page": (["passes", "prun"], 2, "[option]: there is no pass 'prun'; did you mean 'prune'?"),
}


@pytest.mark.parametrize("case", OTHER)
def test_bad_input_of_other_commands(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, message = OTHER[case]
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message), result.stderr
    assert listing(tmp_path) == []


def test_a_directory_in_use_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = call("run", MODEL, "--passes", "discover", "--out", tmp_path)
    assert result.exit_code == 5
    assert result.stderr == (
        f"[output] at {tmp_path}: the directory is not empty\n  to go on: give another place with --out, or replace it with --force\n"
    )
    assert listing(tmp_path) == ["mine.txt"]
    assert call("run", MODEL, "--passes", "discover", "--out", tmp_path, "--force").exit_code == 0
    assert listing(tmp_path) == ["manifest.json", "mine.txt", "model.pt2", "report.html", "report.json"]


@pytest.mark.parametrize("victim", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_nothing(victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, victim, full)
    result = call("run", MODEL, "--passes", "prune{ratio=0.4 round_to=4}", "--out", tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == 5
    assert result.stderr.startswith(f"[output] at {tmp_path}/")
    assert "cannot write: No space left on device" in result.stderr
    assert listing(tmp_path) == []


def test_a_failed_proof_writes_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "TOLERANCE", dict.fromkeys(proof.TOLERANCE, -1.0))
    result = call("run", MODEL, "--passes", PIPELINE, "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert result.stderr.startswith("[proof]")
    assert listing(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irprune import api

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "save_pt2", interrupted)
    result = call("run", MODEL, "--passes", "prune{ratio=0.4 round_to=4}", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing is left behind\n")
    assert listing(tmp_path) == []


def test_our_own_fault_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from irprune import api

    def broken(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(api, "save_pt2", broken)
    result = call("run", MODEL, "--passes", "discover", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)
    assert listing(tmp_path) == []
