"""The pass ``prune``: what it removes, how it meets a budget, what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import irprune_passes.prune.removal as removal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from irprune_passes.prune import Prune
from prune_toys import Toy, convolutions, kept, magnitude, mlp, prune, transformer
from pydantic import ValidationError

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.errors import BudgetError, DataError, NothingPrunableError, PipelineError, ProofError
from irprune.ir.facts import Importance, Original, Plan, PruneReport, Task
from irprune.ir.program import Program
from irprune.pipeline.parser import parse
from irprune.pipeline.passes import Facts

MLP, CONVOLUTIONS, TRANSFORMER = mlp(), convolutions(), transformer()
ODD, PERMUTED = mlp(a=16, b=13), mlp(a=16, b=13)
TOYS = {"mlp": MLP, "convolutions": CONVOLUTIONS, "transformer": TRANSFORMER}


def plan(on: Toy, importance: Importance | None = None, **options: Any) -> tuple[dict[str, np.ndarray], PruneReport]:
    """The masks by group name, without removal."""
    result = Prune(dry_run=True, **options).run(on.program, Facts([on.groups, importance or on.scores()]))
    found = Facts(result.facts)
    return dict(found[Plan].keep), found[PruneReport]


def removed(on: Toy, keep: Mapping[str, np.ndarray]) -> dict[str, set[int]]:
    return {group.name: set(np.flatnonzero(~keep[group.name])) if group.name in keep else set() for group in on.groups.prunable}


# -- removal ------------------------------------------------------------------------------------------


def test_the_lowest_scores_go_with_every_slice_that_carries_them() -> None:
    on = mlp(a=4, b=3)
    scores = Importance({"ffn0": np.array([0.3, 0.1, 0.4, 0.2]), "ffn1": np.array([0.2, 0.2, 0.1])})
    program, report = prune(on, scores, count=1)
    before, after = on.program.tensors, program.tensors
    ffn0, ffn1 = [0, 2, 3], [0, 1]
    assert torch.equal(after["fc1.weight"], before["fc1.weight"][ffn0])
    assert torch.equal(after["fc1.bias"], before["fc1.bias"][ffn0])
    assert torch.equal(after["fc2.weight"], before["fc2.weight"][ffn1][:, ffn0])
    assert torch.equal(after["fc3.weight"], before["fc3.weight"][:, ffn1])
    assert torch.equal(after["fc3.bias"], before["fc3.bias"])
    assert kept(report.keep) == {on.groups["ffn0"].key: ffn0, on.groups["ffn1"].key: ffn1}
    assert report.kept == {"ffn0": (3, 4), "ffn1": (2, 3)}
    assert report.checks["shapes"] is report.checks["interface"] is True
    assert report.checks["numbers"]["max_abs_err"] <= report.checks["numbers"]["tolerance"]


def test_equal_scores_go_by_index() -> None:
    on = mlp(a=6, b=4)
    found, _ = plan(on, Importance({"ffn0": np.ones(6), "ffn1": np.zeros(4)}), count=2)
    assert kept(found) == {"ffn0": [2, 3, 4, 5], "ffn1": [2, 3]}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("options", [{"ratio": 0}, {"count": 0}])
def test_asking_for_nothing_gives_the_identical_program(name: str, options: dict[str, Any]) -> None:
    on = TOYS[name]
    program, report = prune(on, **options)
    assert program is on.program
    assert report.keep == {}
    assert report.achieved["ratio"] == 0
    assert report.checks["numbers"]["max_abs_err"] == 0


@pytest.mark.parametrize("name", TOYS)
def test_every_kind_of_group_at_once_is_proved(name: str) -> None:
    program, report = prune(TOYS[name], ratio=0.5, kinds="all", round_to=1)
    assert report.checks["shapes"] is True
    assert program(*TOYS[name].program.interface.example[0]).shape == TOYS[name].program(*TOYS[name].program.interface.example[0]).shape


def test_protected_tensors_stay_bit_by_bit() -> None:
    program, report = prune(TRANSFORMER, ratio=0.5, of="indices", kinds="all", protect=("layers.1", "head"), min_keep=3)
    for name, tensor in TRANSFORMER.program.tensors.items():
        if name.startswith(("layers.1.", "head.")):
            assert torch.equal(tensor, program.tensors[name])
    assert program.tensors["layers.0.up.weight"].shape == (16, 16)
    assert all(n >= 3 for n, _ in report.kept.values())


# -- budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
@settings(max_examples=15, deadline=None)
@given(
    ratio=st.floats(0.01, 0.6).map(lambda x: round(x, 3)),
    of=st.sampled_from(["params", "macs"]),
    allocation=st.sampled_from(["local", "uniform", "global"]),
    round_to=st.sampled_from([1, 8]),
)
def test_a_budget_is_met_and_one_unit_less_would_not_meet_it(name: str, ratio: float, of: str, allocation: str, round_to: int) -> None:
    on = TOYS[name]
    cost = Cost(on.program)
    whole = cost.of(of)
    found, report = plan(on, ratio=ratio, of=of, allocation=allocation, round_to=round_to)
    counts = {group.var: int(found[group.name].sum()) for group in on.groups if group.name in found}
    assert cost.of(of, counts) <= whole * (1 - ratio) + 1e-6
    assert report.requested == {"ratio": ratio, "of": of, "allocation": allocation}
    assert report.achieved["ratio"] == report.achieved[of] == (whole - cost.of(of, counts)) / whole
    # One rounding unit back in one group, or in all groups of one size (uniform), costs too much.
    groups = [group for group in on.groups if group.name in found]
    together = (
        [[g for g in groups if g.size == group.size] for group in groups] if allocation == "uniform" else [[group] for group in groups]
    )
    back = [{**counts, **{group.var: min(group.size, counts[group.var] + round_to) for group in some}} for some in together]
    assert max(cost.of(of, less) for less in back) > whole * (1 - ratio) - 1e-6


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("allocation", ["local", "global"])
def test_reported_costs_are_those_of_the_program_that_is_left(name: str, allocation: str) -> None:
    on = TOYS[name]
    program, report = prune(on, ratio=0.3, allocation=allocation)
    cost, left = Cost(on.program), Cost(program)
    real = sum(tensor.numel() for key, tensor in program.tensors.items() if program.is_parameter(key))
    assert left.params() == real
    assert report.achieved["params"] == pytest.approx(1 - real / cost.params())
    assert report.achieved["macs"] == pytest.approx(1 - left.macs() / cost.macs())


def test_layers_of_one_shape_keep_one_shape() -> None:
    _, report = prune(TRANSFORMER, ratio=0.3)
    assert {report.kept[f"ffn{layer}"] for layer in range(3)} == {report.kept["ffn0"]}
    assert {report.kept[f"heads{layer}"] for layer in range(3)} == {report.kept["heads0"]}


def test_a_ratio_of_indices_is_of_each_group() -> None:
    _, report = prune(TRANSFORMER, ratio=0.25, of="indices", round_to=1)
    assert report.kept == {f"{kind}{layer}": (3, 4) if kind == "heads" else (24, 32) for layer in range(3) for kind in ("heads", "ffn")}
    assert report.achieved["ratio"] == 0.25


def test_rounded_axes_are_multiples() -> None:
    program, _ = prune(CONVOLUTIONS, ratio=0.4)
    assert program.tensors["conv1.weight"].shape[0] == program.tensors["bn1.running_mean"].shape[0] == 16
    assert program.tensors["conv2.weight"].shape[:2] == (8, 16)


def test_global_counts_are_of_all_indices_together() -> None:
    on = mlp(a=6, b=4)
    scores = Importance({"ffn0": np.array([1, 2, 3, 10, 11, 12.0]), "ffn1": np.array([4, 5, 6, 7.0])})
    assert kept(plan(on, scores, count=4, allocation="global")[0]) == {"ffn0": [3, 4, 5], "ffn1": [1, 2, 3]}


def test_scores_per_cost_spare_cheap_indices() -> None:
    on = mlp(a=6, b=12)
    dear = {group.name: group.params_per_index for group in on.groups.prunable}
    assert dear == {"ffn0": 6 + 1 + 12, "ffn1": 6 + 1 + 4}
    scores = Importance({"ffn0": np.full(6, 1.1), "ffn1": np.full(12, 1.0)})
    assert set(plan(on, scores, count=2, allocation="global")[0]) == {"ffn1"}
    assert set(plan(on, scores, count=2, allocation="global", per_cost="params")[0]) == {"ffn0"}
    lower = Importance({name: values - 10 for name, values in scores.scores.items()})
    with pytest.raises(DataError, match="negative scores, and divided by a cost"):
        plan(on, lower, count=2, allocation="global", per_cost="params")


# -- invariants of the choice -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(TOYS)),
    ratios=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.5)),
    of=st.sampled_from(["params", "macs", "indices"]),
    allocation=st.sampled_from(["local", "global"]),
    seed=st.integers(0, 5),
)
def test_what_a_small_ratio_removes_a_large_one_removes(
    name: str, ratios: tuple[float, float], of: str, allocation: str, seed: int
) -> None:
    on = TOYS[name]
    options = {"of": of, "allocation": allocation, "round_to": 1}
    less, more = (removed(on, plan(on, on.scores(seed), ratio=ratio, **options)[0]) for ratio in (min(ratios), max(ratios)))
    assert all(less[group] <= more[group] for group in less)


@settings(max_examples=10, deadline=None)
@given(first=st.integers(1, 5), second=st.integers(1, 5), seed=st.integers(0, 9))
def test_two_prunings_are_one_and_their_recipes_add_up(first: int, second: int, seed: int) -> None:
    """For a score that belongs to an index whatever else is removed."""
    on = ODD
    scores = on.scores(seed)
    once, one = prune(on, scores, count=first + second)
    half, report = prune(on, scores, count=first)
    groups = discover(half)
    left = {name: values[report.keep[on.groups[name].key]] for name, values in scores.scores.items()}
    facts = Facts([groups, Importance(left), Original(on.program), report])
    result = Prune(count=second).run(half, facts)
    twice = next(fact for fact in result.facts if isinstance(fact, PruneReport))
    assert kept(twice.keep) == kept(one.keep)
    for name, tensor in once.tensors.items():
        assert torch.equal(tensor, result.program.tensors[name])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(16)), ratio=st.floats(0.2, 0.8))
def test_permuting_the_units_of_a_model_permutes_what_goes(order: list[int], ratio: float) -> None:
    on, other = ODD, PERMUTED
    with torch.no_grad():
        for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
            other.program.tensors[name].copy_(on.program.tensors[name].index_select(axis, torch.tensor(order)))
    options = {"ratio": ratio, "of": "indices", "round_to": 1}
    a, b = (plan(toy, toy.magnitude(), **options)[0] for toy in (on, other))
    assert a["ffn0"][order].tolist() == b["ffn0"].tolist()
    assert a["ffn1"].tolist() == b["ffn1"].tolist()


def test_scaling_a_layer_changes_the_global_choice_only() -> None:
    on = TRANSFORMER
    scores = on.magnitude()
    scaled = Importance({name: values * (1000 if name == "ffn1" else 1) for name, values in scores.scores.items()})
    local, glob = ({"of": "indices", "ratio": 0.3, "allocation": allocation} for allocation in ("local", "global"))
    assert kept(plan(on, scores, **local)[0]) == kept(plan(on, scaled, **local)[0])
    assert "ffn1" in plan(on, scores, **glob)[0]
    assert "ffn1" not in plan(on, scaled, **glob)[0]


# -- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "allocation"), [("mlp", "local"), ("mlp", "global"), ("convolutions", "global"), ("transformer", "local")]
)
def test_steps_meet_the_same_budget(name: str, allocation: str) -> None:
    on = TOYS[name]
    _, report = prune(on, on.magnitude(), ratio=0.4, steps=3, allocation=allocation)
    assert report.achieved["params"] >= 0.4
    if allocation == "local":
        assert report.kept == prune(on, on.magnitude(), ratio=0.4)[1].kept


def test_each_step_scores_what_is_left() -> None:
    """Index 0 of ``ffn1`` leans on the units of ``ffn0`` that go first, so it is worthless after them."""
    on = mlp(a=4, b=3)
    with torch.no_grad():
        for tensor in on.program.tensors.values():
            tensor.zero_()
        weights = on.program.tensors
        weights["fc1.weight"][:, 0] = torch.tensor([0.1, 0.2, 3.0, 4.0])
        weights["fc2.weight"][0] = torch.tensor([2.0, 2.0, 0.0, 0.0])
        weights["fc2.weight"][1:, 2:] = 1.5
        weights["fc3.weight"][:] = 0.1

    def reads(program: Program, groups: Any) -> Importance:
        rows = {"ffn0": program.tensors["fc1.weight"], "ffn1": program.tensors["fc2.weight"]}
        scores = {group.name: rows[group.name].detach().abs().sum(1).double().numpy() for group in groups.prunable}
        return Importance(scores, "rows", reads)

    scores = reads(on.program, on.groups)
    assert scores.scores["ffn1"].tolist() == [4, 3, 3]
    assert kept(plan(on, scores, count=2)[0]) == {"ffn0": [2, 3], "ffn1": [0]}
    assert kept(plan(on, scores, count=2, steps=2)[0]) == {"ffn0": [2, 3], "ffn1": [2]}
    assert kept(prune(on, scores, count=2, steps=2)[1].keep) == {on.groups["ffn0"].key: [2, 3], on.groups["ffn1"].key: [2]}


def test_steps_without_a_way_to_score_again_are_refused() -> None:
    with pytest.raises(PipelineError, match="scores that can be measured again"):
        plan(MLP, MLP.scores(), steps=2)


# -- dry run ------------------------------------------------------------------------------------------


def test_a_dry_run_gives_the_plan_and_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on = mlp()
    real, report = prune(on, ratio=0.3)
    monkeypatch.setattr(removal, "remove", lambda *_: pytest.fail("a dry run removes nothing"))
    result = Prune(ratio=0.3, dry_run=True).run(on.program, Facts([on.groups, on.scores()]))
    assert result.program is on.program
    facts = Facts(result.facts)
    assert {on.groups[name].key: mask.tolist() for name, mask in facts[Plan].keep.items()} == {
        k: m.tolist() for k, m in report.keep.items()
    }
    assert facts[PruneReport].achieved == report.achieved
    assert facts[PruneReport].checks == {}
    assert real is not on.program


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_unreachable_budget_says_what_stands_in_the_way(dry_run: bool) -> None:
    with pytest.raises(BudgetError) as found:
        prune(TRANSFORMER, ratio=0.95, min_keep=2, protect=("layers.2.up",), dry_run=dry_run)
    text = str(found.value)
    assert text.startswith("[budget] at pass prune: 0.95 of the parameters cannot go: 0.5262 can; in the way: rounding and `min_keep` (")
    for part in ("2 groups frozen (interface)", "1 group of kind residual", "6 groups of kind head_dim", "1 group in `protect`"):
        assert f"{part} (" in text
    assert "to go on: ask for ratio=0.526 or less" in text
    assert "add head_dim, residual to `kinds`, or lower `round_to` or `min_keep`, or relax what leaves groups out" in text


def test_the_ratio_that_the_error_names_can_be_met_and_no_more() -> None:
    with pytest.raises(BudgetError) as found:
        prune(TRANSFORMER, ratio=0.95)
    offered = float(str(found.value).split("ratio=")[1].split()[0])
    assert prune(TRANSFORMER, ratio=offered)[1].achieved["params"] >= offered
    with pytest.raises(BudgetError):
        prune(TRANSFORMER, ratio=offered + 0.001)


def test_the_share_of_an_obstacle_is_what_its_removal_would_free() -> None:
    with pytest.raises(BudgetError, match="1 group of kind residual") as found:
        prune(TRANSFORMER, ratio=0.95, round_to=1)
    share = float(str(found.value).split("1 group of kind residual (")[1].split("%")[0]) / 100
    cost = Cost(TRANSFORMER.program)
    least = {group.var: 1 for group in TRANSFORMER.groups.prunable if group.kind in ("heads", "ffn")}
    more = {**least, TRANSFORMER.groups["residual0"].var: 1}
    assert share == pytest.approx((cost.params(least) - cost.params(more)) / cost.params(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 40}, "40 indices of group ffn1 cannot go: it has 32, of which 1 must stay"),
        ({"count": 31, "min_keep": 2}, "31 indices of group ffn1 cannot go: it has 32, of which 2 must stay"),
        ({"count": 95, "allocation": "global"}, "95 indices cannot go: 94 are free to, in 2 groups"),
        (
            {"ratio": 0.02, "of": "indices"},
            "0.02 of the indices is nothing in each of the 2 groups: the largest, ffn0, has 64 indices, rounded to multiples of 8",
        ),
    ],
)
def test_counts_and_ratios_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError) as found:
        prune(MLP, **options)
    assert message in str(found.value)


def test_nothing_prunable_is_not_a_budget() -> None:
    with pytest.raises(NothingPrunableError, match="2 of kind ffn"):
        prune(MLP, kinds="heads")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"ffn0": [np.nan] * 2 + [1.0] * 62, "ffn1": [1.0] * 32}, r"2 of the 64 scores of group ffn0 are not numbers \(NaN\)"),
        ({"ffn0": [1.0] * 64}, "group ffn1 has no scores"),
    ],
)
def test_scores_that_cannot_be_ranked(scores: dict[str, list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prune(MLP, Importance({name: np.array(values) for name, values in scores.items()}))


def test_a_removal_that_is_wrong_is_refused_unless_the_proof_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    on = mlp()
    right = removal.remove

    def wrong(program: Program, keep: Any) -> Program:
        after = right(program, keep)
        with torch.no_grad():
            after.tensors["fc1.weight"][0].mul_(2)
        return after

    monkeypatch.setattr(removal, "remove", wrong)
    before = on.program(*on.program.interface.example[0])
    with pytest.raises(ProofError, match="differs from the masked original"):
        Prune(ratio=0.3).run(on.program, Facts([on.groups, on.scores()]))
    assert torch.equal(before, on.program(*on.program.interface.example[0]))
    result = Prune(ratio=0.3, prove=False).run(on.program, Facts([on.groups, on.scores()]))
    assert Facts(result.facts)[PruneReport].checks == {}


@pytest.mark.parametrize(("seed", "task", "expected"), [(None, None, 0), (None, 7, 7), (3, 7, 3)])
def test_the_proof_takes_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch, seed: int | None, task: int | None, expected: int) -> None:
    seen = []
    monkeypatch.setattr(removal, "prove", lambda *_, seed: seen.append(seed) or {})
    facts = [MLP.groups, MLP.scores(), *([Task("toy", seed=task)] if task is not None else [])]
    Prune(seed=seed).run(MLP.program, Facts(facts))
    assert seen == [expected]


# -- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": -0.1}, "greater than or equal to 0"),
        ({"layers": "4-30"}, "it reads FROM:TO"),
        ({"count": 3, "ratio": 0.5}, "give `count` or `ratio`, not both"),
        ({"count": 3, "of": "macs"}, "give `count` or `of`, not both"),
        ({"count": 3, "round_to": 4}, "give `count` or `round_to`, not both"),
        ({"per_cost": "params"}, "`per_cost` needs allocation=global"),
        ({"kinds": ("tail",)}, "Input should be 'heads'"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Prune(**options)


@pytest.mark.parametrize(
    "text",
    [
        "prune",
        "prune{ratio=0.4 of=macs kinds=[ffn, residual] layers=4:30 round_to=1}",
        "prune{count=3 allocation=global per_cost=params protect=[head]}",
    ],
)
def test_the_text_form_is_the_pass(text: str) -> None:
    (one,) = parse(text)
    assert str(one) == text
    assert parse(str(one)) == [one]


def test_one_name_is_a_list_of_one() -> None:
    assert parse("prune{kinds=all exclude=head}") == [Prune(kinds=("all",), exclude=("head",))]


def test_magnitude_of_the_toys_adds_all_slices_of_an_index() -> None:
    """The helper of these tests itself: by hand on a small net."""
    on = mlp(a=2, b=2)
    t = {name: tensor.detach().double() for name, tensor in on.program.tensors.items()}
    by_hand = t["fc1.weight"].square().sum(1) + t["fc1.bias"].square() + t["fc2.weight"].square().sum(0)
    assert magnitude(on.program, on.groups).scores["ffn0"] == pytest.approx(by_hand.numpy())
