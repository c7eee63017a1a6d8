"""The pass and its criteria on models small enough to check by hand."""

from __future__ import annotations

import itertools
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from irprune_passes.score import Score, criteria
from irprune_passes.score.criteria import Criterion, Study
from irprune_passes.score.taylor import Taylor
from pydantic import ValidationError
from score_toys import TwoLayers, importance, mean_square, pairs, seeded, task, traced
from torch import nn

from irprune.analysis.groups import discover
from irprune.errors import DataError
from irprune.ir.facts import Groups, Importance
from irprune.ir.program import Program
from irprune.pipeline.parser import parse
from irprune.pipeline.passes import Facts

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TAYLOR = [{"mode": mode, "order": order} for mode, order in itertools.product(("vector", "element"), (1, 2, "mixed"))]
TAYLOR += [{"combine": "total"}, {"order": "mixed", "fisher": "sum"}]


def text(options: Any) -> str:
    return "-".join(map(str, options.values()))


@pytest.fixture(scope="module")
def toy() -> tuple[Program, Groups]:
    return traced(seeded(TwoLayers), X)


def only(scores: Any) -> np.ndarray:
    (found,) = scores.scores.values()
    return found


# -- random and magnitude -----------------------------------------------------------------------------


def test_random_is_uniform_and_depends_on_seed_and_group_only(toy: tuple[Program, Groups]) -> None:
    first, again, other = (only(importance(*toy, criterion="random", seed=seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    wide = traced(seeded(lambda: TwoLayers(width=4000)), X)
    scores = only(importance(*wide, criterion="random"))
    assert scores.min() >= 0
    assert scores.max() < 1
    np.testing.assert_allclose(np.quantile(scores, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_random_numbers_of_a_group_are_its_own() -> None:
    program, groups = traced(seeded(lambda: nn.Sequential(TwoLayers(outputs=5), TwoLayers(inputs=5))), X)
    scores = importance(program, groups, criterion="random").scores
    assert len(scores) == len({tuple(found) for found in scores.values()}) == 3
    fewer = discover(program, freeze=["0.fc1.weight"])
    assert len(fewer.prunable) == 2
    for name, found in importance(program, fewer, criterion="random").scores.items():
        key = fewer[name].key
        assert found.tolist() == scores[next(group.name for group in groups if group.key == key)].tolist()


def test_the_seed_of_the_run_is_the_default(toy: tuple[Program, Groups]) -> None:
    run = task(pairs())
    assert only(importance(*toy, run, criterion="random")).tolist() == only(importance(*toy, criterion="random", seed=0)).tolist()


def test_magnitude_is_the_norm_of_all_slices_of_an_index() -> None:
    model = TwoLayers(width=2)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[1.0, -2, 2], [0, 0, 0]]))
        model.fc1.bias.copy_(torch.tensor([4.0, 0]))
        model.fc2.weight.copy_(torch.tensor([[-12.0, 3], [0, 4]]))
        model.fc2.bias.fill_(99)
    toy = traced(model, X)
    assert only(importance(*toy, p=1)).tolist() == [21, 7]
    assert only(importance(*toy, p=2)).tolist() == [13, 5], "the root of 9 + 16 + 144, not 3 + 4 + 12"
    assert only(importance(*toy, p=2, reduce="last")).tolist() == [12, 5]
    assert only(importance(*toy, p=2, reduce="max")).tolist() == [12, 5]
    assert only(importance(*toy, p=2, reduce="first")).tolist() == [3, 0]
    assert only(importance(*toy, p=2, reduce="prod")).tolist() == pytest.approx([3 * 4 * 12, 0])
    assert only(importance(*toy, p=2, reduce="mean")).tolist() == pytest.approx([(169 / 3) ** 0.5, (25 / 3) ** 0.5])


def test_a_group_whose_product_leaves_double_precision_has_no_scores_and_others_have() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TwoLayers(width=3, outputs=3) for _ in range(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = Residual()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e-5)
    found = traced(nn.Sequential(nn.Linear(3, 3), model, nn.Linear(3, 3)), X)
    wide, narrow = ([group.name for group in found[1].prunable if (len(group.members) > 9) == many] for many in (True, False))
    assert (len(wide), len(narrow)) == (1, 40)
    (scored,) = Score(reduce="prod").run(found[0], Facts([found[1]])).facts
    assert isinstance(scored, Importance)
    assert list(scored.scores) == narrow


class GroupedQuery(nn.Module):
    """Two heads of keys and values, three heads of queries to each, two dimensions a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 12, bias=False), nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
        self.o = nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s = x.shape[:2]
        q = self.q(x).view(b, s, 6, 2).transpose(1, 2)
        k, v = (one(x).view(b, s, 2, 2).transpose(1, 2)[:, :, None].expand(b, 2, 3, s, 2).reshape(b, 6, s, 2) for one in (self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 12))


def test_query_heads_count_for_their_own_key_head() -> None:
    model = seeded(GroupedQuery)
    program, groups = traced(model, torch.randn(2, 7, 5))
    by_kind = {group.kind: group.name for group in groups.prunable}
    scores = importance(program, groups, p=1).scores
    parts = {name: tensor.detach().double().abs().numpy() for name, tensor in model.named_parameters()}
    q, o = parts["q.weight"].sum(1).reshape(2, 3, 2), parts["o.weight"].sum(0).reshape(2, 3, 2)
    kv = (parts["k.weight"].sum(1) + parts["v.weight"].sum(1)).reshape(2, 2)
    np.testing.assert_allclose(scores[by_kind["heads"]], (q + o).sum((1, 2)) + kv.sum(1), rtol=1e-6)
    np.testing.assert_allclose(scores[by_kind["query_heads"]], (q + o).sum((0, 2)), rtol=1e-6)


def test_weights_without_values(toy: tuple[Program, Groups]) -> None:
    with torch.device("meta"):
        meta = traced(TwoLayers(), torch.empty(4, 3))
    with pytest.raises(DataError, match=r"at fc1\..*: the parameter is on the meta device and has no values to score"):
        importance(*meta)
    assert only(importance(*meta, criterion="random")).shape == (5,)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    program, groups = traced(seeded(TwoLayers), X)
    with torch.no_grad():
        program.tensors["fc2.weight"][1, 3] = bad
    with pytest.raises(DataError, match=r"at fc2.weight:1: the score of the parameter is not finite"):
        importance(program, groups)


# -- Taylor -------------------------------------------------------------------------------------------


def reference(program: Program, data: Any, *, mode: str = "element", order: Any = 1, combine: str = "batch", fisher: str = "mean") -> Any:
    """The table of the criterion's documentation, written out with all gradients in memory."""
    names = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}
    weights = [program.tensors[name] for name in names]
    steps = data if order == 1 else [(x[j : j + 1], y[j : j + 1]) for x, y in data for j in range(len(x))]
    gradients = [torch.autograd.grad(mean_square(program(step[0]), step), weights) for step in steps]
    total = np.zeros(len(program.tensors["fc1.bias"]))
    for number, (axis, weight) in enumerate(zip(names.values(), weights, strict=True)):
        flat = weight.detach().double().movedim(axis, 0).reshape(len(total), -1).numpy()
        terms = np.stack([g[number].double().movedim(axis, 0).reshape(flat.shape).numpy() * flat for g in gradients])
        if mode == "vector":
            terms = terms.sum(2, keepdims=True)
        squares = (terms**2).sum(0) if fisher == "sum" else (terms**2).mean(0)
        if order == 1:
            score = np.abs(terms).mean(0) if combine == "batch" and mode == "element" else np.abs(terms.mean(0))
        else:
            score = squares if order == 2 else np.abs(terms.mean(0) - squares / 2)
        total += score.sum(1)
    return total


@pytest.mark.parametrize("options", TAYLOR, ids=text)
@pytest.mark.parametrize("batches", [1, 3])
def test_taylor_is_its_formula(toy: tuple[Program, Groups], options: Any, batches: int) -> None:
    data = pairs(batches)
    found = only(importance(*toy, task(data), criterion="taylor", **options))
    np.testing.assert_allclose(found, reference(toy[0], data, **options), rtol=1e-5)


@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh()])
def test_the_last_structure_has_the_gate_gradient(act: nn.Module) -> None:
    model = seeded(lambda: TwoLayers(act=act))
    data = pairs(batches=1)
    gate = torch.ones(5, requires_grad=True)
    hidden = model.act(model.fc1(data[0][0]))
    mean_square(model.fc2(hidden * gate), data[0]).backward()
    found = only(importance(*traced(model, X), task(data), criterion="taylor", mode="vector", reduce="last"))
    np.testing.assert_allclose(found, gate.grad.abs().numpy(), rtol=1e-5)


