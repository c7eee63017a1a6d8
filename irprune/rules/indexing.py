"""Look-ups: the indexed axis stays whole, the rest passes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from irprune.ir.dims import UNIT, Term, resolve, term_size
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value, sizes
from irprune.rules.registry import renormalise, resize, rule

if TYPE_CHECKING:
    from irprune.backend.proof import Keep
    from irprune.backend.rewrite import Resize

LOOKED_UP = "its rows are looked up by index"


@rule("embedding")
def embedding(op: Op, weight: Value, indices: Value) -> Axes:
    """``weight[indices]``: weight ``(rows, width)``, result ``(*indices, width)``."""
    op.look_up(weight, 0, LOOKED_UP)
    return (*indices.axes, weight.axes[1])


@resize("embedding")
def resize_embedding(rw: Resize, padding_idx: int = -1, **_: Any) -> None:
    """The row that gets no gradient may have moved or gone."""
    if padding_idx >= 0:
        gone = rw.position("weight", 0, padding_idx + 1) == rw.position("weight", 0, padding_idx)
        rw.set("padding_idx", -1 if gone else rw.position("weight", 0, padding_idx))


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
    if any(_is_mask(tensor) for tensor in indices):
        return _selected(op, self, indices)
    chosen = _chosen(op, self, at[0], indices[at[0]]) if len(at) == 1 else None
    if chosen is not None:
        return (*self.axes[: at[0]], chosen, *self.axes[at[0] + 1 :])
    for i in at:
        _looked_up(op, self.axes[i], indices[i])
    return _indexed(op, self, indices, at)


def _is_mask(index: Value | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _spanned(op: Op, self: Value, indices: list[Value | None]) -> tuple[int, int]:
    """The axes that a mask spans, first and past the last: positions of them are selected together. All, if it is not alone."""
    given = [(i, tensor) for i, tensor in enumerate(indices) if tensor is not None]
    first, last = (given[0][0], given[0][0] + given[0][1].ndim) if len(given) == 1 else (0, self.ndim)
    for term in (*self.axes[first:last], *(term for _, tensor in given for term in tensor.axes)):
        op.freeze(term, "data-dependent", "a mask selects from it")
    return first, last


def _selected(op: Op, self: Value, indices: list[Value | None]) -> Axes:
    """What a mask selects: the axes that it spans become one, those beside it pass."""
    first, last = _spanned(op, self, indices)
    count = len(op.shape) - self.ndim + last - first
    chosen = (op.solid(size, "data-dependent", "a mask selects it") for size in op.shape[first : first + count])
    return (*self.axes[:first], *chosen, *self.axes[last:])


def _looked_up(op: Op, term: Term, index: Value | None) -> None:
    """An axis that is indexed stays whole, unless the numbers are known to be positions along it."""
    own = op.pointed(index)
    if own is None:
        op.freeze(term, "data-dependent", LOOKED_UP)
    else:
        op.unify(own, term)
        op.note("chosen", own)


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


@rule("take_along_dim")
def take_along_dim(op: Op, self: Value, indices: Value, dim: int | None = None) -> Axes:
    """As :func:`gather`, but the other axes are broadcast."""
    if dim is None:
        for term in self.axes:
            op.freeze(term, "data-dependent", LOOKED_UP)
        return (tuple(atom for term in indices.axes for atom in term),)
    at = dim % self.ndim
    pairs = [(a, b) for i, (a, b) in enumerate(zip(self.axes, indices.axes, strict=True)) if i != at]
    rest = [op.broadcast((a,), (b,))[0] for a, b in pairs]
    _looked_up(op, self.axes[at], indices)
    return (*rest[:at], indices.axes[at], *rest[at:])


@rule("take")
def take(op: Op, self: Value, index: Value) -> Axes:
    """Positions are counted through all axes."""
    for term in self.axes:
        op.freeze(term, "data-dependent", LOOKED_UP)
    return index.axes


def _along(op: Op, value: Value, dim: int, other: Value) -> None:
    for i in range(value.ndim):
        if i == dim % value.ndim:
            _looked_up(op, value.axes[i], other)
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
    if any(_is_mask(tensor) for tensor in indices):
        first, last = _spanned(op, self, indices)
        beside = self.ndim - last
        for term in (*self.axes[:first], *values.axes[: max(values.ndim - beside, 0)]):
            op.freeze(term, "data-dependent", "a mask selects where it goes")
        op.broadcast(self.axes[last:], values.axes[max(values.ndim - beside, 0) :])
        return self.axes
    for i in at:
        op.freeze(self.axes[i], "data-dependent", LOOKED_UP)
    target = _indexed(op, self, indices, at)
    op.broadcast(target, values.axes)
    return self.axes


@rule("masked_scatter")
def masked_scatter(op: Op, self: Value, mask: Value, source: Value) -> Axes:
    """Numbers of ``source`` go one after another to where the mask is true.

    A mask that is broadcast along the last axis takes whole rows: that axis passes, if it is the source's, too.
    """
    single = mask.ndim > 0 and mask.shape[-1] == 1
    rows = single or (mask.node.name, f"broadcast{mask.ndim - 1}") in op.types.notes
    last = 1 if rows and self.ndim == mask.ndim and source.ndim and source.shape[-1] == self.shape[-1] else 0
    if last:
        op.broadcast(self.axes[-1:], mask.axes[-1:])
        op.unify(self.axes[-1], source.axes[-1])
    for value in (self, mask, source):
        for term in value.axes[: value.ndim - last]:
            op.freeze(term, "data-dependent", "a mask selects from it")
    return self.axes


@rule("topk")
def topk(op: Op, self: Value, k: Any, dim: int = -1) -> list[Axes]:
    """The largest numbers along an axis and their places: what is gone is never among them."""
    if not self.ndim or not isinstance(k, int):
        return list(ordered(op, self, dim))
    op.mix(self, "topk", dim)
    op.need(self.axes[dim], k)
    op.points(1, self.axes[dim])
    at = dim % self.ndim
    ranks = op.solid(k, "data-dependent", "its positions are ordered by their contents")
    return [(*self.axes[:at], ranks, *self.axes[at + 1 :])] * 2


@renormalise("topk")
def masked_topk(keep: Keep, self: torch.Tensor, dim: int = -1, largest: bool = True, **_: Any) -> Any:
    worst = -torch.inf if largest else torch.inf
    if not self.dtype.is_floating_point:
        worst = torch.iinfo(self.dtype).min if largest else torch.iinfo(self.dtype).max
    return keep.call(self=self.masked_fill(~keep.mask("self", dim), worst))


@rule("sort", "argsort", "msort", "unique_dim")
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
    """A new axis of classes: of positions along an axis, that axis."""
    own = op.pointed(self)
    if own is not None and term_size(resolve(own)) == op.shape[-1]:
        op.note("classes", own)
        return (*self.axes, own)
    if own is not None:
        op.freeze(own, "data-dependent", LOOKED_UP)
    return (*self.axes, op.solid(op.shape[-1], "data-dependent", LOOKED_UP))


@resize("one_hot")
def resize_one_hot(rw: Resize, num_classes: int, **_: Any) -> None:
    if num_classes > 0:
        rw.set("num_classes", rw.kept("classes", num_classes))


@rule("histc")
def histogram(op: Op, self: Value, bins: int = 100, min: Any = 0, max: Any = 0) -> Axes:
    """How many numbers fall into each bin; of positions along an axis, one bin each, how often each was chosen."""
    own = op.pointed(self)
    for term in self.axes:
        op.freeze(term, "data-dependent", "a result is computed from all its contents")
    if own is not None and term_size(resolve(own)) == bins and (min, max) == (0, bins - 1):
        op.need(own, 2)  # of one bin the bounds would be equal, which means others
        op.note("classes", own)
        return (own,)
    if own is not None:
        op.freeze(own, "data-dependent", LOOKED_UP)
    return (op.solid(bins, "data-dependent", "its positions depend on contents"),)


@resize("histc")
def resize_histogram(rw: Resize, bins: int, **_: Any) -> None:
    count = rw.kept("classes", bins)
    rw.set("bins", count)
    rw.set("max", count - 1)


@rule("isin", "nonzero", "masked_select", "bincount", "_unique2")
def computed(op: Op, **_: Any) -> Any:
    """The result's shape or values depend on all contents."""
    for value in op.operands():
        for term in value.axes:
            op.freeze(term, "data-dependent", "a result is computed from all its contents")
    found = [tuple(op.solid(s, "data-dependent", "its positions depend on contents") for s in sizes(r)) for r in op.results]
    return found if len(found) > 1 else found[0]
