"""The mode in which a program's values are described: shapes and types, no data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from irprune.ir.program import Program


def mode_of(nodes: Iterable[fx.Node]) -> FakeTensorMode | None:
    """The mode of the nodes' values; ``None`` where they are described on the meta device."""
    values = (value for node in nodes for value in pytree.tree_leaves(node.meta.get("val")))
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def described_on(program: Program, value: torch.Tensor) -> torch.device:
    """Where an input or weight is described: all are on the meta device where weights lie in files, though some may be in memory."""
    return value.device if program.source is None else torch.device("meta")


@contextlib.contextmanager
def describing(mode: FakeTensorMode | None) -> Iterator[None]:
    """Tensors made here have no data, and what is asked of symbolic sizes on the way leaves no guard."""
    quiet = mode.shape_env.suppress_guards() if mode is not None and mode.shape_env is not None else contextlib.nullcontext()
    with mode or torch.device("meta"), quiet, torch.no_grad():
        yield
