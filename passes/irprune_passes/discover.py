"""The pass ``discover``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from irprune.analysis.groups import discover
from irprune.ir.facts import Fact, Groups
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.rules.infer import typed


class Discover(Pass):
    """Give every dimension variable its group: what must be removed together.

    Before::  %fc1: f32[b, d1:16] = linear(%x, @fc1.weight, @fc1.bias)
              %act: f32[b, d1:16] = relu(%fc1)
    After:    the same program, and the fact ``Groups``
              ffn0:16  exact  writes fc1.weight:0, carries fc1.bias:0, reads fc2.weight:1
    """

    name: ClassVar[str] = "discover"
    gives: ClassVar[tuple[type[Fact], ...]] = (Groups,)

    freeze: tuple[str, ...] = Field((), description="Name patterns of tensors whose axes all stay whole, as `*.lm_head.*`.")

    def run(self, program: Program, facts: Facts) -> Result:
        program = program if program.types is not None or program.infer is not None else typed(program)
        return Result(program, (discover(program, self.freeze),))
