"""Look-ups: the indexed axis stays whole, the rest passes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from irprune.ir.dims import UNIT, Term
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value, sizes
from irprune.rules.registry import resize, rule

if TYPE_CHECKING:
    from irprune.backend.rewrite import Resize

LOOKED_UP = "its rows are looked up by index"


@rule("embedding")
def embedding(op: Op, weight: Value, indices: Value) -> Axes:
    """``weight[indices]``: weight ``(rows, width)``, result ``(*indices, width)``."""
    op.freeze(weight.axes[0], "data-dependent", LOOKED_UP)
    return (*indices.axes, weight.axes[1])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(op: Op, weight: Value, indices: Value, per_sample_weights: Value | None = None) -> Any:
    """Sums or means of rows: only the width passes."""
    operands = [value for value in op.operands() if value.node is not weight.node]
    op.freeze(weight.axes[0], "data-dependent", LOOKED_UP)
    for value in operands:
        for term in value.axes:
            op.freeze(term, "data-dependent", "it is a bag of indices")
    first = (op.solid(op.shape[0], "data-dependent", "it counts bags"), weight.axes[1])
    if len(op.results) == 1:
        return first
    return [first, *(tuple(op.solid(s, "data-dependent", "it counts bags") for s in sizes(r)) for r in op.results[1:])]


@rule("index", "_unsafe_index")
def index(op: Op, self: Value, indices: list[Value | None]) -> Axes:
    """``self[i, :, j]``: indexed axes are frozen; index tensors are broadcast together.

    Their axes stand where the indexed axes stood if those are neighbours, else in front.
    """
    at = [i for i, tensor in enumerate(indices) if tensor is not None]
    if any(tensor is not None and str(tensor.dtype) in ("torch.bool", "torch.uint8") for tensor in indices):
        for term in self.axes:
            op.freeze(term, "data-dependent", "a mask selects from it")
        return tuple(op.solid(size, "data-dependent", "a mask selects it") for size in op.shape)
    chosen = _chosen(op, self, at[0], indices[at[0]]) if len(at) == 1 else None
    if chosen is not None:
        return (*self.axes[: at[0]], chosen, *self.axes[at[0] + 1 :])
    for i in at:
        op.freeze(self.axes[i], "data-dependent", LOOKED_UP)
    return _indexed(op, self, indices, at)


def _chosen(op: Op, self: Value, dim: int, index: Value | None) -> Term | None:
    """The axis that an index of known contents makes of an axis that may be pruned."""
    found = op.constant(index) if index is not None and index.ndim == 1 else None
    size = self.shape[dim]
    return None if found is None or not isinstance(size, int) else op.pick(self, dim, [int(i) % size for i in found])


def _indexed(op: Op, self: Value, indices: list[Value | None], at: list[int]) -> Axes:
    joint = op.broadcast(*(tensor.axes for tensor in indices if tensor is not None))
    rest = [(i, term) for i, term in enumerate(self.axes) if i not in at]
    if at == list(range(at[0], at[-1] + 1)):
        return (*(t for i, t in rest if i < at[0]), *joint, *(t for i, t in rest if i > at[-1]))
    return (*joint, *(term for _, term in rest))


@rule("index_select")
def index_select(op: Op, self: Value, dim: int, index: Value) -> Axes:
    axes = list(self.axes)
    chosen = _chosen(op, self, dim, index)
    if chosen is None:
        op.freeze(axes[dim], "data-dependent", LOOKED_UP)
        chosen = index.axes[0] if index.ndim else UNIT
    axes[dim] = chosen
    return tuple(axes)


@resize("index", "_unsafe_index", "index_select")
def resize_chosen(rw: Resize, **_: Any) -> None:
    """What is left of chosen positions has other numbers."""
    rw.repick()


@rule("gather")
def gather(op: Op, self: Value, dim: int, index: Value) -> Axes:
    """``self[..., index, ...]`` along ``dim``; elsewhere both have the same positions."""
    _along(op, self, dim, index)
    return index.axes


def _along(op: Op, value: Value, dim: int, other: Value) -> None:
    for i in range(value.ndim):
        if i == dim % value.ndim:
            op.freeze(value.axes[i], "data-dependent", LOOKED_UP)
        elif value.shape[i] == other.shape[i]:
            op.unify(value.axes[i], other.axes[i])
        else:
            op.freeze(value.axes[i], "position", "only its first positions are read")
            op.freeze(other.axes[i], "position", "it matches the first positions of a longer axis")


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(op: Op, self: Value, dim: int, index: Value, src: Any = None) -> Axes:
    """Writes along ``dim`` go to computed positions."""
    _along(op, self, dim, index)
    op.freeze(index.axes[dim], "data-dependent", LOOKED_UP)
    if isinstance(src, Value):
        for i in range(src.ndim):
            if src.shape[i] == index.shape[i]:
                op.unify(src.axes[i], index.axes[i])
            else:
                op.freeze(src.axes[i], "position", "only its first positions are read")
                op.freeze(index.axes[i], "position", "it matches the first positions of a longer axis")
    return self.axes


@rule("index_add", "index_copy", "index_fill")
def index_add(op: Op, self: Value, dim: int, index: Value, source: Any = None) -> Axes:
    op.freeze(self.axes[dim], "data-dependent", LOOKED_UP)
    for term in index.axes:
        op.freeze(term, "data-dependent", LOOKED_UP)
    if isinstance(source, Value):
        for i in range(self.ndim):
            if i == dim % self.ndim:
                op.freeze(source.axes[i], "data-dependent", LOOKED_UP)
            else:
                op.broadcast((self.axes[i],), (source.axes[i],))
    return self.axes


@rule("index_put", "_index_put_impl_", "_unsafe_index_put")
def index_put(op: Op, self: Value, indices: list[Value | None], values: Value) -> Axes:
    """``self[i, :, j] = values``: as :func:`index`, written instead of read."""
    at = [i for i, tensor in enumerate(indices) if tensor is not None]
    if any(tensor is not None and str(tensor.dtype) in ("torch.bool", "torch.uint8") for tensor in indices):
        for value in op.operands():
            for term in value.axes:
                op.freeze(term, "data-dependent", "a mask selects from it")
        return self.axes
    for i in at:
        op.freeze(self.axes[i], "data-dependent", LOOKED_UP)
    target = _indexed(op, self, indices, at)
    op.broadcast(target, values.axes)
    return self.axes


@rule("sort", "topk", "argsort", "msort", "unique_dim")
def ordered(op: Op, self: Value, dim: int = -1) -> Any:
    """The axis is put in an order that its contents decide."""
    out = list(self.axes)
    dim = 0 if "msort" in op.name else dim
    if self.ndim:
        op.freeze(out[dim], "data-dependent", "its positions are ordered by their contents")
        out[dim] = op.solid(op.shape[dim], "data-dependent", "its positions are ordered by their contents")
    return [tuple(out)] * len(op.results) if len(op.results) > 1 else tuple(out)


@rule("one_hot")
def one_hot(op: Op, self: Value) -> Axes:
    return (*self.axes, op.solid(op.shape[-1], "data-dependent", LOOKED_UP))


@rule("isin", "nonzero", "masked_select", "bincount", "histc", "_unique2")
def computed(op: Op, **_: Any) -> Any:
    """The result's shape or values depend on all contents."""
    for value in op.operands():
        for term in value.axes:
            op.freeze(term, "data-dependent", "a result is computed from all its contents")
    found = [tuple(op.solid(s, "data-dependent", "its positions depend on contents") for s in sizes(r)) for r in op.results]
    return found if len(found) > 1 else found[0]
