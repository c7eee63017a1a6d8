"""A Hugging Face checkpoint of a program whose weights lie in files: nothing is in memory as a whole.

The class is built without weights, its computation is traced and run on weights that are read when they
are needed, and its outputs are compared with the program's, as for a model in memory; then the shards
are written block by block, and what was written is run and compared again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from irprune.backend import hf_resize, stream
from irprune.backend.hf_export import Work, caches_as
from irprune.backend.proof import Run, flat_inputs, wide_inputs
from irprune.backend.source import Stored, stored
from irprune.backend.stream import Entry
from irprune.ir.program import Program, digest_tensors


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built have their parameters on the meta device, and their buffers in memory with their values."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with no_init_weights():
        nn.Module.register_parameter = registered  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def buffers_on_meta(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """A model's buffers are on the meta device, as its parameters are. Gives them by name, and puts them back."""
    held = dict(model.named_buffers(remove_duplicate=False))
    places = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None]
    moved = {id(buffer): buffer.to("meta") for _, _, buffer in places}
    for module, name, buffer in places:
        module._buffers[name] = moved[id(buffer)]
    try:
        yield held
    finally:
        for module, name, buffer in places:
            module._buffers[name] = buffer


def of_model(model: Any, folder: Path, program: Program | None = None) -> Stored:
    """Where the tensors of a model without weights lie in a checkpoint directory.

    Args:
        model: A model of transformers, its parameters on the meta device and its buffers in memory.
        folder: The directory.
        program: What was traced from it: its tensors must be there, those that only the model has may be.

    Raises:
        TargetError: A tensor is not there, or in another form.
    """
    owners = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    names: dict[int, list[str]] = {}
    for name, tensor in owners.items():
        names.setdefault(id(tensor), []).append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted, shapes = {}, {}
    for name, tensor in owners.items():
        own = sorted(names[id(tensor)], key=lambda one: one != name)
        # A checkpoint of the bare model lacks the prefix of a model with a head, and the other way round.
        bare = [one.removeprefix(prefix) for one in own if one.startswith(prefix)]
        wanted[name] = [*own, *bare, *(prefix + one for one in own)]
        shapes[name] = tuple(tensor.shape)
    needed = set(model.state_dict()) if program is None else {name for name, tensor in program.tensors.items() if tensor.is_meta}
    return stored(folder, wanted, shapes, dict(model.named_buffers(remove_duplicate=False)), needed)


class Streamed(Work):
    """A program whose weights lie in files, seen from the class that it came from."""

    def _placed(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return parameters_on_meta() if device == "cpu" else super()._placed(device)

    def _named(self) -> dict[str, torch.Tensor]:
        buffers = dict(self.source.model.named_buffers())
        return {name: self.rows(name) if self._moved.get(name) in buffers else tensor for name, tensor in super()._named().items()}

    def _used_name(self, name: str) -> str:
        """The program's name of a tensor of the smaller model."""
        was = self._moved.get(name, name)
        return self.program.aliases.get(was, was)

    def has(self, name: str) -> bool:
        """Whether a tensor of the smaller model comes from the program, or as it is from the original checkpoint."""
        assert self.program.source is not None
        used = self._used_name(name)
        return used in self.program.tensors or (name in self._moved and self.program.source.has(used))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of such a tensor."""
        assert self.program.source is not None
        used = self._used_name(name)
        return self.program.value(used, start, stop) if used in self.program.tensors else self.program.source.read(used, start, stop)

    def filled(self, model: Any, own: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The model with its buffers; its parameters have shapes, and stay in their files."""
        for name, value in (own or {}).items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = value.clone()
        model.tie_weights()
        return model

    def computed(self, program: Program) -> Any:
        """In float32 where the weights have half precision: the comparison sees more, and a processor is faster at it."""
        kwargs = self._kwargs()
        named = {name: kwargs[name] for name in program.interface.example[1]}
        flat, wide = wide_inputs(program, flat_inputs(program, self._args(), named))
        with torch.no_grad():
            found = Run(program, wide).run(*flat, enable_io_processing=False)
        return program.module.graph.process_outputs(found)

    def outputs(self, model: Any) -> dict[str, Any]:
        """What a model gives on the example inputs, its weights read from the program, or from a source beside it."""
        model, source = model if isinstance(model, tuple) else (model, None)
        for name, tensor in model.state_dict().items():
            if name in self._tensors and self._tensors[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)} and is to have {list(self._tensors[name].shape)}")
        assert self.source.retrace is not None
        caches = copy.deepcopy(model.config)
        traced: Program = self.source.retrace(model)
        caches_as(model.config, caches)
        held = dict(model.named_buffers(remove_duplicate=False))
        traced = dataclasses.replace(traced, source=source or _Own(self, held))
        found = self.computed(traced)
        return dict(zip(traced.interface.outputs, pytree.tree_leaves(found), strict=True))

    def again(self, model: Any, folder: Path) -> Any:
        hf_resize.check_files(folder, contents=False)
        return model, of_model(model, folder)

    def write(self, model: Any, folder: Path, max_shard_size: str, record: Path | None) -> dict[str, str]:
        entries, seen = [], set[int]()
        owners = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
        original = self.source.model.state_dict()
        for name, tensor in model.state_dict().items():
            if id(owners[name]) in seen:
                continue
            seen.add(id(owners[name]))
            was = self._moved.get(name, name)
            traced = self._used_name(name) in self.program.tensors
            if self.has(name) and (traced or original[was].shape == tensor.shape):
                read = functools.partial(self.rows, name)
            elif tensor.is_meta:
                read = functools.partial(_rows, self.initial(model, name))
            else:
                read = functools.partial(_rows, tensor)
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), read))
        config = copy.deepcopy(model.config)
        config.architectures = [self.name]
        config.save_pretrained(str(folder))
        digests = stream.write(
            folder, entries, most=_bytes(max_shard_size), fingerprint=self._identity(entries, max_shard_size), record=record
        )
        assert self.program.source is not None
        self.program.source.identity()  # refuses files that changed in the meantime
        return digests

    def _identity(self, entries: Sequence[Entry], max_shard_size: str) -> str:
        """A digest of all that the shards are made of: equal ones give equal shards."""
        assert self.program.source is not None
        digest = hashlib.sha256(f"{self.program.source.identity()} {max_shard_size}".encode())
        for entry in entries:
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
        held = [(name, tensor) for name, tensor in sorted(self.program.tensors.items()) if not tensor.is_meta]  # refitted, say
        digest_tensors(digest, held)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Own:
    """The tensors of a smaller model, before they are written."""

    work: Streamed
    held: Mapping[str, torch.Tensor]

    def has(self, name: str) -> bool:
        return name in self.held or self.work.has(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return _rows(self.held[name], start, stop) if name in self.held else self.work.rows(name, start, stop)

    def identity(self) -> str:
        assert self.work.program.source is not None
        digest = hashlib.sha256(self.work.program.source.identity().encode())
        digest_tensors(digest, sorted(self.held.items()))
        return digest.hexdigest()


def _rows(tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    return tensor if start == 0 and stop is None else tensor[start:stop]


def _bytes(size: str) -> int:
    """A size such as ``5GB`` in bytes, as transformers reads it."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(size[:-2]) * units[size[-2:]])
