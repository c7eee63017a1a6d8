"""Translation validation: every removal proves itself.

1. *Shapes*: tensors without data through the new graph have exactly the predicted sizes and dtypes.
2. *Numbers*: the new program equals the original one run at full size with the removed slices
   zeroed, sums restricted to the kept indices, and every mixing operation (norm, mean, softmax,
   extreme) renormalised over the kept indices.
3. *Interface*: inputs and outputs keep their names, order, sizes and dtypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from irprune.analysis.cost import hints
from irprune.backend.rewrite import Shrink, shape_of
from irprune.errors import ProofError
from irprune.ir.dims import Mask, Size, Var, as_size
from irprune.ir.fake import described_on, describing, mode_of
from irprune.ir.program import Event, Program, Runner, location
from irprune.rules.registry import bind, op_name, registry

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Keep:
    """What a *renormalise* function may ask: masks of its operands and the operation itself."""

    def __init__(self, node: fx.Node, shrink: Shrink, bound: dict[str, Any], dtype: torch.dtype | None) -> None:
        self._node = node
        self._shrink = shrink
        self._bound = bound
        self._old = bind(node.target, node.args, dict(node.kwargs))
        self.name = op_name(node.target).rpartition("::")[2]
        self.dtype = dtype

    def mask(self, operand: str, *dims: int) -> torch.Tensor:
        """A boolean tensor of the operand's rank, True at kept positions of the named axes."""
        value = self._bound[operand]
        axes = self._shrink.types.of(self._old[operand].name)
        out = torch.ones((1,) * value.ndim, dtype=torch.bool, device=value.device)
        for dim in dims:
            term = axes[dim]
            if not self._shrink.touched(term):
                continue
            shape = [1] * value.ndim
            shape[dim] = -1
            out = out & torch.from_numpy(self._shrink.mask(term, value.shape[dim])).to(value.device).reshape(shape)
        return out

    def call(self, /, **replaced: Any) -> Any:
        """The operation itself with some arguments replaced."""
        return _call(self._node.target, {**self._bound, **replaced})


def _call(target: Any, bound: dict[str, Any]) -> Any:
    positional, keyword = [], {}
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            keyword[argument.name] = bound[argument.name]
        else:
            positional.append(bound[argument.name])
    return target(*positional, **keyword)


