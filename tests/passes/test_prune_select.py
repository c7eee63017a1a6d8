"""Which groups may lose indices, in which units, and what is said where none may."""

from __future__ import annotations

import dataclasses

import pytest
from irprune_passes.prune.select import Filter, select, units
from prune_toys import Toy, convolutions, mlp, toy, transformer
from torch import Tensor, cat, nn

from irprune.backend.multiples import Multiples
from irprune.errors import NothingPrunableError, OptionError
from irprune.ir.facts import Groups

DEFAULT = ("heads", "ffn", "conv", "experts", "norm_groups", "other")


@pytest.fixture(scope="module")
def layered() -> Toy:
    return transformer(layers=4)


def chosen(on: Toy, **options: object) -> list[str]:
    by = Filter(**{"kinds": DEFAULT, **options})  # type: ignore[arg-type]
    return [group.name for group in select(on.program, on.groups, by).chosen]


def test_residual_and_head_dimensions_are_not_chosen_by_default(layered: Toy) -> None:
    assert chosen(layered) == ["heads0", "ffn0", "heads1", "ffn1", "heads2", "ffn2", "heads3", "ffn3"]
    assert chosen(layered, kinds=("residual",)) == ["residual0"]
    assert chosen(layered, kinds=("all",)) == [group.name for group in layered.groups.prunable]


@pytest.mark.parametrize(("layers", "numbers"), [("1:3", [1, 2]), (":1", [0]), ("2:", [2, 3]), ("1:-1", [1, 2]), (":", [0, 1, 2, 3])])
def test_layers_are_counted_by_the_number_in_the_names(layered: Toy, layers: str, numbers: list[int]) -> None:
    assert chosen(layered, layers=layers, kinds=("ffn",)) == [f"ffn{number}" for number in numbers]


def test_a_group_through_all_layers_is_in_no_range(layered: Toy) -> None:
    with pytest.raises(NothingPrunableError, match="1 outside layers 0:3"):
        chosen(layered, kinds=("residual",), layers="0:3")


def test_patterns_fit_tensors_and_modules(layered: Toy) -> None:
    assert chosen(layered, include=("layers.0.attn", "*.2.up.weight")) == ["heads0", "ffn2"]
    assert chosen(layered, exclude=("layers.[123]",)) == ["heads0", "ffn0"]
    assert chosen(layered, include=("layers.1",), exclude=("*.attn",)) == ["ffn1"]


def test_protected_modules_keep_every_group_that_touches_them() -> None:
    assert chosen(mlp(), protect=("fc3",)) == ["ffn0"]
    assert chosen(mlp(), protect=("fc1.bias",)) == ["ffn1"]


class Tied(nn.Module):
    """Two names of one parameter, as tied embeddings have: its rows are its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.a, self.b, self.down = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.b(self.a(self.up(x).relu()).relu()).relu())


def test_a_tied_name_protects_the_tensor_that_it_stands_for() -> None:
    tied = toy(Tied, 2, 4)
    (other,) = tied.program.aliases
    assert len(chosen(tied)) == 1
    with pytest.raises(NothingPrunableError, match="1 in `protect`"):
        chosen(tied, protect=(other,))


@pytest.mark.parametrize("option", ["include", "exclude", "protect"])
def test_a_name_that_fits_nothing_is_an_error_with_a_suggestion(option: str) -> None:
    with pytest.raises(OptionError, match=r"'fc4' (fits|is) no tensor.*did you mean 'fc\d'"):
        chosen(mlp(), **{option: ("fc4",)})


# -- nothing to prune ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("conv",)}, "of 4 groups, 2 frozen (interface), 2 of kind ffn\n  to go on: add ffn to `kinds`"),
        ({"min_keep": 64}, "2 with no more than `min_keep` (64) indices\n  to go on: relax `layers`"),
        ({"protect": ("fc2",)}, "2 in `protect`"),
        ({"exclude": ("fc*",)}, "2 in `exclude`"),
        ({"include": ("fc1",), "exclude": ("fc1",)}, "1 in `exclude`, 1 not in `include`"),
        ({"layers": "0:2"}, "2 outside layers 0:2"),
    ],
)
def test_nothing_prunable_counts_the_reasons(options: dict[str, object], message: str) -> None:
    with pytest.raises(NothingPrunableError) as found:
        chosen(mlp(), **options)
    assert message in str(found.value)


def test_where_all_is_frozen_the_error_leads_to_explain() -> None:
    on = mlp()
    frozen = Groups(tuple(group for group in on.groups if group.frozen))
    with pytest.raises(NothingPrunableError, match=r"of 2 groups, 2 frozen \(interface\)\n  to go on: `irprune explain`"):
        chosen(dataclasses.replace(on, groups=frozen))
    with pytest.raises(NothingPrunableError, match="the program has no groups"):
        chosen(dataclasses.replace(on, groups=Groups(())))


# -- units --------------------------------------------------------------------------------------------


def unit(on: Toy, round_to: int, *kinds: str) -> dict[str, int]:
    groups = [group for group in on.groups.prunable if group.kind in kinds]
    return {name: number for name, number in units(on.program, groups, Multiples(round_to, round_to)).items() if name.endswith("0")}


def test_units_make_the_tensor_axes_multiples_not_the_groups() -> None:
    assert unit(mlp(), 8, "ffn") == {"ffn0": 8}
    assert unit(convolutions(), 8, "conv") == {"conv0": 8}
    assert unit(transformer(width=32, heads=4), 8, "heads") == {"heads0": 1}
    assert unit(transformer(width=16, heads=4), 8, "heads") == {"heads0": 2}
    assert unit(transformer(width=12, heads=4), 8, "heads") == {"heads0": 8}
    assert unit(transformer(width=12, heads=4), 1, "heads", "ffn") == {"heads0": 1, "ffn0": 1}


def test_of_two_variables_on_one_axis_the_larger_is_rounded_first() -> None:
    found = unit(transformer(width=64, heads=4), 8, "heads", "head_dim")
    assert found == {"heads0": 1, "head_dim0": 8}


class Fused(nn.Module):
    """Gate and up projection in one weight: two blocks of one variable."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(5, 32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(gate.sigmoid() * up)


def test_blocks_of_a_concatenation_are_rounded_each() -> None:
    assert unit(toy(Fused, 2, 5), 8, "ffn") == {"ffn0": 8}


class Rotated(nn.Module):
    """Four heads of eight, each turned by halves: the axis is ``4 * (half|half)``."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.into(x).unflatten(-1, (4, 8))
        left, right = heads.chunk(2, -1)
        return self.out((heads * 0.5 + cat([-right, left], -1)).flatten(-2))


def test_a_concatenation_within_an_index_counts_with_its_whole_size() -> None:
    on = toy(Rotated, 2, 5)
    heads, half = on.groups.prunable
    assert (heads.size, half.size) == (4, 4)
    assert units(on.program, [heads], Multiples(8, 8)) == {heads.name: 1}
    assert units(on.program, [heads], Multiples(16, 16)) == {heads.name: 2}
    assert units(on.program, [half], Multiples(8, 8)) == {half.name: 2}
    assert units(on.program, [heads, half], Multiples(8, 8)) == {heads.name: 8, half.name: 2}


def test_numbers_of_experts_stay_unrounded() -> None:
    on = mlp()
    experts = [dataclasses.replace(group, kind="experts") for group in on.groups.prunable]
    assert set(units(on.program, experts, Multiples(8, 8)).values()) == {1}
