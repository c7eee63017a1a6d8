"""The pass ``recover``."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from irprune_passes.lora import Lora, Merge
from irprune_passes.recover import Recover
from irprune_passes.recover import recover as module
from irprune_passes.recover.engine import Engine, relocate, trunk
from irprune_passes.recover.objective import distance, divergence
from irprune_passes.recover.recover import Recovery, rate
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from irprune import api
from irprune.analysis.groups import discover
from irprune.backend.rewrite import remove
from irprune.errors import DataError, OptionError
from irprune.frontend.batches import Binding
from irprune.ir.facts import Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.instruments import fingerprint
from irprune.pipeline.passes import Facts
from tests import toys


class Blocks(nn.Module):
    """Two residual blocks with a norm in front of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(10, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(x)


@functools.cache
def blocks() -> Program:
    return toys.program(Blocks(), torch.linspace(-1, 1, 8).view(2, 4))


@functools.cache
def smaller() -> tuple[Program, PruneReport]:
    """Four of ten neurons of each block are gone, and two of six positions of the residual stream."""
    groups = discover(blocks())
    plan = Plan({group.name: np.arange(group.size) >= (4 if group.size == 10 else 2) for group in groups.prunable})
    after = remove(blocks(), {group.var: plan.keep[group.name] for group in groups.prunable})
    return after, PruneReport({}, {}, {group.key: plan.keep[group.name] for group in groups.prunable}, {})


def batches(count: int = 10, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for _ in range(count):
        x = torch.randn(size, 4, generator=generator)
        with torch.no_grad():
            out.append((x, blocks()(x)))
    return out


def task(count: int = 10, **parts: Any) -> Task:
    given = {"loss": lambda outputs, batch: nn.functional.mse_loss(outputs, batch[1]), **parts}
    return Task("toy.py", calibration=lambda: batches(count), inputs=Binding(["x"], blocks().interface), **given)


def recovered(program: Program, *facts: Any, **options: Any) -> tuple[Program, Any]:
    one = Recover.model_validate({"lr": 1e-2, "steps": 40, **options})
    before = fingerprint(program)
    result = one.run(program, Facts([Original(blocks()), smaller()[1], *facts]).restricted(one))
    assert fingerprint(program) == before
    (report,) = result.facts
    assert isinstance(report, Recovery)
    return result.program, report.runs[-1]


def weights(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in program.tensors.items()}


def same(a: Program, b: Program) -> bool:
    return all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


@pytest.mark.parametrize("weight", ["loss", "logits", "hidden"])
def test_each_objective_falls_on_held_out_data(weight: str) -> None:
    options = {"loss": 0, weight: 1}
    after, run = recovered(smaller()[0], task(), train="all", **options)
    assert list(run["parts"]) == [weight]
    assert run["best"] < 0.5 * run["held_out"][0][1]
    assert run["best"] == min(loss for _, loss in run["held_out"])
    assert (run["steps"], len(run["losses"]), run["samples"]) == (40, 40, 240)
    assert run["trained"] == sum(tensor.numel() for tensor in after.tensors.values())


def test_a_weighted_sum_is_one() -> None:
    _, run = recovered(smaller()[0], task(), train="all", loss=0.5, logits=2, hidden=0.25, steps=3)
    parts = run["parts"]
    for step, total in enumerate(run["losses"]):
        assert total == pytest.approx(0.5 * parts["loss"][step] + 2 * parts["logits"][step] + 0.25 * parts["hidden"][step])


def test_the_trunk_is_the_residual_stream() -> None:
    assert trunk(blocks()) == ["linear", "add", "add_1"]


def test_hidden_states_are_compared_at_the_kept_indices() -> None:
    """A program whose removal is exact has the values of the original there: the distance is zero."""
    groups = discover(blocks())
    keep = {group.name: np.ones(group.size, dtype=bool) for group in groups.prunable}
    gone = toys.program(Blocks(), torch.linspace(-1, 1, 8).view(2, 4))
    with torch.no_grad():
        gone.tensors["ups.0.weight"][:4].zero_()
        gone.tensors["ups.0.bias"][:4].zero_()
    name = next(group.name for group in groups.prunable if any(m.tensor == "ups.0.weight" and m.axis == 0 for m in group.members))
    keep[name][:4] = False
    after = remove(gone, {group.var: keep[group.name] for group in discover(gone).prunable})
    report = PruneReport({}, {}, {group.key: keep[group.name] for group in groups.prunable}, {})
    one = Recover(loss=0, hidden=1, steps=1, train="all")
    (found,) = one.run(after, Facts([Original(gone), report, task()])).facts
    assert isinstance(found, Recovery)
    assert found.runs[0]["parts"]["hidden"][0] < 1e-12


def test_only_adapters_are_trained_and_merged() -> None:
    adapted = Lora(r=2, dropout=0.1).run(smaller()[0], Facts()).program
    after, run = recovered(adapted, task())
    changed = {name for name, tensor in weights(after).items() if not torch.equal(tensor, weights(adapted)[name])}
    assert changed == {name for name in after.tensors if "lora_" in name}
    assert run["best"] < 0.7 * run["held_out"][0][1]
    merged = Merge().run(after, Facts()).program
    x = batches()[0][0]
    torch.testing.assert_close(merged(x), after(x))


def test_norms_and_biases_alone() -> None:
    after, run = recovered(smaller()[0], task(), train="norms_and_biases")
    changed = {name for name, tensor in weights(after).items() if not torch.equal(tensor, weights(smaller()[0])[name])}
    assert changed == {name for name, tensor in after.tensors.items() if tensor.ndim == 1}
    assert run["best"] < run["held_out"][0][1]


def test_accumulated_batches_are_one_batch() -> None:
    """A step of three micro-batches of unequal size has the gradient of their union."""

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = batches(1, 12)[0]
        yield from ((x[:2], y[:2]), (x[2:7], y[2:7]), (x[7:], y[7:]))

    options = {"train": "all", "held_out": 0, "steps": 2}
    apart, first = recovered(smaller()[0], _with(pieces), accumulate=3, **options)
    whole, second = recovered(smaller()[0], _with(lambda: batches(1, 12)), **options)
    assert first["losses"] == pytest.approx(second["losses"])
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(apart)[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_of_accumulated_batches_are_those_of_one(masked: bool) -> None:
    """Whatever the teacher's values in each piece, and what does not count has no part."""
    x, y = batches(1, 12)[0]
    counts = torch.tensor([True, True, False, True, False, True, True, True, False, True, False, False])
    x = torch.where(counts[:, None], x * torch.linspace(1, 4, 12)[:, None], 1e3) if masked else x * torch.linspace(1, 4, 12)[:, None]
    whole = (x, y, counts)

    def about(*cuts: tuple[int, int]) -> Task:
        pieces = [tuple(part[start:stop] for part in whole) for start, stop in cuts]
        return dataclasses.replace(_with(lambda: pieces), positions=(lambda batch: batch[2]) if masked else None)

    options = {"train": "all", "held_out": 0, "steps": 2, "loss": 0, "hidden": 1}
    apart, first = recovered(smaller()[0], about((0, 2), (2, 7), (7, 12)), accumulate=3, **options)
    one, second = recovered(smaller()[0], about((0, 12)), **options)
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(apart)[name], tensor, atol=2e-5, rtol=1e-4)
    if masked:
        x[~counts] = 0
        _, third = recovered(smaller()[0], about((0, 12)), **options)
        assert third["losses"] == pytest.approx(second["losses"])


def _with(calibration: Any) -> Task:
    return dataclasses.replace(task(), calibration=calibration)


def test_gradient_checkpointing_changes_nothing() -> None:
    adapted = Lora(r=2, dropout=0.2).run(smaller()[0], Facts()).program
    plain, first = recovered(adapted, task(), steps=3, hidden=0.5)
    cut, second = recovered(adapted, task(), steps=3, hidden=0.5, segments=3)
    assert first["losses"] == second["losses"]
    assert same(plain, cut)
    assert len(Engine(adapted, segments=3)._segments) == 3


class InPlace(nn.Module):
    """Activations overwrite what the norms give; one reaches it through a view and a dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if number == 0 else 6, 6, 3, padding=1) for number in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 25, 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu_(norm(conv(x)))
        x = self.dropout(x + 1.0).flatten(1)
        return self.head(x.mul_(2.0))


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_gradient_checkpointing_with_in_place_operations(segments: int) -> None:
    """No segment begins between a value and the last write to it; other places are cut."""
    program = toys.program(InPlace(), torch.zeros(2, 3, 5, 5))
    drawn = [(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed)), torch.zeros(2, 2)) for seed in range(3)]
    facts = Facts([Task("toy.py", calibration=lambda: drawn, inputs=Binding(["x"], program.interface), loss=task().loss)])
    plain, cut = (Recover(steps=2, held_out=0, lr=1e-2, segments=count).run(program, facts) for count in (1, segments))
    assert plain.facts[0].runs[0]["losses"] == cut.facts[0].runs[0]["losses"]  # type: ignore[attr-defined]
    assert same(plain.program, cut.program)
    assert len(Engine(program, segments=segments)._segments) == segments


def test_a_seed_decides_everything() -> None:
    adapted = Lora(r=2, dropout=0.2).run(smaller()[0], Facts()).program
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        results.append(recovered(adapted, task(), steps=4, seed=seed)[0])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_the_best_parameters_are_returned_and_patience_ends() -> None:
    """With a rate that is far too high the start is the best that there is."""
    after, run = recovered(smaller()[0], task(), train="all", lr=3.0, clip=None, evaluate_every=2, patience=3)
    assert (run["best_step"], run["steps"]) == (0, 6)
    assert same(after, smaller()[0])


class Killed(Exception):
    pass


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = Lora(r=2, dropout=0.2).run(smaller()[0], Facts()).program
    options = {"steps": 8, "evaluate_every": 2}
    whole, told = recovered(adapted, task(), **options)
    right = module._Training._step

    def killing(self: Any, step: int, log: Any) -> Any:
        if step == 5:
            raise Killed
        return right(self, step, log)

    for state in ({}, {"state": tmp_path / "kept.safetensors"}):
        place = tmp_path / "run"
        place.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(module._Training, "_step", killing)
            with pytest.raises(Killed):
                recovered(adapted, task(), Workspace(place, place / "progress"), **options, **state)
        again, run = recovered(adapted, task(), Workspace(place, place / "progress"), **options, **state)
        assert run["losses"] == told["losses"]
        assert same(again, whole)
    with pytest.raises(DataError, match="other options, data or weights"):
        recovered(adapted, task(), **{**options, "lr": 1e-3}, **state)
    (tmp_path / "kept.safetensors").write_bytes(b"cut off")
    with pytest.raises(DataError, match="cannot be read"):
        recovered(adapted, task(), **options, **state)


def test_half_precision_is_trained_in_single_precision() -> None:
    model = toys.Mlp().bfloat16()
    program = toys.program(model, torch.linspace(-1, 1, 8).view(2, 4).bfloat16())
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches()]
    facts = Facts([Task("toy.py", calibration=lambda: data, inputs=Binding(["x"], program.interface), loss=task().loss)])
    result = Recover(lr=1e-4, steps=20, held_out=0).run(program, facts)
    assert {tensor.dtype for tensor in result.program.tensors.values()} == {torch.bfloat16}
    assert not same(result.program, program)


class Narrow(nn.Module):
    """A norm in float32 between halves, as language models write it: a cast down stands in the graph."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.linspace(0.3, 1.7, 8))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).float()
        h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(self.dtype)
        return self.head(h * self.scale + torch.full((8,), 0.1, dtype=self.dtype, device=x.device))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_single_precision_is_that_of_the_same_weights_in_float32(half: torch.dtype, precision: str) -> None:
    """Weights that are trained and that are not, inputs, casts and the teacher: the losses are those of a model in float32."""
    x = torch.linspace(-1, 1, 8).view(2, 4)
    runs = []
    for dtype in (half, torch.float32):
        model = toys.program(Narrow(half).to(half), x.to(half)) if dtype is half else None
        if model is None:
            wide = Narrow(torch.float32)
            wide.load_state_dict({name: tensor.detach().float() for name, tensor in runs[0][1].tensors.items()})
            model = toys.typed(toys.trace(wide.eval(), (x,)))
        data = [(given.to(half).to(dtype), wanted.to(half).to(dtype)) for given, wanted in batches()]
        about = Task("toy.py", calibration=lambda data=data: data, inputs=Binding(["x"], model.interface), loss=task().loss)  # type: ignore[misc]
        teacher = model.clone()
        one = Recover(lr=1e-2, steps=4, logits=0.5, train="norms_and_biases", precision=precision, device="cpu")  # type: ignore[arg-type]
        (found,) = one.run(model, Facts([about, Original(toys.typed(teacher))])).facts
        runs.append((found.runs[0], model))  # type: ignore[attr-defined]
    (narrow, _), (single, _) = runs
    assert narrow["parts"]["loss"] == pytest.approx(single["parts"]["loss"], rel=1e-6)
    assert narrow["parts"]["logits"] == pytest.approx(single["parts"]["logits"], rel=1e-4, abs=1e-9)


def test_bytes_that_are_read_keep_their_type() -> None:
    class Bytes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.get_parameter("w") * (x.view(torch.int16) & 1)

    model = Bytes()
    model.register_parameter("w", nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))
    program = toys.program(model, torch.ones(2, 4, dtype=torch.bfloat16))
    data = [(torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16))] * 2
    facts = Facts([Task("toy.py", calibration=lambda: data, inputs=Binding(["x"], program.interface), loss=task().loss)])
    with pytest.raises(OptionError, match=r"%view.*: option 'precision': float32 is not possible, aten::view needs the types"):
        Recover(precision="float32").run(program, facts)
    Recover(steps=1, held_out=0, device="cpu").run(program, facts)


