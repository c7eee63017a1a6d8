"""Sums, means, extremes and running sums over axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value
from irprune.rules.registry import bind, renormalise, rule

if TYPE_CHECKING:
    from irprune.backend.proof import Keep


def reduced_dims(op: Op, value: Value) -> list[int]:
    """The reduced axes, non-negative; all of them where the call names none."""
    bound = bind(op.node.target, op.node.args, dict(op.node.kwargs))
    dim = bound.get("dim", bound.get("axis"))
    if dim is None or dim == []:
        return list(range(value.ndim))
    return [d % value.ndim for d in (dim if isinstance(dim, list | tuple) else [dim])] if value.ndim else []


def drop(op: Op, value: Value, dims: list[int]) -> Axes:
    bound = bind(op.node.target, op.node.args, dict(op.node.kwargs))
    keepdim = bool(bound.get("keepdim", False))
    return tuple(() if i in dims else term for i, term in enumerate(value.axes) if keepdim or i not in dims)


@rule("sum", "nansum", "count_nonzero")
def total(op: Op, self: Value) -> Axes:
    """A zero removes an index from a sum exactly."""
    dims = reduced_dims(op, self)
    op.contract(self, *dims)
    return drop(op, self, dims)


@rule("linalg_vector_norm", "norm", "linalg_norm", "frobenius_norm")
def vector_norm(op: Op, self: Value) -> Axes:
    """A norm of positive order is a sum over positions, or for an infinite one the largest size: a zero removes one exactly."""
    bound = bind(op.node.target, op.node.args, dict(op.node.kwargs))
    order = bound.get("ord", bound.get("p", 2))
    dims = reduced_dims(op, self)
    if order is None or (isinstance(order, int | float) and order > 0):
        op.contract(self, *dims)
    else:
        for dim in dims:
            op.freeze(self.axes[dim], "mixed", "a norm that is not a sum is computed over it")
    return drop(op, self, dims)


MIXED = {"mean": "mean", "nanmean": "mean", "var": "var", "std": "std", "prod": "prod", "logsumexp": "logsumexp"}
MIXED |= {"special_logsumexp": "logsumexp"}
MIXED |= {"amax": "max", "amin": "min", "max": "max", "min": "min", "all": "all", "any": "any"}


@rule(*MIXED)
def mixed(op: Op, self: Value, other: Value | None = None) -> Any:
    """The result depends on which indices there are. ``max`` with two tensors is elementwise."""
    if isinstance(other, Value):
        return op.broadcast(self.axes, other.axes)
    dims = reduced_dims(op, self)
    op.mix(self, MIXED[op.name], *dims)
    axes = drop(op, self, dims)
    if len(op.results) == 1:
        return axes
    if dims:
        op.points(1, self.axes[dims[0]])
    return [axes] * len(op.results)


@rule("argmax", "argmin")
def place_of_extreme(op: Op, self: Value, dim: int | None = None) -> Axes:
    """A position along one axis; of all numbers of a tensor laid end to end it says nothing about any axis."""
    dims = reduced_dims(op, self)
    if dim is None or not self.ndim:
        for term in self.axes:
            op.freeze(term, "data-dependent", "its positions are compared")
    else:
        op.mix(self, "max", *dims)
        op.points(0, self.axes[dim])
    return drop(op, self, dims)


@rule("var_mean", "std_mean", "aminmax")
def several(op: Op, self: Value) -> list[Axes]:
    """Two statistics of the same numbers."""
    dims = reduced_dims(op, self)
    op.mix(self, op.name, *dims)
    return [drop(op, self, dims)] * len(op.results)


@rule("median", "nanmedian", "mode", "kthvalue", "cummax", "cummin", "logcumsumexp", "cumprod", "quantile")
def frozen_axis(op: Op, self: Value) -> Any:
    """Positions or an order along the axis are the result: it stays whole."""
    dims = reduced_dims(op, self)
    for dim in dims:
        op.freeze(self.axes[dim], "data-dependent", "its positions are compared")
    name = op.name
    axes = self.axes if name.startswith(("cum", "logcum")) else drop(op, self, dims)
    return [axes] * len(op.results) if len(op.results) > 1 else axes


@rule("cumsum")
def cumsum(op: Op, self: Value, dim: int) -> Axes:
    """A running sum: a zero leaves the sums at all other positions as they would be without it."""
    if self.ndim:
        op.contract(self, dim)
    return self.axes


FOURIER = [f"fft_{inverse}{kind}" for inverse in ("", "i") for kind in ("fft", "rfft", "hfft", "fft2", "rfft2", "fftn", "rfftn")]


@rule(*FOURIER)
def fourier(op: Op, self: Value, dim: Any = None) -> Axes:
    """A discrete Fourier transform: its coefficients depend on how many positions there are and on each one's place."""
    dims = {d % self.ndim for d in (dim if isinstance(dim, list) else range(self.ndim) if dim is None else [dim])}
    axes = list(self.axes)
    for d in dims:
        op.freeze(axes[d], "position", "a Fourier transform runs along it")
        axes[d] = op.solid(op.shape[d], "position", "a Fourier transform gives it")
    return tuple(axes)


