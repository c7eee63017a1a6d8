"""The pass ``save_lora``."""

from __future__ import annotations

from typing import ClassVar

from irprune.errors import PipelineError
from irprune.ir.facts import Fact, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune_passes.lora import peft
from irprune_passes.lora.adapters import adapters


class SaveLora(Pass):
    """Write the adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The run directory is then what ``peft.PeftModel.from_pretrained`` takes, for a model of the same
    shapes. Put it before ``merge``, which removes the adapters.

    Raises:
        PipelineError: The program has no adapters.
        ExportError: PEFT has no form for one of them (grouped or dilated convolutions).
    """

    name: ClassVar[str] = "save_lora"
    needs: ClassVar[tuple[type[Fact], ...]] = (Workspace,)
    uses: ClassVar[tuple[type[Fact], ...]] = (Task,)

    def run(self, program: Program, facts: Facts) -> Result:
        found = adapters(program)
        if not found:
            raise PipelineError(
                "the program has no adapters to save", where="pass save_lora", hint="put it after `lora` and before `merge`"
            )
        task = facts.get(Task)
        peft.write(facts[Workspace].path, program, found, task.target if task is not None else "")
        return Result(program)
