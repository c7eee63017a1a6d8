"""The report and the comparison as pages: what they say, and how they look in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import browser, look
from typer.testing import CliRunner

from irprune import api
from irprune.cli import app
from irprune.errors import DataError, OptionError
from irprune.report import compare as comparing
from irprune.report import html
from irprune.report.compare import pareto

MODEL = str(Path(__file__).parents[1] / "small_model.py")
SECTIONS = ["asked", "sizes", "map", "scores", "shares", "frozen", "checks", "speed", "load", "made"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for ratio in (0.2, 0.4):
        pipeline = f"score{{criterion=taylor}},prune{{ratio={ratio}}},export,validate{{rounds=5 seconds=0.1}}"
        api.run(MODEL, pipeline, out=folder / str(ratio))
    return [folder / "0.2", folder / "0.4"]


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


def edited(run: Path, **values: Any) -> str:
    """The report after the manifest was changed."""
    said = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**said, **values}))
    return api.report(run).read_text()


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)">', page)


# -- the report -----------------------------------------------------------------------------------


def test_a_report_has_its_sections(runs: list[Path]) -> None:
    page = (runs[0] / "report.html").read_text()
    assert sections(page) == SECTIONS
    said = json.loads((runs[0] / "manifest.json").read_text())
    for figure in ("387", f"{said['model']['after']['params']:,}", "first class", said["pipeline"]):
        assert figure in page
    assert "torch.export.load(&#34;model.pt2&#34;)" in page
    assert "irprune apply recipe.safetensors" in page


def test_it_is_written_again_as_it_was(run: Path) -> None:
    before = (run / "report.html").read_text()
    assert CliRunner().invoke(app, ["report", str(run)]).output.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == before


def test_it_needs_nothing_else(runs: list[Path]) -> None:
    page = (runs[0] / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert not re.findall(r"#0a000\d", page), "a placeholder colour is left"


def test_what_is_absent_is_left_out(run: Path) -> None:
    for name in ("report.json", "model.onnx", "recipe.safetensors"):
        (run / name).unlink()
    page = edited(run, speedup={}, onnx=None, prune=None)
    assert sections(page) == ["asked", "sizes", "checks", "load", "made"]
    assert "InferenceSession" not in page
    assert "Nothing was pruned" in page


def test_text_is_escaped(run: Path) -> None:
    page = edited(run, target="<script>alert(1)</script>", notes=["a < b"])
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt; b" in page


@pytest.mark.parametrize(
    "said",
    [
        {"recover": {"history": [{"step": 0, "loss": 3.0, "held_out_loss": 3.2}, {"step": 5, "loss": 2.0, "held_out_loss": 2.5}]}},
        {"recover": {"loss": [[0, 3.0], [5, 2.0]]}},
        {"recovery": [{"losses": [3.0, 2.5, 2.0], "held_out": [[0, 3.5], [2, 2.5]], "best": 2.5}]},
    ],
)
def test_curves_are_found_by_their_shape(run: Path, said: dict[str, Any]) -> None:
    page = edited(run, **said)
    assert "recovery" in sections(page)
    assert "from 3 to 2" in page


def test_what_other_passes_noted_is_shown(run: Path) -> None:
    page = edited(run, repair={"method": "least_squares", "errors": {"down": [0.5, 0.25]}}, huggingface={"folder": "hf", "layout": "plain"})
    assert "least_squares" in page
    assert "0.5 → 0.25" in page
    (run / "hf").mkdir()
    assert "from_pretrained" in api.report(run).read_text()


def test_an_evaluation_is_shown(run: Path) -> None:
    text = {"perplexity": 12.5, "loss": 2.5, "windows": 4, "window": 128, "tokens": 508}
    task = {"acc": 0.5, "acc_norm": None, "stderr": 0.1, "documents": 9}
    said = {"target": "x", "backend": "onnx", "device": "cpu", "texts": {"ptb": text}, "tasks": {"piqa": task}, "average": {}}
    (run / "evaluation.json").write_text(json.dumps(said))
    page = api.report(run).read_text()
    assert "ptb perplexity" in page
    assert "12.5" in page


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "the manifest cannot be read" in result.stderr
    with pytest.raises(DataError):
        html.write(tmp_path)


# -- the comparison -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "larger", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0), (0.7, 1.5)], True, [0, 1]),
        ([(0.5, 1.0), (0.6, 2.0), (0.7, 0.5)], False, [0, 2]),
        ([(0.7, 1.0), (0.5, 1.0)], True, [1]),
        ([(0.5, 1.0), (0.5, 2.0)], True, [1]),
        ([(0.5, 1.0), (0.5, 1.0)], True, [0]),
    ],
)
def test_the_front_by_hand(points: list[tuple[float, float]], larger: bool, best: list[int]) -> None:
    assert pareto(points, larger) == best


def test_which_way_is_better() -> None:
    assert [comparing.larger_is_better(name) for name in ("accuracy", "ptb perplexity", "held-out loss", "onnxruntime latency, ms")] == [
        *(True, False, False, False)
    ]


def test_runs_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0][:2] == ["run", "parameters"]
    assert [line[0] for line in lines[2:4]] == ["0.2", "0.4"]
    page = (tmp_path / "c.html").read_text()
    assert sections(page) == ["table", "charts", "how"]
    assert page.count('class="wide"') == len(comparing.compare(runs).measured) == 2


def test_runs_of_the_same_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(runs[1], tmp_path / "b" / "0.2")
    names = [entry.name for entry in comparing.compare([runs[0], other]).entries]
    assert names == [f"{runs[0].parent.name}/0.2", "b/0.2"]


def test_fewer_than_two_runs_are_refused(runs: list[Path]) -> None:
    for given in ([runs[0]], [runs[0], runs[0]]):
        with pytest.raises(OptionError, match="two or more different runs"):
            comparing.compare(given)


# -- in a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 390])
def test_pages_in_a_browser(runs: list[Path], tmp_path: Path, width: int, dark: bool) -> None:
    browser()
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    steps = [{"step": step, "loss": 3 - step / 10, "held_out_loss": 3.1 - step / 12} for step in range(9)]
    edited(run, recover={"history": steps}, notes=["a/very/long/path/without/any/blank/" * 8])
    api.compare(runs, out=tmp_path / "compare.html")
    pages = {
        run / "report.html": ([*SECTIONS[:8], "recovery", *SECTIONS[8:]], 2),
        tmp_path / "compare.html": (["table", "charts", "how"], 2),
    }
    for page, (wanted, figures) in pages.items():
        seen = look(page, width, dark=dark)
        assert seen["errors"] == []
        assert (seen["width"], seen["dark"], seen["scripts"]) == (width, dark, 0)
        assert seen["scroll"] <= width, seen["wide"]
        assert seen["wide"] == []
        assert seen["sections"] == wanted
        assert len(seen["marks"]) == figures, "each figure is shown once"
        assert min(seen["marks"]) >= 2, "each figure has its data, which says what it is"
        assert seen["small"] >= 10, "text in figures stays readable"
        assert seen["contrast"][0] >= 4.5, f"{seen['contrast'][1]!r} cannot be read on its background (WCAG AA)"
