"""Operations that rearrange positions: reshape, permute, slice, concatenate, repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from irprune.ir.dims import UNIT, Size, Term, as_size, concat, quotient, resolve, term_size, variables
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value
from irprune.rules.registry import resize, rule

if TYPE_CHECKING:
    from irprune.backend.rewrite import Resize

END = 2**63 - 1
RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "view_copy", "_reshape_copy")


# -- regrouping ----------------------------------------------------------------------------------


def regroup(op: Op, axes: Axes, shape: Sequence[Size]) -> Axes:
    """Walk the factors of all axes, minor end first, against the wanted sizes.

    A variable is split where a wanted size cuts it. What does not line up is frozen.
    """
    rest: Term = tuple(atom for term in axes for atom in resolve(term))
    out: list[Term] = []
    for i in reversed(range(len(shape))):
        if i == 0 and shape[0] != 1 and term_size(rest) == shape[0]:
            out.append(resolve(rest))
            rest = UNIT
            continue
        parts = op.factor(rest, shape[i])
        if parts is None:
            op.freeze(rest, "misaligned", "a reshape cuts across its factors")
            solid = [op.solid(size, "misaligned", "a reshape cuts across its factors") for size in shape[: i + 1]]
            return (*solid, *reversed(out))
        rest, minor = parts
        out.append(minor)
    op.freeze(rest, "unit", "its single position is not an axis of the result")
    return tuple(reversed(out))


@rule(*RESHAPES)
def reshape(op: Op, self: Value, other: Value | None = None, dtype: torch.dtype | None = None) -> Axes:
    if other is not None:
        return _as(op, regroup(op, self.axes, op.shape), other)
    if dtype is None:
        return regroup(op, self.axes, op.shape)
    if op.shape == self.shape:
        return self.axes
    op.freeze(self.axes[-1], "position", "its bytes are read as another type")
    return (*self.axes[:-1], op.solid(op.shape[-1], "position", "its bytes were read as another type"))


def _as(op: Op, axes: Axes, other: Value) -> Axes:
    """The result takes its sizes from another value: they are the same axes."""
    for term, like in zip(axes, other.axes, strict=True):
        op.unify(term, like)
    return axes


@resize("view", "reshape", "_unsafe_view", "view_copy", "_reshape_copy")
def resize_reshape(rw: Resize, **arguments: Any) -> None:
    """Sizes follow the result's axes; ``view`` becomes ``reshape``, as strides may change."""
    if "dtype" in arguments:
        return
    name = "size" if "size" in arguments else "shape"
    rw.set(name, rw.sizes(arguments[name]))
    rw.retarget(torch.ops.aten.reshape.default, ("self", "shape"), {"self": arguments["self"], "shape": rw.get(name)})


@resize("unflatten")
def resize_unflatten(rw: Resize, dim: int, sizes: list[Any], **_: Any) -> None:
    first = dim % rw.operand_rank("self")
    rw.set("sizes", rw.sizes(sizes, first))


# -- reordering ----------------------------------------------------------------------------------


@rule("permute", "permute_copy")
def permute(op: Op, self: Value, dims: list[int]) -> Axes:
    return tuple(self.axes[d] for d in dims)


@rule("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(op: Op, self: Value) -> Axes:
    a, b = op.node.args[1:3] if len(op.node.args) > 2 else op.node.kwargs.values()
    axes = list(self.axes)
    if axes:
        assert isinstance(a, int)
        assert isinstance(b, int)
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule("t", "numpy_T", "mT", "mH", "adjoint", "matrix_H", "t_copy")
def reverse_axes(op: Op, self: Value) -> Axes:
    if self.ndim > 2 and "numpy_T" not in str(op.node.target):
        return (*self.axes[:-2], self.axes[-1], self.axes[-2])
    return tuple(reversed(self.axes))


@rule("movedim", "moveaxis")
def movedim(op: Op, self: Value) -> Axes:
    """The permutation is read off torch itself, on a tensor that has only a shape."""
    marker = torch.empty(tuple(range(2, 2 + self.ndim)), device="meta")
    assert callable(op.node.target)
    moved = op.node.target(marker, *op.node.args[1:], **op.node.kwargs)
    return tuple(self.axes[size - 2] for size in moved.shape)


@rule("view_as_complex")
def view_as_complex(op: Op, self: Value) -> Axes:
    """The last axis holds real and imaginary parts."""
    op.freeze(self.axes[-1], "position", "its positions are real and imaginary parts")
    return self.axes[:-1]


@rule("view_as_real")
def view_as_real(op: Op, self: Value) -> Axes:
    return (*self.axes, op.solid(2, "position", "its positions are real and imaginary parts"))


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(op: Op, self: Value, dim: int) -> Axes:
    axes = list(self.axes)
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, UNIT)
    return tuple(axes)


