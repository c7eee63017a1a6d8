"""A model that cannot be traced: the error names the model's line and what to do, and nothing else is printed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irprune.errors import DataError, TargetError, TraceError
from irprune.frontend.export import trace

torch.set_num_threads(1)


def at(model: type[nn.Module], text: str) -> str:
    """``file:line`` of the line of a model that holds a text."""
    code = model.forward.__code__
    with open(code.co_filename, encoding="utf-8") as source:
        lines = list(enumerate(source, 1))[code.co_firstlineno - 1 :]
    return next(f"{code.co_filename}:{number}" for number, line in lines if text in line)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.fc(x).sum() > 0:
            return x
        return -x


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        rows = int(x.abs().sum().item())
        return self.fc(x)[: rows % 2]


class Numpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.fc(x).detach().numpy() * 2)


class Returns(Base):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x), object()


class Cond(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))


@pytest.mark.parametrize(
    ("model", "line", "message", "hint"),
    [
        (Branches, "> 0", "torch.export cannot trace Branches: GuardOnDataDependentSymNode: Could not guard on", "choose with torch.where"),
        (Counts, ".item()", "torch.export cannot trace Counts: GuardOnDataDependentSymNode: Could not extract", "choose with torch.where"),
        (Numpy, ".numpy()", "torch.export cannot trace Numpy: RuntimeError: .numpy() is not supported", "stay in torch there"),
        (
            Returns,
            "def forward",
            "torch.export cannot trace Returns: RuntimeError: Found <class 'object'> in output",
            "give and return tensors",
        ),
        (Cond, "torch.cond", "operation 'cond' holds a sub-graph", "torch.cond"),
    ],
)
def test_untraceable_models(model: type[nn.Module], line: str, message: str, hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError) as caught:
        trace(model(), (torch.randn(3, 4),))
    error = caught.value
    assert error.where == at(model, line)
    assert error.message.startswith(message)
    assert hint in str(error.hint)
    assert "\n" not in error.message
    assert capfd.readouterr() == ("", "")


class WrongShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x.T
        return self.fc(y)


def test_model_that_fails_in_plain_python_is_the_targets_fault(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TargetError) as caught:
        trace(WrongShape(), (torch.randn(3, 4),))
    assert str(caught.value) == (
        f"[target] at {at(WrongShape, 'self.fc(y)')}: WrongShape fails on its own example inputs (float32[3, 4]): "
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x3 and 4x4)\n"
        "  to go on: give example inputs of the shapes and dtypes that the model takes"
    )
    assert capfd.readouterr() == ("", "")


def test_library_modules_have_no_line_of_the_user() -> None:
    with pytest.raises(TargetError) as caught:
        trace(nn.Sequential(nn.Linear(5, 4)), (torch.randn(3, 4),))
    assert caught.value.where is None


class Remembers(nn.Module):
    """Gives another answer on every call."""

    calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"scaled": x * self.calls}


def test_trace_that_is_not_the_model_is_refused() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Remembers(), (torch.ones(3, 4),))
    assert caught.value.message == "the trace does not compute what the model computes: output 'scaled' differs on the example inputs"


def test_random_numbers_of_a_model_are_compared_under_one_seed() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    before = torch.get_rng_state()
    program = trace(Noisy(), (torch.ones(3, 4),))
    assert torch.equal(before, torch.get_rng_state())
    assert program(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named_and_mask_buffers_may_be_infinite(value: float) -> None:
    model = Base()
    model.forward = lambda x: model.fc(x) + model.mask  # type: ignore[assignment]
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    trace(model, (torch.ones(3, 4),))
    with torch.no_grad():
        model.fc.bias[2] = value
    with pytest.raises(DataError) as caught:
        trace(model, (torch.ones(3, 4),))
    assert caught.value.message == "'fc.bias' holds NaN or infinite values"
    with torch.no_grad():
        model.fc.bias[2] = 0.0
    model.mask[1] = float("nan")
    with pytest.raises(DataError, match="'mask' holds NaN"):
        trace(model, (torch.ones(3, 4),))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {}}, "dynamic axes name 'y', which is not an input; the inputs are x"),
        ({"x": {2: "batch"}}, "dynamic axes of input 'x' name axis 2, its example has shape (3, 4)"),
        ({"x": {"batch": 0}}, "dynamic axes of input 'x' name axis 'batch', its example has shape (3, 4)"),
        ({"x": {0: "n", 1: "n"}}, "axes labelled 'n' differ in the example inputs: 3 at axis 0 of 'x', 4 at axis 1 of 'x'"),
    ],
)
def test_wrong_dynamic_axes(dynamic: dict[str, Any], message: str) -> None:
    model = Base()
    model.forward = lambda x: model.fc(x)  # type: ignore[assignment]
    with pytest.raises(TargetError) as caught:
        trace(model, (torch.randn(3, 4),), dynamic=dynamic)
    assert caught.value.message == message
    assert caught.value.hint


def test_no_tensor_and_no_such_output() -> None:
    with pytest.raises(TargetError, match="the example inputs hold no tensor"):
        trace(Branches(), (None,))
    with pytest.raises(TargetError, match="the model has no output 'logits'; its outputs are output0"):
        trace(nn.ReLU(), (torch.ones(2, 3),), outputs=["logits"])


def test_logs_and_hooks_are_as_before_after_success_and_failure() -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    for model in (nn.ReLU(), Branches()):
        if isinstance(model, Branches):
            with pytest.raises(TraceError):
                trace(model, (torch.randn(3, 4),))
        else:
            trace(model, (torch.randn(3, 4),))
        assert not logger.disabled
        assert not model._forward_pre_hooks
        assert model.training
