"""Write the program as an ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from irprune.backend.cache import cached
from irprune.backend.onnx import OnnxFile, Precision, convert, write
from irprune.backend.precision import quantised, to_float16
from irprune.ir.facts import Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import doing


class Export(Pass):
    """Write the program as ``model.onnx``, with its dynamic axes, names and weights.

    The file holds standard ONNX operations only, is checked by ``onnx.checker`` and appears when it
    is whole. That it computes what the program computes is for ``validate`` to say.

    With a cache, a decoder takes the new tokens and the keys and values of all earlier ones, and gives those
    back extended: one graph for prefill and decoding. The traced graph is rewritten for it and compared with
    the program, split at several places; a program that is not causal is refused. ``irprune generate`` drives it.
    """

    name: ClassVar = "export"
    needs: ClassVar = (Workspace,)
    uses: ClassVar = (Task,)
    gives: ClassVar = (OnnxFile,)

    opset: int | None = Field(None, ge=18, le=23, description="Version of the ONNX operator set; none: 20, or 23 for bfloat16.")
    optimize: bool = Field(True, description="Fold constants and fuse operations.")
    external_data: bool | Literal["auto"] = Field(
        "auto", description="Weights in a file beside the model; auto does so above the 2 GiB that one ONNX file can hold."
    )
    cache: bool = Field(False, description="Give a decoder inputs and outputs for the keys and values of earlier tokens.")
    precision: Precision = Field(
        "float32", description="float16 halves the file; onnxruntime's CPU provider computes most of it in float32, with casts: slower."
    )
    quantise: Literal["none", "int8"] = Field(
        "none", description="int8 also writes a second file with weights in eight bits (onnxruntime's dynamic quantiser)."
    )
    file: str = Field("model.onnx", pattern=r"^[^/\\]+\.onnx$", description="Name of the file in the run directory.")

    @model_validator(mode="after")
    def _check_together(self) -> Export:
        if self.quantise == "int8" and self.precision != "float32":
            raise ValueError("`quantise` starts from float32: leave out `precision`, or write two files")
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        path = facts[Workspace].path / self.file
        task = facts.get(Task)
        written = written_as(program, path, opset=self.opset, optimize=self.optimize, external_data=self.external_data, like=self.like)
        if self.quantise == "int8":
            written = dataclasses.replace(written, quantised=quantised(written, path.with_name(f"{path.stem}.int8.onnx")))
        if self.cache and task is not None and task.tokenizer is not None:
            with doing("tokenizer"):
                task.tokenizer.save_pretrained(path.parent)
        return Result(program, (written,))

    @property
    def like(self) -> tuple[bool, Precision]:
        return self.cache, self.precision


def written_as(program: Program, path: Path, *, like: tuple[bool, Precision], **options: Any) -> OnnxFile:
    """A program as an ONNX file of a form.

    Args:
        program: The program.
        path: The file.
        like: Whether it has a cache, and what it computes in.
        options: ``opset`` and ``optimize`` of :func:`convert`, ``external_data`` of :func:`write`.
    """
    cache, precision = like
    of = None
    if cache:
        with doing("cache"):
            of = cached(program)
    external = options.pop("external_data", "auto")
    model = convert(of.program if of is not None else program, **options)
    if precision == "float16":
        model = to_float16(model)
    written = write(model, path, external_data=external)
    return dataclasses.replace(written, cache=cache, precision=precision, computes=(program, of) if of is not None else None)
