"""irprune from Python, on modules in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import small_model
import torch
from torch import nn

import irprune
from irprune.errors import OptionError, PipelineError
from irprune.ir.facts import PruneReport, Task
from irprune.ir.program import Program
from irprune.pipeline.manifest import Manifest
from irprune.pipeline.parser import parse


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.second = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.second(torch.relu(self.first(x))) * scale}


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return small_model.Small()


def test_a_module_in_memory(module: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = irprune.run(
        module,
        "score{criterion=taylor},prune{ratio=0.4 round_to=4}",
        example_inputs=small_model.example_inputs(),
        calibration=small_model.calibration,
        loss=small_model.loss,
        out=tmp_path / "out",
    )
    assert result.path == tmp_path / "out"
    assert isinstance(result.program, Program)
    assert result.program(torch.randn(3, 1, 6, 6)).shape == (3, 3)
    assert result.manifest == Manifest.read(tmp_path / "out")
    assert result.manifest.target == "Small"
    assert result.plan is None
    assert all(kept < size and kept % 4 == 0 for kept, size in result.facts[PruneReport].kept.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_batches_may_be_a_list(module: nn.Module, tmp_path: Path) -> None:
    batches = list(small_model.calibration())
    for given in (batches, lambda: batches):
        result = irprune.run(
            module,
            "score{criterion=taylor},prune{ratio=0.4}",
            example_inputs=small_model.example_inputs(),
            calibration=given,
            loss=small_model.loss,
            dry_run=True,
        )
        assert result.plan


def test_keyword_inputs_and_dynamic_axes(tmp_path: Path) -> None:
    result = irprune.run(
        TwoInputs(),
        "prune{ratio=0.3 round_to=1}",
        example_inputs={"x": torch.randn(2, 4), "scale": torch.randn(1)},
        dynamic={"x": {0: "rows"}, "scale": {}},
        out=tmp_path / "out",
    )
    loaded = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    x, scale = torch.randn(7, 4), torch.randn(1)
    torch.testing.assert_close(loaded(x=x, scale=scale)["logits"], result.program(x=x, scale=scale)["logits"])
    assert result.program.tensors["first.weight"].shape[0] < 12


def test_a_traced_program_is_a_target_too(module: nn.Module, tmp_path: Path) -> None:
    program = irprune.trace(module, small_model.example_inputs())
    text = str(program.module.graph)
    result = irprune.run(program, parse("prune{ratio=0.4 round_to=4}"), out=tmp_path / "out", seed=3)
    assert result.manifest.target == "program"
    assert result.manifest.seed == result.facts[Task].seed == 3
    assert str(program.module.graph) == text
    assert program.provenance == ()
    assert [entry.text for entry in result.program.provenance] == ["discover", "score", "prune{ratio=0.4 round_to=4}"]


def test_groups_of_a_module(module: nn.Module) -> None:
    program, groups = irprune.groups(module, example_inputs=small_model.example_inputs())
    assert {group.name for group in groups.prunable} == {"conv0", "ffn0"}
    assert irprune.groups(program, freeze=["conv.*"])[1]["conv0"].frozen is not None


def test_meta_tensors_are_counted_without_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(), nn.Linear(4000, 1000))
        example = (torch.randn(2, 1000),)
    result = irprune.run(module, "score{criterion=random},prune{ratio=0.5}", example_inputs=example, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("manifest.json", "recipe.safetensors", "report.html", "report.json")
    ]
    kept, size = result.facts[PruneReport].kept["ffn0"]
    assert size == 4000
    assert kept == pytest.approx(2000, abs=8)
    assert result.manifest.model.after.params == kept * 2001 + 1000
    assert result.manifest.checks.numbers is not None
    assert result.manifest.checks.numbers.max_abs_err is None


def test_a_dry_run_leaves_the_program(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = irprune.run(module, "prune{ratio=0.4 round_to=4},prune{ratio=0.1}", example_inputs=small_model.example_inputs(), dry_run=True)
    assert result.plan
    assert all(row.kept < row.size for row in result.plan)
    assert result.path is None
    assert [step.of.name for step in result.steps] == ["discover", "score", "prune"]
    assert result.manifest.model.before == result.manifest.model.after
    assert list(tmp_path.iterdir()) == []


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no pipeline": ({"passes": None}, OptionError, "no pipeline is given"),
    "option of a module": ({"passes": "discover", "colour": 1}, OptionError, "unknown option 'colour' for a module"),
    "nothing to plan": ({"passes": "discover", "dry_run": True}, PipelineError, "there is nothing to plan"),
    "no plan": ({"passes": "apply{recipe=x}", "dry_run": True}, PipelineError, "pass 'apply' cannot plan without changing the program"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case: str, module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, kind, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        irprune.run(module, example_inputs=small_model.example_inputs(), **options)
    assert list(tmp_path.iterdir()) == []


def test_an_option_of_modules_is_refused_for_a_file() -> None:
    with pytest.raises(OptionError, match="unknown target option 'loss'"):
        irprune.load(small_model.__file__, loss=small_model.loss)


def test_an_unknown_name_is_no_function() -> None:
    with pytest.raises(AttributeError, match="module 'irprune' has no attribute 'prune'"):
        irprune.prune  # noqa: B018


class Routed(nn.Module):
    """Each row goes to two of four experts, whose outputs are added up by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        hidden = torch.einsum("ri,rkio->rko", x, self.up[chosen]).relu()
        return (torch.einsum("rki,rkio->rko", hidden, self.down[chosen]) * weights[..., None]).sum(1)


def test_as_many_experts_stay_as_a_row_goes_to() -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(5, 6),)
    result = irprune.run(Routed(), "score{criterion=magnitude},prune{ratio=0.9 of=indices kinds=experts round_to=1}", example_inputs=inputs)
    assert {name: tuple(tensor.shape) for name, tensor in result.program.tensors.items()} == {
        "router.weight": (2, 6),
        "router.bias": (2,),
        "up": (2, 6, 8),
        "down": (2, 8, 3),
    }


def test_a_whole_run_traces_the_model_once(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(args[0])
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    pipeline = "discover,score{criterion=magnitude},prune{ratio=0.3},export"
    irprune.run(module, pipeline, example_inputs=small_model.example_inputs(), out=tmp_path / "out")
    assert traces == [module]


def test_a_run_from_python_shows_no_warning_of_a_library(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    torch.manual_seed(0)
    example = small_model.example_inputs()
    irprune.run(small_model.Small(), "score,prune{ratio=0.3},export", out=tmp_path / "out", example_inputs=example)
    assert [str(one.message) for one in recwarn.list] == []
