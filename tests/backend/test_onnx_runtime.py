"""ONNX files in onnxruntime: called like the program, compared with it, timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from irprune.backend import runtime
from irprune.backend.onnx import OnnxFile
from irprune.backend.runtime import Latency, Session, fresh_inputs, latency, parity, runner, torch_threads
from irprune.errors import DataError, ExportError, ParityError
from irprune.frontend.export import trace
from irprune.ir.program import Interface, Program
from tests.backend.onnx_toys import cnn, llama, records


@pytest.fixture(scope="module")
def session(records_file: OnnxFile) -> Session:
    return Session(records_file.path, records(), threads=1)


def edited(file: OnnxFile, to: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """The file with its weights changed."""
    model = onnx.load(file.path)
    for each in model.graph.initializer:
        value = change(each.name, numpy_helper.to_array(each))
        each.CopyFrom(numpy_helper.from_array(value, each.name))
    onnx.save(model, to)
    return to


# -- the call ---------------------------------------------------------------------------------------


def test_results_have_the_structure_of_the_model(session: Session) -> None:
    args, kwargs = records().interface.example
    found, expected = session(*args, **kwargs), records()(*args, **kwargs)
    assert list(found) == list(expected)
    assert (found["nothing"], found["count"], found["seven"]) == (None, 3, 7)
    assert isinstance(found["pair"], tuple)
    assert torch.equal(found["x"], args[0])
    assert torch.equal(found["pair"][1], expected["pair"][1])
    assert torch.equal(found["positive"], expected["positive"])
    torch.testing.assert_close(found["scores"], expected["scores"].detach())
    assert torch.equal(found["scores"], found["again"])


def test_results_of_a_dataclass_model(llama_file: OnnxFile) -> None:
    _, kwargs = fresh_inputs(llama().interface, {"batch": 1, "sequence": 7})
    found = Session(llama_file.path, llama(), threads=1)(**kwargs)
    assert type(found).__name__ == "CausalLMOutputWithPast"
    torch.testing.assert_close(found.logits, llama()(**kwargs).logits.detach(), rtol=1e-4, atol=1e-5)


def test_sizes_among_the_results_follow_the_batch(session: Session) -> None:
    args, kwargs = fresh_inputs(records().interface, {"batch": 5})
    assert session(*args, **kwargs)["count"] == 5


def test_arguments_by_position_by_name_and_in_any_order(session: Session) -> None:
    (x, unused, times), kwargs = records().interface.example
    expected = session(x, unused, times, **kwargs)["scores"]
    found = session(mask=kwargs["mask"], times=times, x=x, extra=None, unused=unused)["scores"]
    assert torch.equal(found, expected)


def test_views_and_tensors_with_gradients_are_taken(session: Session) -> None:
    (x, unused, times), kwargs = records().interface.example
    view = x.T.contiguous().T.requires_grad_()
    assert not view.is_contiguous()
    assert torch.equal(session(view, unused, times, **kwargs)["scores"], session(x, unused, times, **kwargs)["scores"])


def wrong(**changes: Any) -> dict[str, Any]:
    (x, unused, times), kwargs = records().interface.example
    named = {"x": x, "unused": unused, "times": times, **kwargs, **changes}
    return {name: value for name, value in named.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": ...}, "arguments do not fit: missing a required argument: 'mask'; the model takes (x, unused, times, mask, extra)"),
        ({"more": 1}, "arguments do not fit: got an unexpected keyword argument 'more'"),
        ({"extra": torch.ones(1)}, "argument 'extra' is None in the traced model"),
        ({"times": 3}, "argument 'times' is 2 in the traced model"),
        ({"x": torch.ones(3, 4, dtype=torch.float64)}, "input 'x' is a tensor(double), the model takes a tensor(float)"),
        ({"x": [[1.0]]}, "arguments do not have the example's structure"),
        ({"x": 1.0}, "input 'x' is a float, not a tensor"),
        ({"unused": torch.ones(3)}, "onnxruntime cannot run the model on x float[3, 4], unused float[3], mask float[3, 1]: "),
    ],
)
def test_arguments_that_do_not_fit(session: Session, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        session(**wrong(**changes))
    assert message in str(caught.value)
    assert caught.value.hint


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(DataError, match="this is no ONNX file"):
        Session(tmp_path / "model.onnx", records())


def test_cuda_where_there_is_none(records_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="no CUDA provider"):
        Session(records_file.path, records(), provider="cuda")
    assert Session(records_file.path, records()).device == "cpu"


# -- inputs -----------------------------------------------------------------------------------------


def test_fresh_inputs_are_like_the_example() -> None:
    example = {
        "ids": torch.tensor([[3, 61, 7], [0, 5, 9]]),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "kinds": torch.zeros(2, 3, dtype=torch.int64),
        "labels": torch.tensor([[-100, 4, -100], [8, 8, 8]]),
        "image": torch.linspace(10, 14, 600).reshape(2, 3, 100),
        "blank": torch.zeros(2, 3, 100),
        "bias": torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, -torch.inf]]),
        "flag": torch.tensor([[True, False, True], [False, False, True]]),
        "half": torch.full((2, 3), 2.0, dtype=torch.bfloat16),
        "times": 3,
    }
    axes = tuple({} if name == "times" else {0: "batch", 1: "sequence"} for name in example)
    interface = Interface(((), example), axes, tuple(example))
    _, fresh = fresh_inputs(interface, {"batch": 40, "sequence": 50}, seed=1)
    assert {name: tuple(value.shape[:2]) for name, value in fresh.items() if name != "times"} == dict.fromkeys(
        [name for name in example if name != "times"], (40, 50)
    )
    assert all(fresh[name].dtype == value.dtype for name, value in example.items() if isinstance(value, torch.Tensor))
    assert fresh["ids"].min() == 0
    assert fresh["ids"].max() == 61
    assert len(fresh["ids"].unique()) == 62
    assert bool((fresh["mask"] == 1).all())
    assert bool(fresh["flag"].all())
    assert not bool(fresh["kinds"].any())
    assert set(fresh["labels"].unique().tolist()) == {-100, 4, 8}
    assert fresh["image"].mean() == pytest.approx(12, abs=0.05)
    assert float(fresh["image"].min()) >= 10
    assert float(fresh["image"].max()) <= 14
    assert fresh["blank"].std() == pytest.approx(1, abs=0.05)
    assert torch.equal(fresh["bias"][:4, :3], example["bias"].repeat(2, 1))
    assert bool(fresh["bias"].isfinite().any(1).all())
    assert fresh["times"] == 3


def test_fresh_inputs_follow_the_seed() -> None:
    (one,), _ = fresh_inputs(cnn().interface, seed=1)
    (same,), _ = fresh_inputs(cnn().interface, seed=1)
    (other,), _ = fresh_inputs(cnn().interface, seed=2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- parity -----------------------------------------------------------------------------------------


def test_parity_tries_several_sizes_of_every_dynamic_axis(llama_file: OnnxFile) -> None:
    found = parity(llama(), Session(llama_file.path, llama(), threads=1))
    assert found.sizes == ({"batch": 2, "sequence": 10}, {"batch": 3, "sequence": 11}, {"batch": 1, "sequence": 10})
    assert 0 < found.max_abs_err < found.tolerance < 1e-3


def test_parity_takes_batch_sizes(llama_file: OnnxFile) -> None:
    found = parity(llama(), Session(llama_file.path, llama(), threads=1), batch=(4, 7))
    assert found.sizes == ({"batch": 4, "sequence": 10}, {"batch": 7, "sequence": 11})


class Limited:
    """A program that refuses sizes, as a table of positions does."""

    def __init__(self, program: Program, allowed: Callable[[int], bool]) -> None:
        self._program, self._allowed = program, allowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def __call__(self, x: torch.Tensor) -> Any:
        if not self._allowed(len(x)):
            raise IndexError("index out of range in self")
        return self._program(x)


@pytest.mark.parametrize(("allowed", "other"), [(lambda size: size % 2 == 0 or size == 1, 4), (lambda size: size <= 2, 1)])
def test_parity_takes_another_size_that_the_program_can_do(cnn_file: OnnxFile, allowed: Callable[[int], bool], other: int) -> None:
    found = parity(Limited(cnn(), allowed), Session(cnn_file.path, cnn(), threads=1))  # type: ignore[arg-type]
    assert found.sizes[1] == {"batch": other}


def test_a_program_that_can_do_one_size_only(cnn_file: OnnxFile) -> None:
    with pytest.raises(DataError, match="cannot run on random inputs like its example: index out of range in self"):
        parity(Limited(cnn(), lambda size: size == 2), Session(cnn_file.path, cnn(), threads=1))  # type: ignore[arg-type]


def test_every_single_wrong_weight_is_found(cnn_file: OnnxFile, tmp_path: Path) -> None:
    names = [each.name for each in onnx.load(cnn_file.path).graph.initializer if each.dims and each.data_type == onnx.TensorProto.FLOAT]
    assert len(names) >= 6

    for name in names:

        def change(other: str, value: np.ndarray, name: str = name) -> np.ndarray:
            return value * np.float32(1.01) + np.float32(0.01) if other == name else value

        path = edited(cnn_file, tmp_path / "model.onnx", change)
        with pytest.raises(ParityError) as caught:
            parity(cnn(), Session(path, cnn(), threads=1))
        assert "output output0, batch = 2: onnxruntime differs from torch by" in str(caught.value), name
        assert caught.value.exit_code == 4


class Cancelling(nn.Module):
    """Adds what float32 cannot hold beside the input, and takes it away again."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.full((4,), large))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.large - self.large


