"""Token indices to logits, in torch and in onnxruntime alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from irprune.errors import DataError, IrpruneError, TargetError
from irprune.frontend.blame import first_line
from irprune.ir.program import Program, Runner, graph_module

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_INTEGERS = (torch.int64, torch.int32)
_LOGITS_AXES = 3


@dataclass(frozen=True)
class Port:
    """One tensor that a model reads.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its sizes; ``None`` where an axis is dynamic.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Predictor:
    """A causal language model as a function of token indices.

    Calling it gives the logits, ``(rows, tokens, vocabulary)`` as float32, for int64 indices
    ``(rows, tokens)``. A model with a fixed number of rows or tokens gets what is missing as padding
    to the right, which a causal model does not look at.

    Attributes:
        ports: What the model reads.
        feed: Tensors by name to the outputs, in the order of the model.
        most_tokens: Longest row that the model takes, where its own shapes say so; see :meth:`reach`.
        device: Where the model runs.
    """

    ports: tuple[Port, ...]
    feed: Callable[[Mapping[str, torch.Tensor]], Sequence[Any]]
    most_tokens: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        _ = self.tokens

    @property
    def tokens(self) -> Port:
        """The port that takes the token indices.

        Raises:
            TargetError: There is none, or no telling which.
        """
        rows = [port for port in self.ports if len(port.shape) == 2 and port.dtype in _INTEGERS and not _accompanies(port)]
        named = [port for port in rows if port.name == "input_ids"] or rows
        if len(named) != 1:
            names = ", ".join(port.name for port in self.ports)
            raise TargetError(
                f"the model does not read one row of token indices; it reads {names}", hint="evaluate a causal language model"
            )
        return named[0]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        rows, length = ids.shape
        whole_rows, whole_length = self.tokens.shape
        if whole_rows is not None and rows > whole_rows:
            return torch.cat([self(part) for part in ids.split(whole_rows)])
        if whole_length is not None and length > whole_length:
            raise DataError(f"the model reads {whole_length} tokens, not {length}", hint=f"ask for windows of {whole_length} tokens")
        padded = ids.new_zeros(whole_rows or rows, whole_length or length)
        padded[:rows, :length] = ids
        outputs = self.feed({port.name: self._value(port, padded) for port in self.ports})
        logits = next((out for out in outputs if isinstance(out, torch.Tensor) and out.ndim == _LOGITS_AXES), None)
        if logits is None or logits.shape[:2] != padded.shape:
            raise TargetError(
                "the model gives no logits for each token", hint="evaluate a causal language model, with its logits as output"
            )
        return logits[:rows, :length].float()

    def reach(self, row: torch.Tensor) -> int:
        """How many of a row's tokens, from its beginning, the model takes in one call.

        A table of positions ends somewhere, and no interface says where; the model is asked, so that one
        which computes its positions is not refused for what its configuration says of its training.

        Args:
            row: Token indices, int64 ``(tokens,)``.

        Raises:
            DataError: The model fails on a token, wherever it stands.
        """
        bounds = (len(row), self.tokens.shape[1], self.most_tokens)
        most = min(bound for bound in bounds if bound is not None)
        if self._failure(row[:most]) is None:
            return most
        takes, fails = 0, most
        while fails - takes > 1:
            middle = (takes + fails) // 2
            takes, fails = (middle, fails) if self._failure(row[:middle]) is None else (takes, middle)
        error = self._failure(row[takes:fails])
        if error is not None:
            raise DataError(
                f"the model fails on token {int(row[takes])}: {first_line(error)}",
                hint="evaluate with the tokenizer that the model was trained with (--tokenizer)",
            ) from error
        return takes

    def _failure(self, row: torch.Tensor) -> Exception | None:
        """What the model raises on a row; lack of memory is not the row's fault."""
        try:
            self(row[None])
        except (IrpruneError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch and onnxruntime share no narrower base
            return error
        return None

    def _value(self, port: Port, ids: torch.Tensor) -> torch.Tensor:
        if port is self.tokens or port.name == self.tokens.name:
            return ids.to(port.dtype)
        if "mask" in port.name and len(port.shape) == 2:
            return torch.ones_like(ids, dtype=port.dtype)
        if "position" in port.name and len(port.shape) <= 2:
            return torch.arange(ids.shape[1]).expand(port.shape[0] or len(ids), -1).to(port.dtype)
        if "type" in port.name and len(port.shape) == 2:
            return torch.zeros_like(ids, dtype=port.dtype)
        raise TargetError(f"the model also reads '{port.name}', which a text does not give", hint="evaluate a causal language model")

    # -- where models come from -------------------------------------------------------------------

    @classmethod
    def of(cls, program: Program) -> Predictor:
        """A program in torch; one whose weights lie in files reads each when it is needed."""
        from irprune.backend.archive import to_exported

        if program.source is None:
            return cls.exported(to_exported(program))
        names = list(program.interface.inputs)

        def call(given: list[Any]) -> Any:
            return Runner(program).run(*given, enable_io_processing=False)

        return cls._torch(program.by_name, names, pytree.tree_leaves(program.interface.example), call)

    @classmethod
    def archive(cls, path: Path) -> Predictor:
        """``model.pt2`` in torch. Raises DataError where it is not such a file, or holds pickled objects."""
        from irprune.backend.archive import load_pt2

        return cls.exported(load_pt2(path))

    @classmethod
    def exported(cls, program: ExportedProgram) -> Predictor:
        """An exported program in torch, on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        looked_up = None
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            looked_up = _look_ups(program)
            program = move_to_device_pass(program, device)
        nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        names = [str(name) for name in program.graph_signature.user_inputs]
        module, spec = program.module(), program.call_spec.in_spec

        def call(given: list[Any]) -> Any:
            if looked_up is not None:
                looked_up(*given)
            args, kwargs = pytree.tree_unflatten([leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in given], spec)
            return module(*args, **kwargs)

        made = cls._torch(nodes, names, pytree.tree_leaves(program.example_inputs), call)
        size = nodes[made.tokens.name].meta["val"].shape[1]
        most = None
        if isinstance(size, torch.SymInt):
            limits = program.range_constraints.get(size.node.expr)
            most = int(limits.upper) if limits is not None and limits.upper.is_Integer and limits.upper < 2**31 else None
        return dataclasses.replace(made, most_tokens=most, device=device)

    @classmethod
    def _torch(
        cls, nodes: Mapping[str, fx.Node], names: Sequence[str], leaves: Sequence[Any], call: Callable[[list[Any]], Any]
    ) -> Predictor:
        """A function of flat inputs, whose names and example values are given."""
        values = {name: nodes[name].meta["val"] for name in names if name in nodes}
        ports = tuple(
            Port(name, value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape))
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        )

        def feed(tensors: Mapping[str, torch.Tensor]) -> list[Any]:
            given = [tensors.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            with torch.inference_mode():
                return [leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(call(given))]

        return cls(ports, feed)

    @classmethod
    def onnx(cls, path: Path, *, threads: int = 0) -> Predictor:
        """An ONNX file in onnxruntime, on a GPU where onnxruntime offers it.

        A file with a key-value cache gets an empty one: every token is new.

        Raises:
            DataError: The file is not there.
            ExportError: onnxruntime cannot load it.
        """
        from irprune.backend.generate import empty_cache
        from irprune.backend.runtime import opened

        if not path.is_file():
            raise DataError("there is no such ONNX file", where=str(path), hint="run the target again with the pass export")
        session, device = opened(path, threads=threads)
        inputs = session.get_inputs()
        shapes = {value.name: value.shape for value in inputs}
        cache = empty_cache(inputs)
        ports = tuple(
            Port(value.name, _DTYPES.get(value.type, torch.float32), tuple(size if isinstance(size, int) else None for size in value.shape))
            for value in inputs
            if value.name not in cache
        )
        # The extended cache stands behind what the model gives.
        results = [value.name for value in session.get_outputs()]
        results = results[: len(results) - len(cache)]

        def feed(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            values = {name: tensor.numpy() for name, tensor in tensors.items()}
            if cache:
                known = (zip(shapes[name], tensor.shape, strict=True) for name, tensor in tensors.items())
                values |= empty_cache(inputs, {label: size for pairs in known for label, size in pairs if isinstance(label, str)})
            return [torch.from_numpy(out) for out in session.run(results, values)]

        return cls(ports, feed, device=device)


_DTYPES = {"tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool}


def _accompanies(port: Port) -> bool:
    """Whether an integer input says something about the tokens instead of being them."""
    return any(word in port.name for word in ("mask", "position", "type"))


def _look_ups(program: ExportedProgram) -> fx.GraphModule:
    """What a program looks up in tables, on the processor: flat inputs to rows.

    An index beyond a table is an error there. On a GPU it ends all that the process may do with the GPU.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    computed = (torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.matmul.default)
    costly: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if node.target in computed or any(operand in costly for operand in node.all_input_nodes):
            costly.add(node)
        elif node.target is torch.ops.aten.embedding.default:
            found.append(node)
    graph.output(tuple(found))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return graph_module(module, graph)
