"""Small models and helpers for the tests of ``prune`` and of recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from irprune_passes.prune import Prune
from torch import nn

from irprune.analysis.groups import discover
from irprune.frontend.export import trace
from irprune.ir.dims import Mask
from irprune.ir.facts import Fact, Groups, Importance, Original, PruneReport
from irprune.ir.program import Program
from irprune.pipeline.instruments import fingerprint
from irprune.pipeline.passes import Facts, Pass
from irprune.rules.infer import typed

torch.set_num_threads(1)


class Mlp(nn.Module):
    """Two hidden layers: groups ``ffn0`` (width a) and ``ffn1`` (width b)."""

    def __init__(self, a: int = 64, b: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, a), nn.Linear(a, b), nn.Linear(b, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Per layer a group of heads and one of ffn neurons; one residual stream through all of them."""

    def __init__(self, layers: int = 3, width: int = 16, heads: int = 4, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Convolutions(nn.Module):
    """Two groups of channels; the first one's convolution is followed by a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.head = nn.Conv2d(24, 12, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@dataclass(frozen=True)
class Toy:
    """A traced model with its groups."""

    program: Program
    groups: Groups

    def scores(self, seed: int = 0) -> Importance:
        """A different random score for each index of each prunable group."""
        generator = np.random.default_rng(seed)
        return Importance({group.name: generator.permutation(group.size) + generator.random() for group in self.groups.prunable})

    def magnitude(self) -> Importance:
        """Sum of squares of all slices of an index, measured again on smaller programs."""
        return magnitude(self.program, self.groups)


def magnitude(program: Program, groups: Groups) -> Importance:
    scores = {}
    for group in groups.prunable:
        found = np.zeros(group.size)
        for member in group.members:
            squares = program.tensors[member.tensor].detach().double().square().transpose(0, member.axis)
            for lane in member.maps:
                np.add.at(found, lane[lane >= 0], squares.reshape(len(lane), -1).sum(1).numpy()[lane >= 0])
        scores[group.name] = found
    return Importance(scores, "magnitude", magnitude)


def toy(make: Callable[[], nn.Module], *shape: int, seed: int = 0) -> Toy:
    """A model with seeded weights, traced with a random input of the shape."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        program = typed(trace(make().eval(), (torch.randn(shape),)))
    return Toy(program, discover(program))


def mlp(a: int = 64, b: int = 32) -> Toy:
    return toy(lambda: Mlp(a, b), 2, 6)


def transformer(**sizes: int) -> Toy:
    return toy(lambda: Transformer(**sizes), 2, 7, 5)


def convolutions() -> Toy:
    return toy(Convolutions, 2, 3, 8, 8)


def run_checked(one: Pass, program: Program, facts: list[Fact]) -> tuple[Program, PruneReport]:
    """Run a pass twice: the input stays untouched and both runs answer the same."""
    before = fingerprint(program)
    first = one.run(program, Facts(facts).restricted(one))
    assert fingerprint(program) == before
    second = one.run(program, Facts(facts).restricted(one))
    a, b = (result.program.tensors for result in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    report = next(fact for fact in first.facts if isinstance(fact, PruneReport))
    return first.program, report


def prune(on: Toy, importance: Importance | None = None, *, facts: tuple[Fact, ...] = (), **options: Any) -> tuple[Program, PruneReport]:
    return run_checked(Prune(**options), on.program, [on.groups, importance or on.scores(), Original(on.program), *facts])


def kept(masks: Mapping[str, Mask]) -> dict[str, list[int]]:
    """The indices that stay, for comparison by eye."""
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
