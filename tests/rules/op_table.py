"""One small network or more per operation, with the groups that must be prunable in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nets import Net, tensor
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

VECTOR = (tensor(4),)
ROWS = (tensor(3, 4),)
SEQUENCE = (tensor(3, 5, 6),)
SIGNAL = (tensor(2, 3, 6),)
IMAGE = (tensor(2, 3, 6, 6),)
VOLUME = (tensor(2, 3, 4, 4, 4),)
STATIC: Mapping[str, Mapping[int, str]] = {"inputs": {}}


@dataclass(frozen=True)
class Case:
    """A network for some operations.

    Attributes:
        name: The operations, and after a slash what is special about the network.
        groups: The prunable groups as :func:`nets.text` prints them.
        inputs: Example inputs; axis 0 is dynamic.
        fn: The network.
        zeroing: Whether zeroing the parameters of an exact group equals its removal. Not so where an
            activation that is not zero at zero is contracted with another activation.
        dynamic: Dynamic axes, where they are not the default.
        stepwise: Whether every operation's values are determined.
        least: The fewest indices of an axis on which it gives numbers: a variance with a correction of 1 needs two.
    """

    name: str
    groups: str
    inputs: tuple[Tensor, ...]
    fn: Callable[..., Any]
    zeroing: bool = True
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    stepwise: bool = True
    least: int = 1

    @property
    def ops(self) -> frozenset[str]:
        return frozenset(name if "::" in name else f"aten::{name}" for name in self.name.partition("/")[0].split())


CASES: list[Case] = []


def case(name: str, groups: str, inputs: tuple[Tensor, ...], fn: Callable[..., Any], **options: Any) -> None:
    CASES.append(Case(name, groups, inputs, fn, **options))


def heads(x: Tensor, count: int) -> Tensor:
    """``(batch, length, count * width)`` to ``(batch, count, length, width)``."""
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """The way back."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


# -- position by position ------------------------------------------------------------------------

# Operations of one tensor, each behind a layer of its own, by what leads into their domain.
DOMAINS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    (
        """
        abs absolute atan ceil celu clone contiguous cos deg2rad detach elu erf erfc exp exp2 fix floor frac gelu
        hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish nan_to_num neg negative positive rad2deg
        """,
        lambda h: h,
    ),
    (
        """
        reciprocal relu relu6 round selu sgn sigmoid sign silu sin sinc sinh softplus softshrink special_ndtr square tan
        tanh trunc alias detach_copy alias_copy special_erf lift lift_fresh_copy
        arcsinh arctan isneginf isposinf special_erfcx special_i0 special_i0e special_i1 special_i1e special_log_ndtr
        """,
        lambda h: h,
    ),
    ("digamma lgamma log log10 log2 rsqrt sqrt log1p expm1 cosh asinh special_log1p", lambda h: h.sigmoid() + 0.1),
    ("special_entr special_gammaln special_psi", lambda h: h.sigmoid() + 0.1),
    ("acos asin atanh erfinv logit special_expit arccos arcsin arctanh special_ndtri", lambda h: h.tanh() * 0.4 + 0.5),
    ("isfinite isinf isnan logical_not signbit", lambda h: h.relu()),
    ("acosh arccosh", lambda h: h.abs() + 1),
]


def branches(applied: list[Callable[[Tensor], Tensor]]) -> Callable[[Net, Tensor], Tensor]:
    """One hidden layer per operation, all read into one sum."""

    def fn(n: Net, x: Tensor) -> Tensor:
        out = n.linear(x, 2)
        for apply in applied:
            out = out + n.linear(apply(n.linear(x, 4)).to(x.dtype), 2)
        return out

    return fn


for _names, _domain in DOMAINS:
    _applied = [lambda h, name=name, domain=_domain: getattr(aten, name)(domain(h)) for name in _names.split()]
    case(" ".join(_names.split()), " ".join(["ffn:4"] * len(_applied)), ROWS, branches(_applied), zeroing="reciprocal" not in _names)

WITH_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "threshold": lambda h: aten.threshold(h, 0.1, 20.0),
    "polygamma": lambda h: torch.polygamma(1, h.sigmoid() + 0.5),
    "mvlgamma": lambda h: torch.mvlgamma(h.sigmoid() + 1.5, 2),
    "frexp": lambda h: sum(torch.frexp(h)),
    "dropout_": lambda h: aten.dropout_(h.clone(), 0.5, False),
    "alpha_dropout": lambda h: aten.alpha_dropout(h, 0.5, False),
    "feature_dropout": lambda h: aten.feature_dropout(h, 0.5, False),
    "native_dropout": lambda h: aten.native_dropout(h, 0.5, False)[0],
    "rrelu": lambda h: aten.rrelu(h, 0.1, 0.3, False),
    "to": lambda h: h.to(torch.float32),
    "_to_copy": lambda h: aten._to_copy(h, dtype=torch.float32),
    "zero": lambda h: h + aten.zero(h),
    "fill": lambda h: h * aten.fill(h, 2.0),
    "type_as": lambda h: h.float().type_as(h),
    "bitwise_not": lambda h: aten.bitwise_not(h > 0),
    "pow": lambda h: h.abs() ** 1.5 + 2**h,
    "clamp": lambda h: h.clamp(-0.3, 0.5) + h.clamp(max=0.2),
    "clip": lambda h: aten.clip(h, -0.3, 0.5),
    "rsub": lambda h: 1 - h,
    "isclose": lambda h: h.isclose(h.round(), atol=0.2),
    "masked_fill": lambda h: h.masked_fill(h > 0.3, 0.7),
    "where": lambda h: torch.where(h > 0, h, 2.0),
    "add": lambda h: h + 1.5,
    "prelu": lambda h: F.prelu(h, torch.full((1,), 0.3, dtype=h.dtype)),
}
case(
    " ".join(WITH_ARGUMENTS),
    " ".join("ffn:4" for _ in WITH_ARGUMENTS),
    ROWS,
    branches(list(WITH_ARGUMENTS.values())),
)

