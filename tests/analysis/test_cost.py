"""Costs are known before anything is removed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Net, net, tensor
from torch import Tensor, nn
from torch.nn import functional as F

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend.rewrite import remove
from irprune.ir.dims import Mask, Var
from irprune.ir.program import Program


def transformer(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 12)
    q, k, v = n.linear(h, 24).split([12, 6, 6], -1)
    q, k, v = (t.view(t.shape[0], 5, count, 3).transpose(1, 2) for t, count in ((q, 4), (k, 2), (v, 2)))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    h = n.layer(lambda: nn.LayerNorm(12))(h + n.linear(y.transpose(1, 2).reshape(-1, 5, 12), 12))
    gate, up = n.linear(h, 16).chunk(2, -1)
    return n.linear(h + n.linear(F.silu(gate) * up, 12), 3)


def convolutions(n: Net, x: Tensor) -> Tensor:
    h = F.relu(n.layer(lambda: nn.BatchNorm2d(8))(n.conv(x, 8, 3, padding=1)))
    h = F.relu(n.conv(h, 12, 3, groups=4))
    h = n.conv(h, 12, 3, groups=12) + n.conv(h[:, :, 1:-1, 1:-1], 12)
    up = n.conv(h, 6, 2, transposed=True, stride=2)
    return n.linear(up.flatten(2).mean(-1), 3)


def products(n: Net, x: Tensor) -> Tensor:
    h = torch.einsum("bsi,hdi->bshd", x, n.parameter(2, 4, 6)).flatten(2)
    h = torch.cat([h, torch.bmm(h @ n.parameter(8, 5), n.parameter(1, 5, 7).expand(h.shape[0], 5, 7))], -1)
    return n.linear(n.layer(lambda: nn.GRU(15, 6, batch_first=True))(h)[0], 3)


PROGRAMS = {
    "transformer": lambda: net(transformer, tensor(2, 5, 6)),
    "convolutions": lambda: net(convolutions, tensor(2, 3, 8, 8)),
    "products": lambda: net(products, tensor(2, 5, 6)),
}
_traced: dict[str, Program] = {}


def program(name: str) -> Program:
    return _traced.setdefault(name, _traced.get(name) or PROGRAMS[name]())


@pytest.mark.parametrize("name", PROGRAMS)
def test_parameters_and_bytes_are_those_of_the_tensors(name: str) -> None:
    tensors = program(name).tensors
    cost = Cost(program(name))
    assert cost.params() == sum(t.numel() for n, t in tensors.items() if program(name).is_parameter(n))
    assert cost.bytes() == sum(t.numel() * t.element_size() for t in tensors.values())


def test_multiply_accumulates_counted_by_hand() -> None:
    def fn(n: Net, x: Tensor) -> Tensor:
        return n.linear(n.conv(x, 8, 3, groups=1).flatten(1), 10)

    # conv: 2 images, 8 x 4 x 4 results, 3 x 3 x 3 products each; linear: 2 rows, 128 x 10.
    assert Cost(net(fn, tensor(2, 3, 6, 6))).macs() == 2 * 8 * 16 * 27 + 2 * 128 * 10
    # attention: q, k, v and o 6 x 6 on 2 x 5 rows; scores and answers 2 heads x 5 x 5 x 3 each.
    mha = net(lambda n, x: n.layer(lambda: nn.MultiheadAttention(6, 2, batch_first=True))(x, x, x)[0], tensor(2, 5, 6))
    assert Cost(mha).macs() == 10 * 6 * 6 * 4 + 2 * 2 * 2 * 5 * 5 * 3


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_predicted_costs_are_those_of_the_smaller_program(name: str, data: st.DataObject) -> None:
    """For every combination of counts, interactions of two shrunk axes of one weight included (U12)."""
    before = program(name)
    keep: dict[Var, Mask] = {}
    for group in discover(before).prunable:
        count = data.draw(st.integers(1, group.size), label=group.name)
        keep[group.var] = np.arange(group.size) < count
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    predicted, found = Cost(before), Cost(remove(before, keep))
    for unit in ("params", "macs", "bytes"):
        assert predicted.of(unit, counts) == found.of(unit)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_cost_of_an_index_is_the_difference_of_two_programs(name: str) -> None:
    before = program(name)
    cost = Cost(before)
    for group in discover(before).prunable:
        after = Cost(remove(before, {group.var: np.arange(group.size) > 0}))
        assert cost.params() - after.params() == group.params_per_index, group.name
        assert cost.macs() - after.macs() == group.macs_per_index, group.name


def test_the_size_of_a_dynamic_axis_is_that_of_the_example() -> None:
    small, large = (Cost(toys.program(toys.Mlp(), torch.ones(batch, 4))) for batch in (2, 6))
    assert large.macs() == 3 * small.macs() == 6 * (4 * 8 + 8 * 3)
    assert large.params() == small.params()


def test_what_is_not_known_before_the_run_counts_as_one() -> None:
    def fn(n: Net, x: Tensor) -> Tensor:
        return n.linear(n.linear(x, 8)[(x > 0).any(-1)], 3)

    assert Cost(net(fn, tensor(3, 4))).macs() == 3 * 4 * 8 + 1 * 8 * 3


def test_buffers_weigh_bytes_and_are_no_parameters() -> None:
    cost = Cost(net(lambda n, x: n.linear(n.linear(x, 8, bias=False) * n.buffer(8), 3, bias=False), tensor(3, 4)))
    assert cost.params() == 4 * 8 + 8 * 3
    assert cost.bytes() == 8 * (4 * 8 + 8 * 3 + 8)
    assert math.isclose(cost.bytes() / 8 - cost.params(), 8)
