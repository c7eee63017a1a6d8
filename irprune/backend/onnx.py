"""A Program as an ONNX file.

The call of a program takes and gives nested structures of tensors and constants; an ONNX file has
flat named tensors. :class:`Signature` maps one to the other, :func:`export` writes the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import irprune
from irprune.backend.archive import to_exported
from irprune.backend.onnx_ops import as_it_is, divided, quick_rules, renamed, translations
from irprune.backend.real_pairs import in_real_pairs
from irprune.errors import ExportError, IrpruneError, wording
from irprune.ir.facts import Note
from irprune.ir.fake import mode_of
from irprune.ir.program import Program, copied, location
from irprune.pipeline.files import atomic
from irprune.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir

Precision = Literal["float32", "float16"]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# A protobuf message ends at 2 GiB; an eighth of a GiB is left for the graph itself.
INLINE_LIMIT_BYTES = 2**31 - 2**27
_STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True)
class OnnxFile(Note):
    """An ONNX file that was written.

    Attributes:
        path: The model file.
        opset: Version of the operator set.
        inputs: Name to shape of each input; a dynamic axis stands by its name.
        outputs: Name to shape of each output.
        size_bytes: Size of the model file with its external data.
        external: Names of the files beside it that hold its weights.
        cache: It is a decoder with a key-value cache (:mod:`irprune.backend.cache`).
        precision: What it computes in.
        quantised: The same with weights in eight bits, a file beside it.
        products_in_float32: Of a file in eight bits: how many products stay, since their inputs have outliers.
        computes: The program and the program with a cache that was made of it, for those who compare the two.
    """

    path: Path
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    size_bytes: int
    external: tuple[str, ...] = ()
    cache: bool = False
    precision: Precision = "float32"
    quantised: OnnxFile | None = None
    products_in_float32: int = 0
    computes: tuple[Program, Any] | None = field(default=None, repr=False, compare=False)

    def described(self) -> dict[str, Any]:
        """All but the programs, as plain data."""
        return {
            "file": self.path.name,
            "opset": self.opset,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "size_bytes": self.size_bytes,
            "external_data": list(self.external),
            "cache": self.cache,
            "precision": self.precision,
            **({"int8": self.quantised.described()} if self.quantised is not None else {}),
            **({"products_in_float32": self.products_in_float32} if self.products_in_float32 else {}),
        }

    @classmethod
    def read(cls, folder: Path, said: Mapping[str, Any]) -> OnnxFile:
        """The file that a manifest describes."""
        quantised = cls.read(folder, said["int8"]) if "int8" in said else None
        cache, precision = said.get("cache", False), said.get("precision", "float32")
        path, external = folder / said["file"], tuple(said["external_data"])
        left = said.get("products_in_float32", 0)
        return cls(path, said["opset"], said["inputs"], said["outputs"], said["size_bytes"], external, cache, precision, quantised, left)

    def manifest(self) -> dict[str, Any]:
        return {"onnx": self.described()}


@dataclass(frozen=True)
class Argument:
    """One flat argument of a call.

    Attributes:
        name: Name of the argument: the file's input where it is a tensor.
        fixed: It is no tensor but a constant that the trace has folded in.
        value: The constant.
    """

    name: str
    fixed: bool = False
    value: Any = None


@dataclass(frozen=True)
class Result:
    """One flat result of a call.

    Attributes:
        name: Name of the file's output, or ``None`` where the result is a constant.
        value: The constant.
        scalar: The program gives a plain number (a symbolic size), the file a tensor without axes.
    """

    name: str | None
    value: Any = None
    scalar: bool = False


@dataclass(frozen=True)
class Signature:
    """How a program's call maps to the flat named tensors of its ONNX file.

    Attributes:
        parameters: Names of the arguments at the top level, positional ones first.
        arguments: One per flat argument.
        income: Structure of ``(args, kwargs)``.
        results: One per flat output.
        outcome: Structure of the outputs.
    """

    parameters: tuple[str, ...]
    arguments: tuple[Argument, ...]
    income: pytree.TreeSpec
    results: tuple[Result, ...]
    outcome: pytree.TreeSpec

    @classmethod
    def of(cls, program: Program) -> Signature:
        graph = program.module.graph
        assert isinstance(graph._codegen, _PyTreeCodeGen)
        info = graph._codegen.pytree_info
        assert info.out_spec is not None
        holders = graph.find_nodes(op="placeholder")
        values = pytree.tree_leaves(program.interface.example)
        arguments = tuple(
            Argument(name) if _is_tensor(node) else Argument(name, fixed=True, value=value)
            for name, node, value in zip(program.interface.inputs, holders, values, strict=True)
        )
        leaves = _leaves(graph)
        wanted = program.interface.outputs or [f"output{position}" for position in range(len(leaves))]
        results = tuple(
            Result(name, scalar=not _is_tensor(leaf)) if isinstance(leaf, fx.Node) else Result(None, leaf)
            for name, leaf in zip(_unique(wanted, taken=program.interface.inputs), leaves, strict=True)
        )
        return cls(tuple(info.orig_args), arguments, info.in_spec, results, info.out_spec)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.arguments if not argument.fixed)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(result.name for result in self.results if result.name is not None)


def export(
    program: Program, path: Path, *, opset: int | None = None, optimize: bool = True, external_data: bool | Literal["auto"] = "auto"
) -> OnnxFile:
    """Write a program as an ONNX file: :func:`convert`, then :func:`write`."""
    return write(convert(program, opset=opset, optimize=optimize), path, external_data=external_data)


def convert(program: Program, *, opset: int | None = None, optimize: bool = True) -> onnx_ir.Model:
    """A program as an ONNX model in memory.

    Inputs, outputs and dynamic axes carry the names of the program's interface, weights the model's
    own names; a weight that is stored transposed ends in ``.T``. Nothing tells of this machine.

    Args:
        program: The program, its weights in memory; they are shared, not copied, where they are not transposed.
        opset: Version of the operator set; by default 20, or 23 for bfloat16, which older ones hardly know.
        optimize: Fold constants and fuse operations.

    Raises:
        ExportError: The program cannot be expressed; names the operation and the model's line.
    """
    meta = next((name for name, tensor in program.tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise ExportError(f"the weight '{meta}' has no data (meta device)", hint="load the model with its weights, or leave out 'export'")
    opset = opset or (23 if any(tensor.dtype == torch.bfloat16 for tensor in program.tensors.values()) else 20)
    with quiet(logging.ERROR):  # it warns of what is not installed and not needed; its errors come as exceptions
        flat = in_real_pairs(flattened(program, Signature.of(program)))
        renamed(flat.module.graph)
        try:
            exported = as_it_is(to_exported(flat))
            written = torch.onnx.export(
                exported, verbose=False, optimize=False, opset_version=opset, custom_translation_table=translations(flat.nodes)
            )
            assert written is not None
            transposed = _transposed_weights(written.model)
            if optimize:
                with quick_rules():
                    written.optimize()
                divided(written.model)
        except IrpruneError:
            raise
        except Exception as error:
            raise _failure(error) from error
        _name(written, flat, transposed)
    _verify(written.model, flat, opset)
    return written.model


def write(model: onnx_ir.Model, path: Path, *, external_data: bool | Literal["auto"] = "auto") -> OnnxFile:
    """Write an ONNX model; its file appears under its name only when whole and valid.

    Args:
        model: As :func:`convert` gives it.
        path: The model file; external data stands beside it as ``<name>.data``.
        external_data: Weights beside the model file; ``auto`` does so where they exceed what one
            file can hold (2 GiB).

    Raises:
        ExportError: The weights do not fit, or the model is not valid ONNX.
        OutputError: The file cannot be written.
    """
    import onnx
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if external_data is False and weights > INLINE_LIMIT_BYTES:
        raise ExportError(
            f"{weights / 2**30:.1f} GiB of weights do not fit in one ONNX file", hint="give external_data=auto, or external_data=true"
        )
    data = f"{path.name}.data" if external_data is True or weights > INLINE_LIMIT_BYTES else None
    with atomic(path) as part:
        onnx_ir.save(model, part, external_data=data, size_threshold_bytes=1024)
        try:
            onnx.checker.check_model(str(part), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported model is not valid ONNX: {wording(error)}", hint=_HINT) from error
        sizes = {file.name: file.stat().st_size for file in part.parent.iterdir()}
    external = tuple(name for name in sizes if name != path.name)
    if not external:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return OnnxFile(
        path=path,
        opset=model.opset_imports[""],
        inputs={str(value.name): _shape(value) for value in model.graph.inputs},
        outputs={str(value.name): _shape(value) for value in model.graph.outputs},
        size_bytes=sum(sizes.values()),
        external=external,
    )


_HINT = "leave out 'export' (model.pt2 is written without it), or write the operation in other ones"


def flattened(program: Program, signature: Signature) -> Program:
    """The same program with flat tensors in and out, each output a value of its own.

    Constants among the inputs and outputs are dropped (the trace has folded them in), sizes among
    the outputs become tensors without axes. Its interface names what the ONNX file will have.
    """
    graph = copied(program.module.graph)
    for node, argument in zip(graph.find_nodes(op="placeholder"), signature.arguments, strict=True):
        if argument.fixed:
            graph.erase_node(node)
    output = graph.output_node()
    mode = mode_of(graph.nodes)
    assert mode is not None

    def derived(target: OpOverload, leaf: fx.Node, **kwargs: Any) -> fx.Node:
        value = program.tensors[str(leaf.target)] if leaf.op == "get_attr" else leaf.meta["val"]
        with graph.inserting_before(output), mode:
            node = graph.call_function(target, (leaf,), kwargs)
            node.meta["val"] = target(mode.from_tensor(value, static_shapes=True) if leaf.op == "get_attr" else value, **kwargs)
        return node

    results: list[fx.Node] = []
    for leaf in _leaves(graph):
        if not isinstance(leaf, fx.Node):
            continue
        if not _is_tensor(leaf):
            dtype = {torch.SymFloat: torch.float64, torch.SymBool: torch.bool}.get(type(leaf.meta["val"]), torch.int64)
            leaf = derived(torch.ops.aten.scalar_tensor.default, leaf, dtype=dtype)
        elif leaf.op != "call_function" or leaf in results:
            leaf = derived(torch.ops.aten.clone.default, leaf)
        results.append(leaf)
    output.args = (tuple(results),)
    values = pytree.tree_leaves(program.interface.example)
    kept = [position for position, argument in enumerate(signature.arguments) if not argument.fixed]
    example: Call = (tuple(values[position] for position in kept), {})
    out_spec = pytree.tree_structure(signature.outputs)
    # Names of an ONNX file need be no names of Python.
    parameters = [node.name for node in graph.find_nodes(op="placeholder")]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(parameters, pytree.tree_structure(example), out_spec)))
    interface = dataclasses.replace(
        program.interface,
        example=example,
        dynamic=tuple(program.interface.dynamic[position] for position in kept),
        inputs=signature.inputs,
        outputs=signature.outputs,
    )
    return dataclasses.replace(program.with_graph(graph), interface=interface)


def _leaves(graph: fx.Graph) -> list[Any]:
    """The flat results; a single one may stand bare."""
    value = graph.output_node().args[0]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.op == "get_attr" or isinstance(node.meta.get("val"), torch.Tensor))


def _unique(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """The names, changed where they are taken: ONNX has one name space for all values."""
    used = set(taken)
    out: list[str] = []
    for name in names:
        unique = next(
            candidate for candidate in itertools.chain([name], (f"{name}_{n}" for n in itertools.count(1))) if candidate not in used
        )
        used.add(unique)
        out.append(unique)
    return out


def _transposed_weights(model: onnx_ir.Model) -> dict[str, str]:
    """Values that are a transposed weight: their name to the weight's."""
    weights = model.graph.initializers
    return {
        str(node.outputs[0].name): str(node.inputs[0].name)
        for node in model.graph
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].name in weights
    }