def test_what_torch_itself_rounds_away_is_allowed_and_no_more() -> None:
    x = torch.linspace(0.1, 0.9, 8).reshape(2, 4)
    noisy, clean = (trace(Cancelling(large).eval(), (x,)) for large in (1e5, 0.0))
    sizes = {"batch": 2}
    inputs = runtime.fresh_inputs(noisy.interface, sizes, seed=0)
    want = noisy(*inputs[0])
    own = runtime._rounding(noisy, inputs, 0, want)
    assert 1e-3 < own < 4e-3  # half of the distance of two float32 at 1e5 is 3.9e-3
    assert runtime._rounding(clean, inputs, 0, clean(*inputs[0])) == 0
    runtime._compare(want, want + 3 * own, 1e-6, "y", lambda: own)
    with pytest.raises(ParityError):
        runtime._compare(want, want + 5 * own, 1e-6, "y", lambda: own)
    with pytest.raises(ParityError):
        runtime._compare(want, want + 3 * own, 1e-6, "y")


def test_not_a_number_is_found(cnn_file: OnnxFile, tmp_path: Path) -> None:
    path = edited(cnn_file, tmp_path / "model.onnx", lambda name, value: np.full_like(value, np.nan) if value.ndim == 4 else value)
    with pytest.raises(ParityError, match="gives NaN or infinity elsewhere"):
        parity(cnn(), Session(path, cnn(), threads=1))


