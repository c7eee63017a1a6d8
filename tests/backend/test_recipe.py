"""Recipes: a few kilobytes that replay a pruning, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from irprune.analysis.groups import discover
from irprune.backend.checkpoint import METADATA, Recipe, load_recipe, save_recipe
from irprune.errors import OutputError, RecipeError
from irprune.frontend.export import trace
from irprune.ir.facts import Groups
from irprune.ir.program import Program
from irprune.rules.infer import typed


class Mlp(nn.Module):
    def __init__(self, a: int = 12, b: int = 9) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, a), nn.Linear(a, b), nn.Linear(b, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def traced(module: nn.Module) -> tuple[Program, Groups]:
    program = typed(trace(module, (torch.randn(2, 6),)))
    return program, discover(program)


PROGRAM, GROUPS = traced(Mlp())
SHAPES = {name: tuple(tensor.shape) for name, tensor in PROGRAM.tensors.items()}
KEEP = {GROUPS["ffn0"].key: np.arange(12) > 1, GROUPS["ffn1"].key: np.arange(9) != 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.safetensors"


@pytest.fixture
def written(path: Path) -> Path:
    save_recipe(path, Recipe(KEEP, SHAPES, "toy.py"))
    return path


@settings(max_examples=30, deadline=None)
@given(masks=st.dictionaries(st.text(min_size=1, max_size=12), st.lists(st.booleans(), min_size=1, max_size=70), max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, masks: dict[str, list[bool]]) -> None:
    masks = {key: mask for key, mask in masks.items() if key != "__metadata__" and key.isprintable()}
    recipe = Recipe(
        {key: np.array(mask) for key, mask in masks.items()}, {"a.b": (3, 4), "c": ()}, "hf:somewhere", {"ratio": 0.3, "of": "params"}
    )
    file = tmp_path_factory.mktemp("recipe") / "r.safetensors"
    save_recipe(file, recipe)
    read = load_recipe(file)
    assert {key: mask.tolist() for key, mask in read.keep.items()} == masks
    assert (read.tensors, read.target, read.requested, read.irprune) == (recipe.tensors, recipe.target, recipe.requested, recipe.irprune)


def test_a_mask_takes_one_bit_per_index(path: Path) -> None:
    save_recipe(path, Recipe({"ffn": np.arange(11008) % 3 > 0}, {"w": (11008, 4096)}))
    assert path.stat().st_size < 11008 / 8 + 500
    assert load_recipe(path).keep["ffn"].sum() == 7338


# -- wrong programs -----------------------------------------------------------------------------------


def test_the_masks_are_those_of_the_groups(written: Path) -> None:
    masks = load_recipe(written).masks(*traced(Mlp()))
    assert sorted(mask.tolist() for mask in masks.values()) == sorted(mask.tolist() for mask in KEEP.values())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Mlp(12, 8), r"tensor fc2.weight has shape \[8, 12\], the recipe wants \[9, 12\]; it was made for toy.py"),
        (nn.Sequential(nn.Linear(6, 4)), r"tensor fc\d.\w+ is missing; the recipe wants it with shape"),
    ],
)
def test_another_model_is_refused_by_its_first_different_tensor(written: Path, other: nn.Module, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written).masks(*traced(other))


class Longer(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(super().forward(x))


def test_a_tensor_that_the_recipe_does_not_know_is_named(written: Path) -> None:
    with pytest.raises(RecipeError, match=r"tensor extra.\w+ has shape \[4(, 4)?\], which the recipe does not know"):
        load_recipe(written).masks(*traced(Longer()))


def test_groups_that_are_not_there_or_frozen_are_refused(path: Path) -> None:
    frozen = next(group for group in GROUPS if group.frozen)
    for keep, message in (
        ({"fc9.weight:0#0": np.array([True, False])}, "keeps 1 of 2 indices of group fc9.weight:0#0; the program has no such group"),
        ({GROUPS["ffn0"].key: np.array([True, False])}, "keeps 1 of 2 indices of group fc1.*; the program has 12 of them"),
        ({frozen.key: np.arange(frozen.size) > 0}, "which is frozen here: it is an axis of input"),
    ):
        save_recipe(path, Recipe(keep, SHAPES))
        with pytest.raises(RecipeError, match=message):
            load_recipe(path).masks(PROGRAM, GROUPS)


# -- damaged and foreign files ------------------------------------------------------------------------


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.safetensors: the recipe cannot be read: .*\n  to go on: a run writes its recipe"):
        load_recipe(path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_cut_off_file_is_refused(written: Path, keep: int) -> None:
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(RecipeError, match="the file is cut off or not a safetensors file"):
        load_recipe(written)


def test_other_files_are_refused(path: Path) -> None:
    path.write_text("ratio: 0.5\n" * 20)
    with pytest.raises(RecipeError, match="not a safetensors file"):
        load_recipe(path)
    save_file({"w": np.ones(3, dtype=np.float32)}, path)
    with pytest.raises(RecipeError, match="holds tensors but no recipe"):
        load_recipe(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def header(file: Path) -> dict[str, object]:
    raw = file.read_bytes()
    return json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"][METADATA])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "damaged or of another version: format"),
        ({"tensors": None}, "damaged or of another version: tensors"),
        ({"surprise": 1}, "damaged or of another version: surprise"),
        ({"sizes": {}}, "has no mask or no size"),
        ({"sizes": {"fc1.bias:0#0": 99, "fc2.bias:0#0": 9}}, "does not have 99 bits"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(written: Path, change: dict[str, object], message: str) -> None:
    assert set(header(written)["sizes"]) == {"fc1.bias:0#0", "fc2.bias:0#0"}  # type: ignore[call-overload]
    save_file(load_file(written), written, metadata={METADATA: json.dumps({**header(written), **change})})
    with pytest.raises(RecipeError, match=message):
        load_recipe(written)


def test_a_mask_of_another_type_is_refused(written: Path) -> None:
    masks = {key: mask.astype(np.float32) for key, mask in load_file(written).items()}
    save_file(masks, written, metadata={METADATA: json.dumps(header(written))})
    with pytest.raises(RecipeError, match=r"the mask of group .* does not have"):
        load_recipe(written)


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError):
        save_recipe(blocker / "recipe.safetensors", Recipe({}, {}))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
