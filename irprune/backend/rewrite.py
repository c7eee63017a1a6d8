"""Removal: slice every tensor, recompute every literal size; nothing else changes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy
import torch
from torch import fx

from irprune.ir.dims import Mask, Size, Term, Var, as_size, kept_size, mask_of, resolve, term_size, variables
from irprune.ir.fake import describing, mode_of
from irprune.ir.program import Axes, Program, Runner, Types, copied, graph_module
from irprune.ir.sliced import Sliced
from irprune.rules.infer import UNIFORM, inferred
from irprune.rules.registry import bind, op_name, registry


class Shrink:
    """A plan seen from the axes: which are touched, what is kept of them.

    Args:
        types: The types of the program.
        keep: One mask per variable.
        known: Sizes of the symbols, for masks of axes that have a dynamic factor.
    """

    def __init__(self, types: Types, keep: Mapping[Var, Mask], known: Mapping[Any, int] | None = None) -> None:
        self.types = types
        self._known = known or {}
        self.keep = {var: mask for var, mask in keep.items() if not mask.all()}
        self.counts = {var: int(mask.sum()) for var, mask in self.keep.items()}
        self._touched: dict[Term, bool] = {}
        self._shares: dict[Term, tuple[int, int]] = {}

    def touched(self, term: Term) -> bool:
        found = self._touched.get(term)
        if found is None:
            found = self._touched[term] = any(var in self.keep for var in variables(resolve(term)))
        return found

    def any(self, axes: Axes | list[Axes | None] | None) -> bool:
        if isinstance(axes, list):
            return any(self.any(item) for item in axes)
        return axes is not None and any(self.touched(term) for term in axes)

    def mask(self, term: Term, length: int | None = None) -> Mask:
        """The keep mask of an axis; its length says what a factor that depends on contents is."""
        term = resolve(term)
        keep = dict(self.keep)
        for var in variables(term):
            if isinstance(var.size, int):
                continue
            size = var.size.subs(self._known)
            if not size.is_Integer and length is not None:
                size = length / sympy.cancel(term_size(term) / var.size).subs(self._known)
            keep[var] = np.ones(int(size), dtype=bool)
        return mask_of(term, keep)

    def size(self, term: Term) -> Size:
        return kept_size(term, self.counts)

    def share(self, term: Term) -> tuple[int, int]:
        """What is kept of an axis as a fraction: ``(kept, whole)`` in lowest terms, without its dynamic factors."""
        found = self._shares.get(term)
        if found is None:
            kept, whole = self.size(term), term_size(resolve(term))
            if isinstance(kept, int) and isinstance(whole, int):
                found = Fraction(kept, whole).as_integer_ratio()
            else:
                share = sympy.cancel(sympy.sympify(kept) / whole)
                found = int(share.p), int(share.q)
            self._shares[term] = found
        return found

    def positions(self, term: Term, length: int) -> npt.NDArray[np.int64] | None:
        """The kept positions of an axis; ``None`` where all stay."""
        return np.flatnonzero(self.mask(term, length)) if self.touched(term) else None

    def slice(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """The kept part of a tensor; the tensor itself where nothing is removed."""
        for dim, term in enumerate(axes):
            kept = self.positions(term, tensor.shape[dim])
            if kept is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
        return tensor

    def renumbered(self, numbers: torch.Tensor, term: Term) -> torch.Tensor:
        """Positions along an axis as they are counted when only the kept ones are left."""
        if not self.touched(term):
            return numbers
        order = torch.from_numpy(np.cumsum(self.mask(term)) - 1).to(numbers.device)
        return order[numbers.long()].to(numbers.dtype)


class Resize:
    """What a *resize* function may do to its call."""

    def __init__(self, node: fx.Node, old: fx.Node, shrink: Shrink) -> None:
        self._node = node
        self._old = old
        self._shrink = shrink
        self._bound = bind(old.target, old.args, dict(old.kwargs))
        self._now = bind(node.target, node.args, dict(node.kwargs))
        self.constants: list[tuple[fx.Node, torch.Tensor]] = []

    # -- reading

    @property
    def target(self) -> Any:
        """The operation of the original call."""
        return self._old.target

    def get(self, name: str) -> Any:
        """The argument as it stands in the new call."""
        return self._now[name]

    def _operand(self, name: str) -> Axes:
        return self._shrink.types.of(self._bound[name].name)

    def operand_rank(self, name: str) -> int:
        return len(self._operand(name))

    def old_size(self, name: str, dim: int) -> Size:
        return term_size(resolve(self._operand(name)[dim]))

    def operand_size(self, name: str, dim: int) -> Size:
        """Size of an operand's axis after removal."""
        return self._shrink.size(self._operand(name)[dim])

    def shrinks(self, name: str, dim: int) -> bool:
        """Whether an operand's axis loses positions."""
        return self._shrink.touched(self._operand(name)[dim])

    def position(self, name: str, dim: int, index: int) -> int:
        """Where a boundary of an operand's axis lies after removal."""
        term = self._operand(name)[dim]
        size = term_size(resolve(term))
        if not isinstance(size, int) or not self._shrink.touched(term):
            return index
        bounded = slice(index, None).indices(size)[0]
        return int(self._shrink.mask(term)[:bounded].sum())

    @property
    def result_count(self) -> int:
        axes = self._shrink.types.axes[self._old.name]
        return len(axes) if isinstance(axes, list) else 1

    def _result(self, which: int) -> Axes:
        axes = self._shrink.types.axes[self._old.name]
        found = axes[which] if isinstance(axes, list) else axes
        assert found is not None
        return found

    def result_size(self, dim: int, which: int = 0) -> Size:
        return self._shrink.size(self._result(which)[dim])

    def sizes(self, literals: list[Any], first: int = 0) -> list[Any]:
        """A size list of the call, each entry recomputed from the result's axis where it shrinks.

        A size that the program computes (``batch * heads``) is scaled by the share that is kept.
        """
        return [
            literal if literal == -1 or not self._shrink.touched(term) else self._resized(literal, term)
            for literal, term in zip(literals, self._result(0)[first:], strict=False)
        ]

    def _resized(self, literal: Any, term: Term) -> Any:
        size = self._shrink.size(term)
        if isinstance(size, int) or not isinstance(literal, fx.Node):
            return size
        kept, whole = self._shrink.share(term)
        with self._node.graph.inserting_before(self._node):
            part = self._node.graph.call_function(operator.floordiv, (literal, whole))
            return self._node.graph.call_function(operator.mul, (part, kept))

    def kept(self, key: str, literal: Any) -> Any:
        """The size of a noted term after removal: a number, or a value of the program where the literal is one."""
        term = self._shrink.types.notes.get((self._old.name, key))
        if isinstance(literal, fx.Node):
            return self._resized(literal, term) if term is not None and self._shrink.touched(term) else literal
        size = literal if term is None else self._shrink.size(term)
        assert isinstance(size, int)
        return size

    # -- writing

    def set(self, name: str, value: Any) -> None:
        """Give an argument of the call a new value."""
        self._now[name] = value
        if not isinstance(self._node.target, torch._ops.OpOverload):
            return
        names = [argument.name for argument in self._node.target._schema.arguments]
        position = names.index(name)
        if position < len(self._node.args):
            self._node.update_arg(position, value)
        else:
            self._node.update_kwarg(name, value)

    def retarget(self, target: Any, names: tuple[str, ...], arguments: dict[str, Any]) -> None:
        """Call another operation with these arguments instead."""
        self._node.target = target
        self._node.args = tuple(arguments[name] for name in names)
        self._node.kwargs = {}
        self._now = dict(arguments)

    def repick(self) -> bool:
        """Choose from the first operand's axis what is left of the positions that the call chose.

        The call becomes an ``index_select`` by a constant.

        Returns:
            Whether the call chooses positions of an axis that may shrink.
        """
        if self._old.name not in self._shrink.types.picks:
            return False
        dim, positions = self._shrink.types.picks[self._old.name]
        operand = self._old.all_input_nodes[0]
        source = self._shrink.types.of(operand.name)[dim]
        if not self._shrink.touched(source):
            return True
        mask = self._shrink.mask(source)
        left = np.array([i for i in positions if mask[i]], dtype=np.int64)
        index = torch.from_numpy((np.cumsum(mask) - 1)[left])
        self.constants.append((self._node, index))
        arguments = {"self": self._node.args[0], "dim": dim, "index": None}
        self.retarget(torch.ops.aten.index_select.default, ("self", "dim", "index"), arguments)
        return True


