"""The kinds found in decoders of several families: as many groups as the configuration says."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from irprune.analysis.groups import discover, summary
from irprune.frontend.export import trace
from irprune.rules.infer import typed

WORDS, WIDTH, HEADS, LAYERS, INNER = 40, 16, 4, 2, 32
GPT = {"vocab_size": WORDS, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
LONG = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": INNER, "vocab_size": WORDS}
# The activation of each; GELU by its tangent is written out as five operations.
MODELS = {
    "gpt2 gelu_new": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=16, bos_token_id=0, eos_token_id=0, **GPT)),
    "gptj gelu_new": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_positions=16, rotary_dim=2, bos_token_id=0, eos_token_id=0, **GPT)),
    "gpt-neox gelu": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**LONG)),
    "phi gelu_new": lambda: hf.PhiForCausalLM(hf.PhiConfig(**LONG)),
    "llama silu": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LONG)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_heads_and_a_feed_forward(name: str) -> None:
    module = MODELS[name]().eval()
    module.config.use_cache = False
    ids = torch.arange(10).reshape(2, 5)
    found = summary(discover(typed(trace(module, (), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}}))))
    assert {kind: found.get(kind) for kind in ("heads", "ffn", "residual")} == {"heads": LAYERS, "ffn": LAYERS, "residual": 1}
