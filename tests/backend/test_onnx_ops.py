"""Operations that the exporter does not know: the file computes what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn
from torch.export import ExportedProgram

from irprune.backend.onnx import export
from irprune.backend.onnx_ops import quick_rules
from irprune.backend.runtime import Session
from irprune.frontend.export import trace
from irprune.ir.program import Program


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


class Operators(nn.Module):
    """Casts in each of their forms, logic of masks and of integers, differences."""

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        seen, odd = ids > 2, ids.to(torch.bool) & (ids != 3)
        return (
            x.to(torch.float64).to(x.device, torch.float32) + ids.to(dtype=torch.float32, device="cpu"),
            seen & odd | (seen ^ odd),
            ids & 6 | 1,
            (ids & ids.flip(0)) ^ ids,
            ids.diff(dim=1, prepend=ids[:, :1] - 1),
            seen.diff(),
            x.diff(dim=0, append=x[:1]),
            x.diff(2) + x.diff(0)[:, 2:],
            seen.diff(3),
        )


def operators() -> tuple[nn.Module, tuple[Tensor, Tensor], Program]:
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.arange(15).reshape(3, 5) % 7
    return Operators(), inputs, trace(Operators(), inputs, dynamic={"x": {0: "rows"}, "ids": {0: "rows"}})


def test_casts_logic_and_differences_are_written_without_a_second_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, program = operators()
    decomposed: list[ExportedProgram] = []
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda self, *_: decomposed.append(self) or self)
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    assert not decomposed
    for given in (inputs, tuple(value[:2] for value in inputs)):
        for want, got in zip(module(*given), session(*given), strict=True):
            assert torch.equal(want, got)


class Less(nn.Module):
    """Numbers less integers, as masks are turned round."""

    def forward(self, ids: Tensor) -> Tensor:
        return (1.0 - ids) * -3.5 + torch.rsub(ids, 0.5, alpha=2) + (7 - ids)


def test_a_number_less_integers(tmp_path: Path) -> None:
    ids = torch.arange(15).reshape(3, 5) % 7
    program = trace(Less(), (ids,), dynamic={"ids": {0: "rows"}})
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    for given in (ids, ids[:2]):
        assert torch.equal(session(given), Less()(given))


class Distances(nn.Module):
    """Of every order that is written in a way of its own."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cdist(x, y, p) for p in (0, 1, 2, 3.5, float("inf")))


def test_distances(tmp_path: Path) -> None:
    x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(15.0).reshape(5, 3)
    program = trace(Distances(), (x, y), dynamic={"x": {0: "batch"}, "y": {}})
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    for given in (x, torch.cat([x, x + 1, x[:1]])):
        for want, got in zip(Distances()(given, y), session(given, y), strict=True):
            torch.testing.assert_close(got, want)


class InPlace(nn.Module):
    """It writes into a slice of its own sum."""

    def forward(self, x: Tensor) -> Tensor:
        total = x + 1
        total[:, 1:].mul_(2)
        return total


@pytest.mark.parametrize("module", [InPlace(), nn.Sequential(nn.Conv1d(2, 3, 1), nn.AdaptiveAvgPool1d(2))], ids=["in-place", "unknown"])
def test_what_the_exporter_does_not_know_is_decomposed(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed = []
    real = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda self, *args: decomposed.append(self) or real(self, *args))
    x = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    program = trace(module, (x,))
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    assert decomposed
    assert torch.allclose(session(x), module(x), atol=1e-6)


def test_the_optimisers_rules_are_what_they_were_afterwards() -> None:
    before = slice_split_rule.try_rewrite
    with quick_rules():
        assert slice_split_rule.try_rewrite != before
    assert slice_split_rule.try_rewrite == before
