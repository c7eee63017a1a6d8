"""One model as a program, as an archive and as an ONNX file."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import PLACES, VOCAB
from torch import nn

from irprune import api
from irprune.backend.archive import load_pt2, save_pt2, to_exported
from irprune.backend.onnx import export
from irprune.errors import DataError, TargetError
from irprune.evaluate import Predictor
from irprune.evaluate.predictor import _look_ups
from irprune.ir.program import Program


class Counting(nn.Module):
    """A causal model: a token's logits are the running mean of embeddings, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        seen = (self.embed(input_ids) * attention_mask[..., None]).cumsum(1)
        return self.head(seen / attention_mask.cumsum(1)[..., None])


def traced(*, fixed: bool = False) -> Program:
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    axes = {} if fixed else {0: "batch", 1: "sequence"}
    return api.trace(Counting(), (ids, torch.ones_like(ids)), dynamic={"input_ids": axes, "attention_mask": axes})


def test_program_archive_and_onnx_file_agree(program: Program, run: Path, tmp_path: Path) -> None:
    ids = torch.randint(300, (3, 17), generator=torch.Generator().manual_seed(0))
    want = program(input_ids=ids)
    save_pt2(program, tmp_path / "model.pt2")
    export(program, tmp_path / "model.onnx")
    for predict in (Predictor.of(program), Predictor.archive(tmp_path / "model.pt2"), Predictor.onnx(tmp_path / "model.onnx")):
        have = predict(ids)
        assert have.shape == (3, 17, 300)
        torch.testing.assert_close(have, want, atol=2e-4, rtol=0)
    pruned = [Predictor.archive(run / "model.pt2")(ids), Predictor.onnx(run / "model.onnx")(ids)]
    torch.testing.assert_close(pruned[0], pruned[1], atol=2e-4, rtol=0)
    assert float((pruned[0] - want).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("fixed", [False, True])
def test_masks_are_given_and_fixed_sizes_are_padded(fixed: bool) -> None:
    program = traced(fixed=fixed)
    predict = Predictor.of(program)
    ids = torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(1))
    model = Counting()
    model.load_state_dict(dict(program.tensors))
    torch.testing.assert_close(predict(ids), model(ids, torch.ones_like(ids)))
    assert [port.shape for port in predict.ports] == [(2, 6) if fixed else (None, None)] * 2


def test_rows_longer_than_a_fixed_length_are_refused() -> None:
    with pytest.raises(DataError, match="the model reads 6 tokens, not 7"):
        Predictor.of(traced(fixed=True))(torch.zeros(1, 7, dtype=torch.int64))


def test_look_ups_alone_fail_where_the_model_does(with_places: Path) -> None:
    """What a GPU would not survive is tried on the processor: the tables alone, without the products."""
    found = _look_ups(to_exported(api.load(f"hf:{with_places}")[0]))
    assert {node.target for node in found.graph.nodes}.isdisjoint({torch.ops.aten.linear.default, torch.ops.aten.addmm.default})
    tokens, places = found(torch.zeros(1, PLACES, dtype=torch.int64))
    assert (tokens.shape, places.shape[-2]) == ((1, PLACES, 16), PLACES)
    for row in (torch.zeros(1, PLACES + 1, dtype=torch.int64), torch.full((1, 2), VOCAB)):
        with pytest.raises(IndexError):
            found(row)


class Summing(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().sum(1)


class Images(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(1)


def test_other_models_are_refused() -> None:
    with pytest.raises(TargetError, match="does not read one row of token indices; it reads image"):
        Predictor.of(api.trace(Images(), (torch.randn(2, 3),)))
    summing = Predictor.of(api.trace(Summing(), (torch.randint(9, (2, 3)),)))
    with pytest.raises(TargetError, match="gives no logits for each token"):
        summing(torch.zeros(2, 3, dtype=torch.int64))


# -- archives -------------------------------------------------------------------------------------


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_an_archive_with_pickled_inputs_is_refused_unread(tmp_path: Path) -> None:
    save_pt2(traced(), tmp_path / "model.pt2")
    hostile = io.BytesIO()
    torch.save(((Trap(tmp_path / "sprung"),), {}), hostile)
    assert pickle.dumps(Trap(tmp_path))
    with zipfile.ZipFile(tmp_path / "model.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for item in old.infolist():
            new.writestr(item, hostile.getvalue() if item.filename.endswith("sample_inputs/model.pt") else old.read(item))
    with pytest.raises(DataError, match="the archive cannot be read"):
        load_pt2(tmp_path / "bad.pt2")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("part", ["weights/model_weights_config.json", "constants/model_constants_config.json"])
def test_an_archive_with_pickled_tensors_is_refused(tmp_path: Path, part: str) -> None:
    save_pt2(traced(), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(part):
                content = b'{"config": {"x": {"path_name": "weight_0", "use_pickle": true}}}'
            new.writestr(item, content)
    with pytest.raises(DataError, match="holds pickled objects"):
        load_pt2(tmp_path / "bad.pt2")


@pytest.mark.parametrize("content", [None, b"", b"PK", b"no archive"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(DataError, match="the archive cannot be read"):
        load_pt2(tmp_path / "model.pt2")


def test_a_missing_onnx_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such ONNX file"):
        Predictor.onnx(tmp_path / "model.onnx")