def test_producer_and_consumer_agree_only_where_nothing_nonlinear_lies_between() -> None:
    about = task(pairs())
    linear = traced(seeded(lambda: TwoLayers(act=nn.Identity(), bias=False)), X)
    curved = traced(seeded(lambda: TwoLayers(bias=False)), X)
    ends = [
        [only(importance(*toy, about, criterion="taylor", mode="vector", reduce=end)) for end in ("first", "last")]
        for toy in (linear, curved)
    ]
    np.testing.assert_allclose(*ends[0], rtol=1e-5)
    assert not np.allclose(*ends[1], rtol=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reduction", ["sum", "max", "first", "last"])
def test_vector_is_at_most_element_wise(seed: int, reduction: str) -> None:
    toy = traced(seeded(lambda: TwoLayers(outputs=6), seed), X)
    about = task(pairs(seed=seed, outputs=6))
    scores = {
        key: only(importance(*toy, about, criterion="taylor", reduce=reduction, **options))
        for key, options in {"vector": {"mode": "vector"}, "total": {"combine": "total"}, "batch": {}}.items()
    }
    assert (scores["vector"] <= scores["total"] * (1 + 1e-6)).all()
    assert (scores["total"] <= scores["batch"] * (1 + 1e-6)).all()
    assert reduction != "sum" or (scores["vector"] < 0.9 * scores["total"]).any()


def test_combining_in_total_is_one_backward_pass_over_all_batches(toy: tuple[Program, Groups]) -> None:
    data = pairs(batches=3)
    whole = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    total = only(importance(*toy, task(data), criterion="taylor", combine="total"))
    np.testing.assert_allclose(total, only(importance(*toy, task(whole), criterion="taylor")), rtol=1e-5)


@pytest.mark.parametrize("options", TAYLOR, ids=text)
def test_the_order_of_the_calibration_data_does_not_matter(toy: tuple[Program, Groups], options: Any) -> None:
    data = pairs(batches=3)
    forth, back = (only(importance(*toy, task(some), criterion="taylor", **options)) for some in (data, data[::-1]))
    np.testing.assert_allclose(forth, back, rtol=1e-5)


@pytest.mark.parametrize("options", [{"p": 1}, {"p": 2}, *({"criterion": "taylor", **one} for one in TAYLOR)], ids=text)
def test_permuting_the_units_permutes_the_scores(options: Any) -> None:
    model, permuted = seeded(TwoLayers), seeded(TwoLayers)
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        for parameter in (permuted.fc1.weight, permuted.fc1.bias):
            parameter.copy_(parameter[order].clone())
        permuted.fc2.weight.copy_(permuted.fc2.weight[:, order].clone())
    before, after = (only(importance(*traced(one, X), task(pairs()), **options)) for one in (model, permuted))
    np.testing.assert_allclose(after, before[order], rtol=1e-5)


@pytest.mark.parametrize("options", TAYLOR, ids=text)
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "last"])
def test_a_planted_dead_unit_is_found(options: Any, reduction: str) -> None:
    model = seeded(TwoLayers)
    with torch.no_grad():
        model.fc1.weight[2] *= 50  # large, and read by nobody
        model.fc2.weight[:, 2] = 0
    toy, about = traced(model, X), task(pairs())
    found = only(importance(*toy, about, criterion="taylor", reduce=reduction, **options))
    assert found[2] == 0
    assert (np.delete(found, 2) > 0).all()
    assert only(importance(*toy, p=1)).argmax() == 2, "magnitude cannot see it"