# Operations of two tensors; both operands of each come from layers of their own.
NARY: list[tuple[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]] = [
    (
        """
        add atan2 copysign div divide eq fmax fmin fmod ge greater greater_equal gt hypot le less less_equal lt maximum
        minimum mul multiply ne not_equal remainder sub subtract true_divide arctan2
        """,
        lambda a, b: (a, b),
    ),
    (
        "floor_divide heaviside ldexp logaddexp logaddexp2 logical_and logical_or logical_xor xlogy special_xlogy clamp_max clamp_min",
        lambda a, b: (a, b.abs() + 0.5),
    ),
    ("bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ __iand__ __ior__ __ixor__", lambda a, b: (a > 0, b > 0)),
    ("bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ __ilshift__ __irshift__", lambda a, b: (a.long() + 9, (b > 0).long())),
    ("gcd lcm", lambda a, b: ((a * 9).long(), (b * 9).long())),
    ("special_gammainc special_gammaincc float_power", lambda a, b: (a.abs() + 0.5, b.abs() + 0.5)),
    ("special_xlog1py", lambda a, b: (a, b.abs())),
    ("special_zeta", lambda a, b: (a.abs() + 1.5, b.abs() + 0.5)),
    ("nextafter isclose pow", lambda a, b: (a.abs() + 0.1, b)),
    ("addcdiv addcmul lerp where", lambda a, b: (a, b, b.abs() + 0.5)),
]


def pairs(names: list[str], domain: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Callable[[Net, Tensor], Tensor]:
    """Two hidden layers per operation."""

    def fn(n: Net, x: Tensor) -> Tensor:
        out = n.linear(x, 2)
        for name in names:
            operands = domain(n.linear(x, 4), n.linear(x, 4))
            operands = (operands[0] > 0, *operands[1:]) if name == "where" else operands
            out = out + n.linear(getattr(aten, name)(*operands).to(x.dtype), 2)
        return out

    return fn


for _names, _operands in NARY:
    case(
        " ".join(_names.split()),
        " ".join(["ffn:4"] * len(_names.split())),
        ROWS,
        pairs(_names.split(), _operands),
        zeroing="div" not in _names,
    )

case("mul/broadcast", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8) * n.linear(x[:, :1], 8) * n.parameter(8) * n.linear(x, 1), 3))
case("mul/ranks", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8) * n.parameter(5, 1) + n.parameter(1, 1, 1, 8)[0], 3))
case(
    "mul/single position of another axis",
    "other:5 ffn:8",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 6)[:, :1] * n.linear(x, 8), 3),
)
case("add_ mul_ relu_", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).add_(1.0).mul_(n.parameter(8)).relu_(), 3))
case("where/mask", "ffn:8", ROWS, lambda n, x: n.linear(torch.where(n.linear(x, 1) > 0, n.linear(x, 8), n.parameter(8)), 3))
case("copy", "ffn:8", ROWS, lambda n, x: n.linear(aten.copy(n.linear(x, 8), n.parameter(8)) + n.linear(x, 8), 3))
case("copy_", "ffn:8", ROWS, lambda n, x: n.linear(torch.zeros(3, 8, dtype=x.dtype).copy_(n.linear(x, 8)), 3), dynamic=STATIC)
case("prelu/channels", "conv:8", IMAGE, lambda n, x: n.conv(F.prelu(n.conv(x, 8), n.parameter(8)), 2))
case("prelu/rows", "ffn:8", ROWS, lambda n, x: n.linear(F.prelu(n.linear(x, 8), n.parameter(8)), 2))
case("_prelu_kernel", "conv:8", IMAGE, lambda n, x: n.conv(aten._prelu_kernel(n.conv(x, 8), n.parameter(8, 1, 1)), 2))
case("glu", "ffn:6", ROWS, lambda n, x: n.linear(F.glu(n.linear(x, 12)), 3))
case("glu/channels", "conv:6", IMAGE, lambda n, x: n.conv(F.glu(n.conv(x, 12, 3), 1), 3))

# -- sums of products ----------------------------------------------------------------------------

