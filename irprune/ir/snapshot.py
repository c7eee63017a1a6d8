"""A program as plain data: JSON and tensors, without pickle.

A snapshot is read back next to a *reference*, the program as traced: its inputs, outputs and symbols
come from there, and so do tensors that are still the same object, so a snapshot holds only what changed.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions as sympy_functions

from irprune.ir.edit import place
from irprune.ir.fake import describing, mode_of
from irprune.ir.program import Applied, Program, attribute, graph_module
from irprune.ir.sliced import Sliced


class NotStorable(Exception):
    """Something has no form as plain data."""


# -- values -----------------------------------------------------------------------------------------

_NAMED: tuple[tuple[str, type], ...] = (("dtype", torch.dtype), ("layout", torch.layout), ("memory", torch.memory_format))


def encode(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON: numbers, text, containers, torch's constants.

    Args:
        value: The value.
        other: Encodes what is none of these, as a one-entry dictionary.

    Raises:
        NotStorable: It is none of these.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int or (isinstance(value, float) and math.isfinite(value) and type(value) is float):
        return value
    if type(value) is float:
        return {"float": repr(value)}
    if isinstance(value, list):
        return [encode(item, other) for item in value]
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [encode(item, other) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part, other) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _NAMED:
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if other is not None:
        return other(value)
    raise NotStorable(type(value).__name__)


def decode(data: Any, other: Callable[[str, Any], Any] | None = None) -> Any:
    """The value of what :func:`encode` gave."""
    if isinstance(data, list):
        return [decode(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, inner),) = data.items()
    match tag:
        case "float":
            return float(inner)
        case "tuple":
            return tuple(decode(item, other) for item in inner)
        case "dict":
            return {decode(key, other): decode(item, other) for key, item in inner}
        case "slice":
            return slice(*(decode(part, other) for part in inner))
        case "ellipsis":
            return Ellipsis
        case "complex":
            return complex(*inner)
        case "device":
            return torch.device(inner)
        case "dtype" | "layout" | "memory":
            return getattr(torch, inner)
    assert other is not None, tag
    return other(tag, inner)


# -- operations -------------------------------------------------------------------------------------

_MODULES: Mapping[str, Any] = {"_operator": operator, "operator": operator, "math": math, "torch": torch}


def _operation(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"ops.{target}"
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    with contextlib.suppress(AttributeError, KeyError):
        if _found(name) is target:
            return name
    raise NotStorable(f"operation {target}")


def _found(name: str) -> Any:
    """The operation of a name. Only torch's operators and functions of four modules are looked up."""
    if name.startswith("ops."):
        namespace, packet, overload = name.removeprefix("ops.").split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    module, _, leaf = name.rpartition(".")
    return getattr(_MODULES[module], leaf)


# -- symbolic sizes ---------------------------------------------------------------------------------