@rule("squeeze", "squeeze_copy")
def squeeze(op: Op, self: Value, dim: int | list[int] | None = None) -> Axes:
    if dim is None:
        chosen = set(range(self.ndim))
    else:
        chosen = {d % self.ndim for d in (dim if isinstance(dim, list) else [dim])} if self.ndim else set()
    for i in chosen:
        if self.shape[i] == 1:
            op.freeze(self.axes[i], "unit", "its single position is not an axis of the result")
    return tuple(term for i, term in enumerate(self.axes) if not (i in chosen and self.shape[i] == 1))


@resize("squeeze", "squeeze_copy")
def resize_squeeze(rw: Resize, dim: int | list[int] | None = None, **_: Any) -> None:
    """Name the axes that go: another one may have one index left."""
    rank = rw.operand_rank("self")
    chosen = range(rank) if dim is None else [d % rank for d in (dim if isinstance(dim, list) else [dim])]
    single = [d for d in chosen if rw.old_size("self", d) == 1]
    rw.retarget(torch.ops.aten.squeeze.dims, ("self", "dim"), {"self": rw.get("self"), "dim": single})


# -- broadcasting and repeating ------------------------------------------------------------------


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(op: Op, self: Value, other: Value | None = None) -> Axes:
    """A fresh variable per broadcast axis: this is what makes grouped-query attention work."""
    shape = op.shape
    new = len(shape) - self.ndim
    out = []
    for i, size in enumerate(shape):
        old = self.axes[i - new] if i >= new else UNIT
        grown = size != 1 and term_size(resolve(old)) == 1
        op.freeze(old if grown else UNIT, "unit", "a single position is broadcast")
        term = op.fresh(size) if grown else old
        if grown:
            op.note(f"broadcast{i}", term)
        out.append(term)
    return tuple(out) if other is None else _as(op, tuple(out), other)


@resize("expand", "broadcast_to", "expand_copy")
def resize_expand(rw: Resize, size: list[Any], **_: Any) -> None:
    rw.set("size", rw.sizes(size))


@rule("broadcast_tensors")
def broadcast_tensors(op: Op, tensors: list[Value]) -> list[Axes]:
    """Every result has the axes that an elementwise operation on all of them would give."""
    return [op.broadcast(*(t.axes for t in tensors))] * len(tensors)


@rule("atleast_1d", "atleast_2d", "atleast_3d")
def atleast(op: Op) -> Any:
    """Single positions are added: in front, and for the third axis behind."""
    rank = int(op.name[-2])
    behind = {(1, 3): 1, (2, 3): 1}
    found = []
    for value in op.operands():
        after = behind.get((value.ndim, rank), 0)
        found.append((UNIT,) * max(rank - value.ndim - after, 0) + value.axes + (UNIT,) * after)
    return found if isinstance(op.node.meta.get("val"), list | tuple) else found[0]


@rule("repeat", "tile")
def repeat(op: Op, self: Value, repeats: list[int] | None = None, dims: list[int] | None = None) -> Axes:
    """Copies are the major factor: ``(times, axis)``."""
    times = list(repeats if repeats is not None else dims or [])
    rank = max(len(times), self.ndim)
    axes = (UNIT,) * (rank - self.ndim) + self.axes
    times = [1] * (rank - len(times)) + times
    out = []
    for i, (term, n) in enumerate(zip(axes, times, strict=True)):
        copies = op.fresh(n)
        op.note(f"times{i}", copies)
        out.append((*copies, *term))
    return tuple(out)


