"""The state of a training in one safetensors file, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from irprune.errors import DataError
from irprune.ir.program import digest_tensors
from irprune.pipeline.files import atomic

_METADATA = "irprune.recover"


@dataclass
class Log:
    """What happened so far.

    Attributes:
        step: Steps done.
        losses: Objective of each step, over the batches of that step.
        parts: Its parts by name, without their weights.
        held_out: ``(step, objective)`` on the held-out batches.
        best_step: Step of the best of these.
        samples: Samples seen.
        tokens: Positions seen that count in the loss; 0 where the task does not tell them apart.
        seconds: Time spent.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> float | None:
        return min((loss for _, loss in self.held_out), default=None)


def save(
    path: Path,
    key: str,
    log: Log,
    trained: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state; the file appears when it is whole.

    Args:
        path: The file.
        key: What the state belongs to, from :func:`key_of`.
        log: What happened.
        trained: The trained tensors by name, in the optimiser's order.
        best: The same as they were at the best step.
        optimiser: AdamW.
    """
    tensors = {f"now.{name}": tensor.detach() for name, tensor in trained.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, tensor in trained.items():
        tensors |= {f"adam.{part}.{name}": value for part, value in optimiser.state[tensor].items()}
    plain = {name: tensor.contiguous().cpu().clone() for name, tensor in tensors.items()}
    with atomic(path) as part:
        part.write_bytes(safetensors.torch.save(plain, metadata={_METADATA: json.dumps({"key": key, **asdict(log)})}))


def load(
    path: Path, key: str, trained: Mapping[str, torch.Tensor], best: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer
) -> Log | None:
    """Put a saved state in place.

    Returns:
        What happened before; ``None`` where there is no state.

    Raises:
        DataError: The file is damaged, or belongs to another training.
    """
    if not path.is_file():
        return None
    hint = "remove the file to start anew, or name another one in `state`"
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"the state of a training cannot be read: {error}", where=str(path), hint=hint) from error
    if told.pop("key", None) != key:
        raise DataError("the state belongs to a training with other options, data or weights", where=str(path), hint=hint)
    log = Log(**told)
    log.held_out = [(int(step), float(loss)) for step, loss in log.held_out]
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(tensors[f"now.{name}"])
            best[name] = tensors[f"best.{name}"].to(tensor)
            parts = {part: tensors[f"adam.{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq") if f"adam.{part}.{name}" in tensors}
            if parts:
                optimiser.state[tensor] = {part: value if part == "step" else value.to(tensor) for part, value in parts.items()}
    return log


def key_of(options: Mapping[str, Any], batches: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """A fingerprint of all that decides a training: options, data, weights."""
    from torch.utils import _pytree as pytree

    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    leaves = [leaf for batch in batches for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)]
    digest_tensors(digest, (("", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)))
    digest_tensors(digest, sorted(tensors.items()))
    return digest.hexdigest()