@pytest.mark.parametrize(("combine", "order", "half"), [("total", 1, 2), ("batch", "mixed", 4)])
def test_the_memory_limit_changes_the_number_of_passes_and_not_the_scores(combine: str, order: Any, half: int) -> None:
    toy = traced(seeded(lambda: TwoLayers(width=700, inputs=600, outputs=500)), torch.randn(2, 600))
    data, passes = pairs(size=2, inputs=600, outputs=500), 0

    def counted() -> Any:
        nonlocal passes
        passes += 1
        return data

    scores = []
    for limit, wanted in [(None, 1), (half, 2), (1, 3), (1000, 1)]:
        passes = 0
        options = {"combine": combine, "order": order, "accumulator_mib": limit}
        one = Taylor(**options).score(Study(toy[0], toy[1].prunable, task(counted)))
        assert passes == wanted
        scores.append(next(iter(one.values())))
    for found in scores:
        np.testing.assert_array_equal(found, scores[0])


def test_a_parameter_that_the_loss_does_not_reach_is_worth_nothing() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = TwoLayers(), TwoLayers(width=7)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.used(x), self.unused(x)

    program, groups = traced(seeded(TwoHeads), X)
    for options in ({}, {"order": "mixed", "accumulator_mib": 1}):
        about = task(pairs(), loss=lambda outputs, batch: mean_square(outputs[0], batch))
        scores = importance(program, groups, about, criterion="taylor", **options).scores
        by_size = {len(found): found for found in scores.values()}
        assert (by_size[5] > 0).all()
        assert by_size[7].tolist() == [0] * 7


