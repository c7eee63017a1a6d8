"""Toy networks. Each shows one idea and is named after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.rules.infer import typed


def program(module: nn.Module, *inputs: Tensor, dynamic: dict[str, dict[int, str]] | None = None, seed: int = 0) -> Program:
    """A traced and typed toy with random weights, norms and biases perturbed."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (0.3 if parameter.ndim == 1 else 0.0))
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return typed(trace(module.eval(), inputs, dynamic=dynamic))


class Mlp(nn.Module):
    """Two linears: the hidden neurons are one group."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, width)
        self.fc2 = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Residual(nn.Module):
    """A skip connection couples both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


class ConcatTwo(nn.Module):
    """Two writers side by side, one reader of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(4, 5)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], -1))


class GroupedConv(nn.Module):
    """Channels of a grouped convolution are ``groups * each``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.c = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class NormedResidual(nn.Module):
    """A layer norm over the residual stream: removable, but not exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary position embedding."""

    def __init__(self, heads: int = 4, kv: int = 2, width: int = 8, model: int = 12) -> None:
        super().__init__()
        self.heads, self.kv, self.width = heads, kv, width
        self.q = nn.Linear(model, heads * width)
        self.k = nn.Linear(model, kv * width)
        self.v = nn.Linear(model, kv * width)
        self.o = nn.Linear(heads * width, model)
        self.register_buffer("frequency", 1.0 / 100 ** (torch.arange(0, width, 2) / width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv, self.width).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv, self.width).transpose(1, 2)
        angle = torch.arange(length)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)

        def rotate(t: Tensor) -> Tensor:
            half = self.width // 2
            return t * angle.cos() + torch.cat([-t[..., half:], t[..., :half]], -1) * angle.sin()

        repeat = self.heads // self.kv
        k = rotate(k)[:, :, None].expand(batch, self.kv, repeat, length, self.width).reshape(batch, self.heads, length, self.width)
        v = v[:, :, None].expand(batch, self.kv, repeat, length, self.width).reshape(batch, self.heads, length, self.width)
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, self.heads * self.width))