@resize("repeat", "tile")
def resize_repeat(rw: Resize, repeats: list[Any] | None = None, dims: list[Any] | None = None, **_: Any) -> None:
    name, times = ("repeats", repeats) if repeats is not None else ("dims", dims)
    assert times is not None
    shift = max(rw.operand_rank("self") - len(times), 0)
    rw.set(name, [n if isinstance(n, fx.Node) else rw.kept(f"times{i + shift}", n) for i, n in enumerate(times)])


@rule("repeat_interleave")
def repeat_interleave(op: Op, self: Value, repeats: Any, dim: int | None = None) -> Axes:
    """Copies are the minor factor: ``(axis, times)``. Only a constant count is understood."""
    if not isinstance(repeats, int):
        for term in self.axes:
            op.freeze(term, "data-dependent", "it is repeated a computed number of times")
        return tuple(op.solid(size, "data-dependent", "it is repeated a computed number of times") for size in op.shape)
    axes = self.axes if dim is not None else (tuple(atom for term in self.axes for atom in term),)
    at = (dim if dim is not None else 0) % len(axes)
    copies = op.fresh(repeats)
    op.note("times", copies)
    return (*axes[:at], (*axes[at], *copies), *axes[at + 1 :])


@resize("repeat_interleave")
def resize_repeat_interleave(rw: Resize, repeats: Any, output_size: Any = None, **_: Any) -> None:
    rw.set("repeats", rw.kept("times", repeats))
    if isinstance(output_size, int):
        rw.set("output_size", None)


# -- slicing -------------------------------------------------------------------------------------


def _bounds(start: Any, end: Any, size: int) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def cut(op: Op, term: Term, first: int, last: int, size: int) -> Term:
    """Positions ``[first, last)`` of an axis."""
    if last - first == size:
        return term
    if last <= first:
        return op.solid(0, "position", "an empty slice")
    spans = [n for n in (first, last - first, size - last) if n]
    blocks = op.pieces(term, spans)
    if blocks is None:
        return op.solid(last - first, "misaligned", "a slice cuts across its factors")
    return blocks[1 if first else 0]


