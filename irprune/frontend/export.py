"""``torch.export`` to :class:`Program`.

The training IR is kept: ``linear``, ``conv2d``, ``layer_norm`` and
``scaled_dot_product_attention`` stay whole. What says nothing about the function is taken out:
guards, assertions, gradient-mode regions, slices and casts that change nothing, dead code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import is_fake
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from irprune.errors import DataError, TargetError, TraceError
from irprune.frontend import axes, blame
from irprune.frontend.repeats import Repeats
from irprune.ir.dims import as_size
from irprune.ir.edit import place
from irprune.ir.program import Interface, Program, attribute, graph_module

_KEPT_META = ("val", "stack_trace", "nn_module_stack")
_NOISY = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export._trace")


def trace(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: axes.Dynamic | None = None,
    *,
    outputs: Sequence[str] | Callable[[tuple[str, ...]], Sequence[str]] | None = None,
    strict: bool = True,
    check: bool = True,
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
        outputs: Keep only the outputs of these names (fields or keys of the model's output), or those
            that a function chooses from the names; one of them alone is returned bare.
        strict: An axis of ``dynamic`` that the model makes constant is an error; otherwise it is a note.
        check: Compare the program with the model on the example inputs (not on the meta device).

    Returns:
        The untyped program. It is called as the model is.

    Raises:
        TargetError: The inputs do not fit the model, or a dynamic axis is not one.
        TraceError: ``torch.export`` cannot trace the model, or a dynamic axis is a constant in it.
        DataError: A weight is NaN or infinite.
    """
    weights = [*module.parameters(), *module.buffers()]
    abstract = any(tensor.is_meta or is_fake(tensor) for tensor in weights)
    args, kwargs = _inputs(module, tuple(args), dict(kwargs or {}), meta=bool(weights) and all(tensor.is_meta for tensor in weights))
    leaves = pytree.tree_leaves((args, kwargs))
    names = axes.leaf_names(inspect.signature(module.forward), args, kwargs)
    wanted, explicit = axes.wanted(names, leaves, dynamic or {})
    with _evaluation(module), _written_out():
        expected = _run(module, args, kwargs, abstract)
        _register_dataclasses(expected)
        with axes.marked(leaves, wanted), axes.tied(module, wanted), axes.watched() as specialised, _quiet():
            try:
                traced = _exported(module, args, kwargs)
            except Exception as error:
                raise _trace_error(module, error) from error
    graph = traced.graph
    _drop_noise(graph)
    _lay_out(graph)
    aliases = _untie(module, traced)
    _drop_records(graph)
    output_names, positions = _select_outputs(graph, outputs)
    graph.eliminate_dead_code()
    _check_whole(traced)
    placeholders = _placeholders_first(graph)
    found, notes = axes.found(placeholders, names, wanted, explicit if strict else set(), specialised)
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    interface = Interface((args, kwargs), found, tuple(node.name for node in placeholders), output_names, notes)
    program = Program(graph_module(traced, graph), interface, aliases=aliases)
    if not abstract:
        _check_finite(program)
        if check:
            flat = pytree.tree_leaves(expected)
            _check_faithful(program, [flat[position] for position in positions])
    return program


def _exported(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The flat graph of ``torch.export``, identical layers run once where that can be done."""
    repeats = Repeats(module)

    def flat() -> fx.GraphModule:
        exported = torch.export.export(module, args, kwargs, strict=False)
        parts = [part for part in exported.graph_module.modules() if isinstance(part, fx.GraphModule)]
        if any(_by_dispatch(node) for part in parts for node in part.graph.nodes):
            exported = exported.run_decompositions({})
        traced = exported.module(check_guards=False)
        _inline_regions(traced)
        return traced

    if repeats.possible:
        with contextlib.suppress(Exception), repeats.watching():  # whatever is wrong shows in the whole trace, too
            return repeats.written_out(flat())
    return flat()


# -- inputs ---------------------------------------------------------------------------------------


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, meta: bool) -> Inputs:
    """The example inputs in the order of the signature, every tensor an object of our own, on the meta device if asked.

    The tracer takes inputs that are one and the same object for one input.
    """
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TargetError(
            f"the example inputs do not fit {type(module).__name__}.forward{signature}: {error}",
            where=blame.definition(module),
            hint="give the inputs as the model takes them: a tuple by position, a dict by name",
        ) from error
    _register_dataclasses((args, kwargs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TargetError("the example inputs hold no tensor", where=blame.definition(module), hint="give at least one tensor")
    named = [name for name in signature.parameters if name in kwargs]
    kwargs = {name: kwargs[name] for name in (*named, *(name for name in kwargs if name not in named))}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if meta:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        return tensor.detach().clone()

    return pytree.tree_map_only(torch.Tensor, own, (args, kwargs))


def _register_dataclasses(value: Any) -> None:
    """Let the tracer see into the dataclasses of a model's inputs or outputs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _register_dataclasses(part)


def _run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], abstract: bool) -> Any:
    """What the model returns on its example inputs; ``None`` where only the lack of data stops it."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            return module(*args, **kwargs)
    except Exception as error:
        if abstract:
            return None
        raise TargetError(
            f"{type(module).__name__} fails on its own example inputs ({_signatures(args, kwargs)}): {blame.first_line(error)}",
            where=blame.innermost(traceback.walk_tb(error.__traceback__)) or blame.definition(module),
            hint="give example inputs of the shapes and dtypes that the model takes",
        ) from error


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
def _written_out() -> Iterator[None]:
    """torch's transformer layers run operation by operation, and do not read a mask's numbers.

    Their fast path is one opaque operation, which also puts zeros where a padding mask masks. They compare
    a mask with the causal one, on which a trace cannot branch; found causal, it is only applied faster.
    """
    fast, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask

    def hinted(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = hinted
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = detect


class _StderrWithoutGraphs:
    """Standard error less the half-built graph that the tracer prints there when it fails."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._after_graph = False

    def write(self, text: str) -> int:
        is_graph = text.lstrip().startswith("def forward(self")
        if is_graph or (self._after_graph and text == "\n"):
            self._after_graph = is_graph
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracer's warnings, logs and prints say nothing to the user of a program."""
    loggers = [logger for name in _NOISY if not (logger := logging.getLogger(name)).disabled]
    with warnings.catch_warnings(), contextlib.redirect_stderr(cast(Any, _StderrWithoutGraphs())):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in loggers:
                logger.disabled = False


