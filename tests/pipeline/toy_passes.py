"""Toy passes for the tests of the infrastructure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from irprune.ir.facts import Fact
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result


@dataclass(frozen=True)
class Colours(Fact):
    """An analysis."""

    count: int


@dataclass(frozen=True)
class Weights(Fact):
    """An analysis that rests on another."""

    total: int


class Paint(Pass):
    """Count the operations.

    More about it.
    """

    name: ClassVar = "paint"
    gives: ClassVar = (Colours,)

    skip: tuple[str, ...] = Field((), description="Operations to leave out.")

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (Colours(sum(node.op not in self.skip for node in program.nodes)),))


class Weigh(Pass):
    """Double the count."""

    name: ClassVar = "weigh"
    needs: ClassVar = (Colours,)
    gives: ClassVar = (Weights,)

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (Weights(2 * facts[Colours].count),))


class Cut(Pass):
    """Copy the program."""

    name: ClassVar = "cut"
    needs: ClassVar = (Weights,)
    changes: ClassVar = True

    ratio: float = Field(0.5, ge=0, lt=1, description="The part removed.")
    unit: Literal["params", "none"] = Field("params", description="What the ratio counts.")
    round_to: int | None = Field(8, ge=1, description="Multiple that sizes are rounded to.")
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="Sizes.")
    label: str = Field("", description="A name.")
    force: bool = Field(False, description="Whatever.")
    scale: int | float | str = Field(1, description="Anything.")
    nested: tuple[tuple[str, ...], ...] = Field((), description="Lists in lists.")

    @field_validator("label")
    @classmethod
    def _plain(cls, value: str) -> str:
        if value == "secret":
            raise ValueError("this name is taken")
        return value

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program.clone())


class Must(Pass):
    """Have an option that must be given."""

    name: ClassVar = "must"

    level: int = Field(description="Level.")

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program)
