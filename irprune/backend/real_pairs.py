"""A program without complex numbers: each is two real tensors, its real and its imaginary part.

ONNX has complex types, and hardly an operation that takes them. Rotary positions written as complex numbers and
complex weights are exported so; Fourier transforms stay, the exporter writes them on pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._subclasses.complex_tensor import ComplexTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from irprune.errors import ExportError
from irprune.ir.fake import mode_of
from irprune.ir.program import Program, graph_module, location, writes
from irprune.rules.registry import op_name

_PARTS = ("real", "imag")


@dataclass(frozen=True)
class _Pair:
    """The two parts of a complex value."""

    real: Any
    imag: Any


def in_real_pairs(program: Program) -> Program:
    """The same program with two real tensors for each complex one; the program itself where it has none.

    A complex parameter or buffer ``name`` becomes ``name_real`` and ``name_imag``. An operation on complex values is
    written out by torch's own rules for them; one that these do not know stays, on numbers that are put together for it.

    Raises:
        ExportError: An input or output is complex, or a complex tensor is computed in place.
    """
    if not any(_is_complex(node) for node in program.nodes):
        return program
    mode = mode_of(program.nodes)
    assert mode is not None
    writer = _Writer(program.tensors, mode)
    writer.write(program.module.graph, program.tensors)
    writer.graph.eliminate_dead_code()  # what was begun before a rule was found wanting
    writer.graph.set_codegen(program.module.graph._codegen)
    module = graph_module({**program.tensors, **writer.made}, writer.graph)
    return dataclasses.replace(program, module=module, types=None, infer=None)


class _Writer:
    """Writes a graph anew.

    Attributes:
        graph: The new one.
        made: Tensors that only it reads.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], mode: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self._tensors = tensors
        self._mode = mode
        self.made: dict[str, torch.Tensor] = {}
        self._env: dict[fx.Node, Any] = {}

    def write(self, old: fx.Graph, tensors: Mapping[str, torch.Tensor], within: fx.Node | None = None) -> None:
        """Write a graph's operations.

        Args:
            old: The graph.
            tensors: What its ``get_attr`` nodes name.
            within: The operation that the graph stands for, its inputs known; ``None`` for a program's own.
        """
        for node in old.nodes:
            if node in self._env or (within is not None and node.op == "output"):
                continue
            touched = _is_complex(node) or any(_is_complex(operand) for operand in node.all_input_nodes)
            if node.op in ("placeholder", "output") and touched:
                raise ExportError(
                    f"a complex {'input' if node.op == 'placeholder' else 'output'} has no place in an ONNX file",
                    where=node.name,
                    hint="let the model take and give real tensors (torch.view_as_complex and torch.view_as_real inside it)",
                )
            if within is not None:
                node.meta = {**within.meta, "val": node.meta["val"]}
            if node.target in _SAME and (touched or within is not None):
                self._env[node] = self._env[node.args[0]]
            elif node.op == "get_attr" and (touched or within is not None):
                self._env[node] = self._held(node, tensors[str(node.target)])
            elif not touched:
                self._env[node] = self.graph.node_copy(node, self._env.__getitem__)
            else:
                self._env[node] = self._kept(node) if within is not None and node.target is within.target else self._result(node)

    def _held(self, node: fx.Node, tensor: torch.Tensor) -> Any:
        """A tensor of the new graph's own, or two in the place of a complex one."""
        if not tensor.is_complex():
            return self._named(node, f"{node.target}_value", tensor, node.meta["val"])
        whole = tensor.detach().resolve_conj()
        return _Pair(*(self._named(node, f"{node.target}_{part}", _half(whole, part), _half(node.meta["val"], part)) for part in _PARTS))

    def _named(self, like: fx.Node, name: str, tensor: torch.Tensor, value: torch.Tensor) -> fx.Node:
        while name in self.made or name in self._tensors:
            name += "_"
        self.made[name] = tensor
        node = self.graph.get_attr(name)
        node.meta = {**like.meta, "val": value}
        return node

    def _result(self, node: fx.Node) -> Any:
        """What an operation gives that reads or gives complex values."""
        operands = [self._env[operand] for operand in node.all_input_nodes]
        if node.target is operator.getitem:
            return operands[0][node.args[1]]
        if _by_part(node):
            return self._twice(node)
        if writes(node):
            text = f"operation '{op_name(node.target)}' writes complex numbers in place, which has no form in ONNX"
            raise ExportError(text, where=f"%{node.name} ({location(node) or 'line unknown'})", hint="write x = x * y for x *= y")
        numbers = any(isinstance(leaf, complex) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
        # Torch's rules for complex numbers, then what the operation is composed of, then the operation itself.
        pairs = numbers or any(isinstance(one, _Pair) for one in operands)
        for whole in (ComplexTensor, torch.complex) if pairs or self._made(node) is not None else (torch.complex,):
            with contextlib.suppress(TypeError, RuntimeError):  # how torch says that it has no rule
                found = self._inlined(node, whole)
                if found is not None:
                    return found
        return self._kept(node)

    def _inlined(self, node: fx.Node, whole: Callable[..., torch.Tensor]) -> Any:
        """An operation traced on its operands, the complex ones of a type, and the trace put here; ``None`` where it writes in place."""
        operands = list(node.all_input_nodes)
        leaves, spec = pytree.tree_flatten(
            [[self._env[one].real, self._env[one].imag] if _is_complex(one) else self._env[one] for one in operands]
        )
        pairs, made = list[bool](), self._made(node)

        def run(*values: Any) -> list[torch.Tensor]:
            known = dict(zip(operands, pytree.tree_unflatten(list(values), spec), strict=True))
            known = {one: whole(*value) if _is_complex(one) else value for one, value in known.items()}
            if whole is ComplexTensor and made is None and not any(isinstance(value, ComplexTensor) for value in known.values()):
                known = {one: ComplexTensor(value, torch.zeros_like(value)) for one, value in known.items()}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            result = ComplexTensor(*made(*args, **kwargs)) if made is not None else node.target(*args, **kwargs)  # type: ignore[operator]
            results = list(result) if isinstance(result, (list, tuple)) else [result]
            pairs[:] = [one.is_complex() for one in results]
            return [part for one in results for part in (_parts(one) if one.is_complex() else (one,))]

        with self._mode:  # make_fx takes one object in two places for one operand
            values = [leaf.meta["val"].detach() if isinstance(leaf.meta["val"], torch.Tensor) else leaf.meta["val"] for leaf in leaves]
        rules: Any = {node.target: decomposition_table[node.target]} if node.target in decomposition_table else {}
        with self._mode:
            traced = make_fx(run, rules if whole is torch.complex else {}, tracing_mode="symbolic")(*values)
        if any(writes(one) for one in traced.graph.nodes):
            return None
        traced.graph.eliminate_dead_code()
        self._env.update(zip(traced.graph.find_nodes(op="placeholder"), leaves, strict=True))
        self.write(traced.graph, {**dict(traced.named_buffers()), **dict(traced.named_parameters())}, node)
        results: Any = traced.graph.output_node().args[0]
        flat = iter([self._env[one] for one in results])
        found = [_Pair(next(flat), next(flat)) if pair else next(flat) for pair in pairs]
        return found if isinstance(node.meta["val"], (list, tuple)) else found[0]

    def _twice(self, node: fx.Node) -> Any:
        """The same operation on each part: views stay views, so that what is written to one is seen by the others."""
        halves = []
        for part in _PARTS:
            halves.append(self.graph.node_copy(node, functools.partial(self._part, part=part)))
            if "dtype" in node.kwargs:
                halves[-1].update_kwarg("dtype", node.meta["val"].dtype.to_real())
            halves[-1].meta = {**node.meta, "val": pytree.tree_map(functools.partial(_half, part=part), node.meta["val"])}
        if not isinstance(node.meta["val"], (list, tuple)):
            return _Pair(*halves)
        return [_Pair(*(self._added(node, operator.getitem, half, place) for half in halves)) for place in range(len(node.meta["val"]))]

    def _part(self, node: fx.Node, part: str) -> fx.Node:
        """A part of an operand; a real one as it is."""
        found: fx.Node = getattr(self._env[node], part) if _is_complex(node) else self._env[node]
        return found

    def _added(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        with self._mode:
            made.meta = {**like.meta, "val": target(*fx.node.map_arg(args, lambda one: one.meta["val"]))}
        return made

    def _made(self, node: fx.Node) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
        """How an operation on real tensors makes the two parts, where that is known."""
        if any(_is_complex(operand) for operand in node.all_input_nodes):
            return None
        if op_name(node.target) in _CASTS:
            part = node.meta["val"].dtype.to_real()
            return lambda self, *_, **__: (self.to(part), torch.zeros_like(self, dtype=part))
        return _MAKES.get(node.target)

    def _kept(self, node: fx.Node) -> Any:
        """The operation itself, on complex numbers that are put together for it."""

        def operand(one: fx.Node) -> fx.Node:
            parts = [self._part(one, part) for part in _PARTS]
            if not _is_complex(one):
                return parts[0]
            whole = self.graph.call_function(torch.ops.aten.complex.default, tuple(parts))
            whole.meta = {**node.meta, "val": one.meta["val"]}  # asked for one, torch would fix dynamic sizes
            return whole

        def parts(one: fx.Node) -> Any:
            if not one.meta["val"].is_complex():
                return one
            whole = self._added(node, torch.ops.aten.view_as_real.default, one)
            return _Pair(*(self._added(node, torch.ops.aten.select.int, whole, -1, part) for part in (0, 1)))

        made = self.graph.node_copy(node, operand)
        if not isinstance(node.meta["val"], (list, tuple)):
            return parts(made)
        return [parts(self._added(node, operator.getitem, made, place)) for place in range(len(node.meta["val"]))]


_MAKES: dict[Any, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    torch.ops.aten.complex.default: lambda real, imag: (real, imag),
    torch.ops.aten.view_as_complex.default: lambda self: self.unbind(-1),
    torch.ops.aten.polar.default: lambda abs, angle: (abs * angle.cos(), abs * angle.sin()),
}
_CASTS = ("aten::to", "aten::_to_copy", "prims::convert_element_type")
_ZEROS = ("aten::zeros", "aten::new_zeros", "aten::zeros_like", "aten::empty", "aten::new_empty", "aten::empty_like")
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh_copy.default)


def _is_complex(node: fx.Node) -> bool:
    value = [operand.meta.get("val") for operand in node.all_input_nodes] if node.op == "output" else node.meta.get("val")
    return any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(value))


def _half(tensor: torch.Tensor, part: str) -> torch.Tensor:
    half: torch.Tensor = getattr(tensor, part).contiguous()
    return half


def _by_part(node: fx.Node) -> bool:
    """Whether an operation does the same to both parts: a view, a copy into one, and what makes zeros."""
    name, schema = op_name(node.target), getattr(node.target, "_schema", None)
    if name in _ZEROS:
        return _is_complex(node)
    operands = [_is_complex(operand) for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor)]
    if schema is None or not _is_complex(node) or not operands or not all(operands):
        return False
    casts = any(isinstance(leaf, torch.dtype) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    views = not casts and not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)
    return name == "aten::copy_" or (views and "conj" not in name)


def _parts(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (value.re, value.im) if isinstance(value, ComplexTensor) else torch.view_as_real(value).unbind(-1)
