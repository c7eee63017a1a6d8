"""Where a program may be cut into segments that are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from irprune.backend.proof import fake_values
from irprune.ir.program import Program, writes
from irprune.rules.registry import bind


def unsafe_cuts(program: Program) -> set[int]:
    """Numbers of the operations before which there is no cut: between a value's origin and the last write to its memory.

    A segment that begins there and is run again would write a second time to what it was given. Whose memory
    an operation shares is not in its schema (dropout that is off returns its operand), so it is looked up on
    tensors without data.
    """
    calls = [node for node in program.nodes if node.op == "call_function"]
    if not any(writes(node) for node in calls):
        return set()
    values = fake_values(program)
    origin: dict[int, int] = {}
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr"):
            origin.update((memory, -1) for memory in _memories(values.get(node.name)))
    found: set[int] = set()
    for number, node in enumerate(calls):
        for memory in _memories(values.get(node.name)):
            origin.setdefault(memory, number)
        for operand in _written(node):
            for memory in _memories(values.get(operand.name)):
                found.update(range(origin[memory] + 1, number + 1))
    return found


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that an operation writes to."""
    if writes(node):
        bound = bind(node.target, node.args, dict(node.kwargs))
        for argument in node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (leaf for leaf in pytree.tree_leaves(bound[argument.name]) if isinstance(leaf, fx.Node))


def _memories(value: Any) -> Iterator[int]:
    """The storages behind a value's tensors."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()._cdata
