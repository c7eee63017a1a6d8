"""The Program: the one thing that passes take and return."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from irprune.ir.dims import Dims, Freeze, Term

Axes = tuple[Term, ...]


@dataclass(frozen=True)
class Applied:
    """One entry of the provenance: a pass with its text form and what it reported."""

    text: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Event:
    """An operation that reads *across* an axis instead of position by position.

    Attributes:
        node: Name of the operation.
        operand: Name of the value that is read.
        axis: Its axis.
        how: ``contract`` (a sum of products: a zero at an index removes it exactly), or the name of
            a mixing (``mean``, ``norm``, ``softmax``, ``max`` …) that must be renormalised over the
            kept indices.
    """

    node: str
    operand: str
    axis: int
    how: str

    @property
    def exact(self) -> bool:
        return self.how == "contract"


@dataclass(frozen=True)
class Diagnostic:
    """Something that analysis could not use: an operation without a rule, a misaligned reshape."""

    node: str
    freeze: Freeze


@dataclass
class Types:
    """What inference found: one dimension term per axis of every tensor value.

    Attributes:
        dims: The variables' home.
        axes: Node name to axes; for an operation with several results, a list of axes (``None``
            where a result is not a tensor).
        events: Where axes are contracted or mixed.
        diagnostics: What was frozen for lack of understanding.
        macs: Operation name to products whose sizes add up to its multiply-accumulates.
        notes: Terms that a rule keeps for later, by operation name and key (``groups``).
        constants: Names of nodes that depend on no input, parameter or symbolic size: their value may
            be computed once and sliced like a buffer.
        picks: Operation name to ``(axis, positions)`` where the result's axis is made of chosen positions
            of the first operand's.
        points: Values whose numbers are positions along an axis, by operation name and place among its
            results: whichever expert a token was sent to. They follow that axis when it shrinks.
        least: Axes of which at least so many positions are needed (the ``k`` of a top-k).
        unlocked: Axes of tables that the user allowed to be cut although they are looked up, by kind
            (``vocabulary``, ``positions``).
        lookups: The look-ups whose table is unlocked: operation name to kind.
        ids: Name of the input whose numbers index the vocabulary, where that is unlocked.
    """

    dims: Dims = field(default_factory=Dims)
    axes: dict[str, Axes | list[Axes | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    constants: frozenset[str] = frozenset()
    macs: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    notes: dict[tuple[str, str], Term] = field(default_factory=dict)
    picks: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    points: dict[tuple[str, int], Term] = field(default_factory=dict)
    least: list[tuple[Term, int]] = field(default_factory=list)
    unlocked: dict[str, list[Term]] = field(default_factory=dict)
    lookups: dict[str, str] = field(default_factory=dict)
    ids: str | None = None

    def of(self, name: str) -> Axes:
        axes = self.axes[name]
        assert isinstance(axes, tuple), f"{name} has several results"
        return axes


@dataclass(frozen=True)
class Interface:
    """What callers of the program rely on: it never changes.

    Attributes:
        example: Example ``(args, kwargs)`` as the user gave them.
        dynamic: One entry per flat input: ``{axis: label}`` of the dynamic axes.
        inputs: Name of each flat input (the placeholder's).
        outputs: Name of each flat output, for export.
        notes: What the trace decided and the user may want to know, one sentence each.
    """

    example: tuple[tuple[Any, ...], dict[str, Any]]
    dynamic: tuple[dict[int, str], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A traced model with its types.

    Attributes:
        module: A runnable and trainable ``GraphModule`` of ATen calls. Parameters and buffers are
            ``get_attr`` nodes whose targets are the model's own fully qualified names.
        interface: Inputs and outputs.
        types: What inference found; ``None`` until :func:`irprune.rules.infer.typed`.
        aliases: Tied names: another fully qualified name of a parameter to the one in use.
        provenance: The passes applied so far.
    """

    module: fx.GraphModule
    interface: Interface
    types: Types | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    provenance: tuple[Applied, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The operations in execution order."""
        return iter(self.module.graph.nodes)

    @functools.cached_property
    def by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.module.graph.nodes}

    @property
    def typing(self) -> Types:
        """The types; a program without them has not been through inference, which is our bug."""
        assert self.types is not None, "the program has no types yet"
        return self.types

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer that the program uses, by name."""
        return {str(node.target): attribute(self.module, str(node.target)) for node in self.nodes if node.op == "get_attr"}

    @functools.cached_property
    def holders(self) -> dict[str, fx.Node]:
        """The ``get_attr`` node of each parameter and buffer, by name."""
        return {str(node.target): node for node in self.nodes if node.op == "get_attr"}

    def is_parameter(self, name: str) -> bool:
        return isinstance(self.tensors[name], torch.nn.Parameter)

    @functools.cached_property
    def graph(self) -> nx.MultiDiGraph:
        """The same nodes as a networkx graph; edges are keyed by operand position."""
        out: nx.MultiDiGraph = nx.MultiDiGraph()
        for node in self.nodes:
            kind = "output" if node.op == "output" else {"placeholder": "input", "get_attr": "tensor"}.get(node.op, "operation")
            out.add_node(node.name, kind=kind, target=str(node.target))
        for node in self.nodes:
            for position, operand in enumerate(node.all_input_nodes):
                out.add_edge(operand.name, node.name, key=position)
        return out

    def clone(self) -> Program:
        """A program with a graph of its own that shares all tensors; its types are dropped."""
        return self.with_graph(copy.deepcopy(self.module.graph))

    def with_graph(self, graph: fx.Graph) -> Program:
        """This program's tensors under another graph (its module's containers are new)."""
        return dataclasses.replace(self, module=fx.GraphModule(self.module, graph), types=None)

    def applied(self, text: str, seconds: float = 0.0) -> Program:
        return dataclasses.replace(self, provenance=(*self.provenance, Applied(text, seconds)))


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor of a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor), name
    return value


def set_tensor(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer by one of the same kind, whatever its shape."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    if isinstance(old, torch.nn.Parameter):
        value = torch.nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        owner._parameters[leaf] = value
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, value)


def location(node: fx.Node) -> str | None:
    """``file:line`` of the user's model that an operation comes from, if the trace knows it."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    found = None
    for line in str(trace).splitlines():
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[6:].partition('", line ')
            number = rest.split(",")[0]
            if "/torch/nn/modules/" in path and found:
                continue
            found = f"{path}:{number}"
    return found


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that an operation belongs to, or the empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "")
