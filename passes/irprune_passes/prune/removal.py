"""What every pruning ends with: removal, proof and report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, shapes
from irprune.backend.proof import prove, renumber
from irprune.backend.rewrite import remove
from irprune.ir.dims import Mask, Var, mask_of
from irprune.ir.facts import Fact, Groups, Note, Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.files import write_text
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed
from irprune_passes.prune.lineage import ancestors, compose

MAP = "vocabulary.json"
"""What a cut vocabulary is written to: the old id of each new one."""


@dataclass(frozen=True)
class Trimmed(Note):
    """What became of the interface.

    Attributes:
        input: The input whose ids are numbered anew; ``None`` where the vocabulary stays.
        ids: For each new id the old one.
        positions: Rows that each positional table keeps; ``None`` where they all stay.
    """

    input: str | None = None
    ids: tuple[int, ...] = field(default=(), repr=False)
    positions: int | None = None

    def manifest(self) -> dict[str, Any]:
        cut: dict[str, Any] = {}
        if self.input is not None:
            cut["vocabulary"] = {"input": self.input, "tokens": len(self.ids), "map": MAP}
        if self.positions is not None:
            cut["positions"] = self.positions
        return {"trim": cut}


def carry_out(program: Program, keep: Mapping[Var, Mask], *, validate: bool, seed: int) -> tuple[Program, dict[str, Any]]:
    """The smaller program and what its proof found (nothing if ``validate`` is off).

    Raises:
        ProofError: The smaller program is not what the masks promise.
    """
    after = remove(program, keep)
    return after, dict(prove(program, after, keep, seed=seed)) if validate else {}


def seed_of(facts: Facts, chosen: int | None) -> int:
    """The seed that was chosen, else that of the run."""
    task = facts.get(Task)
    return chosen if chosen is not None else task.seed if task is not None else 0


def report(
    program: Program,
    groups: Groups,
    plan: Plan,
    *,
    requested: Mapping[str, Any],
    unit: str,
    indices: int,
    checks: Mapping[str, Any],
    recipe: Mapping[str, Mask],
) -> PruneReport:
    """What a plan does to a program, in numbers.

    Args:
        program: The program that it starts from.
        groups: Its groups.
        plan: The keep masks by group name.
        requested: What was asked for.
        unit: ``params``, ``macs`` or ``indices``: what the ratio is of.
        indices: How many indices could be chosen from.
        checks: What the proof found.
        recipe: The keep masks by group key, over the indices of the original program.
    """
    cost = Cost(program)
    counts = counts_of(groups, plan)
    gone = sum(int((~mask).sum()) for mask in plan.keep.values())
    achieved = {"params": _share(cost.params(), cost.params(counts)), "macs": _share(cost.macs(), cost.macs(counts))}
    achieved["indices"] = gone / indices if indices else 0.0
    kept = {group.name: (int(plan.keep[group.name].sum()), group.size) for group in groups if group.name in plan.keep}
    return PruneReport(requested, {"ratio": achieved[unit], **achieved}, recipe, kept, checks)


def _share(before: int, after: int) -> float:
    return (before - after) / before if before else 0.0


def counts_of(groups: Groups, plan: Plan) -> dict[Var, int]:
    """The number of kept indices by variable."""
    return {group.var: int(plan.keep[group.name].sum()) for group in groups if group.name in plan.keep}


def by_var(groups: Groups, plan: Plan) -> dict[Var, Mask]:
    """The masks of a plan by variable."""
    return {group.var: plan.keep[group.name] for group in groups if group.name in plan.keep}


def recipe_of(groups: Groups, plan: Plan, after: Program, facts: Facts) -> dict[str, Mask]:
    """A plan's masks by group key over the indices of the original program.

    Where an earlier pass of the run has pruned already, the two add up to one recipe.

    Args:
        groups: The groups that the plan is for.
        plan: What was kept of them.
        after: The program that is left.
        facts: Holds the earlier report and the original program, if there are any.

    Raises:
        PipelineError: They cannot be written as one.
    """
    earlier, original = facts.get(PruneReport), facts.get(Original)
    if earlier is None or original is None:
        return {group.key: plan.keep[group.name] for group in groups if group.name in plan.keep}
    before = typed(original.program) if original.program.types is None else original.program
    first = discover(before)
    keep = Recipe(earlier.keep, shapes(before)).masks(before, first)
    joint = compose(before, first, keep, ancestors(before, first, keep, groups), plan.keep, after)
    return {group.key: joint[group.var] for group in first if group.var in joint and not np.all(joint[group.var])}


def cut_interface(before: Program, after: Program, keep: Mapping[Var, Mask], facts: Facts) -> tuple[Program, list[Fact]]:
    """What follows from a cut of the vocabulary or of positions: example inputs, the map, what is known of data.

    Args:
        before: The program, typed with the cut axes unlocked.
        after: What is left of it.
        keep: The masks.
        facts: The workspace, where the map is written, and the task.

    Returns:
        The smaller program with example inputs that it can take, and facts.
    """
    types = before.typing
    rows = {kind: mask_of(terms[0], keep) for kind, terms in types.unlocked.items()}
    cut = {kind: mask for kind, mask in rows.items() if not mask.all()}
    note = Trimmed(positions=int(cut["positions"].sum()) if "positions" in cut else None)
    if "vocabulary" not in cut:
        return after, [note] if cut else []
    ids = np.flatnonzero(cut["vocabulary"]).tolist()
    args, kwargs = before.interface.example
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    example = pytree.tree_unflatten(renumber(before, keep, flat)[1], spec)
    after = dataclasses.replace(after, interface=dataclasses.replace(after.interface, example=example))
    found: list[Fact] = [dataclasses.replace(note, input=types.ids, ids=tuple(ids))]
    workspace, task = facts.get(Workspace), facts.get(Task)
    if workspace is not None:
        write_text(workspace.path / MAP, json.dumps({"input": types.ids, "kept": ids}) + "\n")
    if task is not None:
        found.append(dataclasses.replace(task, calibration=None, loss=None, evaluate=None))
    return after, found
