"""The pass ``apply``: a recipe replays what a run removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from irprune_passes.prune import Apply, Prune
from irprune_passes.prune.lineage import compose
from prune_toys import Mlp, Toy, kept, mlp, prune, run_checked, toy, transformer

from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, save_recipe
from irprune.backend.rewrite import remove
from irprune.errors import PipelineError, RecipeError
from irprune.ir.facts import Original, PruneReport
from irprune.pipeline.parser import parse
from irprune.pipeline.passes import Facts

MLP = mlp(a=12, b=9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.safetensors"


def replay(on: Toy, path: Path) -> tuple[dict[str, torch.Tensor], PruneReport]:
    program, report = run_checked(Apply(recipe=path), on.program, [on.groups, Original(on.program)])
    return program.tensors, report


@pytest.mark.parametrize("make", [lambda: MLP, lambda: transformer(layers=1)], ids=["mlp", "transformer"])
def test_replaying_gives_bit_identical_weights(path: Path, make: Callable[[], Toy]) -> None:
    on = make()
    program, report = prune(on, ratio=0.4, kinds="all", round_to=1)
    save_recipe(path, Recipe.of(report, on.program, "toy.py"))
    tensors, replayed = replay(on, path)
    assert tensors.keys() == program.tensors.keys()
    assert all(torch.equal(tensor, program.tensors[name]) for name, tensor in tensors.items())
    assert replayed.kept == report.kept
    assert replayed.requested == report.requested
    assert {unit: replayed.achieved[unit] for unit in ("ratio", "params", "macs")} == {
        u: report.achieved[u] for u in ("ratio", "params", "macs")
    }
    assert kept(replayed.keep) == kept(report.keep)
    assert replayed.checks["shapes"] is True


def test_pruning_nothing_is_a_recipe_too(path: Path) -> None:
    _, report = prune(MLP, ratio=0)
    save_recipe(path, Recipe.of(report, MLP.program))
    tensors, _ = replay(MLP, path)
    assert all(torch.equal(tensor, MLP.program.tensors[name]) for name, tensor in tensors.items())


# -- composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_several_prunings_are_one_recipe_over_the_original_indices(path: Path, steps: int) -> None:
    on = transformer(layers=2, width=24, heads=3, hidden=16)
    program, report = prune(on, on.magnitude(), ratio=0.2, round_to=1, steps=steps)
    for kinds in ("residual", "all"):
        small = Toy(program, discover(program))
        result = Prune(ratio=0.15, kinds=(kinds,), round_to=1).run(
            program, Facts([small.groups, small.magnitude(), Original(on.program), report])
        )
        program, report = result.program, Facts(result.facts)[PruneReport]
    save_recipe(path, Recipe.of(report, on.program))
    tensors, _ = replay(on, path)
    assert all(torch.equal(tensor, program.tensors[name]) for name, tensor in tensors.items())
    assert report.keep[on.groups["residual0"].key].sum() < 24


def test_prunings_that_do_not_add_up_are_refused() -> None:
    """The second removal is claimed to be one that the program at hand did not go through."""
    keep = {MLP.groups["ffn0"].var: np.arange(12) > 0}
    after = remove(MLP.program, keep)
    back = {group.name: [(group, np.arange(group.size))] for group in MLP.groups.prunable}
    with pytest.raises(PipelineError, match=r"fc2.* would be \[8, 11\] and is \[9, 11\]"):
        compose(MLP.program, MLP.groups, keep, back, {"ffn1": np.arange(9) > 0}, after)


def test_another_model_is_refused(path: Path) -> None:
    _, report = prune(MLP, count=2)
    save_recipe(path, Recipe.of(report, MLP.program, "toy.py"))
    wrong = toy(lambda: Mlp(12, 8), 2, 6)
    with pytest.raises(RecipeError, match=r"tensor fc2.weight has shape \[8, 12\], the recipe wants \[9, 12\]; it was made for toy.py"):
        Apply(recipe=path).run(wrong.program, Facts([wrong.groups]))


def test_apply_is_a_pass_by_name(path: Path) -> None:
    (one,) = parse(f'apply{{recipe="{path}"}}')
    assert one == Apply(recipe=path)
