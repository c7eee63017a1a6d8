"""Published LLaMA shapes on the meta device: every size and no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "LLaMA-70B": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "TinyLlama-1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}

DYNAMIC = {"input_ids": {0: "batch", 1: "sequence"}}


def on_meta(shape: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of a shape, and example inputs by name; both hold no data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], use_cache=False)).eval()
        return model, {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