def remove(program: Program, keep: Mapping[Var, Mask]) -> Program:
    """The program without the removed indices. Its types are inferred when somebody asks for them.

    Args:
        program: A typed program. It is not changed; untouched tensors are shared.
        keep: One boolean mask per variable, True where an index stays.
    """
    types = program.typing
    shrink = Shrink(types, keep)
    if not shrink.keep:
        return program
    graph = copied(program.module.graph)
    old_nodes = program.by_name
    touched: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        old = old_nodes[node.name]
        if old.name in types.constants and op_name(old.target) not in UNIFORM:
            continue
        if shrink.any(types.axes.get(old.name)) or any(shrink.any(types.axes.get(operand.name)) for operand in old.all_input_nodes):
            touched.append(node)
    indices: list[tuple[fx.Node, torch.Tensor]] = []
    for node in touched:
        entry = registry().find(node.target)
        if entry is not None and entry.resize is not None:
            rw = Resize(node, old_nodes[node.name], shrink)
            entry.resize(rw, **bind(node.target, node.args, dict(node.kwargs)))
            indices += rw.constants
    made = _slice_constants(program, graph, shrink)
    for number, (node, index) in enumerate(indices):
        name = _free_name(program.module, f"_index_{number}")
        made[name] = index if program.source is not None else index.to(_device(node))
        with graph.inserting_before(node):
            node.update_arg(2, graph.create_node("get_attr", name))
    tensors = made if program.source is None else {name: tensor.to("meta") for name, tensor in made.items()}
    kept: dict[str, tuple[npt.NDArray[np.int64] | None, ...]] = {}
    for name, node in program.holders.items():
        old_tensor, axes = program.tensors[name], types.of(node.name)
        sliced = shrink.slice(old_tensor.detach(), axes)
        if sliced.shape == old_tensor.shape:
            tensors[name] = old_tensor
            continue
        kept[name] = tuple(shrink.positions(term, size) for term, size in zip(axes, old_tensor.shape, strict=True))
        if isinstance(old_tensor, torch.nn.Parameter):
            tensors[name] = torch.nn.Parameter(sliced.contiguous(), requires_grad=old_tensor.requires_grad)
        else:
            tensors[name] = sliced.contiguous()
    graph.eliminate_dead_code()
    module = graph_module(tensors, graph)
    module.training = program.module.training
    source = None if program.source is None else Sliced(program.source, kept, made)
    new = dataclasses.replace(program, module=module, types=None, infer=inferred, source=source)
    _describe(program, new, shrink)
    return new


