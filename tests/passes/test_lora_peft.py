"""Adapters in PEFT's format, against the package ``peft`` itself."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from irprune_passes.lora import Lora, Merge, SaveLora
from irprune_passes.lora import peft as peft_files
from irprune_passes.lora.adapters import adapters
from test_lora import trained
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from irprune.analysis.groups import discover
from irprune.backend.rewrite import remove
from irprune.errors import DataError
from irprune.frontend.export import trace
from irprune.ir.facts import Workspace
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts
from irprune.rules.infer import typed

peft = pytest.importorskip("peft", reason="the extra irprune[peft] is not installed: exchange with PEFT is not tested")

IDS = torch.arange(12).view(2, 6)
LLAMA = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@functools.cache
def llama(intermediate: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, intermediate_size=intermediate, use_cache=False)).eval()


@functools.cache
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


@functools.cache
def program_of(name: str) -> Program:
    return traced(MODELS[name]())


def traced(model: Any) -> Program:
    return typed(trace(model, (), {"input_ids": IDS}, {"input_ids": {0: "batch", 1: "sequence"}}, outputs=["logits"]))


def logits(program: Program) -> torch.Tensor:
    with torch.no_grad():
        (found,) = torch.utils._pytree.tree_leaves(program(input_ids=IDS))
    return found


def of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tuned(model: Any, **options: Any) -> Any:
    """The model with adapters that PEFT has made and trained for two steps."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    optimiser = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    return adapted.eval()


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    program = trained(Lora(r=3, alpha=5, rslora=True).run(program_of(name), Facts()).program)
    SaveLora().run(program, Facts([Workspace(tmp_path)]))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(MODELS[name]()), tmp_path).eval()
    assert (logits(program) - of(MODELS[name]())).abs().max() > 0.01
    torch.testing.assert_close(of(loaded), logits(program), atol=1e-5, rtol=1e-4)
    assert sum("lora_A" in key for key in loaded.state_dict()) == len(adapters(program))


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_saves_is_loaded(name: str, tmp_path: Path) -> None:
    options = {
        "llama": {
            "target_modules": ["q_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        },
        "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
    }[name]
    model = tuned(MODELS[name](), r=4, lora_alpha=6, **options)
    model.save_pretrained(tmp_path)
    program = Lora(load=tmp_path).run(program_of(name), Facts()).program
    torch.testing.assert_close(logits(program), of(model), atol=1e-5, rtol=1e-4)


def test_a_pruned_model_is_tuned_by_peft(tmp_path: Path) -> None:
    plain = program_of("llama")
    groups = discover(plain)
    keep = {group.var: np.arange(group.size) % 3 > 0 for group in groups.prunable if group.kind == "ffn"}
    assert [len(mask) for mask in keep.values()] == [24, 24]
    pruned = remove(plain, keep)
    resized = LlamaForCausalLM(LlamaConfig(**LLAMA, intermediate_size=16, use_cache=False)).eval()
    state = {name: tensor for name, tensor in pruned.tensors.items() if name in resized.state_dict()}
    assert not resized.load_state_dict(state, strict=False).missing_keys
    torch.testing.assert_close(of(resized), logits(pruned))
    model = tuned(resized, r=4, target_modules=["gate_proj", "down_proj", "v_proj"])
    model.save_pretrained(tmp_path)
    adapted = Lora(load=tmp_path).run(pruned, Facts()).program
    torch.testing.assert_close(logits(adapted), of(model), atol=1e-5, rtol=1e-4)
    merged = Merge().run(adapted, Facts()).program
    torch.testing.assert_close(logits(merged), of(model.merge_and_unload()), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match=r"the adapter of model\.layers\.0\.mlp\.gate_proj\.weight has factors"):
        Lora(load=tmp_path).run(plain, Facts())


def test_adapters_of_a_traced_peft_model_are_merged() -> None:
    model = tuned(llama(), r=4, target_modules=["q_proj", "up_proj"])
    program = traced(model)
    merged = Merge().run(program, Facts()).program
    assert len(adapters(program)) == 4
    assert not any("lora" in name for name in merged.tensors)
    torch.testing.assert_close(logits(merged), of(model), atol=1e-5, rtol=1e-4)


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    tuned(llama(), r=4, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the adapter has use_dora=True"):
        Lora(load=tmp_path).run(program_of("llama"), Facts())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_changed_the_base_weights_are_refused(start: str, tmp_path: Path) -> None:
    """PEFT takes the start out of the base weights again when it loads them; on the weights as they are the adapter is wrong."""
    tuned(llama(), r=4, target_modules=["q_proj"], init_lora_weights=start).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"the adapter has init_lora_weights='{start}', which is not plain LoRA"):
        Lora(load=tmp_path).run(program_of("llama"), Facts())


def test_a_variant_that_is_not_known_yet_is_refused(tmp_path: Path) -> None:
    tuned(llama(), r=4, target_modules=["q_proj"], init_lora_weights="orthogonal").save_pretrained(tmp_path)
    assert len(list(peft_files.read(tmp_path, program_of("llama")))) > 0
    file = tmp_path / peft_files.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_something_new": True}))
    with pytest.raises(DataError, match="the adapter has use_something_new=True"):
        Lora(load=tmp_path).run(program_of("llama"), Facts())
