"""What the proof calls the same numbers: choices among equals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import Net, masks, net, tensor
from torch import Tensor, nn

from irprune.analysis.groups import discover
from irprune.backend.proof import Settled, prove
from irprune.backend.rewrite import remove
from irprune.errors import ProofError
from irprune.frontend.export import trace
from irprune.ir.program import Program, set_tensor
from irprune.rules.infer import typed


def single(fn: object, *inputs: Tensor) -> Program:
    """A traced and typed network in float32."""
    return typed(trace(Net(fn, *(x.double() for x in inputs)).float(), inputs))  # type: ignore[arg-type]


def twice(n: Net, h: Tensor) -> Tensor:
    """One number per row, computed in two ways that round differently, with a third that is smaller."""
    weights = n.parameter(48)
    total = (h * weights).sum(-1)
    return torch.stack([h @ weights, total, total - 9], -1)


def choose(n: Net, x: Tensor) -> Tensor:
    """The row's largest score decides which of three numbers is given."""
    h = n.linear(x, 48)
    return n.parameter(3)[twice(n, h).topk(1, dim=-1)[1]]


def choose_largest(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 48)
    return n.parameter(3)[twice(n, h).argmax(-1)]


def choose_max(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 48)
    values, places = twice(n, h).max(-1)
    return n.parameter(3)[places] + values * 1e-3


@pytest.mark.parametrize("fn", [choose, choose_largest, choose_max])
def test_equals_may_be_chosen_either_way(fn: object) -> None:
    program = single(fn, tensor(256, 7).float())
    keep = masks(discover(program).prunable, 3)
    checks = prove(program, remove(program, keep), keep)
    assert checks["numbers"]["ties"] > 0


def test_another_choice_is_no_tie() -> None:
    """The third score made the largest by a wrong number: nothing ties there, so the difference stands."""
    program = single(choose, tensor(256, 7).float())
    keep = masks(discover(program).prunable, 3)
    after = remove(program, keep)
    node = next(node for node in after.module.graph.nodes if node.args[1:] == (9,))
    node.update_arg(1, -9)
    after.module.recompile()
    with pytest.raises(ProofError, match="differs from the masked original"):
        prove(program, after, keep)


def test_a_choice_is_taken_over_where_the_numbers_are_equal() -> None:
    program = net(lambda n, x: x.topk(2, dim=-1)[1], torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 4.0, 1.0, 2.0]]))
    x = program.interface.example[0][0]
    name = next(node.name for node in program.nodes if "topk" in str(node.target))
    run = Settled(program, {name: torch.tensor([[2, 0], [1, 2]])}, 1e-6)
    assert run.run(x, enable_io_processing=False)[0].tolist() == [[0, 2], [1, 3]]  # the second row's 1 is not its 2
    run = Settled(program, {name: torch.tensor([[2, 0], [1, 3]])}, 1e-6)
    assert run.run(x, enable_io_processing=False)[0].tolist() == [[2, 0], [1, 3]]
    assert run.ties == 2


def test_what_rounding_makes_large_is_compared_in_float64() -> None:
    """A steep function turns the other order of a sum into a difference that no tolerance of single precision allows."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32), nn.Tanh()).eval()
    with torch.no_grad():
        model[2].weight.mul_(3e4)
    program = typed(trace(model, (torch.randn(512, 64),)))
    (group,) = discover(program).prunable
    keep = {group.var: np.random.default_rng(0).permutation(group.size) >= 80}
    after = remove(program, keep)
    numbers = prove(program, after, keep)["numbers"]
    assert numbers["float64"]
    assert numbers["max_abs_err"] <= numbers["tolerance"] == 1e-9
    wrong = after.clone()
    set_tensor(wrong.module, "2.bias", after.tensors["2.bias"] + 0.1)
    with pytest.raises(ProofError, match="differs from the masked original"):
        prove(program, typed(wrong.clone()), keep)
