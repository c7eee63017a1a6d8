"""A program as an ONNX file."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from irprune.backend import onnx as backend
from irprune.backend.onnx import OnnxFile, convert, export, write
from irprune.backend.runtime import Session, parity
from irprune.errors import ExportError, OutputError
from irprune.frontend.export import trace
from tests.backend.onnx_toys import cnn, llama, records


@pytest.fixture(scope="module")
def model() -> onnx_ir.Model:
    return convert(cnn())


def weights(file: OnnxFile) -> dict[str, Tensor]:
    model = onnx.load(file.path)
    return {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}


def test_inputs_outputs_and_dynamic_axes_keep_their_names(llama_file: OnnxFile) -> None:
    assert llama_file.manifest() == {
        "onnx": {
            "file": "model.onnx",
            "opset": 20,
            "inputs": {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]},
            "outputs": {"logits": ["batch", "sequence", 64]},
            "size_bytes": llama_file.path.stat().st_size,
            "external_data": [],
            "cache": False,
            "precision": "float32",
        }
    }
    graph = onnx.load(llama_file.path).graph
    names = [[axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)]
    assert names == [["batch", "sequence"], ["batch", "sequence"], ["batch", "sequence", ""]]


def test_weights_keep_their_names_and_transposed_ones_say_so(llama_file: OnnxFile) -> None:
    stored, program = weights(llama_file), llama()
    for name, tensor in program.tensors.items():
        if name.endswith("proj.weight"):
            assert torch.equal(stored[f"{name}.T"], tensor.detach().T)
        elif "norm" not in name:  # the norms of an untrained model are all ones, and stored once
            assert torch.equal(stored[name], tensor.detach())
    assert "model.norm.weight" in program.tensors
    assert any(name.endswith("norm.weight") for name in stored)


def test_only_standard_operations_and_nothing_of_this_machine(llama_file: OnnxFile) -> None:
    model = onnx.load(llama_file.path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert model.producer_name == "irprune"
    content = llama_file.path.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_constants_are_folded(records_file: OnnxFile, tmp_path: Path) -> None:
    plain = export(records(), tmp_path / "plain.onnx", optimize=False)
    assert len(onnx.load(records_file.path).graph.node) < len(onnx.load(plain.path).graph.node)
    assert parity(records(), Session(plain.path, records(), threads=1)).max_abs_err < 1e-5


def test_nested_repeated_and_constant_results(records_file: OnnxFile) -> None:
    assert list(records_file.inputs) == ["x", "unused", "mask"]
    assert records_file.outputs == {
        "scores": ("batch", 3),
        "again": ("batch", 3),
        "x_1": ("batch", 4),
        "count": (),
        "offset": (3,),
        "positive": ("batch", 3),
        "pair.0": ("batch",),
        "pair.1": ("batch",),
    }


def test_the_same_file_twice_and_no_word(
    cnn_file: OnnxFile, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    again = export(cnn(), tmp_path / "model.onnx")
    assert again.path.read_bytes() == cnn_file.path.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_external_data_moves_with_its_model(model: onnx_ir.Model, tmp_path: Path) -> None:
    file = write(model, tmp_path / "model.onnx", external_data=True)
    assert file.external == ("model.onnx.data",)
    assert file.size_bytes == sum(each.stat().st_size for each in tmp_path.iterdir())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.move(tmp_path / name, moved / name)
    assert parity(cnn(), Session(moved / "model.onnx", cnn(), threads=1)).max_abs_err < 1e-5


def test_external_data_of_an_earlier_file_goes(model: onnx_ir.Model, tmp_path: Path) -> None:
    write(model, tmp_path / "model.onnx", external_data=True)
    file = write(model, tmp_path / "model.onnx")
    assert file.external == ()
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_what_one_file_cannot_hold_goes_beside_it(model: onnx_ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INLINE_LIMIT_BYTES", 1000)
    assert write(model, tmp_path / "model.onnx").external == ("model.onnx.data",)
    with pytest.raises(ExportError, match="do not fit in one ONNX file"):
        write(model, tmp_path / "other.onnx", external_data=False)
    assert not (tmp_path / "other.onnx").exists()


def test_a_place_that_cannot_be_written(model: onnx_ir.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError) as caught:
        write(model, tmp_path / "file" / "model.onnx")
    assert caught.value.exit_code == 5


def test_a_full_disk_leaves_the_earlier_file(model: onnx_ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("earlier")

    def full(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(model, tmp_path / "model.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "earlier"


def test_what_the_checker_refuses_is_not_written(cnn_file: OnnxFile, tmp_path: Path) -> None:
    broken = onnx_ir.load(cnn_file.path)
    next(node for node in broken.graph if node.op_type == "Conv").op_type = "Unheard"
    with pytest.raises(ExportError, match="the exported model is not valid ONNX: No Op registered for Unheard"):
        write(broken, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@torch.library.custom_op("irprune_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return twice(self.linear(x))


def test_an_operation_that_onnx_does_not_have() -> None:
    with pytest.raises(ExportError) as caught:
        convert(trace(Custom(), (torch.randn(2, 4),)))
    line = Custom.forward.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(
        f"[export] at %twice ({__file__}:{line}): operation 'irprune_tests.twice' cannot be expressed in ONNX"
    )
    assert "to go on: leave out 'export'" in str(caught.value)


class Decomposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def test_an_operation_that_fails_after_decomposition_has_its_line() -> None:
    with pytest.raises(ExportError) as caught:
        convert(trace(Decomposed(), (torch.randn(2, 4, 4),)))
    assert f"({__file__}:{Decomposed.forward.__code__.co_firstlineno + 1}): operation 'aten._linalg_svd'" in str(caught.value)


def test_no_weights_no_file() -> None:
    with torch.device("meta"):
        program = trace(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(ExportError, match="the weight 'weight' has no data"):
        convert(program)


def test_a_dynamic_axis_that_did_not_survive() -> None:
    promised = dataclasses.replace(cnn(), interface=dataclasses.replace(cnn().interface, dynamic=({0: "batch", 2: "height"},)))
    with pytest.raises(ExportError, match=r"input input_1, axis 2: the dynamic axis 'height' became the fixed size 12"):
        convert(promised)


def mlp(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)).to(dtype)


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(tmp_path: Path, opset: int) -> None:
    program = trace(mlp(torch.float32), (torch.randn(3, 8),))
    file = export(program, tmp_path / "model.onnx", opset=opset)
    assert onnx.load(file.path).opset_import[0].version == file.opset == opset
    assert parity(program, Session(file.path, program, threads=1)).max_abs_err < 1e-5


class BiasedAttention(nn.Module):
    """Attention whose mask is a weight, as with relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(heads, heads, heads, self.mask.unsqueeze(0))
        return found.transpose(1, 2).contiguous().reshape(x.shape)


def test_attention_with_a_trained_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = trace(BiasedAttention(), (torch.randn(3, 5, 8),))
    found = parity(program, Session(export(program, tmp_path / "model.onnx").path, program, threads=1))
    assert 0 < found.max_abs_err <= found.tolerance


def test_float16(tmp_path: Path) -> None:
    program = trace(mlp(torch.float16), (torch.randn(3, 8, dtype=torch.float16),))
    found = parity(program, Session(export(program, tmp_path / "model.onnx").path, program, threads=1))
    assert 0 < found.max_abs_err <= found.tolerance < 0.1


def test_bfloat16_is_written_and_onnxruntime_says_what_it_lacks(tmp_path: Path) -> None:
    program = trace(mlp(torch.bfloat16), (torch.randn(3, 8, dtype=torch.bfloat16),))
    file = export(program, tmp_path / "model.onnx")
    assert file.opset == 23
    with pytest.raises(ExportError) as caught:
        Session(file.path, program, provider="cpu")
    assert "Could not find an implementation" in str(caught.value)
    assert "give the model in float32" in str(caught.value)