def test_what_cannot_be_trained_says_so() -> None:
    program, _ = smaller()
    with pytest.raises(DataError, match="training needs calibration data"):
        Recover().run(program, Facts())
    with pytest.raises(DataError, match="training needs a loss"):
        recovered(program, task(loss=None))
    recovered(program, task(loss=None), loss=0, logits=1, steps=1)
    with pytest.raises(OptionError, match="train=lora finds nothing"):
        recovered(program, task(), train="lora")
    with pytest.raises(DataError, match="1 batches are too few"):
        recovered(program, task(1))
    with pytest.raises(DataError, match="not finite at step 1: loss nan"):
        recovered(program, task(loss=lambda outputs, batch: outputs.sum() * float("nan")), held_out=0)
    with pytest.raises(ValueError, match="one of `loss`, `logits` and `hidden`"):
        Recover(loss=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 3, "held_out": 0}, r"`patience` \(3\) does nothing with held_out=0"),
        ({"steps": 4, "epochs": 2}, r"`epochs` \(2.0\) does nothing with `steps`"),
        ({"temperature": 2}, r"`temperature` \(2.0\) does nothing with logits=0"),
        ({"classes": 1}, r"`classes` \(1\) does nothing with logits=0"),
        ({"loss": float("inf")}, "finite number"),
        ({"weight_decay": float("inf")}, "finite number"),
    ],
)
def test_options_that_do_nothing_or_are_not_finite(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recover(**options)


def test_the_axis_of_classes_is_one_of_the_output() -> None:
    for classes in (-3, 2, 7):
        with pytest.raises(OptionError, match=rf"option 'classes': {classes} is no axis .* which has 2\n.* from -2 to 1"):
            recovered(smaller()[0], task(), loss=0, logits=1, classes=classes)


def test_a_state_that_is_a_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for state, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "state", "is no directory")):
        with pytest.raises(OptionError, match=f"option 'state': .* {message}"):
            Recover(state=state).run(smaller()[0], Facts())


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        meta = toys.typed(toys.trace(toys.Mlp(), (torch.empty(2, 4),)))
    with pytest.raises(DataError, match=r"fc1.weight is on the meta device and has no values to train"):
        Recover().run(meta, Facts())
    with pytest.raises(DataError, match=r"fc1.weight lies in its file\n  to go on: load the model without lazy=true, or use `repair`"):
        Recover().run(dataclasses.replace(meta, source=object()), Facts())  # type: ignore[arg-type]


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_distances_by_hand() -> None:
    teacher = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    first = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert divergence(student, teacher) == pytest.approx(first / 2)
    assert divergence(student, teacher, counts=torch.tensor([[True, False]])) == pytest.approx(first)
    assert divergence(teacher, teacher, 3.0) == pytest.approx(0)
    assert distance([torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 2.0])]) == pytest.approx(0.5 / 2)
    ours, theirs = [torch.tensor([[1.0], [9.0]])], [torch.tensor([[2.0], [0.0]])]
    assert distance(ours, theirs, torch.tensor([True, False])) == pytest.approx(1 / 4)
    assert distance(ours, theirs, torch.tensor([True, False, True])) == pytest.approx((1 + 81) / 4)
    assert distance(ours, theirs, torch.tensor([True, False]), [torch.tensor(8.0)]) == pytest.approx(1 / 8)


