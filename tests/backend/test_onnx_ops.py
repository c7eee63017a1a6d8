"""Operations that the exporter does not know: the file computes what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from irprune.backend.onnx import export
from irprune.backend.runtime import Session
from irprune.frontend.export import trace


class Grouped(nn.Module):
    """Each run of rows times a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, self.weight, ends)


@pytest.mark.parametrize(
    "ends", [[2, 4, 6], [0, 5, 6], [6, 6, 6], [1, 2, 3]], ids=["even", "an-empty-group", "one-group", "rows-left-over"]
)
def test_grouped_matrix_products(ends: list[int], tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.moe")
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    module = Grouped()
    program = trace(module, (rows, torch.tensor([2, 4, 6], dtype=torch.int32)), dynamic={"rows": {0: "rows"}})
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    places = torch.tensor(ends, dtype=torch.int32)
    assert torch.allclose(session(rows, places), module(rows, places), atol=1e-6)
    assert session(rows[:0], places * 0).shape == (0, 5)
