"""Operations that work position by position."""

from __future__ import annotations

from typing import Any

from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value
from irprune.rules.registry import rule

UNARY = """
abs absolute acos acosh asin asinh atan atanh bitwise_not ceil celu clone contiguous cos cosh
deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1 fix floor frac gelu hardshrink
hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma lift lift_fresh lift_fresh_copy log log10 log1p log2
log_sigmoid logical_not logit mish nan_to_num neg negative positive rad2deg reciprocal relu relu6 round rrelu rsqrt selu sgn
sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit special_ndtr sqrt square tan tanh threshold trunc
alias _to_copy to type_as zero fill
_assert_tensor_metadata detach_copy alias_copy pin_memory special_erf special_log1p
real imag angle _conj conj_physical resolve_conj resolve_neg _neg_view
arccos arccosh arcsin arcsinh arctan arctanh frexp isneginf isposinf polygamma mvlgamma special_entr special_erfcx special_gammaln
special_i0 special_i0e special_i1 special_i1e special_log_ndtr special_ndtri special_psi
"""

NARY = """
add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift clamp clamp_max
clamp_min clip copysign div divide eq floor_divide fmax fmin fmod ge greater greater_equal gt heaviside hypot ldexp le
less less_equal lerp logaddexp logaddexp2 logical_and logical_or logical_xor lt masked_fill maximum minimum mul multiply ne
nextafter not_equal pow remainder rsub sub subtract true_divide where xlogy special_xlogy __and__ __or__ __xor__ __lshift__
__rshift__ isclose complex polar
__iand__ __ior__ __ixor__ __ilshift__ __irshift__
arctan2 float_power gcd lcm special_gammainc special_gammaincc special_xlog1py special_zeta
"""


@rule(*(f"aten::{name}" for name in UNARY.split() if name != "type_as"))
def unary(op: Op, **_: Any) -> Any:
    """One tensor in, the same axes out."""
    operand = op.first()
    return [operand.axes] * len(op.results) if len(op.results) > 1 else operand.axes


@rule("dropout", "alpha_dropout", "feature_dropout", "native_dropout")
def dropout(op: Op, train: bool | None) -> Any:
    """Nothing, or random zeros."""
    return random(op) if train is not False else unary(op)


@rule("bernoulli", "exponential", "normal", "uniform", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")
def random(op: Op, **_: Any) -> Any:
    """Numbers drawn for a smaller axis are other numbers, so a removal could not be proved: the axes stay whole."""
    for value in op.operands():
        for term in value.axes:
            op.freeze(term, "random", "random numbers are drawn along it")
    axes = tuple(op.solid(size, "random", "random numbers are drawn along it") for size in op.shape)
    return [axes] * len(op.results) if len(op.results) > 1 else axes


@rule("type_as")
def type_as(op: Op, self: Value) -> Axes:
    """Only the other operand's dtype is used."""
    return self.axes


@rule(*(f"aten::{name}" for name in NARY.split()))
def nary(op: Op, **_: Any) -> Axes:
    """Broadcast: aligned axes are the same axis."""
    return op.broadcast(*(value.axes for value in op.operands()))


@rule("copy", "copy_")
def copy(op: Op, self: Value, src: Value) -> Axes:
    """``self[...] = src``, broadcast to ``self``."""
    op.broadcast(self.axes, src.axes)
    return self.axes


@rule("prelu", "_prelu_kernel")
def prelu(op: Op, self: Value, weight: Value) -> Axes:
    """``max(0, x) + weight * min(0, x)``; weight ``(C,)`` belongs to axis 1 of x, or is one number."""
    if weight.ndim == 1 and weight.axes[0]:
        op.unify(self.axes[1 if self.ndim > 1 else 0], weight.axes[0])
    elif weight.ndim > 1:
        return op.broadcast(self.axes, weight.axes)
    return self.axes


@rule("glu")
def glu(op: Op, self: Value, dim: int = -1) -> Axes:
    """``a * sigmoid(b)`` of the two halves of an axis, which become one."""
    size = op.shape[dim]
    halves = op.pieces(self.axes[dim], [size, size]) if isinstance(size, int) else None
    out = list(self.axes)
    if halves is None:
        out[dim] = op.solid(size, "misaligned", "its halves cannot be told apart")
    else:
        op.unify(halves[0], halves[1])
        out[dim] = halves[0]
    return tuple(out)
