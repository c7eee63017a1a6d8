"""A plan as a table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.analysis.plan import PlanRow, layer_of, modules_of, plan_table
from irprune.frontend.export import trace
from irprune.ir.facts import Plan
from irprune.rules.infer import typed


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 5)])
        self.last = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


def test_a_row_per_group_that_loses_something_with_its_layer_and_its_own_cost() -> None:
    program = typed(trace(Stack(), (torch.randn(2, 3),)))
    groups = discover(program)
    keep = {"ffn0": np.array([1, 1, 0, 0], dtype=bool), "ffn1": np.array([1, 0, 1, 1, 1, 1], dtype=bool), "ffn2": np.ones(5, dtype=bool)}
    assert plan_table(Plan(keep), groups, Cost(program)) == [
        PlanRow("ffn0", "ffn", None, 4, 2, 2 * (3 + 1 + 6)),
        PlanRow("ffn1", "ffn", 0, 6, 5, 4 + 1 + 5),
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.7.mlp.up.weight", 7), ("h.0.attn.1.bias", 0), ("layer1.weight", None), ("embed.weight", None), ("3.weight", 3)],
)
def test_the_layer_is_the_first_number_in_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_modules_are_all_prefixes() -> None:
    assert modules_of(["a.b.w", "a.c"]) == {"a", "a.b", "a.b.w", "a.c"}
