"""Programs as plain data and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import irprune
from irprune.analysis.groups import discover
from irprune.backend.rewrite import remove
from irprune.ir.program import Program
from irprune.ir.snapshot import NotStorable, decode, encode, pack, unpack
from irprune.ir.text import dump
from irprune.rules.infer import typed


class Skip(nn.Module):
    """A residual block over flattened pixels: views with symbolic sizes, a tied weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.again = nn.Linear(6, 16)
        self.again.weight = self.up.weight
        self.register_buffer("scale", torch.arange(6.0) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        hidden = torch.relu(self.up(x)) + torch.relu(self.again(x))
        flat = hidden.view(batch * length, 16)
        return (x + self.down(flat).view(batch, length, 6)) * self.scale


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return irprune.trace(Skip(), (torch.randn(2, 5, 6),), dynamic={"x": {0: "batch", 1: "length"}})


def pruned(program: Program) -> Program:
    group = next(group for group in discover(program).prunable if group.size == 16)
    mask = torch.arange(16).numpy() % 4 != 0
    return remove(program, {group.var: mask})


def there_and_back(program: Program, reference: Program) -> Program:
    data, tensors = pack(program, reference)
    return unpack(json.loads(json.dumps(data)), {name: value.clone() for name, value in tensors.items()}, reference)


def test_a_pruned_program_is_the_same_afterwards(program: Program) -> None:
    smaller = pruned(program)
    back = typed(there_and_back(smaller, program))
    assert dump(back, discover(back)) == dump(smaller, discover(smaller))
    assert {name: tensor.stride() for name, tensor in back.tensors.items()} == {name: t.stride() for name, t in smaller.tensors.items()}
    assert [back.is_parameter(name) for name in back.tensors] == [smaller.is_parameter(name) for name in smaller.tensors]
    assert back.aliases == smaller.aliases == {"again.weight": "up.weight"}
    for shape in ((2, 5, 6), (3, 4, 6)):
        x = torch.randn(shape)
        assert torch.equal(back(x), smaller(x))
    for node in smaller.nodes:
        twin = back.by_name[node.name]
        assert str(twin.meta.get("val")) == str(node.meta.get("val"))
        assert twin.meta.get("stack_trace") == node.meta.get("stack_trace")
        assert twin.args.__repr__() == node.args.__repr__()


def test_only_what_changed_is_stored(program: Program) -> None:
    _, tensors = pack(pruned(program), program)
    assert sorted(tensors) == ["again.bias", "down.weight", "up.bias", "up.weight"]
    assert pack(program, program)[1] == {}
    assert there_and_back(program, program).tensors["scale"] is program.tensors["scale"]


def test_strides_are_kept(program: Program) -> None:
    turned = program.clone()
    turned.module.up.weight = nn.Parameter(torch.randn(6, 16).t())  # type: ignore[union-attr]
    back = there_and_back(turned, program)
    assert back.tensors["up.weight"].stride() == (1, 16)
    assert torch.equal(back.tensors["up.weight"], turned.tensors["up.weight"])


def test_an_interface_of_its_own_has_no_form(program: Program) -> None:
    import dataclasses

    other = dataclasses.replace(program, interface=dataclasses.replace(program.interface))
    with pytest.raises(NotStorable, match="interface"):
        pack(other, program)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None, True, "text", (3, [4])],
        {"a": float("inf"), 2: -float("inf")},
        (torch.float16, torch.strided, torch.channels_last, torch.device("cpu")),
        slice(1, None, 2),
        (Ellipsis, 1 + 2j),
        0.1 + 0.2,
    ],
)
def test_values(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_what_is_no_value_is_refused() -> None:
    with pytest.raises(NotStorable, match="object"):
        encode([object()])