case("linear", "ffn:8", ROWS, lambda n, x: n.linear(F.relu(n.linear(x, 8)), 3))
case("linear/vector", "ffn:8", VECTOR, lambda n, x: n.linear(F.relu(n.linear(x, 8)), 3), dynamic=STATIC)
case("linear/one row", "ffn:8", ROWS, lambda n, x: F.linear(n.linear(x, 8), n.parameter(8)))
case("linear/width one", "ffn:8", ROWS, lambda n, x: n.linear(torch.sigmoid(n.linear(x, 1)) * n.linear(x, 8), 3))
case("matmul/columns", "ffn:8", ROWS, lambda n, x: n.linear(x, 8) @ n.parameter(8, 3))
case("matmul/vector", "ffn:8", ROWS, lambda n, x: n.linear(x, 8) @ n.parameter(8))
case("matmul/vector on the left", "ffn:8", ROWS, lambda n, x: n.parameter(8) @ n.linear(x, 8).T)
case(
    "matmul/broadcast",
    "ffn:8 ffn:2 ffn:5",
    ROWS,
    lambda n, x: n.linear((n.linear(x, 8) @ n.parameter(2, 8, 5)).transpose(0, 1).flatten(1), 3),
)
case("matmul/with itself", "heads:8", SEQUENCE, lambda n, x: n.linear((lambda h: h.mT @ h)(n.linear(x, 8)).flatten(1), 3))
case("mm", "ffn:8", ROWS, lambda n, x: torch.mm(torch.mm(x, n.parameter(4, 8)), n.parameter(8, 3)))
case("bmm", "head_dim:8", SEQUENCE, lambda n, x: torch.bmm(n.linear(x, 8), n.linear(x, 8).mT))
case("mv", "ffn:8", ROWS, lambda n, x: torch.mv(n.linear(x, 8), n.parameter(8)))
case("dot", "ffn:8", VECTOR, lambda n, x: torch.dot(n.linear(x, 8), n.parameter(8)) * x, dynamic=STATIC)
case("vdot", "ffn:8", VECTOR, lambda n, x: torch.vdot(n.linear(x, 8), n.parameter(8)) * x, dynamic=STATIC)
case("inner", "other:8", ROWS, lambda n, x: torch.inner(n.linear(x, 8), n.parameter(3, 8)))
case(
    "addmm",
    "ffn:8",
    ROWS,
    lambda n, x: torch.addmm(n.parameter(3), torch.addmm(n.parameter(1, 8), x, n.parameter(4, 8), beta=0.5), n.parameter(8, 3)),
)
case("addmv", "ffn:8", ROWS, lambda n, x: torch.addmv(n.parameter(1), n.linear(x, 8), n.parameter(8)))
case(
    "addbmm",
    "ffn:8 ffn:7",
    SEQUENCE,
    lambda n, x: torch.addbmm(n.parameter(1, 7), n.linear(x, 8).transpose(0, 1), n.parameter(5, 8, 7)) @ n.parameter(7, 2),
)
case(
    "baddbmm",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(torch.baddbmm(n.parameter(3, 1, 8), x, n.parameter(3, 6, 8), beta=0.5), 3),
    dynamic=STATIC,
)
case(
    "outer",
    "other:5 ffn:6",
    VECTOR,
    lambda n, x: n.linear(torch.outer(n.linear(x, 5), n.linear(x, 6)), 3).sum(0),
    dynamic=STATIC,
    zeroing=False,
)
case(
    "ger", "other:5 ffn:6", VECTOR, lambda n, x: n.linear(aten.ger(n.linear(x, 5), n.linear(x, 6)), 3).sum(0), dynamic=STATIC, zeroing=False
)
case(
    "einsum/letters",
    "ffn:2 ffn:4",
    SEQUENCE,
    lambda n, x: torch.einsum(
        "...i,oi->...o", torch.relu(torch.einsum("bsi,hdi->bshd", x, n.parameter(2, 4, 6)).flatten(2)), n.parameter(3, 8)
    ),
)
case("einsum/implicit result", "ffn:8", ROWS, lambda n, x: torch.einsum("ij,jk", n.linear(x, 8), n.parameter(8, 3)))
case("einsum/dots", "ffn:8", SEQUENCE, lambda n, x: torch.einsum("...d,...d->...", n.linear(x, 8), n.parameter(8)))
case("einsum/diagonal", "", ROWS, lambda n, x: torch.einsum("bi,ii->b", n.linear(x, 8), n.parameter(8, 8)))
case("einsum/broadcast", "head_dim:8", SEQUENCE, lambda n, x: n.linear(torch.einsum("bsd,bsd->bsd", n.linear(x, 8), n.linear(x, 1)), 3))
case(
    "einsum/three",
    "ffn:8 other:5",
    SEQUENCE,
    lambda n, x: torch.einsum("bsi,ij,jo->bso", n.linear(x, 8), n.parameter(8, 5), n.parameter(5, 3)),
)
case(
    "einsum/outer",
    "head_dim:5 head_dim:6",
    ROWS,
    lambda n, x: n.linear(torch.einsum("bi,bj->bij", n.linear(x, 5), n.linear(x, 6)).flatten(1), 3),
)
case(
    "einsum/attention",
    "heads:2 head_dim:4 head_dim:4",
    SEQUENCE,
    lambda n, x: n.linear(
        torch.einsum(
            "bhlm,bmhd->blhd",
            torch.einsum("blhd,bmhd->bhlm", n.linear(x, 8).view(-1, 5, 2, 4), n.linear(x, 8).view(-1, 5, 2, 4)).softmax(-1),
            n.linear(x, 8).view(-1, 5, 2, 4),
        ).reshape(-1, 5, 8),
        3,
    ),
)
case("linalg_matmul", "ffn:8", ROWS, lambda n, x: torch.linalg.matmul(n.linear(x, 8), n.parameter(8, 3)))
case("linalg_vecdot", "ffn:8", ROWS, lambda n, x: torch.linalg.vecdot(n.linear(x, 8), n.parameter(8)))
case("linalg_multi_dot", "ffn:8 other:5", ROWS, lambda n, x: torch.linalg.multi_dot([n.linear(x, 8), n.parameter(8, 5), n.parameter(5, 3)]))
case(
    "linalg_multi_dot/vector",
    "ffn:8 other:5",
    ROWS,
    lambda n, x: torch.linalg.multi_dot([n.linear(x, 8), n.parameter(8, 5), n.parameter(5)]),
)
case("tensordot", "ffn:8", ROWS, lambda n, x: torch.tensordot(n.linear(x, 8), n.parameter(8, 3), 1))
case(
    "tensordot/heads",
    "ffn:4 ffn:2",
    SEQUENCE,
    lambda n, x: torch.tensordot(n.linear(x, 8).view(-1, 5, 2, 4), n.parameter(4, 3, 2), ([3, 2], [0, 2])),
)
case(
    "addr",
    "other:5 ffn:6",
    VECTOR,
    lambda n, x: n.linear(torch.addr(n.parameter(6), n.linear(x, 5), n.linear(x, 6)), 3).sum(0),
    dynamic=STATIC,
    zeroing=False,
)
case("kron", "ffn:4 ffn:2", ROWS, lambda n, x: n.linear(torch.kron(n.linear(x, 4), n.parameter(2)), 3))
case(
    "linalg_inv linalg_cholesky matrix_exp linalg_matrix_power linalg_pinv linalg_det logdet",
    "heads:2 head_dim:4",
    SEQUENCE,
    lambda n, x: (
        lambda a: n.linear(
            (
                torch.linalg.inv(a)
                + torch.linalg.cholesky(a)
                + torch.matrix_exp(a * 0.01)
                + torch.linalg.matrix_power(a, 2)
                + torch.linalg.pinv(a)
                + (torch.linalg.det(a) + torch.logdet(a))[..., None, None]
            )
            .transpose(1, 2)
            .flatten(2),
            3,
        )
    )((lambda h: h @ h.mT + torch.eye(5, dtype=x.dtype))(heads(n.linear(x, 8), 2))),
    dynamic=STATIC,
)
case(
    "linalg_solve_triangular",
    "ffn:2 ffn:4",
    SEQUENCE,
    lambda n, x: n.linear(
        merged(torch.linalg.solve_triangular(torch.eye(5, dtype=x.dtype) + n.parameter(2, 5, 5), heads(n.linear(x, 8), 2), upper=False)), 3
    ),
    dynamic=STATIC,
)
case("linalg_cross", "", ROWS, lambda n, x: torch.linalg.cross(n.linear(x, 3), n.linear(x, 3)))
case(
    "bilinear",
    "ffn:5 ffn:6 ffn:8",
    ROWS,
    lambda n, x: n.linear(n.layer(lambda: torch.nn.Bilinear(5, 6, 8))(n.linear(x, 5), n.linear(x, 6)), 3),
)
case("cdist", "ffn:8", SEQUENCE, lambda n, x: torch.cdist(n.linear(x, 8), n.parameter(3, 8)))
case("cdist/largest", "ffn:8", SEQUENCE, lambda n, x: torch.cdist(n.linear(x, 8), n.parameter(3, 8), p=math.inf))
case("cosine_similarity", "ffn:8", ROWS, lambda n, x: F.cosine_similarity(n.linear(x, 8), n.parameter(8), dim=-1))
case(
    "cosine_similarity/of another axis",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear((lambda h: h * F.cosine_similarity(h, F.relu(h), dim=1)[:, None])(n.linear(x, 8)), 3),
)
case("cosine_similarity/with one number", "", ROWS, lambda n, x: F.cosine_similarity(n.linear(x, 8), n.parameter(1), dim=-1))
case("pairwise_distance", "other:8~", ROWS, lambda n, x: F.pairwise_distance(n.linear(x, 8), n.parameter(8), eps=0.5))
case("pairwise_distance/kept", "other:8~", ROWS, lambda n, x: F.pairwise_distance(n.linear(x, 8), n.linear(x, 8), 1, 0.5, True))
case("cross", "", ROWS, lambda n, x: aten.cross(n.linear(x, 3), n.linear(x, 3), -1))

