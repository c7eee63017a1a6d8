"""The passes ``lora``, ``merge`` and ``save_lora``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from irprune_passes.lora import Lora, Merge, SaveLora
from irprune_passes.lora.adapters import adapters
from pydantic import ValidationError
from torch import Tensor, nn

from irprune.analysis.groups import discover
from irprune.backend.proof import prove
from irprune.backend.rewrite import remove
from irprune.errors import DataError, ExportError, OptionError, PipelineError, ProofError
from irprune.frontend.export import trace
from irprune.ir.facts import Workspace
from irprune.ir.program import Program, set_tensor
from irprune.ir.text import dump
from irprune.pipeline.instruments import fingerprint
from irprune.pipeline.passes import Facts, Pass
from irprune.rules.infer import typed
from tests import toys


def ran(one: Pass, program: Program, *facts: Any) -> Program:
    """The pass's program; it leaves its input alone and answers the same twice."""
    before = fingerprint(program)
    result = one.run(program, Facts(facts).restricted(one)).program
    assert fingerprint(program) == before
    again = one.run(program, Facts(facts).restricted(one)).program
    assert dump(again) == dump(result)
    assert all(torch.equal(tensor, result.tensors[name]) for name, tensor in again.tensors.items())
    return result


def trained(program: Program, seed: int = 0) -> Program:
    """The same with factors that are not zero."""
    out = typed(program.clone())
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(out):
        for name in (adapter.a, adapter.b):
            set_tensor(out.module, name, torch.randn(out.tensors[name].shape, generator=generator).to(out.tensors[name].dtype) * 0.3)
    return typed(out.clone())


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def outputs(program: Program) -> Tensor:
    args, kwargs = program.interface.example
    with torch.no_grad():
        found = program(*args, **kwargs)
    return found if isinstance(found, Tensor) else found[0]