_HEADS: Mapping[str, Callable[..., Any]] = {
    "Add": lambda *parts: sum(parts[1:], parts[0]),
    "Mul": lambda *parts: math.prod(parts[1:], start=parts[0]),
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Pow": operator.pow,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def _expression(expr: Any, symbols: Mapping[str, Any]) -> Any:
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        if str(expr) not in symbols:
            raise NotStorable(f"symbol {expr}")
        return str(expr)
    head = expr.func.__name__
    if head not in _HEADS or not (getattr(sympy, head, None) is expr.func or getattr(sympy_functions, head, None) is expr.func):
        raise NotStorable(f"size {expr}")
    return [head, *(_expression(part, symbols) for part in expr.args)]


def _evaluated(data: Any, symbols: Mapping[str, Any]) -> Any:
    if isinstance(data, str):
        return symbols[data]
    if isinstance(data, list):
        return _HEADS[data[0]](*(_evaluated(part, symbols) for part in data[1:]))
    return data


def _symbols(reference: Program) -> dict[str, torch.SymInt]:
    """A symbolic size of the reference for each of its symbols."""
    out: dict[str, torch.SymInt] = {}
    for node in reference.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for size in (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    out.setdefault(str(size.node.expr), size)
    return out


# -- programs ---------------------------------------------------------------------------------------


def pack(program: Program, reference: Program) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A program as JSON and the tensors that the reference does not hold.

    Of weights that lie in files only what is kept of them is held.

    Raises:
        NotStorable: It has an interface of its own, or something in it has no form as data.
    """
    if program.interface is not reference.interface:
        raise NotStorable("an interface of its own")
    symbols, nodes = _symbols(reference), []

    def size(value: Any) -> Any:
        return _expression(value.node.expr, symbols) if isinstance(value, torch.SymInt) else int(value)

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes = [[size(each) for each in part] for part in (value.shape, value.stride())]
            return {"tensor": [*sizes, str(value.dtype).removeprefix("torch."), str(value.device)]}
        if isinstance(value, torch.SymInt):
            return {"size": size(value)}
        raise NotStorable(type(value).__name__)

    def operand(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        raise NotStorable(type(value).__name__)

    for node in program.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        entry["target"] = _operation(node.target) if node.op == "call_function" else str(node.target)
        entry["args"] = encode(tuple(node.args), operand)
        entry["kwargs"] = encode(dict(node.kwargs), operand)
        twin = reference.by_name.get(node.name)
        if "val" in node.meta and (twin is None or node.meta["val"] is not twin.meta.get("val")):
            entry["val"] = encode(node.meta["val"], described)
        if twin is None or twin.meta.get("stack_trace") != node.meta.get("stack_trace"):
            entry["stack"] = node.meta.get("stack_trace")
        if twin is None or twin.meta.get("nn_module_stack") != node.meta.get("nn_module_stack"):
            modules = node.meta.get("nn_module_stack") or {}
            entry["modules"] = [[str(key), str(path), kind if isinstance(kind, str) else ""] for key, (path, kind) in modules.items()]
        nodes.append(entry)
    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, dict[str, Any]] = {}
    cuts = _cuts(program, reference, tensors)
    for name, tensor in program.tensors.items():
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        same = reference.tensors.get(name) is tensor
        held[name] = {"kind": kind, "requires_grad": tensor.requires_grad, "same": same}
        if not same:
            if (tensor.is_meta and program.source is None) or tensor.is_sparse or tensor.is_quantized:
                raise NotStorable(f"tensor {name}")
            held[name]["stride"] = list(tensor.stride())
            if tensor.is_meta:
                held[name]["meta"] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            else:
                tensors[name] = tensor.detach().contiguous()
    applied = [[one.text, one.seconds] for one in program.provenance]
    return {"nodes": nodes, "tensors": held, "aliases": dict(program.aliases), "applied": applied, "cuts": cuts}, tensors


def _cuts(program: Program, reference: Program, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What was cut from the weights in files, the first cut first; positions and tensors go to ``tensors``."""
    found, source = [], program.source
    while source is not reference.source:
        if not isinstance(source, Sliced):
            raise NotStorable("a source of its own")
        found.append(source)
        source = source.of
    out = []
    for number, cut in enumerate(reversed(found)):
        kept: dict[str, list[str | None]] = {}
        for name, axes in cut.kept.items():
            kept[name] = [None if positions is None else f"kept/{number}/{axis}/{name}" for axis, positions in enumerate(axes)]
            tensors.update({key: torch.from_numpy(at) for key, at in zip(kept[name], axes, strict=True) if key is not None})
        held = {name: f"held/{number}/{name}" for name in cut.held}
        tensors.update({key: cut.held[name].detach().contiguous() for name, key in held.items()})
        out.append({"kept": kept, "held": held})
    return out


def _cut(source: Any, cuts: Iterable[Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    for cut in cuts:
        kept = {name: tuple(None if key is None else tensors[key].numpy() for key in axes) for name, axes in cut["kept"].items()}
        source = Sliced(source, kept, {name: tensors[key] for name, key in cut["held"].items()})
    return source


def unpack(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], reference: Program) -> Program:
    """The untyped program of a snapshot; ``tensors`` must own their memory."""
    symbols = _symbols(reference)
    graph = fx.Graph()
    graph.set_codegen(reference.module.graph._codegen)
    made: dict[str, fx.Node] = {}

    def described(tag: str, inner: Any) -> Any:
        if tag == "size":
            return _evaluated(inner, symbols)
        shape, stride, dtype, device = inner
        sizes = [[_evaluated(each, symbols) for each in part] for part in (shape, stride)]
        return torch.empty_strided(*sizes, dtype=getattr(torch, dtype), device=device)

    with describing(mode_of(reference.nodes)):
        for entry in data["nodes"]:
            target = _found(entry["target"]) if entry["op"] == "call_function" else entry["target"]
            args = decode(entry["args"], lambda _, name: made[name])
            kwargs = decode(entry["kwargs"], lambda _, name: made[name])
            node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
            assert node.name == entry["name"], f"{entry['name']} became {node.name}"
            twin = reference.by_name.get(node.name)
            if twin is not None:
                node.meta = dict(twin.meta)
            if "val" in entry:
                node.meta["val"] = decode(entry["val"], described)
            if entry.get("stack") is not None:
                node.meta["stack_trace"] = entry["stack"]
            if entry.get("modules"):
                node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry["modules"]}
            made[node.name] = node
    root = torch.nn.Module()
    for name, held in data["tensors"].items():
        place(root, name, _tensor(held, name, tensors, reference))
    provenance = tuple(Applied(text, seconds) for text, seconds in data["applied"])
    source = _cut(reference.source, data["cuts"], tensors)
    return Program(graph_module(root, graph), reference.interface, None, data["aliases"], provenance, source=source)


def _tensor(held: Mapping[str, Any], name: str, tensors: Mapping[str, torch.Tensor], reference: Program) -> torch.Tensor:
    if held["same"]:
        return attribute(reference.module, name)
    if "meta" in held:
        shape, dtype = held["meta"]
        value = torch.empty_strided(shape, held["stride"], dtype=getattr(torch, dtype), device="meta")
    else:
        value = tensors[name]
    if list(value.stride()) != held["stride"]:
        value = torch.empty_strided(value.shape, held["stride"], dtype=value.dtype).copy_(value)
    return torch.nn.Parameter(value, requires_grad=held["requires_grad"]) if held["kind"] == "parameter" else value


def texts(program: Program) -> Iterable[str]:
    """The operations of a program, one line each, for a checksum."""
    for node in program.nodes:
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n"
