"""The probe for activations: statistics of what the readers of a dimension read, without keeping it.

A *reader* is a linear layer, a matrix product or a convolution that contracts an axis of an activation
with an axis of one weight: ``y = W x (+ b)`` with samples ``x``. Every method that works on
activations needs moments of ``x`` only. :func:`observe` adds up column moments of all readers in one
pass, a batch at a time. Gram matrices are as large as a weight, so :class:`Walk` goes from reader to
reader over all batches, and one such matrix exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.nn import functional

from irprune.analysis.groups import derived_values
from irprune.ir.dims import index_maps, resolve, variables
from irprune.ir.facts import Group, Task
from irprune.ir.program import Program, Runner
from irprune.pipeline.progress import track
from irprune.rules.registry import bind, op_name
from irprune_passes.calibration import blamed, flat_batches, seeded

Moment: TypeAlias = Literal["sum", "abs", "square", "nonzero"]

MOMENTS: Mapping[Moment, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x,
    "abs": torch.abs,
    "square": torch.square,
    "nonzero": lambda x: (x != 0).to(x.dtype),
}


@dataclass(frozen=True)
class Reader:
    """An operation ``y = W x (+ b)`` on an activation.

    With ``G`` groups (1 but for a grouped convolution) the weight is ``G`` matrices ``(out, in)``. The
    ``in`` features of a convolution are its window, channel by channel.

    Attributes:
        node: The operation.
        operand: The activation that it reads.
        axis: The axis of it that is contracted.
        weight: The parameter.
        bias: Its bias parameter, if it has one.
        own: Whether weight and bias have no other use, so that they may change for this reader's sake.
    """

    node: str
    operand: str
    axis: int
    weight: str
    bias: str | None
    own: bool
    transposed: bool = field(repr=False)
    rank: int = field(repr=False)
    groups: int = field(default=1, repr=False)
    window: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def view(self) -> tuple[Any, ...]:
        """What decides the samples: readers that agree in it read the same."""
        return self.operand, self.groups, self.window

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as ``(G, out, in)``."""
        if self.transposed:
            return weight.T[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: a weight of the shape and dtype of ``like``."""
        return (matrix[0].T if self.transposed else matrix.reshape(like.shape)).to(like.dtype)

    def samples(self, x: torch.Tensor) -> torch.Tensor:
        """What is read as ``(G, n, in)``, in at least single precision."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.rank:
            return x.reshape(1, -1, x.shape[-1])
        kernel, stride, before, after, dilation = self.window
        x = x if x.ndim == self.rank + 2 else x[None]
        pads = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
        x = functional.pad(x, pads)
        if self.rank == 1:
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        columns = functional.unfold(x, kernel, dilation, 0, stride)  # (N, channels * window, places)
        return columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def results(self, y: torch.Tensor) -> torch.Tensor:
        """What comes out as ``(G, n, out)``, in the order of :meth:`samples`."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if not self.rank:
            return y.reshape(1, -1, y.shape[-1])
        y = y if y.ndim == self.rank + 2 else y[None]
        return y.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def reads(self, program: Program, group: Group) -> bool:
        """Whether it sums over the group's variable: the variable is read, and does not come out."""
        term = resolve(program.typing.of(self.operand)[self.axis])
        out = {var for axis in program.typing.of(self.node) for var in variables(resolve(axis))}
        return group.var in set(variables(term)) and group.var not in out

    def features(self, program: Program, group: Group) -> npt.NDArray[np.int64] | None:
        """The features of each index of a group as ``(indices, k)``, the same in all ``G`` matrices.

        ``None`` where an index has no features of its own (a variable that stands twice in a product).
        """
        maps = index_maps(resolve(program.typing.of(self.operand)[self.axis]), group.var)
        width = program.tensors[self.weight].shape[self._in_axis(program)]
        if len(maps) != 1 or len(maps[0]) != self.groups * width:
            return None
        channels = maps[0].reshape(self.groups, width)
        if (channels != channels[0]).any():
            return None
        index_of = np.repeat(channels[0], math.prod(self.window[0]) if self.window else 1)
        if np.unique(np.bincount(index_of[index_of >= 0], minlength=group.size)).size != 1:
            return None
        order = np.argsort(index_of, kind="stable")
        return order[(index_of < 0).sum() :].reshape(group.size, -1)

    def _in_axis(self, program: Program) -> int:
        return 0 if self.transposed else 1


def readers(program: Program) -> tuple[Reader, ...]:
    """All readers of a typed program, in order of execution.

    A weight that is computed (a parametrisation) makes no reader; one that is only transposed does.
    Nor do transposed convolutions and convolutions over three dimensions.
    """
    derived = derived_values(program)
    found = []
    for node in program.nodes:
        if node.op != "call_function" or node in derived:
            continue
        name = op_name(node.target)
        bound = bind(node.target, node.args, dict(node.kwargs))
        if name == "aten::linear":
            one = _reader(program, derived, node, bound["input"], bound["weight"], bound["bias"], flip=False)
        elif name in ("aten::conv1d", "aten::conv2d"):
            one = _convolution(program, derived, node, bound)
        elif name in ("aten::matmul", "aten::mm"):
            first, second = node.all_input_nodes if len(node.all_input_nodes) == 2 else (None, None)
            one = _reader(program, derived, node, first, second, None, flip=True)
        elif name == "aten::addmm" and bound["beta"] == 1 and bound["alpha"] == 1:
            one = _reader(program, derived, node, bound["mat1"], bound["mat2"], bound["self"], flip=True)
        else:
            continue
        if one is not None:
            found.append(one)
    return tuple(found)


def _reader(program: Program, derived: set[fx.Node], node: fx.Node, operand: Any, weight: Any, bias: Any, *, flip: bool) -> Reader | None:
    if not isinstance(operand, fx.Node) or not isinstance(weight, fx.Node) or operand in derived:
        return None
    turned = op_name(weight.target) in _TRANSPOSES if weight.op == "call_function" else False
    holder = weight.all_input_nodes[0] if turned and len(weight.all_input_nodes) == 1 else weight
    if not _is_parameter(program, holder) or program.tensors[str(holder.target)].ndim != 2:
        return None
    if bias is not None and not _is_vector(program, bias):
        return None
    axis = len(program.typing.of(operand.name)) - 1
    own = _own(holder, weight, node) and (bias is None or len(bias.users) == 1)
    return Reader(
        node.name, operand.name, axis, str(holder.target), None if bias is None else str(bias.target), own, turned != flip, rank=0
    )


_TRANSPOSES = ("aten::t", "aten::numpy_T", "aten::transpose", "aten::permute")


def _convolution(program: Program, derived: set[fx.Node], node: fx.Node, bound: Mapping[str, Any]) -> Reader | None:
    operand, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if operand in derived or not _is_parameter(program, weight) or (bias is not None and not _is_vector(program, bias)):
        return None
    kernel = tuple(program.tensors[str(weight.target)].shape[2:])
    rank = len(kernel)

    def spread(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * rank if len(values) == 1 else values

    stride, dilation, padding = spread(bound["stride"]), spread(bound["dilation"]), bound["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(size // 2 for size in total)
        after = tuple(size - half for size, half in zip(total, before, strict=True))
    else:
        before = after = (0,) * rank if padding == "valid" else spread(padding)
    return Reader(
        node.name,
        operand.name,
        len(program.typing.of(operand.name)) - rank - 1,
        str(weight.target),
        None if bias is None else str(bias.target),
        _own(weight, weight, node) and (bias is None or len(bias.users) == 1),
        transposed=False,
        rank=rank,
        groups=bound["groups"],
        window=(kernel, stride, before, after, dilation),
    )


def _is_parameter(program: Program, node: fx.Node) -> bool:
    return node.op == "get_attr" and program.is_parameter(str(node.target)) and program.tensors[str(node.target)].is_floating_point()


def _is_vector(program: Program, node: Any) -> bool:
    return isinstance(node, fx.Node) and _is_parameter(program, node) and program.tensors[str(node.target)].ndim == 1


def _own(holder: fx.Node, value: fx.Node, node: fx.Node) -> bool:
    """Whether a weight is used by one operation only."""
    return list(value.users) == [node] and (holder is value or list(holder.users) == [value])


# -- column moments in one pass ----------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over all samples of what one reader reads.

    Attributes:
        count: Number of samples.
        sums: Each asked moment as ``(G, in)``, in double precision.
    """

    count: int
    sums: Mapping[Moment, torch.Tensor]

    def mean(self, moment: Moment) -> torch.Tensor:
        return self.sums[moment] / self.count

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each feature about its mean (of the population; needs ``sum`` and ``square``)."""
        return (self.mean("square") - self.mean("sum").square()).clamp_min(0)


def observe(
    program: Program,
    task: Task | None,
    of: Sequence[Reader],
    moments: Collection[Moment],
    *,
    batches: int | None = None,
    seed: int = 0,
    purpose: str,
) -> dict[str, Moments]:
    """Moments of what readers read, in one pass over the calibration batches.

    Nothing is kept but the sums: four double-precision numbers at most per feature. Readers of one
    value share them. The pass ends at the last reader.

    Args:
        program: The program.
        task: Calibration data.
        of: The readers.
        moments: Which moments.
        batches: At most so many batches.
        seed: Seed of operations that draw random numbers.
        purpose: What it is for, in errors and progress.

    Returns:
        Moments by the reader's operation.

    Raises:
        DataError: There is no calibration data, or it does not fit.
    """
    at: dict[str, list[Reader]] = {}
    for reader in of:
        at.setdefault(reader.operand, []).append(reader)
    found: dict[tuple[Any, ...], tuple[int, dict[Moment, torch.Tensor]]] = {}
    walk = Walk(program)
    last = max((walk.place(reader.operand) for reader in of), default=-1)
    with torch.no_grad(), seeded(seed):
        for number, flat in enumerate(track(flat_batches(program, task, limit=batches, purpose=purpose), purpose, batches)):
            for name, value in walk.values(flat, last, f"calibration batch {number}"):
                seen = set()
                for reader in at.get(name, ()):
                    key = reader.view
                    if key in seen:
                        continue
                    seen.add(key)
                    x = reader.samples(value)
                    count, sums = found.get(key, (0, {}))
                    now = {moment: MOMENTS[moment](x).sum(1, dtype=torch.float64) for moment in moments}
                    found[key] = count + x.shape[1], {moment: sums.get(moment, 0) + value for moment, value in now.items()}
    return {reader.node: Moments(*found[reader.view]) for reader in of}


# -- a walk from reader to reader ---------------------------------------------------------------------


_MISFIT, _LIKE = "the batch does not fit the model", "yield batches like the example inputs"


class Walk:
    """A program that runs a stretch at a time over all batches.

    Between two stretches it holds, for each batch, the values that are still to be used: in a network
    of blocks little more than the residual stream. Weights are read when they are used, so they may
    be replaced on the way (``replaced``). What follows the last stretch is never run.

    Args:
        program: The program.
        batches: The flat inputs of each batch.
    """

    def __init__(self, program: Program, batches: Sequence[list[Any]] = ()) -> None:
        self.program = program
        self.replaced: dict[str, torch.Tensor] = {}
        self._runner = Runner(program)
        self._nodes = list(program.nodes)
        self._places = {node.name: place for place, node in enumerate(self._nodes)}
        self._last = [max((self._places[user.name] for user in node.users), default=place) for place, node in enumerate(self._nodes)]
        self._ends: dict[int, list[fx.Node]] = {}
        for node, last in zip(self._nodes, self._last, strict=True):
            self._ends.setdefault(last, []).append(node)
        self._weights = {node for node in derived_values(program) if any(_is_parameter(program, o) for o in node.all_input_nodes)}
        self._states = [self._start(flat) for flat in batches]
        self._at = 0

    def __len__(self) -> int:
        return len(self._states)

    def place(self, name: str) -> int:
        """The place of an operation in execution order."""
        return self._places[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer as the walk uses it from here on: the program's, or what stands in ``replaced``."""
        found = self.replaced.get(name)
        return self.program.value(name).detach() if found is None else found

    def _start(self, flat: Sequence[Any]) -> dict[fx.Node, Any]:
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        return dict(zip(inputs, flat, strict=True))

    def advance(self, name: str, *, through: bool = False) -> Iterator[_Values]:
        """Run every batch up to an operation and show its values while they are there.

        Args:
            name: The operation; at or after where the walk stands.
            through: Run the operation as well.

        Yields:
            For each batch a function from names to values. It gives the values that live at this place
            and whatever can be computed from them.
        """
        stop = self._places[name] + through
        for number, state in enumerate(self._states):
            with blamed(_MISFIT, f"calibration batch {number}", _LIKE):
                for place in range(self._at, stop):
                    self._run(state, place)
                    self._drop(state, place)
            yield _Values(self, state)
        self._at = stop

    def values(self, flat: list[Any], last: int, where: str) -> Iterator[tuple[str, Any]]:
        """Run one batch from the start up to a place, giving each value as it appears; none is kept longer than it is used."""
        state = self._start(flat)
        for place in range(last + 1):
            with blamed(_MISFIT, where, _LIKE):
                self._run(state, place)
            if self._nodes[place] in state:
                yield self._nodes[place].name, state[self._nodes[place]]
            self._drop(state, place)

    def _run(self, state: dict[fx.Node, Any], place: int) -> None:
        node = self._nodes[place]
        if node.op == "call_function" and node not in self._weights:
            state[node] = self._call(node, state, {})

    def _drop(self, state: dict[fx.Node, Any], place: int) -> None:
        for dead in self._ends.get(place, ()):
            state.pop(dead, None)

    def value(self, node: fx.Node, state: dict[fx.Node, Any], passing: dict[fx.Node, Any]) -> Any:
        """A value that is there, or computed now: weights always are, so that one that was replaced counts."""
        if node.op == "get_attr":
            return self.tensor(str(node.target))
        if node in state:
            return state[node]
        if node not in passing:
            passing[node] = self._call(node, state, passing)
        return passing[node]

    def _call(self, node: fx.Node, state: dict[fx.Node, Any], passing: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: self.value(operand, state, passing))
        args, kwargs = self._runner.arguments(args, kwargs)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


class _Values:
    """The values of one batch at a place, by name."""

    def __init__(self, walk: Walk, state: dict[fx.Node, Any]) -> None:
        self._walk = walk
        self._state = state
        self._passing: dict[fx.Node, Any] = {}

    def __call__(self, name: str) -> Any:
        return self._walk.value(self._walk.program.by_name[name], self._state, self._passing)


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """A Gram matrix with ``damping`` times its diagonal added: a ridge that does not depend on the features' units.

    A feature that is always zero gets 1: it takes part in nothing, and the matrix can be inverted.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return gram + torch.diag_embed(torch.where(diagonal > 0, damping * diagonal, torch.ones_like(diagonal)))


def spd_solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix^-1 right`` for a symmetric positive semidefinite matrix; the pseudo-inverse where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(matrix, hermitian=True) @ right
