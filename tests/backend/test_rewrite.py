from __future__ import annotations

import numpy as np
import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend.proof import prove
from irprune.backend.rewrite import remove
from irprune.frontend.export import trace
from irprune.ir.dims import Mask, Var
from irprune.ir.program import Program
from irprune.ir.text import dump
from irprune.rules.infer import typed
from irprune.rules.registry import registry, rule

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def _first_goes(program: Program, kind: str | None = None) -> dict[Var, Mask]:
    chosen = [group for group in discover(program).prunable if kind is None or group.kind == kind]
    assert chosen
    return {group.var: np.arange(group.size) > 0 for group in chosen}


def test_the_input_is_not_touched_and_whole_tensors_are_shared() -> None:
    program = toys.program(toys.Residual(), X)
    text = dump(program)
    state = {name: (tensor._version, tensor.clone()) for name, tensor in program.tensors.items()}
    smaller = remove(program, _first_goes(program, "ffn"))
    assert dump(program) == text
    for name, (version, value) in state.items():
        assert program.tensors[name]._version == version
        assert torch.equal(program.tensors[name], value)
    assert smaller.tensors["stem.weight"] is program.tensors["stem.weight"]
    assert smaller.tensors["fc1.weight"].shape == (7, 6)


def test_nothing_removed_is_the_same_program() -> None:
    program = toys.program(toys.Mlp(), X)
    assert remove(program, {group.var: np.ones(group.size, dtype=bool) for group in discover(program).prunable}) is program


def test_dynamic_axes_stay_dynamic() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 16) for _ in range(4))
            self.o = nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, 4, 4).transpose(1, 2).reshape(b * 4, t, 4) for f in (self.q, self.k, self.v))
            y = (q @ k.transpose(1, 2)).softmax(-1) @ v
            return self.o(y.view(b, 4, t, 4).transpose(1, 2).reshape(b, t, 16))

    program = toys.program(Sequence(), torch.randn(2, 5, 6), dynamic={"x": {0: "batch", 1: "length"}})
    keep = _first_goes(program)
    smaller = remove(program, keep)
    prove(program, smaller, keep)
    for batch, length in ((1, 3), (4, 9)):
        assert smaller(torch.randn(batch, length, 6)).shape == (batch, length, 6)
    assert "floordiv" in str(smaller.module.graph)  # batch * heads is computed, and its heads have shrunk


def test_a_tied_weight_is_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh())

    program = toys.program(Tied(), torch.tensor([[1, 2], [3, 4]]))
    keep = _first_goes(program)
    smaller = remove(program, keep)
    prove(program, smaller, keep)
    assert [tuple(t.shape) for t in smaller.tensors.values()] == [(7, 5)]


def test_a_module_that_is_called_twice_shrinks_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(self.stem(x)).relu()).relu())

    program = toys.program(Twice(), X)
    keep = _first_goes(program)
    smaller = remove(program, keep)
    prove(program, smaller, keep)
    assert smaller.tensors["block.weight"].shape == (5, 5)


def test_half_precision() -> None:
    module = toys.Attention().to(torch.bfloat16)
    program = typed(trace(module.eval(), (torch.randn(2, 5, 12, dtype=torch.bfloat16),), dynamic={}))
    keep = _first_goes(program, "heads")
    smaller = remove(program, keep)
    assert prove(program, smaller, keep)["numbers"]["max_abs_err"] <= 0.06
    assert {tensor.dtype for name, tensor in smaller.tensors.items() if name != "frequency"} == {torch.bfloat16}


def test_without_weights_shapes_are_proven() -> None:
    with torch.device("meta"):
        module = toys.Mlp()
    program = typed(trace(module.eval(), (torch.empty(2, 4, device="meta"),)))
    keep = _first_goes(program)
    checks = prove(program, remove(program, keep), keep)
    assert checks["shapes"]
    assert checks["numbers"]["max_abs_err"] is None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from([toys.Mlp, toys.Residual, toys.ConcatTwo, toys.NormedResidual]))
def test_costs_are_those_of_the_smaller_program(data: st.DataObject, toy: type[nn.Module]) -> None:
    """The cost model knows parameters, multiply-accumulates and bytes before anything is removed (U12)."""
    program = toys.program(toy(), X)
    keep = {}
    for group in discover(program).prunable:
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size)))
        if mask.any():
            keep[group.var] = mask
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    before, after = Cost(program), Cost(remove(program, keep))
    assert before.params(counts) == after.params()
    assert before.macs(counts) == after.macs()
    assert before.bytes(counts) == after.bytes()


# -- operations without a rule --------------------------------------------------------------------


@pytest.fixture(scope="module")
def scale() -> str:
    """A custom operation: ``x * factors`` along the last axis."""
    library = torch.library.Library("irprune_test", "FRAGMENT")
    library.define("scale(Tensor x, Tensor factors) -> Tensor")
    library.impl("scale", lambda x, factors: x * factors, "CompositeExplicitAutograd")
    torch.library.register_fake("irprune_test::scale", lambda x, factors: torch.empty_like(x), lib=library)
    globals()["_library"] = library
    return "irprune_test::scale"


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.factors = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.ops.irprune_test.scale(self.a(x), self.factors)).relu())


def test_an_unknown_operation_freezes_what_it_touches_and_no_more(scale: str) -> None:
    program = toys.program(Custom(), X)
    groups = discover(program)
    assert [(g.size, g.frozen.code) for g in groups if g.frozen and g.frozen.code == "no-rule"] == [
        (6, "no-rule"),
        (6, "no-rule"),
        (6, "no-rule"),
    ]
    assert [g.size for g in groups.prunable] == [5]
    (diagnostic,) = program.typing.diagnostics
    assert diagnostic.freeze.message == f"operation {scale} has no rule"
    keep = _first_goes(program)
    prove(program, remove(program, keep), keep)


def test_one_decorated_function_makes_it_prunable(scale: str) -> None:
    @rule(scale)
    def infer(op, x, factors):  # type: ignore[no-untyped-def]
        op.unify(x.axes[-1], factors.axes[0])
        return x.axes

    try:
        program = toys.program(Custom(), X)
        assert not program.typing.diagnostics
        assert sorted(g.size for g in discover(program).prunable) == [5, 6]
        keep = _first_goes(program)
        prove(program, remove(program, keep), keep)
    finally:
        del registry()._rules[scale]