# -- graph ----------------------------------------------------------------------------------------


def _by_dispatch(node: fx.Node) -> bool:
    """Whether a call changes what operations after it mean: ``torch.vmap``, enabled autocast.

    A trace below that shows what they then do: operations on whole batches, casts.
    """
    if getattr(node.target, "__name__", "") == "wrap_with_autocast":
        return node.args[2] is not False
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


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


def _lay_out(graph: fx.Graph) -> None:
    """What reads pairs of neighbouring numbers asks for a layout that a smaller value need not have: make it so."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        with graph.inserting_before(node):
            whole = graph.call_function(torch.ops.aten.contiguous.default, (operand,))
        whole.meta = {**node.meta, "val": operand.meta["val"].contiguous()}
        node.update_arg(0, whole)


def _is_identity(node: fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.dropout.default:
        return bool(node.args[2] is False)
    if node.target is aten.detach_.default:
        return getattr(node.args[0], "target", None) is aten.lift_fresh_copy.default
    if node.target not in (aten.slice.Tensor, aten.to.dtype, aten.to.dtype_layout, aten.to.device):
        return False
    assert isinstance(node.args[0], fx.Node)
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if before is None or after is None or [as_size(s) for s in before.shape] != [as_size(s) for s in after.shape]:
        return False
    if node.target is aten.slice.Tensor:
        return bool(len(node.args) < 5 or node.args[4] == 1)
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
            place(traced, name, attribute(traced, str(node.target)))
            node.target = name
    return aliases


def _drop_records(graph: fx.Graph) -> None:
    """Take out what writes to a tensor of the model that no output depends on, as a counter of calls does."""
    for holder in dict.fromkeys(_written_to(node) for node in graph.nodes if getattr(_schema_of(node), "is_mutable", False)):
        if holder is None or holder.op != "get_attr":
            continue
        below: dict[fx.Node, None] = {}
        pending = [holder]
        while pending:
            node = pending.pop()
            if node not in below:
                below[node] = None
                pending.extend(node.users)
        if graph.output_node() not in below and not any(_touches_more(node, below) for node in below):
            for node in reversed([node for node in graph.nodes if node in below]):
                graph.erase_node(node)


def _written_to(node: fx.Node) -> fx.Node | None:
    """The value that a call writes to, found through views of it."""
    value = node.args[0] if node.args else None
    while isinstance(value, fx.Node) and value.op == "call_function" and value.args:
        schema = _schema_of(value)
        if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
            break
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _schema_of(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _touches_more(node: fx.Node, known: Mapping[fx.Node, None]) -> bool:
    """Whether a call may write to, or gives a view of, a value that is not among the known ones."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    schema = _schema_of(node)
    arguments = [] if schema is None else [item for item in schema.arguments if item.alias_info is not None]
    if schema is None or len(arguments) > 1 or (arguments and arguments[0] is not schema.arguments[0]):
        return any(value not in known for value in node.all_input_nodes)
    return bool(arguments) and node.args[0] not in known


