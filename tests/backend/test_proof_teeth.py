"""Validation has teeth: every deliberate fault in a rule, a rewrite or a mask is caught.

Each test breaks one thing, prunes a toy whose proof passes unbroken, and sees the proof refuse.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

from irprune.analysis.groups import discover
from irprune.backend import rewrite
from irprune.backend.proof import prove
from irprune.backend.rewrite import Resize, Shrink, remove
from irprune.errors import ProofError
from irprune.ir.dims import Mask, Var, concat
from irprune.ir.program import Program, set_tensor
from irprune.rules.infer import typed
from irprune.rules.registry import registry


class Transposed(nn.Module):
    """Two axes of one size change places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.mix = nn.Parameter(torch.empty(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = (y[:, :, None] * self.mix).transpose(1, 2)
        return self.head(z.sum(2))


class Halves(nn.Module):
    """Two different halves of one axis, put together again the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(torch.cat([y[:, 4:], y[:, :4].tanh()], 1))


class Splits(nn.Module):
    """Blocks of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 9)
        self.p, self.q = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).split([5, 4], -1)
        return self.p(a.relu()) + self.q(b.tanh())


class SelfAttention(nn.Module):
    """Four heads of width four; the default scale."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 5, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16))


class Softmax(nn.Module):
    """A softmax and a mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).softmax(-1)
        z = self.b(y)
        return self.head(z - z.mean(-1, keepdim=True))


class BatchNormed(nn.Module):
    """Running statistics go with their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu())


X = torch.linspace(-1, 1, 8).reshape(2, 4)
SEQUENCE = torch.linspace(-2, 2, 60).sin().reshape(2, 5, 6)


def _keep(program: Program) -> dict[Var, Mask]:
    """Every prunable group loses indices of its own; equal masks would hide that two groups are mixed up."""
    random = np.random.default_rng(0)
    out = {}
    for group in discover(program).prunable:
        mask = np.ones(group.size, dtype=bool)
        mask[random.permutation(group.size)[: max(1, group.size // 3)]] = False
        if mask.any():
            out[group.var] = mask
    return out


def _proof(program: Program) -> None:
    keep = _keep(program)
    assert keep, "the toy has something to prune"
    prove(program, remove(program, keep), keep)


@contextmanager
def _rule(name: str, **functions: Any) -> Iterator[None]:
    """Other functions for an operation's rule, for the duration of a block."""
    rules = registry()._rules
    was = rules[f"aten::{name}"]
    rules[f"aten::{name}"] = dataclasses.replace(was, **functions)
    try:
        yield
    finally:
        rules[f"aten::{name}"] = was


def _infer(name: str) -> Callable[..., Any]:
    entry = registry()._rules[f"aten::{name}"]
    assert entry.infer is not None
    return entry.infer


def _without(event: str) -> Callable[..., Any]:
    """The rule of an operation that forgets to say that it mixes."""
    infer = _infer(event)

    def forgetful(op: Any, **arguments: Any) -> Any:
        op.mix = lambda *_: None
        return infer(op, **arguments)

    forgetful.__signature__ = inspect.signature(infer)  # type: ignore[attr-defined]
    return forgetful


TOYS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transposed": (Transposed, X),
    "halves": (Halves, X),
    "splits": (Splits, X),
    "attention": (SelfAttention, SEQUENCE),
    "rotary": (lambda: toys.Attention(4, 2, 8, 6), SEQUENCE),
    "softmax": (Softmax, X),
    "batch_norm": (BatchNormed, torch.linspace(-1, 1, 30).reshape(2, 3, 5)),
    "grouped": (toys.GroupedConv, torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)),
    "layer_norm": (toys.NormedResidual, X),
    "concat": (toys.ConcatTwo, X),
    "mlp": (toys.Mlp, X),
}


def _toy(name: str) -> Program:
    build, x = TOYS[name]
    return toys.program(build(), x, dynamic={})


@pytest.mark.parametrize("name", TOYS)
def test_unbroken_toys_are_proven(name: str) -> None:
    _proof(_toy(name))


# -- rules ------------------------------------------------------------------------------------------

RULES: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "transpose keeps the order": ("transposed", "transpose", lambda: {"infer": lambda op, self: self.axes}),
    "cat in the wrong order": (
        "halves",
        "cat",
        lambda: {"infer": lambda op, tensors: (tensors[0].axes[0], concat([t.axes[-1] for t in reversed(tensors)]))},
    ),
    "softmax does not mix": ("softmax", "softmax", lambda: {"infer": _without("softmax")}),
    "mean does not mix": ("softmax", "mean", lambda: {"infer": _without("mean")}),
    "layer norm does not mix": ("layer_norm", "layer_norm", lambda: {"infer": _without("layer_norm")}),
    "slice bounds stay": ("halves", "slice", lambda: {"resize": None}),
    "split sizes stay": ("splits", "split_with_sizes", lambda: {"resize": None}),
    "groups of a convolution stay": ("grouped", "conv2d", lambda: {"resize": None}),
    "sizes of a view stay": ("attention", "view", lambda: {"resize": None}),
    "sizes of an expand stay": ("rotary", "expand", lambda: {"resize": None}),
    "the default scale is not pinned": ("attention", "scaled_dot_product_attention", lambda: {"resize": None}),
    "layer norm keeps its shape": ("layer_norm", "layer_norm", lambda: {"resize": None}),
    "softmax is compared unmasked": (
        "softmax",
        "softmax",
        lambda: {"renormalise": lambda keep, self, dim: self.softmax(dim)},
    ),
    "mean is compared unmasked": (
        "softmax",
        "mean",
        lambda: {"renormalise": lambda keep, self, dim, keepdim: self.mean(dim, keepdim)},
    ),
}


