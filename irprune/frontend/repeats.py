"""Identical layers are traced once.

Most of a trace's time goes into running the model's python code on symbolic tensors, and a deep model runs the
same code once per layer. Where a call of a module is bound to give the same operations as an earlier call of its
like, one opaque operation stands in its place while ``torch.export`` runs, and the operations are written out
afterwards under the module's own weights.

Two calls are alike if all that the code can see is: the class of every part, shapes and dtypes of every weight, the
inputs (symbolic sizes, strides and dtypes; constants by value), gradient mode and autocast, and every attribute
that is read. An attribute that differs between the layers (``layer_idx``) is out of sight while the first is
traced, and who asks for it is written down; only a layer that answers alike is a repetition. A call that
changes an attribute, makes a size that depends on data, or reads a tensor that is neither an input nor a weight
of its own is not repeated; where that shows only afterwards, the trace is made again, whole.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from irprune.ir.edit import place
from irprune.ir.program import attribute, graph_module

_LIBRARY = torch.library.Library("irprune", "FRAGMENT")
_LIBRARY.define("enter(Tensor[] values, int region) -> Tensor[]")
_LIBRARY.define("leave(Tensor[] values, int region) -> Tensor[]")
_LIBRARY.define("again(Tensor[] values, int region, str module) -> Tensor[]")
for _name in ("enter", "leave", "again"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # or every result would ask for a gradient if one input does

_PARTS = 4  # a module of fewer is not worth an operation of its own
_TRIES = 8  # so many calls of one kind without a repetition, and no more are looked at
_OWN = frozenset(torch.nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MISSING = object()


class NotRepeatedError(Exception):
    """What was left out of a trace cannot be written out: the trace is to be made again, whole."""


class _Like(NamedTuple):
    """What a tensor without data is made like."""

    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Like:
        return cls(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype, tensor.device, tensor.requires_grad)

    def fake(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class _Given(NamedTuple):
    """A result that is one of the inputs as it was."""

    place: int


class _Made(NamedTuple):
    """A result that was made."""

    place: int


@dataclass
class _Region:
    """A call that was traced, and may be repeated.

    Attributes:
        number: Its number in the graph.
        path: Dotted path of the module.
        reads: ``(part, attribute)`` to the value, of the attributes that differ between the layers and were read.
        made: What the tensors are like that it made and returned.
        results: Leaves of what it returned.
        spec: The tree of what it returned.
    """

    number: int
    path: str
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    made: list[_Like] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    spec: Any = None

    def rebuilt(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> Any:
        """What the call returns of these inputs and these tensors."""

        def leaf(result: Any) -> Any:
            return given[result.place] if isinstance(result, _Given) else made[result.place] if isinstance(result, _Made) else result

        return pytree.tree_unflatten([leaf(result) for result in self.results], self.spec)


def _marked(results: list[torch.Tensor], likes: Sequence[_Like]) -> list[torch.Tensor]:
    """The results of a mark; which kernel attention takes depends on who asks for a gradient."""
    return [result.requires_grad_() if like.requires_grad else result for result, like in zip(results, likes, strict=True)]


_active: list[Repeats] = []


def _enter(values: list[torch.Tensor], region: int) -> list[torch.Tensor]:
    return [_Like.of(value).fake() for value in values]


def _leave(values: list[torch.Tensor], region: int) -> list[torch.Tensor]:
    return [_Like.of(value).fake() for value in values]


def _again(values: list[torch.Tensor], region: int, module: str) -> list[torch.Tensor]:
    return [like.fake() for like in _active[-1].regions[region].made]


torch.library.register_fake("irprune::enter", _enter, lib=_LIBRARY)
torch.library.register_fake("irprune::leave", _leave, lib=_LIBRARY)
torch.library.register_fake("irprune::again", _again, lib=_LIBRARY)


class Repeats:
    """The repeated modules of a model, and what was found of them in one trace.

    Args:
        model: The model, in the mode in which it will be traced.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.regions: list[_Region] = []
        self._sets = _alike(model)
        # By the id of a module's ``__dict__``, which the tracer's proxies of the module share with it.
        self._hidden: dict[int, dict[str, Any]] = {}
        self._members: dict[int, tuple[int, str, torch.nn.Module]] = {}
        self._known: dict[Any, list[_Region]] = defaultdict(list)
        self._in_vain: Counter[int] = Counter()
        self._recording: tuple[_Region, Mapping[int, str]] | None = None
        self._strange = False

    @property
    def possible(self) -> bool:
        """Whether the model has modules that may repeat one another."""
        return bool(self._sets)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Trace within this block."""
        taken: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        patched: dict[tuple[type, str], Any] = {}

        def patch(kind: type[torch.nn.Module], name: str, value: Any) -> None:
            if (kind, name) not in patched:
                patched[kind, name] = vars(kind).get(name, _MISSING)
                setattr(kind, name, value)

        _active.append(self)
        try:
            for number, (paths, differing) in enumerate(self._sets):
                for path in paths:
                    member = self.model.get_submodule(path)
                    for part, names in differing.items():
                        module = member.get_submodule(part)
                        values = self._hidden.setdefault(id(vars(module)), {})
                        for name in names:  # members may share a part: what was taken from it stays known
                            values.setdefault(name, module.__dict__.pop(name, _MISSING))
                        taken.append((module, values))
                        patch(type(module), "__getattr__", self._watched(type(module)))
                    self._members[id(vars(member))] = (number, path, member)
                    patch(type(member), "forward", self._stand_in(type(member)))
            yield
        finally:
            _active.remove(self)
            for (kind, name), value in patched.items():
                if value is _MISSING:
                    delattr(kind, name)
                else:
                    setattr(kind, name, value)
            for module, values in taken:
                for name, value in values.items():
                    if value is not _MISSING:
                        module.__dict__.setdefault(name, value)

    def _watched(self, kind: type[torch.nn.Module]) -> Callable[[torch.nn.Module, str], Any]:
        """``__getattr__`` of a class, which is asked for what an object does not hold: it sees what was taken out of sight."""
        own = vars(kind).get("__getattr__")

        def look_up(module: torch.nn.Module, name: str) -> Any:
            hidden = self._hidden.get(id(vars(module)), {})
            if name in hidden:
                self._note(module, name, hidden[name])
                if hidden[name] is not _MISSING:
                    return hidden[name]
            return own(module, name) if own is not None else cast(Any, super(kind, module)).__getattr__(name)

        return look_up

    def _note(self, module: torch.nn.Module, name: str, value: Any) -> None:
        if self._recording is None:
            return
        region, parts = self._recording
        part = parts.get(id(vars(module)))
        if part is not None:
            region.reads[part, name] = value
        else:
            self._strange = True  # a layer that looks into another one

    def _stand_in(self, kind: type[torch.nn.Module]) -> Callable[..., Any]:
        """``forward`` of a class whose objects may repeat one another."""
        forward = kind.forward

        @functools.wraps(forward)
        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            number, path, member = self._members.get(id(vars(module)), (-1, "", None))
            if member is None or type(member) is not kind or self._recording is not None or self._in_vain[number] == _TRIES:
                return forward(module, *args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            given = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
            index = {id(tensor): position for position, tensor in enumerate(given)}
            kinds = [_kind(leaf) for leaf in leaves]
            if None in kinds or not given:
                return forward(module, *args, **kwargs)
            autocast = [torch.is_autocast_enabled(kind) for kind in sorted({tensor.device.type for tensor in given} - {"meta"})]
            key = (number, str(spec), *kinds, *(index.get(id(leaf)) for leaf in leaves), torch.is_grad_enabled(), *autocast)
            for region in self._known[key]:
                if self._answers(member, region):
                    self._in_vain[number] = 0
                    return region.rebuilt(given, _marked(torch.ops.irprune.again(given, region.number, path), region.made))
            region = _Region(len(self.regions), path)
            self.regions.append(region)
            self._in_vain[number] += 1
            inside = _marked(torch.ops.irprune.enter(given, region.number), [_Like.of(tensor) for tensor in given])
            args, kwargs = pytree.tree_unflatten([inside[index[id(leaf)]] if id(leaf) in index else leaf for leaf in leaves], spec)
            before = _state(member)
            self._recording = (region, {id(vars(part)): name for name, part in member.named_modules(remove_duplicate=False)})
            self._strange = False
            try:
                out = forward(module, *args, **kwargs)
            finally:
                self._recording = None
            if any(tensor._version for tensor in inside):
                raise NotRepeatedError  # it wrote into its inputs
            results, region.spec = pytree.tree_flatten(out)
            if None in map(_kind, results) or self._strange or not _same_state(before, _state(member)):
                return out
            index = {id(tensor): position for position, tensor in enumerate(inside)}
            made = list({id(leaf): leaf for leaf in results if isinstance(leaf, torch.Tensor) and id(leaf) not in index}.values())
            places = {id(tensor): position for position, tensor in enumerate(made)}
            for leaf in results:
                known = _Given(index[id(leaf)]) if id(leaf) in index else _Made(places[id(leaf)]) if id(leaf) in places else leaf
                region.results.append(known)
            region.made = [_Like.of(tensor) for tensor in made]
            self._known[key].append(region)
            return region.rebuilt(given, _marked(torch.ops.irprune.leave(made, region.number), region.made))

        return call

    def _answers(self, member: torch.nn.Module, region: _Region) -> bool:
        """Whether a module has the attributes that the region's module was asked for."""
        for (part, name), value in region.reads.items():
            own = self._hidden[id(vars(member.get_submodule(part)))].get(name, _MISSING)
            if not _same(own, value):
                return False
        return True

    def written_out(self, traced: fx.GraphModule) -> fx.GraphModule:
        """The traced module with every repetition written out, and nothing left of the marks.

        Raises:
            NotRepeatedError: A repetition cannot be written out.
        """
        if not self.regions:
            return traced
        return _Writer(self.model, traced, self.regions).run()


