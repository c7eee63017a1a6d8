"""ONNX files in fewer bits, by onnxruntime's own converters: float16, and weights in eight bits."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from irprune.backend.onnx import OnnxFile, write
from irprune.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir


def to_float16(model: onnx_ir.Model) -> onnx_ir.Model:
    """The model with weights and arithmetic in float16; inputs and outputs stay as they are.

    What float16 cannot hold is clamped, and operations that onnxruntime has in float32 only keep it, with casts
    around them.

    Raises:
        ExportError: It is too large to be converted in memory.
    """
    import onnx_ir

    with _quiet():
        try:
            from onnxruntime.transformers.float16 import convert_float_to_float16

            # Shapes are there already: they came from the exporter.
            converted = convert_float_to_float16(onnx_ir.to_proto(model), keep_io_types=True, disable_shape_infer=True)
            smaller = onnx_ir.from_proto(converted)
            # The converter puts its casts at the end.
            smaller.graph.sort()
            return smaller
        except (ValueError, MemoryError) as error:
            raise ExportError(f"the model cannot be converted to float16: {error}", hint="leave out precision=float16") from error


def quantised(file: OnnxFile, path: Path) -> OnnxFile:
    """A file whose matrix weights are in eight bits, the activations quantised as they come.

    onnxruntime's dynamic quantiser, one scale per output channel.

    Args:
        file: The file to quantise, in float32.
        path: Where the result goes.

    Raises:
        ExportError: Nothing in it can be quantised, or the quantiser fails.
    """
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        try:
            model = onnx.load(file.path)
            del model.graph.value_info[:]
            scratch = path.with_name(f".{path.name}")
            try:
                quantize_dynamic(model, scratch, per_channel=True, weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True})
                smaller = onnx_ir.from_proto(onnx.load(scratch))
            finally:
                scratch.unlink(missing_ok=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ExportError(
                f"onnxruntime cannot quantise the model: {error}", where=str(file.path), hint="leave out quantise=int8"
            ) from error
    if not any(node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear") for node in smaller.graph.all_nodes()):
        raise ExportError("the model has no matrix product or convolution that can be quantised", hint="leave out quantise=int8")
    return dataclasses.replace(write(smaller, path), cache=file.cache, precision=file.precision, computes=file.computes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters log advice on how to prepare a model, and of what they leave alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
