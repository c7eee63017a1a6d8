"""What a report shows beyond the manifest, on a model that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from irprune import api
from irprune.analysis.cost import Cost
from irprune.errors import DataError
from irprune.report.data import Data, _cut


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks; the output of each is an output of the model's, so only the inner neurons are prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        for number, block in enumerate(self.blocks):
            with torch.no_grad():
                # Neuron i of a block has norms that grow with i: magnitude removes the first ones.
                weights = torch.arange(1.0, 7.0) * (number + 1)
                block.up.weight.copy_(weights[:, None].expand(6, 4))
                block.up.bias.zero_()
                block.down.weight.copy_(weights[None].expand(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    out = tmp_path_factory.mktemp("run") / "out"
    api.run(Net(), "score{criterion=magnitude},prune{ratio=0.5 of=indices round_to=1}", example_inputs=(torch.randn(2, 4),), out=out)
    return Data.read(out)


def test_groups_with_their_blocks(data: Data) -> None:
    found = [(row.name, row.kind, row.block, row.size, row.kept) for row in data.groups]
    assert found == [("ffn0", "ffn", "blocks.0", 6, 3), ("ffn1", "ffn", "blocks.1", 6, 3)]
    assert data.groups[0].members == ("blocks.0.up.bias:0", "blocks.0.up.weight:0", "blocks.0.down.weight:1")


def test_scores_lie_on_both_sides_of_the_cut_off(data: Data) -> None:
    (spread,) = data.spreads
    assert (spread.kind, spread.groups, spread.log) == ("ffn", 2, True)
    assert (sum(spread.removed), sum(spread.kept)) == (6, 6)
    edges = np.array(spread.edges)
    assert 0.0 in edges
    assert not any(np.array(spread.removed)[edges[:-1] >= 0])
    assert not any(np.array(spread.kept)[edges[1:] <= 0])
    # Both groups have norms 1 : 2 : ... : 6, so relative to their cut-offs they are the same.
    assert sorted(set(spread.removed)) == [0, 2]


def test_where_parameters_go(data: Data) -> None:
    shares = {share.path: share for share in data.shares}
    assert shares["blocks.*.up"].modules == 2
    assert shares["blocks.*.up"].params == (2 * 30, 2 * 15)
    assert shares["blocks.*.down"].params == (2 * 28, 2 * 16)
    assert shares["blocks.*.up"].macs == (2 * 2 * 24, 2 * 2 * 12)
    assert all(share.ms is not None and min(share.ms) >= 0 for share in data.shares)


def test_operations_add_up_to_the_whole() -> None:
    cost = Cost(api.trace(Net(), (torch.randn(2, 4),)))
    assert sum(cost.macs_by_operation().values()) == cost.macs()


def test_what_stayed_whole(data: Data) -> None:
    assert data.prunable_params == 2 * (24 + 6 + 24)
    assert [(one.axes, one.params) for one in data.frozen] == [(1, 8)]
    assert "the model" in data.frozen[0].why


@pytest.mark.parametrize(
    ("values", "mask", "cut"),
    [([1.0, 2.0, 4.0, 8.0], [False, False, True, True], 3.0), ([1.0, 2.0, 4.0, 8.0], [False, True, False, True], 3.0)],
)
def test_as_many_scores_lie_below_the_cut_off_as_went(values: list[float], mask: list[bool], cut: float) -> None:
    assert _cut(np.array(values), np.array(mask)) == cut


def test_no_pruning_leaves_shares_only(tmp_path: Path) -> None:
    api.run(Net(), "discover", example_inputs=(torch.randn(2, 4),), out=tmp_path / "out")
    data = Data.read(tmp_path / "out")
    assert (data.groups, data.spreads, data.frozen) == ((), (), ())
    assert [share.params[0] == share.params[1] for share in data.shares] == [True] * len(data.shares)


def test_data_of_other_making_is_refused(tmp_path: Path) -> None:
    assert Data.read(tmp_path) == Data()
    (tmp_path / "report.json").write_text('{"groups": 1}')
    with pytest.raises(DataError, match="no data of a report"):
        Data.read(tmp_path)


class NoTokens(nn.Module):
    """A table of tokens that has none, as a vision transformer without register tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.tokens = nn.Parameter(torch.empty(0, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.cat([self.tokens, torch.relu(self.up(x))]))


def test_an_axis_without_positions_is_no_obstacle(tmp_path: Path) -> None:
    passes = "score{criterion=magnitude},prune{ratio=0.5 of=indices round_to=1 kinds=all}"
    api.run(NoTokens(), passes, example_inputs=(torch.randn(2, 4),), out=tmp_path / "out")
    assert [row.kept for row in Data.read(tmp_path / "out").groups if row.size == 6] == [3]