def _name(written: torch.onnx.ONNXProgram, flat: Program, transposed: Mapping[str, str]) -> None:
    """Give inputs, outputs, axes and folded weights their names, and drop what tells of this machine."""
    import onnx_ir

    model, graph = written.model, written.model.graph
    folded = {name: f"{weight}.T" for name, weight in transposed.items() if name in graph.initializers}
    for old, new in zip(folded, _unique(folded.values(), taken=list(graph.initializers)), strict=True):
        graph.initializers[old].name = new
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
    bounds = dict(zip([*graph.inputs, *graph.outputs], [*flat.interface.inputs, *flat.interface.outputs], strict=True))
    for value in values:
        if value not in bounds and value.name in bounds.values():
            value.name = f"{value.name}_inner"
    for position, value in enumerate(bounds):
        value.name = f"irprune_bound_{position}"
    for value, name in bounds.items():
        value.name = name
    axes: dict[str | onnx_ir.SymbolicDim, str] = {}
    for value, labels in zip(graph.inputs, flat.interface.dynamic, strict=True):
        for axis, label in labels.items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                axes.setdefault(dim.value, label)
    written.rename_axes(axes)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
    model.producer_name, model.producer_version = "irprune", irprune.__version__


def _verify(model: onnx_ir.Model, flat: Program, opset: int) -> None:
    """The promises of :func:`export` that no other tool checks."""
    import onnx_ir

    if (found := model.opset_imports.get("")) != opset:
        raise ExportError(f"the model cannot be converted to opset {opset}, it stays at {found}", hint=f"give opset={found}")
    own = {function.domain for function in model.functions.values()}
    for node in model.graph.all_nodes():
        if node.domain not in (*_STANDARD_DOMAINS, *own):
            raise ExportError(f"operation '{node.domain}::{node.op_type}' is not part of ONNX", where=node.name, hint=_HINT)
    for value, labels in zip(model.graph.inputs, flat.interface.dynamic, strict=True):
        for axis, label in labels.items():
            if value.shape is None or not isinstance(value.shape[axis], onnx_ir.SymbolicDim):
                raise ExportError(
                    f"the dynamic axis '{label}' became the fixed size {value.shape[axis] if value.shape is not None else None}",
                    where=f"input {value.name}, axis {axis}",
                    hint="declare the axis static in dynamic_axes(), or keep the model from reading its size as a number",
                )


def _shape(value: onnx_ir.Value) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape or ())


def _failure(error: Exception) -> ExportError:
    """What went wrong, at which operation and line of the model, as far as the exporter was at one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    node = _node_at_work(cause) or _node_at_work(error)
    if node is None:
        return ExportError(f"the program cannot be expressed in ONNX: {wording(cause)}", hint=_HINT)
    operation = f"operation '{getattr(node.target, 'overloadpacket', node.target)}'"
    where = f"%{node.name} ({location(node) or 'line unknown'})"
    return ExportError(f"{operation} cannot be expressed in ONNX: {wording(cause)}", where=where, hint=_HINT)


def _node_at_work(error: BaseException) -> fx.Node | None:
    """The operation that was worked on when an error came up: the exporter tells it in no other way."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("n", "node"):
            value = frame.f_locals.get(name)
            if isinstance(value, fx.Node) and value.op == "call_function":
                found = value
    return found
