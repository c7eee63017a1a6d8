"""Models for the tests of ONNX files: each has another form of call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.rules.infer import typed

torch.set_num_threads(1)


class Records(nn.Module):
    """Positional, keyword and constant arguments; nested, repeated, passed-through and constant results."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.outer = nn.Linear(8, 3)
        self.offset = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, unused: Tensor, times: int = 1, *, mask: Tensor, extra: Tensor | None = None) -> dict[str, Any]:
        hidden = self.inner(x).relu() * mask
        scores = self.outer(hidden) * times
        return {
            "scores": scores,
            "again": scores,
            "x": x,
            "nothing": extra,
            "count": x.shape[0],
            "seven": 7,
            "offset": self.offset,
            "positive": scores > 0,
            "pair": (hidden.sum(-1), scores.argmax(-1)),
        }


@functools.cache
def records() -> Program:
    torch.manual_seed(0)
    return trace(Records(), (torch.randn(3, 4), torch.randn(2), 2), {"mask": torch.ones(3, 1), "extra": None})


@functools.cache
def cnn() -> Program:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return typed(trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)).eval(), (torch.randn(2, 3, 12, 12),)))


@functools.cache
def llama() -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    ids = torch.randint(64, (2, 10))
    axes = {0: "batch", 1: "sequence"}
    model = LlamaForCausalLM(config).eval()
    return typed(trace(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": axes, "attention_mask": axes}))
