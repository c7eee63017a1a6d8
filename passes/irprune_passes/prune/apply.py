"""The pass ``apply``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, load_recipe
from irprune.errors import OptionError
from irprune.ir.facts import Fact, Groups, Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.rules.infer import typed
from irprune.rules.unlock import KINDS
from irprune_passes.prune.removal import by_var, carry_out, cut_interface, recipe_of, report, seed_of


class Apply(Pass):
    """Replay a recipe: remove again what an earlier run removed, without scores or data.

    Before::  a program with the structure that the recipe was made for
    After:    the program that the earlier run ended with (bit-identical weights on the same
              checkpoint), and the fact ``PruneReport``
    """

    name: ClassVar[str] = "apply"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original, PruneReport, Workspace)
    gives: ClassVar[tuple[type[Fact], ...]] = (PruneReport,)
    changes: ClassVar[bool] = True

    recipe: Path = Field(description="The recipe file (recipe.safetensors of a run).")
    prove: bool = Field(True, description="Prove the removal: shapes, numbers, interface.")
    seed: int | None = Field(None, description="Seed of the proof; none: that of the run.")

    def run(self, program: Program, facts: Facts) -> Result:
        recipe = load_recipe(self.recipe)
        program, groups = _opened(program, facts[Groups], recipe)
        masks = recipe.masks(program, groups)
        plan = Plan({group.name: masks[group.var] for group in groups if group.var in masks and not np.all(masks[group.var])})
        after, checks = carry_out(program, by_var(groups, plan), validate=self.prove, seed=seed_of(facts, self.seed))
        unit = str(recipe.requested.get("of", "params"))
        indices = sum(len(mask) for mask in masks.values())
        kept = recipe_of(groups, plan, after, facts)
        done = report(program, groups, plan, requested=recipe.requested, unit=unit, indices=indices, checks=checks, recipe=kept)
        after, found = cut_interface(program, after, by_var(groups, plan), facts)
        return Result(after, (done, *found))


def _opened(program: Program, groups: Groups, recipe: Recipe) -> tuple[Program, Groups]:
    """The program with those axes of its interface unlocked that the recipe cuts."""
    for kinds in ((), ("vocabulary",), ("positions",), KINDS):
        try:
            opened = typed(program, kinds) if kinds else program
        except OptionError:
            continue
        found = discover(opened) if kinds else groups
        frozen = {group.key for group in found if group.frozen is not None}
        if all(mask.all() for key, mask in recipe.keep.items() if key in frozen):
            return opened, found
    return program, groups
