"""The gradient probe: what it needs, what it leaves behind, what it refuses."""

from __future__ import annotations

import collections
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from irprune_passes.score.gradients import backward
from score_toys import TwoLayers, mean_square, pairs, seeded, task, traced
from torch import nn

from irprune.errors import DataError
from irprune.ir.facts import Task
from irprune.ir.program import Program

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program() -> Program:
    return traced(seeded(TwoLayers), X)[0]


def names(program: Program) -> list[str]:
    return [name for name in program.tensors if program.is_parameter(name)]


def collected(program: Program, about: Task | None, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The gradients of every step."""
    steps: list[dict[str, torch.Tensor]] = [{}]

    def fold(name: str, gradient: torch.Tensor) -> None:
        if name in steps[-1]:
            steps.append({})
        steps[-1][name] = gradient.clone()

    count = backward(program, about, names(program), fold, **options)
    assert count == len(steps)
    return steps


def plain(program: Program, batch: Any) -> dict[str, torch.Tensor]:
    wanted = {name: program.tensors[name] for name in names(program)}
    return dict(zip(wanted, torch.autograd.grad(mean_square(program(batch[0]), batch), list(wanted.values())), strict=True))


# -- what it computes ---------------------------------------------------------------------------------


def test_one_gradient_per_batch(program: Program) -> None:
    data = pairs(batches=3)
    for step, batch in zip(collected(program, task(data)), data, strict=True):
        torch.testing.assert_close(step, plain(program, batch))
    assert len(collected(program, task(data), batches=2)) == 2


def test_one_gradient_per_sample(program: Program) -> None:
    data = pairs(batches=2, size=3)
    wanted = [plain(program, (x[j : j + 1], y[j : j + 1])) for x, y in data for j in range(3)]
    for step, sample in zip(collected(program, task(data), per_sample=True), wanted, strict=True):
        torch.testing.assert_close(step, sample)


class _Encoding(collections.UserDict[str, Any]):
    """A mapping that pytrees do not know, as tokenisers return."""


@pytest.mark.parametrize("form", [dict, _Encoding, lambda parts: [list(parts.items())], collections.OrderedDict])
def test_batches_of_many_forms_are_cut_into_samples(program: Program, form: Any) -> None:
    def unpacked(batch: Any) -> dict[str, Any]:
        return dict(batch[0] if isinstance(batch, list) else batch)

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        parts = unpacked(batch)
        assert parts["weight"].shape == (2,), "what has another length is shared by the samples"
        assert parts["name"] == "both"
        return ((outputs - torch.as_tensor(parts["y"])).square() * parts["weight"]).mean()

    ((x, y),) = pairs(batches=1, size=3)
    batch = form({"x": x, "y": y.numpy(), "weight": torch.ones(2), "name": "both"})
    about = task([batch], inputs=lambda b: ((unpacked(b)["x"],), {}), loss=loss)
    samples = collected(program, about, per_sample=True)
    for step, j in zip(samples, range(3), strict=True):
        torch.testing.assert_close(step, plain(program, (x[j : j + 1], y[j : j + 1])))
    assert unpacked(batch)["x"] is x, "the user's batch is left alone"


def test_a_tied_parameter_has_the_sum_of_its_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    program, _ = traced(seeded(Tied), X)
    data = pairs(batches=1, outputs=3)
    (step,) = collected(program, task(data))
    assert len(step) == 1
    torch.testing.assert_close(step, plain(program, data[0]))


def test_two_parameters_whose_gradients_share_memory_do_not_disturb_each_other() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(1, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.a + self.b.view(3))

    program, _ = traced(seeded(Sum), X)
    data = pairs(batches=1, outputs=3)
    torch.testing.assert_close(collected(program, task(data))[0], plain(program, data[0]))


def test_random_calibration_is_seeded_and_the_generator_is_left_alone(program: Program) -> None:
    def data() -> Iterator[Any]:
        yield torch.randn(4, 3), torch.randn(4, 2)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    (first,), (again,), (other,) = (collected(program, task(data), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_it_works_where_gradients_are_off(program: Program) -> None:
    data = pairs(batches=1)
    with torch.no_grad():
        (step,) = collected(program, task(data))
    torch.testing.assert_close(step, plain(program, data[0]))


# -- what it leaves behind ----------------------------------------------------------------------------


def test_one_gradient_lives_at_a_time(program: Program) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def fold(name: str, gradient: torch.Tensor) -> None:
        nonlocal most
        assert all(program.tensors[other].grad is None for other in names(program))
        most = max(most, 1 + sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(gradient))

    gc.collect()
    backward(program, task(pairs()), names(program), fold)
    assert len(alive) == 8
    assert most == 1
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_only_what_is_asked_for_gets_a_gradient(program: Program) -> None:
    seen = set()

    def fold(name: str, gradient: torch.Tensor) -> None:
        seen.add(name)
        assert all(program.tensors[other].grad is None for other in names(program)), "the gradients of later layers were computed"

    backward(program, task(pairs()), ["fc1.bias"], fold)
    assert seen == {"fc1.bias"}


@pytest.mark.parametrize("fails", ["nowhere", "loss", "calibration", "fold"])
def test_the_program_is_as_before_whatever_happens(program: Program, fails: str) -> None:
    weight, bias = program.tensors["fc1.weight"], program.tensors["fc1.bias"]
    old = torch.ones_like(weight)
    weight.grad = old
    bias.requires_grad_(False)
    versions = {name: tensor._version for name, tensor in program.tensors.items()}

    def data() -> Iterator[Any]:
        yield from pairs()
        if fails == "calibration":
            raise OSError("disk gone")

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if fails == "loss":
            raise KeyError("labels")
        return mean_square(outputs, batch)

    def fold(name: str, gradient: torch.Tensor) -> None:
        if fails == "fold":
            raise MemoryError

    errors = {"loss": DataError, "calibration": DataError, "fold": MemoryError}
    try:
        if fails == "nowhere":
            backward(program, task(data, loss=loss), names(program), fold)
        else:
            with pytest.raises(errors[fails]) as caught:
                backward(program, task(data, loss=loss), names(program), fold)
            if fails != "fold":
                assert isinstance(caught.value.__cause__, KeyError | OSError), "the user's own exception stays visible"
        assert weight.grad is old
        assert torch.equal(old, torch.ones_like(weight))
        assert not bias.requires_grad
        assert all(program.tensors[name].requires_grad for name in names(program) if name != "fc1.bias")
        assert all(program.tensors[name].grad is None for name in names(program) if name != "fc1.weight")
        assert not any(tensor._post_accumulate_grad_hooks for tensor in program.tensors.values())
        assert {name: tensor._version for name, tensor in program.tensors.items()} == versions
    finally:
        weight.grad = None
        bias.requires_grad_(True)


# -- what it refuses ----------------------------------------------------------------------------------


def refused(program: Program, about: Task | None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        backward(program, about, names(program), lambda name, gradient: None, **options)
    return str(caught.value)


def test_missing_data_is_named_with_what_to_add(program: Program) -> None:
    whole = task(pairs())
    text = refused(program, None)
    assert "needs calibration and loss, which the target does not give" in text
    assert "add `def calibration()`" in text
    assert "criterion=magnitude" in text
    assert refused(program, replace(whole, loss=None)).startswith("[data] at toy.py: scoring by gradients needs loss, which")
    assert refused(program, replace(whole, calibration=None)).startswith("[data] at toy.py: scoring by gradients needs calibration, which")


def test_empty_calibration(program: Program) -> None:
    assert refused(program, task([])) == (
        "[data] at toy.py: the calibration data is empty\n  to go on: let `calibration()` yield at least one batch"
    )


def test_calibration_that_is_no_iterable(program: Program) -> None:
    assert "`calibration()` failed: TypeError" in refused(program, task(lambda: 3))


@pytest.mark.parametrize("batch", [(torch.randn(4, 7), torch.randn(4, 2)), (None, None), 3])
def test_a_batch_of_another_form(program: Program, batch: Any) -> None:
    assert "[data] at calibration batch 0: the batch does not fit the model: " in refused(program, task([batch]))
    assert "the batch does not fit the model: " in refused(program, task([batch]), per_sample=True)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda outputs, batch: outputs, "found a torch.float32 tensor of shape (4, 2)"),
        (lambda outputs, batch: 1.5, "found float"),
        (lambda outputs, batch: outputs.argmax(), "found a torch.int64 tensor of shape ()"),
    ],
)
def test_a_loss_that_is_no_number(program: Program, loss: Any, found: str) -> None:
    text = refused(program, task(pairs(), loss=loss))
    assert text.startswith("[data] at calibration batch 0: the loss must be one floating-point number, ")
    assert found in text


def test_a_loss_that_fails(program: Program) -> None:
    text = refused(program, task(pairs(), loss=lambda outputs, batch: batch["labels"]))
    assert text.startswith("[data] at calibration batch 0: `loss(outputs, batch)` failed: TypeError: ")


def test_a_loss_that_is_not_finite_names_the_batch(program: Program) -> None:
    x, y = pairs(batches=1)[0]
    text = refused(program, task([(x, y), (x, y / 0)]))
    assert text.startswith("[data] at calibration batch 1: the loss is inf; all weights are finite")


def test_a_loss_that_is_not_finite_names_the_weight() -> None:
    program, _ = traced(seeded(TwoLayers), X)
    with torch.no_grad():
        program.tensors["fc2.bias"][1] = float("nan")
    assert "the loss is nan; fc2.bias holds NaN or infinite values" in refused(program, task(pairs()))


def test_a_gradient_that_is_not_finite_names_its_parameter(program: Program) -> None:
    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs - outputs.detach()).square().sum().sqrt()

    text = refused(program, task(pairs(), loss=loss))
    assert text.startswith("[data] at fc2.bias, calibration batch 0: the gradient of the parameter is NaN or infinite")


def test_per_sample_gradients_need_a_batch_axis_that_can_shrink() -> None:
    program, _ = traced(seeded(TwoLayers), X, dynamic={"x": {}})
    text = refused(program, task(pairs()), per_sample=True)
    assert "per-sample gradients need batches of one sample, and the program has a fixed batch axis" in text
    single, _ = traced(seeded(TwoLayers), X[:1], dynamic={"x": {}})
    assert len(collected(single, task(pairs(size=1)), per_sample=True)) == 2, "batches of one need no cutting"


def test_a_batch_that_cannot_be_cut(program: Program) -> None:
    class Opaque:
        x, y = pairs(batches=1)[0]

    about = task([Opaque()], inputs=lambda b: ((b.x,), {}), loss=lambda outputs, b: (outputs - b.y).square().mean())
    assert len(collected(program, about)) == 1
    assert "a batch of type Opaque cannot be cut into samples" in refused(program, about, per_sample=True)


def test_arrays_are_cut_like_tensors(program: Program) -> None:
    data = [(np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32), torch.zeros(3, 2))]
    about = task(data, inputs=lambda b: ((torch.from_numpy(b[0]),), {}))
    assert len(collected(program, about, per_sample=True)) == 3
