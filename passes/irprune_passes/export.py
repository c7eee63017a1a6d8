"""Write the program as an ONNX file, as a Hugging Face checkpoint, or both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from irprune.backend import hf_export
from irprune.backend.cache import cached
from irprune.backend.hf_config import factors_of
from irprune.backend.hf_export import HfCheckpoint, Layout
from irprune.backend.onnx import OnnxFile, Precision, convert, write
from irprune.backend.precision import quantised, to_float16
from irprune.errors import ExportError
from irprune.ir.facts import Fact, Original, Pretrained, PruneReport, Task, Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import doing

Format = Literal["onnx", "hf"]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Export(Pass):
    """Write the program as ``model.onnx``, as a Hugging Face checkpoint in the directory ``hf``, or both.

    The ONNX file holds standard operations only, with the program's dynamic axes, names and weights. It is
    checked by ``onnx.checker``; that it computes what the program computes is for ``validate`` to say.

    With a cache, a decoder takes the new tokens and the keys and values of all earlier ones, and gives those
    back extended: one graph for prefill and decoding. The traced graph is rewritten for it and compared with
    the program, split at several places; a program that is not causal is refused. ``irprune generate`` drives it.

    The checkpoint directory holds weights, configuration, tokenizer, generation settings and a model card.
    In the layout ``plain`` each kind of layer has one size, and ``from_pretrained`` loads it where irprune
    is not installed. In the layout ``resized`` layers have sizes of their own, and
    ``irprune.load_pretrained`` gives the same class of transformers. It is loaded again, and its outputs
    are compared with the program's, before it appears under its name.

    Raises:
        ExportError: The program cannot be written in the asked format.
        ParityError: The checkpoint does not give what the program gives.
    """

    name: ClassVar = "export"
    needs: ClassVar = (Workspace,)
    uses: ClassVar = (Original, Pretrained, PruneReport, Task)
    may_give: ClassVar = (OnnxFile, HfCheckpoint)

    format: Annotated[tuple[Format, ...], BeforeValidator(_listed)] = Field(
        ("onnx",), min_length=1, description="onnx, hf (a Hugging Face checkpoint, for a Hugging Face target) or both, as [onnx,hf]."
    )
    opset: int | None = Field(None, ge=18, le=23, description="Version of the ONNX operator set; none: 20, or 23 for bfloat16.")
    optimize: bool = Field(True, description="Fold constants and fuse operations in the ONNX file.")
    external_data: bool | Literal["auto"] = Field(
        "auto", description="Weights in a file beside the ONNX model; auto does so above the 2 GiB that one ONNX file can hold."
    )
    cache: bool = Field(False, description="Give a decoder inputs and outputs for the keys and values of earlier tokens.")
    precision: Precision = Field(
        "float32", description="float16 halves the file; onnxruntime's CPU provider computes most of it in float32, with casts: slower."
    )
    quantise: Literal["none", "int8"] = Field(
        "none", description="int8 also writes a second file with weights in eight bits (onnxruntime's dynamic quantiser)."
    )
    int8_loss: float = Field(
        0.1,
        gt=0,
        description="A product stays in float32 in the second file where an input in eight bits would lose more than this part of it "
        "(root mean square, on inputs like the example): that input has outliers.",
    )
    file: str = Field("model.onnx", pattern=r"^[^/\\]+\.onnx$", description="Name of the ONNX file in the run directory.")
    layout: Layout = Field("auto", description="Layout of the checkpoint; auto is plain where that fits, else resized.")
    shard: str = Field(
        "5GB", pattern=r"^\d+(\.\d+)?[KMG]B$", description="Size from which on the checkpoint's weights are cut into several files."
    )

    def given(self) -> tuple[type[Fact], ...]:
        return tuple(kind for name, kind in (("onnx", OnnxFile), ("hf", HfCheckpoint)) if name in self.format)

    @model_validator(mode="after")
    def _check_together(self) -> Export:
        if self.quantise == "int8" and self.precision != "float32":
            raise ValueError("`quantise` starts from float32: leave out `precision`, or write two files")
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        folder = facts[Workspace].path
        written: list[Fact] = []
        if "onnx" in self.format:
            written.append(self._onnx(program, folder / self.file, facts.get(Task)))
        if "hf" in self.format:
            source, original, report = facts.get(Pretrained), facts.get(Original), facts.get(PruneReport)
            if source is None or original is None:
                hint = "name the target as hf:PATH_OR_ID, or give irprune.run the model of transformers itself"
                raise ExportError("the target is no Hugging Face model, so there is no class to write", where="pass export", hint=hint)
            known = factors_of(original.program, report.keep) if report is not None else {}
            place, kept = folder / "hf", facts[Workspace].progress
            options: dict[str, Any] = {"known": known, "layout": self.layout, "max_shard_size": self.shard, "progress": kept}
            written.append(hf_export.export(program, original.program, source, place, **options))
        return Result(program, tuple(written))

    def _onnx(self, program: Program, path: Path, task: Task | None) -> OnnxFile:
        written = written_as(program, path, opset=self.opset, optimize=self.optimize, external_data=self.external_data, like=self.like)
        if self.quantise == "int8":
            with doing("int8"):
                smaller = quantised(written, path.with_name(f"{path.stem}.int8.onnx"), program, most=self.int8_loss)
            written = dataclasses.replace(written, quantised=smaller)
        if self.cache and task is not None and task.tokenizer is not None:
            with doing("tokenizer"):
                task.tokenizer.save_pretrained(path.parent)
        return written

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
