"""Operations that the exporter of torch does not know, written in ONNX.

:func:`irprune.backend.onnx.convert` adds those that a program calls to the exporter's own table. An
entry is found by the operation's name, so the library that registers it need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from irprune.rules.registry import op_name


def grouped_mm(input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows ``offs[i-1]:offs[i]`` of ``input`` times ``weight[i]``; rows behind the last are zero.

    Shapes: input ``(rows, in)``, weight ``(groups, in, out)``, offs ``(groups,)``, result ``(rows, out)``.
    One matrix product per group: ONNX has no operation with ragged operands.
    """
    from onnxscript.onnx_opset import opset18

    op: Any = opset18
    if weight.shape is None or offs is None or bias is not None:
        raise NotImplementedError("only groups of rows without bias can be written")
    ends = op.Cast(offs, to=7)
    start = op.Constant(value_ints=[0])
    products = []
    for group in range(int(weight.shape[0])):
        end = op.Slice(ends, [group], [group + 1], [0])
        products.append(op.MatMul(op.Slice(input, start, end, [0]), op.Gather(weight, group, axis=0)))
        start = end
    rest = op.Sub(op.Shape(input, start=0, end=1), start)
    shape = op.Concat(rest, op.Shape(weight, start=2, end=3), axis=0)
    return op.Concat(*products, op.Expand(op.CastLike(0.0, input), shape), axis=0)


TRANSLATIONS: dict[str, Callable[..., Any]] = {"transformers::grouped_mm_fallback": grouped_mm, "aten::_grouped_mm": grouped_mm}


def translations(nodes: Iterable[fx.Node]) -> dict[Any, Callable[..., Any]]:
    """The table for :func:`torch.onnx.export`: those of the above that are called."""
    return {node.target: TRANSLATIONS[op_name(node.target)] for node in nodes if op_name(node.target) in TRANSLATIONS}