# -- convolutions and what works in space ----------------------------------------------------------

# A token mixer: positions are the channels of a convolution of size 1, and features its space.
case("conv1d/of size 1", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: torch.nn.Conv1d(5, 5, 1))(n.linear(x, 8)), 3))
case(
    "conv1d/of size 1 with steps",
    "",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: torch.nn.Conv1d(5, 5, 1, stride=2))(n.linear(x, 8)), 3),
)

for _rank, _inputs in ((1, SIGNAL), (2, IMAGE), (3, VOLUME)):
    case(f"conv{_rank}d", "conv:8", _inputs, lambda n, x, r=_rank: n.conv(F.relu(n.conv(x, 8, 3, rank=r)), 2, rank=r))
    case(
        f"conv{_rank}d/groups",
        "conv:2 conv:4 conv:3",
        _inputs,
        lambda n, x, r=_rank: n.conv(n.conv(n.conv(x, 8, rank=r), 12, 3, rank=r, groups=4), 2, rank=r),
    )
    case(
        f"conv_transpose{_rank}d/groups",
        "conv:4 conv:2 conv:3",
        _inputs,
        lambda n, x, r=_rank: n.conv(
            n.conv(n.conv(x, 8, 2, rank=r, transposed=True), 12, 2, rank=r, groups=4, transposed=True), 2, rank=r, transposed=True
        ),
    )
case("conv2d/depthwise", "conv:8", IMAGE, lambda n, x: n.conv(n.conv(n.conv(x, 8), 8, 3, groups=8), 2))
case("conv2d/depthwise with a multiplier", "conv:8 conv:2", IMAGE, lambda n, x: n.conv(n.conv(n.conv(x, 8), 16, 3, groups=8), 2))
case(
    "conv2d/groups of other counts",
    "conv:2 conv:4 conv:3 conv:2",
    IMAGE,
    lambda n, x: n.conv(n.conv(n.conv(n.conv(x, 8), 12, 3, groups=4), 8, groups=4), 2),
)
case(
    "conv2d/without batch",
    "conv:8",
    (tensor(3, 6, 6),),
    lambda n, x: n.layer(lambda: torch.nn.Conv2d(8, 2, 1))(n.layer(lambda: torch.nn.Conv2d(3, 8, 3))(x)),
    dynamic=STATIC,
)
case("conv2d/same", "conv:8", IMAGE, lambda n, x: n.conv(n.conv(x, 8, 3, padding="same"), 2))
case("conv2d pad/circular", "conv:8 conv:6", IMAGE, lambda n, x: n.conv(n.conv(n.conv(x, 8), 6, 3, padding=1, padding_mode="circular"), 2))
case("conv_transpose2d/depthwise", "conv:8 conv:2", IMAGE, lambda n, x: n.conv(n.conv(n.conv(x, 8), 16, 3, groups=8, transposed=True), 2))
case(
    "convolution",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(aten.convolution(x, n.parameter(8, 3, 3, 3), n.parameter(8), [1, 1], [1, 1], [1, 1], False, [0, 0], 1), 2),
)
case(
    "convolution/transposed",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(aten.convolution(x, n.parameter(3, 8, 3, 3), n.parameter(8), [1, 1], [1, 1], [1, 1], True, [0, 0], 1), 2),
)

