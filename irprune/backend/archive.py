"""``model.pt2``: a program as a ``torch.export`` archive, which loads without irprune and without the model's source."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import fx
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from irprune.errors import DataError, ParityError, wording
from irprune.ir.fake import mode_of
from irprune.ir.program import Program, copied
from irprune.pipeline.files import atomic


def to_exported(program: Program) -> ExportedProgram:
    """The program as an ``ExportedProgram`` of torch's training IR; tensors are shared.

    The graph is lifted as it is (parameters and buffers become inputs) instead of traced again: that
    takes a fraction of the time and changes no operation.

    Containers that only a model's library knows (an output dataclass) become plain dictionaries by
    field name, so that the archive loads where that library is not installed.
    """
    graph = copied(program.module.graph)
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    assert codegen.pytree_info.out_spec is not None
    in_spec, out_spec = plain(codegen.pytree_info.in_spec), plain(codegen.pytree_info.out_spec)
    leaves = pytree.tree_leaves(program.interface.example)
    users = [_argument(node, leaf) for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True)]
    graph.set_codegen(fx.graph.CodeGen())
    inputs = [*_lift(program, graph), *(InputSpec(InputKind.USER_INPUT, arg, None) for arg in users)]
    results = pytree.tree_leaves(graph.output_node().args[0])
    graph.output_node().args = (tuple(results),)
    outputs = [_argument(result, result.meta["val"]) if isinstance(result, fx.Node) else ConstantArgument("", result) for result in results]
    call = ModuleCallSignature(list(users), list(outputs), in_spec, out_spec, list(codegen.pytree_info.orig_args))
    exported = ExportedProgram(
        root={},
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, [OutputSpec(OutputKind.USER_OUTPUT, arg, None) for arg in outputs]),
        state_dict=dict(program.tensors),
        range_constraints=_ranges(graph),
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=pytree.tree_unflatten(leaves, in_spec),
        verifiers=[TrainingIRVerifier],
    )
    # They speak of the traced call's arguments by names that a rewritten graph need not have.
    exported._guards_code = []
    return exported


def _argument(node: fx.Node, value: Any) -> TensorArgument | SymIntArgument | ConstantArgument:
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    return SymIntArgument(node.name) if isinstance(value, torch.SymInt) else ConstantArgument(node.name, value)


def _lift(program: Program, graph: fx.Graph) -> list[InputSpec]:
    """Put a placeholder in place of every parameter and buffer, before those of the user."""
    specs = []
    mode = mode_of(graph.nodes)
    assert mode is not None
    with graph.inserting_before(next(iter(graph.nodes))):
        for name, tensor in program.tensors.items():
            kind, prefix = (InputKind.PARAMETER, "p") if program.is_parameter(name) else (InputKind.BUFFER, "b")
            node = graph.placeholder(f"{prefix}_{name.replace('.', '_')}")
            node.target = node.name
            # Without gradients: torch's decompositions fail on attention whose mask asks for one.
            node.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
            for old in graph.find_nodes(op="get_attr", target=name):
                old.replace_all_uses_with(node)
                graph.erase_node(old)
            persistent = None if kind is InputKind.PARAMETER else True
            specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
    return specs


def _ranges(graph: fx.Graph) -> dict[Any, Any]:
    """The range of every symbol in the shapes: of the inputs' dynamic axes and of sizes that are computed from contents."""
    out: dict[Any, Any] = {}
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            held = value.fake_mode if isinstance(value, FakeTensor) else getattr(value, "node", None)
            if held is not None and held.shape_env is not None:
                for symbol in free_symbols(value) - out.keys():
                    out[symbol] = held.shape_env.var_to_range[symbol]
    return out


_PLAIN = (None, tuple, list, dict, OrderedDict)


def plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same structure with dictionaries by field name in place of containers that need a library to exist."""
    children = [plain(child) for child in spec.children()]
    if spec.type in _PLAIN:
        return pytree.TreeSpec(spec.type, spec.context, children) if children else spec
    box = pytree.tree_unflatten(range(len(children)), pytree.TreeSpec(spec.type, spec.context, [pytree.treespec_leaf()] * len(children)))
    paths, _ = pytree.tree_flatten_with_path(box)
    return pytree.treespec_dict({_name(path[0]): child for (path, _), child in zip(paths, children, strict=True)})


def _name(entry: Any) -> str:
    return str(next(getattr(entry, field) for field in ("key", "name", "idx") if hasattr(entry, field)))


def save_pt2(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a program as a ``torch.export`` archive that answers as the program does.

    The file is loaded again with ``torch.export.load`` and run on the example inputs before it appears
    under its name.

    Raises:
        ParityError: The file answers differently.
        OutputError: The file cannot be written.
    """
    exported = to_exported(program)
    with atomic(path) as part:
        with part.open("wb") as file:
            sink = _Sink(file)
            torch.export.save(exported, sink)  # type: ignore[arg-type]
            sink.check()
        _check(program, part, Path(path))


def load_pt2(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read an archive that :func:`save_pt2` wrote.

    ``torch.export.load`` unpickles parts of archives of other making. Those are refused, but torch
    still evaluates the size expressions of the graph, so read archives from people you trust only.

    Raises:
        DataError: The file is not such an archive, or holds pickled objects.
    """
    path = Path(path)
    hint = "name the directory of a run that has ended; its model.onnx can be used too"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".pt")) or "custom_obj" in name or "opaque" in name]
            configs = [json.loads(archive.read(name)) for name in names if name.endswith("_config.json")]
            pickled = any(entry.get("use_pickle") for config in configs for entry in config.get("config", {}).values())
            for name in names:
                if name.endswith(".pt"):
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        if pickled or any("custom_obj" in name or "opaque" in name for name in names):
            raise DataError("the archive holds pickled objects, which are not read", where=str(path), hint=hint)
        return torch.export.load(str(path))
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"the archive cannot be read: {wording(error)}", where=str(path), hint=hint) from error


class _Sink(io.RawIOBase):
    """A file that accepts everything and tells afterwards what went wrong.

    torch's archive writer ends the whole process when the disk is full while it closes the archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._try(lambda: self._file.seek(offset, whence), offset)

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        return self._try(lambda: self._file.write(data), size)

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error
        self._file.flush()

    def _try(self, work: Callable[[], int], answer: int) -> int:
        if self._error is None:
            try:
                return work()
            except OSError as error:
                self._error = error
        return answer


def _check(program: Program, part: Path, path: Path) -> None:
    """Run the archive and the program on the example inputs."""
    args, kwargs = program.interface.example
    leaves, spec = pytree.tree_flatten((args, kwargs))
    plain_args, plain_kwargs = pytree.tree_unflatten(leaves, plain(spec))
    loaded = torch.export.load(str(part)).module()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        want = pytree.tree_leaves(program(*args, **kwargs))
        torch.manual_seed(0)
        have = pytree.tree_leaves(loaded(*plain_args, **plain_kwargs))
    for number, (w, h) in enumerate(zip(want, have, strict=True)):
        try:
            torch.testing.assert_close(h, w, equal_nan=True)
        except AssertionError as error:
            raise ParityError(f"output {number} of the archive differs from the program: {error}", where=str(path)) from error
