"""PEFT's files: names of modules, a configuration in JSON, tensors in safetensors.

The names of A and B in a program are PEFT's own, so the mapping is a prefix. Read and written without
the ``peft`` package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from irprune.errors import DataError, ExportError
from irprune.ir.program import Program
from irprune.pipeline.files import atomic, write_text
from irprune_passes.lora.adapters import Adapter, Site, home, scaling, sites

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def _key(name: str) -> str:
    """The name that PEFT's file gives a tensor of a program: embeddings' factors have no ``.weight`` there."""
    module, _, leaf = name.rpartition(".")
    return _PREFIX + (module if module.rpartition(".")[2].startswith("lora_embedding_") and leaf == "weight" else name)


# -- writing --------------------------------------------------------------------------------------


def write(folder: Path, program: Program, found: Sequence[Adapter], target: str) -> None:
    """Write the two files.

    Raises:
        ExportError: PEFT has no form for an adapter.
        OutputError: A file cannot be written.
    """
    for adapter in found:
        _check(program, adapter)
        if program.tensors[adapter.a].is_meta:
            raise ExportError(f"{adapter.a} has no data (meta device)", where="pass save_lora", hint="load the model with its weights")
    modules = {adapter.site.weight.removesuffix(".weight"): adapter for adapter in found}
    first = found[0]
    alphas = {name: adapter.scale * adapter.rank for name, adapter in modules.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": target.removeprefix("hf:"),
        "r": first.rank,
        "lora_alpha": _number(first.scale * first.rank),
        "lora_dropout": max(adapter.dropout for adapter in found),
        "target_modules": list(modules),
        "rank_pattern": {f"^{name}": each.rank for name, each in modules.items() if each.rank != first.rank},
        "alpha_pattern": {f"^{name}": _number(alpha) for name, alpha in alphas.items() if alpha != first.scale * first.rank},
        "fan_in_fan_out": first.site.transposed,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {_key(name): program.tensors[name].detach().contiguous().cpu() for each in found for name in (each.a, each.b)}
    with atomic(folder / TENSORS) as part:
        part.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _number(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _check(program: Program, adapter: Adapter) -> None:
    """PEFT's convolutions have no groups that can be merged, and do not dilate A."""
    site = adapter.site
    problem = None
    if not site.weight.endswith(".weight"):
        problem = "it is not the weight of a module"
    elif site.kind == "conv":
        spread = {tuple(node.args[5]) for name in site.bases if len((node := program.by_name[name]).args) > 5}  # type: ignore[arg-type]
        if site.groups != 1 or any(set(each) != {1} for each in spread):
            problem = "it belongs to a grouped or dilated convolution"
    if problem is not None:
        raise ExportError(
            f"PEFT has no form for the adapter of {site.weight}: {problem}",
            where="pass save_lora",
            hint="leave it out of `targets`",
        )


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An adapter from a file, with the weight that it is for."""

    site: Site
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float


# What a configuration of plain LoRA says; whatever else it says is a variant that computes something else.
_PLAIN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "bias"),
}
# Starts that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the start out of them.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read(folder: Path, program: Program) -> Iterator[Loaded]:
    """The adapters of a directory, for the weights of a program.

    Raises:
        DataError: The files are not there, hold something else than plain LoRA, or do not fit.
    """
    config, tensors = _config(folder / CONFIG), _tensors(folder / TENSORS)
    known = sites(program)
    left = {key: tensor for key, tensor in tensors.items() if not _copied(program, key, tensor)}
    for site in known.values():
        keys = [_key(name) for name in site.names()]
        if any(key not in left for key in keys):
            continue
        a, b = (left.pop(key) for key in keys)
        weight = program.tensors[site.weight]
        rank = int(b.shape[1]) if b.ndim > 1 else 0
        wanted = site.shapes(weight, rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            found = f"{list(a.shape)} and {list(b.shape)}, the program wants {list(wanted[0])} and {list(wanted[1])}"
            raise DataError(
                f"the adapter of {site.weight} has factors {found}", where=str(folder), hint="load it for the model that it was trained on"
            )
        module = site.weight.rpartition(".")[0]
        alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        scale = scaling(float(alpha), rank, stabilised=bool(config.get("use_rslora")))
        a, b = (factor.to(home(program, weight), weight.dtype) for factor in (a, b))
        yield Loaded(site, a, b, scale, float(config.get("lora_dropout") or 0.0))
    if left or not tensors:
        name = next(iter(left), None)
        found = "the file has no adapter" if name is None else f"the program has no weight that {name} fits"
        raise DataError(found, where=str(folder / TENSORS), hint="load it for the model that it was trained on")


def _copied(program: Program, key: str, tensor: torch.Tensor) -> bool:
    """Whether PEFT has put a weight beside its adapter as the program has it (it does so for embeddings)."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    own = program.aliases.get(name, name)
    if ".base_layer." not in key or own not in program.tensors or not program.has_data:
        return False
    value = program.value(own).detach().cpu()
    return torch.equal(value, tensor.to(value.dtype))


def _config(path: Path) -> dict[str, Any]:
    hint = f"name a directory with {CONFIG} and {TENSORS}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the adapter's configuration cannot be read: {error}", where=str(path), hint=hint) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise DataError("it is not the configuration of a LoRA adapter", where=str(path), hint=hint)
    strange = [key for key, value in config.items() if key not in _PLAIN and value]
    strange += [key for key, plain in (("bias", (None, "none")), ("init_lora_weights", _STARTS)) if config.get(key) not in plain]
    if strange:
        hint = "merge it with PEFT first, or save it with path_initial_model_for_weight_conversion if its start changed the base weights"
        raise DataError(f"the adapter has {strange[0]}={config[strange[0]]!r}, which is not plain LoRA", where=str(path), hint=hint)
    return config


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"the adapter's tensors cannot be read: {error}", where=str(path), hint=f"it holds {TENSORS}") from error


def _patterned(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a key fits a module whose dotted name ends with it, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
