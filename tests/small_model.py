"""A model file for tests: a convolution, a norm and two linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        return self.head(torch.relu(self.hidden(features)))


def model() -> nn.Module:
    return Small()


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 1, 6, 6),)


def calibration() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(2):
        yield torch.randn(4, 1, 6, 6), torch.randint(3, (4,))


def loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def evaluate(predict: Callable[..., Any]) -> dict[str, float]:
    images = torch.randn(16, 1, 6, 6)
    return {"first class": float((predict(images).argmax(1) == 0).float().mean())}