def _slice_constants(program: Program, graph: fx.Graph, shrink: Shrink) -> dict[str, torch.Tensor]:
    """Compute constants that are or read a shrunk value, once, and put buffers with the wanted part in their place."""
    found: dict[str, torch.Tensor] = {}
    types = program.typing
    wanted = []
    for node in program.nodes:
        if node.name not in types.constants or op_name(node.target) in UNIFORM:
            continue
        if any(shrink.any(types.axes.get(value.name)) for value in (node, *node.all_input_nodes)):
            wanted.append(node)
    if not wanted:
        return found
    values: dict[fx.Node, Any] = {}
    runner = Runner(program)

    def value(node: fx.Node) -> Any:
        if node not in values:
            args, kwargs = runner.arguments(*fx.map_arg((node.args, dict(node.kwargs)), value))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    by_name = {node.name: node for node in graph.nodes}
    for number, node in enumerate(wanted):
        result = value(node)
        axes = types.axes[node.name]
        if isinstance(axes, list) or not isinstance(result, torch.Tensor):
            continue
        name = _free_name(program.module, f"_constant_{number}")
        found[name] = shrink.slice(result, axes).contiguous()
        old = by_name[node.name]
        with graph.inserting_before(old):
            holder = graph.create_node("get_attr", name)
        holder.meta = dict(old.meta)
        old.replace_all_uses_with(holder)
    return found


def _device(node: fx.Node) -> torch.device:
    """The device of a call's result."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value.device


def _free_name(module: torch.nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def _describe(program: Program, new: Program, shrink: Shrink) -> None:
    """Give the new graph's values the metadata (``meta['val']``) that their axes predict.

    Dynamic axes keep their symbols. That the predictions are right is for the proof to say.
    """
    types = program.typing
    made: dict[Any, torch.Tensor] = {}

    def make(shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (dtype, device, tuple(as_size(size) for size in shape))
        if key not in made:
            made[key] = torch.empty(shape, dtype=dtype, device=device)
        return made[key]

    def predicted(value: Any, axes: Axes | None) -> Any:
        if axes is None or not isinstance(value, torch.Tensor) or not shrink.any(axes):
            return value
        sizes = [_scaled(size, shrink.share(term)) if shrink.touched(term) else size for size, term in zip(value.shape, axes, strict=True)]
        return make(tuple(sizes), value.dtype, value.device)

    with describing(mode_of(program.nodes)):
        for node in new.nodes:
            old = program.by_name.get(node.name)
            if node.op == "get_attr":
                tensor = new.tensors[str(node.target)]
                if old is None or tensor.shape != program.tensors[str(node.target)].shape:
                    node.meta["val"] = make(tuple(tensor.shape), tensor.dtype, tensor.device)
            elif old is None and node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif old is not None:
                axes, value = types.axes.get(node.name), node.meta.get("val")
                if isinstance(axes, list) and isinstance(value, list | tuple):
                    node.meta["val"] = type(value)(predicted(v, a) for v, a in zip(value, axes, strict=True))
                elif not isinstance(axes, list):
                    node.meta["val"] = predicted(value, axes)


def _scaled(size: Any, share: tuple[int, int]) -> Any:
    return size // share[1] * share[0]


def shape_of(value: Any) -> tuple[Size, ...]:
    return tuple(as_size(size) for size in value.shape)
