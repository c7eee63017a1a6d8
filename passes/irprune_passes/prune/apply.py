"""The pass ``apply``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from irprune.backend.checkpoint import load_recipe
from irprune.ir.facts import Fact, Groups, Original, Plan, PruneReport, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune_passes.prune.removal import by_var, carry_out, recipe_of, report, seed_of


class Apply(Pass):
    """Replay a recipe: remove again what an earlier run removed, without scores or data.

    Before::  a program with the structure that the recipe was made for
    After:    the program that the earlier run ended with (bit-identical weights on the same
              checkpoint), and the fact ``PruneReport``
    """

    name: ClassVar[str] = "apply"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original, PruneReport)
    gives: ClassVar[tuple[type[Fact], ...]] = (PruneReport,)
    changes: ClassVar[bool] = True

    recipe: Path = Field(description="The recipe file (recipe.safetensors of a run).")
    prove: bool = Field(True, description="Prove the removal: shapes, numbers, interface.")
    seed: int | None = Field(None, description="Seed of the proof; none: that of the run.")

    def run(self, program: Program, facts: Facts) -> Result:
        groups = facts[Groups]
        recipe = load_recipe(self.recipe)
        masks = recipe.masks(program, groups)
        plan = Plan({group.name: masks[group.var] for group in groups if group.var in masks and not np.all(masks[group.var])})
        after, checks = carry_out(program, by_var(groups, plan), validate=self.prove, seed=seed_of(facts, self.seed))
        unit = str(recipe.requested.get("of", "params"))
        indices = sum(len(mask) for mask in masks.values())
        kept = recipe_of(groups, plan, after, facts)
        done = report(program, groups, plan, requested=recipe.requested, unit=unit, indices=indices, checks=checks, recipe=kept)
        return Result(after, (done,))