def _dims(x: torch.Tensor, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in (dim if isinstance(dim, list | tuple) else [dim]))


@renormalise("mean")
def masked_mean(keep: Keep, self: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> torch.Tensor:
    dims = _dims(self, dim)
    mask = keep.mask("self", *dims)
    count = mask.expand(self.shape).sum(dims, keepdim=keepdim)
    return (torch.where(mask, self, 0).sum(dims, keepdim=keepdim) / count).to(keep.dtype)


@renormalise("var", "std", "var_mean", "std_mean")
def masked_var(
    keep: Keep, self: torch.Tensor, dim: Any = None, keepdim: bool = False, correction: Any = 1, unbiased: bool | None = None, **_: Any
) -> Any:
    dims = _dims(self, dim)
    mask = keep.mask("self", *dims)
    count = mask.expand(self.shape).sum(dims, keepdim=True)
    mean = torch.where(mask, self, 0).sum(dims, keepdim=True) / count
    less = (1 if correction is None else correction) if unbiased is None else int(unbiased)
    out = torch.where(mask, (self - mean) ** 2, 0).sum(dims, keepdim=True) / (count - less).clamp(min=0)
    out = out.sqrt() if keep.name.startswith("std") else out
    if not keepdim:
        out, mean = out.squeeze(dims), mean.squeeze(dims)
    return (out.to(self.dtype), mean.to(self.dtype)) if keep.name.endswith("mean") else out.to(keep.dtype)


EXTREMES = {"amax": "least", "max": "least", "argmax": "least", "amin": "greatest", "min": "greatest", "argmin": "greatest"}


@renormalise("amax", "max", "logsumexp", "special_logsumexp", "amin", "min", "prod", "any", "all", "argmax", "argmin")
def masked_extreme(keep: Keep, self: torch.Tensor, dim: Any = None, **_: Any) -> Any:
    """What is gone gets the value that changes nothing: the least, the greatest, 1, or its truth."""
    mask = keep.mask("self", *_dims(self, dim))
    neutral: Any = {"prod": 1, "any": False, "all": True}.get(keep.name, -torch.inf)
    if keep.name in EXTREMES:
        neutral = _bound(self.dtype, EXTREMES[keep.name])
    return keep.call(self=self.masked_fill(~mask, neutral))


@renormalise("aminmax")
def masked_extremes(keep: Keep, self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = _dims(self, dim)
    gone = ~keep.mask("self", *dims)
    least, greatest = (self.masked_fill(gone, _bound(self.dtype, which)) for which in ("greatest", "least"))
    return least.amin(dims, keepdim), greatest.amax(dims, keepdim)


def _bound(dtype: torch.dtype, which: str) -> Any:
    """The least or the greatest value of a dtype."""
    least = which == "least"
    if dtype.is_floating_point:
        return -torch.inf if least else torch.inf
    if dtype is torch.bool:
        return not least
    return torch.iinfo(dtype).min if least else torch.iinfo(dtype).max