POOLS: list[tuple[str, int, Callable[[Tensor], Any]]] = [
    ("max_pool1d", 1, lambda h: F.max_pool1d(h, 2)),
    ("avg_pool1d", 1, lambda h: F.avg_pool1d(h, 2)),
    ("adaptive_avg_pool1d", 1, lambda h: F.adaptive_avg_pool1d(h, 2)),
    ("adaptive_max_pool1d", 1, lambda h: aten.adaptive_max_pool1d(h, [2])[0]),
    ("max_pool1d_with_indices", 1, lambda h: aten.max_pool1d_with_indices(h, [2])[0]),
    ("upsample_nearest1d", 1, lambda h: aten.upsample_nearest1d(h, [12])),
    ("max_unpool2d", 2, lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)),
    ("max_unpool3d", 3, lambda h: F.max_unpool3d(*F.max_pool3d(h, 2, return_indices=True), 2)),
    ("upsample_linear1d", 1, lambda h: aten.upsample_linear1d(h, [12], False)),
    ("_upsample_nearest_exact1d", 1, lambda h: aten._upsample_nearest_exact1d(h, [12])),
    ("max_pool2d", 2, lambda h: F.max_pool2d(h, 2)),
    ("avg_pool2d", 2, lambda h: F.avg_pool2d(h, 2)),
    ("adaptive_avg_pool2d", 2, lambda h: F.adaptive_avg_pool2d(h, 2)),
    ("adaptive_max_pool2d", 2, lambda h: aten.adaptive_max_pool2d(h, [2, 2])[0]),
    ("max_pool2d_with_indices", 2, lambda h: sum(aten.max_pool2d_with_indices(h, [2, 2]))),
    ("_adaptive_avg_pool2d", 2, lambda h: aten._adaptive_avg_pool2d(h, [2, 2])),
    ("fractional_max_pool2d", 2, lambda h: aten.fractional_max_pool2d(h, [2, 2], [3, 3], h.new_full((h.shape[0], h.shape[1], 2), 0.5))[0]),
    ("upsample_nearest2d", 2, lambda h: aten.upsample_nearest2d(h, [12, 12])),
    ("upsample_bilinear2d", 2, lambda h: aten.upsample_bilinear2d(h, [12, 12], False)),
    ("upsample_bicubic2d", 2, lambda h: aten.upsample_bicubic2d(h, [12, 12], False)),
    ("_upsample_nearest_exact2d", 2, lambda h: aten._upsample_nearest_exact2d(h, [12, 12])),
    ("_upsample_bilinear2d_aa", 2, lambda h: aten._upsample_bilinear2d_aa(h, [3, 3], False)),
    ("_upsample_lanczos2d_aa", 2, lambda h: aten._upsample_lanczos2d_aa(h, [3, 3], False)),
    ("_upsample_bicubic2d_aa", 2, lambda h: aten._upsample_bicubic2d_aa(h, [3, 3], False)),
    (
        "fractional_max_pool3d",
        3,
        lambda h: aten.fractional_max_pool3d(h, [2] * 3, [2] * 3, h.new_full((h.shape[0], h.shape[1], 3), 0.5))[0],
    ),
    ("max_pool3d", 3, lambda h: F.max_pool3d(h, 2)),
    ("avg_pool3d", 3, lambda h: F.avg_pool3d(h, 2)),
    ("adaptive_avg_pool3d", 3, lambda h: F.adaptive_avg_pool3d(h, 2)),
    ("adaptive_max_pool3d", 3, lambda h: aten.adaptive_max_pool3d(h, [2, 2, 2])[0]),
    ("max_pool3d_with_indices", 3, lambda h: aten.max_pool3d_with_indices(h, [2, 2, 2])[0]),
    ("_adaptive_avg_pool3d", 3, lambda h: aten._adaptive_avg_pool3d(h, [2, 2, 2])),
    ("upsample_nearest3d", 3, lambda h: aten.upsample_nearest3d(h, [8, 8, 8])),
    ("upsample_trilinear3d", 3, lambda h: aten.upsample_trilinear3d(h, [8, 8, 8], False)),
    ("_upsample_nearest_exact3d", 3, lambda h: aten._upsample_nearest_exact3d(h, [8, 8, 8])),
]


def pooled(rank: int, applied: list[Callable[[Tensor], Any]]) -> Callable[[Net, Tensor], Any]:
    def fn(n: Net, x: Tensor) -> Any:
        return tuple(n.conv(apply(n.conv(x, 4, rank=rank)), 2, rank=rank) for apply in applied)

    return fn


for _rank, _inputs in ((1, SIGNAL), (2, IMAGE), (3, VOLUME)):
    _chosen = [(name, apply) for name, rank, apply in POOLS if rank == _rank]
    case(
        " ".join(name for name, _ in _chosen), " ".join(["conv:4"] * len(_chosen)), _inputs, pooled(_rank, [apply for _, apply in _chosen])
    )

case("max_unpool2d", "conv:4", IMAGE, lambda n, x: n.conv(F.max_unpool2d(*F.max_pool2d(n.conv(x, 4), 2, return_indices=True), 2), 2))
case(
    "max_unpool3d",
    "conv:4",
    VOLUME,
    lambda n, x: n.conv(F.max_unpool3d(*F.max_pool3d(n.conv(x, 4, rank=3), 2, return_indices=True), 2), 2, rank=3),
)
case(
    "affine_grid_generator",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(
        F.grid_sample(
            n.conv(x, 8), F.affine_grid(n.linear(x.mean((2, 3)), 6).tanh().view(-1, 2, 3), [2, 8, 4, 4], False), align_corners=False
        ),
        2,
    ),
    dynamic=STATIC,
)
case("max_pool1d/over features", "", SEQUENCE, lambda n, x: n.linear(F.max_pool1d(n.linear(x, 8), 2), 2))
case("im2col", "conv:4", IMAGE, lambda n, x: n.linear(F.unfold(n.conv(x, 4), 2).transpose(1, 2), 3))
case(
    "im2col/windows",
    "conv:4",
    IMAGE,
    lambda n, x: n.conv(F.unfold(n.conv(x, 4), 3, padding=1).view(-1, 4, 9, 36).sum(2).view(-1, 4, 6, 6), 3),
)
case("col2im", "ffn:4", (tensor(2, 9, 6),), lambda n, x: n.conv(F.fold(n.linear(x, 16).transpose(1, 2), (4, 4), 2), 3))
case("unfold", "ffn:6", (tensor(2, 8, 6),), lambda n, x: n.linear(n.linear(x, 6).unfold(1, 2, 2).sum(-1), 3))
case("unfold/over features", "", (tensor(2, 8, 6),), lambda n, x: n.linear(n.linear(x, 6).unfold(2, 2, 2).sum(-1), 3))
case(
    "grid_sampler_2d",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(aten.grid_sampler_2d(n.conv(x, 8), n.conv(x, 2).tanh().permute(0, 2, 3, 1), 0, 0, False), 2),
)
case(
    "grid_sampler",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(F.grid_sample(n.conv(x, 8), n.conv(x, 2).tanh().permute(0, 2, 3, 1), align_corners=False), 2),
)
case(
    "affine_grid_generator",
    "ffn:8",
    IMAGE,
    lambda n, x: F.grid_sample(
        x, F.affine_grid(n.linear(n.linear(x.mean((2, 3)), 8), 6).view(-1, 2, 3), [x.shape[0], 1, 6, 6], False), align_corners=False
    ),
)
case(
    "grid_sampler_3d",
    "conv:8",
    VOLUME,
    lambda n, x: n.conv(
        aten.grid_sampler_3d(n.conv(x, 8, rank=3), n.conv(x, 3, rank=3).tanh().permute(0, 2, 3, 4, 1), 0, 0, False), 2, rank=3
    ),
)