class _Writer:
    """Copies a graph in order, names counted anew as the tracer would have."""

    def __init__(self, model: torch.nn.Module, traced: fx.GraphModule, regions: list[_Region]) -> None:
        self.model, self.traced, self.regions = model, traced, regions
        self.graph = fx.Graph()
        self.graph.set_codegen(traced.graph._codegen)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.names = {id(tensor): name for name, tensor in reversed(_tensors(model))}
        self.bodies = self._bodies()

    def _bodies(self) -> dict[int, tuple[fx.Node, list[fx.Node], fx.Node]]:
        """Region to the node that enters it, those of its body and the one that leaves it."""
        ops = torch.ops.irprune
        nodes = list(self.traced.graph.nodes)
        at = {node: index for index, node in enumerate(nodes)}
        enters = {_args(node)[1]: node for node in nodes if node.target is ops.enter.default}
        leaves = {_args(node)[1]: node for node in nodes if node.target is ops.leave.default}
        return {
            number: (enters[number], nodes[at[enters[number]] + 1 : at[leave]], leave)
            for number, leave in leaves.items()
            if number in enters
        }

    def run(self) -> fx.GraphModule:
        ops = torch.ops.irprune
        for node in self.traced.graph.nodes:
            if _is_result_of(node, ops.enter.default, ops.leave.default):
                mark, index = _args(node)
                self.copies[node] = self.copies[_args(mark)[0][index]]
            elif _is_result_of(node, ops.again.default):
                continue  # copied with the repetition
            elif node.target is ops.again.default:
                self._again(node)
            elif node.target not in (ops.enter.default, ops.leave.default):
                self.copies[node] = self._copy(node, self.copies.__getitem__)
        return graph_module(self.traced, self.graph)

    def _copy(self, node: fx.Node, look_up: Callable[[fx.Node], fx.Node]) -> fx.Node:
        if node.op == "output":
            copy = self.graph.output(map_arg(node.args[0], look_up))
            copy.meta = dict(node.meta)
            return copy
        args, kwargs = map_arg(node.args, look_up), map_arg(node.kwargs, look_up)
        name = re.sub(r"(_\d+)+$", "", node.name) if node.op == "call_function" else node.name
        copy = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copy.meta = dict(node.meta)
        return copy

    def _again(self, node: fx.Node) -> None:
        values, number, path = _args(node)
        if number not in self.bodies:
            raise NotRepeatedError
        enter, body, leave = self.bodies[number]
        first = self.regions[number].path
        renamed = self._renamed(first, path)
        copies: dict[fx.Node, fx.Node] = {}
        inside = {enter, *body}

        def look_up(wanted: fx.Node) -> fx.Node:
            if wanted in copies:
                return copies[wanted]
            if _is_result_of(wanted, enter.target) and wanted.args[0] is enter:
                return self.copies[values[_args(wanted)[1]]]
            if wanted.op == "get_attr":
                copies[wanted] = self._weight(wanted, renamed)
                return copies[wanted]
            if wanted not in inside and _is_size(wanted.meta.get("val")):
                return self.copies[wanted]
            raise NotRepeatedError

        for inner in body:
            if free_unbacked_symbols(inner.meta.get("val")):
                raise NotRepeatedError  # a size that depends on data is another one in every layer
            if inner.op != "get_attr" and inner.args[:1] != (enter,):
                if inner.op != "call_function":
                    raise NotRepeatedError
                if _is_size(inner.meta.get("val")):
                    copies[inner] = self.copies[inner]
                    continue
                copies[inner] = self._copy(inner, look_up)
                copies[inner].meta = self._moved(inner.meta, first, node)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise NotRepeatedError
            self.copies[user] = look_up(_args(leave)[0][_args(user)[1]])

    def _weight(self, node: fx.Node, renamed: Mapping[str, str]) -> fx.Node:
        """The node of the repetition's weight in place of the first call's; a constant stays what it is."""
        name = str(node.target)
        held = attribute(self.traced, name)
        if not isinstance(held, torch.Tensor):
            raise NotRepeatedError
        known = self.names.get(id(attribute(self.model, name))) if _has(self.model, name) else None
        if known is None:
            return self.copies[node]
        if known not in renamed:
            raise NotRepeatedError  # a weight of another module
        name = renamed[known]
        if not _has(self.traced, name):
            place(self.traced, name, attribute(self.model, name))
        copy = self.graph.get_attr(name)
        copy.meta = {**node.meta}
        return copy

    def _renamed(self, first: str, path: str) -> dict[str, str]:
        """First name of every weight of one module to that of the other's."""
        out: dict[str, str] = {}
        pairs = zip(_tensors(self.model.get_submodule(first)), _tensors(self.model.get_submodule(path)), strict=True)
        for (name, mine), (twin, theirs) in pairs:
            if name != twin or out.setdefault(self.names[id(mine)], self.names[id(theirs)]) != self.names[id(theirs)]:
                raise NotRepeatedError  # what is one tensor here are two there
        return out

    @staticmethod
    def _moved(meta: Mapping[str, Any], first: str, again: fx.Node) -> dict[str, Any]:
        """Metadata of an operation, its modules those of the repetition."""
        path = _args(again)[2]
        stack = dict(again.meta.get("nn_module_stack") or {})
        for key, (name, kind) in (meta.get("nn_module_stack") or {}).items():
            if name.startswith(f"{first}."):
                stack[f"{key}@{path}"] = (f"{path}{name[len(first) :]}", kind)
        return {**meta, "nn_module_stack": stack}


