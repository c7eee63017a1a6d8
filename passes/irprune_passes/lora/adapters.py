"""Adapters in a program: where they fit, how they are built, how they are found again, what they add up to.

An adapter of a weight ``W`` is ``y + scale * B(A(dropout(x)))`` beside every operation ``y = W(x)`` that
reads it (Hu et al. 2021, arXiv 2106.09685). Shapes, with ``r`` the rank:

=========  ==========================  ===========================  ======================
kind       A                           B                            added to the weight
=========  ==========================  ===========================  ======================
linear     ``(r, in)``                 ``(out, r)``                 ``B @ A``
conv       ``(G * r, in / G, *k)``     ``(out, r, 1, ...)``         ``B_g * A_g`` per group
embedding  ``(r, rows)``               ``(width, r)``               ``(B @ A).T``
=========  ==========================  ===========================  ======================

Everything about an adapter stands in the graph, so it is found by its structure and survives pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from irprune.ir.dims import Freeze
from irprune.ir.edit import Editor
from irprune.ir.program import Program

Kind = Literal["linear", "conv", "embedding"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Form:
    """How an operation reads a weight.

    Attributes:
        kind: What the weight is.
        x: Position of the activation among the arguments.
        weight: Position of the weight.
        transposed: The weight is ``(in, out)``.
    """

    kind: Kind
    x: int
    weight: int
    transposed: bool = False


_FORMS: Mapping[Any, _Form] = {
    aten.linear.default: _Form("linear", 0, 1),
    aten.addmm.default: _Form("linear", 1, 2, True),
    aten.mm.default: _Form("linear", 0, 1, True),
    aten.matmul.default: _Form("linear", 0, 1, True),
    **{
        getattr(conv, overload): _Form("conv", 0, 1)
        for conv in (aten.conv1d, aten.conv2d, aten.conv3d)
        for overload in ("default", "padding")
    },
    aten.embedding.default: _Form("embedding", 1, 0),
}


@dataclass(frozen=True)
class Site:
    """A weight that an adapter fits beside.

    Attributes:
        weight: Name of the parameter.
        kind: What it is.
        transposed: A linear's weight is ``(in, out)`` (PEFT: ``fan_in_fan_out``).
        bases: Names of the operations that read it.
        groups: Groups of a convolution.
    """

    weight: str
    kind: Kind
    transposed: bool
    bases: tuple[str, ...]
    groups: int = 1

    def names(self) -> tuple[str, str]:
        """Names of A and B: those of PEFT, under the module that holds the weight."""
        module, _, leaf = self.weight.rpartition(".")
        prefix = "lora_embedding_" if self.kind == "embedding" else "lora_"
        a, b = (".".join(filter(None, (module, f"{prefix}{part}", leaf))) for part in "AB")
        return a, b

    def shapes(self, weight: torch.Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B; the rank of a grouped convolution is that of each group."""
        if self.kind == "conv":
            return (rank * self.groups, *weight.shape[1:]), (weight.shape[0], rank, *(1,) * (weight.ndim - 2))
        if self.kind == "embedding" or self.transposed:
            return (rank, weight.shape[0]), (weight.shape[1], rank)
        return (rank, weight.shape[1]), (weight.shape[0], rank)


def sites(program: Program) -> dict[str, Site]:
    """Where adapters fit, by weight: parameters that one kind of operation reads, and nothing else does."""
    found = {}
    for name, holder in program.holders.items():
        weight = program.tensors[name]
        forms = {_FORMS.get(user.target) for user in holder.users}
        form = next(iter(forms), None)
        if len(forms) != 1 or form is None or not program.is_parameter(name) or not weight.is_floating_point():
            continue
        if form.kind != "conv" and weight.ndim != 2:
            continue
        if not all(user.args[form.weight] is holder and isinstance(user.args[form.x], fx.Node) for user in holder.users):
            continue
        groups = {_groups(user) for user in holder.users} if form.kind == "conv" else {1}
        if len(groups) == 1:
            found[name] = Site(name, form.kind, form.transposed, tuple(user.name for user in holder.users), groups.pop())
    return found


def _groups(conv: fx.Node) -> int:
    groups: Any = conv.args[6] if len(conv.args) > 6 else conv.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


_RANK = Freeze("adapter", "it is the rank of an adapter")


def attach(edit: Editor, site: Site, a: torch.Tensor, b: torch.Tensor, *, scale: float, dropout: float) -> None:
    """Put an adapter beside every operation that reads a weight."""
    first = edit.nodes[site.bases[0]]
    names = site.names()
    with edit.graph.inserting_before(first):
        holders = [edit.tensor(name, torch.nn.Parameter(value)) for name, value in zip(names, (a, b), strict=True)]
    holders[1].meta["freeze"] = {1: _RANK}
    for name in site.bases:
        base = edit.nodes[name]
        x = base.args[_FORMS[base.target].x]
        with edit.graph.inserting_before(base.next):
            if dropout and site.kind != "embedding":
                x = edit.call(aten.dropout.default, x, dropout, False, like=base)
            inner = _inner(edit, site, base, x, holders[0])
            outer = _outer(edit, site, base, inner, holders[1])
            scaled = edit.call(aten.mul.Tensor, outer, scale, like=base)
            total = edit.call(aten.add.Tensor, base, scaled, like=base)
        for user in [user for user in base.users if user is not total]:
            user.replace_input_with(base, total)