# -- attention -------------------------------------------------------------------------------------


def attention(
    n: Net, x: Tensor, *, q: int = 8, kv: int = 8, v: int | None = None, count: tuple[int, int] = (2, 2), **options: Any
) -> Tensor:
    operands = heads(n.linear(x, q), count[0]), heads(n.linear(x, kv), count[1]), heads(n.linear(x, v or kv), count[1])
    return n.linear(merged(F.scaled_dot_product_attention(*operands, **options)), 3)


SDPA = "scaled_dot_product_attention"
case(SDPA, "heads:2 head_dim:4 head_dim:4", SEQUENCE, attention)
case(f"{SDPA}/wide values", "heads:2 head_dim:4 head_dim:6", SEQUENCE, lambda n, x: attention(n, x, v=12))
case(f"{SDPA}/causal", "heads:2 head_dim:4 head_dim:4", SEQUENCE, lambda n, x: attention(n, x, is_causal=True))
case(f"{SDPA}/scale", "heads:2 head_dim:4 head_dim:4", SEQUENCE, lambda n, x: attention(n, x, scale=0.3))
case(f"{SDPA}/bias per head", "heads:2 head_dim:4 head_dim:4", SEQUENCE, lambda n, x: attention(n, x, attn_mask=n.parameter(2, 5, 5)))
case(
    f"{SDPA}/mask",
    "heads:2 head_dim:4 head_dim:4",
    SEQUENCE,
    lambda n, x: attention(n, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()),
)
case(
    f"{SDPA}/enable_gqa",
    "head_dim:2 heads:2 query_heads:3 head_dim:2",
    SEQUENCE,
    lambda n, x: attention(n, x, q=12, kv=4, count=(6, 2), enable_gqa=True),
)
case(
    f"{SDPA}/enable_gqa with a bias",
    "head_dim:2 heads:2 query_heads:3 head_dim:2",
    SEQUENCE,
    lambda n, x: attention(n, x, q=12, kv=4, count=(6, 2), attn_mask=n.parameter(6, 5, 5), enable_gqa=True),
)
case(
    f"{SDPA}/enable_gqa, one kv head",
    "head_dim:2 query_heads:6 head_dim:2",
    SEQUENCE,
    lambda n, x: attention(n, x, q=12, kv=2, count=(6, 1), enable_gqa=True),
)
case(f"{SDPA}/one kv head broadcast", "head_dim:2 heads:6 head_dim:2", SEQUENCE, lambda n, x: attention(n, x, q=12, kv=2, count=(6, 1)))

# -- norms -----------------------------------------------------------------------------------------

case("layer_norm", "ffn:8~", ROWS, lambda n, x: n.linear(n.layer(lambda: torch.nn.LayerNorm(8))(n.linear(x, 8)), 3))
case("layer_norm/without affine", "ffn:8~", ROWS, lambda n, x: n.linear(F.layer_norm(n.linear(x, 8), (8,)), 3))
case(
    "layer_norm/two axes",
    "ffn:8~",
    SEQUENCE,
    lambda n, x: n.linear(F.layer_norm(n.linear(x, 8), (5, 8), n.parameter(5, 8), n.parameter(5, 8)), 3),
)
case(
    "layer_norm/heads",
    "ffn:2~ ffn:4~",
    ROWS,
    lambda n, x: n.linear(F.layer_norm(n.linear(x, 8).view(-1, 2, 4), (2, 4), n.parameter(2, 4)).view(-1, 8), 3),
)
case(
    "layer_norm/of a product",
    "ffn:2~ ffn:4~",
    ROWS,
    lambda n, x: n.linear(F.layer_norm(n.linear(x, 8).view(-1, 2, 4).tanh().view(-1, 8), (8,)), 3),
)
case(
    "layer_norm/of a concatenation",
    "ffn:3~ ffn:5~",
    ROWS,
    lambda n, x: n.linear(F.layer_norm(torch.cat([n.linear(x, 3), n.linear(x, 5)], -1), (8,)), 3),
)
case(
    "layer_norm/of copies",
    "ffn:3~",
    ROWS,
    lambda n, x: n.linear(F.layer_norm((lambda h: torch.cat([h, h.relu()], -1))(n.linear(x, 3)), (6,)), 3),
)
case("rms_norm", "ffn:8~", ROWS, lambda n, x: n.linear(n.layer(lambda: torch.nn.RMSNorm(8))(n.linear(x, 8)), 3))
case("rms_norm/eps", "ffn:8~", ROWS, lambda n, x: n.linear(F.rms_norm(n.linear(x, 8), (8,), n.parameter(8), 1e-2), 3))
case("native_layer_norm", "", ROWS, lambda n, x: n.linear(torch.native_layer_norm(n.linear(x, 8), [8], None, None, 1e-5)[0], 3))
case("_fused_rms_norm", "", ROWS, lambda n, x: n.linear(aten._fused_rms_norm(n.linear(x, 8), [8], n.parameter(8), 1e-5)[0], 3))
case("batch_norm", "conv:8", IMAGE, lambda n, x: n.conv(n.layer(lambda: torch.nn.BatchNorm2d(8))(n.conv(x, 8, 3)), 2))
case("batch_norm/rows", "ffn:8", ROWS, lambda n, x: n.linear(n.layer(lambda: torch.nn.BatchNorm1d(8))(n.linear(x, 8)), 2))
case(
    "batch_norm/features behind channels",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: torch.nn.BatchNorm1d(5))(n.linear(x, 8)), 2),
)
case(
    "batch_norm/batch statistics",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(n.layer(lambda: torch.nn.BatchNorm2d(8, track_running_stats=False))(n.conv(x, 8, 3)), 2),
)
case(
    "batch_norm/batch statistics over features",
    "ffn:8~",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: torch.nn.BatchNorm1d(5, track_running_stats=False))(n.linear(x, 8)), 2),
)


