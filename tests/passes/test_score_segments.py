"""Gradients segment by segment are the gradients, wherever a graph is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from irprune_passes.score.segments import Segmented, segments
from score_toys import seeded
from torch import nn

from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.rules.infer import typed


class Tied(nn.Module):
    """An embedding that is also the output layer, around two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(self.norm(x))))
        return x @ self.embed.weight.T


class Parted(nn.Module):
    """Blocks of a split go different ways; one is written to in place; there are two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(5, 9)
        self.left, self.right = nn.Linear(3, 4), nn.Linear(6, 4)
        self.end = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self.fused(x).split([3, 6], dim=-1)
        h = self.left(left).sigmoid()
        g = self.right(right)
        g.mul_(2.0).add_(h)
        return self.end(h * g), g.mean(-1)


class Hidden(nn.Module):
    """The first layer does not need the input's gradient, the last parameter is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu()).square()


CASES: dict[str, tuple[type[nn.Module], torch.Tensor]] = {
    "tied": (Tied, torch.arange(10).reshape(2, 5)),
    "parted": (Parted, torch.randn(3, 5, generator=torch.Generator().manual_seed(0))),
    "hidden": (Hidden, torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
}


def traced(name: str) -> tuple[Program, torch.Tensor]:
    kind, inputs = CASES[name]
    return typed(trace(seeded(kind), (inputs,))), inputs


def total(outputs: Any) -> torch.Tensor:
    return sum((one * torch.linspace(0.5, 1.5, one.numel()).reshape(one.shape)).sum() for one in torch.utils._pytree.tree_leaves(outputs))  # type: ignore[return-value]


def plain(program: Program, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name in program.tensors if program.is_parameter(name)]
    found = torch.autograd.grad(total(program(inputs)), [program.tensors[name] for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("resident", [1, 200, 400, 2**30])
@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_one_backward_pass(name: str, resident: int) -> None:
    program, inputs = traced(name)
    expected = plain(program, inputs)
    found: dict[str, torch.Tensor] = {}

    def fold(parameter: str, gradient: torch.Tensor) -> None:
        assert parameter not in found, "a gradient is folded once, when it is complete"
        found[parameter] = gradient

    whole = Segmented(program, set(expected), fold, segments(program, resident))
    outputs, backward = whole.forward(inputs)
    leaves = [output.requires_grad_() for output in outputs]
    total(leaves).backward()
    backward([leaf.grad for leaf in leaves])
    assert set(found) == set(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-6)
    assert all(tensor.grad is None for tensor in program.tensors.values())


def test_segments_cover_the_program_in_order_and_hold_no_more_than_asked() -> None:
    program, _ = traced("tied")
    parts = segments(program, 400)
    calls = [node for node in program.nodes if node.op == "call_function"]
    assert [node for part in parts for node in part.nodes] == calls
    assert len(parts) > 2
    for part in parts:
        held = sum(program.tensors[name].numel() * 4 for name in part.tensors)
        assert held <= 400 or len(part.tensors) <= 2


def test_an_in_place_operation_and_what_it_writes_to_stay_together() -> None:
    program, _ = traced("parted")
    for resident in (1, 100, 300):
        for part in segments(program, resident):
            for node in part.nodes:
                if "mul_" in str(node.target) or "add_" in str(node.target):
                    assert any("linear" in one.name for one in part.nodes)


def test_only_the_wanted_parameters_get_gradients() -> None:
    program, inputs = traced("hidden")
    found: list[str] = []
    whole = Segmented(program, {"one.bias"}, lambda name, gradient: found.append(name), segments(program, 1))
    (output,), backward = whole.forward(inputs)
    backward([torch.ones_like(output)])
    assert found == ["one.bias"]
