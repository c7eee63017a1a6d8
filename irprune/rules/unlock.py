"""Axes of the interface that may be cut when the user asks for it: the vocabulary and positions.

Rows of a table that a look-up reads stay whole, because which rows are read is only known at run time.
Two kinds are an exception on request, since what is read is then known:

- *vocabulary*: the rows of the table that the token ids of an input index, nothing else being made of
  those ids, with the last axis of every output over the same tokens. Ids must be numbered anew.
- *positions*: the rows of tables that are indexed by places computed from sizes alone. The first rows
  stay, so that the numbers keep their meaning; a longer input is out of range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from irprune.ir.program import Program
from irprune.rules.registry import bind, op_name

KINDS = ("vocabulary", "positions")
SAME = """
to _to_copy view reshape _unsafe_view unsqueeze squeeze clone contiguous alias detach expand flatten slice transpose permute lift_fresh_copy
"""
SAME_NUMBERS = frozenset(f"aten::{name}" for name in SAME.split())
SHAPE_ONLY = """
zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
"""
SIZES = frozenset(f"aten::{name}" for name in SHAPE_ONLY.split())
TABLES = frozenset({"aten::embedding"})


@dataclass(frozen=True)
class Tokens:
    """The token ids of a program.

    Attributes:
        input: Name of the placeholder that holds them.
        rows: Number of rows of the tables that they index.
        nodes: The look-ups.
    """

    input: str
    rows: int
    nodes: frozenset[str]


def tokens(program: Program) -> Tokens | str:
    """The token ids with the largest table, or why there are none that could be numbered anew."""
    found: dict[tuple[str, int], set[str]] = {}
    for node, table, indices in _lookups(program):
        source = _source(indices)
        if source.op == "placeholder":
            found.setdefault((source.name, program.tensors[str(table.target)].shape[0]), set()).add(node.name)
    if not found:
        return "no input indexes a table by itself"
    name, rows = max(found, key=lambda place: place[1])
    others = [place for place in found if place[0] == name and place[1] != rows]
    if others:
        return f"input {name} indexes tables of {rows} and of {others[0][1]} rows"
    reader = _other_reader(program.by_name[name], found[name, rows])
    if reader is not None:
        return f"the ids of input {name} are also read by %{reader.name} = {op_name(reader.target)}"
    return Tokens(name, rows, frozenset(found[name, rows]))


def positional(program: Program) -> frozenset[str]:
    """Names of the look-ups whose indices come from sizes, constants and buffers alone."""
    return frozenset(node.name for node, _, indices in _lookups(program) if not _reads_an_input(indices))


def _lookups(program: Program) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    for node in program.nodes:
        if node.op != "call_function" or op_name(node.target) not in TABLES:
            continue
        bound: dict[str, Any] = bind(node.target, node.args, dict(node.kwargs))
        table, indices = bound["weight"], bound["indices"]
        if table.op == "get_attr" and program.is_parameter(str(table.target)):
            yield node, table, indices


def _source(node: fx.Node) -> fx.Node:
    """Where numbers come from, behind reshapes and casts."""
    while node.op == "call_function" and op_name(node.target) in SAME_NUMBERS:
        node = node.all_input_nodes[0]
    return node


def _is_number(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor)


def _other_reader(ids: fx.Node, lookups: set[str]) -> fx.Node | None:
    """An operation that makes something else of the ids than a look-up, a reshape or a size."""
    pending = list(ids.users)
    while pending:
        node = pending.pop()
        name = op_name(node.target)
        if node.name in lookups or name in SIZES or "sym_size" in str(node.target) or name == "aten::_assert_tensor_metadata":
            continue
        if node.op != "call_function" or name not in SAME_NUMBERS:
            return node
        pending.extend(node.users)
    return None


def _reads_an_input(node: fx.Node) -> bool:
    """Whether the contents of a value depend on those of an input."""
    pending, seen = [node], set()
    while pending:
        value = pending.pop()
        if value in seen or _is_number(value) or (value.op == "call_function" and op_name(value.target) in SIZES):
            continue
        seen.add(value)
        if value.op == "placeholder":
            return True
        pending.extend(value.all_input_nodes)
    return False
