"""The probe for gradients: each one is folded as soon as it exists and freed at once.

The gradients of a model need as much memory as the model. Here only one of them lives at a time: a
post-accumulate hook hands it over and drops it, so that a backward pass needs the weights, the
activations and little more than the largest single gradient (twice that for a tied parameter, whose
two parts are added up first).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from irprune.errors import DataError
from irprune.ir.facts import Task
from irprune.ir.program import Program
from irprune.pipeline.progress import track
from irprune_passes.calibration import blamed, mapped, seeded, taken
from irprune_passes.score.segments import Segmented

Fold: TypeAlias = Callable[[str, torch.Tensor], None]
# The outputs on a call's arguments, and what is to be done after the loss has run backward.
Forward: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Callable[[], None]]]


def backward(
    program: Program,
    task: Task | None,
    names: Collection[str],
    fold: Fold,
    *,
    batches: int | None = None,
    per_sample: bool = False,
    seed: int = 0,
    label: str = "gradients",
) -> int:
    """Run the loss backward once per calibration batch, or once per sample.

    The program is left as it was, also on errors: ``requires_grad``, ``grad`` and hooks of its
    parameters are restored. Batches are moved to the device of the parameters. Random numbers that
    the calibration draws from torch are seeded here, and the global generators are restored.

    Args:
        program: The program.
        task: Calibration data and loss.
        names: The parameters whose gradients are wanted; no others are computed.
        fold: Called with a parameter's name and its gradient, which is dropped afterwards. It must
            not write to the gradient: two parameters may share one.
        batches: Stop after this many batches; ``None`` takes all.
        per_sample: Cut each batch along axis 0 and run every sample on its own. The gradient is then
            that of the loss of a batch of one.
        seed: Seed of torch's random numbers.
        label: What the progress shows.

    Returns:
        How many backward passes there were: batches, or samples.

    Raises:
        DataError: No calibration data or no loss, no batch, a batch that does not fit, a loss that is
            no finite scalar, a gradient that is not finite.
    """
    if task is None or task.calibration is None or task.inputs is None or task.loss is None:
        missing = [part for part in ("calibration", "loss") if task is None or getattr(task, part) is None]
        raise DataError(
            f"scoring by gradients needs {' and '.join(missing) or 'inputs'}, which the target does not give",
            where=task.target if task else None,
            hint="add `def calibration()` (an iterable of batches) and `def loss(outputs, batch)` to the model file, "
            "or score with criterion=magnitude",
        )
    device = torch.device("cpu") if program.source is not None else next(program.tensors[name].device for name in names)
    sums: dict[str, torch.Tensor] = {}

    def take(name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        sums[name] = gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32))
        fold(name, gradient)

    steps = 0
    ways = _segmented(program, names, take) if program.source is not None else _hooked(program, names, take)
    with ways as forward, seeded(seed):
        for number, batch in enumerate(track(taken(task, batches), label, batches)):
            where = f"calibration batch {number}"
            batch = mapped(batch, lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf)
            for piece in _samples(program, task, batch, where) if per_sample else (batch,):
                sums.clear()
                _step(program, task, piece, where, forward)
                _check_finite(sums, where)
                steps += 1
    if steps == 0:
        raise DataError("the calibration data is empty", where=task.target, hint="let `calibration()` yield at least one batch")
    return steps


def _step(program: Program, task: Task, batch: Any, where: str, forward: Forward) -> None:
    """One forward and backward pass; a loss that no wanted parameter reaches has no gradients."""
    assert task.inputs is not None
    assert task.loss is not None
    with torch.enable_grad():
        with blamed("the batch does not fit the model", where, "yield batches like the example inputs"):
            args, kwargs = task.inputs(batch)
            outputs, finish = forward(args, kwargs)
        with blamed("`loss(outputs, batch)` failed", where, "mend the loss of the model file"):
            loss = task.loss(outputs, batch)
        del outputs
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise DataError(f"the loss must be one floating-point number, found {found}", where=where, hint="reduce it, as by mean()")
        if not loss.isfinite():
            bad = next((name for name in program.tensors if not program.value(name).isfinite().all()), None)
            reason = f"{bad} holds NaN or infinite values" if bad else "all weights are finite"
            raise DataError(f"the loss is {loss.item()}; {reason}", where=where, hint="check the checkpoint, the batch and the loss")
        if loss.requires_grad:
            loss.backward()
            finish()


def _check_finite(sums: dict[str, torch.Tensor], where: str) -> None:
    """One look at all gradients, so that an accelerator is waited for once."""
    if sums and not (finite := torch.stack([total.double() for total in sums.values()]).isfinite()).all():
        raise DataError(
            "the gradient of the parameter is NaN or infinite",
            where=f"{list(sums)[int(finite.int().argmin())]}, {where}",
            hint="check the loss for logarithms or divisions of zero, or load the model in single precision",
        )


def _samples(program: Program, task: Task, batch: Any, where: str) -> Iterator[Any]:
    """The batch cut along axis 0 into batches of one.

    The first tensor input says how many samples there are; every tensor or array of that length is
    cut, all else is shared by the samples.
    """
    assert task.inputs is not None
    with blamed("the batch does not fit the model", where, "yield batches like the example inputs"):
        leaves = pytree.tree_leaves(task.inputs(batch))
    size = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)
    if size == 1:
        yield batch
        return
    if not any(0 in axes for axes in program.interface.dynamic):
        raise DataError(
            "per-sample gradients need batches of one sample, and the program has a fixed batch axis",
            where=where,
            hint="make axis 0 dynamic in `dynamic_axes()`, or score with order=1",
        )
    for index in range(size):
        cut = False

        def sample(leaf: Any, index: int = index) -> Any:
            nonlocal cut
            if leaf.ndim == 0 or leaf.shape[0] != size:
                return leaf
            cut = True
            return leaf[index : index + 1]

        piece = mapped(batch, sample)
        if not cut:
            raise DataError(
                f"a batch of type {type(batch).__name__} cannot be cut into samples",
                where=where,
                hint="yield tensors in a tuple, list or dictionary, or batches of one sample",
            )
        yield piece


@contextmanager
def _hooked(program: Program, names: Collection[str], take: Fold) -> Iterator[Forward]:
    """Only the named parameters get gradients, and each goes to ``take`` as it appears."""
    parameters = {name: tensor for name, tensor in program.tensors.items() if program.is_parameter(name)}
    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor in parameters.values()]
    handles = []

    def hook(name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        take(name, gradient)

    try:
        for name, tensor in parameters.items():
            tensor.requires_grad_(name in names)
            tensor.grad = None
            if name in names:
                handles.append(tensor.register_post_accumulate_grad_hook(lambda parameter, name=name: hook(name, parameter)))
        yield lambda args, kwargs: (program(*args, **kwargs), lambda: None)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, required, gradient in before:
            tensor.requires_grad_(required)
            tensor.grad = gradient


@contextmanager
def _segmented(program: Program, names: Collection[str], take: Fold) -> Iterator[Forward]:
    """The same for a program whose tensors are read when they are needed: one segment of it in memory at a time."""
    parts = Segmented(program, names, take)

    def forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
        named = {name: kwargs[name] for name in program.interface.example[1]}
        found, backward = parts.forward(*pytree.tree_leaves((args, named)))
        leaves = [leaf.requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in found]
        by_node = dict(zip(parts.results, leaves, strict=True))
        outputs = program.module.graph.process_outputs(fx.map_arg(parts.output.args[0], by_node.__getitem__))
        return outputs, lambda: backward([getattr(leaf, "grad", None) for leaf in leaves])

    yield forward
