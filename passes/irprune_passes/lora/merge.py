"""The pass ``merge``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from irprune.backend.proof import fake_values, prove_interface, prove_numbers, prove_shapes
from irprune.backend.rewrite import Shrink
from irprune.errors import PipelineError
from irprune.ir.edit import Editor
from irprune.ir.facts import Fact, Task
from irprune.ir.program import Program, set_tensor
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.rules.infer import typed
from irprune_passes.lora.adapters import adapters


class Merge(Pass):
    """Fold the adapters into the weights that they stand beside, and prove that nothing else changed.

    Before::  %y = linear(%x, @up.weight)
              %t = add(%y, mul(linear(linear(%x, @up.lora_A.weight), @up.lora_B.weight), 2))
    After::   %y = linear(%x, @up.weight)

    ``W + scale * B @ A`` is computed in at least single precision and rounded to the weight's type. The
    merged program has the operations that it had before ``lora``; shapes, interface and numbers on the
    example inputs are compared with the unmerged one. Adapters of a traced PEFT model are folded as well.

    Raises:
        PipelineError: The program has no adapters.
        ProofError: The merged program is not what the unmerged one is. The input is untouched.
    """

    name: ClassVar[str] = "merge"
    uses: ClassVar[tuple[type[Fact], ...]] = (Task,)
    changes: ClassVar[bool] = True

    prove: bool = Field(True, description="Prove the result: shapes, numbers, interface.")

    def run(self, program: Program, facts: Facts) -> Result:
        found = adapters(program)
        if not found:
            raise PipelineError("the program has no adapters to merge", where="pass merge", hint="put `lora` and `recover` before it")
        edit = Editor(program)
        origins: dict[str, str | None] = {}
        for adapter in found:
            for base, total in zip(adapter.site.bases, adapter.totals, strict=True):
                edit.nodes[total].replace_all_uses_with(edit.nodes[base])
                origins[base] = total
            origins |= {node.name: None for node in edit.graph.find_nodes(op="get_attr", target=adapter.site.weight)}
        after = edit.done()
        exact = after.clone()
        for adapter in found:
            weight, delta = program.value(adapter.site.weight).detach(), adapter.delta(program)
            merged = weight.to(delta.dtype) + delta
            set_tensor(exact.module, adapter.site.weight, merged)
            set_tensor(after.module, adapter.site.weight, merged.to(weight.dtype))
        after = typed(after.clone())
        if self.prove:
            task = facts.get(Task)
            _prove(program, after, exact, task.seed if task is not None else 0, origins)
        return Result(after)


def _prove(program: Program, after: Program, exact: Program, seed: int, origins: Mapping[str, str | None]) -> None:
    """Shapes and interface of the result, and its numbers before its weights are rounded to their type."""
    values = fake_values(after)
    prove_shapes(program, after, Shrink(program.typing, {}), values)
    prove_interface(program, after, values)
    if program.has_data:
        prove_numbers(program, exact, {}, seed=seed, origins=origins)