def _inner(edit: Editor, site: Site, base: fx.Node, x: Any, a: fx.Node) -> fx.Node:
    if site.kind == "linear":
        return edit.call(aten.linear.default, x, a, like=base)
    if site.kind == "conv":
        return edit.call(base.target, x, a, None, *base.args[3:], like=base)
    table = edit.call(aten.transpose.int, a, 0, 1, like=base)
    return edit.call(aten.embedding.default, table, *base.args[1:], like=base)


def _outer(edit: Editor, site: Site, base: fx.Node, inner: fx.Node, b: fx.Node) -> fx.Node:
    if site.kind != "conv":
        return edit.call(aten.linear.default, inner, b, like=base)
    rank = b.meta["val"].ndim - 2
    plain = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[rank].default
    return edit.call(plain, inner, b, None, [1] * rank, [0] * rank, [1] * rank, site.groups, like=base)


# -- found again ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """An adapter of a program.

    Attributes:
        site: The weight that it belongs to.
        a: Name of A.
        b: Name of B.
        scale: What its output is multiplied by.
        dropout: Share of its input that training drops.
        rank: Its rank; of each group for a grouped convolution.
        totals: For each base operation the addition that ends the adapter beside it.
    """

    site: Site
    a: str
    b: str
    scale: float
    dropout: float
    rank: int
    totals: tuple[str, ...] = field(repr=False)

    def delta(self, program: Program) -> torch.Tensor:
        """What it adds to the weight, in at least single precision."""
        weight = program.tensors[self.site.weight]
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (program.value(name).detach().to(wide) for name in (self.a, self.b))
        if self.site.kind == "conv":
            groups = self.site.groups
            product = torch.einsum("gor,gri->goi", b.reshape(groups, -1, self.rank), a.reshape(groups, self.rank, -1))
        else:
            product = b @ a
            product = product.T if self.site.kind == "embedding" or self.site.transposed else product
        return self.scale * product.reshape(weight.shape)


def adapters(program: Program) -> list[Adapter]:
    """The adapters of a program, in order of execution.

    One is told by its structure, ``y + scale * B(A(x))`` beside ``y = W(x)``, and by the part ``lora_`` in the
    names of A and B, so that layers which a model has of itself stay as they are.
    """
    found: dict[str, list[tuple[fx.Node, _Match]]] = {}
    for node in program.nodes:
        if node.op == "call_function" and node.target is aten.add.Tensor and not node.kwargs:
            for base, other in (node.args[:2], node.args[1::-1]):
                match = _match(base, other)
                if match is not None:
                    found.setdefault(match.weight, []).append((node, match))
    return list(_whole(program, found))


@dataclass(frozen=True)
class _Match:
    weight: str
    base: fx.Node
    a: str
    b: str
    scale: float
    dropout: float
    groups: int

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.a, self.b, self.scale, self.dropout, self.groups


_TURNED = (aten.transpose.int, aten.t.default, aten.numpy_T.default)


def _match(base: Any, scaled: Any) -> _Match | None:
    form = _FORMS.get(getattr(base, "target", None))
    if form is None or getattr(scaled, "target", None) is not aten.mul.Tensor:
        return None
    outer: Any = scaled.args[0]
    scale = scaled.args[1]
    inner: Any = outer.args[0] if getattr(outer, "target", None) in _FORMS else None
    own = _FORMS.get(getattr(inner, "target", None))
    if own is None or own.kind != form.kind or own.transposed or not isinstance(scale, int | float):
        return None
    x, a, b, read, weight = inner.args[own.x], inner.args[own.weight], outer.args[1], base.args[form.x], base.args[form.weight]
    if own.kind == "embedding":
        a = a.args[0] if getattr(a, "target", None) in _TURNED else None
    dropout = 0.0
    if x is not read and getattr(x, "target", None) is aten.dropout.default:
        x, dropout = x.args[:2]
    if x is not read or not _named(a) or not _named(b) or getattr(weight, "op", "") != "get_attr":
        return None
    groups = _groups(base) if form.kind == "conv" else 1
    if form.kind == "conv":
        same = inner.target is base.target and inner.args[3:] == base.args[3:] and _groups(outer) == groups
        if not same or (len(outer.args) > 2 and outer.args[2] is not None):
            return None
    return _Match(str(weight.target), base, str(a.target), str(b.target), float(scale), float(dropout), groups)


def _named(value: Any) -> bool:
    return getattr(value, "op", "") == "get_attr" and any(part.startswith("lora_") for part in str(value.target).split("."))


def _whole(program: Program, found: Mapping[str, list[tuple[fx.Node, _Match]]]) -> Iterator[Adapter]:
    """Those that stand beside every use of their weight, the same everywhere."""
    known = sites(program)
    for weight, matches in found.items():
        site = known.get(weight)
        beside = sorted(match.base.name for _, match in matches)
        if site is None or beside != sorted(site.bases) or len({match.parts for _, match in matches}) != 1:
            continue
        match = matches[0][1]
        rank = program.tensors[match.b].shape[1]
        totals = {match.base.name: node.name for node, match in matches}
        yield Adapter(site, match.a, match.b, match.scale, match.dropout, rank, tuple(totals[name] for name in site.bases))


def home(program: Program, weight: torch.Tensor) -> torch.device:
    """Where the factors of a weight's adapter are: beside it, or in memory if it lies in a file."""
    return weight.device if program.source is None else torch.device("cpu")


def scaling(alpha: float, rank: int, *, stabilised: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` (rank-stabilised, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if stabilised else alpha / rank