class Run(Runner):
    """A program on its flat inputs.

    Args:
        program: The program.
        wide: Compute in float32 what is in half precision: rounding would hide small faults.
    """

    def __init__(self, program: Program, wide: bool = False) -> None:
        super().__init__(program)
        self.wide = wide

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        value = super().tensor(name, start, stop)
        return value.to(widened(value.dtype)) if self.wide else value

    def arguments(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = super().arguments(args, kwargs)
        return pytree.tree_map(widened, (args, kwargs)) if self.wide else (args, kwargs)


def widened(value: Any) -> Any:
    """float32 for a dtype of half precision; anything else is returned as it is."""
    return torch.float32 if value in (torch.float16, torch.bfloat16) and isinstance(value, torch.dtype) else value


class Double(Run):
    """A program computed in float64: next to this, its own results show how much rounding they hold."""

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        value = super().tensor(name, start, stop)
        return value.to(torch.complex128) if value.is_complex() else value.double() if value.is_floating_point() else value

    def arguments(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = super().arguments(args, kwargs)

        def double(value: Any) -> Any:
            if not isinstance(value, torch.dtype):
                return value
            return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value

        return pytree.tree_map(double, (args, kwargs))


def wide_tensor(value: Any) -> Any:
    """A tensor of half precision in float32; anything else is returned as it is."""
    return value.to(widened(value.dtype)) if isinstance(value, torch.Tensor) else value


def needs_half(program: Program) -> fx.Node | None:
    """The first operation that wants half precision, or reads the bytes of numbers: with it a program is not widened."""
    fixed = (torch.ops.aten._grouped_mm.default, torch.ops.aten.view.dtype)
    return next((node for node in program.nodes if node.target in fixed), None)


def may_widen(program: Program, flat: list[Any]) -> bool:
    """Whether a program has half precision, and no operation that wants it or reads its bytes."""
    held = [*program.tensors.values(), *(value for value in flat if isinstance(value, torch.Tensor))]
    return any(tensor.dtype is not widened(tensor.dtype) for tensor in held) and needs_half(program) is None


def wide_inputs(program: Program, flat: list[Any]) -> tuple[list[Any], bool]:
    """Flat inputs for a :class:`Run`, and whether it is to be wide: where the program has half precision and may be widened."""
    wide = may_widen(program, flat)
    return [wide_tensor(value) if wide else value for value in flat], wide


class Masked(Run):
    """The original program at full size under a plan: the reference that a removal must equal."""

    def __init__(self, program: Program, keep: Mapping[Var, Mask], wide: bool = False) -> None:
        super().__init__(program, wide)
        self._shrink = Shrink(program.typing, keep, hints(program))
        self._holders = program.holders
        self._events: dict[str, list[Event]] = {}
        for event in program.typing.events:
            if self._shrink.touched(program.typing.of(event.operand)[event.axis]):
                self._events.setdefault(event.node, []).append(event)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = super().tensor(name, start, stop)
        if tensor.is_floating_point() or tensor.is_complex():
            shape = self.program.tensors[name].shape
            for dim, term in enumerate(self._shrink.types.of(self._holders[name].name)):
                if self._shrink.touched(term):
                    rows = slice(start, stop) if dim == 0 else slice(None)
                    tensor = torch.where(self._along(tensor, dim, self._shrink.mask(term, shape[dim])[rows]), tensor, 0)
        return tensor

    @staticmethod
    def _along(tensor: torch.Tensor, dim: int, mask: Mask) -> torch.Tensor:
        shape = [1] * tensor.ndim
        shape[dim] = -1
        return torch.from_numpy(mask).to(tensor.device).reshape(shape)

    def run_node(self, n: fx.Node) -> Any:
        events = self._events.get(n.name)
        if not events:
            return super().run_node(n)
        large = self._large(n) if all(event.how == "contract" for event in events) else None
        if large is not None and self.env[large] is None:
            # The weight is masked as it is read.
            events = [event for event in events if event.operand != large.name]
            return self._masked(n, events) if events else super().run_node(n)
        with self.loaded(n):
            return self._masked(n, events)

    def _masked(self, n: fx.Node, events: list[Event]) -> Any:
        env = dict(self.env)
        try:
            for event in events:
                if event.how == "contract":
                    operand = next(node for node in n.all_input_nodes if node.name == event.operand)
                    value = self.env[operand]
                    term = self._shrink.types.of(event.operand)[event.axis]
                    along = self._along(value, event.axis, self._shrink.mask(term, value.shape[event.axis]))
                    self.env[operand] = torch.where(along, value, torch.zeros((), dtype=value.dtype, device=value.device))
            if all(event.how == "contract" for event in events):
                return super().run_node(n)
            rule = registry().find(n.target)
            assert rule is not None
            if rule.renormalise is None:
                raise ProofError(f"operation {op_name(n.target)} has no renormalised form to compare with", where=f"%{n.name}")
            args, kwargs = self.arguments(*self.fetch_args_kwargs_from_env(n))
            bound = bind(n.target, args, kwargs)
            held = n.meta.get("val")
            dtype = held.dtype if isinstance(held, torch.Tensor) else None
            dtype = widened(dtype) if self.wide else dtype
            keep = Keep(n, self._shrink, bound, dtype)
            return rule.renormalise(keep, **wanted(rule.renormalise, bound))
        finally:
            self.env = {**env, **{k: v for k, v in self.env.items() if k not in env}}


# What chooses positions along one axis by their contents, and gives their numbers as its last or only result.
CHOICES = frozenset(f"aten::{name}" for name in ("topk", "sort", "argsort", "argmax", "argmin", "max", "min"))


class Recorded(Masked):
    """The masked original, and the positions that it chose."""

    def __init__(self, program: Program, keep: Mapping[Var, Mask], wide: bool = False) -> None:
        super().__init__(program, keep, wide)
        self.chosen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if op_name(n.target) in CHOICES:
            axes = self.program.typing.axes[n.name]
            which = len(axes) - 1 if isinstance(axes, list) else 0
            numbers, own = (out[which], axes[which]) if isinstance(axes, list) else (out, axes)
            if own is not None and not numbers.is_floating_point() and numbers.dtype is not torch.bool:
                numbers = self._shrink.slice(numbers, own)
                term = self.program.typing.points.get((n.name, which))
                self.chosen[n.name] = numbers if term is None else self._shrink.renumbered(numbers, term)
        return out


class Settled(Run):
    """A program that chooses among equals as another run did.

    Which of several equal numbers is the largest is for rounding to say, and two programs round
    differently. Another run's choice is taken where the numbers that it chooses are, to the tolerance,
    those that the program's own choice has.

    Args:
        program: The program.
        chosen: Positions that the other run chose, by operation, as this program counts them.
        tolerance: Relative to the largest number that is chosen from.
    """

    def __init__(self, program: Program, chosen: Mapping[str, torch.Tensor], tolerance: float, wide: bool = False) -> None:
        super().__init__(program, wide)
        self._chosen = chosen
        self._tolerance = tolerance
        self.ties = 0

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        other = self._chosen.get(n.name)
        own = out[-1] if isinstance(out, tuple) else out
        if other is None or other.shape != own.shape or torch.equal(other, own):
            return out
        bound = bind(n.target, n.args, dict(n.kwargs))
        x, dim = self.env[n.all_input_nodes[0]], bound.get("dim")
        if not isinstance(dim, int) or not x.is_floating_point() or not bool(((other >= 0) & (other < x.shape[dim])).all()):
            return out
        dropped = own.ndim < x.ndim
        theirs, ours = (x.gather(dim, i.unsqueeze(dim) if dropped else i) for i in (other, own))
        finite = x[x.isfinite()]
        if difference(theirs, ours).max_abs > self._tolerance * float(finite.abs().max() if finite.numel() else 0):
            return out
        self.ties += int((other != own).sum())
        return (theirs.squeeze(dim) if dropped else theirs, other) if isinstance(out, tuple) else other


def wanted(function: Callable[..., Any], bound: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a rule's function names (all, if it takes any)."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return bound
    return {name: bound[name] for name in parameters if name in bound}


@dataclass(frozen=True)
class Difference:
    """How far two results are apart: absolute, and relative to the reference's largest value."""

    max_abs: float
    scale: float

    @property
    def relative(self) -> float:
        return self.max_abs / max(self.scale, 1e-6)


def difference(value: torch.Tensor, reference: torch.Tensor) -> Difference:
    """The largest difference between two tensors of one shape; not-finite values must agree."""
    if value.is_complex():
        return difference(torch.view_as_real(value.resolve_conj()), torch.view_as_real(reference.resolve_conj()))
    if not value.is_floating_point():
        wrong = (value != reference).any() if value.numel() else torch.tensor(False)
        return Difference(float("inf") if bool(wrong) else 0.0, 1.0)
    a, b = value.detach().double(), reference.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros((), dtype=a.dtype), (a - b).abs())
    gap = torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf"))
    finite = b[b.isfinite()]
    return Difference(float(gap.max()) if gap.numel() else 0.0, float(finite.abs().max()) if finite.numel() else 1.0)


def prove(before: Program, after: Program, keep: Mapping[Var, Mask], *, seed: int = 0) -> dict[str, Any]:
    """Prove a removal.

    Args:
        before: The typed original.
        after: What :func:`irprune.backend.rewrite.remove` made of it.
        keep: The masks.
        seed: Seed of operations that draw random numbers.

    Returns:
        ``{"shapes": True, "numbers": {"max_abs_err", "tolerance", "scale"}, "interface": True}``. On
        the meta device there are no numbers to compare and ``numbers`` says so. ``numbers["ties"]`` is
        there where both programs chose differently among equals (a top-k, an argmax), and how often;
        ``numbers["float64"]`` where the types of the program round by more than is allowed, and float64 was compared.

    Raises:
        ProofError: Naming the operation, the variable and both values.
    """
    shrink = Shrink(before.typing, keep)
    values = fake_values(after)
    prove_shapes(before, after, shrink, values)
    prove_interface(before, after, values, shrink)
    if not before.has_data:
        return {"shapes": True, "interface": True, "numbers": {"max_abs_err": None, "tolerance": None, "skipped": "no weights"}}
    return {"shapes": True, "interface": True, "numbers": prove_numbers(before, after, keep, seed=seed)}


def prove_shapes(before: Program, after: Program, shrink: Shrink, values: Mapping[str, Any]) -> None:
    """Every value of the new graph has the size that the plan predicts for its axes, and its dtype.

    Args:
        before: The typed original.
        after: The new program.
        shrink: The plan.
        values: The new program's values, from :func:`fake_values`.
    """
    types, known = before.typing, hints(before)
    for node in after.nodes:
        old = before.by_name.get(node.name)
        axes = types.axes.get(node.name)
        if old is None or axes is None or (old.op == "call_function" and node.name in types.constants):
            continue
        value, was = values[node.name], old.meta["val"]
        triples = zip(axes, value, was, strict=True) if isinstance(axes, list) else [(axes, value, was)]
        for term_axes, tensor, typed_as in triples:
            if term_axes is None or not isinstance(tensor, torch.Tensor):
                continue
            predicted = [_concrete(shrink.size(term), known) for term in term_axes]
            found = [_concrete(size, known) for size in shape_of(tensor)]
            if not _fit(predicted, found) or tensor.dtype != typed_as.dtype:
                raise ProofError(
                    f"the plan predicts {typed_as.dtype} {predicted} for %{node.name} = {op_name(node.target)}, "
                    f"the program gives {tensor.dtype} {found}",
                    where=location(node) or f"%{node.name}",
                    hint="an op rule or a rewrite is wrong; report this with the model",
                )


def _fit(predicted: list[Size], found: list[Size]) -> bool:
    """Equal sizes. One that depends on contents is a symbol of its own in each run: that is for the numbers to tell."""
    pairs = zip(predicted, found, strict=False)
    return len(predicted) == len(found) and all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


def _concrete(size: Size, known: Mapping[Any, int]) -> Size:
    """A size with the example inputs' sizes for dynamic axes."""
    return size if isinstance(size, int) else as_size(size.subs(known))


def fake_values(program: Program) -> dict[str, Any]:
    """Every value of a program by name, from running it on tensors without data.

    Dynamic axes have the sizes of the example inputs: shapes are then found quickly, and a size that
    the trace left open is an expression in those. Where shapes depend on contents, the program is run
    on the example inputs; without weights to run on, such sizes stay symbols.

    Raises:
        ProofError: An operation does not accept its operands.
    """
    args, kwargs = program.interface.example
    given = flat_inputs(program, args, kwargs)
    with FakeTensorMode() as mode:
        flat = [mode.from_tensor(one).to(described_on(program, one)) if isinstance(one, torch.Tensor) else one for one in given]
        try:
            return _run_nodes(program, flat)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
    if not any(tensor.is_meta for tensor in program.tensors.values()):
        return _run_nodes(program, flat_inputs(program, args, kwargs), real=True)
    placeholders = [node.meta.get("val") for node in program.nodes if node.op == "placeholder"]
    with describing(mode_of(program.nodes)), enable_python_dispatcher():
        return _run_nodes(program, placeholders)


def _run_nodes(program: Program, flat: list[Any], real: bool = False) -> dict[str, Any]:
    """Every value by name: of tensors without data, or with ``real`` of the weights in memory."""
    values: dict[str, Any] = {}
    inputs = iter(flat)
    with torch.no_grad():
        for node in program.nodes:
            if node.op == "placeholder":
                values[node.name] = next(inputs)
            elif node.op == "get_attr":
                tensor = program.tensors[str(node.target)]
                values[node.name] = tensor if real else torch.empty(tensor.shape, dtype=tensor.dtype, device=described_on(program, tensor))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n.name])
                try:
                    values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
                except (DataDependentOutputException, DynamicOutputShapeException):
                    raise
                except Exception as error:
                    raise ProofError(
                        f"operation {op_name(node.target)} does not accept its shrunk operands: {str(error).splitlines()[0]}",
                        where=f"%{node.name} ({location(node) or 'generated'})",
                        hint="report this with the model; freeze the axis with discover{freeze=[...]} meanwhile",
                    ) from error
    return values


