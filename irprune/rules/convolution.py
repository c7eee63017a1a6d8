"""Convolutions, pooling and resampling: channels pass, places in space stay."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from irprune.ir.dims import Size, Term, quotient
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value, sizes
from irprune.rules.registry import resize, rule

if TYPE_CHECKING:
    from irprune.backend.rewrite import Resize


def spatial(op: Op, *axes: Term) -> None:
    for term in axes:
        op.freeze(term, "spatial", "it is a place in space or time")


def places(op: Op, shape: tuple[Size, ...]) -> Axes:
    return tuple(op.solid(size, "spatial", "it is a place in space or time") for size in shape)


def _product(*axes: Term) -> Term:
    return tuple(atom for term in axes for atom in term)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(op: Op, input: Value, weight: Value, bias: Value | None = None, groups: int = 1, transposed: bool = False) -> Axes:
    """Cross-correlation.

    Shapes: x ``(N, G * i, *space)`` (``N`` may lack), weight ``(G * o, i, *kernel)``, bias and the
    result's channels ``G * o``. ``i`` is contracted within each of the ``G`` groups. Along an axis
    that the kernel reads one place of at a time, as a convolution of size 1 does, space passes.
    """
    if transposed:
        return transposed_convolution(op, input, weight, bias, groups)
    rank = weight.ndim - 2
    channel = input.ndim - rank - 1
    pointwise = _pointwise(op, weight, rank)
    space = input.axes[channel + 1 :]
    spatial(op, *weight.axes[2:], *(term for term, free in zip(space, pointwise, strict=True) if not free))
    through = zip(space, op.shape[channel + 1 :], pointwise, strict=True)
    after = tuple(term if free else places(op, (size,))[0] for term, size, free in through)
    out = _grouped(op, input.axes[channel], weight.axes[1], weight.axes[0], weight.shape[0], groups)
    op.contract(input, channel)
    op.contract(weight, 1)
    if bias is not None:
        op.unify(bias.axes[0], weight.axes[0])
    result = (*input.axes[:channel], out, *after)
    op.macs(_product(*result, *weight.axes[1:]))
    return result


def _pointwise(op: Op, weight: Value, rank: int) -> list[bool]:
    """Along which axes of space each place of the result is made of the same place of the input."""
    padding = op.argument("padding")
    steps = [_spread(op.argument("stride"), rank), _spread(0 if isinstance(padding, str) else padding, rank)]
    return [kernel == 1 and stride == 1 and pad == 0 for kernel, stride, pad in zip(weight.shape[2:], *steps, strict=True)]


def _spread(value: Any, rank: int) -> list[Any]:
    """One number for each axis of space."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    return found * rank if len(found) == 1 else found


def _grouped(op: Op, channels: Term, inner: Term, outer: Term, size: Size, groups: int) -> Term:
    """Tie ``channels = G * inner`` and ``outer = G * o``; note ``G``."""
    if groups == 1:
        op.unify(channels, inner)
        return outer
    each = quotient(size, groups)
    parts = op.factor(outer, each) if each is not None else None
    if parts is None:
        for term in (channels, inner, outer):
            op.freeze(term, "misaligned", "the groups of a convolution cut across its factors")
        return outer
    op.note("groups", parts[0])
    op.unify(channels, (*parts[0], *inner))
    return outer


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(op: Op, input: Value, weight: Value, bias: Value | None = None, groups: int = 1) -> Axes:
    """Shapes: x ``(N, G * i, *space)``, weight ``(G * i, o, *kernel)``, result channels ``G * o``."""
    rank = weight.ndim - 2
    channel = input.ndim - rank - 1
    spatial(op, *weight.axes[2:], *input.axes[channel + 1 :])
    op.unify(input.axes[channel], weight.axes[0])
    op.contract(input, channel)
    op.contract(weight, 0)
    out = weight.axes[1]
    if groups > 1:
        each = quotient(weight.shape[0], groups)
        parts = op.factor(weight.axes[0], each) if each is not None else None
        if parts is None:
            op.freeze(weight.axes[0], "misaligned", "the groups of a convolution cut across its factors")
            out = (*op.solid(groups, "misaligned", "the groups of a convolution cut across its factors"), *weight.axes[1])
        else:
            op.note("groups", parts[0])
            out = (*parts[0], *weight.axes[1])
    if bias is not None:
        op.unify(bias.axes[0], out)
    op.macs(_product(*input.axes, *weight.axes[1:]))
    return (*input.axes[:channel], out, *places(op, op.shape[channel + 1 :]))


