"""A program as a Hugging Face checkpoint directory."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from irprune.backend import hf_config, hf_resize
from irprune.backend.hf_config import Place, Sizes, Unfit
from irprune.backend.hf_resize import KEY, REFERENCE, TOLERANCE, Resizing
from irprune.backend.proof import difference
from irprune.errors import ExportError, IrpruneError, ParityError, wording
from irprune.ir.facts import Note, Pretrained
from irprune.ir.program import Program
from irprune.pipeline.files import PART, checksum, flush, readable, remove, unwritable
from irprune.pipeline.progress import doing
from irprune.quiet import quiet_transformers
from irprune.rules.registry import bind

Layout = Literal["auto", "plain", "resized"]
SAMPLES = 4096


@dataclass(frozen=True)
class HfCheckpoint(Note):
    """A Hugging Face checkpoint that was written.

    Attributes:
        path: The directory.
        layout: ``plain``: ``from_pretrained`` loads it; ``resized``: :func:`irprune.load_pretrained` does.
        model_class: Name of the class.
        changed: Fields of the configuration that changed, to their new value.
        found: How they were found: ``unchanged``, ``table`` or ``tried``; empty where the layout is ``resized``.
        max_abs_err: The largest difference between the outputs of the directory, loaded again, and the program's.
        tolerance: What was allowed.
        size_bytes: Size of the weights.
        notes: What the user may want to know, one sentence each.
    """

    path: Path
    layout: str
    model_class: str
    changed: Mapping[str, Any]
    found: str
    max_abs_err: float
    tolerance: float
    size_bytes: int
    notes: tuple[str, ...] = field(default=())

    def manifest(self) -> dict[str, Any]:
        names = ("layout", "model_class", "found", "max_abs_err", "tolerance", "size_bytes")
        told = {name: getattr(self, name) for name in names}
        return {"huggingface": {"folder": self.path.name, "changed": dict(self.changed), "notes": list(self.notes), **told}}

    def complete(self, manifest: Any) -> None:
        """Write the model card, once all is measured."""
        from irprune.report.card import model_card

        (self.path / "README.md").write_text(model_card(self, manifest), encoding="utf-8")


def export(
    program: Program,
    original: Program,
    source: Pretrained,
    folder: Path,
    *,
    known: Mapping[Place, hf_config.Factors] | None = None,
    layout: Layout = "auto",
    max_shard_size: str = "5GB",
    progress: Path | None = None,
) -> HfCheckpoint:
    """Write a program as a checkpoint directory that answers as the program does.

    The directory is loaded again and its outputs are compared with the program's before it appears
    under its name.

    Args:
        program: What is left.
        original: The program as traced.
        source: The model that it was traced from.
        folder: Where; a directory of that name is replaced.
        known: Factors of the original's axes before and after, where they are known.
        layout: ``plain`` or ``resized``; ``auto`` takes plain where it fits.
        max_shard_size: Size from which on the weights are cut into several files.
        progress: Where shards of a program whose weights lie in files are kept until all is done: a call after one
            that was killed, or failed, goes on with them. ``None``: nothing is kept.

    Raises:
        ExportError: The program is not what its class can be, in the asked layout.
        ParityError: The directory gives other outputs than the program.
        OutputError: The directory cannot be written.
    """
    if not program.has_data:
        raise ExportError("the program has no weights", where=str(folder), hint="leave out meta=true")
    with quiet_transformers(), doing("Hugging Face checkpoint"):
        work = _worker(program)(program, original, source, known or {})
        model, reason = (None, None) if layout == "resized" else work.plain()
        if model is None and layout == "plain":
            hint = "say layout=resized and load it with irprune.load_pretrained, or prune with allocation=uniform"
            raise ExportError(f"{work.name} cannot have these sizes: {reason}", where=str(folder), hint=hint)
        kind = "plain"
        if model is None:
            kind, model = "resized", work.resized(folder)
        with _replacing(folder, progress if program.source is not None else None) as part:
            work.save(model, part, kind, max_shard_size, record=part.with_suffix(".json") if progress is not None else None)
            notes = [*work.initialised(), *source.companions(part)]
            error, tolerance = work.check(work.again(model, part), folder)
        if kind == "resized" and reason is not None:
            notes.append(f"load it with irprune.load_pretrained: {reason}")
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    changed = _changes(source.config, model.config)
    return HfCheckpoint(folder, kind, work.name, changed, work.found, error, tolerance, size, tuple(notes))


def _worker(program: Program) -> type[Work]:
    if program.source is None:
        return Work
    from irprune.backend.hf_stream import Streamed

    return Streamed


class Work:
    """A program seen from the class that it came from."""

    def __init__(self, program: Program, original: Program, source: Pretrained, known: Mapping[Place, hf_config.Factors]) -> None:
        self.program = program
        self.source = source
        self.model_class: Any = type(source.model)
        self.name = self.model_class.__name__
        self.dtype = source.model.dtype
        self.attention = getattr(source.model.config, "_attn_implementation", None)
        self._missing: dict[str, None] = {}
        self._resized: dict[str, None] = {}
        self.found = ""
        self._known = known
        self._original = original
        self.config, self._moved = self._depth()
        self._tensors = self._named()
        whole = source.model.state_dict()
        old = {name: tuple(whole[was].shape) for name, was in self._moved.items() if was in whole}
        new = {name: tuple(tensor.shape) for name, tensor in self._tensors.items() if name in old}
        self.sizes = Sizes.between(old, new, {(name, axis): f for name in new for axis, f in self._factors(name)})
        self._lost()
        outputs = self.computed(program)
        self._want = dict(zip(program.interface.outputs, pytree.tree_leaves(outputs), strict=True))

    def _factors(self, name: str) -> Iterator[tuple[str, hf_config.Factors]]:
        was = self._original.aliases.get(self._moved[name], self._moved[name])
        for (tensor, axis), factors in self._by_tensor.get(was, ()):
            assert tensor == was
            yield axis, factors

    @property
    def _by_tensor(self) -> dict[str, list[tuple[Place, hf_config.Factors]]]:
        if not hasattr(self, "_sorted"):
            self._sorted: dict[str, list[tuple[Place, hf_config.Factors]]] = {}
            for place, factors in self._known.items():
                self._sorted.setdefault(place[0], []).append((place, factors))
        return self._sorted

    def _args(self) -> Any:
        return pytree.tree_map_only(torch.Tensor, torch.clone, self.program.interface.example[0])

    def _kwargs(self) -> dict[str, Any]:
        return pytree.tree_map_only(torch.Tensor, torch.clone, dict(self.program.interface.example[1]))

    # -- depth ------------------------------------------------------------------------------------

    def _depth(self) -> tuple[Any, dict[str, str]]:
        """The configuration with as many layers as are left, and new names of tensors to those they had.

        A layer is gone when the original program used its tensors and this one uses none of them.
        """
        model = self.source.model
        names = list(hf_resize._owners(model))
        before, after = _used(self._original), _used(self.program)
        config, renames = self.source.config, {name: name for name in names}
        for path, module in model.named_modules():
            if not isinstance(module, nn.ModuleList):
                continue
            inside = [[name for name in names if name.startswith(f"{path}.{i}.")] for i in range(len(module))]
            used = [any(name in before for name in one) for one in inside]
            kept = [i for i, one in enumerate(inside) if not used[i] or any(name in after for name in one)]
            if len(kept) == len(module):
                continue
            config = self._shorter(config, path, len(module), kept)
            for name in names:
                if name.startswith(f"{path}."):
                    renames.pop(name, None)
            for new, was in enumerate(kept):
                for name in inside[was]:
                    renames[f"{path}.{new}.{name.removeprefix(f'{path}.{was}.')}"] = name
        return config, renames

    def _shorter(self, config: Any, path: str, length: int, kept: list[int]) -> Any:
        """A configuration whose list of layers at ``path`` is shorter; lists with an entry per layer follow."""
        found = hf_config.fields(config)
        lists = {name: [value[i] for i in kept] for name, value in found.items() if isinstance(value, list) and len(value) == length}
        numbers = [name for name, value in found.items() if value == length and isinstance(value, int) and not isinstance(value, bool)]
        for name in sorted(numbers, key=lambda name: "layer" not in name):
            for more in (lists, {}):
                try:
                    tried = hf_config.with_fields(config, {name: len(kept), **more})
                    built = self.build(tried)
                    if len(built.get_submodule(path)) == len(kept):
                        return tried
                except Exception:  # the library's own refusal, whatever it raises
                    continue
        raise ExportError(
            f"no field of the configuration makes {path} of {self.name} {len(kept)} long instead of {length}",
            hint="write model.pt2 or ONNX instead",
        )

    def _named(self) -> dict[str, torch.Tensor]:
        """The tensors that are left, under every name that the model has for them."""
        out = {}
        for name, was in self._moved.items():
            tensor = self.program.tensors.get(self.program.aliases.get(was, was))
            if tensor is not None:
                out[name] = tensor.detach()
        own = hf_resize._owners(self.source.model)
        for name, tensor in self.program.tensors.items():
            if name not in own and self.program.is_parameter(name):
                out[name] = tensor.detach()
        return out

    def _lost(self) -> None:
        """A parameter of a layer that is still there and lost its part."""
        gone = [name for name, was in self._moved.items() if was in _used(self._original) and name not in self._tensors]
        state = self.source.model.state_dict()
        gone = [name for name in gone if self._moved[name] in state]
        if gone:
            hint = "remove whole layers, or write model.pt2 or ONNX instead"
            raise ExportError(f"{self.name} cannot be without {gone[0]}, which the program no longer uses", hint=hint)

    # -- layouts ----------------------------------------------------------------------------------

    def build(self, config: Any, device: str = "meta") -> Any:
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(config)
        kind: Any = hf_resize.resized(self.model_class)
        with no_init_weights(), self._placed(device):
            model = kind._from_config(config, dtype=self.dtype, attn_implementation=self.attention)
        model.__class__ = self.model_class
        experts = getattr(self.source.model.config, "_experts_implementation", None)
        if experts is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(experts)
        return model.eval()

    def _placed(self, device: str) -> AbstractContextManager[Any]:
        return torch.device(device)

    def plain(self) -> tuple[Any | None, str | None]:
        """The class of a configuration that has the sizes, or why there is none."""
        added = [name for name in self._tensors if name not in self._moved]
        if added:
            return None, f"{added[0]} is a parameter that {self.name} does not have"
        if getattr(self.config, KEY, None) is not None:
            return None, "its layers already had sizes of their own"
        made: dict[str, Any] = {}

        def agrees(config: Any) -> str | None:
            made["model"] = model = self.filled(self.build(config, "cpu"))
            return self.differs(model)

        try:
            _, self.found = hf_config.configure(self.config, self.sizes, self.build, agrees)
        except Unfit as reason:
            return None, str(reason)
        return made["model"], None

    def resized(self, folder: Path) -> Any:
        """The class at sizes of its own."""
        self.found = ""
        base = self.source.model
        before = Resizing.of(self.config) or Resizing()
        persistent = base.state_dict()
        buffers = [name for name, was in self._moved.items() if was in dict(base.named_buffers()) and was not in persistent]
        changed = {name: tuple(self._tensors[name].shape) for name in self.sizes.changed}
        own = {}
        for name in buffers:
            was = base.get_buffer(self._moved[name])
            value = self._tensors.get(name)
            if value is not None and value.shape != was.shape:
                own[name] = value
        own |= self._twins(own, buffers)
        changed |= {name: tuple(value.shape) for name, value in own.items()}
        added = [name for name in self._tensors if name not in self._moved]
        changed |= {name: tuple(self._tensors[name].shape) for name in added}
        shell = self.build(self.config)
        worst: str | None = None
        for attributes in hf_resize.choices(shell, self.sizes, self._groups(shell)):
            sizes = Resizing(
                shapes={**before.shapes, **changed},
                attributes=_joined(before.attributes, attributes),
                buffers=sorted({*before.buffers, *own}),
                added=sorted({*before.added, *added}),
            )
            config = copy.deepcopy(self.config)
            setattr(config, KEY, json.loads(sizes.model_dump_json()))
            model = self.filled(self.build(config, "cpu"), own)
            worst = self.differs(model)
            if worst is None:
                return model
        raise ExportError(
            f"{self.name} does not compute what the program computes, whatever its sizes: {worst}",
            where=str(folder),
            hint="write model.pt2 or ONNX instead",
        )

    def _groups(self, shell: nn.Module) -> dict[str, int]:
        """By module the groups that its convolution has in the program."""
        counts: dict[str, int] = {}
        for node in self.program.nodes:
            bound = bind(node.target, node.args, dict(node.kwargs)) if isinstance(node.target, OpOverload) else {}
            weight, groups = bound.get("weight"), bound.get("groups")
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and isinstance(groups, int):
                counts[str(weight.target)] = groups
        out = {}
        for name in self._tensors:
            was = self._moved.get(name, name)
            path, _, leaf = name.rpartition(".")
            used = self.program.aliases.get(was, was)
            if leaf == "weight" and used in counts and hasattr(shell.get_submodule(path), "groups"):
                out[path] = counts[used]
        return out

    def _twins(self, own: Mapping[str, torch.Tensor], buffers: list[str]) -> dict[str, torch.Tensor]:
        """Buffers that are copies of one that changed (``original_inv_freq`` of ``inv_freq``)."""
        base, out = self.source.model, {}
        for name, value in own.items():
            was = base.get_buffer(self._moved[name])
            for other in buffers:
                if other not in own and other.rpartition(".")[0] == name.rpartition(".")[0]:
                    twin = base.get_buffer(self._moved[other])
                    if twin.shape == was.shape and torch.equal(twin, was):
                        out[other] = value.clone()
        return out

    def filled(self, model: Any, own: Mapping[str, torch.Tensor] | None = None) -> Any:
        """The model with the program's weights, and the original's where the program has none."""
        have = model.state_dict()
        original = self.source.model.state_dict()
        values: dict[str, torch.Tensor] = {}
        for name, tensor in have.items():
            was = self._moved.get(name, name)
            value = self._tensors.get(name, original.get(was))
            value = (own or {}).get(name, value)
            if value is not None and value.shape == tensor.shape:
                values[name] = value.detach()
            else:
                values[name] = self.initial(model, name)
        hf_resize.assign(model, values)
        model.tie_weights()
        return model

    def initial(self, model: Any, name: str) -> torch.Tensor:
        """A tensor that nothing tells the values of, as the class initialises it; :meth:`initialised` says so.

        Where an untraced tensor changes its size, what of it should stay is not known: no operation of the program reads it.
        """
        path, _, leaf = name.rpartition(".")
        owner = copy.copy(model.get_submodule(path))
        owner._parameters, owner._buffers = dict(owner._parameters), dict(owner._buffers)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for own in (owner._parameters, owner._buffers):
                for key, tensor in own.items():
                    if tensor is not None:
                        fresh = torch.zeros(tensor.shape, dtype=tensor.dtype)
                        own[key] = nn.Parameter(fresh, tensor.requires_grad) if own is owner._parameters else fresh  # type: ignore[assignment]
            model._init_weights(owner)
        old, new = self.source.model.state_dict().get(self._moved.get(name, name)), model.state_dict()[name]
        told = self._resized if old is not None and old.shape != new.shape else self._missing
        told[name] = None
        return getattr(owner, leaf).detach()

    def initialised(self) -> list[str]:
        """Notes on tensors that are as the class initialises them."""
        notes = []
        if self._missing:
            notes.append(f"neither traced nor in the checkpoint, so newly initialised: {', '.join(self._missing)}")
        if self._resized:
            outputs = ", ".join(self.program.interface.outputs)
            notes.append(
                f"not needed for {outputs}, so not traced, and of another size now, so newly initialised: {', '.join(self._resized)}; "
                "to keep them, name the outputs that need them with --set outputs=..."
            )
        return notes

    # -- numbers ----------------------------------------------------------------------------------

    def errors(self, model: Any) -> Iterator[tuple[str, float, float, float]]:
        """Name, absolute and relative error and tolerance of each output."""
        outputs = self.outputs(model)
        for name, want in self._want.items():
            if not isinstance(want, torch.Tensor):
                continue
            have = hf_resize.pick(outputs, name)
            if not isinstance(have, torch.Tensor) or have.shape != want.shape:
                yield name, float("inf"), float("inf"), 0.0
            else:
                apart = difference(have, want)
                yield name, apart.max_abs, apart.relative, TOLERANCE.get(want.dtype, 2e-4)

    def computed(self, program: Program) -> Any:
        """What a program gives on the example inputs."""
        return program(*self._args(), **self._kwargs())

    def outputs(self, model: Any) -> Any:
        """What a model gives on the example inputs."""
        with torch.no_grad():
            return model(*self._args(), **self._kwargs())

    def again(self, model: Any, folder: Path) -> Any:
        """The model of a directory."""
        try:
            return hf_resize.load(folder, self.model_class, dtype=self.dtype, attn_implementation=self.attention)
        except IrpruneError:
            raise
        except Exception as error:  # the library's own, whatever it raises
            hint = "write model.pt2 or ONNX instead"
            raise ExportError(
                f"what was written as {self.name} cannot be loaded: {wording(error)}", where=str(folder), hint=hint
            ) from error

    def differs(self, model: Any) -> str | None:
        """Which output is not the program's; ``None`` where all are."""
        try:
            for name, error, relative, tolerance in self.errors(model):
                if not relative <= tolerance:
                    return f"with these sizes output {name} differs from the program's by {error:.3g}, more than rounding explains"
        except Exception as error:  # a model of wrong sizes may raise anything
            return f"with these sizes the model fails: {wording(error)}"
        return None

    def check(self, model: Any, folder: Path) -> tuple[float, float]:
        """The largest absolute error of the directory's outputs, and what is allowed."""
        worst = 0.0
        allowed = min(TOLERANCE.get(want.dtype, 2e-4) for want in self._want.values() if isinstance(want, torch.Tensor))
        for name, error, relative, tolerance in self.errors(model):
            worst = max(worst, error)
            if not relative <= tolerance:
                raise ParityError(f"output {name} of the checkpoint differs from the program's by {error:.3g}", where=str(folder))
        return worst, allowed

    def write(self, model: Any, folder: Path, max_shard_size: str, record: Path | None) -> dict[str, str]:
        """Write weights and configuration, noting in ``record`` what is written. Returns the checksum of each file of weights."""
        model.save_pretrained(str(folder), max_shard_size=max_shard_size)
        return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}

    # -- files ------------------------------------------------------------------------------------

    def save(self, model: Any, folder: Path, layout: str, max_shard_size: str, record: Path | None = None) -> None:
        """Weights, configuration and the reference."""
        caches_as(model.config, self.source.config)
        (folder / REFERENCE).unlink(missing_ok=True)
        weights = self.write(model, folder, max_shard_size, record)
        tensors: dict[str, torch.Tensor] = {}
        names = list(self.program.interface.inputs)
        leaves = pytree.tree_leaves(self.program.interface.example)
        for name, value in zip(names, leaves, strict=True):
            if isinstance(value, torch.Tensor):
                tensors[f"input.{name}"] = value.detach().contiguous().clone()
        for name, want in self._want.items():
            if isinstance(want, torch.Tensor) and want.is_floating_point():
                flat = want.detach().flatten()
                at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).round().long()
                tensors[f"output.{name}"], tensors[f"at.{name}"] = flat[at].clone(), at
        save_file(tensors, folder / REFERENCE, metadata={KEY: json.dumps({"layout": layout, "weights": weights})})