def test_devices_in_a_graph_are_replaced() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[1], device=x.device, dtype=x.dtype)

    program = toys.program(Positions(), torch.zeros(2, 3))
    graph = program.clone().module.graph
    relocate(graph, torch.device("meta"))
    assert [node.kwargs["device"] for node in graph.nodes if "device" in node.kwargs] == [torch.device("meta")]


PARALLEL = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.passes.test_recover import parallel
parallel(Path(sys.argv[1]))
"""


def parallel(out: Path, accumulate: int = 1) -> None:
    """A run through the interface, as each process of ``torchrun`` starts it."""
    passes = f"lora{{r=2 dropout=0.1}},recover{{steps=3 accumulate={accumulate} held_out=0.3 lr=0.01 logits=1}}"
    done = api.run(str(out.parent / "model.py"), passes, out=out)
    if done.path is not None:
        save_file({key: tensor.detach().contiguous() for key, tensor in done.program.tensors.items()}, out.with_suffix(".safetensors"))


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = (root / "tests" / "small_model.py").read_text()
    (tmp_path / "model.py").write_text(source.replace("range(2)", "range(7)"))
    script = tmp_path / "script.py"
    script.write_text(PARALLEL)
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    parallel(tmp_path / "one", accumulate=2)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    first, second = (api.Manifest.read(tmp_path / name).model_extra["recovery"][0] for name in ("one", "two"))
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-5)
    assert first["held_out"] == [pytest.approx(pair, rel=1e-5) for pair in second["held_out"]]