@pytest.mark.parametrize("fault", RULES)
def test_a_broken_rule_is_caught(fault: str) -> None:
    toy, operation, functions = RULES[fault]
    program = _toy(toy)
    with _rule(operation, **functions()), pytest.raises(ProofError):
        _proof(typed(dataclasses.replace(program, types=None)))


@pytest.mark.parametrize("fault", ["softmax is compared unmasked", "mean does not mix", "cat in the wrong order"])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_a_broken_rule_is_caught_behind_a_head_of_zeros(fault: str, bias: float) -> None:
    """The outputs agree whatever stands before: the proof looks at the inner values."""
    toy, operation, functions = RULES[fault]
    program = _toy(toy)
    set_tensor(program.module, "head.weight", torch.zeros_like(program.tensors["head.weight"]))
    set_tensor(program.module, "head.bias", torch.full_like(program.tensors["head.bias"], bias))
    program = dataclasses.replace(program, types=typed(program).types)
    _proof(program)
    with _rule(operation, **functions()), pytest.raises(ProofError, match="inner values"):
        _proof(typed(dataclasses.replace(program, types=None)))


# -- rewrites and masks ------------------------------------------------------------------------------


def _swap_two(tensor: Tensor, dim: int) -> Tensor:
    index = torch.arange(tensor.shape[dim])
    index[[0, 1]] = index[[1, 0]]
    return tensor.index_select(dim, index)


TENSORS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "rows of a weight change places": ("mlp", "fc1.weight", lambda t: _swap_two(t, 0)),
    "columns of a reader change places": ("mlp", "fc2.weight", lambda t: _swap_two(t, 1)),
    "a bias is off by one": ("mlp", "fc1.bias", lambda t: t.roll(1)),
    "statistics are of other channels": ("batch_norm", "norm.running_var", lambda t: t.flip(0)),
    "a frequency is of another pair": ("rotary", "frequency", lambda t: t.flip(0)),
    "one weight differs in one place": (
        "concat",
        "head.weight",
        lambda t: t + 0.01 * torch.nn.functional.one_hot(torch.tensor(2), t.shape[1]),
    ),
    "a tensor has one index too many": ("mlp", "fc1.bias", lambda t: torch.cat([t, t[:1]])),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_wrongly_sliced_tensor_is_caught(fault: str) -> None:
    toy, name, change = TENSORS[fault]
    program = _toy(toy)
    keep = _keep(program)
    smaller = remove(program, keep)
    broken = smaller.clone()
    set_tensor(broken.module, name, change(smaller.tensors[name].detach()))
    with pytest.raises(ProofError):
        prove(program, typed(broken), keep)


def test_a_plan_for_other_indices_is_caught() -> None:
    program = _toy("mlp")
    keep = _keep(program)
    smaller = remove(program, keep)
    with pytest.raises(ProofError, match="differs from the masked original"):
        prove(program, smaller, {var: np.roll(mask, 1) for var, mask in keep.items()})


def test_a_mask_that_misses_one_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _toy("mlp")
    sliced = Shrink.slice
    monkeypatch.setattr(Shrink, "slice", lambda self, tensor, axes: tensor if tensor.shape == (8,) else sliced(self, tensor, axes))
    with pytest.raises(ProofError):
        _proof(program)


def test_a_boundary_that_moves_one_too_far_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    position = Resize.position
    monkeypatch.setattr(Resize, "position", lambda self, name, dim, index: position(self, name, dim, index) + (index == 4))
    with pytest.raises(ProofError):
        _proof(_toy("halves"))


def test_a_constant_that_is_not_sliced_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.arange(6).cos())

    program = toys.program(Fixed(), X, dynamic={})
    _proof(program)
    monkeypatch.setattr(rewrite, "_slice_constants", lambda *_: {})
    with pytest.raises(ProofError):
        _proof(program)


# -- the interface ------------------------------------------------------------------------------------


def _edited(edit: Callable[[torch.fx.Graph], None]) -> tuple[Program, Program, dict[Var, Mask]]:
    program = _toy("mlp")
    keep = _keep(program)
    smaller = remove(program, keep).clone()
    edit(smaller.module.graph)
    smaller.module.recompile()
    return program, typed(smaller), keep


