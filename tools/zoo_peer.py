"""Torch-Pruning on an entry of the zoo, used as its documentation and examples use it.

What the examples do by hand for one model is done here by structure: the layers that end in the
model's outputs are ignored; attention layers are declared by ``num_heads`` (query heads and key-value
heads, or the fused projection), fused gate and up projections by ``out_channel_groups``; after pruning
the attention modules' own numbers are set anew. The two settings of the examples are tried, whole heads
(those for language models) and head dimensions (the default, those for BERT and ViT), and the better
outcome counts.

The numbers are compared with the original at full size, its removed indices masked and mixing operations
renormalised, which is irprune's own reference, where the removed slices are masks of whole groups.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

QUERY = ("q_proj", "query", "q_lin", "q", "wq", "to_q", "query_proj", "q_linear")
KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v", "wk", "wv", "to_k", "to_v", "key_proj", "value_proj")
KEY_VALUE += ("k_linear", "v_linear")
FUSED = ("qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "to_qkv", "in_proj")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_dim")
WIDTH = ("all_head_size", "inner_dim", "attn_dim", "split_size")
OUTCOMES = ("exact", "runs, numbers not comparable", "export fails", "wrong numbers", "not finite", "wrong shape", "nothing removed")
TOLERANCE = 1e-3


def run(entry: Any, record: dict[str, Any], ratio: float, seconds: int, traced: Callable[[], Any]) -> None:
    """Prune, and file the better outcome of the two settings under ``outcome`` in the record.

    Args:
        entry: Of the zoo.
        record: Gets ``outcome``, ``setting``, ``params`` and ``error``.
        ratio: The part of the channels and heads that goes.
        seconds: Limit of processor time for each setting.
        traced: Gives the entry's typed program, or ``None``; only called where numbers are compared.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for setting in ("heads", "head dimensions"):
        result: dict[str, Any] = {"setting": setting}
        try:
            with _limit(seconds):
                result["outcome"], result["params"], result["error"] = _prune(entry, ratio, setting, traced)
        except TimeoutError:
            result |= {"outcome": "does not end", "error": f"no result within {seconds} s"}
        except Exception as error:
            result |= {"outcome": "exception", "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        outcome = result["outcome"]
        found.append((OUTCOMES.index(outcome) if outcome in OUTCOMES else len(OUTCOMES), result))
        if outcome == "exact":
            break
    record |= min(found, key=lambda item: item[0])[1]
    record["verdict"] = "passed" if record["outcome"] in OUTCOMES[:2] else "failed"


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _prune(entry: Any, ratio: float, setting: str, traced: Callable[[], Any]) -> tuple[str, list[int], str]:
    import torch_pruning as tp  # type: ignore[import-not-found]

    module = entry.build()
    args, kwargs = entry.example_inputs()
    assert not kwargs
    with torch.no_grad():
        expected = _leaves(module(*args))
    original = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    attention = _attention(module)
    groups = {m: 2 for name, m in module.named_modules() if name.endswith("gate_up_proj") and isinstance(m, torch.nn.Linear)}
    whole = setting == "heads"
    pruner = tp.pruner.BasePruner(
        module,
        args,
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=_last_layers(module, args),
        num_heads={layer: heads for layers in attention.values() for layer, heads in layers.items()},
        prune_num_heads=whole,
        prune_head_dims=not whole,
        head_pruning_ratio=ratio if whole else 0.0,
        out_channel_groups=groups,
        customized_pruners=_patch_merging(module, tp),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    _renumber(module, attention, pruner.num_heads, original, whole)
    params = [sum(t.numel() for t in original.values()), sum(p.numel() for p in module.parameters())]
    with torch.no_grad():
        result = _leaves(module(*args))
    if [r.shape for r in result] != [e.shape for e in expected]:
        return "wrong shape", params, f"{[list(r.shape) for r in result]} instead of {[list(e.shape) for e in expected]}"
    if not all(bool(torch.isfinite(r).all()) for r in result if r.is_floating_point()):
        return "not finite", params, ""
    if params[0] == params[1]:
        return "nothing removed", params, ""
    outcome, why = _compared(original, module, result, traced(), args)
    if outcome != "wrong numbers" and (trouble := _export(module, args, traced)):
        return "export fails", params, trouble
    return outcome, params, why


# -- what the documentation sets by hand -----------------------------------------------------------------


def _attribute(module: Any, names: tuple[str, ...]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _attention(module: torch.nn.Module) -> dict[torch.nn.Module, dict[torch.nn.Module, int]]:
    """Attention modules with their projections and the number of heads of each."""
    found: dict[torch.nn.Module, dict[torch.nn.Module, int]] = {}
    for part in module.modules():
        children = {name: child for name, child in part.named_children() if isinstance(child, torch.nn.Linear)}
        heads = _attribute(part, HEADS)
        if heads is None:
            continue
        query = [children[name] for name in QUERY if name in children]
        others = [children[name] for name in KEY_VALUE if name in children]
        fused = [children[name] for name in FUSED if name in children]
        if query and others:
            kv = _attribute(part, KV_HEADS) or heads
            found[part] = {**dict.fromkeys(query, heads), **dict.fromkeys(others, kv)}
        elif fused:
            found[part] = dict.fromkeys(fused, heads)
    return found


def _last_layers(module: torch.nn.Module, args: tuple[Any, ...]) -> list[torch.nn.Module]:
    """The layers whose results reach an output with no other layer in between."""
    made: dict[Any, torch.nn.Module] = {}
    layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding, torch.nn.LSTM, torch.nn.GRU)

    def remember(layer: torch.nn.Module, _: Any, output: Any) -> None:
        for tensor in _leaves(output):
            if tensor.grad_fn is not None:
                made[tensor.grad_fn] = layer

    handles = [part.register_forward_hook(remember) for part in module.modules() if isinstance(part, layers)]
    try:
        pending = [tensor.grad_fn for tensor in _leaves(module(*args)) if tensor.grad_fn is not None]
    finally:
        for handle in handles:
            handle.remove()
    found, seen = [], set()
    while pending:
        step = pending.pop()
        if step in seen:
            continue
        seen.add(step)
        if step in made:
            found.append(made[step])
        else:
            pending += [before for before, _ in step.next_functions if before is not None]
    return list(dict.fromkeys(found))


def _patch_merging(module: torch.nn.Module, tp: Any) -> dict[Any, Any]:
    """The pruner for Swin's patch merging that its example for Swin writes out."""
    kinds = {type(part) for part in module.modules() if type(part).__name__ == "SwinPatchMerging"}

    class Pruner(tp.BasePruningFunc):  # type: ignore[misc, name-defined]
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
            repeated = [i + k * self.get_in_channels(layer) for k in range(4) for i in idxs]
            tp.prune_linear_in_channels(layer.reduction, repeated)
            tp.prune_layernorm_out_channels(layer.norm, repeated)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.reduction.out_features)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.reduction.in_features) // 4

    return {kind: Pruner() for kind in kinds}