class Convolutions(nn.Module):
    """Strides, padding by number and by name, dilation and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 12, 3, padding="same", groups=4)
        self.c = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.d = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(self.c(torch.relu(self.b(torch.relu(self.a(x)))))).mean((2, 3)))


class Words(nn.Module):
    """An embedding, a layer that runs twice, and a matrix product with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.matrix = nn.Parameter(torch.empty(6, 8))
        self.bias = nn.Parameter(torch.empty(8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.twice(torch.tanh(self.twice(x)))
        flat = torch.addmm(self.bias, x.view(-1, 6), self.matrix)
        return self.head(torch.relu(flat).view(x.shape[0], x.shape[1], 8))


@functools.cache
def convolutions() -> Program:
    return toys.program(Convolutions().double(), drawn(2, 3, 9, 9, dtype=torch.float64))


@functools.cache
def words() -> Program:
    return toys.program(Words(), torch.arange(10).view(2, 5))


@functools.cache
def attention() -> Program:
    return toys.program(toys.Attention(), drawn(2, 5, 12))


NETS: dict[str, tuple[Callable[[], Program], dict[str, Any]]] = {
    "mlp": (functools.cache(lambda: toys.program(toys.Mlp(), drawn(2, 4))), {}),
    "residual": (functools.cache(lambda: toys.program(toys.Residual(), drawn(2, 4))), {"rslora": True, "init": "gaussian"}),
    "convolutions": (convolutions, {}),
    "words": (words, {"kinds": ["linear", "embedding"]}),
    "attention": (attention, {}),
}


def test_a_linear_layer_gets_an_adapter() -> None:
    program = ran(Lora(r=2, alpha=4, dropout=0.1, targets="fc1"), toys.program(toys.Mlp(), drawn(2, 4)))
    assert dump(program) == "\n".join(
        (
            "input %x : f32[batch, 4]",
            "param @fc1.weight : f32[d0:8, 4]",
            "param @fc1.bias : f32[d0:8]",
            "param @fc2.weight : f32[3, d0:8]",
            "param @fc2.bias : f32[3]",
            "param @fc1.lora_A.weight : f32[2, 4]",
            "param @fc1.lora_B.weight : f32[d0:8, 2]",
            "%linear = linear(%x, @fc1.weight, @fc1.bias) : f32[batch, d0:8]",
            "%dropout = dropout(%x, 0.1, False) : f32[batch, 4]",
            "%linear_2 = linear(%dropout, @fc1.lora_A.weight) : f32[batch, 2]",
            "%linear_3 = linear(%linear_2, @fc1.lora_B.weight) : f32[batch, d0:8]",
            "%mul = mul(%linear_3, 2) : f32[batch, d0:8]",
            "%add = add(%linear, %mul) : f32[batch, d0:8]",
            "%relu = relu(%add) : f32[batch, d0:8]",
            "%linear_1 = linear(%relu, @fc2.weight, @fc2.bias) : f32[batch, 3]",
            "return [%linear_1]",
        )
    )


@pytest.mark.parametrize("name", NETS)
def test_a_new_adapter_changes_nothing_and_a_merged_one_nothing_more(name: str) -> None:
    make, options = NETS[name]
    plain = make()
    adapted = ran(Lora(r=2, **options), plain)
    assert torch.equal(outputs(adapted), outputs(plain))
    tuned = trained(adapted)
    assert (outputs(tuned) - outputs(plain)).abs().max() > 0.01
    merged = ran(Merge(), tuned)
    torch.testing.assert_close(outputs(merged), outputs(tuned))
    assert dump(merged) == dump(plain)


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(sorted(NETS)), seed=st.integers(0, 2**16))
def test_removing_and_merging_commute(name: str, seed: int) -> None:
    make, options = NETS[name]
    adapted = trained(Lora(r=2, **options).run(make(), Facts()).program, seed)
    merged = Merge().run(adapted, Facts()).program
    kept = {}
    rng = np.random.default_rng(seed)
    for group in discover(adapted).prunable:
        kept[group.key] = rng.permutation(group.size) < rng.integers(1, group.size)
    assert kept
    sliced = []
    for program in (adapted, merged):
        masks = {group.var: kept[group.key] for group in discover(program) if group.key in kept}
        assert len(masks) == len(kept), "merging changes no group"
        after = remove(program, masks)
        prove(program, after, masks)
        sliced.append(after)
    late = Merge().run(sliced[0], Facts()).program
    assert dump(late) == dump(sliced[1])
    for tensor, value in sliced[1].tensors.items():
        torch.testing.assert_close(late.tensors[tensor], value)


def test_a_model_of_half_precision_is_merged_in_single_precision() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    program = typed(trace(model, (drawn(2, 4, dtype=torch.bfloat16),)))
    adapted = Lora(r=1, alpha=1, targets="weight").run(program, Facts()).program
    assert {tensor.dtype for tensor in adapted.tensors.values()} == {torch.bfloat16}
    (adapter,) = adapters(adapted)
    # 1 + 0.5 * 0.0137 rounds to 1.0078; the sum of rounded parts in bfloat16 would do so too, that of float32 is seen before rounding.
    set_tensor(adapted.module, adapter.a, torch.full((1, 4), 0.5, dtype=torch.bfloat16))
    set_tensor(adapted.module, adapter.b, torch.full((4, 1), 0.0137, dtype=torch.bfloat16))
    adapted = typed(adapted.clone())
    (adapter,) = adapters(adapted)
    assert adapter.delta(adapted).dtype == torch.float32
    merged = Merge().run(adapted, Facts()).program
    assert torch.equal(merged.tensors["weight"], (1 + adapter.delta(adapted)).bfloat16())


def test_a_wrong_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = trained(Lora(r=2).run(NETS["mlp"][0](), Facts()).program)
    right = type(adapters(adapted)[0]).delta
    monkeypatch.setattr(type(adapters(adapted)[0]), "delta", lambda self, program: 1.1 * right(self, program))
    with pytest.raises(ProofError, match=r"differs .* they part at %linear = aten::linear"):
        Merge().run(adapted, Facts())


def test_a_merge_is_proven_where_no_output_depends_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = NETS["mlp"][0]().clone()
    set_tensor(plain.module, "fc2.weight", torch.zeros(3, 8))
    adapted = trained(Lora(r=2, targets="fc1").run(typed(plain), Facts()).program)
    merged = Merge().run(adapted, Facts()).program
    assert (merged.tensors["fc1.weight"] - plain.tensors["fc1.weight"]).abs().max() > 0.1
    right = type(adapters(adapted)[0]).delta
    monkeypatch.setattr(type(adapters(adapted)[0]), "delta", lambda self, program: 1.1 * right(self, program))
    with pytest.raises(ProofError, match=r"do not depend on the inputs, .* they part at %linear = aten::linear"):
        Merge().run(adapted, Facts())


def test_the_rank_stays_whole_and_the_head_gets_no_adapter() -> None:
    adapted = Lora(r=2).run(attention(), Facts()).program
    groups = discover(adapted)
    assert [group.frozen.code for group in groups if group.frozen and any(str(m).endswith("lora_B.weight:1") for m in group.members)] == [
        "adapter"
    ] * 3
    assert [adapter.site.weight for adapter in adapters(adapted)] == ["q.weight", "k.weight", "v.weight"]
    smaller = remove(adapted, {group.var: np.arange(group.size) > 0 for group in groups.prunable})
    assert {adapter.rank for adapter in adapters(smaller)} == {2}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def test_a_tied_weight_takes_no_adapter() -> None:
    program = toys.program(Tied(), torch.arange(6).view(2, 3))
    adapted = Lora(kinds=("linear", "embedding")).run(program, Facts()).program
    assert [adapter.site.weight for adapter in adapters(adapted)] == ["body.weight"]
    with pytest.raises(OptionError, match=r"target 'head' .*: embed.weight is read by embedding, linear"):
        Lora(targets="head").run(program, Facts())


def test_what_cannot_be_done_says_so(tmp_path: Path) -> None:
    plain = NETS["mlp"][0]()
    adapted = Lora().run(plain, Facts()).program
    with pytest.raises(PipelineError, match="has adapters already"):
        Lora().run(adapted, Facts())
    with pytest.raises(PipelineError, match="no adapters to merge"):
        Merge().run(plain, Facts())
    with pytest.raises(PipelineError, match="no adapters to save"):
        SaveLora().run(plain, Facts([Workspace(tmp_path)]))
    with pytest.raises(OptionError, match=r"target 'fc9' fits no weight .* did you mean 'fc"):
        Lora(targets="fc9").run(plain, Facts())
    with pytest.raises(ExportError, match=r"adapter of b.weight: it belongs to a grouped"):
        SaveLora().run(Lora().run(convolutions(), Facts()).program, Facts([Workspace(tmp_path)]))
    with pytest.raises(DataError, match="configuration cannot be read"):
        Lora(load=tmp_path).run(plain, Facts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"load": "DIR", **one}, rf"`{next(iter(one))}` .* does nothing with `load`")
            for one in ({"r": 4}, {"alpha": 8}, {"dropout": 0.1}, {"targets": "up"}, {"kinds": "conv"}, {"rslora": True}, {"seed": 1})
        ),
        ({"load": "DIR", "init": "gaussian"}, r"`init` .* does nothing with `load`"),
        ({"targets": "up", "kinds": "linear"}, r"`kinds` .* does nothing with `targets`"),
        ({"alpha": float("inf")}, "finite number"),
    ],
)
def test_options_that_do_nothing_or_are_not_finite(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Lora(**options)


def test_saved_adapters_are_loaded(tmp_path: Path) -> None:
    tuned = trained(Lora(r=2, targets=("embed", "twice")).run(words(), Facts()).program)
    SaveLora().run(tuned, Facts([Workspace(tmp_path)]))
    loaded = Lora(load=tmp_path).run(words(), Facts()).program
    torch.testing.assert_close(outputs(loaded), outputs(tuned))
    with pytest.raises(DataError, match=r"no weight that base_model\.model\.embed\.lora_embedding_A fits"):
        Lora(load=tmp_path).run(NETS["mlp"][0](), Facts())
