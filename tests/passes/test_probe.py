"""The probe: readers as matrices, moments in one pass, and the walk from reader to reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from irprune_passes.probe import Walk, damped, observe, readers, spd_solve
from nets import net, tensor
from score_toys import TwoLayers, seeded, task, traced
from torch import Tensor, nn

from irprune.analysis.groups import discover
from irprune.errors import DataError
from irprune.ir.program import Program

IMAGE = tensor(2, 6, 7, 5)
SIGNAL = tensor(2, 6, 9)
ROWS = tensor(3, 4, 6)
READ = {
    "linear": (lambda n, x: n.linear(x, 5), ROWS),
    "linear_without_bias": (lambda n, x: n.linear(x, 5, bias=False), ROWS),
    "matmul": (lambda n, x: x @ n.parameter(6, 5), ROWS),
    "matmul_transposed": (lambda n, x: x @ n.parameter(5, 6).T, ROWS),
    "addmm": (lambda n, x: torch.addmm(n.parameter(5), x.reshape(-1, 6), n.parameter(6, 5)), ROWS),
    "conv": (lambda n, x: n.conv(x, 4, 3), IMAGE),
    "conv_padded": (lambda n, x: n.conv(x, 4, (3, 2), padding=(2, 1)), IMAGE),
    "conv_same": (lambda n, x: n.conv(x, 4, (5, 3), padding="same"), IMAGE),
    "conv_valid": (lambda n, x: n.conv(x, 4, 2, padding="valid"), IMAGE),
    "conv_strided": (lambda n, x: n.conv(x, 4, 3, stride=2, padding=1, dilation=2), IMAGE),
    "conv_grouped": (lambda n, x: n.conv(x, 8, 3, groups=2), IMAGE),
    "conv_without_batch": (lambda n, x: nn.functional.conv2d(x[0], n.parameter(4, 6, 3, 3)), IMAGE),
    "conv1d": (lambda n, x: n.conv(x, 4, 3, rank=1, padding=1, stride=2), SIGNAL),
}


def results(program: Program, *inputs: Tensor) -> dict[str, Any]:
    walk = Walk(program)
    return dict(walk.values(list(inputs), len(list(program.nodes)) - 1, "here"))


@pytest.mark.parametrize("name", READ)
def test_a_reader_is_a_matrix_times_samples(name: str) -> None:
    function, x = READ[name]
    program = net(function, x)
    (reader,) = readers(program)
    values = results(program, x)
    samples, outputs = reader.samples(values[reader.operand]), reader.results(values[reader.node])
    weight = program.tensors[reader.weight].detach()
    matrix = reader.matrix(weight)
    expected = samples @ matrix.mT
    if reader.bias is not None:
        expected = expected + program.tensors[reader.bias].detach().reshape(matrix.shape[0], 1, -1)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(reader.weight_of(matrix, weight), weight)
    assert reader.own
    assert (reader.bias is None) == (name in ("linear_without_bias", "matmul", "matmul_transposed", "conv_without_batch"))


NOT_READ = {
    "transposed convolution": (lambda n, x: n.conv(x, 4, 3, transposed=True), IMAGE),
    "computed weight": (lambda n, x: x @ (n.parameter(6, 5) * 2), ROWS),
    "two activations": (lambda n, x: x @ x.mT, ROWS),
    "scaled addmm": (lambda n, x: torch.addmm(n.parameter(5), x.reshape(-1, 6), n.parameter(6, 5), alpha=2), ROWS),
    "batched weight": (lambda n, x: x @ n.parameter(3, 6, 5), ROWS),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_no_reader(name: str) -> None:
    function, x = NOT_READ[name]
    assert readers(net(function, x)) == ()


def test_a_weight_with_two_uses_is_not_the_readers_own() -> None:
    def twice(n: Any, x: Tensor) -> Tensor:
        layer = n.layer(lambda: nn.Linear(6, 6), name="shared")
        return layer(torch.relu(layer(x)))

    assert [reader.own for reader in readers(net(twice, ROWS))] == [False, False]


def test_features_of_an_index() -> None:
    """Three heads of two dimensions; channels of a convolution with a window of two."""

    def flat(n: Any, x: Tensor) -> Tensor:
        heads = n.linear(x, 6).unflatten(-1, (3, 2)) * n.parameter(3, 1)
        return n.linear(heads.flatten(-2), 5)

    program = net(flat, ROWS)
    reader = readers(program)[-1]
    found = {group.size: reader.features(program, group) for group in discover(program).prunable if reader.reads(program, group)}
    assert found[3].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found[2].tolist() == [[0, 2, 4], [1, 3, 5]]

    image = net(lambda n, x: n.conv(torch.relu(n.conv(x, 3, 1)), 2, (1, 2)), IMAGE)
    (group,) = (group for group in discover(image).prunable if group.size == 3)
    assert readers(image)[1].features(image, group).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert not readers(image)[0].reads(image, group)


def test_a_depthwise_convolution_passes_channels_on_and_reads_none() -> None:
    program = net(lambda n, x: n.conv(n.conv(n.conv(x, 4, 1), 4, 3, groups=4), 2, 1), IMAGE)
    (group,) = (group for group in discover(program).prunable if group.size == 4)
    assert [reader.reads(program, group) for reader in readers(program)] == [False, False, True]


def test_moments_are_sums_over_all_batches() -> None:
    program, _ = traced(seeded(lambda: TwoLayers(act=nn.ReLU())).double(), tensor(4, 3), dynamic={"x": {0: "batch"}})
    data = [(tensor(size, 3, seed=size),) for size in (4, 7, 2)]
    of = readers(program)
    found = observe(program, task(data), of, ("sum", "abs", "square", "nonzero"), purpose="the test")
    x = torch.cat([batch[0] for batch in data])
    hidden = torch.relu(x @ program.tensors["fc1.weight"].T + program.tensors["fc1.bias"]).detach()
    for reader, read in zip(of, (x, hidden), strict=True):
        moments = found[reader.node]
        assert moments.count == 13
        torch.testing.assert_close(moments.sums["sum"][0], read.sum(0))
        torch.testing.assert_close(moments.sums["abs"][0], read.abs().sum(0))
        torch.testing.assert_close(moments.mean("square")[0], read.square().mean(0))
        torch.testing.assert_close(moments.mean("nonzero")[0], (read != 0).double().mean(0))
        torch.testing.assert_close(moments.variance[0], read.var(0, correction=0))
    assert observe(program, task(data), of, ("sum",), batches=1, purpose="the test")[of[0].node].count == 4


def test_no_data_is_an_error() -> None:
    program, _ = traced(seeded(TwoLayers), torch.zeros(4, 3))
    with pytest.raises(DataError, match="the test needs calibration data, which the target does not give"):
        observe(program, None, readers(program), ("sum",), purpose="the test")
    with pytest.raises(DataError, match="the calibration data is empty"):
        observe(program, task([]), readers(program), ("sum",), purpose="the test")
    with pytest.raises(DataError, match=r"calibration batch 0.*the batch does not fit the model"):
        observe(program, task([(torch.zeros(4, 7),)]), readers(program), ("sum",), purpose="the test")


def test_a_walk_uses_weights_that_are_replaced_on_the_way() -> None:
    def three(n: Any, x: Tensor) -> Tensor:
        return n.linear(torch.relu(n.linear(x, 5, bias=False) @ n.parameter(4, 5).T), 2)

    program = net(three, ROWS)
    first, second, third = readers(program)
    batches = [tensor(3, 4, 6, seed=seed) for seed in (5, 6)]
    walk = Walk(program, [[x] for x in batches])
    seen = [value(first.operand) for value in walk.advance(first.node)]
    assert all(torch.equal(a, b) for a, b in zip(seen, batches, strict=True))
    new = tensor(4, 5, seed=7)
    for _ in walk.advance(second.node):
        pass
    walk.replaced[second.weight] = new
    for x, value in zip(batches, walk.advance(third.node), strict=True):
        expected = torch.relu(x @ program.tensors[first.weight].T @ new.T)
        torch.testing.assert_close(value(third.operand), expected)
    assert not torch.equal(program.tensors[second.weight], new)


def test_a_walk_holds_only_what_is_still_used() -> None:
    def deep(n: Any, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + n.linear(torch.relu(n.linear(x, 9)), 6)
        return x

    program = net(deep, ROWS)
    walk = Walk(program, [[ROWS]])
    for reader in readers(program):
        for _ in walk.advance(reader.node):
            pass
        assert len(walk._states[0]) <= 2, "the stream and what the reader reads"


def test_a_singular_matrix_is_solved_by_its_pseudo_inverse() -> None:
    matrix = torch.tensor([[2.0, 0], [0, 0]], dtype=torch.float64)
    assert spd_solve(matrix, torch.tensor([[4.0], [0]], dtype=torch.float64)).tolist() == [[2], [0]]
    assert damped(matrix, 0.5).tolist() == [[3, 0], [0, 1]]