def _renumber(
    module: torch.nn.Module, attention: Mapping[Any, Mapping[Any, int]], heads: Mapping[Any, int], original: Any, whole: bool
) -> None:
    """Set what attention modules and the configuration know of their sizes to what is left."""
    names = {id(part): name for name, part in module.named_modules()}
    for part, layers in attention.items():
        first = next(iter(layers))
        fused = next((name for name in FUSED if getattr(part, name, None) is first), None)
        before = original[f"{names[id(first)]}.weight"].shape[0]
        width, old_width = first.out_features // (3 if fused else 1), before // (3 if fused else 1)
        number = int(heads.get(first, layers[first]))
        dim = old_width // layers[first] if whole else width // number
        number = width // dim
        values = {**dict.fromkeys(HEADS, number), **dict.fromkeys(HEAD_DIM, dim), **dict.fromkeys(WIDTH, width)}
        if len(set(layers.values())) > 1:
            kv = next(layer for layer in layers if layers[layer] != layers[first])
            values |= dict.fromkeys(KV_HEADS, kv.out_features // dim)
            values["num_key_value_groups"] = number // max(kv.out_features // dim, 1)
        else:
            values |= dict.fromkeys(KV_HEADS, number)
        for name in ("embed_dim", "hidden_size"):
            if getattr(part, name, None) == old_width:
                values[name] = width
        for name, value in values.items():
            if isinstance(getattr(part, name, None), int) and not isinstance(getattr(part, name), bool):
                with contextlib.suppress(AttributeError):
                    setattr(part, name, value)
    if hasattr(module, "hidden_dim") and hasattr(module, "conv_proj"):  # torchvision's ViT, as in the example
        module.hidden_dim = module.conv_proj.out_channels


# -- numbers ---------------------------------------------------------------------------------------------


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _kept(old: torch.Tensor, new: torch.Tensor) -> list[np.ndarray] | None:
    """Which indices of each axis are left, read off the values; ``None`` where values repeat too often."""
    values, first = np.unique(old.detach().numpy().reshape(-1), return_index=True)
    wanted = new.detach().numpy().reshape(-1)
    place = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    repeated = old.ndim == 1 and len(values) < old.numel()
    if old.ndim != new.ndim or repeated or not np.array_equal(values[place], wanted):
        return None
    found = []
    coordinates = np.unravel_index(first[place], old.shape)
    for axis, size in enumerate(new.shape):
        lanes = np.moveaxis(coordinates[axis].reshape(new.shape), axis, 0).reshape(size, -1)
        found.append(np.array([np.bincount(lane).argmax() for lane in lanes]))
    return found if np.array_equal(old.detach().numpy()[np.ix_(*found)], new.detach().numpy()) else None


def _compared(original: dict[str, Any], module: torch.nn.Module, result: list[Any], program: Any, args: Any) -> tuple[str, str]:
    """``exact``, ``wrong numbers``, or not comparable and why."""
    from irprune.backend.proof import Masked, difference
    from irprune.errors import IrpruneError
    from irprune.ir.dims import index_maps, mask_of, resolve, term_size, variables

    apart = OUTCOMES[1]
    if program is None:
        return apart, "the original cannot be traced"
    now = dict(module.named_parameters())
    keep: dict[Any, Any] = {}
    axes = []
    for name, node in program.holders.items():
        if name not in original or name not in now:
            continue
        left = _kept(original[name], now[name])
        for axis, term in enumerate(program.typing.of(node.name)):
            term = resolve(term)
            size = term_size(term)
            if left is None:
                axes.append((name, term, now[name].shape[axis] if axis < now[name].ndim else -1, None))
                continue
            mask = np.zeros(size, dtype=bool)
            mask[left[axis]] = True
            axes.append((name, term, len(left[axis]), mask))
            for var in set(variables(term)):
                held = keep.setdefault(var, np.zeros(int(var.size), dtype=bool))
                for lane in index_maps(term, var):
                    held[lane[mask & (lane >= 0)]] = True
    for name, term, size, mask in axes:
        told = mask_of(term, keep)
        if int(told.sum()) != size or (mask is not None and not np.array_equal(told, mask)):
            return apart, f"what is left of {name} is no mask of whole groups"
    try:
        with torch.no_grad():
            reference = _leaves(Masked(program, keep).run(*_leaves(args), enable_io_processing=False))
    except IrpruneError as error:
        return apart, str(error).splitlines()[0][:200]
    gap = max(difference(value, other).relative for value, other in zip(result, reference, strict=True))
    return ("exact", "") if gap <= TOLERANCE else ("wrong numbers", f"off by {gap:.2g} of the largest value")


def _export(module: torch.nn.Module, args: Any, traced: Callable[[], Any]) -> str:
    """Why the pruned model does not export where the original does; empty if it does, or neither does."""
    import irprune.api as api
    from irprune.backend import onnx

    with tempfile.TemporaryDirectory() as folder:
        try:
            onnx.export(api.trace(module, args), Path(folder) / "pruned.onnx")
        except Exception as error:
            try:
                onnx.export(traced(), Path(folder) / "original.onnx")
            except Exception:
                return ""
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""
