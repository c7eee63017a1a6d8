"""The pass ``repair`` against least squares done by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from irprune_passes.prune import Prune
from irprune_passes.repair import DAMPING, DAMPINGS, Repair, RepairReport, System, chosen
from nets import Net, tensor
from pydantic import ValidationError
from score_toys import task
from torch import Tensor, nn

import irprune
from irprune.analysis.groups import discover
from irprune.errors import DataError, PipelineError
from irprune.frontend.export import trace
from irprune.ir.facts import Groups, Importance, Original, PruneReport, Task
from irprune.ir.program import Program
from irprune.pipeline.instruments import fingerprint
from irprune.pipeline.manager import completed
from irprune.pipeline.parser import parse
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

ROWS = tensor(8, 6)


class Toy:
    """A network in double precision, pruned to given indices.

    Args:
        function: The network, as :class:`nets.Net` takes it.
        x: An example input.
        gone: For each prunable group, in order, the indices that go.
    """

    def __init__(self, function: Callable[..., Any], x: Tensor, *gone: Sequence[int]) -> None:
        self.model = Net(function, x)
        self.program = typed(trace(self.model, (x,)))
        groups = discover(self.program)
        scores = {group.name: np.arange(group.size, dtype=float) for group in groups.prunable}
        for group, indices in zip(groups.prunable, gone, strict=False):
            scores[group.name][list(indices)] -= group.size
        self.pruned, self.report = self._prune(groups, scores, gone)

    def _prune(self, groups: Groups, scores: dict[str, Any], gone: Sequence[Sequence[int]]) -> tuple[Program, PruneReport]:
        program, known = self.program, [Original(self.program)]
        if len({len(indices) for indices in gone}) != 1:
            raise AssertionError("as many of each group")
        names = [group.members[0].tensor for group in groups.prunable[: len(gone)]]
        one = Prune(count=len(gone[0]), kinds="all", include=tuple(names))
        result = one.run(program, Facts([groups, Importance(scores), *known]))
        return result.program, next(fact for fact in result.facts if isinstance(fact, PruneReport))

    def repair(self, data: Sequence[Tensor], **options: Any) -> tuple[Program, RepairReport]:
        one, about = Repair(**options), task([(x,) for x in data])
        facts = Facts([self.report, Original(self.program), about]).restricted(one)
        before = fingerprint(self.pruned), fingerprint(self.program)
        first, second = one.run(self.pruned, facts), one.run(self.pruned, facts)
        assert (fingerprint(self.pruned), fingerprint(self.program)) == before
        assert all(torch.equal(first.program.tensors[name], tensor) for name, tensor in second.program.tensors.items())
        (report,) = first.facts
        assert isinstance(report, RepairReport)
        return first.program, report


def two_layers(n: Any, x: Tensor, *, bias: bool = True) -> Tensor:
    return n.linear(torch.relu(n.linear(x, 7)), 4, bias=bias)


def without_bias(n: Any, x: Tensor) -> Tensor:
    return two_layers(n, x, bias=False)


def batches(count: int = 3, *shape: int) -> list[Tensor]:
    return [tensor(*(shape or (8, 6)), seed=seed) for seed in range(50, 50 + count)]


def hidden(program: Program, x: Tensor) -> Tensor:
    return torch.relu(x @ program.tensors["linear0.weight"].T + program.tensors["linear0.bias"]).detach()


def test_least_squares_is_the_closed_form() -> None:
    """``W[:, K] = W H[:, K] H[K, K]^-1`` with ``H = X X^T`` of the original layer's inputs."""
    toy = Toy(without_bias, ROWS, [1, 4])
    keep, data = [0, 2, 3, 5, 6], batches()
    after, _ = toy.repair(data, damping=0)
    x = torch.cat([hidden(toy.program, batch) for batch in data]).T
    gram, weight = x @ x.T, toy.program.tensors["linear1.weight"].detach()
    expected = weight @ gram[:, keep] @ torch.linalg.inv(gram[keep][:, keep])
    torch.testing.assert_close(after.tensors["linear1.weight"].detach(), expected)
    assert torch.equal(after.tensors["linear0.weight"], toy.pruned.tensors["linear0.weight"])


