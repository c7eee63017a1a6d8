"""Networks written as one function, and what every removal from them must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend.proof import difference, flat_inputs, locate, prove
from irprune.backend.rewrite import remove
from irprune.frontend.export import trace
from irprune.ir.dims import Mask, Var
from irprune.ir.facts import Group, Groups
from irprune.ir.program import Program
from irprune.rules.infer import typed


class Net(nn.Module):
    """A network written as one function ``fn(net, *inputs)``.

    Layers are made at their first call and named by kind and number (``linear0``, ``conv1``), in
    float64, in evaluation mode, with random weights and statistics that do not depend on torch's seed.
    """

    def __init__(self, fn: Callable[..., Any], *inputs: Tensor, seed: int = 0) -> None:
        super().__init__()
        self.fn = fn
        self._calls: dict[str, int] = {}
        self._random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self(*inputs)

    def forward(self, *inputs: Tensor) -> Any:
        self._calls.clear()
        return self.fn(self, *inputs)

    def _next(self, kind: str) -> str:
        number = self._calls.get(kind, 0)
        self._calls[kind] = number + 1
        return f"{kind}{number}"

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64) * 0.5

    def layer(self, make: Callable[[], nn.Module], kind: str = "layer", name: str | None = None) -> nn.Module:
        """The layer of this place in the network. A name gives the same layer wherever it is asked for."""
        name = name or self._next(kind)
        if not hasattr(self, name):
            module = make().double().eval()
            with torch.no_grad():
                for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(self._draw(*tensor.shape))
                        if "running_var" in key:
                            tensor.abs_().add_(0.5)
            self.add_module(name, module)
        return self.get_submodule(name)

    def linear(self, x: Tensor, width: int, *, bias: bool = True) -> Tensor:
        return self.layer(lambda: nn.Linear(x.shape[-1], width, bias), "linear")(x)

    def conv(self, x: Tensor, width: int, kernel: int = 1, *, rank: int = 2, transposed: bool = False, **options: Any) -> Tensor:
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
        return self.layer(lambda: kind(x.shape[1], width, kernel, **options), "conv")(x)

    def parameter(self, *shape: int) -> Tensor:
        name = self._next("parameter")
        if not hasattr(self, name):
            self.register_parameter(name, nn.Parameter(self._draw(*shape)))
        return self.get_parameter(name)

    def buffer(self, *shape: int) -> Tensor:
        name = self._next("buffer")
        if not hasattr(self, name):
            self.register_buffer(name, self._draw(*shape))
        return self.get_buffer(name)

    def indices(self, count: int) -> Tensor:
        """A buffer with a random order of so many positions."""
        name = self._next("order")
        if not hasattr(self, name):
            self.register_buffer(name, torch.randperm(count, generator=self._random))
        return self.get_buffer(name)


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(fn: Callable[..., Any], *inputs: Tensor, dynamic: Mapping[str, Mapping[int, str]] | None = None) -> Program:
    """A traced and typed network."""
    return typed(trace(Net(fn, *inputs), inputs, dynamic=dynamic))


def text(groups: Groups) -> str:
    """The prunable groups: kind, size, and ``~`` where something mixes along it."""
    return " ".join(f"{group.kind}:{group.size}{'' if group.exact else '~'}" for group in groups.prunable)


def masks(groups: Iterable[Group], seed: int, least: int = 1) -> dict[Var, Mask]:
    """A random keep mask for each group that leaves at least ``least`` indices and removes something."""
    rng = np.random.default_rng(seed)
    out = {}
    for group in groups:
        count = int(rng.integers(min(max(least, group.least), group.size - 1), group.size))
        mask = np.zeros(group.size, dtype=bool)
        mask[rng.choice(group.size, count, replace=False)] = True
        out[group.var] = mask
    return out


def few_left(groups: Iterable[Group], seed: int, count: int = 1) -> dict[Var, Mask]:
    """Masks that leave ``count`` random indices of each group."""
    rng = np.random.default_rng(seed)
    return {group.var: rng.permutation(group.size) < max(count, group.least) for group in groups}


def check(program: Program, keep: Mapping[Var, Mask], *, stepwise: bool = True) -> Program:
    """Remove and prove; every operation (if stepwise), not only the outputs, and the cost must be as predicted."""
    after = remove(program, keep)
    prove(program, after, keep)
    if stepwise:
        flat = flat_inputs(program, *program.interface.example)
        assert locate(program, after, keep, flat, 0) == "no single operation stands out"
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    before, now = Cost(program), Cost(after)
    folded = set(after.tensors) - set(program.tensors)  # constants that are computed before the program runs
    for unit in ("params", "macs", *(() if folded else ("bytes",))):
        assert before.of(unit, counts) == now.of(unit), unit
    return after


def check_all(program: Program, groups: Groups, *, stepwise: bool = True, least: int = 1) -> None:
    """Every prunable group alone where they are few, all together, and all together down to ``least`` indices."""
    few = groups.prunable if 1 < len(groups.prunable) < 5 else ()
    plans = [masks([group], seed, least) for seed, group in enumerate(few)]
    plans += [masks(groups.prunable, 100, least), few_left(groups.prunable, 101, least)]
    for keep in plans:
        check(program, keep, stepwise=stepwise)


class Zeroed(fx.Interpreter):
    """A program with tensor positions set to zero: what *exact* speaks of, told without any op rule."""

    def __init__(self, program: Program, groups: Iterable[Group], keep: Mapping[Var, Mask]) -> None:
        super().__init__(program.module)
        self._members = [(member, ~keep[group.var]) for group in groups for member in group.members]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs).detach().clone()
        for member, gone in self._members:
            for positions in member.maps if member.tensor == target else ():
                at = np.flatnonzero((positions >= 0) & gone[positions])
                value.index_fill_(member.axis, torch.from_numpy(at), 0)
        return value


def check_zeroing(program: Program, groups: Groups, seed: int = 0) -> None:
    """Removing indices of exact groups is the same as zeroing everything that carries them."""
    exact = [group for group in groups.prunable if group.exact]
    keep = masks(exact, seed)
    after = remove(program, keep)
    flat = flat_inputs(program, *program.interface.example)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = Zeroed(program, exact, keep).run(*flat, enable_io_processing=False)
        torch.manual_seed(seed)
        found = fx.Interpreter(after.module).run(*flat, enable_io_processing=False)
    for value, reference in zip(_leaves(found), _leaves(expected), strict=True):
        gap = difference(value, reference)
        assert gap.relative < 1e-9, f"zeroing and removing differ by {gap.max_abs:.3g}"


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


__all__ = ["Net", "check", "check_all", "check_zeroing", "discover", "few_left", "masks", "net", "tensor", "text"]