def test_a_size_that_only_torch_can_do_is_found(cnn_file: OnnxFile, tmp_path: Path) -> None:
    model = onnx.load(cnn_file.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"at batch = 3: torch can, but onnxruntime cannot run the model"):
        parity(cnn(), Session(tmp_path / "model.onnx", cnn(), threads=1))


def test_results_that_are_not_numbers_must_be_equal(records_file: OnnxFile, tmp_path: Path) -> None:
    session = Session(records_file.path, records(), threads=1)
    assert parity(records(), session, relative_tolerance=1e9).tolerance > 1
    path = edited(records_file, tmp_path / "model.onnx", lambda name, value: -value if name.startswith("outer.weight") else value)
    with pytest.raises(ParityError, match="output positive, batch = 3: onnxruntime differs from torch by 1, allowed is 0"):
        parity(records(), Session(path, records(), threads=1), relative_tolerance=1e9)


# -- latency ----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a function takes it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        def call() -> None:
            mine = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds[mine % len(seconds)]

        return call


def test_rounds_alternate_the_order() -> None:
    clock = Clock()
    latency(clock.taking("f", 0.01), clock.taking("g", 0.02), rounds=4, sample_ms=1, clock=clock)
    assert "".join(clock.calls) == "fff" + "ggg" + "fg" + "gf" + "fg" + "gf"


def test_median_and_spread() -> None:
    clock = Clock()
    steady, wild = latency(
        clock.taking("f", 0.01),
        clock.taking("g", 0.01, 0.01, 0.01, 0.01, 0.02, 0.03, 0.04, 9.0),
        rounds=5,
        seconds=100,
        sample_ms=1,
        clock=clock,
    )
    assert steady == Latency(pytest.approx(10), pytest.approx(0), pytest.approx(10), 5)
    assert wild == Latency(pytest.approx(30), pytest.approx(20), pytest.approx(7208), 5)  # of 10, 20, 30, 40 and 9000 ms


def test_fast_functions_are_repeated_within_a_sample() -> None:
    clock = Clock()
    (found,) = latency(clock.taking("f", 0.0005), rounds=5, sample_ms=5, clock=clock)
    assert len(clock.calls) == 3 + 5 * 10
    assert found.median_ms == pytest.approx(0.5)


def test_time_ends_the_rounds_but_five_there_are() -> None:
    clock = Clock()
    (found,) = latency(clock.taking("f", 1.0), rounds=100, seconds=12, clock=clock)
    assert found.rounds == 10  # three seconds warm up, then ten rounds until 13 s
    clock = Clock()
    (found,) = latency(clock.taking("f", 100.0), rounds=100, seconds=1, clock=clock)
    assert found.rounds == 5


def test_programs_and_sessions_are_timed_without_gradients(cnn_file: OnnxFile, monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = fresh_inputs(cnn().interface)
    modes = []
    monkeypatch.setattr(Program, "__call__", lambda *_: modes.append(torch.is_inference_mode_enabled()))
    in_torch, in_onnx = latency(runner(cnn(), args, kwargs), Session(cnn_file.path, cnn(), threads=1).runner(*args, **kwargs), rounds=5)
    assert set(modes) == {True}
    assert in_torch.rounds == in_onnx.rounds == 5
    assert in_onnx.median_ms > 0


def test_torch_threads_come_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with torch_threads(0):
        assert torch.get_num_threads() == before
