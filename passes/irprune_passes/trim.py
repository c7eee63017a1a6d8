"""The pass ``trim``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from irprune.analysis.groups import discover
from irprune.errors import DataError, OptionError
from irprune.ir.dims import Mask, Var, resolve
from irprune.ir.facts import Fact, Groups, Original, Plan, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.rules.infer import typed
from irprune_passes.prune.removal import Trimmed, carry_out, cut_interface, recipe_of, report, seed_of


class Trim(Pass):
    """Cut the vocabulary down to tokens to keep, or positional tables to their first rows.

    Both change the interface, so they are never chosen by a score: the user says what stays.

    Before::  %h: f32[b, s, 64] = embedding(@embed.weight, %input_ids) and f32[b, s, 32000] as output
    After::   the same with ids 0 to 7,999 in the order of the kept old ids, and f32[b, s, 8000] as output;
              the facts ``PruneReport`` and, in the run directory, ``vocabulary.json``

    *vocabulary*: the new id of a token is the place of its old id in ``kept`` of ``vocabulary.json``. The last
    axis of an output over the tokens is cut alike. The proof compares on inputs of kept tokens. Calibration
    data, loss and evaluation of the target speak of old ids, so later passes do without them.

    *positions*: the first rows of each table that is indexed by places stay, so a longer input is out of
    range from then on.

    Raises:
        OptionError: The program has no such axis, or it is read in a way that forbids the cut.
        DataError: The file of token ids cannot be used.
        ProofError: The smaller program is not what the masks promise. The input is untouched.
    """

    name: ClassVar[str] = "trim"
    uses: ClassVar[tuple[type[Fact], ...]] = (Task, Original, PruneReport, Workspace)
    gives: ClassVar[tuple[type[Fact], ...]] = (PruneReport, Trimmed)
    changes: ClassVar[bool] = True

    vocabulary: Path | None = Field(None, description="File of the token ids to keep: a JSON list, or one id a line.")
    positions: int | None = Field(None, ge=1, description="Rows that each positional table keeps, the first ones.")
    prove: bool = Field(True, description="Prove the removal: shapes, numbers, interface.")
    seed: int | None = Field(None, description="Seed of the proof; none: that of the run.")

    @model_validator(mode="after")
    def _check_some(self) -> Trim:
        if self.vocabulary is None and self.positions is None:
            raise ValueError("give `vocabulary`, `positions` or both")
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        kinds = [kind for kind in ("vocabulary", "positions") if getattr(self, kind) is not None]
        open_ = typed(program, kinds)
        groups = discover(open_)
        keep = self._masks(open_, groups)
        try:
            after, checks = carry_out(open_, keep, validate=self.prove, seed=seed_of(facts, self.seed))
        except IndexError as error:
            if self.positions is None:
                raise
            raise OptionError(
                f"the example inputs use places beyond positions={self.positions}", where="pass trim", hint="keep more positions"
            ) from error
        plan = Plan({group.name: keep[group.var] for group in groups if group.var in keep})
        requested = {kind: str(getattr(self, kind)) for kind in kinds}
        indices = sum(len(mask) for mask in keep.values())
        kept = recipe_of(groups, plan, after, facts)
        done = report(open_, groups, plan, requested=requested, unit="params", indices=indices, checks=checks, recipe=kept)
        after, found = cut_interface(open_, after, keep, facts)
        return Result(after, (done, *found))

    def _masks(self, program: Program, groups: Groups) -> dict[Var, Mask]:
        frozen = {group.var: group.frozen for group in groups}
        keep: dict[Var, Mask] = {}
        for kind in program.typing.unlocked:
            for var in _only(program, kind):
                why = frozen.get(var) or var.frozen
                if why is not None:
                    place = f" (%{why.node})" if why.node else ""
                    raise OptionError(f"the {kind} cannot be cut: {why.message}{place}", where="pass trim")
                keep[var] = self._kept(kind, int(var.size))
        return keep

    def _kept(self, kind: str, rows: int) -> Mask:
        if kind == "positions":
            assert self.positions is not None
            return np.arange(rows) < self.positions
        assert self.vocabulary is not None
        mask = np.zeros(rows, dtype=bool)
        mask[_ids(self.vocabulary, rows)] = True
        return mask


def _only(program: Program, kind: str) -> list[Var]:
    """The variables of a kind's tables; each must be one variable, as its rows are what the user numbers."""
    out: dict[Var, None] = {}
    for term in program.typing.unlocked[kind]:
        atoms = resolve(term)
        if len(atoms) != 1 or not isinstance(atoms[0], Var):
            raise OptionError(f"the {kind} cannot be cut: the model reads its rows in several parts", where="pass trim")
        out[atoms[0]] = None
    return list(out)


def _ids(path: Path, rows: int) -> list[int]:
    """The token ids of a file, each between 0 and the number of rows."""
    where, hint = str(path), "a JSON list of token ids, or one id a line"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the file of token ids cannot be read: {error.strerror}", where=where, hint=hint) from error
    except UnicodeDecodeError as error:
        raise DataError("the file of token ids is not text", where=where, hint=hint) from error
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except ValueError as error:
        raise DataError(f"the file holds something else than token ids: {error}", where=where, hint=hint) from error
    wrong = next((item for item in found if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < rows), None)
    if wrong is not None or not found:
        told = f"{wrong!r} is no token id of this model (0 to {rows - 1})" if found else "the file holds no token ids"
        raise DataError(told, where=where, hint=hint)
    return found
