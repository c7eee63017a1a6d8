"""The Program: the one thing that passes take and return."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import networkx as nx
import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

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
        unlocked: Axes of tables that the user allowed to be cut although they are looked up, by kind
            (``vocabulary``, ``positions``).
        lookups: The look-ups whose table is unlocked: operation name to kind.
        ids: Name of the input whose numbers index the vocabulary, where that is unlocked.
        points: Values whose numbers are positions along an axis, by operation name and place among its
            results: whichever expert a token was sent to. They follow that axis when it shrinks.
        least: Axes of which at least so many positions are needed (the ``k`` of a top-k).
    """

    dims: Dims = field(default_factory=Dims)
    axes: dict[str, Axes | list[Axes | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    constants: frozenset[str] = frozenset()
    macs: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    notes: dict[tuple[str, str], Term] = field(default_factory=dict)
    picks: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    unlocked: dict[str, list[Term]] = field(default_factory=dict)
    lookups: dict[str, str] = field(default_factory=dict)
    ids: str | None = None
    points: dict[tuple[str, int], Term] = field(default_factory=dict)
    least: list[tuple[Term, int]] = field(default_factory=list)

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


def content(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor's numbers as an array, for a digest; not copied where they lie in order in the processor's memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest_tensors(digest: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add names, types, shapes and numbers of tensors to a digest of ``hashlib``."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content(tensor))


def graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A module under a graph. Its code is generated at the first call: most programs on the way of a pipeline are never called."""
    return _LazyGraphModule(root, graph)


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph with nodes of its own. How it is called is shared: ``copy.deepcopy`` copies that, too, and warns of torch's own classes."""
    out = fx.Graph()
    result, output = cast(tuple[Any, fx.Node], out.graph_copy(graph, {}, return_output_node=True))
    out.output(result).meta = dict(output.meta)
    out.set_codegen(graph._codegen)
    return out


class Source(Protocol):
    """Where the data lies of tensors that a program has on the meta device only."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor as it is stored: along axis 0, all by default."""
        ...

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        ...

    def identity(self) -> str:
        """A digest of where the data comes from and what of it is taken: equal ones give equal tensors."""
        ...


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
        infer: Finds the types when somebody first asks for :attr:`typing`, where they are not there yet.
        source: Where the data of tensors on the meta device is read from when it is needed; ``None``
            where the program has its data, or has none at all.
    """

    module: fx.GraphModule
    interface: Interface
    types: Types | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    provenance: tuple[Applied, ...] = ()
    infer: Callable[[Program], Types] | None = field(default=None, repr=False, compare=False)
    source: Source | None = field(default=None, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.source is None:
            return self.module(*args, **kwargs)
        named = {name: kwargs[name] for name in self.interface.example[1]}
        with torch.no_grad():
            out = Runner(self).run(*pytree.tree_leaves((args, named)), enable_io_processing=False)
        return self.module.graph.process_outputs(out)

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The operations in execution order."""
        return iter(self.module.graph.nodes)

    @functools.cached_property
    def by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.module.graph.nodes}

    @functools.cached_property
    def typing(self) -> Types:
        """The types; a program without them and without a way to find them has not been through inference: our bug."""
        if self.types is not None:
            return self.types
        assert self.infer is not None, "the program has no types yet"
        return self.infer(self)

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer that the program uses, by name."""
        return {str(node.target): attribute(self.module, str(node.target)) for node in self.nodes if node.op == "get_attr"}

    @property
    def has_data(self) -> bool:
        """Whether the program can compute: its tensors hold data, or know where it is."""
        return self.source is not None or not any(tensor.is_meta for tensor in self.tensors.values())

    def value(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a parameter or buffer with their data, read from the source where the program does not hold it."""
        tensor = self.tensors[name]
        if self.source is not None and tensor.is_meta:
            return self.source.read(name, start, stop).to(tensor.dtype)
        return tensor if start == 0 and stop is None else tensor[start:stop]

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
        return self.with_graph(copied(self.module.graph))

    def with_graph(self, graph: fx.Graph) -> Program:
        """This program's tensors under another graph (its module's containers are new)."""
        return dataclasses.replace(self, module=graph_module(self.module, graph), types=None, infer=None)

    def applied(self, text: str, seconds: float = 0.0) -> Program:
        # Types that were found when somebody asked go along: facts speak of their variables.
        types = self.__dict__.get("typing", self.types)
        return dataclasses.replace(self, types=types, provenance=(*self.provenance, Applied(text, seconds)))


class Runner(fx.Interpreter):
    """A program on its flat inputs.

    Tensors that lie in the source are read at their use and dropped after it; a large one that an
    embedding or a linear reads goes through memory in blocks of rows.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a parameter or buffer, as the operations get them."""
        return self.program.value(name, start, stop).detach()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return self.tensor(str(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *self.arguments(args, kwargs))

    def arguments(self, args: Any, kwargs: Any) -> Any:
        """A call's arguments; what a trace without data makes on the meta device is made on the CPU."""
        if self.program.source is None:
            return args, kwargs
        return pytree.tree_map(_off_meta, (args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        if self.program.source is None:
            return super().run_node(n)
        if n.op == "get_attr":
            return None
        large = self._large(n)
        if large is not None and self.env[large] is None:
            return self._in_blocks(n, large)
        with self.loaded(n):
            return super().run_node(n)

    @contextlib.contextmanager
    def loaded(self, n: fx.Node) -> Iterator[None]:
        """The tensors that an operation wants are there while it runs."""
        held = [node for node in n.all_input_nodes if node.op == "get_attr" and self.env[node] is None]
        for node in held:
            self.env[node] = self.get_attr(str(node.target), (), {})
        try:
            yield
        finally:
            for node in held:
                self.env[node] = None

    def _large(self, n: fx.Node) -> fx.Node | None:
        """The weight of an embedding or a linear that is not to be read at once."""
        aten = torch.ops.aten
        place = {aten.embedding.default: 0, aten.linear.default: 1}.get(n.target)  # type: ignore[call-overload]
        node = n.args[place] if place is not None else None
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor = self.program.tensors[str(node.target)]
        return node if tensor.is_meta and tensor.numel() * tensor.itemsize > 2 * BLOCK else None

    def _in_blocks(self, n: fx.Node, weight: fx.Node) -> Any:
        """An embedding or a linear, its weight read in blocks of rows."""
        name = str(weight.target)
        tensor = self.program.tensors[name]
        rows = max(1, BLOCK // (tensor[0].numel() * tensor.itemsize))
        starts = range(0, len(tensor), rows)
        if n.target is torch.ops.aten.linear.default:
            x: Any = self.map_nodes_to_values(n.args[:1], n)[0]  # type: ignore[index]
            bias = self.tensor(str(n.args[2].target)) if len(n.args) > 2 and isinstance(n.args[2], fx.Node) else None
            parts = (torch.nn.functional.linear(x, self.tensor(name, start, start + rows)) for start in starts)
            result = torch.cat(list(parts), dim=-1)
            return result if bias is None else result + bias
        ids: Any = self.map_nodes_to_values(n.args[1:2], n)[0]  # type: ignore[index]
        result = self.tensor(name, 0, 0).new_zeros((*ids.shape, *tensor.shape[1:]))
        for start in starts:
            here = (ids >= start) & (ids < start + rows)
            if here.any():
                result[here] = self.tensor(name, start, start + rows)[ids[here] - start]
        return result


def _off_meta(leaf: Any) -> Any:
    return CPU if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


BLOCK = 64 * 2**20
CPU = torch.device("cpu")


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


def writes(node: fx.Node) -> bool:
    """Whether an operation writes to one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


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