def _used(program: Program) -> set[str]:
    return {*program.tensors, *(name for name, used in program.aliases.items() if used in program.tensors)}


def _joined(
    a: Mapping[str, dict[str, tuple[int, int]]], b: Mapping[str, dict[str, tuple[int, int]]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Two changes of attributes one after the other."""
    out = {path: dict(attributes) for path, attributes in a.items()}
    for path, attributes in b.items():
        mine = out.setdefault(path, {})
        for name, (was, now) in attributes.items():
            mine[name] = (mine.get(name, (was, was))[0], now)
    return out


def _changes(before: Any, after: Any) -> dict[str, Any]:
    """Fields of a configuration that changed."""
    old, new = hf_config.fields(before), hf_config.fields(after)
    technical = ("dtype", "transformers_version", "architectures", "_name_or_path", KEY)
    return {name: value for name, value in new.items() if old.get(name) != value and name.rpartition(".")[2] not in technical}


def caches_as(config: Any, like: Any) -> None:
    """Let a configuration say of key-value caches what another one says."""
    for part, other in ((config, like), (config.get_text_config(), like.get_text_config())):
        if hasattr(other, "use_cache"):
            part.use_cache = other.use_cache


@contextmanager
def _replacing(folder: Path, progress: Path | None = None) -> Iterator[Path]:
    """Fill a directory so that it appears under its name only when whole.

    With ``progress`` it is filled there, and what a failure or a kill leaves stays for the next time.
    """
    part: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if progress is not None:
            part = progress / folder.name
            part.mkdir(parents=True, exist_ok=True)
            for left in part.iterdir():
                if left.is_dir() or left.suffix != ".safetensors":  # whatever a kill left, but whole shards
                    remove(left)
        else:
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PART, dir=folder.parent))
        yield part
        readable(part)
        for file in sorted(part.rglob("*")):
            if file.is_file():
                flush(file)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError as error:
        raise unwritable(folder, error.strerror or str(error)) from error
    except IrpruneError as error:
        if part is not None and error.where is not None and error.where.startswith(str(part)):
            error.where = f"{folder}{error.where.removeprefix(str(part))}"
        raise
    except Exception as error:
        cause = next((sign for sign in ("No space left on device", "File too large", "os error") if sign in str(error)), None)
        if cause is not None:
            raise unwritable(folder, str(error).strip().splitlines()[0]) from error
        raise
    finally:
        if part is not None and progress is None:
            shutil.rmtree(part, ignore_errors=True)
