"""Calibration batches: taken from the target, moved, seeded, and blamed where they do not fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from irprune.errors import DataError, IrpruneError
from irprune.ir.facts import Task
from irprune.ir.program import Program


def taken(task: Task, limit: int | None) -> Iterator[Any]:
    """The first ``limit`` calibration batches as the target yields them, or all."""
    assert task.calibration is not None
    with blamed("`calibration()` failed", task.target, "mend the calibration data"):
        yield from itertools.islice(task.calibration(), limit)


def flat_batches(program: Program, task: Task | None, *, limit: int | None, purpose: str) -> Iterator[list[Any]]:
    """The inputs of each calibration batch as the program's placeholders take them, on the device of its tensors.

    Args:
        program: The program.
        task: Calibration data; no loss is needed.
        limit: At most so many batches; ``None`` for all.
        purpose: What the data is for, for the error that there is none.

    Raises:
        DataError: There is no calibration data, no batch, or a batch that does not fit.
    """
    if task is None or task.calibration is None or task.inputs is None:
        raise DataError(
            f"{purpose} needs calibration data, which the target does not give",
            where=task.target if task else None,
            hint="add `def calibration()` (an iterable of batches) to the model file, or give a file with --calibration",
        )
    device = next((tensor.device for tensor in program.tensors.values() if not tensor.is_meta), torch.device("cpu"))
    found = False
    for number, batch in enumerate(taken(task, limit)):
        found = True
        with blamed("the batch does not fit the model", f"calibration batch {number}", "yield batches like the example inputs"):
            args, kwargs = task.inputs(batch)
        yield [leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves((args, kwargs))]
    if not found:
        raise DataError("the calibration data is empty", where=task.target, hint="let `calibration()` yield at least one batch")


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to every tensor and array of a pytree, also in mappings that pytrees do not know."""

    def leaf_changed(leaf: Any) -> Any:
        if isinstance(leaf, MutableMapping):
            out = copy.copy(leaf)
            out.update({key: mapped(value, change) for key, value in leaf.items()})
            return out
        return change(leaf) if isinstance(leaf, torch.Tensor | np.ndarray) else leaf

    return pytree.tree_map(leaf_changed, batch)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers seeded within the block, and the global generators restored after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def blamed(what: str, where: str, hint: str) -> Iterator[None]:
    """Errors of the user's own code, with the place; the exception itself stays visible as the cause."""
    try:
        yield
    except (IrpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}", where=where, hint=hint) from error