def prove_interface(before: Program, after: Program, values: Mapping[str, Any], shrink: Shrink | None = None) -> None:
    """Inputs and outputs are the same in number, order, name, size and dtype; axes that the user unlocked are as planned."""
    known = hints(before)
    for kind in ("placeholder", "output"):
        old, new = ([n for n in p.nodes if n.op == kind] for p in (before, after))
        if kind == "output":
            old, new = ([i for n in nodes for i in n.all_input_nodes] for nodes in (old, new))
        elif [n.name for n in old] != [n.name for n in new]:
            raise ProofError(f"the inputs changed from {[n.name for n in old]} to {[n.name for n in new]}")
        if len(old) != len(new):
            raise ProofError(f"the number of {kind}s changed from {len(old)} to {len(new)}")
        for a, b in zip(old, new, strict=True):
            u, v = a.meta.get("val"), values[b.name]
            if not isinstance(u, torch.Tensor) or not isinstance(v, torch.Tensor):
                continue
            was, now = ([_concrete(size, known) for size in shape_of(t)] for t in (u, v))
            axes = before.typing.axes.get(a.name)
            if shrink is not None and before.typing.unlocked and isinstance(axes, tuple):
                was = [_concrete(shrink.size(term), known) if shrink.touched(term) else size for size, term in zip(was, axes, strict=True)]
            if not _fit(was, now) or u.dtype != v.dtype:
                raise ProofError(f"{kind} %{a.name} changed from {u.dtype} {was} to {v.dtype} {now}")


