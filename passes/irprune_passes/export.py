"""Write the program as an ONNX file."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from irprune.backend.onnx import OnnxFile, export
from irprune.ir.facts import Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result


class Export(Pass):
    """Write the program as ``model.onnx``, with its dynamic axes, names and weights.

    The file holds standard ONNX operations only, is checked by ``onnx.checker`` and appears when it
    is whole. That it computes what the program computes is for ``validate`` to say.
    """

    name: ClassVar = "export"
    needs: ClassVar = (Workspace,)
    gives: ClassVar = (OnnxFile,)

    opset: int | None = Field(None, ge=18, le=23, description="Version of the ONNX operator set; none: 20, or 23 for bfloat16.")
    optimize: bool = Field(True, description="Fold constants and fuse operations.")
    external_data: bool | Literal["auto"] = Field(
        "auto", description="Weights in a file beside the model; auto does so above the 2 GiB that one ONNX file can hold."
    )
    file: str = Field("model.onnx", pattern=r"^[^/\\]+\.onnx$", description="Name of the file in the run directory.")

    def run(self, program: Program, facts: Facts) -> Result:
        path = facts[Workspace].path / self.file
        return Result(program, (export(program, path, opset=self.opset, optimize=self.optimize, external_data=self.external_data),))