def statistics(n: Net) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and variance of eight channels."""
    return n.parameter(8), n.parameter(8), n.buffer(8), n.buffer(8).abs() + 0.5


case(
    "_native_batch_norm_legit_no_training native_batch_norm _batch_norm_no_update",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(
        aten._native_batch_norm_legit_no_training(n.conv(x, 8, 3), *statistics(n), 0.1, 1e-5)[0]
        + aten.native_batch_norm(n.conv(x, 8, 3), *statistics(n), False, 0.1, 1e-5)[0]
        + aten._batch_norm_no_update(n.conv(x, 8, 3), *statistics(n), 0.1, 1e-5)[0],
        2,
    ),
)
case(
    "_native_batch_norm_legit",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(aten._native_batch_norm_legit.no_stats(n.conv(x, 8, 3), n.parameter(8), None, True, 0.1, 1e-5)[0], 2),
)
case("instance_norm", "conv:8", IMAGE, lambda n, x: n.conv(n.layer(lambda: torch.nn.InstanceNorm2d(8, affine=True))(n.conv(x, 8, 3)), 2))
case(
    "instance_norm/over features",
    "ffn:8~",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: torch.nn.InstanceNorm1d(5, affine=True))(n.linear(x, 8)), 2),
)
case("group_norm", "norm_groups:4 conv:2~", IMAGE, lambda n, x: n.conv(n.layer(lambda: torch.nn.GroupNorm(4, 8))(n.conv(x, 8, 3)), 2))
case(
    "group_norm/one channel each",
    "norm_groups:8",
    IMAGE,
    lambda n, x: n.conv(n.layer(lambda: torch.nn.GroupNorm(8, 8))(n.conv(x, 8, 3)), 2),
)
case("group_norm/one group", "conv:8~", IMAGE, lambda n, x: n.conv(n.layer(lambda: torch.nn.GroupNorm(1, 8))(n.conv(x, 8, 3)), 2))
case(
    "group_norm/over features", "", (tensor(3, 4, 6),), lambda n, x: n.linear(n.layer(lambda: torch.nn.GroupNorm(2, 4))(n.linear(x, 8)), 3)
)
case(
    "group_norm/of a concatenation",
    "norm_groups:4 norm_groups:4",
    IMAGE,
    lambda n, x: n.conv(F.group_norm(torch.cat([n.conv(x, 4), n.conv(x, 4)], 1), 8), 2),
)
case(
    "native_group_norm",
    "",
    IMAGE,
    lambda n, x: n.conv(aten.native_group_norm(n.conv(x, 8), None, None, x.shape[0], 8, 36, 4, 1e-5)[0], 2),
    dynamic=STATIC,
)
case("softmax", "ffn:8~", ROWS, lambda n, x: n.linear(n.linear(x, 8).softmax(-1), 3))
case("softmax/in two", "ffn:2 ffn:4~", ROWS, lambda n, x: n.linear(n.linear(x, 8).view(-1, 2, 4).softmax(-1).flatten(1), 3))
case("log_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(n.linear(x, 8).log_softmax(-1), 3))
case("_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(aten._softmax(n.linear(x, 8), -1, False), 3))
case("special_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(torch.special.softmax(n.linear(x, 8), -1), 3))
case("special_log_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(torch.special.log_softmax(n.linear(x, 8), -1), 3))
case("_log_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(aten._log_softmax(n.linear(x, 8), -1, False), 3))
case("_safe_softmax", "ffn:8~", ROWS, lambda n, x: n.linear(aten._safe_softmax(n.linear(x, 8), -1), 3))
case(
    "_weight_norm",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(F.linear(x, torch._weight_norm(n.parameter(8, 4), n.parameter(8, 1), 0)), 3),
    zeroing=False,
)
case(
    "_weight_norm/of what is read",
    "ffn:8",
    ROWS,
    lambda n, x: F.linear(n.linear(x, 8), torch._weight_norm(n.parameter(3, 8), n.parameter(3, 1), 0)),
)
case(
    "_weight_norm/whole",
    "ffn:8 ffn:6",
    ROWS,
    lambda n, x: n.linear(F.linear(n.linear(x, 8), torch._weight_norm(n.parameter(6, 8), n.parameter(1, 1), -1)), 3),
)
case(
    "_weight_norm_interface",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(F.linear(x, aten._weight_norm_interface(n.parameter(8, 4), n.parameter(8, 1), 0)[0]), 3),
    zeroing=False,
)

# -- reductions ------------------------------------------------------------------------------------


def gate(reduce: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """A hidden layer reduced to one number per row, times another hidden layer."""
    return lambda n, x: n.linear(reduce(torch.sigmoid(n.linear(x, 8))).to(x.dtype) * F.relu(n.linear(x, 6)), 3)


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.sum(-1, keepdim=True),
    "nansum": lambda h: h.nansum(-1, keepdim=True),
    "count_nonzero": lambda h: (h > 0.5).count_nonzero(-1)[:, None],
    "norm": lambda h: aten.norm(h, 2, [-1], True),
    "linalg_vector_norm": lambda h: torch.linalg.vector_norm(h, 1, dim=-1, keepdim=True),
    "linalg_vector_norm/infinite": lambda h: torch.linalg.vector_norm(h, math.inf, dim=-1, keepdim=True),
    "linalg_norm": lambda h: torch.linalg.norm(h, dim=-1, keepdim=True),
    "sum/everything": lambda h: h.sum(),
    "sum/first dropped": lambda h: h.sum(1)[:, None],
    "cumsum": lambda h: h.cumsum(-1).sum(-1, keepdim=True),
}
for _name, _reduce in SUMS.items():
    case(_name, "other:8 ffn:6", ROWS, gate(_reduce), zeroing=False)
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(-1, keepdim=True),
    "var/biased": lambda h: h.var(-1, unbiased=False)[:, None],
    "var/correction": lambda h: h.var(-1, correction=0.5, keepdim=True),
    "std/everything": lambda h: h.std(),
    "prod": lambda h: h.prod(-1, keepdim=True),
    "logsumexp": lambda h: h.logsumexp(-1, keepdim=True),
    "special_logsumexp": lambda h: torch.special.logsumexp(h, -1, keepdim=True),
    "amax": lambda h: h.amax(-1, keepdim=True),
    "amin": lambda h: h.amin(-1, keepdim=True),
    "max/everything": lambda h: h.max(),
    "min/everything": lambda h: h.min(),
    "max/with places": lambda h: h.max(-1, keepdim=True).values,
    "min/with places": lambda h: h.min(-1, keepdim=True).values,
    "max/of truth": lambda h: (h > 0.8).max(-1, keepdim=True).values,
    "min/of truth": lambda h: (h > 0.2).min(-1, keepdim=True).values,
    "aminmax": lambda h: sum(torch.aminmax(h, dim=-1, keepdim=True)),
    "aminmax/everything": lambda h: sum(torch.aminmax(h)),
    "var_mean/biased": lambda h: sum(torch.var_mean(h, -1, unbiased=False, keepdim=True)),
    "std_mean/everything": lambda h: sum(torch.std_mean(h, correction=0)),
    "all": lambda h: (h > 0.2).all(-1, keepdim=True),
    "any": lambda h: (h > 0.8).any(-1, keepdim=True),
    "mean/everything": lambda h: h.mean(),
    "mean/of integers": lambda h: (h * 9).long().amax(-1, keepdim=True),
}
for _name, _reduce in MIXED.items():
    case(_name if _name != "mean/of integers" else "amax/of integers", "other:8~ ffn:6", ROWS, gate(_reduce))
case("max/number at the place", "experts:8~ ffn:6", ROWS, gate(lambda h: (-h).gather(-1, h.max(-1, keepdim=True).indices)))
case("var", "other:8~ ffn:6", ROWS, gate(lambda h: h.var(-1, keepdim=True)), least=2)
case("var_mean", "other:8~ ffn:6", ROWS, gate(lambda h: sum(torch.var_mean(h, -1, keepdim=True))), least=2)
case("std_mean", "other:8~ ffn:6", ROWS, gate(lambda h: sum(torch.std_mean(h, -1, keepdim=True))), least=2)
case("std", "other:8~ ffn:6", ROWS, gate(lambda h: h.std(-1, keepdim=True)), least=2)
CHOSEN: dict[str, Callable[[Tensor], Tensor]] = {
    "max gather/at places": lambda h: (h * h).gather(-1, h.max(-1, keepdim=True).indices),
    "argmax gather/at places": lambda h: (h * h).gather(-1, h.argmax(-1, keepdim=True)),
    "argmin one_hot/of places": lambda h: (F.one_hot(h.argmin(-1), 8) * h).sum(-1, keepdim=True),
}
for _name, _reduce in CHOSEN.items():
    case(_name, "experts:8~ ffn:6", ROWS, gate(_reduce))
WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "nanmean": lambda h: h.nanmean(-1, keepdim=True),
    "max/places calculated with": lambda h: h.max(-1, keepdim=True).indices * 2,
    "argmax": lambda h: h.argmax(-1, keepdim=True),
    "argmin": lambda h: h.argmin(-1, keepdim=True),
    "argmax/of everything": lambda h: h.argmax(),
    "median": lambda h: h.median(-1, keepdim=True).values,
    "nanmedian": lambda h: h.nanmedian(-1, keepdim=True).values,
    "mode": lambda h: h.mode(-1, keepdim=True).values,
    "kthvalue": lambda h: h.kthvalue(2, -1, keepdim=True).values,
    "quantile": lambda h: h.quantile(0.3, -1, keepdim=True),
    "cummax": lambda h: h.cummax(-1).values.sum(-1, keepdim=True),
    "cummin": lambda h: h.cummin(-1).values.sum(-1, keepdim=True),
    "logcumsumexp": lambda h: h.logcumsumexp(-1).sum(-1, keepdim=True),
    "cumprod": lambda h: h.cumprod(-1).sum(-1, keepdim=True),
    "linalg_vector_norm/smallest": lambda h: torch.linalg.vector_norm(h, -math.inf, dim=-1, keepdim=True),
    "frobenius_norm": lambda h: aten.frobenius_norm(h, [-1], True) * 0 + h.quantile(0.3, -1, keepdim=True),
}
for _name, _reduce in WHOLE.items():
    case(_name, "ffn:6", ROWS, gate(_reduce))
case(
    "linalg_norm/of matrices",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear((lambda h: h / torch.linalg.norm(h, 2, dim=(1, 2), keepdim=True))(n.linear(x, 8)), 3),
)
case(
    "linalg_norm/nuclear",
    "",
    SEQUENCE,
    lambda n, x: n.linear((lambda h: h / torch.linalg.norm(h, "nuc", dim=(1, 2), keepdim=True))(n.linear(x, 8)), 3),
)
case("mean/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).mean(1), 3))
case("cumsum/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).cumsum(1), 3))
case("argmax/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).argmax(1).double(), 3))
case("max/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).max(1).values, 3))
case("mean/of two axes", "ffn:8~", SEQUENCE, lambda n, x: n.linear((lambda h: h - h.mean((1, 2), keepdim=True))(n.linear(x, 8)), 3))
