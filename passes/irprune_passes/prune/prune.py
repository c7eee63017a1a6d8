"""The pass ``prune``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, field_validator, model_validator

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend import multiples
from irprune.backend.multiples import Multiples
from irprune.backend.rewrite import remove
from irprune.errors import BudgetError, DataError, PipelineError
from irprune.ir.facts import Fact, Group, Groups, Importance, Original, Plan, PruneReport, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import track
from irprune_passes.prune.allocate import Counts, Global, Local, Pool, Uniform, masks, meet
from irprune_passes.prune.lineage import ancestors, scores_before
from irprune_passes.prune.removal import by_var, carry_out, recipe_of, report, seed_of
from irprune_passes.prune.select import LAYERS, Filter, Selection, select, units

Kind = Literal["heads", "ffn", "conv", "experts", "norm_groups", "other", "residual", "head_dim", "query_heads", "all"]
Scores = Mapping[str, npt.NDArray[np.float64]]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Prune(Pass):
    """Choose what goes by its scores, remove it, and prove that the result is right.

    Before::  %fc1: f32[b, d1:16] = linear(%x, @fc1.weight, @fc1.bias)
    After::   %fc1: f32[b, d1:12] = linear(%x, @fc1.weight, @fc1.bias)
              and the fact ``PruneReport``

    The lowest scores go first, ties by index. A ratio of parameters or multiply-accumulates is of the
    whole model: the smallest plan whose cost meets it is taken. It meets the budget within one index, or
    one rounding unit, of one group. A uniform allocation keeps groups of one size at one size, so it meets
    the budget within one step of the common ratio. A ratio of indices means
    ``round(size * ratio)`` of each group (half to even, as ``torch.nn.utils.prune``), or of all indices
    together for a global allocation; at least ``min_keep`` stay.

    Raises:
        NothingPrunableError: The options leave no group that may be pruned.
        BudgetError: The budget cannot be met; the error says what stands in the way.
        ProofError: The smaller program is not what the plan promises. The input is untouched.
    """

    name: ClassVar[str] = "prune"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Importance)
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original, PruneReport)
    gives: ClassVar[tuple[type[Fact], ...]] = (PruneReport,)
    may_give: ClassVar[tuple[type[Fact], ...]] = (Plan,)
    changes: ClassVar[bool] = True

    ratio: float = Field(0.2, ge=0, lt=1, description="The part to remove.")
    of: Literal["params", "macs", "indices"] = Field("params", description="What the ratio is of: the whole model's cost, or indices.")
    count: int | None = Field(
        None, ge=0, description="Instead of a ratio: exactly so many indices of each group (of all together if global), unrounded."
    )
    allocation: Literal["local", "uniform", "global"] = Field(
        "local",
        description="The same ratio of indices in each group; the same and groups of one size stay of one size; "
        "or one ranking over all groups by their scores.",
    )
    per_cost: Literal["none", "params", "macs"] = Field(
        "none", description="Divide the scores of a global ranking by the cost of an index."
    )
    kinds: Annotated[tuple[Kind, ...], BeforeValidator(_listed)] = Field(
        ("heads", "ffn", "conv", "experts", "norm_groups", "other"),
        description="Kinds of groups to prune; `all` for every kind. Not by default: residual, head_dim, query_heads.",
    )
    include: Names = Field((), description="Only groups with a tensor or module that fits one of these patterns, as `*.mlp`.")
    exclude: Names = Field((), description="No group with a tensor or module that fits one of these patterns.")
    layers: str | None = Field(
        None, description="Only groups of these repeated blocks, FROM:TO counted from 0 without TO, by the first number in the names."
    )
    protect: Names = Field((), description="Tensors and modules that stay as they are, bit by bit.")
    round_to: Annotated[int, Field(ge=1)] | Literal["auto", "measure"] = Field(
        "auto",
        description="Make tensor axes multiples of it; smaller powers of two where that removes nothing or all of a group; 1: off. "
        "auto: 8, but 16 for channels of convolutions on a CPU with AVX-512, as onnxruntime's kernels want it; measure: time them.",
    )
    min_keep: int = Field(1, ge=1, description="At least so many indices of each group stay.")
    steps: int = Field(1, ge=1, description="Prune in so many equal steps and score again after each.")
    dry_run: bool = Field(False, description="Only plan: give the plan and its costs and remove nothing.")
    prove: bool = Field(True, description="Prove the removal: shapes, numbers, interface.")
    seed: int | None = Field(None, description="Seed of the proof; none: that of the run.")

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | None) -> str | None:
        if value is not None and not LAYERS.fullmatch(value):
            raise ValueError("it reads FROM:TO, as 4:30, 4: or :-1")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Prune:
        if self.count is not None:
            for other in ("ratio", "of", "round_to"):
                if other in self.model_fields_set:
                    raise ValueError(f"give `count` or `{other}`, not both")
        if self.per_cost != "none" and self.allocation != "global":
            raise ValueError(f"`per_cost` needs allocation=global: a {self.allocation} allocation does not compare groups")
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        groups, importance = facts[Groups], facts[Importance]
        chosen: tuple[Group, ...] = ()
        plan = Plan({})
        if self.count or (self.count is None and self.ratio > 0):
            selection = select(program, groups, self._filter)
            chosen = selection.chosen
            plan = _Planner(self, program, groups, selection).plan(importance)
        after, checks = program, dict[str, Any]()
        if not self.dry_run:
            after, checks = carry_out(program, by_var(groups, plan), validate=self.prove, seed=seed_of(facts, self.seed))
        done = report(
            program,
            groups,
            plan,
            requested=self._requested,
            unit="indices" if self.count is not None else self.of,
            indices=sum(group.size for group in chosen),
            checks=checks,
            recipe={} if self.dry_run else recipe_of(groups, plan, after, facts),
        )
        return Result(after, (done, plan) if self.dry_run else (done,))

    @property
    def _filter(self) -> Filter:
        return Filter(self.kinds, self.include, self.exclude, self.layers, self.protect, self.min_keep)

    @property
    def _requested(self) -> dict[str, Any]:
        asked = {"ratio": self.ratio, "of": self.of} if self.count is None else {"count": self.count, "of": "indices"}
        measured = {"round_to": list(self._multiples)} if self.round_to == "measure" and self.count is None else {}
        return {**asked, "allocation": self.allocation, **measured}

    @functools.cached_property
    def _multiples(self) -> Multiples:
        """What ``round_to`` stands for."""
        if isinstance(self.round_to, int):
            return Multiples(self.round_to, self.round_to)
        return multiples.stored() if self.round_to == "auto" else multiples.measured()


class _Planner:
    """Finds the plan for one set of options and one program.

    Args:
        options: The options.
        program: The typed program.
        groups: Its groups.
        selection: Those that may be pruned.
    """

    def __init__(self, options: Prune, program: Program, groups: Groups, selection: Selection) -> None:
        self.options = options
        self.program = program
        self.groups = groups
        self.selection = selection
        self.cost = Cost(program)
        self.units = units(program, selection.chosen, Multiples(1, 1) if options.count is not None else options._multiples)
        self._vars = {group.name: group.var for group in groups}

    def plan(self, importance: Importance) -> Plan:
        """Score and choose, ``steps`` times; removal is always from the original indices."""
        options, scores = self.options, importance.scores
        counts = {group.name: group.size for group in self.selection.chosen}
        self._check_reach(self._path(scores, counts))
        plan = Plan({})
        for step in track(range(1, options.steps + 1), "steps"):
            path = self._path(scores, counts)
            counts = self._choose(path, Fraction(step, options.steps))
            plan = Plan(masks(path.pools, counts))
            if step < options.steps:
                scores = self._rescored(importance, plan)
        if not plan.keep:
            raise self._nothing()
        return plan

    def _path(self, scores: Scores, ceilings: Counts) -> Uniform | Global:
        options = self.options
        pools = []
        for group in self.selection.chosen:
            cost = {"none": 1, "params": group.params_per_index, "macs": group.macs_per_index}[options.per_cost]
            values = _checked(group, scores)
            if options.per_cost != "none" and bool((np.isfinite(values) & (values < 0)).any()):
                raise DataError(
                    f"group {group.name} has negative scores, and divided by a cost the index that frees least would go first",
                    where="pass prune",
                    hint="normalise with min-max instead, or leave out `per_cost`",
                )
            pools.append(
                Pool(group.name, values, self.units[group.name], max(options.min_keep, group.least), ceilings[group.name], max(cost, 1))
            )
        if options.allocation == "global":
            return Global(pools)
        return Local(pools) if options.allocation == "local" else Uniform(pools)

    def _choose(self, path: Uniform | Global, part: Fraction) -> Counts:
        """Kept counts when ``part`` of what was asked is to be gone."""
        options = self.options
        if options.count is not None:
            removed = round(options.count * part)
            if isinstance(path, Global):
                return path.counts(removed)
            return {pool.name: pool.kept(removed) for pool in path.pools}
        if options.of == "indices":
            return path.at(options.ratio * float(part))
        counts = meet(path, self._cost, self._target(part))
        assert counts is not None, "the budget was found reachable"
        return counts

    def _target(self, part: Fraction = Fraction(1)) -> int:
        whole = self._cost({})
        return int(whole - whole * Fraction(str(self.options.ratio)) * part)

    def _cost(self, counts: Counts) -> int:
        return self.cost.of(self.options.of, {self._vars[name]: kept for name, kept in counts.items()})

    def _rescored(self, importance: Importance, plan: Plan) -> Scores:
        if importance.rescore is None:
            raise PipelineError(
                "pruning in steps needs scores that can be measured again, and these cannot be",
                where="pass prune",
                hint="put `score` before `prune`, or prune in one step",
            )
        keep = by_var(self.groups, plan)
        smaller = remove(self.program, keep)
        found = discover(smaller)
        back = ancestors(self.program, self.groups, keep, found)
        return scores_before(self.groups, keep, back, importance.rescore(smaller, found).scores)

    # -- what cannot be met ---------------------------------------------------------------------

    def _check_reach(self, path: Uniform | Global) -> None:
        """Refuse a request that even the last step of the path does not meet."""
        options = self.options
        if options.count is not None:
            self._check_count(path.pools, options.count)
        elif options.of != "indices":
            most = path.counts(len(path) - 1)
            if self._cost(most) > self._target():
                raise self._short(most)

    def _nothing(self) -> BudgetError:
        """What was asked is less than half an index, or half a rounding unit, of every group."""
        chosen = self.selection.chosen
        largest = max(chosen, key=lambda group: group.size)
        text = (
            f"{self.options.ratio:.4g} of the indices is nothing in each of the {len(chosen)} groups: the largest, {largest.name}, "
            f"has {largest.size} indices, rounded to multiples of {self.units[largest.name]}"
        )
        return BudgetError(text, where="pass prune", hint="ask for more, lower `round_to`, or use allocation=global")

    def _check_count(self, pools: Sequence[Pool], count: int) -> None:
        hint = "ask for less, lower `min_keep`, or choose groups by `kinds`, `include` or `layers`"
        if self.options.allocation == "global":
            free = sum(pool.size - pool.floor for pool in pools)
            if count > free:
                raise BudgetError(f"{count} indices cannot go: {free} are free to, in {len(pools)} groups", where="pass prune", hint=hint)
            return
        for pool in pools:
            if count > pool.size - pool.floor:
                text = f"{count} indices of group {pool.name} cannot go: it has {pool.size}, of which {pool.floor} must stay"
                raise BudgetError(text, where="pass prune", hint=hint)

    def _short(self, most: Counts) -> BudgetError:
        """Why the budget cannot be met: what each obstacle holds back, as a part of the whole model."""
        whole, least = self._cost({}), self._cost(most)
        bare = {group.name: 1 for group in self.selection.chosen}
        held = {"rounding and `min_keep`": least - self._cost(bare)}
        for reason, groups in self.selection.left.items():
            more = {group.name: 1 for group in groups}
            held[f"{len(groups)} group{'s' * (len(groups) > 1)} {reason}"] = least - self._cost({**most, **more})
        noun = "parameters" if self.options.of == "params" else "multiply-accumulates"
        obstacles = [f"{what} ({amount / whole:.1%})" for what, amount in held.items() if amount > 0]
        message = f"{self.options.ratio:.4g} of the {noun} cannot go: {(whole - least) / whole:.4f} can"
        if obstacles:
            message += "; in the way: " + ", ".join(obstacles)
        ways = [f"ask for ratio={int((whole - least) / whole * 1000) / 1000} or less"]
        kinds = sorted({group.kind for reason, groups in self.selection.left.items() if reason.startswith("of kind") for group in groups})
        if kinds:
            ways.append(f"add {', '.join(kinds)} to `kinds`")
        if held["rounding and `min_keep`"] > 0:
            ways.append("lower `round_to` or `min_keep`")
        if any(not reason.startswith(("frozen", "of kind")) for reason in self.selection.left):
            ways.append("relax what leaves groups out")
        return BudgetError(message, where="pass prune", hint=", or ".join(ways))


def _checked(group: Group, scores: Scores) -> npt.NDArray[np.float64]:
    values = scores.get(group.name)
    if values is None:
        raise DataError(
            f"group {group.name} has no scores",
            where="pass prune",
            hint="put `score` right before `prune`; where its criterion cannot measure the group, or `reduce=prod` leaves the range of "
            "double precision over its many parameters, take another one or exclude the group",
        )
    assert values.shape == (group.size,), f"{group.name}: {values.shape} scores for {group.size} indices"
    wrong = int(np.isnan(values).sum())
    if wrong:
        raise DataError(
            f"{wrong} of the {group.size} scores of group {group.name} are not numbers (NaN)",
            where="pass prune",
            hint="look for NaN in the weights, the calibration data and the loss",
        )
    return values