def test_a_bias_is_fitted_with_the_weight() -> None:
    toy, data = Toy(two_layers, ROWS, [1, 4]), batches()
    after, report = toy.repair(data, damping=0)
    x = torch.cat(data)
    with torch.no_grad():
        read, target = hidden(toy.pruned, x), toy.model(x)
    augmented = torch.cat([read, torch.ones(len(read), 1, dtype=read.dtype)], dim=1)
    solution = torch.linalg.lstsq(augmented, target).solution
    torch.testing.assert_close(after.tensors["linear1.weight"].detach(), solution[:-1].T)
    torch.testing.assert_close(after.tensors["linear1.bias"].detach(), solution[-1])
    ((before, fitted),) = report.errors.values()
    with torch.no_grad():
        old, new = (float((program(x) - target).square().sum() / target.square().sum()) for program in (toy.pruned, after))
    assert (before, fitted) == pytest.approx((old, new))
    assert fitted < before


def test_the_ridge_pulls_towards_the_weights_that_are_there() -> None:
    toy, data = Toy(without_bias, ROWS, [1, 4]), batches()
    x = torch.cat(data)
    with torch.no_grad():
        read, target = hidden(toy.pruned, x), toy.model(x)
    kept, damping = toy.pruned.tensors["linear1.weight"].detach(), 0.3
    gram = read.T @ read
    ridge = damping * torch.diag(gram.diagonal())
    expected = (target.T @ read + kept @ ridge) @ torch.linalg.inv(gram + ridge)
    after, _ = toy.repair(data, damping=damping)
    torch.testing.assert_close(after.tensors["linear1.weight"].detach(), expected)
    stiff, _ = toy.repair(data, damping=1e9)
    torch.testing.assert_close(stiff.tensors["linear1.weight"].detach(), kept, rtol=1e-6, atol=1e-6)


def test_a_copy_of_a_removed_unit_takes_its_place_without_loss() -> None:
    toy = Toy(without_bias, ROWS, [1])
    with torch.no_grad():
        for name in ("linear0.weight", "linear0.bias"):
            toy.program.tensors[name][1] = 2 * toy.program.tensors[name][3]
    toy = _again(toy, [1])
    after, _ = toy.repair(batches(), damping=0)
    x = tensor(5, 6, seed=9)
    torch.testing.assert_close(after(x), toy.model(x))


def _again(toy: Toy, gone: Sequence[int]) -> Toy:
    """The same toy, pruned anew after its weights were changed."""
    groups = discover(toy.program)
    scores = {group.name: np.arange(group.size, dtype=float) for group in groups.prunable}
    (group,) = groups.prunable
    scores[group.name][list(gone)] -= group.size
    toy.pruned, toy.report = toy._prune(groups, scores, [gone])
    return toy


def test_bias_fold_takes_the_mean_of_what_went() -> None:
    toy, data = Toy(two_layers, ROWS, [1, 4]), batches()
    after, report = toy.repair(data, method="bias_fold")
    removed = hidden(toy.program, torch.cat(data)).mean(0)[[1, 4]]
    weight, bias = (toy.program.tensors[f"linear1.{part}"].detach() for part in ("weight", "bias"))
    torch.testing.assert_close(after.tensors["linear1.bias"].detach(), bias + weight[:, [1, 4]] @ removed)
    assert torch.equal(after.tensors["linear1.weight"], toy.pruned.tensors["linear1.weight"])
    with torch.no_grad():
        x = torch.cat(data)
        found = (after(x) - toy.model(x)).square().sum() / toy.model(x).square().sum()
    assert report.errors["linear_1"][1] == pytest.approx(float(found))


