"""Adding operations and tensors to a program: names are placed, values described, types inferred anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from irprune.ir.fake import described_on, describing, mode_of
from irprune.ir.program import Program, writes


class Editor:
    """A copy of a program that may be edited. Tensors are shared; the program itself stays as it is.

    Args:
        program: What to start from.
    """

    def __init__(self, program: Program) -> None:
        self._program = program.clone()
        self.graph = self._program.module.graph
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        self._mode = mode_of(self.graph.nodes)

    def tensor(self, name: str, value: torch.Tensor) -> fx.Node:
        """Register a parameter (or, for a plain tensor, a buffer) and give its node, at the place of insertion."""
        place(self._program.module, name, value)
        node = self.graph.get_attr(name)
        with describing(self._mode):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=described_on(self._program, value))
        return node

    def call(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        """Add an operation at the place of insertion.

        Args:
            target: An ATen overload.
            args: Its arguments.
            like: An operation whose place in the user's model it shares.
        """
        node = self.graph.create_node("call_function", target, args, name=target._schema.name.rpartition("::")[2])
        if like is not None:
            node.meta.update({key: value for key, value in like.meta.items() if key != "val"})
        with describing(self._mode):
            node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
        return node

    def done(self) -> Program:
        """The edited program, typed. Operations and tensors that nothing uses are gone."""
        from irprune.rules.infer import typed

        # torch's own removal keeps what draws random numbers.
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not writes(node):
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        return typed(self._program.with_graph(self.graph))


def place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a tensor under a dotted name, with the containers that it needs."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)