@rule("slice", "slice_copy")
def slice_axis(op: Op, self: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Axes:
    axes = list(self.axes)
    size, wanted = self.shape[dim], op.shape[dim]
    term = axes[dim]
    if wanted == size:
        return self.axes
    if not all(isinstance(item, int | None) for item in (start, end, step)) or not isinstance(size, int):
        op.freeze(term, "position", "a slice with computed bounds reads it")
        axes[dim] = op.solid(wanted, "position", "a slice with computed bounds gives it")
        return tuple(axes)
    first, last = _bounds(start, end, size)
    if step == 1:
        axes[dim] = cut(op, term, first, last, size)
        return tuple(axes)
    parts = op.factor(term, step) if size % step == 0 and first < step and last > size - step + first else None
    chosen = op.pick(self, dim, range(first, last, step)) if parts is None else None
    if chosen is not None:
        axes[dim] = chosen
    elif parts is None:
        op.freeze(term, "position", "a slice with a step reads it")
        axes[dim] = op.solid(wanted, "position", "a slice with a step gives it")
    else:
        op.freeze(parts[1], "position", "a slice with a step picks one of its positions")
        axes[dim] = parts[0]
    return tuple(axes)


@resize("slice", "slice_copy")
def resize_slice(rw: Resize, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, **_: Any) -> None:
    """Bounds move with the positions before them; a step picks from a factor that stays whole."""
    if rw.repick():
        return
    if step != 1:
        size = rw.old_size("self", dim)
        if isinstance(end, int) and isinstance(size, int) and end < size:
            rw.set("end", END)
        return
    if isinstance(start, int):
        rw.set("start", rw.position("self", dim, start))
    if isinstance(end, int) and end != END:
        rw.set("end", rw.position("self", dim, end))


@rule("narrow", "narrow_copy")
def narrow(op: Op, self: Value, dim: int, start: Any, length: Any) -> Axes:
    axes = list(self.axes)
    size = self.shape[dim]
    if isinstance(start, int) and isinstance(length, int) and isinstance(size, int):
        first = start % size if start < 0 else start
        axes[dim] = cut(op, axes[dim], first, first + length, size)
    else:
        op.freeze(axes[dim], "position", "a slice with computed bounds reads it")
        axes[dim] = op.solid(op.shape[dim], "position", "a slice with computed bounds gives it")
    return tuple(axes)


@resize("narrow", "narrow_copy")
def resize_narrow(rw: Resize, dim: int, start: Any, length: Any, **_: Any) -> None:
    if isinstance(start, int) and isinstance(length, int):
        first = rw.position("self", dim, start)
        size = rw.old_size("self", dim)
        assert isinstance(size, int)
        begin = start % size if start < 0 else start
        rw.set("start", first)
        rw.set("length", rw.position("self", dim, begin + length) - first)


@rule("select", "select_copy")
def select(op: Op, self: Value, dim: int, index: Any) -> Axes:
    """A single position is read. Of contents that are the same everywhere it does not matter which one."""
    if op.uniform(self):
        op.note("any", self.axes[dim])
    else:
        op.freeze(self.axes[dim], "position", "a single position of it is read")
    at = dim % self.ndim
    return (*self.axes[:at], *self.axes[at + 1 :])


@resize("select", "select_copy")
def resize_select(rw: Resize, dim: int, **_: Any) -> None:
    if rw.shrinks("self", dim):
        rw.set("index", 0)


@rule("slice_scatter")
def slice_scatter(op: Op, self: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Axes:
    """``self`` with a block of an axis put in its place: as :func:`slice_axis`, written instead of read."""
    at = dim % self.ndim
    op.broadcast((*self.axes[:at], *self.axes[at + 1 :]), (*src.axes[:at], *src.axes[at + 1 :]))
    size = self.shape[at]
    if step == 1 and all(isinstance(item, int | None) for item in (start, end)) and isinstance(size, int):
        first, last = _bounds(start, end, size)
        op.unify(cut(op, self.axes[at], first, last, size), src.axes[at])
    else:
        for term in (self.axes[at], src.axes[at]):
            op.freeze(term, "position", "a slice with a step or computed bounds is written")
    return self.axes


@resize("slice_scatter")
def resize_slice_scatter(rw: Resize, step: Any = 1, **arguments: Any) -> None:
    if step == 1:
        resize_slice(rw, **arguments)


@rule("select_scatter")
def select_scatter(op: Op, self: Value, src: Value, dim: int, index: Any) -> Axes:
    """``self`` with a single position of an axis written."""
    at = dim % self.ndim
    op.freeze(self.axes[at], "position", "a single position of it is written")
    op.broadcast((*self.axes[:at], *self.axes[at + 1 :]), src.axes)
    return self.axes


@rule("unbind", "unbind_copy")
def unbind(op: Op, self: Value, dim: int = 0) -> list[Axes]:
    op.freeze(self.axes[dim], "position", "its positions are told apart")
    at = dim % self.ndim
    return [(*self.axes[:at], *self.axes[at + 1 :])] * len(op.results)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy", "unsafe_split_with_sizes")
def split(op: Op, self: Value, dim: int = 0) -> list[Axes]:
    """Consecutive blocks, of the sizes that the trace gave."""
    lengths = [as_size(result.shape[dim]) for result in op.results]
    known = [n for n in lengths if isinstance(n, int)]
    blocks = op.pieces(self.axes[dim], [n for n in known if n]) if len(known) == len(lengths) else None
    if blocks is None:
        op.freeze(self.axes[dim], "misaligned", "a split cuts across its factors")
    at = dim % self.ndim
    rest = iter(blocks or ())
    out = []
    for length in lengths:
        if blocks is None or length == 0:
            block = op.solid(length, "misaligned", "a split cuts across its factors")
        else:
            block = next(rest)
        out.append((*self.axes[:at], block, *self.axes[at + 1 :]))
    return out


@resize("split", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_with_sizes", "split_copy", "unsafe_split_with_sizes")
def resize_split(rw: Resize, dim: int = 0, **_: Any) -> None:
    """All splits of an axis that shrinks become ``split_with_sizes`` of the kept sizes."""
    if not rw.shrinks("self", dim):
        return
    lengths = [rw.result_size(dim, i) for i in range(rw.result_count)]
    arguments = {"self": rw.get("self"), "split_sizes": lengths, "dim": dim}
    rw.retarget(torch.ops.aten.split_with_sizes.default, ("self", "split_sizes", "dim"), arguments)


@rule("hsplit", "vsplit", "dsplit")
def split_along(op: Op, self: Value) -> list[Axes]:
    """:func:`split` along the axis that the operation's name stands for."""
    return split(op, self, _along(op.node.target, self.ndim))


def _along(target: Any, ndim: int) -> int:
    """``h`` is axis 1 (0 of a vector), ``v`` axis 0, ``d`` axis 2; ``r`` stacks rows and ``c`` columns."""
    return {"h": min(1, ndim - 1), "v": 0, "d": 2, "r": 0, "c": 1}[target.__name__[0]]


@resize("hsplit", "vsplit", "dsplit")
def resize_split_along(rw: Resize, **_: Any) -> None:
    resize_split(rw, _along(rw.target, rw.operand_rank("self")))


# -- joining -------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(op: Op, tensors: list[Value], dim: int = 0, axis: int | None = None) -> Axes:
    dim = dim if axis is None else axis
    parts = [t for t in tensors if not (t.ndim == 1 and t.shape[0] == 0 and len(op.shape) > 1)]
    at = dim % len(op.shape)
    joined = [t.axes[at] for t in parts]
    out = op.broadcast(*((*t.axes[:at], UNIT, *t.axes[at + 1 :]) for t in parts))
    if all(isinstance(t.shape[at], int) for t in parts):
        term = concat(joined)
    elif len(parts) == 1:
        term = joined[0]
    else:
        for part in joined:
            op.freeze(part, "symbolic", "it is concatenated with an axis of dynamic size")
        term = op.solid(op.shape[at], "symbolic", "it is concatenated with an axis of dynamic size")
    return (*out[:at], term, *out[at + 1 :])


@rule("hstack", "vstack", "dstack", "row_stack", "column_stack")
def cat_along(op: Op, tensors: list[Value]) -> Axes:
    """:func:`cat` along the axis that the operation's name stands for; operands that gain an axis for it are frozen."""
    rank = len(op.shape)
    if all(t.ndim == rank for t in tensors):
        return cat(op, tensors, _along(op.node.target, rank))
    for t in tensors:
        for term in t.axes:
            op.freeze(term, "position", "it is stacked along a new axis")
    return tuple(op.solid(size, "position", "it is stacked along a new axis") for size in op.shape)


@rule("stack")
def stack(op: Op, tensors: list[Value], dim: int = 0) -> Axes:
    at = dim % len(op.shape)
    out = op.broadcast(*(t.axes for t in tensors))
    new = UNIT if len(tensors) == 1 else op.solid(len(tensors), "position", "its positions are the stacked tensors")
    return (*out[:at], new, *out[at:])


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d")
def pad(op: Op, self: Value, pad: list[Any] | None = None, padding: list[Any] | None = None, mode: str | None = None) -> Axes:
    """A constant pad adds blocks of free positions before and after; other modes read positions."""
    amounts = pad if pad is not None else padding or []
    constant = op.name.startswith("constant") or (mode or "") == "constant"
    axes = list(self.axes)
    for i in range(len(amounts) // 2):
        at = self.ndim - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        if before == 0 and after == 0:
            continue
        size = self.shape[at]
        term = axes[at]
        fixed = all(var.frozen for var in variables(resolve(term)))
        if not all(isinstance(n, int) for n in (before, after, size)) or not constant or before < 0 or after < 0 or fixed:
            op.freeze(term, "position", "it is padded")
            axes[at] = op.solid(op.shape[at], "position", "it is padded")
            continue
        blocks = [op.types.dims.block(n) if n else UNIT for n in (before, after)]
        op.note(f"before{at}", blocks[0])
        op.note(f"after{at}", blocks[1])
        axes[at] = concat([*([blocks[0]] if before else []), term, *([blocks[1]] if after else [])])
    return tuple(axes)


@resize("pad", "constant_pad_nd")
def resize_pad(rw: Resize, pad: list[Any], **_: Any) -> None:
    rank = rw.operand_rank("self")
    new = list(pad)
    for i in range(len(pad) // 2):
        at = rank - 1 - i
        for j, side in enumerate(("before", "after")):
            if isinstance(pad[2 * i + j], int) and pad[2 * i + j] > 0:
                new[2 * i + j] = rw.kept(f"{side}{at}", pad[2 * i + j])
    rw.set("pad", new)


@rule("roll")
def roll(op: Op, self: Value, shifts: list[Any], dims: list[int]) -> Axes:
    """Positions move cyclically: two blocks change places."""
    axes = list(self.axes)
    for shift, dim in zip(shifts if isinstance(shifts, list) else [shifts], dims if isinstance(dims, list) else [dims], strict=False):
        size = self.shape[dim]
        if not isinstance(size, int) or not isinstance(shift, int):
            continue
        shift %= size
        if shift == 0:
            continue
        if all(var.frozen for var in variables(resolve(axes[dim]))):
            continue
        blocks = op.pieces(axes[dim], [size - shift, shift])
        axes[dim] = axes[dim] if blocks is None else concat([blocks[1], blocks[0]])
    if not dims:
        for term in self.axes:
            op.freeze(term, "position", "it is rolled together with other axes")
    return tuple(axes)


@resize("roll")
def resize_roll(rw: Resize, shifts: list[Any], dims: list[int], **_: Any) -> None:
    new = []
    for shift, dim in zip(shifts if isinstance(shifts, list) else [shifts], dims if isinstance(dims, list) else [dims], strict=False):
        size = rw.old_size("self", dim)
        if isinstance(size, int) and isinstance(shift, int):
            new.append(rw.position("self", dim, size) - rw.position("self", dim, size - shift % size))
        else:
            new.append(shift)
    rw.set("shifts", new)


@rule("flip")
def flip(op: Op, self: Value, dims: list[int]) -> Axes:
    """The order of positions is reversed, which needs them one by one."""
    axes = list(self.axes)
    for dim in dims:
        axes[dim] = permuted(op, axes[dim], range(int(self.shape[dim]) - 1, -1, -1)) if isinstance(self.shape[dim], int) else axes[dim]
    return tuple(axes)


@rule("fliplr", "flipud")
def flip_along(op: Op, self: Value) -> Axes:
    return flip(op, self, [1 if op.name == "fliplr" else 0])


@rule("rot90")
def rot90(op: Op, self: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Axes:
    """Quarter turns: one axis is flipped for a single turn, and both change places; both are flipped for two."""
    a, b = (d % self.ndim for d in dims)
    axes = list(flip(op, self, [[], [b], [a, b], [a]][k % 4]))
    if k % 2:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule("fft_fftshift", "fft_ifftshift")
def fftshift(op: Op, self: Value, dim: Any = None) -> Axes:
    """The halves of an axis change places; of an odd one, the middle position goes with the first or the second half."""
    dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    for d in dims:
        op.freeze(self.axes[d], "position", "its halves change places")
    return self.axes


def permuted(op: Op, term: Term, order: Sequence[int]) -> Term:
    """The axis made of single positions of ``term`` in the given order (repetitions allowed)."""
    if all(var.frozen for var in variables(resolve(term))):
        return op.solid(len(order), "position", "its positions come from an axis that stays whole")
    units = op.unroll(term)
    if units is None:
        op.freeze(term, "misaligned", "its positions cannot be told apart")
        return op.solid(len(order), "misaligned", "its positions cannot be told apart")
    return concat(units[i] for i in order)


# -- factories -----------------------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def uniform(op: Op) -> Axes:
    """All positions are alike: free axes."""
    return tuple(op.fresh(size) for size in op.shape)


@resize("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def resize_factory(rw: Resize, size: list[Any], **_: Any) -> None:
    rw.set("size", rw.sizes(size))


@rule("zeros_like", "ones_like", "empty_like", "full_like")
def like(op: Op, self: Value) -> Axes:
    return self.axes


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "logspace", "hann_window", "hamming_window", "bartlett_window")
@rule("blackman_window", "kaiser_window", "fft_fftfreq", "fft_rfftfreq")
def positional(op: Op) -> Axes:
    """The contents depend on the position."""
    return tuple(op.solid(size, "position", "its contents depend on the position") for size in op.shape)


@rule("tril", "triu", "diagonal", "diag_embed", "diag", "trace", "diagonal_copy", "diff", "searchsorted", "bucketize")
def position_dependent(op: Op, self: Value) -> Axes:
    """The last two axes (for ``diff``: its axis) are read by position."""
    name = op.name
    if name.startswith("diff"):
        at = op.argument("dim") % self.ndim
        op.freeze(self.axes[at], "position", "neighbouring positions of it are subtracted")
        end = op.solid(op.shape[at], "position", "neighbouring positions are subtracted")
        return (*self.axes[:at], end, *self.axes[at + 1 :])
    if name.startswith(("tril", "triu")):
        for term in self.axes[-2:]:
            op.freeze(term, "position", "a triangle of it is read")
        return self.axes
    for term in self.axes:
        op.freeze(term, "position", "its positions are told apart")
    return tuple(op.solid(size, "position", "its positions are told apart") for size in op.shape)


@rule("meshgrid")
def meshgrid(op: Op, tensors: list[Value]) -> list[Axes]:
    """Each tensor gives one axis of every result."""
    terms = [t.axes[0] if t.ndim else UNIT for t in tensors]
    indexing = op.node.kwargs.get("indexing", op.node.args[1] if len(op.node.args) > 1 else "ij")
    if indexing == "xy" and len(terms) > 1:
        terms[0], terms[1] = terms[1], terms[0]
    return [tuple(terms)] * len(op.results)


@rule("pixel_shuffle")
def pixel_shuffle(op: Op, self: Value, upscale_factor: int) -> Axes:
    """``(C * r * r, H, W)`` to ``(C, H * r, W * r)``."""
    r = upscale_factor
    channels = op.factor(self.axes[-3], r * r)
    if channels is None:
        op.freeze(self.axes[-3], "misaligned", "a pixel shuffle cuts across its factors")
        return (*self.axes[:-3], *(op.solid(size, "misaligned", "a pixel shuffle gives it") for size in op.shape[-3:]))
    op.freeze(channels[1], "position", "its positions become neighbours in space")
    return (*self.axes[:-3], channels[0], *(op.solid(size, "spatial", "it is a place in space") for size in op.shape[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(op: Op, self: Value, downscale_factor: int) -> Axes:
    """``(C, H * r, W * r)`` to ``(C * r * r, H, W)``."""
    for term in self.axes[-2:]:
        op.freeze(term, "spatial", "it is a place in space")
    places = op.solid(downscale_factor * downscale_factor, "position", "its positions were neighbours in space")
    spatial = (op.solid(size, "spatial", "it is a place in space") for size in op.shape[-2:])
    return (*self.axes[:-3], (*self.axes[-3], *places), *spatial)


@rule("channel_shuffle")
def channel_shuffle(op: Op, self: Value, groups: int) -> Axes:
    """``(g, c)`` to ``(c, g)`` along axis 1."""
    size = self.shape[1]
    each = quotient(size, groups)
    parts = op.factor(self.axes[1], each) if each is not None else None
    if parts is None:
        op.freeze(self.axes[1], "misaligned", "a channel shuffle cuts across its factors")
        return (self.axes[0], op.solid(size, "misaligned", "a channel shuffle gives it"), *self.axes[2:])
    op.note("groups", parts[0])
    return (self.axes[0], (*parts[1], *parts[0]), *self.axes[2:])


@resize("channel_shuffle")
def resize_channel_shuffle(rw: Resize, groups: int, **_: Any) -> None:
    rw.set("groups", rw.kept("groups", groups))