def test_bias_fold_of_a_constant_unit_is_exact() -> None:
    toy = Toy(two_layers, ROWS, [2])
    with torch.no_grad():
        toy.program.tensors["linear0.weight"][2] = 0
        toy.program.tensors["linear0.bias"][2] = 3
    toy = _again(toy, [2])
    after, _ = toy.repair(batches(1), method="bias_fold")
    x = tensor(5, 6, seed=9)
    torch.testing.assert_close(after(x), toy.model(x))


def test_a_layer_without_a_bias_gets_none() -> None:
    toy = Toy(without_bias, ROWS, [1])
    after, report = toy.repair(batches(), method="bias_fold")
    assert after is toy.pruned
    assert report.skipped == {"the layer has no bias": ("linear1.weight",)}
    assert report.manifest()["repair"]["skipped"] == {"the layer has no bias": ["linear1.weight"]}


def test_a_weight_that_is_used_elsewhere_stays() -> None:
    def shared(n: Any, x: Tensor) -> Tensor:
        layer = n.layer(lambda: nn.Linear(7, 4), name="shared")
        return layer(torch.relu(n.linear(x, 7))) + layer(torch.tanh(n.linear(x, 7)))

    toy = Toy(shared, ROWS, [1])
    after, report = toy.repair(batches())
    assert after is toy.pruned
    assert report.skipped == {"the weight has another use as well": ("shared.weight", "shared.weight")}


CONV = {
    "conv": lambda n, x: n.conv(torch.relu(n.conv(x, 6, 3)), 4, 3, padding=1, stride=2),
    "conv_same": lambda n, x: n.conv(torch.relu(n.conv(x, 6, 1)), 4, 3, padding="same"),
    "grouped": lambda n, x: n.conv(torch.relu(n.conv(x, 8, 3)), 6, 3, groups=2),
    "conv1d": lambda n, x: n.conv(torch.relu(n.conv(x.flatten(2), 6, 3, rank=1)), 4, 3, rank=1),
}


@pytest.mark.parametrize("name", CONV)
def test_convolutions_are_fitted_to_their_outputs(name: str) -> None:
    """No weight near the fitted one gives a smaller error: the gradient of the error is zero."""
    x = tensor(4, 3, 7, 6)
    toy = Toy(CONV[name], x, [1])
    data = batches(2, 4, 3, 7, 6)
    after, report = toy.repair(data, damping=0)
    (node,) = report.errors
    trained = [after.tensors[name] for name in ("conv1.weight", "conv1.bias")]
    error = sum((after(x) - toy.model(x).detach()).square().sum() for x in data)
    assert isinstance(error, Tensor)
    for gradient in torch.autograd.grad(error, trained):
        assert float(gradient.abs().max()) < 1e-8 * float(error.detach())
    assert report.errors[node][1] < report.errors[node][0]


def test_each_layer_is_fitted_to_what_the_repaired_layers_before_it_give() -> None:
    def three(n: Any, x: Tensor) -> Tensor:
        return n.linear(torch.relu(n.linear(torch.relu(n.linear(x, 7)), 6)), 4)

    toy = Toy(three, ROWS, [1, 4], [0, 3])
    data = batches(6)
    after, report = toy.repair(data, damping=0)
    x = torch.cat(data)
    parts = {name: value.detach() for name, value in toy.program.tensors.items()}
    pruned = {name: value.detach() for name, value in toy.pruned.tensors.items()}

    def fit(read: Tensor, target: Tensor) -> Tensor:
        return torch.linalg.lstsq(torch.cat([read, torch.ones_like(read[:, :1])], dim=1), target).solution

    first = hidden(toy.program, x) @ parts["linear1.weight"].T + parts["linear1.bias"]
    kept = [1, 2, 4, 5]
    solution = fit(hidden(toy.pruned, x), first[:, kept])
    torch.testing.assert_close(after.tensors["linear1.weight"].detach(), solution[:-1].T)
    read = torch.relu(hidden(toy.pruned, x) @ solution[:-1] + solution[-1])
    solution = fit(read, torch.relu(first) @ parts["linear2.weight"].T + parts["linear2.bias"])
    torch.testing.assert_close(after.tensors["linear2.weight"].detach(), solution[:-1].T)
    assert len(report.errors) == 2
    assert pruned["linear2.weight"].shape == (4, 4)


