"""Criteria that look at activations and filters, by hand and by their invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from irprune_passes.prune import Prune
from irprune_passes.score import Score
from irprune_passes.score.obs import Layer, eliminate
from nets import Net, net, tensor
from score_toys import TwoLayers, importance, pairs, seeded, task, traced
from torch import Tensor, nn

from irprune.analysis.groups import discover
from irprune.errors import DataError, OptionError
from irprune.frontend.export import trace
from irprune.ir.facts import Groups, Importance, Original
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

DRIVEN: list[dict[str, Any]] = [
    *({"criterion": "activation", "statistic": statistic} for statistic in ("norm", "std", "abs", "nonzero")),
    {"criterion": "activation", "weighting": "l1"},
    {"criterion": "activation", "statistic": "abs", "weighting": "none"},
    {"criterion": "obs"},
    {"criterion": "obs", "at_once": 0},
    {"criterion": "taylor"},
]


def text(options: Any) -> str:
    return "-".join(map(str, options.values()))


def only(scores: Importance) -> np.ndarray:
    (found,) = scores.scores.values()
    return found


class Gate(nn.Module):
    """``fc2(relu(x))`` with a gain per feature in front: a group of three whose activations are known."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.eye(3))
            self.fc1.bias.zero_()
            self.fc2.weight.copy_(torch.tensor([[3.0, 0, 1], [-4, 2, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def by_hand(**options: Any) -> list[float]:
    x = torch.tensor([[1.0, 2, 4], [1, -2, 4]])  # after the relu: 1 1, 2 0, 4 4
    program, groups = traced(Gate(), x)
    return only(importance(program, groups, task([(x, torch.zeros(2, 2))]), **options)).tolist()


def test_activation_by_hand() -> None:
    assert by_hand(criterion="activation") == pytest.approx([1 * 5, 2**0.5 * 2, 4 * 2**0.5])
    assert by_hand(criterion="activation", weighting="l1") == pytest.approx([1 * 7, 2**0.5 * 2, 4 * 2])
    assert by_hand(criterion="activation", weighting="none") == pytest.approx([1, 2**0.5, 4])
    assert by_hand(criterion="activation", statistic="std") == pytest.approx([0, 1 * 2, 0])
    assert by_hand(criterion="activation", statistic="abs", weighting="none") == pytest.approx([1, 1, 4])
    assert by_hand(criterion="activation", statistic="nonzero", weighting="none") == pytest.approx([1, 0.5, 1])


def test_heads_are_scored_by_all_their_dimensions() -> None:
    def heads(n: Any, x: Tensor) -> Tensor:
        return n.linear((n.linear(x, 6).unflatten(-1, (3, 2)) * n.parameter(3, 1)).flatten(-2), 5)

    x = tensor(8, 4)
    program = net(heads, x)
    groups = discover(program)
    scores = importance(program, groups, task([(x,)], loss=None), criterion="activation").scores
    values = dict(program.tensors)
    read = ((x @ values["linear0.weight"].T + values["linear0.bias"]).unflatten(-1, (3, 2)) * values["parameter0"]).detach()
    squares = read.square().mean(0) * values["linear1.weight"].detach().square().sum(0).reshape(3, 2)
    (name,) = (group.name for group in groups.prunable if group.size == 3)
    np.testing.assert_allclose(scores[name], squares.sum(1).sqrt())


def test_several_readers_are_put_together_by_the_reduction() -> None:
    def two(n: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(n.linear(x, 5))
        return torch.cat([n.linear(hidden, 2), n.linear(hidden, 3)], -1)

    x = tensor(8, 4)
    program = net(two, x)
    groups, about = discover(program), task([(x,)], loss=None)
    ((name, size),) = ((group.name, group.size) for group in groups.prunable)
    found = {
        how: importance(program, groups, about, criterion="activation", reduce=how).scores[name] for how in ("first", "last", "sum", "max")
    }
    assert size == 5
    np.testing.assert_allclose(found["sum"], found["first"] + found["last"])
    np.testing.assert_allclose(found["max"], np.maximum(found["first"], found["last"]))


def shuffled(seed: int) -> tuple[nn.Module, nn.Module, np.ndarray]:
    """A model and the same with its hidden units in another order."""
    model, other = (seeded(lambda: TwoLayers(act=nn.ReLU()), seed).double() for _ in range(2))
    order = np.random.default_rng(seed).permutation(5)
    assert isinstance(other, TwoLayers)
    with torch.no_grad():
        for tensor in (other.fc1.weight, other.fc1.bias):
            tensor.copy_(tensor[order])
        other.fc2.weight.copy_(other.fc2.weight[:, order])
    return model, other, order


EVERY = [*DRIVEN, {"criterion": "fpgm"}]


@pytest.mark.parametrize("options", EVERY, ids=text)
def test_permuting_units_permutes_scores(options: Any) -> None:
    model, other, order = shuffled(3)
    data = [(x.double(), y.double()) for x, y in pairs(batches=3, size=16)]
    first, second = (only(importance(*traced(one, data[0][0]), task(data), **options)) for one in (model, other))
    np.testing.assert_allclose(second, first[order], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", EVERY, ids=text)
def test_scaling_a_whole_layer_keeps_the_local_ranking(options: Any) -> None:
    ranks = []
    for factor in (1.0, 7.0):
        model = seeded(lambda: TwoLayers(act=nn.ReLU()), 3).double()
        assert isinstance(model, TwoLayers)
        with torch.no_grad():
            if options["criterion"] == "fpgm":
                model.fc1.weight.mul_(factor)
            elif options["criterion"] == "taylor":
                model.fc2.weight.mul_(factor)
                model.fc2.bias.mul_(factor)
            else:
                model.fc2.weight.mul_(factor)
        data = [(x.double(), y.double() * factor) for x, y in pairs(batches=3, size=16)]
        ranks.append(np.argsort(only(importance(*traced(model, data[0][0]), task(data), **options))).tolist())
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("options", DRIVEN, ids=text)
def test_a_dead_unit_goes_first(options: Any) -> None:
    model = seeded(lambda: TwoLayers(act=nn.ReLU(), width=6), 1)
    assert isinstance(model, TwoLayers)
    with torch.no_grad():
        model.fc1.bias[4] = -100.0
        model.fc1.weight[4].mul_(10)
        model.fc2.weight[:, 4].mul_(10)
    data = pairs(batches=3, size=16)
    scores = only(importance(*traced(model, data[0][0]), task(data), **options))
    assert scores[4] == scores.min()
    assert scores[4] == pytest.approx(0, abs=1e-9)
    assert only(importance(*traced(model, data[0][0]), criterion="magnitude")).argmax() == 4, "its weights are the largest"


@pytest.mark.parametrize("options", EVERY, ids=text)
def test_more_sparsity_removes_more_of_the_same(options: Any) -> None:
    model = seeded(lambda: TwoLayers(act=nn.ReLU(), width=12))
    data = pairs(batches=3, size=16)
    program, groups = traced(model, data[0][0])
    found = importance(program, groups, task(data), **options)
    kept: list[set[int]] = []
    for count in (2, 5, 9):
        report = Prune(count=count).run(program, Facts([groups, found, Original(program)])).facts[0]
        (mask,) = report.keep.values()  # type: ignore[attr-defined]
        kept.append(set(np.flatnonzero(mask).tolist()))
    assert kept[0] > kept[1] > kept[2]


# -- optimal brain surgery ----------------------------------------------------------------------------


def surgery(seed: int, units: int, k: int = 1, outputs: int = 3) -> tuple[Layer, Tensor, Tensor]:
    """A layer with ``units * k`` correlated inputs; its weight and its Gram matrix."""
    size = units * k
    x = tensor(size, 4 * size, seed=seed) + 0.7 * tensor(1, 4 * size, seed=seed + 1)
    weight = tensor(outputs, size, seed=seed + 2)
    features = np.random.default_rng(seed).permutation(size).reshape(units, k)
    return Layer(weight[None], torch.linalg.inv(x @ x.T)[None], features), weight, x @ x.T


def refitted(weight: Tensor, gram: Tensor, gone: list[int]) -> tuple[Tensor, float]:
    """Constrained least squares, and its squared error."""
    keep = [j for j in range(len(gram)) if j not in gone]
    new = torch.zeros_like(weight)
    if keep:
        new[:, keep] = weight @ gram[:, keep] @ torch.linalg.inv(gram[keep][:, keep])
    gap = new - weight
    return new, float(((gap @ gram) * gap).sum())


@pytest.mark.parametrize(("units", "k"), [(6, 1), (4, 2)])
def test_elimination_is_constrained_least_squares(units: int, k: int) -> None:
    layer, weight, gram = surgery(0, units, k)
    gone: list[int] = []
    total = 0.0
    for unit in (2, 0, 3):
        total += float(layer.costs(torch.tensor([unit]))[0])
        layer.remove(torch.tensor([unit]))
        gone += layer.features[unit].tolist()
        expected, error = refitted(weight, gram, gone)
        torch.testing.assert_close(layer.weight[0], expected)
        assert total == pytest.approx(error)
    several, _, _ = surgery(0, units, k)
    several.remove(torch.tensor([2, 0, 3]))
    torch.testing.assert_close(several.weight, layer.weight)


def test_one_at_a_time_is_the_greedy_choice() -> None:
    layer, weight, gram = surgery(5, 6)
    column = layer.features[:, 0].tolist()
    scores = eliminate([layer], 6, 1)
    gone: list[int] = []
    order = []
    for _ in range(6):
        errors = {unit: refitted(weight, gram, [*gone, column[unit]])[1] for unit in range(6) if column[unit] not in gone}
        best = min(errors, key=errors.__getitem__)
        order.append((best, errors[best] - refitted(weight, gram, gone)[1]))
        gone.append(column[best])
    assert np.argsort(scores, kind="stable").tolist() == [unit for unit, _ in order]
    np.testing.assert_allclose(np.sort(scores), np.maximum.accumulate([cost for _, cost in order]))


def test_with_uncorrelated_inputs_surgery_is_wanda() -> None:
    weight, squares = tensor(3, 5), torch.tensor([1.0, 4, 9, 2, 0.5], dtype=torch.float64)
    layer = Layer(weight[None], torch.diag(1 / squares)[None], np.arange(5)[:, None])
    expected = (weight.abs() * squares.sqrt()).square().sum(0)
    torch.testing.assert_close(layer.costs(torch.arange(5)), expected)
    np.testing.assert_allclose(eliminate([layer], 5, 1), expected.numpy())


def test_a_copy_is_worth_nothing_until_the_other_is_gone() -> None:
    model = seeded(lambda: TwoLayers(act=nn.ReLU(), width=5)).double()
    assert isinstance(model, TwoLayers)
    with torch.no_grad():
        for part in (model.fc1.weight, model.fc1.bias, model.fc2.weight.T):
            part[3] = part[1]
    data = [(tensor(64, 3, seed=seed), tensor(64, 2, seed=seed + 9)) for seed in (1, 2)]
    toy = traced(model, data[0][0])
    obs = only(importance(*toy, task(data), criterion="obs", damping=1e-6, at_once=0))
    assert sorted(obs).index(min(obs[1], obs[3])) == 0
    assert min(obs[1], obs[3]) < 1e-3 * max(obs[1], obs[3])

    activation = only(importance(*toy, task(data), criterion="activation"))
    assert activation[1] == pytest.approx(activation[3])
    filters = only(importance(*toy, criterion="fpgm"))
    assert filters[1] == pytest.approx(filters[3])


def test_obs_names_the_reader_whose_gram_matrix_has_no_inverse() -> None:
    """Fewer samples than features, and a damping that rounding swallows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4)).eval()
    x = torch.randn(16, 8)
    program = typed(trace(model, (x,)))
    with pytest.raises(OptionError, match=r"damping=1e-10 is too little for 64 features.*") as caught:
        importance(program, discover(program), task([(x,)], loss=None), criterion="obs", damping=1e-10)
    assert caught.value.hint is not None
    assert "2.weight" in str(caught.value)


def test_surgery_of_grouped_convolutions_and_several_readers() -> None:
    """The scores add up to the whole output's energy, as everything goes in the end."""

    def grouped(n: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(n.conv(x, 8, 3))
        return torch.cat([n.conv(hidden, 6, 3, groups=2, bias=False), n.conv(hidden, 4, 3, bias=False)], 1)

    x = tensor(4, 3, 8, 7)
    model = Net(grouped, x)
    program = typed(trace(model, (x,)))
    groups = discover(program)
    scored = importance(program, groups, task([(x,)], loss=None), criterion="obs", damping=1e-9, at_once=0).scores
    assert scored
    for found in scored.values():
        assert (found >= 0).all()
        assert found.sum() >= float(model(x).detach().square().sum()) * (1 - 1e-6)


def test_groups_that_mix_or_have_no_reader_are_left_out_and_refused() -> None:
    def normed(n: Any, x: Tensor) -> Tensor:
        return n.linear(n.layer(lambda: nn.LayerNorm(7), "norm")(n.linear(x, 7)), 4)

    x = tensor(8, 6)
    program = net(normed, x)
    groups = discover(program)
    found = _scores(program, groups, task([(x,)], loss=None), criterion="obs")
    assert found.scores == {}
    with pytest.raises(DataError, match=r"group .* has no scores") as refused:
        Prune(ratio=0.2, kinds="all").run(program, Facts([groups, found, Original(program)]))
    assert "where its criterion cannot measure the group" in str(refused.value)
    assert set(_scores(program, groups, task([(x,)], loss=None), criterion="activation").scores) == {g.name for g in groups.prunable}


def _scores(program: Program, groups: Groups, about: Any, **options: Any) -> Importance:
    (found,) = Score(**options).run(program, Facts([groups, about])).facts
    assert isinstance(found, Importance)
    return found


# -- filters ------------------------------------------------------------------------------------------


def test_fpgm_by_hand() -> None:
    model = TwoLayers(width=3, inputs=2)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.0, 0], [3, 4], [0, 8]]))
    scores = only(importance(*traced(model, torch.zeros(2, 2)), criterion="fpgm"))
    assert scores.tolist() == pytest.approx([5 + 8, 5 + 5, 8 + 5])


def test_fpgm_takes_a_duplicate_where_magnitude_sees_none() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        random = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        model[0].weight.copy_(random / random.flatten(1).norm(dim=1)[:, None, None, None])
        model[0].weight[2] = model[0].weight[0]
        model[0].bias.zero_()
        model[2].weight.fill_(1)
    toy = traced(model, torch.zeros(2, 2, 5, 5))
    fpgm, norms = (only(importance(*toy, criterion=name)) for name in ("fpgm", "magnitude"))
    assert set(np.argsort(fpgm)[:2]) == {0, 2}
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def test_slimming_is_the_size_of_the_factor() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))
    program, groups = traced(model, torch.zeros(2, 2, 5, 5))
    found = _scores(program, groups, task([]), criterion="slimming").scores
    assert [scores.tolist() for scores in found.values()] == [pytest.approx([0.5, 2.0, 0.1, 1.0])]
    assert len(groups.prunable) == 2


def test_options_belong_to_their_criterion() -> None:
    for options in ({"criterion": "activation", "damping": 0.1}, {"criterion": "obs", "statistic": "std"}, {"weighting": "l1"}):
        with pytest.raises(ValueError, match="has no option"):
            Score.model_validate(options)
    program, groups = traced(Gate(), torch.zeros(2, 3))
    for criterion in ("activation", "obs"):
        with pytest.raises(DataError, match="needs calibration data, which the target does not give"):
            _scores(program, groups, task([], inputs=None), criterion=criterion)
