"""Small models with data for the tests of ``score``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from irprune_passes.score import Score
from torch import nn

from irprune.analysis.groups import discover
from irprune.frontend.export import trace
from irprune.ir.facts import Groups, Importance, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

torch.set_num_threads(1)


class TwoLayers(nn.Module):
    """``fc2(act(fc1(x)))``: one group, the hidden units."""

    def __init__(self, width: int = 5, act: nn.Module | None = None, bias: bool = True, inputs: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width, bias=bias)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(width, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def traced(module: nn.Module, *args: Any, **options: Any) -> tuple[Program, Groups]:
    program = typed(trace(module, args, **options))
    return program, discover(program)


def pairs(batches: int = 2, size: int = 4, inputs: int = 3, outputs: int = 2, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, inputs, generator=generator), torch.randn(size, outputs, generator=generator)) for _ in range(batches)]


def mean_square(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (outputs - batch[1]).square().mean()


def task(data: Iterable[Any] | Callable[[], Iterable[Any]], **parts: Any) -> Task:
    given = {"inputs": lambda batch: ((batch[0],), {}), "loss": mean_square, **parts}
    return Task("toy.py", calibration=data if callable(data) else lambda: data, **given)


def importance(program: Program, groups: Groups, about: Task | None = None, **options: Any) -> Importance:
    """Run the pass twice as the manager would; it must answer the same and leave the tensors as they were."""
    one = Score(**options)
    facts = Facts([groups, *([about] if about else [])]).restricted(one)
    versions = {name: (tensor._version, tensor.requires_grad, tensor.grad) for name, tensor in program.tensors.items()}
    first, second = one.run(program, facts), one.run(program, facts)
    assert first.program is program
    (found,), (again,) = first.facts, second.facts
    assert isinstance(found, Importance)
    assert isinstance(again, Importance)
    assert {name: scores.tolist() for name, scores in found.scores.items()} == {name: s.tolist() for name, s in again.scores.items()}
    assert set(found.scores) == {group.name for group in groups.prunable}
    for name, tensor in program.tensors.items():
        version, required, gradient = versions[name]
        assert (tensor._version, tensor.requires_grad) == (version, required)
        assert tensor.grad is gradient
        assert not tensor._post_accumulate_grad_hooks
    return found