def residual(n: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + n.linear(torch.relu(n.linear(x, 7)), 6)
    return x


def test_the_stream_is_corrected_for_what_earlier_layers_did_to_it() -> None:
    toy, data = Toy(residual, ROWS, [1, 4], [0, 3]), batches(6)
    x = torch.cat(data)
    gaps = {}
    for target in ("output", "stream"):
        after, _ = toy.repair(data, damping=0, target=target)
        with torch.no_grad():
            gaps[target] = float((after(x) - toy.model(x)).square().sum())
            before = float((toy.pruned(x) - toy.model(x)).square().sum())
    assert gaps["stream"] < gaps["output"] < before


def test_damping_is_chosen_on_what_was_not_fitted() -> None:
    """Noise asks for more of it than many samples of one law; a single batch gives nothing to choose by."""
    weight, x = tensor(1, 3, 12), tensor(1, 40, 12, seed=4)
    folds = []
    for noise in (0.0, 30.0):
        systems = [System(torch.zeros_like(weight), None) for _ in range(2)]
        for number, system in enumerate(systems):
            rows = x[:, 20 * number : 20 * number + 20]
            system.add(rows, rows @ weight.mT + noise * tensor(1, 20, 3, seed=6 + number), rows.mT @ rows)
        folds.append(systems)
    assert chosen(*folds[0]) == DAMPINGS[0]
    assert chosen(*folds[1]) > 0.1
    assert chosen(folds[1][0], System(weight, None)) == DAMPING
    together = folds[0][0].merged(folds[0][1])
    whole = System(torch.zeros_like(weight), None)
    whole.add(x, x @ weight.mT, x.mT @ x)
    torch.testing.assert_close(together.solve(0)[0], whole.solve(0)[0])
    assert together.count == 40


def test_all_readers_may_be_fitted() -> None:
    toy, data = Toy(residual, ROWS, [1, 4], [0, 3]), batches(6)
    assert list(toy.repair(data)[1].errors) == ["linear_1", "linear_3"]
    after, report = toy.repair(data, readers="all", damping=0)
    assert list(report.errors) == ["linear", "linear_1", "linear_2", "linear_3"]
    assert report.errors["linear"] == pytest.approx((0, 0), abs=1e-12), "it reads what it read before"
    assert torch.equal(after.tensors["linear0.weight"], toy.pruned.tensors["linear0.weight"])
    assert not torch.equal(after.tensors["linear2.weight"], toy.pruned.tensors["linear2.weight"])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    damping=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    method=st.sampled_from(["least_squares", "bias_fold"]),
    rows=st.integers(1, 9),
)
def test_repair_never_increases_the_error_of_the_layer(seed: int, damping: float, method: Any, rows: int) -> None:
    """Also with fewer samples than features, in double precision up to rounding."""
    toy = _toys[seed % len(_toys)]
    data = [tensor(8, 6, seed=seed + 1)[:rows].repeat(2, 1)[:8].contiguous() for _ in range(2)]
    data = [torch.cat([x, x[:1].expand(8 - len(x), -1)]) for x in data]
    after, report = toy.repair(data, method=method, **({} if method == "bias_fold" else {"damping": damping}))
    assert report.errors
    for before, fitted in report.errors.values():
        assert -1e-9 <= fitted <= before
    with torch.no_grad():
        x = torch.cat(data)
        old, new = ((program(x) - toy.model(x)).square().sum() for program in (toy.pruned, after))
    assert float(new) <= float(old) * (1 + 1e-9) + 1e-12


_toys = [Toy(two_layers, ROWS, gone) for gone in ([1], [0, 2, 5], [1, 2, 3, 4, 5, 6])]


