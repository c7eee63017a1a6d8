"""``torch.export`` to :class:`Program`.

The training IR is kept: ``linear``, ``conv2d``, ``layer_norm`` and
``scaled_dot_product_attention`` stay whole. What says nothing about the function is taken out:
guards, assertions, gradient-mode regions, slices and casts that change nothing, dead code.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from irprune.errors import DataError, TargetError, TraceError
from irprune.ir.dims import as_size
from irprune.ir.program import Interface, Program, attribute

Dynamic = Mapping[str, Mapping[int, str]]

_KEPT_META = ("val", "stack_trace", "nn_module_stack")
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_STDLIB = sysconfig.get_path("stdlib")


def trace(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Dynamic | None = None,
    *,
    outputs: Sequence[str] | None = None,
) -> Program:
    """Trace a model in evaluation mode.

    Args:
        module: The model; its tensors are shared, not copied, and may be on the meta device.
        args: Positional example inputs (pytrees of tensors and constants).
        kwargs: Keyword example inputs; the program takes them in the order of the model's signature.
        dynamic: Input name to ``{axis: label}``. The name is the parameter's, or for a tensor inside
            a container its dotted path (``batch.mask``); a parameter's name stands for all tensors in
            it. Axes with equal labels have equal sizes. An input that is not named has the dynamic
            axis 0, ``batch``, if its size there is that of the first input; ``{}`` makes it static.
        outputs: Keep only the outputs of these names (fields or keys of the model's output); one of
            them alone is returned bare.

    Returns:
        The untyped program. It is called as the model is.

    Raises:
        TargetError: The inputs do not fit the model's signature, or a dynamic axis is not one.
        TraceError: ``torch.export`` cannot trace the model.
        DataError: A weight is NaN or infinite.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    signature = inspect.signature(module.forward)
    _check_arguments(module, signature, args, kwargs)
    order = list(signature.parameters)
    kwargs = dict(sorted(kwargs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    names = _leaf_names(signature, args, kwargs)
    axes, explicit = _wanted_axes(names, leaves, dynamic or {})
    hints = [dict.fromkeys(of, Dim.AUTO) or None for of in axes]
    hint_args, hint_kwargs = pytree.tree_unflatten(hints, spec)
    shapes = dict(signature.bind(*hint_args, **hint_kwargs).arguments)
    with _evaluation(module), _tied(module, axes), _quiet():
        try:
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes or None, strict=False)
            traced = exported.module(check_guards=False)
        except Exception as error:
            raise _trace_error(module, error) from error
    graph = traced.graph
    _inline_regions(traced)
    _drop_noise(graph)
    aliases = _untie(module, traced)
    output_names = _select_outputs(graph, outputs)
    graph.eliminate_dead_code()
    _check_whole(traced)
    placeholders = _placeholders_first(graph)
    found, notes = _found_axes(placeholders, names, axes, explicit)
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    interface = Interface((args, kwargs), found, tuple(node.name for node in placeholders), output_names, notes)
    program = Program(fx.GraphModule(traced, graph), interface, aliases=aliases)
    _check_finite(program)
    return program


# -- inputs ---------------------------------------------------------------------------------------


def _check_arguments(module: torch.nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TargetError(
            f"the example inputs do not fit {type(module).__name__}.forward{signature}: {error}",
            where=_definition(module),
            hint="give the inputs as the model takes them: a tuple by position, a dict by name",
        ) from error
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TargetError("the example inputs hold no tensor", where=_definition(module), hint="give at least one tensor")


def _definition(module: torch.nn.Module) -> str | None:
    """``file:line`` of a model's ``forward``."""
    with contextlib.suppress(TypeError, OSError):
        forward = inspect.unwrap(type(module).forward)
        return f"{inspect.getsourcefile(forward)}:{inspect.getsourcelines(forward)[1]}"
    return None


def _leaf_names(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The dotted path of each flat input: the parameter, then keys and positions inside it."""
    positional: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}.{i}" for i in range(len(args) - len(positional))]
        elif len(positional) < len(args):
            positional.append(parameter.name)
    heads = {"0": dict(zip(map(str, range(len(args))), positional, strict=True)), "1": {key: key for key in kwargs}}
    names = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        side, head, *rest = (_key(entry) for entry in path)
        names.append(".".join((heads[side][head], *rest)))
    return names


def _key(entry: Any) -> str:
    """One step of a pytree path: a key, a position or a field."""
    for field in ("key", "idx", "name"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)


def _wanted_axes(names: list[str], leaves: list[Any], dynamic: Dynamic) -> tuple[list[dict[int, str]], set[str]]:
    """Labels of the dynamic axes of each flat input, and the names of the inputs that the user spoke of."""
    unused = set(dynamic)
    axes: list[dict[int, str]] = []
    explicit: set[str] = set()
    sizes: dict[str, tuple[int, str]] = {}
    first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            unused.discard(name)
            axes.append({})
            continue
        entry = next((key for key in _ancestors(name) if key in dynamic), None)
        if entry is not None:
            unused.discard(entry)
            explicit.add(name)
            of = {_axis(name, leaf, axis): str(label) for axis, label in dynamic[entry].items()}
        else:
            of = {0: "batch"} if leaf.ndim and first.ndim and leaf.shape[0] == first.shape[0] else {}
        for axis, label in of.items():
            size = int(leaf.shape[axis])
            if size < 2:
                raise TargetError(
                    f"axis {axis} ('{label}') of input '{name}' is dynamic, but its example size is {size}",
                    hint=f"give an example of size 2 or more there (a trace takes 0 and 1 for constants), "
                    f"or make the input static: dynamic_axes() -> {{'{name}': {{}}}}",
                )
            other, where = sizes.setdefault(label, (size, f"axis {axis} of '{name}'"))
            if other != size:
                raise TargetError(
                    f"axes labelled '{label}' differ in the example inputs: {other} at {where}, {size} at axis {axis} of '{name}'",
                    hint="give them one size, or different labels",
                )
        axes.append(of)
    if unused:
        raise TargetError(
            f"dynamic axes name '{sorted(unused)[0]}', which is not an input; the inputs are {', '.join(names)}",
            hint="name the parameters of forward",
        )
    return axes, explicit


def _ancestors(name: str) -> list[str]:
    """The name itself, then the containers around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _axis(name: str, leaf: torch.Tensor, axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
        raise TargetError(
            f"dynamic axes of input '{name}' name axis {axis!r}, its example has shape {tuple(leaf.shape)}",
            hint=f"name axes 0 to {leaf.ndim - 1}",
        )
    return axis % leaf.ndim


@contextlib.contextmanager
def _evaluation(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of a block, each part's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _tied(module: torch.nn.Module, axes: list[dict[int, str]]) -> Iterator[None]:
    """Say to the tracer, before the model runs, that axes with equal labels have one size."""

    def tie(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        sizes: dict[str, Any] = {}
        for leaf, of in zip(pytree.tree_leaves((args, kwargs)), axes, strict=True):
            for axis, label in of.items():
                torch._check(sizes.setdefault(label, leaf.shape[axis]) == leaf.shape[axis])

    handle = module.register_forward_pre_hook(tie, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracer's warnings say nothing to the user of a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _found_axes(
    placeholders: list[fx.Node], names: list[str], axes: list[dict[int, str]], explicit: set[str]
) -> tuple[tuple[dict[int, str], ...], tuple[str, ...]]:
    """The axes that stayed dynamic after tracing; a constant one that was asked for is an error."""
    found: list[dict[int, str]] = []
    notes: list[str] = []
    for node, name, of in zip(placeholders, names, axes, strict=True):
        stayed = {}
        for axis, label in of.items():
            size = as_size(node.meta["val"].shape[axis])
            if not isinstance(size, int):
                stayed[axis] = label
                continue
            where = _specialised(node.meta["val"], node.name, axis)
            message = f"axis {axis} ('{label}') of input '{name}' is not dynamic: the model works for size {size} only"
            if name in explicit:
                raise TraceError(
                    message, where=where, hint="take sizes from the input's shape there, or leave the axis out of dynamic_axes()"
                )
            notes.append(message + (f" ({where})" if where else ""))
        found.append(stayed)
    return tuple(found), tuple(notes)


def _specialised(value: torch.Tensor, name: str, axis: int) -> str | None:
    """``file:line`` of the operation that made a symbolic size constant."""
    shape_env = value.fake_mode.shape_env  # type: ignore[attr-defined]
    for source, symbol in shape_env.source_to_var.items():
        if source.endswith(f".size()[{axis}]") and re.search(rf"\b{re.escape(name)}\b", source):
            place = shape_env.replacements_slocs.get(symbol)
            return str(place) if place is not None else None
    return None


# -- graph ----------------------------------------------------------------------------------------


def _inline_regions(module: fx.GraphModule) -> None:
    """Put the body of gradient-mode regions and of disabled autocast in place of their call."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            _, region, *operands = node.args
        elif name == "wrap_with_autocast" and node.args[2] is False:
            region, *operands = node.args[4:]
        else:
            continue
        body = getattr(module, str(region.target))
        _inline_regions(body)
        for part, child in body.named_children():
            module.add_submodule(f"{region.target}_{part}", child)
            for inner in body.graph.nodes:
                if inner.op in ("get_attr", "call_module") and inner.target == part:
                    inner.target = f"{region.target}_{part}"
        with module.graph.inserting_before(node):
            values = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
            results = module.graph.graph_copy(body.graph, values)
        if isinstance(results, (tuple, list)):
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        else:
            node.replace_all_uses_with(results)
        module.graph.erase_node(node)
        if not region.users:
            module.graph.erase_node(region)


def _drop_noise(graph: fx.Graph) -> None:
    """Take out assertions, and operations that return their operand as it is."""
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith(("_assert_", "sym_constrain_range")):
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target not in (aten.slice.Tensor, aten.to.dtype, aten.to.dtype_layout, aten.to.device):
        return False
    assert isinstance(node.args[0], fx.Node)
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if before is None or after is None or [as_size(s) for s in before.shape] != [as_size(s) for s in after.shape]:
        return False
    if node.target is aten.slice.Tensor:
        return len(node.args) < 5 or node.args[4] == 1
    copies = node.kwargs.get("copy", False) or (len(node.args) > 3 and True in node.args[2:])
    return bool(not copies and before.dtype == after.dtype and before.device == after.device)


def _untie(module: torch.nn.Module, traced: fx.GraphModule) -> dict[str, str]:
    """Make every use of a tied tensor name it the same way. Returns the other names."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        used = first.setdefault(id(tensor), name)
        if used != name:
            aliases[name] = used
    holders: dict[str, fx.Node] = {}
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        name = aliases.get(str(node.target), str(node.target))
        holder = holders.setdefault(name, node)
        if holder is not node:
            node.replace_all_uses_with(holder)
            traced.graph.erase_node(node)
        elif name != node.target:
            _place(traced, name, attribute(traced, str(node.target)))
            node.target = name
    return aliases


def _place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
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


def _select_outputs(graph: fx.Graph, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Name the flat outputs after fields and keys; keep only the wanted ones, if any are named."""
    output = graph.output_node()
    flat = list(pytree.tree_leaves(output.args[0]))
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    info = codegen.pytree_info
    assert info.out_spec is not None
    tree = pytree.tree_unflatten(list(range(len(flat))), info.out_spec)
    names = [".".join(map(_key, path)) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names = [f"output{name}" if not name or name.isdigit() else name for name in names]
    names = ["output0" if name == "output" else name for name in names]
    if wanted is None:
        return tuple(names)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise TargetError(f"the model has no output '{missing[0]}'; its outputs are {', '.join(names)}", hint="name one of them")
    picked = [flat[names.index(name)] for name in wanted]
    output.args = (tuple(picked),)
    example = picked[0] if len(picked) == 1 else tuple(picked)
    graph.set_codegen(_PyTreeCodeGen(info._replace(out_spec=pytree.tree_structure(example))))
    return tuple(wanted)


def _placeholders_first(graph: fx.Graph) -> list[fx.Node]:
    placeholders = graph.find_nodes(op="placeholder")
    head = next(iter(graph.nodes))
    for node in placeholders:
        if node is not head:
            head.prepend(node)
    return list(placeholders)


def _check_whole(traced: fx.GraphModule) -> None:
    """A sub-graph that is left (a branch, a loop, enabled autocast) is beyond a flat program."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and not isinstance(_resolve(traced, str(node.target)), torch.Tensor):
            user = next(iter(node.users))
            raise TraceError(
                f"operation '{getattr(user.target, '__name__', user.target)}' holds a sub-graph, which a program cannot",
                where=_last_line(user.meta.get("stack_trace")),
                hint="leave out torch.autocast (give the model the dtype instead), torch.cond and torch.while_loop",
            )


def _resolve(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _check_finite(program: Program) -> None:
    for name, tensor in program.tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not program.is_parameter(name):
            bad = bool(tensor.isnan().any())
        else:
            bad = not tensor.sum(dtype=torch.float64).isfinite()
        if bad:
            raise DataError(f"weight '{name}' holds NaN or infinite values", where=name, hint="repair the checkpoint before pruning it")


# -- errors ---------------------------------------------------------------------------------------


def _trace_error(module: torch.nn.Module, error: Exception) -> TraceError:
    """Name the line of the user's model that the tracer stopped at, and what to do about it."""
    where = None
    for frame in traceback.extract_tb(error.__traceback__):
        if _is_users(frame.filename):
            where = f"{frame.filename}:{frame.lineno}"
    text = str(error).strip()
    first = text.splitlines()[0].strip() if text else type(error).__name__
    return TraceError(
        f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {first}",
        where=where or _last_line(text) or _definition(module),
        hint=_advice(type(error).__name__, text),
    )


def _is_users(filename: str) -> bool:
    if filename.startswith(("<", *_LIBRARIES)):
        return False
    return "site-packages" in filename or not filename.startswith(_STDLIB)


def _last_line(text: str | None) -> str | None:
    """``file:line`` of the last place in a printed stack that is the user's."""
    places = re.findall(r'File "([^"]+)", line (\d+)', text or "")
    return next((f"{file}:{line}" for file, line in reversed(places) if _is_users(file)), None)


def _advice(kind: str, text: str) -> str:
    if kind == "GuardOnDataDependentSymNode" or "data-dependent" in text:
        return "there a tensor's values decide a shape or a branch; compute both ways and choose with torch.where, or decide by shapes"
    if "numpy" in text:
        return "stay in torch there: a trace cannot follow numpy"
    if "not a known type" in text or "Unsupported input type" in text:
        return "give and return tensors, numbers, tuples, lists, dicts, or dataclasses registered with torch.export.register_dataclass"
    return "run the model on the example inputs; if that works, write the line with operations that torch.export knows"
