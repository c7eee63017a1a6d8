"""ONNX files in fewer bits, and what onnxruntime makes of the float ones."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from irprune.backend.onnx import OnnxFile, convert, export, write
from irprune.backend.precision import quantised, to_float16
from irprune.backend.runtime import Session, error_of
from irprune.errors import ExportError
from irprune.frontend.export import trace
from irprune.ir.program import Program


class Norm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), as models of transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Outlier(nn.Module):
    """One hidden value is a thousand times the others, and hardly counts."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        with torch.no_grad():
            self.middle.weight[0] *= size
            self.down.weight[:, 0] /= size

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x).relu()).abs())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.tokens(ids), self.tokens.weight)


def operations(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def in_eight_bits(program: Program, folder: Path, **options: float) -> tuple[OnnxFile, float]:
    """The file, and its largest error over the largest output."""
    smaller = quantised(export(program, folder / "model.onnx"), folder / "small.onnx", program, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "small.onnx"]
    return smaller, error_of(program, Session(smaller.path, program, threads=1))


def test_onnxruntime_fuses_a_root_mean_square_norm(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    program = trace(Norm(), (x,))
    file = export(program, tmp_path / "model.onnx")
    assert operations(file.path)["Reciprocal"] == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    assert operations(tmp_path / "optimised.onnx") == {"SimplifiedLayerNormalization": 1}
    assert torch.allclose(Session(file.path, program)(x), Norm()(x), atol=1e-6)


def test_squares_beyond_the_range_of_float16(tmp_path: Path) -> None:
    x = 1000 * torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    program = trace(Norm(), (x,))
    file = write(to_float16(convert(program)), tmp_path / "model.onnx")
    wanted = program(x).detach()
    assert float((Session(file.path, program)(x) - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())


def test_a_product_whose_input_has_outliers_stays_in_float32(tmp_path: Path) -> None:
    program = trace(Outlier(1000), (torch.randn(32, 16, generator=torch.Generator().manual_seed(1)),))
    for name, loss, left in (("kept", 0.1, 1), ("all", 10.0, 0)):
        (tmp_path / name).mkdir()
        file, error = in_eight_bits(program, tmp_path / name, most=loss)
        assert file.products_in_float32 == left
        assert operations(file.path)["MatMulInteger"] == 3 - left
        assert (error < 0.05) is (left == 1)


def test_without_outliers_every_product_is_quantised(tmp_path: Path) -> None:
    program = trace(Outlier(1), (torch.randn(32, 16, generator=torch.Generator().manual_seed(1)),))
    file, error = in_eight_bits(program, tmp_path)
    assert file.products_in_float32 == 0
    assert operations(file.path)["MatMulInteger"] == 3
    assert error < 0.05


def test_the_product_with_a_tied_embedding_is_quantised(tmp_path: Path) -> None:
    program = trace(Tied(), (torch.arange(64).reshape(2, 32),))
    file, error = in_eight_bits(program, tmp_path)
    found = operations(file.path)
    assert (found["MatMulInteger"], found["MatMul"], found["Transpose"]) == (1, 0, 0)
    assert error < 0.05


def test_nothing_that_can_be_quantised(tmp_path: Path) -> None:
    program = trace(Outlier(1000), (torch.randn(32, 16, generator=torch.Generator().manual_seed(1)),))
    with pytest.raises(ExportError, match=r"can be quantised \(the inputs of all 3 have outliers\)"):
        in_eight_bits(program, tmp_path, most=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