def test_a_dropped_input_is_caught() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + y

    program = toys.program(Two(), X, torch.ones(2, 3), dynamic={"x": {}, "y": {}})
    keep = _keep(program)
    smaller = remove(program, keep).clone()
    graph = smaller.module.graph
    output, dropped = graph.output_node(), next(node for node in graph.nodes if node.name == "y")
    total = output.all_input_nodes[0]
    output.replace_input_with(total, total.all_input_nodes[0])
    graph.erase_node(total)
    graph.erase_node(dropped)
    with pytest.raises(ProofError, match="inputs changed"):
        prove(program, typed(smaller), keep)


def test_a_dropped_output_is_caught() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).relu()
            return self.b(h), self.c(h)

    program = toys.program(Two(), X, dynamic={"x": {}})
    keep = _keep(program)
    smaller = remove(program, keep).clone()
    output = smaller.module.graph.output_node()
    output.args = (output.args[0][:1],)  # type: ignore[index]
    with pytest.raises(ProofError, match="number of outputs changed from 2 to 1"):
        prove(program, typed(smaller), keep)


def test_another_dtype_of_the_output_is_caught() -> None:
    def cast(graph: torch.fx.Graph) -> None:
        output = graph.output_node()
        value = output.all_input_nodes[0]
        with graph.inserting_before(output):
            half = graph.call_function(torch.ops.aten.to.dtype, (value, torch.float16))
        half.meta = {**value.meta, "val": value.meta["val"].to(torch.float16)}
        output.replace_input_with(value, half)

    with pytest.raises(ProofError, match="output"):
        prove(*_edited(cast))


def test_a_renamed_input_is_caught() -> None:
    def rename(graph: torch.fx.Graph) -> None:
        next(node for node in graph.nodes if node.op == "placeholder").name = "other"

    with pytest.raises(ProofError, match="inputs changed"):
        prove(*_edited(rename))


def test_the_error_names_the_tensor_where_the_runs_part() -> None:
    program = _toy("mlp")
    keep = _keep(program)
    smaller = remove(program, keep)
    broken = smaller.clone()
    set_tensor(broken.module, "fc1.bias", smaller.tensors["fc1.bias"].detach() + 1)
    with pytest.raises(ProofError, match=r"they part at the tensor fc1\.bias, off by 1"):
        prove(program, typed(broken), keep)


def test_the_error_names_the_operation_and_the_line_where_the_runs_part() -> None:
    program = _toy("attention")
    with _rule("scaled_dot_product_attention", resize=None), pytest.raises(ProofError) as caught:
        _proof(program)
    assert "they part at %scaled_dot_product_attention = aten::scaled_dot_product_attention" in str(caught.value)
    assert "test_proof_teeth.py:" in str(caught.value)


# -- what the comparison runs on ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.0, 1.0])
@pytest.mark.parametrize("fault", [fault for fault, (toy, _, _) in TENSORS.items() if toy == "mlp"])
def test_constant_example_inputs_hide_nothing(fault: str, number: float) -> None:
    """On zeros the rows of the first weight could be in any order."""
    _, name, change = TENSORS[fault]
    program = toys.program(toys.Mlp(), torch.full((2, 4), number), dynamic={})
    keep = _keep(program)
    smaller = remove(program, keep)
    prove(program, smaller, keep)
    set_tensor(smaller.module, name, change(smaller.tensors[name].detach()))
    broken = typed(smaller.clone())
    with pytest.raises(ProofError):
        prove(program, broken, keep)


def test_outputs_without_numbers_prove_nothing() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (-self.b(self.a(x)).square() - 1).log()

    with pytest.raises(ProofError, match="NaN everywhere"):
        _proof(toys.program(Logarithm(), X, dynamic={}))


def test_infinite_outputs_are_compared() -> None:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).masked_fill(torch.tensor([True, False, False]), -torch.inf)

    program = toys.program(Masking(), X, dynamic={})
    _proof(program)
    keep = _keep(program)
    smaller = remove(program, keep)
    set_tensor(smaller.module, "b.bias", smaller.tensors["b.bias"].detach().roll(1))
    with pytest.raises(ProofError, match="differs from the masked original"):
        prove(program, typed(smaller.clone()), keep)


def test_complex_outputs_are_compared_with_a_tolerance() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(self.b(self.a(x).relu()), x[:, :3])

    _proof(toys.program(Spectrum(), X, dynamic={}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fault", ["rows of a weight change places", "a bias is off by one", "a frequency is of another pair"])
def test_half_precision_hides_no_wrong_slice(fault: str, dtype: torch.dtype) -> None:
    toy, name, change = TENSORS[fault]
    build, x = TOYS[toy]
    program = toys.program(build().to(dtype), x.to(dtype), dynamic={})
    keep = _keep(program)
    smaller = remove(program, keep)
    numbers = prove(program, smaller, keep)["numbers"]
    assert numbers["tolerance"] < 1e-3 * numbers["scale"]  # that of float32: rounding to half would hide small faults
    set_tensor(smaller.module, name, change(smaller.tensors[name].detach()))
    with pytest.raises(ProofError):
        prove(program, typed(smaller.clone()), keep)