def _flat_tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def prove_numbers(
    before: Program, after: Program, keep: Mapping[Var, Mask], *, seed: int = 0, origins: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The new program equals the masked original on the example inputs.

    The tolerance is relative to the largest value of each output and depends on its dtype; both
    programs compute the same sums in another order. Where they are further apart, they must agree in
    float64. ``origins`` are names of values of the new program and of those of the old that they are now,
    where these are not their namesakes; ``None``: of none.
    """
    args, kwargs = before.interface.example
    flat, wide = wide_inputs(before, _varied(flat_inputs(before, args, kwargs), seed))
    flat, renumbered = renumber(before, keep, flat)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = _flat_tensors(Masked(before, keep, wide).run(*flat, enable_io_processing=False))
        torch.manual_seed(seed)
        result = _flat_tensors(Run(after, wide).run(*renumbered, enable_io_processing=False))
    reference = _unlocked_parts(before, keep, reference)
    ties = 0
    if any(difference(a, b).relative > tolerance_of(before, a.dtype, wide) for a, b in zip(result, reference, strict=True)):
        result, ties = _settled(before, after, keep, flat, renumbered, seed, wide) or (result, 0)
    exact = False
    if any(difference(a, b).relative > tolerance_of(before, a.dtype, wide) for a, b in zip(result, reference, strict=True)):
        doubled = _doubled(before, after, keep, flat, renumbered, seed)
        exact = doubled is not None
        result, reference = doubled or (result, reference)
    worst, scale, allowed = 0.0, 1.0, TOLERANCE[torch.float32]
    for number, (value, expected) in enumerate(zip(result, reference, strict=True)):
        if expected.is_floating_point() and expected.numel() and bool(expected.isnan().all()):
            raise ProofError(
                f"output {number} of the original is NaN everywhere: there is nothing to compare",
                where="validation",
                hint="give example inputs on which the model gives numbers",
            )
        gap = difference(value, expected)
        tolerance = TOLERANCE[torch.float64] if exact else tolerance_of(before, value.dtype, wide)
        if gap.relative > tolerance:
            raise ProofError(
                f"output {number} differs from the masked original by {gap.max_abs:.3g} (largest value {gap.scale:.3g}, "
                f"allowed {tolerance * gap.scale:.3g}); {locate(before, after, keep, flat, seed, wide, renumbered, origins)}",
                where="validation",
                hint="the program is left as it was; an op rule is wrong: report this with the model",
            )
        if gap.max_abs >= worst:
            worst, scale, allowed = gap.max_abs, gap.scale, tolerance
    if all(_idle(expected) for expected in reference):
        parted = locate(before, after, keep, flat, seed, wide, renumbered, origins)
        if parted != AGREED:
            raise ProofError(
                f"the outputs do not depend on the inputs, so inner values were compared; {parted}",
                where="validation",
                hint="the program is left as it was; an op rule is wrong: report this with the model",
            )
    told = {**({"ties": ties} if ties else {}), **({"float64": True} if exact else {})}
    return {"max_abs_err": worst, "scale": scale, "tolerance": allowed * max(scale, 1e-6), **told}


def _settled(
    before: Program, after: Program, keep: Mapping[Var, Mask], flat: list[Any], renumbered: list[Any], seed: int, wide: bool
) -> tuple[list[torch.Tensor], int] | None:
    """The new program's results where it chooses among equals as the reference does, and how many choices that changed."""
    if not any(op_name(node.target) in CHOICES for node in before.nodes):
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = Recorded(before, keep, wide)
        reference.run(*flat, enable_io_processing=False)
        torch.manual_seed(seed)
        settled = Settled(after, reference.chosen, tolerance_of(before, torch.float32, wide), wide)
        result = _flat_tensors(settled.run(*renumbered, enable_io_processing=False))
    return (result, settled.ties) if settled.ties else None


class _MaskedDouble(Double, Masked):
    """The reference in float64."""


def _doubled(
    before: Program, after: Program, keep: Mapping[Var, Mask], flat: list[Any], renumbered: list[Any], seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Both programs' results in float64, where they agree there: what differed was rounding that the model makes large."""

    def ran(run: Run, given: list[Any]) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        doubles = [one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in given]
        return _flat_tensors(run.run(*doubles, enable_io_processing=False))

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            reference = _unlocked_parts(before, keep, ran(_MaskedDouble(before, keep), flat))
            result = ran(Double(after), renumbered)
    except Exception:  # an operation without float64 form: what was found before stands
        return None
    pairs = zip(result, reference, strict=True)
    fine = all(a.dtype == b.dtype and difference(a, b).relative <= TOLERANCE[torch.float64] for a, b in pairs)
    return (result, reference) if fine else None


AGREED = "no single operation stands out"


def _idle(output: torch.Tensor) -> bool:
    """Whether an output says nothing about what is before it: a last layer of zeros gives every example the same."""
    if output.ndim == 0:
        return False
    if not output.numel():
        return True
    first = output[:1] if output.shape[0] > 1 else output.flatten()[:1]
    return bool((output == first).all())


def _varied(flat: list[Any], seed: int) -> list[Any]:
    """The inputs; one that is the same number everywhere gets noise, as wrong slices would look right on it."""
    random = torch.Generator().manual_seed(seed)

    def vary(value: Any) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
            or value.numel() < 2
            or bool((value != value.flatten()[0]).any())
        ):
            return value
        return value + torch.randn(value.shape, generator=random).to(value)

    return [vary(value) for value in flat]


def tolerance_of(program: Program, dtype: torch.dtype, wide: bool = False) -> float:
    """The relative tolerance: that of the least precise floating point type that is computed in."""
    kinds = {dtype, *(widened(t.dtype) if wide else t.dtype for t in program.tensors.values())}
    return max((TOLERANCE[kind] for kind in kinds if kind in TOLERANCE), default=TOLERANCE[torch.float32])


def flat_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Inputs as the graph's placeholders take them."""
    return list(pytree.tree_leaves((args, dict(kwargs))))


def renumber(before: Program, keep: Mapping[Var, Mask], flat: list[Any]) -> tuple[list[Any], list[Any]]:
    """Inputs for the program before and after its vocabulary was cut: ids that stay, as they were and numbered anew.

    An id that is gone is replaced by one that stays. Without a cut both are the inputs as they are.
    """
    types = before.typing
    rows = types.unlocked.get("vocabulary", ())
    shrink = Shrink(types, keep)
    if not rows or not shrink.touched(rows[0]):
        return flat, flat
    names = [node.name for node in before.nodes if node.op == "placeholder"]
    mask = torch.from_numpy(shrink.mask(rows[0]))
    old, new = list(flat), list(flat)
    at = names.index(str(types.ids))
    left, ids = mask.nonzero()[:, 0].to(flat[at].device), flat[at]
    ids = torch.where(mask.to(ids.device)[ids], ids, left[ids % len(left)].to(ids.dtype))
    old[at], new[at] = ids, torch.searchsorted(left, ids.contiguous()).to(ids.dtype)
    return old, new


def _unlocked_parts(before: Program, keep: Mapping[Var, Mask], outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What is left of each output where the user let an axis of it be cut."""
    types = before.typing
    if not types.unlocked:
        return outputs
    shrink = Shrink(types, keep, hints(before))
    leaves = [leaf for node in before.nodes if node.op == "output" for leaf in pytree.tree_leaves(node.args[0])]
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor)]
    return [shrink.slice(value, types.of(node.name)) for node, value in zip(nodes, outputs, strict=True)]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def locate(
    before: Program,
    after: Program,
    keep: Mapping[Var, Mask],
    flat: list[Any],
    seed: int,
    wide: bool = False,
    renumbered: list[Any] | None = None,
    origins: Mapping[str, str | None] | None = None,
) -> str:
    """The first operation at which the two runs part, in words."""
    shrink = Shrink(before.typing, keep, hints(before))
    values: dict[str, Any] = {}

    def record(kind: type[Run]) -> type[Run]:
        class Recording(kind):  # type: ignore[misc, valid-type]
            def run_node(self, n: fx.Node) -> Any:
                values[n.name] = out = super().run_node(n)
                return out

        return Recording

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        record(Masked)(before, keep, wide).run(*flat, enable_io_processing=False)  # type: ignore[call-arg, arg-type]
        full, values = values, {}
        torch.manual_seed(seed)
        record(Run)(after, wide).run(*(flat if renumbered is None else renumbered), enable_io_processing=False)
    ids = {node.name for node in before.nodes if before.typing.unlocked and not _is_float(node.meta.get("val"))}
    for node in after.nodes:
        origin = (origins or {}).get(node.name, node.name)
        if origin is None:
            continue
        axes = before.typing.axes.get(origin)
        value, expected = values.get(node.name), full.get(origin)
        if not isinstance(axes, tuple) or not isinstance(value, torch.Tensor) or not isinstance(expected, torch.Tensor) or node.name in ids:
            continue
        expected = shrink.slice(expected, axes)
        if (origin, 0) in before.typing.points:
            expected = shrink.renumbered(expected, before.typing.points[origin, 0])
        if expected.shape != value.shape:
            return f"they part at %{node.name}: shapes {list(expected.shape)} and {list(value.shape)}"
        gap = difference(value, expected)
        if gap.relative > tolerance_of(before, value.dtype, wide):
            gone = ", ".join(sorted({str(var) for term in axes for var in shrink.counts if shrink.touched(term)}))
            place = location(node) or "generated"
            where = f"the tensor {node.target}" if node.op == "get_attr" else f"%{node.name} = {op_name(node.target)} ({place})"
            along = f", along {gone or 'no pruned axis'}" if keep else ""
            return f"they part at {where}, off by {gap.max_abs:.3g}{along}"
    return AGREED
