"""Operations that the exporter of torch does not know, written in ONNX.

:func:`irprune.backend.onnx.convert` adds those that a program calls to the exporter's own table. An
entry is found by the operation's name, so the library that registers it need not be installed.

Where the exporter knows every operation, :func:`as_it_is` spares it the decomposition, and :func:`quick_rules`
its optimiser a search that grows with the square of the graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from irprune.ir.program import writes
from irprune.rules.registry import bind, op_name

if TYPE_CHECKING:
    import onnx_ir


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


def diff(self: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """Each row of an axis less the one before it, ``n`` times; of booleans, whether they differ. Source: ``torch.diff``."""
    from onnx_ir import DataType
    from onnxscript.onnx_opset import opset18

    op: Any = opset18
    if n == 0:
        return op.Identity(self)
    parts = [part for part in (prepend, self, append) if part is not None]
    whole = op.Concat(*parts, axis=dim) if len(parts) > 1 else self
    for _ in range(n):
        after, before = op.Slice(whole, [1], [2**63 - 1], [dim]), op.Slice(whole, [0], [-1], [dim])
        whole = op.Xor(after, before) if self.dtype == DataType.BOOL else op.Sub(after, before)
    return whole


def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    """Distances of order ``p`` between all rows of x1 ``(*, P, M)`` and all of x2 ``(*, R, M)``: ``(*, P, R)``."""
    from onnxscript.onnx_opset import opset18

    op: Any = opset18
    gaps = op.Abs(op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3])))
    if p == 0:
        return op.ReduceSum(op.Sign(gaps), [-1], keepdims=0)
    if p in (1, 2):
        return (op.ReduceL1 if p == 1 else op.ReduceL2)(gaps, [-1], keepdims=0)
    if p == float("inf"):
        return op.ReduceMax(gaps, [-1], keepdims=0)
    return op.Pow(op.ReduceSum(op.Pow(gaps, op.CastLike(p, gaps)), [-1], keepdims=0), op.CastLike(1 / p, gaps))


def hypot(self: Any, other: Any) -> Any:
    """The length of a right triangle's third side; the larger side is taken out, so that no square leaves the range."""
    from onnxscript.onnx_opset import opset18

    op: Any = opset18
    one, two = op.Abs(self), op.Abs(other)
    large, small = op.Max(one, two), op.Min(one, two)
    zero = op.CastLike(0.0, large)
    share = op.Div(small, op.Where(op.Equal(large, zero), op.CastLike(1.0, large), large))
    return op.Mul(large, op.Sqrt(op.Add(op.CastLike(1.0, share), op.Mul(share, share))))


TRANSLATIONS: dict[str, Callable[..., Any]] = {
    "transformers::grouped_mm_fallback": grouped_mm,
    "aten::_grouped_mm": grouped_mm,
    "aten::diff": diff,
    "aten::cdist": cdist,
    "aten::hypot": hypot,
}

_OPERATORS = {
    "aten::__and__": torch.ops.aten.bitwise_and,
    "aten::__or__": torch.ops.aten.bitwise_or,
    "aten::__xor__": torch.ops.aten.bitwise_xor,
}


def translations(nodes: Iterable[fx.Node]) -> dict[Any, Callable[..., Any]]:
    """The table for :func:`torch.onnx.export`: those of the above that are called."""
    return {node.target: TRANSLATIONS[op_name(node.target)] for node in nodes if op_name(node.target) in TRANSLATIONS}


def renamed(graph: fx.Graph) -> None:
    """Give operations that the exporter knows by another name, or on one type of numbers only, that form, in place."""
    for node in graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else ""
        if name == "aten::to":
            dtype = node.meta["val"].dtype
            node.args, node.kwargs = (bind(node.target, node.args, dict(node.kwargs))["self"],), {"dtype": dtype}
            node.target = torch.ops.aten._to_copy.default
        elif node.target is torch.ops.aten.rsub.Scalar and node.args[0].meta["val"].dtype != node.meta["val"].dtype:
            # 1.0 - mask: written out as a subtraction from a number, for which the exporter wants both of one type.
            with graph.inserting_before(node):
                cast = graph.call_function(torch.ops.aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype})
            cast.meta = dict(node.meta)
            node.args = (cast, *node.args[1:])
        elif name in _OPERATORS:
            node.target = getattr(_OPERATORS[name], node.target._overloadname)


def as_it_is(program: ExportedProgram) -> ExportedProgram:
    """The program, without decomposition where that would change nothing.

    The exporter traces a program again to decompose what it does not know, which takes longer than all else it does.
    A program that writes nothing in place and calls only what the exporter knows stays what it was.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    known = _known()
    if all((known(node.target) or op_name(node.target) in TRANSLATIONS) and not writes(node) for node in nodes):
        program.run_decompositions = lambda *_: program  # type: ignore[method-assign, assignment]
    return program


@functools.cache
def _known() -> Callable[[Any], bool]:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # where it lies is the exporter's own business: then it decomposes as ever
        return lambda target: False
    return ONNXRegistry.from_torchlib().is_registered


@contextlib.contextmanager
def quick_rules() -> Iterator[None]:
    """The optimiser's rule for pairs of slices looks at slices only; left alone, it tries all pairs at every node."""
    try:
        from onnxscript.rewriter.rules.common import slice_split_rule as rule
    except ImportError:
        yield
        return
    tried = rule.try_rewrite

    def at_slices(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        return tried(model, graph, node, **options) if node.op_type == "Slice" else None

    rule.try_rewrite = at_slices
    try:
        yield
    finally:
        del rule.try_rewrite


def divided(model: onnx_ir.Model) -> None:
    """``x * (1 / y)`` becomes ``x / y``, in place: in a root mean square norm onnxruntime fuses the second only."""
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    rule = RewriteRule(lambda op, x, y: op.Mul(x, op.Reciprocal(y)), lambda op, x, y, **_: op.Div(x, y))
    RewriteRuleSet([rule], commute=True).apply_to_model(model)