def _args(node: fx.Node) -> tuple[Any, ...]:
    return cast(Any, node.args)


def _is_result_of(node: fx.Node, *targets: Any) -> bool:
    """Whether a node takes one of the results of a mark."""
    return node.target is operator.getitem and _args(node)[0].target in targets


def _is_size(value: Any) -> bool:
    """Whether a value follows from the sizes of the inputs, so that it is the same in every repetition."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _has(module: torch.nn.Module, name: str) -> bool:
    try:
        attribute(module, name)
    except AttributeError:
        return False
    return True


def _kind(leaf: Any) -> Any:
    """What of an input or a result the code of a module can see; ``None`` if that is beyond comparing."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout is not torch.strided or leaf.is_quantized or free_unbacked_symbols(leaf):
            return None
        like = _Like.of(leaf)
        sizes = tuple(map(str, (*like.size, *like.stride, leaf.storage_offset())))
        return (sizes, like.dtype, like.device, like.requires_grad, type(leaf))
    if isinstance(leaf, torch.SymInt):
        return None if free_unbacked_symbols(leaf) else ("size", str(leaf.node.expr))
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes are certainly alike."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _PLAIN):
        return bool(one == other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, functools.partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if type(one) is dict:
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return False


def _state(module: torch.nn.Module) -> list[tuple[Any, int]]:
    """All that is held by a module and its parts; containers with their lengths."""
    held: list[Any] = []
    for part in module.modules():
        values = part.__dict__
        held += [*values, *values.values(), *part._parameters.values(), *part._buffers.values()]
    return [(value, len(value) if isinstance(value, (list, dict, set)) else 0) for value in held]


def _same_state(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _alike(model: torch.nn.Module) -> list[tuple[list[str], dict[str, list[str]]]]:
    """Sets of modules that may repeat one another: their paths, and by part the attributes that differ."""
    signatures: dict[int, Any] = {}
    sizes: dict[int, int] = {}
    numbers: dict[Any, int] = {}

    def sign(module: torch.nn.Module) -> int:
        if id(module) not in signatures:
            signatures[id(module)] = -1  # a module that holds itself is like no other
            children = tuple((name, sign(child)) for name, child in module.named_children())
            sizes[id(module)] = 1 + sum(sizes[id(child)] for _, child in module.named_children() if id(child) in sizes)
            tensors = (
                tuple((name, None if t is None else (t.shape, t.dtype, t.device)) for name, t in held.items())
                for held in (module._parameters, module._buffers)
            )
            signature = (type(module), children, *tensors, module.training)
            signatures[id(module)] = numbers.setdefault(signature, len(numbers))
        return signatures[id(module)]

    sign(model)
    members: dict[int, list[str]] = defaultdict(list)
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict)
    for path, module in model.named_modules():
        if path and sizes[id(module)] >= _PARTS and not isinstance(module, containers) and "forward" not in module.__dict__:
            hooked = any(getattr(part, name) for part in module.modules() if part is not module for name in _HOOKS)
            if not hooked and signatures[id(module)] >= 0:
                members[signatures[id(module)]].append(path)
    taken: list[str] = []
    found = []
    # The largest first: a set of layers before the sets of their parts, wherever the first of each stands.
    for paths in sorted(members.values(), key=lambda paths: -sizes[id(model.get_submodule(paths[0]))]):
        paths = [path for path in paths if not any(path.startswith(f"{outer}.") for outer in taken)]
        if len(paths) < 2:
            continue
        differing = _differing([model.get_submodule(path) for path in paths])
        if differing is not None:
            taken += paths
            found.append((paths, differing))
    return found


def _differing(members: list[torch.nn.Module]) -> dict[str, list[str]] | None:
    """By part the attributes in which modules differ; ``None`` where one cannot be taken out of sight."""
    out: dict[str, list[str]] = {}
    parts = [dict(member.named_modules(remove_duplicate=False)) for member in members]
    if any(part.keys() != parts[0].keys() for part in parts):
        return None
    for name, first in parts[0].items():
        twins = [part[name] for part in parts]
        names = set(itertools.chain.from_iterable(twin.__dict__ for twin in twins)) - _OWN
        differing = [
            key for key in sorted(names) if not all(_same(first.__dict__.get(key, _MISSING), t.__dict__.get(key, _MISSING)) for t in twins)
        ]
        if any(hasattr(type(first), key) for key in differing):
            return None
        if differing:
            out[name] = differing
    return out
