"""ONNX files in fewer bits, by onnxruntime's own converters: float16, and weights in eight bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from irprune.backend.cache import PAST, real_inputs
from irprune.backend.onnx import OnnxFile, write
from irprune.backend.runtime import dynamic_sizes, fresh_inputs, opened
from irprune.errors import ExportError
from irprune.ir.program import Program
from irprune.quiet import quiet

if TYPE_CHECKING:
    import onnx
    import onnx_ir


def to_float16(model: onnx_ir.Model) -> onnx_ir.Model:
    """The model with weights and arithmetic in float16; inputs and outputs stay as they are.

    What float16 cannot hold is clamped, and operations that onnxruntime has in float32 only keep it, with casts
    around them. So do squares, their means and roots, which leave its range where the values themselves do not.

    Raises:
        ExportError: It is too large to be converted in memory.
    """
    import onnx_ir

    with quiet():
        try:
            from onnxruntime.transformers.float16 import convert_float_to_float16

            whole, weights = onnx_ir.to_proto(model), set(model.graph.initializers)
            # Shapes are there already: they came from the exporter. Those of weights become wrong where these stay as they are.
            for place in reversed([place for place, value in enumerate(whole.graph.value_info) if value.name in weights]):
                del whole.graph.value_info[place]
            converted = convert_float_to_float16(whole, keep_io_types=True, disable_shape_infer=True, node_block_list=_wide(model))
            smaller = onnx_ir.from_proto(converted)
            _join(smaller)
            # The converter puts its casts at the end.
            smaller.graph.sort()
            return smaller
        except (ValueError, MemoryError) as error:
            raise ExportError(f"the model cannot be converted to float16: {error}", hint="leave out precision=float16") from error


# The part of torch.autocast's list for float32 that leaves the range of float16 and is no single operation of onnxruntime.
_WIDE = frozenset(("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceProd", "Sqrt", "Reciprocal", "Exp", "Log"))


def _wide(model: onnx_ir.Model) -> list[str]:
    """Names of the nodes that need float32: for its range, or since an angle has more digits than float16.

    With them the nodes between two of them (a norm's epsilon), and what an angle is computed from.
    """
    known = {node for node in model.graph if node.op_type in _WIDE}
    for node in model.graph:
        if node.op_type in ("Cos", "Sin"):
            known.update(_angle(node))
    for node in model.graph:
        before = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
        after = [use.node for value in node.outputs for use in value.uses()]
        if before and after and known.issuperset(before) and known.issuperset(after):
            known.add(node)
    return [str(node.name) for node in known]


def _angle(node: onnx_ir.Node) -> set[onnx_ir.Node]:
    """A sine or cosine with what computes its angle from positions; alone, where weight matrices take part in that."""
    found, todo = {node}, [node]
    while todo:
        for value in todo.pop().inputs:
            if value is None or value.dtype is None or not value.dtype.is_floating_point():
                continue
            if value.is_initializer() and value.shape is not None and sum(size != 1 for size in value.shape) > 1:
                return {node}
            if (above := value.producer()) is not None and above not in found:
                found.add(above)
                todo.append(above)
    return found


def _join(model: onnx_ir.Model) -> None:
    """Let neighbours in float32 hand on what they have: the converter takes it through float16."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in model.graph:
        wider = _cast(node, onnx_ir.DataType.FLOAT)
        narrow = _cast(wider.producer() if wider is not None else None, onnx_ir.DataType.FLOAT16)
        if narrow is not None and narrow.dtype == onnx_ir.DataType.FLOAT:
            node.outputs[0].replace_all_uses_with(narrow)
    RemoveUnusedNodesPass()(model)


def _cast(node: onnx_ir.Node | None, to: onnx_ir.DataType) -> onnx_ir.Value | None:
    """What a cast to a type reads; ``None`` where it is no such cast."""
    if node is None or node.op_type != "Cast" or node.attributes["to"].as_int() != to:
        return None
    return node.inputs[0]


def quantised(file: OnnxFile, path: Path, program: Program, *, most: float = 0.1) -> OnnxFile:
    """A file whose matrix weights are in eight bits, the activations quantised as they come.

    onnxruntime's dynamic quantiser, one scale per output channel of a weight, one for an activation. A product stays
    in float32 where that one scale is too coarse: its input has outliers, beside which the rest is lost.

    Args:
        file: The file to quantise, in float32.
        path: Where the result goes.
        program: The program; inputs like its example are drawn.
        most: Largest part of a product (root mean square) that the quantisation of its input may lose.

    Raises:
        ExportError: Nothing in it can be quantised, or the quantiser fails.
    """
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    scratch = path.with_name(f".{path.name}")
    with quiet():
        try:
            model = onnx.load(file.path)
            del model.graph.value_info[:]
            _untie(model)
            coarse = {name: loss for name, loss in _losses(model, scratch, _inputs(file, program)).items() if loss > most}
            try:
                quantize_dynamic(
                    model,
                    scratch,
                    nodes_to_exclude=[*coarse, *(f"{name}_MatMul" for name in coarse)],  # what it makes of a Gemm
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    reduce_range=True,  # processors without VNNI add two products in 16 bits, which overflow with weights of eight
                    extra_options={"MatMulConstBOnly": True},
                )
                smaller = onnx_ir.from_proto(onnx.load(scratch))
            finally:
                scratch.unlink(missing_ok=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ExportError(
                f"onnxruntime cannot quantise the model: {error}", where=str(file.path), hint="leave out quantise=int8"
            ) from error
    if not any(node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear") for node in smaller.graph.all_nodes()):
        why = f" (the inputs of all {len(coarse)} have outliers)" if coarse else ""
        raise ExportError(f"the model has no matrix product or convolution that can be quantised{why}", hint="leave out quantise=int8")
    return dataclasses.replace(
        write(smaller, path), cache=file.cache, precision=file.precision, computes=file.computes, products_in_float32=len(coarse)
    )


def _untie(model: onnx.ModelProto) -> None:
    """Give a product with a transposed weight (of a tied embedding) that weight itself: the quantiser knows no other."""
    import numpy as np
    from onnx import numpy_helper

    weights = {each.name: each for each in model.graph.initializer}
    products = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    for node in list(model.graph.node):
        if (
            node.op_type == "Transpose"
            and node.input[0] in weights
            and node.output[0] in products
            and len(weights[node.input[0]].dims) == 2
        ):
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).T)
            model.graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
            model.graph.node.remove(node)


def _losses(model: onnx.ModelProto, scratch: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Name of each product with a weight to the part of it that an input in eight bits loses.

    An input is quantised in steps of one size, from its smallest value to its largest, so its error is uniform within
    a step; the weight's norm says what becomes of that. Measured on the given inputs, by name.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    weights = {each.name: each for each in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in weights]
    if not products:
        return {}
    outside = {value.name for value in (*model.graph.input, *model.graph.output)}
    wanted = list(dict.fromkeys(name for node in products for name in (node.input[0], node.output[0])))
    count = len(model.graph.output)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in outside)
    try:
        onnx.save(model, scratch)
        session, _ = opened(scratch, threads=torch.get_num_threads(), provider="cpu")
    finally:
        scratch.unlink(missing_ok=True)
        del model.graph.output[count:]
    taken = {value.name for value in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in inputs.items() if name in taken}
    asked = [name for name in wanted if name not in feeds]
    found = {**feeds, **dict(zip(asked, session.run(asked, feeds), strict=True))}
    out = {}
    for node in products:
        given, result = found[node.input[0]], found[node.output[0]]
        step = (float(given.max(initial=0)) - float(given.min(initial=0))) / 255
        weight = np.linalg.norm(numpy_helper.to_array(weights[node.input[1]]).ravel())
        channels = result.shape[1 if node.op_type == "Conv" else -1]
        size = np.sqrt(np.square(result, dtype=np.float64).mean()) if result.size else 0.0
        out[node.name] = float(step / np.sqrt(12) * weight / np.sqrt(channels) / size) if size else 0.0
    return out


def _inputs(file: OnnxFile, program: Program) -> dict[str, torch.Tensor]:
    """Inputs like the example; with a cache all of its positions as new ones, since most of what there is to see are prompts."""
    if file.computes is None:
        interface, given = program.interface, fresh_inputs(program.interface)
    else:
        found = file.computes[1]
        interface, sizes = found.program.interface, dynamic_sizes(found.program.interface)
        given = real_inputs(found, {found.sequence: sizes[found.sequence] + sizes[PAST], PAST: 0})
    return dict(zip(interface.inputs, pytree.tree_leaves(given), strict=True))