def test_half_precision_stays_half_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    data = [(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).bfloat16(),)]
    result = irprune.run(model, "prune{ratio=0.3 round_to=1},repair", example_inputs=data[0], calibration=data)
    assert {tensor.dtype for tensor in result.program.tensors.values()} == {torch.bfloat16}
    ((before, after),) = result.facts[RepairReport].errors.values()
    assert after < before


def test_a_repaired_program_exports_and_validates(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)),)]
    done = irprune.run(
        model, "prune{ratio=0.3},repair,export,validate{seconds=0.1}", example_inputs=data[0], calibration=data, out=tmp_path / "run"
    )
    extra = done.manifest.model_extra or {}
    assert extra["repair"]["method"] == "least_squares"
    assert done.manifest.onnx is not None
    assert done.manifest.onnx.parity_max_abs_err is not None


def test_repair_needs_a_pruning_its_original_and_data() -> None:
    with pytest.raises(PipelineError, match=r"pass 'repair' needs PruneReport, which no pass before it gives"):
        completed(parse("repair"), (Task, Original))
    toy = Toy(two_layers, ROWS, [1])
    with pytest.raises(PipelineError, match="pass 'repair' needs the original program"):
        Repair().run(toy.pruned, Facts([toy.report]))
    with pytest.raises(DataError, match="repair needs calibration data, which the target does not give"):
        Repair().run(toy.pruned, Facts([toy.report, Original(toy.program)]))
    with torch.device("meta"):
        meta = typed(trace(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)), (torch.empty(2, 6),)))
    with pytest.raises(DataError, match="is on the meta device and has no values to fit"):
        Repair().run(meta, Facts([PruneReport({}, {}, {}, {}), Original(meta)]))


def test_a_damping_that_nothing_uses_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"`damping` \(0.1\) does nothing with method=bias_fold"):
        Repair(method="bias_fold", damping=0.1)
    with pytest.raises(ValidationError, match="finite number"):
        Repair(damping=float("inf"))


def test_nothing_removed_means_nothing_changed() -> None:
    toy = Toy(two_layers, ROWS, [1])
    result = Repair().run(toy.program, Facts([PruneReport({}, {}, {}, {}), Original(toy.program), task([(ROWS,)])]))
    assert result.program is toy.program


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lift", [0.0, 100.0])
def test_what_was_exact_in_single_precision_stays_so(bias: bool, lift: float) -> None:
    """Dead units go, so nothing is to be repaired; sums of products of large inputs round by more than the true error."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=bias))
    with torch.no_grad():
        model[0].bias += lift
        model[0].weight[::2] = 0
        model[0].bias[::2] = -0.001
        model[2].weight[:, ::2] *= 1e-3
    data = [torch.randn(64, 16) for _ in range(6)]
    program = typed(trace(model.eval(), (data[0],)))
    groups = discover(program)
    scores = Importance({group.name: np.arange(group.size, dtype=float) % 2 for group in groups.prunable})
    pruned = Prune(ratio=0.5, of="indices").run(program, Facts([groups, scores, Original(program)]))
    facts = Facts([*pruned.facts, Original(program), task([(x,) for x in data])])
    found = Repair().run(pruned.program, facts)
    report = next(fact for fact in found.facts if isinstance(fact, RepairReport))

    def error(parts: Any) -> float:
        held = {name: value.detach().double() for name, value in parts.items()}
        hiddens = [torch.relu(x.double() @ held["0.weight"].T + held["0.bias"]) for x in data]
        outs = [h @ held["2.weight"].T + (held["2.bias"] if bias else 0) for h in hiddens]
        wide = model.double()
        total = sum(float((out - wide(x.double())).square().sum().detach()) for out, x in zip(outs, data, strict=True))
        model.float()
        return total

    assert error(found.program.tensors) <= error(pruned.program.tensors) < 1e-20
    assert all(0 <= after <= before for before, after in report.errors.values())
