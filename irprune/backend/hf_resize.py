"""A genuine Hugging Face class whose layers have sizes of their own.

What differs from the class that the configuration describes stands in the configuration itself, under
``irprune``, so it survives ``save_pretrained``: shapes of parameters and buffers, and attributes of
modules that hold a size (``num_key_value_groups``). :func:`resized` makes a class that takes it from there.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from irprune.backend.hf_config import Place, Sizes
from irprune.errors import DataError, ParityError
from irprune.ir.program import set_tensor
from irprune.pipeline.files import checksum
from irprune.pipeline.progress import track

KEY = "irprune"
REFERENCE = "irprune.safetensors"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Resizing(BaseModel):
    """What differs from the class that a configuration describes.

    Attributes:
        format: Version of this layout.
        shapes: Name to shape of each parameter and buffer that has another one.
        attributes: Module to attribute to ``(size in the class, size here)``.
        buffers: Buffers that the class computes and a checkpoint of this model holds.
        added: Parameters that the class leaves out (a bias).
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    attributes: dict[str, dict[str, tuple[int, int]]] = Field(default_factory=dict)
    buffers: list[str] = Field(default_factory=list)
    added: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, config: Any) -> Resizing | None:
        """What a configuration says, if it says anything.

        Raises:
            DataError: It is damaged, or of another version.
        """
        data = getattr(config, KEY, None)
        if data is None:
            return None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(
                f"the sizes in config.json are damaged or of another version: {place}: {first['msg']}",
                where=f"config.json, '{KEY}'",
                hint="take the directory as the run wrote it",
            ) from error

    def apply(self, model: nn.Module) -> None:
        """Give a model these sizes. Parameters that change have no values afterwards.

        Raises:
            DataError: The model is not the one that the sizes are for.
        """
        ties: dict[int, torch.Tensor] = {}
        owners = _owners(model)
        for name, shape in self.shapes.items():
            old = owners.get(name)
            if old is None and name in self.added:
                self._add(model, name, shape)
                continue
            if old is None or len(old.shape) != len(shape):
                raise _other_model(name, "is not there" if old is None else f"has shape {list(old.shape)}", f"shape {list(shape)}")
            if id(old) not in ties:
                ties[id(old)] = torch.empty(shape, dtype=old.dtype, device=old.device)
            made = ties[id(old)]
            if isinstance(old, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = ties[id(old)] = nn.Parameter(made, requires_grad=old.requires_grad)
            _put(model, name, made)
        for path, attributes in self.attributes.items():
            module = _submodule(model, path)
            for name, (was, now) in attributes.items():
                found = getattr(module, name, None)
                if found != was:
                    raise _other_model(f"{path}.{name}", f"is {found}", str(was))
                setattr(module, name, now)
        for path in {name.rpartition(".")[0] for name in self.shapes}:
            follow(model.get_submodule(path))  # last, since the channels of a convolution are read with its groups
        for name in self.buffers:
            path, _, leaf = name.rpartition(".")
            _submodule(model, path)._non_persistent_buffers_set.discard(leaf)

    @staticmethod
    def _add(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        path, _, leaf = name.rpartition(".")
        module = _submodule(model, path)
        near = next(module.parameters(recurse=False), None)
        if near is None or getattr(module, leaf, None) is not None:
            raise _other_model(name, "has no place", f"shape {list(shape)}")
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=near.dtype, device=near.device)))