def _select_outputs(
    graph: fx.Graph, wanted: Sequence[str] | Callable[[tuple[str, ...]], Sequence[str]] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Name the flat outputs after fields and keys; keep only the wanted ones, if any are named.

    Returns:
        The names, and the place of each among the model's flat outputs.
    """
    output = graph.output_node()
    flat = list(pytree.tree_leaves(output.args[0]))
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    info = codegen.pytree_info
    assert info.out_spec is not None
    tree = pytree.tree_unflatten(list(range(len(flat))), info.out_spec)
    names = [".".join(map(axes.key_of, path)) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    names = [f"output{name}" if not name or name.isdigit() else name for name in names]
    names = ["output0" if name == "output" else name for name in names]
    if wanted is None:
        return tuple(names), list(range(len(names)))
    wanted = wanted(tuple(names)) if callable(wanted) else wanted
    missing = [name for name in wanted if name not in names]
    if missing:
        raise TargetError(f"the model has no output '{missing[0]}'; its outputs are {', '.join(names)}", hint="name one of them")
    picked = [flat[names.index(name)] for name in wanted]
    output.args = (tuple(picked),)
    example = picked[0] if len(picked) == 1 else tuple(picked)
    graph.set_codegen(_PyTreeCodeGen(info._replace(out_spec=pytree.tree_structure(example))))
    return tuple(wanted), [names.index(name) for name in wanted]


def _placeholders_first(graph: fx.Graph) -> list[fx.Node]:
    placeholders = graph.find_nodes(op="placeholder")
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in placeholders:
        anchor.prepend(node)
    return list(placeholders)


def _check_whole(traced: fx.GraphModule) -> None:
    """A sub-graph that is left (a branch, a loop) is beyond a flat program."""
    for node in traced.graph.nodes:
        if node.op != "get_attr":
            continue
        held = operator.attrgetter(str(node.target))(traced)
        if isinstance(held, torch.Tensor):
            continue
        user = next(iter(node.users))
        inside = held.graph.nodes if isinstance(held, fx.GraphModule) else ()
        places = (blame.last_line(n.meta.get("stack_trace")) for n in (user, *inside))
        raise TraceError(
            f"operation '{getattr(user.target, '__name__', user.target)}' holds a sub-graph, which a program cannot",
            where=next(filter(None, places), None),
            hint="do without torch.cond and torch.while_loop",
        )


def _check_finite(program: Program) -> None:
    for name, tensor in program.tensors.items():
        if not tensor.is_floating_point():
            continue
        # A mask buffer may hold minus infinity; a sum finds bad values of a weight without a copy of it.
        bad = not tensor.sum(dtype=torch.float64).isfinite() if program.is_parameter(name) else bool(tensor.isnan().any())
        if bad:
            raise DataError(f"'{name}' holds NaN or infinite values", where=name, hint="repair the checkpoint before pruning it")


def _check_faithful(program: Program, expected: list[Any]) -> None:
    """The program must give what the model gave on the example inputs."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, program.interface.example)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = pytree.tree_leaves(program(*args, **kwargs))
    for name, want, got in zip(program.interface.outputs, expected, found, strict=True):
        if not same_values(want, got):
            raise not_faithful(name)


def not_faithful(output: str) -> TraceError:
    """A trace that gives another output than the model."""
    return TraceError(
        f"the trace does not compute what the model computes: output '{output}' differs on the example inputs",
        hint="make the model a function of its inputs: no state left from one call to the next, no values computed by python code",
    )


def same_values(want: Any, got: Any) -> bool:
    """Whether two outputs of a model and of its trace are the same, up to the order of their sums."""
    if not isinstance(want, torch.Tensor):
        return bool(want == got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(want, got)
    want, got = want.double(), got.double()
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    return torch.allclose(want, got, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _signatures(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Shapes and dtypes of the inputs, for a message."""

    def brief(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return repr(value)

    leaves = pytree.tree_map(brief, (list(args), kwargs))
    return ", ".join([*map(str, leaves[0]), *(f"{key}={value}" for key, value in leaves[1].items())])


def _trace_error(module: torch.nn.Module, error: Exception) -> TraceError:
    """Name the line of the user's model that the tracer stopped at, and what to do about it."""
    text = str(error).strip()
    return TraceError(
        f"torch.export cannot trace {type(module).__name__}: {blame.first_line(error)}",
        where=blame.innermost(traceback.walk_tb(error.__traceback__)) or blame.last_line(text) or blame.definition(module),
        hint=_advice(type(error).__name__, text),
    )


def _advice(kind: str, text: str) -> str:
    if kind == "GuardOnDataDependentSymNode" or "data-dependent" in text:
        return "there a tensor's values decide a shape or a branch; compute both ways and choose with torch.where, or decide by shapes"
    if "numpy" in text:
        return "stay in torch there: a trace cannot follow numpy"
    if "not a known type" in text or "Unsupported input type" in text:
        kinds = "give and return tensors, numbers, tuples, lists, dicts, or dataclasses registered with torch.export.register_dataclass"
        return f"set model.config.use_cache = False, for a trace returns no cache; else {kinds}" if "Cache" in text else kinds
    return "run the model on the example inputs; if that works, write the line with operations that torch.export knows"
