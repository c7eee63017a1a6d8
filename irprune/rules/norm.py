"""Normalisation layers and softmax: normalised axes are mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from irprune.ir.dims import quotient
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value, sizes
from irprune.rules.registry import renormalise, resize, rule

if TYPE_CHECKING:
    from irprune.backend.proof import Keep
    from irprune.backend.rewrite import Resize


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: Op, input: Value, normalized_shape: list[int], weight: Value | None = None, bias: Value | None = None) -> Any:
    """Normalise the last axes to mean 0 and variance 1 (RMS: mean square 1), then scale and shift."""
    last = range(-len(normalized_shape), 0)
    for affine in (weight, bias):
        if affine is not None:
            op.broadcast(input.axes[-len(normalized_shape) :], affine.axes)
    op.mix(input, "norm", *last)
    if len(op.results) == 1:
        return input.axes
    statistics = (*input.axes[: -len(normalized_shape)], *(() for _ in normalized_shape))
    return [input.axes, *(statistics for _ in op.results[1:])]


@resize("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def resize_layer_norm(rw: Resize, normalized_shape: list[int], **_: Any) -> None:
    count = len(normalized_shape)
    rw.set("normalized_shape", [rw.operand_size("input", dim - count) for dim in range(count)])


@renormalise("layer_norm")
def masked_layer_norm(
    keep: Keep,
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Mean and variance over the kept positions only."""
    dims = tuple(range(-len(normalized_shape), 0))
    mask = keep.mask("input", *dims)
    out = _standardise(input, mask, dims, eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(input.dtype)


@renormalise("rms_norm")
def masked_rms_norm(
    keep: Keep, input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    mask = keep.mask("input", *dims)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    square = torch.where(mask, x * x, 0).sum(dims, keepdim=True) / mask.expand(x.shape).sum(dims, keepdim=True)
    out = x * torch.rsqrt(square + eps)
    return (out if weight is None else out * weight).to(input.dtype)


def _standardise(x: torch.Tensor, mask: torch.Tensor, dims: tuple[int, ...], eps: float) -> torch.Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = mask.expand(x.shape).sum(dims, keepdim=True)
    mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / count
    variance = torch.where(mask, (x - mean) ** 2, 0).sum(dims, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)


@rule(
    "batch_norm",
    "_native_batch_norm_legit",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "instance_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(
    op: Op,
    input: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    training: bool = False,
) -> Any:
    """Per-channel statistics: nothing is mixed along axis 1.

    Where they are computed from the input, the other axes are mixed (the batch, too, but for instance
    norm). Weight standardisation is this, with the output channels of a weight as channels.
    """
    channel = 1 if input.ndim > 1 else 0
    if running_mean is None or training or "instance" in op.name:
        over = range(2, input.ndim) if "instance" in op.name else (0, *range(2, input.ndim))
        op.mix(input, "norm", *over)
    for data in (weight, bias, running_mean, running_var):
        if data is not None:
            op.unify(input.axes[channel], data.axes[0])
    if len(op.results) == 1:
        return input.axes
    return [
        input.axes,
        *((input.axes[channel],) if len(r.shape) == 1 and r.shape[0] == input.shape[channel] else () for r in op.results[1:]),
    ]


@renormalise("batch_norm", "instance_norm")
def masked_batch_norm(
    keep: Keep,
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Statistics of the input over its kept positions only."""
    dims = (*(() if "instance" in keep.name else (0,)), *range(2, input.ndim))
    out = _standardise(input, keep.mask("input", *dims), dims, eps)
    tail = (1,) * (input.ndim - 2)
    out = out if weight is None else out * weight.reshape(-1, *tail)
    return (out if bias is None else out + bias.reshape(-1, *tail)).to(input.dtype)


@rule("group_norm", "native_group_norm")
def group_norm(op: Op, input: Value, weight: Value | None = None, bias: Value | None = None) -> Any:
    """Channels are ``groups * each``; ``each`` (and space, which stays) is mixed, groups are independent."""
    for term in input.axes[2:]:
        op.freeze(term, "mixed", "a statistic is computed over it")
    groups = op.argument("num_groups" if "native" not in op.name else "group")
    each = quotient(input.shape[1], groups)
    for affine in (weight, bias):
        if affine is not None:
            op.unify(input.axes[1], affine.axes[0])
    parts = op.factor(input.axes[1], each) if each is not None else None
    if parts is None:
        op.freeze(input.axes[1], "misaligned", "the groups of a group norm cut across its factors")
    else:
        op.note("groups", parts[0])
        op.note("each", parts[1])
        if parts[1]:
            op.mix(input, "group_norm", 1)
    if len(op.results) == 1:
        return input.axes
    return [input.axes, *(tuple(op.solid(s, "mixed", "a statistic of a group norm") for s in sizes(r)) for r in op.results[1:])]


@resize("group_norm")
def resize_group_norm(rw: Resize, num_groups: int, **_: Any) -> None:
    rw.set("num_groups", rw.kept("groups", num_groups))


@renormalise("group_norm")
def masked_group_norm(
    keep: Keep,
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    shape = input.shape
    x = input.reshape(shape[0], num_groups, -1)
    mask = keep.mask("input", 1).expand(shape).reshape(shape[0], num_groups, -1)
    out = _standardise(x, mask, (2,), eps).reshape(shape)
    tail = (1,) * (len(shape) - 2)
    out = out if weight is None else out * weight.reshape(-1, *tail)
    return (out if bias is None else out + bias.reshape(-1, *tail)).to(input.dtype)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax")
def softmax(op: Op, self: Value, dim: int) -> Axes:
    if self.ndim:
        op.mix(self, "softmax", dim)
    return self.axes


@renormalise("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax")
def masked_softmax(keep: Keep, self: torch.Tensor, dim: int, **_: Any) -> torch.Tensor:
    """Positions that are gone get no weight."""
    return keep.call(self=self.masked_fill(~keep.mask("self", dim), -torch.inf))


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(op: Op, v: Value, g: Value, dim: int = 0) -> Any:
    """``g * v / norm(v)``, the norm over all axes but ``dim``: mixed along those, free along ``dim``."""
    axes = op.broadcast(v.axes, g.axes)
    op.contract(v, *(i for i in range(v.ndim) if i != dim % v.ndim))
    return [axes, g.axes] if len(op.results) > 1 else axes
