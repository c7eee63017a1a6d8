"""Sums of products: linear layers, matrix products, einsum."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from irprune.ir.dims import UNIT, Term
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value
from irprune.rules.registry import renormalise, rule

if TYPE_CHECKING:
    from irprune.backend.proof import Keep


@rule("linear")
def linear(op: Op, input: Value, weight: Value, bias: Value | None = None) -> Axes:
    """``y = x @ weight.T + bias``.

    Shapes: x ``(*, in)``, weight ``(out, in)``, bias ``(out,)``, y ``(*, out)``. ``in`` is
    contracted, ``out`` is the weight's own. Source: ``torch.nn.functional.linear``.
    """
    op.unify(input.axes[-1], weight.axes[-1])
    op.contract(input, -1)
    op.contract(weight, -1)
    own = weight.axes[:-1]
    if bias is not None:
        op.broadcast(own, bias.axes)
    op.macs((*_product(input.axes), *_product(own)))
    return (*input.axes[:-1], *own)


def _product(axes: Axes) -> Term:
    return tuple(atom for term in axes for atom in term)


def _matmul(op: Op, a: Value, b: Value) -> Axes:
    """``a @ b`` with broadcast leading axes; vectors as ``torch.matmul`` has them."""
    at = -2 if b.ndim > 1 else -1
    op.unify(a.axes[-1], b.axes[at])
    op.contract(a, -1)
    op.contract(b, at)
    batch = op.broadcast(a.axes[:-2], b.axes[:-2])
    rows = a.axes[-2:-1]
    columns = b.axes[-1:] if b.ndim > 1 else ()
    op.macs((*_product(batch), *_product(rows), *_product(columns), *a.axes[-1]))
    return (*batch, *rows, *columns)


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot", "inner", "linalg_matmul")
def matmul(op: Op) -> Axes:
    a, b = op.operands()
    if "inner" in op.name and b.ndim > 1:
        b = Value(b.node, (*b.axes[:-2], b.axes[-1], b.axes[-2]), (*b.shape[:-2], b.shape[-1], b.shape[-2]), b.dtype)
    return _matmul(op, a, b)


@rule("addmm", "addbmm", "baddbmm", "addmv")
def addmm(op: Op, self: Value) -> Axes:
    """``self + a @ b``."""
    _, a, b = op.operands()
    result = _matmul(op, a, b)
    if op.name.startswith("addbmm"):
        op.contract(a, 0)
        op.contract(b, 0)
        result = result[1:]
    op.broadcast(result, self.axes)
    return result


@rule("outer", "ger")
def outer(op: Op) -> Axes:
    a, b = op.operands()
    op.macs((*a.axes[0], *b.axes[0]))
    return (a.axes[0], b.axes[0])


@rule("addr")
def addr(op: Op, self: Value, vec1: Value, vec2: Value) -> Axes:
    """``self + outer(vec1, vec2)``."""
    op.macs((*vec1.axes[0], *vec2.axes[0]))
    return op.broadcast((vec1.axes[0], vec2.axes[0]), self.axes)


@rule("kron")
def kron(op: Op, self: Value, other: Value) -> Axes:
    """Every axis is the product of both operands' axes, the first one's major; missing ones are in front."""
    a, b = ((UNIT,) * (len(op.shape) - value.ndim) + value.axes for value in (self, other))
    op.macs(_product((*a, *b)))
    return tuple((*x, *y) for x, y in zip(a, b, strict=True))


@rule("tensordot")
def tensordot(op: Op, self: Value, other: Value, dims_self: list[int], dims_other: list[int]) -> Axes:
    """Pairs of axes are contracted; what is left of the first operand stands before what is left of the second."""
    left, right = [d % self.ndim for d in dims_self], [d % other.ndim for d in dims_other]
    for i, j in zip(left, right, strict=True):
        op.unify(self.axes[i], other.axes[j])
    op.contract(self, *left)
    op.contract(other, *right)
    rows = tuple(term for i, term in enumerate(self.axes) if i not in left)
    columns = tuple(term for j, term in enumerate(other.axes) if j not in right)
    op.macs(_product((*self.axes, *columns)))
    return (*rows, *columns)


@rule("linalg_multi_dot", "chain_matmul")
def multi_dot(op: Op) -> Axes:
    """``a @ b @ ... @ z``; the first and the last one may be vectors. In which order is for the operation to choose."""
    operands = op.operands()
    for a, b in itertools.pairwise(operands):
        op.unify(a.axes[-1], b.axes[0])
        op.contract(a, -1)
        op.contract(b, 0)
    return (*operands[0].axes[:-1], *operands[-1].axes[1:])


@rule("linalg_vecdot")
def along(op: Op, dim: int = -1) -> Axes:
    """A sum of products along one axis."""
    a, b = op.operands()
    both = op.broadcast(a.axes, b.axes)
    at = dim % len(both)
    for value in (a, b):
        if len(both) - value.ndim <= at:
            op.contract(value, at - len(both))
    op.macs(_product(both))
    return (*both[:at], *both[at + 1 :])


@rule("linalg_inv", "linalg_cholesky", "matrix_exp", "linalg_matrix_power", "linalg_pinv", "linalg_det", "logdet")
def matrices(op: Op) -> Axes:
    """Functions of whole matrices ``(*, n, m)``: leading axes pass."""
    value = op.first()
    for term in value.axes[-2:]:
        op.freeze(term, "mixed", "a function of whole matrices is computed over it")
    lead = value.axes[:-2]
    return (*lead, *(op.solid(size, "mixed", "a function of whole matrices gives it") for size in op.shape[len(lead) :]))


@rule("linalg_solve_triangular")
def solve_triangular(op: Op, self: Value, B: Value, left: bool = True) -> Axes:
    """``X`` of ``self @ X = B`` (not left: ``X @ self = B``); the other axis of ``B`` is one of independent problems."""
    for term in (*self.axes[-2:], B.axes[-2 if left else -1]):
        op.freeze(term, "mixed", "linear equations are solved over it")
    return (*op.broadcast(self.axes[:-2], B.axes[:-2]), *B.axes[-2:])


@rule("einsum")
def einsum(op: Op, equation: str, tensors: list[Value]) -> Axes:
    """Letters are axes: equal letters are equal axes, letters that the result lacks are summed."""
    left, _, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if "->" not in equation:
        letters = list(left.replace("...", "").replace(",", ""))
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    found: dict[str, Term] = {}
    ellipsis: Axes = ()
    for spec, value in zip(inputs, tensors, strict=True):
        before, dots, after = spec.partition("...")
        axes = list(value.axes)
        named = list(zip(before, axes[: len(before)], strict=True))
        if after:
            named += list(zip(after, axes[len(axes) - len(after) :], strict=True))
        if dots:
            ellipsis = op.broadcast(ellipsis, tuple(axes[len(before) : len(axes) - len(after)]))
        seen: set[str] = set()
        for letter, term in named:
            if letter in seen:
                op.freeze(term, "position", "a diagonal of it is read")
            seen.add(letter)
            if found.get(letter, UNIT):
                if term:
                    op.unify(found[letter], term)
            else:
                found[letter] = term
        for dim in _dims_of(spec, value.ndim, {letter for letter in seen if letter not in right}):
            op.contract(value, dim)
    op.macs(tuple(atom for term in (*ellipsis, *found.values()) for atom in term))
    before, dots, after = right.partition("...")
    return (*(found[c] for c in before), *(ellipsis if dots else ()), *(found[c] for c in after))


def _dims_of(spec: str, ndim: int, letters: set[str]) -> list[int]:
    before, _, after = spec.partition("...")
    dims = [i for i, c in enumerate(before) if c in letters]
    return dims + [ndim - len(after) + i for i, c in enumerate(after) if c in letters]


@rule("bilinear")
def bilinear(op: Op, input1: Value, input2: Value, weight: Value, bias: Value | None = None) -> Axes:
    """``y[o] = x1 @ weight[o] @ x2 + bias[o]``."""
    op.unify(input1.axes[-1], weight.axes[1])
    op.unify(input2.axes[-1], weight.axes[2])
    for value, dim in ((input1, -1), (input2, -1), (weight, 1), (weight, 2)):
        op.contract(value, dim)
    if bias is not None:
        op.unify(bias.axes[0], weight.axes[0])
    lead = op.broadcast(input1.axes[:-1], input2.axes[:-1])
    op.macs((*_product(lead), *_product(weight.axes)))
    return (*lead, weight.axes[0])


@rule("cdist")
def distances(op: Op) -> Axes:
    """Distances of all rows of x1 ``(*, P, M)`` to all of x2 ``(*, R, M)``: ``(*, P, R)``. Equal numbers, as two zeros, add nothing."""
    a, b = op.operands()
    op.unify(a.axes[-1], b.axes[-1])
    op.contract(a, -1)
    op.contract(b, -1)
    return (*op.broadcast(a.axes[:-2], b.axes[:-2]), a.axes[-2], b.axes[-2])


@rule("cosine_similarity", "pairwise_distance")
def compared(op: Op) -> Axes:
    """Two tensors compared along one axis (of a distance the last), position by position elsewhere.

    A zero in both leaves a similarity as it is. It does not leave a distance, which adds its ``eps`` to each difference.
    """
    a, b = op.operands()
    axes = op.broadcast(a.axes, b.axes)
    at = (op.argument("dim") if op.name == "cosine_similarity" else -1) % len(axes) - len(axes)
    sizes = [value.shape[at] if -at <= value.ndim else 1 for value in (a, b)]
    for value in (a, b):
        if sizes[0] != sizes[1]:
            op.freeze(axes[at], "mixed", "it is compared with a single position")
        elif op.name == "cosine_similarity":
            op.contract(value, at)
        else:
            op.mix(value, "distance", at)
    kept = op.name == "pairwise_distance" and op.argument("keepdim")
    return (*axes[:at], *((UNIT,) if kept else ()), *(axes[at + 1 :] if at < -1 else ()))


@renormalise("pairwise_distance")
def masked_distance(keep: Keep, x1: torch.Tensor, x2: torch.Tensor, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.where(keep.mask("x1", -1), x1 - x2 + eps, 0), p, -1, keepdim)


@rule("cross", "linalg_cross")
def cross(op: Op) -> Axes:
    """Positions along one axis are told apart; all of both operands' stay whole."""
    for value in op.operands():
        for term in value.axes:
            op.freeze(term, "position", "its positions are the components of vectors")
    return tuple(op.solid(size, "position", "its positions are the components of vectors") for size in op.shape)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(op: Op) -> Axes:
    """One matrix per run of rows: x ``(rows, in)``, weight ``(groups, in, out)``, ends of runs ``(groups,)``, y ``(rows, out)``.

    Where a run ends is computed, so rows stay whole. A group goes with its end: it has no rows where its
    count is zero.
    """
    a, b, ends = op.operands()[:3]
    op.unify(a.axes[-1], b.axes[-2])
    op.contract(a, -1)
    op.contract(b, -2)
    for term in a.axes[:-1]:
        op.freeze(term, "data-dependent", "which rows meet which matrix is computed")
    op.unify(ends.axes[0], b.axes[-3])
    op.macs((*a.axes[0], *a.axes[-1], *b.axes[-1]))
    return (a.axes[0], b.axes[-1])