@pytest.mark.parametrize("options", [{}, {"order": "mixed"}])
def test_a_loss_that_reaches_nothing_is_refused(toy: tuple[Program, Groups], options: Any) -> None:
    about = task(pairs(), loss=lambda outputs, batch: outputs.detach().mean())
    with pytest.raises(DataError, match="the loss depends on no parameter that is to be scored"):
        importance(*toy, about, criterion="taylor", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"order": "mixed"}])
def test_other_precisions(dtype: torch.dtype, options: Any) -> None:
    model = seeded(TwoLayers)
    exact = only(importance(*traced(model, X), task(pairs()), criterion="taylor", **options))
    about = task([(x.to(dtype), y.to(dtype)) for x, y in pairs()])
    found = only(importance(*traced(seeded(TwoLayers).to(dtype), X.to(dtype)), about, criterion="taylor", **options))
    np.testing.assert_allclose(found, exact, rtol=0.1 if dtype == torch.bfloat16 else 1e-5)


# -- the pass -----------------------------------------------------------------------------------------


def test_frozen_groups_have_no_scores(toy: tuple[Program, Groups]) -> None:
    program, groups = toy
    assert len(groups) > len(groups.prunable)
    found = importance(program, groups, task(pairs()), criterion="taylor", order=2)
    assert found.criterion == "taylor mode=element order=2 combine=batch fisher=mean accumulator_mib=None, sum"


def test_nothing_to_score_is_nothing_scored() -> None:
    toy = traced(nn.Linear(3, 2), X)
    for criterion in ("random", "magnitude", "taylor"):
        assert importance(*toy, task(pairs()), criterion=criterion).scores == {}