def _owners(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a tensor as it is: a parameter stays the same object, so that tied names stay tied."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[assignment]


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _other_model(path, "is not there", "the module") from error


def _other_model(name: str, found: str, wanted: str) -> DataError:
    return DataError(
        f"the sizes in config.json are for another model: {name} {found}; they want {wanted}",
        where=f"config.json, '{KEY}'",
        hint="use the version of transformers that the directory's README.md names",
    )


# -- attributes of layers ---------------------------------------------------------------------------

_Attribute = Callable[[Any], Any]
_ROWS: _Attribute = lambda m: m.weight.shape[0]  # noqa: E731
_COLUMNS: _Attribute = lambda m: m.weight.shape[1]  # noqa: E731
# Attributes by name and number of axes of the weight: what torch's layers, and transformers' Conv1D, call their sizes.
_LAYERS: Mapping[str, Mapping[str, _Attribute]] = {
    "Linear": {"out_features": _ROWS, "in_features": _COLUMNS},
    "Embedding": {"num_embeddings": _ROWS, "embedding_dim": _COLUMNS},
    "Conv1D": {"nx": _ROWS, "nf": _COLUMNS},
    "LayerNorm": {"normalized_shape": lambda m: tuple(m.weight.shape)},
    "RMSNorm": {"normalized_shape": lambda m: tuple(m.weight.shape)},
    "GroupNorm": {"num_channels": _ROWS},
    **{f"BatchNorm{n}d": {"num_features": _ROWS} for n in (1, 2, 3)},
    **{f"Conv{n}d": {"out_channels": _ROWS, "in_channels": lambda m: m.weight.shape[1] * m.groups} for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": {"in_channels": _ROWS, "out_channels": lambda m: m.weight.shape[1] * m.groups} for n in (1, 2, 3)},
}


def _layer(module: nn.Module) -> Mapping[str, _Attribute]:
    """The size attributes of a layer's class."""
    return next((_LAYERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _LAYERS), {})


def follow(module: nn.Module) -> None:
    """Let the size attributes of a layer say what its weight says."""
    for name, read in _layer(module).items():
        if getattr(module, "weight", None) is not None and hasattr(module, name):
            setattr(module, name, read(module))


Reading = tuple[str, str, int, int]


def choices(model: nn.Module, sizes: Sizes, groups: Mapping[str, int]) -> Iterator[dict[str, dict[str, tuple[int, int]]]]:
    """Values for the attributes of modules that hold a size, the most plausible first.

    An attribute may stand for any run of factors of the axes below its module whose old product is its value
    in every module of the class. What its name says decides which comes first: the first factors for a
    number of heads, the last ones for a head's size, a whole axis for other sizes. Then come the others, one
    and two attributes at a time.

    Args:
        model: The model at its old sizes.
        sizes: What changed.
        groups: By module the groups that its convolution has now.

    Yields:
        Module to attribute to ``(old, new)``, changes only.
    """
    instances: dict[type, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if any(name.startswith(f"{path}." if path else "") for name in sizes.changed):
            instances.setdefault(type(module), []).append((path, module))
    options: list[tuple[str, list[dict[str, tuple[int, int]]]]] = []
    for modules in instances.values():
        held = set.intersection(*({name for name, value in vars(module).items() if _is_size(value)} for _, module in modules))
        known = {"groups"} if any(path in groups for path, _ in modules) else set()
        for name in sorted(held - set(_layer(modules[0][1])) - known):
            found = list(_values(name, modules, sizes))
            if len(found) > 1:
                options.append((name, found))
    defaults = [found[0] for _, found in options]
    counted: dict[str, Any] = {path: model.get_submodule(path).groups for path in groups}

    def merged(chosen: list[dict[str, tuple[int, int]]]) -> dict[str, dict[str, tuple[int, int]]]:
        out = {path: {"groups": (was, groups[path])} for path, was in counted.items() if was != groups[path]}
        for (name, _), values in zip(options, chosen, strict=True):
            for path, pair in values.items():
                if pair[0] != pair[1]:
                    out.setdefault(path, {})[name] = pair
        return out

    yield merged(defaults)
    deviations = [(i, other) for i, (_, found) in enumerate(options) for other in found[1:]]
    for count in (1, 2):
        for some in itertools.combinations(deviations, count):
            if len({i for i, _ in some}) == count:
                yield merged([dict(some).get(i, default) for i, default in enumerate(defaults)])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _values(name: str, modules: list[tuple[str, nn.Module]], sizes: Sizes) -> Iterator[dict[str, tuple[int, int]]]:
    """What an attribute may become in the modules of one class, the most plausible first; staying as it is among them."""
    counted: Counter[tuple[tuple[str, int], ...]] = Counter()
    fitting: Counter[tuple[tuple[str, int], ...]] = Counter()
    tables = [_readings(path, getattr(module, name), sizes) for path, module in modules]
    for reading in set.intersection(*(set(one) for one in tables)):
        values = tuple((path, one[reading]) for (path, _), one in zip(modules, tables, strict=True))
        counted[values] += 1
        fitting[values] += _suits(name, reading, sizes, modules[0][0])
    same = tuple((path, int(getattr(module, name))) for path, module in modules)
    counted[same] += 0
    ranked = sorted(counted, key=lambda values: (-fitting[values], -counted[values] if fitting[values] else values != same, values))
    for values in ranked:
        yield {path: (int(getattr(module, name)), new) for (path, module), (_, new) in zip(modules, values, strict=True)}


def _readings(path: str, value: int, sizes: Sizes) -> dict[Reading, int]:
    below = f"{path}." if path else ""
    out = {}
    for (tensor, axis), first, last, old, new in _all_readings(sizes, below):
        if old == value:
            out[tensor.removeprefix(below), axis, first, last] = new
    return out


def _all_readings(sizes: Sizes, below: str) -> Iterator[tuple[Place, int, int, int, int]]:
    yield from sizes.readings(name for name in sizes.new if name.startswith(below))


def _suits(name: str, reading: Reading, sizes: Sizes, path: str) -> int:
    """Whether a run of factors is what the name of an attribute promises."""
    tensor, axis, first, last = reading
    length = len(sizes.factors[f"{path}.{tensor}" if path else tensor, axis])
    whole = (first, last) == (0, length)
    if "head" in name and any(word in name for word in ("num", "n_head", "heads")):
        return int(first == 0 and not whole)
    if "head" in name and any(word in name for word in ("dim", "size")) and "all" not in name:
        return int(last == length and not whole)
    if "group" in name:
        return int(first > 0 and last < length)
    return int(whole)


# -- loading ----------------------------------------------------------------------------------------


@functools.cache
def resized(model_class: type) -> type:
    """A class that is built at the sizes that its configuration holds under ``irprune``."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        sizes = Resizing.of(config)
        if sizes is not None:
            sizes.apply(self)

    names = ("__module__", "__qualname__", "__doc__")
    return type(model_class.__name__, (model_class,), {"__init__": __init__, **{name: getattr(model_class, name) for name in names}})


def load(folder: Path, model_class: Any, *, verify: bool = True, **options: Any) -> Any:
    """The genuine class with the weights and sizes of a directory.

    Args:
        folder: A directory that a run or ``save_pretrained`` wrote.
        model_class: The class.
        verify: Compare with the reference outputs of the directory, if it has some.
        options: Those of ``from_pretrained``.

    Raises:
        DataError: A file is cut off, or not the one that belongs to the reference.
        ParityError: The model does not give the reference outputs.
    """
    check_files(folder, contents=verify)
    model = resized(model_class).from_pretrained(str(folder), **options)  # type: ignore[attr-defined]
    model.__class__ = model_class
    model.eval()
    if verify and (folder / REFERENCE).is_file():
        compare(model, folder)
    return model


def check_files(folder: Path, *, contents: bool = True) -> None:
    """The weights are whole, and those that the reference belongs to.

    Raises:
        DataError: A file is cut off, missing or another one.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"the file is cut off or no safetensors file: {error}") from error
    if not (folder / REFERENCE).is_file():
        return
    noted = header(folder)["weights"]
    for name in noted:
        if not (folder / name).is_file():
            raise _damaged(folder / name, "the file is missing")
    for name, digest in track(noted.items(), "check the weights") if contents else ():
        if checksum(folder / name) != digest:
            raise _damaged(folder / name, f"the file's checksum is not the one in {REFERENCE}")


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        problem, where=str(path), hint=f"copy the checkpoint again; if the weights were changed on purpose, remove {REFERENCE}"
    )


def header(folder: Path) -> dict[str, Any]:
    """What the reference file says about itself: the layout, and the checksums of the weights."""
    with safe_open(str(folder / REFERENCE), framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
    try:
        data = json.loads(text or "")
        return {"layout": str(data["layout"]), "weights": dict(data["weights"])}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / REFERENCE, "the file holds no reference") from error


def compare(model: Any, folder: Path) -> float:
    """The largest relative error of a model's outputs against the reference.

    Raises:
        ParityError: It is above what the model's dtype explains.
    """
    with safe_open(str(folder / REFERENCE), framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inputs = {name.removeprefix("input."): value for name, value in held.items() if name.startswith("input.")}
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    inputs = {name: (v.to(dtype) if v.is_floating_point() else v).to(device) for name, v in inputs.items()}
    outputs = run(model, inputs)
    worst = 0.0
    for name, want in held.items():
        if not name.startswith("output."):
            continue
        found = pick(outputs, name.removeprefix("output.")).detach().flatten()[held["at." + name.removeprefix("output.")].to(device)].cpu()
        scale = max(float(want.double().abs().max()), 1e-6)
        error = float((found.double() - want.double()).abs().max()) / scale
        worst = max(worst, error)
        limit = max(TOLERANCE.get(dtype, 2e-4), TOLERANCE.get(want.dtype, 2e-4))
        if not error <= limit:
            raise ParityError(
                f"output {name.removeprefix('output.')} differs from the reference by {error:.2g} of its largest value, "
                f"more than {limit:.2g}",
                where=str(folder / REFERENCE),
                hint="use the version of transformers that the directory's README.md names",
            )
    return worst


def run(model: Any, inputs: Mapping[str, Any]) -> Any:
    """A model's outputs without gradients, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs)
    finally:
        model.train(training)


def pick(outputs: Any, name: str) -> Any:
    """The output of a dotted name (``logits``, ``past_key_values.0``, ``output0``)."""
    value = outputs
    for part in name.split("."):
        if part.startswith("output") and part[6:].isdigit() and not hasattr(value, part):
            part = part[6:]
        if isinstance(value, torch.Tensor):
            return value
        value = value[int(part)] if part.isdigit() else getattr(value, part) if hasattr(value, part) else value[part]
    return value


def assign(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put tensors into a model without a copy; names of one tensor stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            value = made.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=value.is_floating_point()))
            module._parameters[leaf] = value
        else:
            set_tensor(model, name, value)