@resize("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def resize_convolution(rw: Resize, groups: Any = 1, **_: Any) -> None:
    if groups != 1:
        rw.set("groups", rw.kept("groups", groups))


POOLS = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
_adaptive_avg_pool2d _adaptive_avg_pool3d max_pool1d_with_indices max_pool3d_with_indices
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa _upsample_lanczos2d_aa
"""


@rule(*POOLS.split())
def pool(op: Op, **_: Any) -> Any:
    """Channels pass; as many trailing axes as the operation's name says are space."""
    operand = op.first()
    rank = int(re.findall(r"[123](?=d)", op.name)[0])
    lead = operand.ndim - rank
    spatial(op, *operand.axes[lead:])
    found = [(*operand.axes[:lead], *places(op, sizes(result)[lead:])) for result in op.results]
    return found if len(found) > 1 else found[0]


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def fractional_pool(op: Op, self: Value, random_samples: Value) -> Any:
    """Pooling over windows that samples ``(N, C, rank)`` place."""
    channel = self.ndim - random_samples.shape[-1] - 1
    op.unify(self.axes[channel], random_samples.axes[1])
    if channel:
        op.unify(self.axes[0], random_samples.axes[0])
    return pool(op)


@rule("max_unpool2d", "max_unpool3d")
def unpool(op: Op, self: Value, indices: Value) -> Axes:
    """The places in ``indices`` are counted in space alone: channels pass."""
    lead = self.ndim - (2 if op.name.endswith("2d") else 3)
    spatial(op, *self.axes[lead:], *indices.axes[lead:])
    return (*op.broadcast(self.axes[:lead], indices.axes[:lead]), *places(op, op.shape[lead:]))


@rule("affine_grid_generator")
def affine_grid(op: Op, theta: Value) -> Axes:
    """theta ``(N, rank, rank + 1)``, result ``(N, *space, rank)``."""
    spatial(op, *theta.axes[1:])
    return (theta.axes[0], *places(op, op.shape[1:]))


@rule("im2col")
def im2col(op: Op, self: Value) -> Axes:
    """``(N, C, H, W)`` to ``(N, C * k, places)``."""
    spatial(op, *self.axes[-2:])
    each = quotient(op.shape[-2], self.shape[-3])
    kernel = places(op, (each,))[0] if each is not None else ()
    return (*self.axes[:-3], (*self.axes[-3], *kernel), *places(op, op.shape[-1:]))


@rule("col2im")
def col2im(op: Op, self: Value) -> Axes:
    """``(N, C * k, places)`` to ``(N, C, H, W)``."""
    spatial(op, self.axes[-1])
    each = quotient(self.shape[-2], op.shape[-3])
    parts = op.factor(self.axes[-2], each) if each is not None else None
    if parts is None:
        op.freeze(self.axes[-2], "misaligned", "the kernel cuts across its factors")
        return (*self.axes[:-2], *places(op, op.shape[-3:]))
    spatial(op, parts[1])
    return (*self.axes[:-2], parts[0], *places(op, op.shape[-2:]))


@rule("unfold")
def unfold(op: Op, self: Value, dimension: int) -> Axes:
    """Sliding windows over one axis: ``(*, windows, *, size)``."""
    at = dimension % self.ndim
    spatial(op, self.axes[at])
    windows, width = places(op, (op.shape[at], op.shape[-1]))
    return (*self.axes[:at], windows, *self.axes[at + 1 :], width)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(op: Op, input: Value, grid: Value) -> Axes:
    spatial(op, *input.axes[2:], *grid.axes[1:])
    op.unify(input.axes[0], grid.axes[0])
    return (*input.axes[:2], *places(op, op.shape[2:]))