def test_normalisers_are_applied_to_each_group(toy: tuple[Program, Groups]) -> None:
    raw, scaled = (only(importance(*toy, normalize=how)) for how in ("none", "max"))
    assert scaled.tolist() == (raw / raw.max()).tolist()


def test_scores_can_be_measured_again_on_a_smaller_program(toy: tuple[Program, Groups]) -> None:
    about = task(pairs())
    found = importance(*toy, about, criterion="taylor", normalize="sum", reduce="last")
    smaller = traced(seeded(lambda: TwoLayers(width=3)), X)
    assert found.rescore is not None
    again = found.rescore(*smaller)
    wanted = importance(*smaller, about, criterion="taylor", normalize="sum", reduce="last")
    assert only(again).tolist() == only(wanted).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "tailor"}, "there is no criterion of this name; known: activation, fpgm, magnitude, obs, random, slimming, taylor"),
        ({"criterion": "random", "p": 1}, "criterion 'random' has no option 'p'"),
        ({"order": 2}, "criterion 'magnitude' has no option 'order'"),
        ({"criterion": "taylor", "ordr": 2}, "criterion 'taylor' has no option 'ordr'; did you mean 'order'"),
        ({"criterion": "taylor", "order": 3}, "Input should be 1, 2 or 'mixed'"),
        (
            {"criterion": "taylor", "mode": "vector", "combine": "total"},
            "'taylor': `combine` needs mode=element order=1, found mode=vector order=1",
        ),
        ({"criterion": "taylor", "order": 2, "combine": "total"}, "`combine` needs mode=element order=1, found mode=element order=2"),
        ({"criterion": "taylor", "fisher": "sum"}, "`fisher` needs order=2 or order=mixed"),
        ({"criterion": "taylor", "accumulator_mib": 8}, "`accumulator_mib` needs mode=element with"),
        ({"criterion": "taylor", "mode": "vector", "order": "mixed", "accumulator_mib": 8}, "`accumulator_mib` needs mode=element with"),
        ({"p": 3}, "less than or equal to 2"),
        ({"batches": 0}, "greater than or equal to 1"),
        ({"reduce": "median"}, "Input should be 'sum'"),
        ({"normalize": "softmax"}, "Input should be 'none'"),
    ],
)
def test_wrong_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Score(**options)


@pytest.mark.parametrize(
    "written",
    [
        "score",
        "score{p=1}",
        "score{criterion=taylor batches=2 mode=vector order=2}",
        "score{criterion=taylor normalize=min-max order=mixed accumulator_mib=100}",
    ],
)
def test_the_text_form(written: str) -> None:
    (one,) = parse(written)
    assert str(one) == written
    assert type(one).model_validate(one.model_dump()) == one


class Constant(Criterion):
    """A third party's criterion."""

    name: ClassVar = "constant"
    value: float

    def score(self, study: Study) -> Any:
        return {group.name: np.full(group.size, self.value) for group in study.groups}


def test_another_package_adds_a_criterion_with_its_options(toy: tuple[Program, Groups], monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str, name: str) -> list[EntryPoint]:
        return [EntryPoint(name, f"{__name__}:{'Constant' if name == 'constant' else 'Absent'}", group)]

    monkeypatch.setattr(criteria, "entry_points", points)
    (one,) = parse("score{criterion=constant value=0.25}")
    assert str(one) == "score{criterion=constant value=0.25}"
    assert only(importance(*toy, criterion="constant", value=0.25)).tolist() == [0.25] * 5
    with pytest.raises(DataError, match="scores that are NaN or infinite"):
        importance(*toy, criterion="constant", value=float("nan"))
    with pytest.raises(ValidationError, match="option 'value' of criterion 'constant': Field required"):
        Score(criterion="constant")
    with pytest.raises(ValidationError, match="criterion 'constant' has no option 'p'"):
        Score(criterion="constant", value=1, p=1)
    with pytest.raises(ValidationError, match="the criterion cannot be loaded: "):
        Score(criterion="absent")
