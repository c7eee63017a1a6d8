"""Structures, reductions and normalisers, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from irprune_passes.score.reduce import Structure, fold, normalise, reduce, structures
from score_toys import TwoLayers, traced

from irprune.errors import DataError
from irprune.ir.dims import Var
from irprune.ir.facts import Group, Member, Role


def structure(order: int = 0, role: Role = "write", weights: int = 12, size: int = 2) -> Structure:
    member = Member(f"w{order}", 0, role, (np.arange(size),), order)
    return Structure("g", size, weights, member, torch.arange(size), torch.ones(size, dtype=torch.int64))


# -- reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("sum", [4, 6]), ("mean", [2, 3]), ("prod", [3, 8]), ("max", [3, 4]), ("first", [1, 4]), ("last", [3, 2])],
)
def test_reductions_of_two_structures(how: str, wanted: list[float]) -> None:
    scores = np.array([[1.0, 4.0], [3.0, 2.0]])
    assert reduce(scores, [structure(1), structure(2)], how).tolist() == wanted  # type: ignore[arg-type]


def test_first_and_last_follow_execution_and_pass_over_what_only_carries() -> None:
    of = [structure(7, "read"), structure(9, "carry"), structure(3, "write"), structure(3, "write", weights=2), structure(1, "carry")]
    scores = np.arange(10.0).reshape(5, 2)
    assert reduce(scores, of, "last").tolist() == [0, 1]
    assert reduce(scores, of, "first").tolist() == [4, 5], "the weight of the first operation, not its bias"
    assert reduce(scores[[1, 4]], [of[1], of[4]], "last").tolist() == [2, 3]


def test_a_product_that_no_longer_ranks_is_none() -> None:
    tiny = np.full((80, 2), 1e-9)
    assert reduce(tiny, [structure(n) for n in range(80)], "prod") is None
    assert reduce(1 / tiny, [structure(n) for n in range(80)], "prod") is None
    zero = reduce(np.array([[0.0, 2.0], [1.0, 2.0]]), [structure(0), structure(1)], "prod")
    assert zero is not None
    assert zero.tolist() == [0, 4]


# -- normalisers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("none", [1, 2, 2, 3]),
        ("mean", [0.5, 1, 1, 1.5]),
        ("sum", [1 / 8, 2 / 8, 2 / 8, 3 / 8]),
        ("max", [1 / 3, 2 / 3, 2 / 3, 1]),
        ("min-max", [0, 0.5, 0.5, 1]),
        ("z-score", [-(2**0.5), 0, 0, 2**0.5]),
        ("l2", [1 / 18**0.5, 2 / 18**0.5, 2 / 18**0.5, 3 / 18**0.5]),
        ("lamp", [1 / 18, 4 / 17, 4 / 17, 1]),
    ],
)
def test_normalisers_by_hand(how: str, wanted: list[float]) -> None:
    scores = np.array([1.0, 2.0, 2.0, 3.0])
    np.testing.assert_allclose(normalise(scores, how), wanted, rtol=1e-14)  # type: ignore[arg-type]
    shuffled = [2, 0, 3, 1]
    np.testing.assert_allclose(normalise(scores[shuffled], how), np.array(wanted)[shuffled], rtol=1e-14)  # type: ignore[arg-type]


@given(
    scores=arrays.arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 1e6).map(lambda value: round(value, 3))),
    how=st.sampled_from(["mean", "sum", "max", "min-max", "z-score", "l2", "lamp"]),
    scale=st.sampled_from([0.5, 4.0]),
)
def test_normalising_keeps_the_order_and_forgets_the_scale(scores: np.ndarray, how: str, scale: float) -> None:
    once = normalise(scores, how)  # type: ignore[arg-type]
    assert np.isfinite(once).all()
    ranked = once[np.argsort(scores, kind="stable")]
    assert (np.diff(ranked) >= -1e-9).all()
    np.testing.assert_allclose(normalise(scores * scale, how), once, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["mean", "sum", "max", "l2", "lamp"])
def test_a_group_of_zeros_stays_zero(how: str) -> None:
    assert normalise(np.zeros(3), how).tolist() == [0, 0, 0]  # type: ignore[arg-type]


def test_scores_that_cannot_be_normalised_are_refused() -> None:
    with pytest.raises(DataError, match="'lamp' needs scores that are not negative"):
        normalise(np.array([-1.0, 1.0]), "lamp")
    with pytest.raises(DataError, match="NaN or infinite"):
        normalise(np.array([np.nan, 1.0]), "none")


# -- structures and folds -----------------------------------------------------------------------------


def test_structures_are_parameter_axes_and_no_buffers() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm, self.conv2 = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv2(self.norm(self.conv1(x)))

    program, groups = traced(Normed().eval(), torch.randn(2, 3, 6, 6))
    (group,) = groups.prunable
    assert {"norm.running_mean:0", "norm.running_var:0"} < {str(member) for member in group.members}
    found = {str(one.member) for one in structures(program, [group])}
    assert found == {"conv1.weight:0", "conv1.bias:0", "norm.weight:0", "norm.bias:0", "conv2.weight:1"}


def test_maps_say_which_positions_an_index_owns() -> None:
    program, _ = traced(TwoLayers(width=6), torch.randn(2, 3))
    # Two occurrences on an axis of six: position 2 is index 0 of both and counts once; 5 belongs to none.
    maps = (np.array([0, 1, 0, 1, -1, -1]), np.array([-1, 0, 0, -1, 2, -1]))
    group = Group("g", "k", Var(0, 4), 4, "other", True, (Member("fc1.bias", 0, "carry", maps),))
    (one,) = structures(program, [group])
    assert one.gather(torch.tensor([1.0, 10, 100, 1000, 10000, 100000])).tolist() == [111, 1010, 10000, 0]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5), (1, 7), (700, 600), (2, 400_000), (600_001,)])
def test_folding_by_blocks_is_summing_over_all_other_axes(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    of = []
    for axis, size in enumerate(shape):
        member = Member("w", axis, "write", (np.arange(size),))
        of.append(Structure("g", size, a.numel(), member, torch.arange(size), torch.ones(size, dtype=torch.int64)))
    for axis, sums in enumerate(fold(of, lambda x, y: (x * y).abs(), a, b)):
        wanted = (a.double() * b.double()).abs().movedim(axis, 0).reshape(shape[axis], -1).sum(1)
        torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-6)


def test_folds_widen_half_precision() -> None:
    big = torch.full((3, 70_000), 1.0, dtype=torch.float16)
    member = Member("w", 0, "write", (np.arange(3),))
    one = Structure("g", 3, big.numel(), member, torch.arange(3), torch.ones(3, dtype=torch.int64))
    (sums,) = fold([one], torch.square, big)
    assert sums.tolist() == [70_000] * 3, "more than a 16-bit float holds"


def test_a_complex_number_counts_as_two_real_ones() -> None:
    weight, gradient = torch.tensor([[3 + 4j, 1], [0, 2j]]), torch.tensor([[1 + 1j, 5j], [7, 1 - 1j]])
    member = Member("w", 0, "write", (np.arange(2),))
    one = Structure("g", 2, 4, member, torch.arange(2), torch.ones(2, dtype=torch.int64))
    (squares,) = fold([one], torch.square, weight)
    (slopes,) = fold([one], torch.mul, weight, gradient)
    assert squares.tolist() == [9 + 16 + 1, 4]
    assert slopes.tolist() == [3 + 4, -2], "a step of size h along a weight of a + bi changes the loss by h (a da + b db)"
