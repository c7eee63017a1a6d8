"""The cost model: parameters, multiply-accumulates and bytes of a program under a plan.

All three are polynomials in how many indices each variable keeps, so they are known before anything
is removed, and interactions (two shrunk axes of one weight) are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import sympy
import torch
from torch.utils import _pytree as pytree

from irprune.ir.dims import Term, Var, as_size, kept_size, resolve, variables
from irprune.ir.program import Program

Counts = Mapping[Var, int]


class Cost:
    """Costs of a typed program.

    Sizes of dynamic axes are those of the example inputs; a size that depends on contents counts as 1.
    """

    def __init__(self, program: Program) -> None:
        types = program.typing
        self._tensors: dict[str, tuple[Term, int, bool]] = {}
        for name, node in program.holders.items():
            tensor = program.tensors[name]
            product = tuple(atom for term in types.of(node.name) for atom in resolve(term))
            self._tensors[name] = (product, tensor.element_size(), isinstance(tensor, torch.nn.Parameter))
        self._macs = {name: tuple(resolve(product) for product in products) for name, products in types.macs.items()}
        known = hints(program)
        symbolic = {var for products in self._macs.values() for product in products for var in variables(product)}
        self._sizes = {var: _number(var.size.subs(known)) for var in symbolic if not isinstance(var.size, int)}

    def _value(self, product: Term, counts: Counts | None) -> int:
        size = kept_size(product, {**self._sizes, **counts} if counts else self._sizes)
        assert isinstance(size, int)
        return size

    def params(self, counts: Counts | None = None) -> int:
        """Number of parameters (buffers are not counted)."""
        return sum(self._value(product, counts) for product, _, own in self._tensors.values() if own)

    def bytes(self, counts: Counts | None = None) -> int:
        """Bytes of all parameters and buffers."""
        return sum(self._value(product, counts) * width for product, width, _ in self._tensors.values())

    def macs(self, counts: Counts | None = None) -> int:
        """Multiply-accumulates of all sums of products for one call with the example inputs."""
        return sum(self._value(p, counts) for products in self._macs.values() for p in products)

    def macs_by_operation(self) -> dict[str, int]:
        """Multiply-accumulates of each operation that has any, by its name."""
        return {name: sum(self._value(product, None) for product in products) for name, products in self._macs.items()}

    def of(self, unit: str, counts: Counts | None = None) -> int:
        """``params``, ``macs`` or ``bytes`` by name."""
        return {"params": self.params, "macs": self.macs, "bytes": self.bytes}[unit](counts)

    @cached_property
    def _uses(self) -> tuple[dict[Var, list[Term]], dict[Var, list[Term]]]:
        """Variable to the products that hold it: of parameters, of operations."""
        tensors: dict[Var, list[Term]] = {}
        macs: dict[Var, list[Term]] = {}
        for product, _, own in self._tensors.values():
            for var in set(variables(product)) if own else ():
                tensors.setdefault(var, []).append(product)
        for products in self._macs.values():
            for product in products:
                for var in set(variables(product)):
                    macs.setdefault(var, []).append(product)
        return tensors, macs

    @cached_property
    def _whole(self) -> dict[Term, int]:
        """The sizes of all products before anything is removed."""
        products = {product for uses in self._uses for terms in uses.values() for product in terms}
        return {product: self._value(product, None) for product in products}

    def per_index(self, var: Var) -> tuple[int, int]:
        """Parameters and multiply-accumulates that go with one index while nothing else is removed."""
        found = []
        for uses in self._uses:
            less = {**self._sizes, var: int(var.size) - 1}
            found.append(sum(self._whole[p] - cast(int, kept_size(p, less)) for p in uses.get(var, ())))
        return found[0], found[1]


def _number(size: sympy.Expr) -> int:
    return int(size.subs(dict.fromkeys(size.free_symbols, 1)))


def hints(program: Program) -> dict[Any, int]:
    """The example inputs' size of each symbol."""
    args, kwargs = program.interface.example
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    found: dict[Any, int] = {}
    placeholders = [node for node in program.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, leaves, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(leaf, torch.Tensor):
            for symbolic, size in zip(value.shape, leaf.shape, strict=True):
                expr = as_size(symbolic)
                if isinstance(expr, sympy.Symbol):
                    found[expr] = int(size)
    return found
