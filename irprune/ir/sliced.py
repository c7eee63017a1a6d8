"""What is left of weights that stay in their files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from irprune.ir.program import Source, digest_tensors


@dataclass(frozen=True)
class Sliced:
    """The kept part of tensors of another source.

    Attributes:
        of: The source.
        kept: Name to one array of kept positions per axis, ``None`` where all stay.
        held: Tensors that the other source does not have.
    """

    of: Source
    kept: Mapping[str, tuple[npt.NDArray[np.int64] | None, ...]]
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of the kept part of a tensor; no more rows of the whole are read than lie between them."""
        if name in self.held:
            return self.held[name] if start == 0 and stop is None else self.held[name][start:stop]
        rows, *others = self.kept.get(name, (None,))
        if rows is None:
            tensor = self.of.read(name, start, stop)
        else:
            wanted = rows[start:stop]
            first, last = (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)
            tensor = self.of.read(name, first, last)
            if len(wanted) != last - first:
                tensor = _taken(tensor, 0, wanted - first)
        for axis, positions in enumerate(others, 1):
            if positions is not None:
                tensor = _taken(tensor, axis, positions)
        return tensor

    def has(self, name: str) -> bool:
        return name in self.held or self.of.has(name)

    def identity(self) -> str:
        digest = hashlib.sha256(self.of.identity().encode())
        for name, kept in sorted(self.kept.items()):
            digest.update(name.encode() + b"".join(b"-" if one is None else one.tobytes() for one in kept))
        digest_tensors(digest, sorted(self.held.items()))
        return digest.hexdigest()


def _taken(tensor: torch.Tensor, axis: int, positions: npt.NDArray[np.int64]) -> torch.Tensor:
    """``index_select`` on the CPU by numpy, which moves numbers of two bytes five times as fast."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.itemsize)
    if words is None or tensor.device.type != "cpu" or tensor.dtype == torch.bool:
        return tensor.index_select(axis, torch.from_numpy(positions))
    found = np.take(tensor.detach().view(words).numpy(), positions, axis)
    return torch.from_numpy(found).view(tensor.dtype)
