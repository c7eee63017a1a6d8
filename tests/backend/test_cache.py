"""Decoders with a key-value cache: the rewriting, and greedy decoding with the file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from irprune_passes.export import written_as
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx._internal.exporter._registration import ONNXRegistry
from typer.testing import CliRunner

import irprune.api as irprune
from irprune.backend import cache, precision
from irprune.backend.cache import cached
from irprune.backend.generate import Decoder
from irprune.backend.onnx import export
from irprune.backend.precision import quantised
from irprune.backend.runtime import dynamic_sizes
from irprune.cli import app
from irprune.errors import DataError, ExportError
from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.pipeline.instruments import fingerprint
from irprune.rules.infer import typed
from tests.backend.onnx_toys import llama


@pytest.fixture(scope="module", autouse=True)
def _translations_read_once() -> Iterator[None]:
    """The exporter parses its five hundred translations anew for every file, which takes most of a test's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


SEQUENCE = {"ids": {0: "batch", 1: "sequence"}}


class Toy(nn.Module):
    """Learned positions and one attention whose query, key and value share a projection."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(32, 16), nn.Embedding(40, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32)
        self.causal = causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in self.qkv(x).split(16, 2))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Plain(Toy):
    """Attention spelled out, with a distance penalty on the scores and the mask filled in."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        place = torch.arange(length)
        scores = q @ k.transpose(2, 3) / 2 - 0.1 * (place[:, None] - place[None, :])
        return scores.masked_fill(place[None, :] > place[:, None], -1e9).softmax(-1) @ v


class Averaged(Toy):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v + v.mean(2, keepdim=True)


class Counted(Toy):
    """Causal, but what it computes depends on how long the sequence is."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) * q.shape[2]


@functools.cache
def program(kind: type[Toy] = Toy, causal: bool = True) -> Program:
    torch.manual_seed(0)
    return typed(trace(kind(causal).eval(), (torch.randint(32, (2, 12)),), dynamic=SEQUENCE))


@pytest.mark.parametrize("kind", [Toy, Plain])
def test_what_is_kept_are_keys_and_values(kind: type[Toy]) -> None:
    before = fingerprint(program(kind))
    found = cached(program(kind))
    assert fingerprint(program(kind)) == before
    assert [(state.past, state.present, state.axis) for state in found.states] == [
        ("past_key_values.0.key", "present.0.key", 2),
        ("past_key_values.0.value", "present.0.value", 2),
    ]
    assert found.program.interface.dynamic == ({0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}, {0: "batch", 2: "past"})
    past = found.program.interface.example[0][1]
    assert (past.shape[1], past.shape[3]) == (4, 4)


def test_a_step_equals_the_last_row_of_the_whole() -> None:
    ids = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(1))
    found = cached(program(Plain)).program
    with torch.no_grad():
        whole = program(Plain)(ids)
        logits, *pasts = found(ids[:, :4], *(torch.zeros(3, 4, 0, 4) for _ in range(2)))
        for place in range(4, 9):
            torch.testing.assert_close(logits[:, -1], whole[:, place - 1], rtol=1e-4, atol=1e-5)
            logits, *pasts = found(ids[:, place : place + 1], *pasts)
    assert [past.shape[2] for past in pasts] == [9, 9]


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ((Toy, False), "later tokens change what it computes for earlier ones"),
        ((Averaged, True), "operation 'aten.mean': it reads across the sequence (mean)"),
        ((Counted, True), "differ by"),
    ],
)
def test_what_cannot_go_on_is_refused(of: tuple[type[Toy], bool], reason: str) -> None:
    with pytest.raises(ExportError, match="cannot go on from a cache") as caught:
        cached(program(*of))
    assert reason in str(caught.value)


def test_a_sequence_that_is_not_dynamic_is_refused() -> None:
    still = trace(Toy().eval(), (torch.randint(32, (2, 12)),), dynamic={"ids": {0: "batch"}})
    with pytest.raises(ExportError, match="no axis is dynamic beside the batch"):
        cached(still)


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is not the rewriting's own opinion: rows taken from the start of a table instead of its end."""

    def first(self: cache._Rewriter, node: torch.fx.Node, axis: int) -> torch.fx.Node:
        return self._call(torch.ops.aten.slice.Tensor, self._all(node), axis, 0, self._length(self.main, self._axis))

    monkeypatch.setattr(cache._Rewriter, "_row", first)
    with pytest.raises(ExportError, match="differ by"):
        cached(program())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """A LLaMA with a padding mask, its query groups pruned, as a file."""
    done = irprune.run(llama(), "prune{ratio=0.2 round_to=2},export{cache=true quantise=int8}", out=tmp_path_factory.mktemp("run") / "out")
    assert done.path is not None
    return done.program, done.path


def test_greedy_decoding_gives_the_tokens_of_torch(pruned: tuple[Program, Path]) -> None:
    smaller, folder = pruned
    assert smaller.tensors["model.layers.0.mlp.gate_proj.weight"].shape[0] < 48
    decoder = Decoder(folder / "model.onnx", threads=1)
    for prompt in ([3], [1, 2, 3, 4, 5]):
        found = list(decoder.greedy(prompt, 12))
        ids = torch.tensor([[*prompt, *found]])
        with torch.no_grad():
            logits = smaller(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == found
    assert decoder.speed.tokens == 11
    assert list(decoder.greedy([3], 12, stop=[next(iter(decoder.greedy([3], 1)))])) == []


def test_the_mask_spans_earlier_tokens(pruned: tuple[Program, Path]) -> None:
    inputs = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(pruned[1] / "model.onnx").graph.input
    }
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"][1] not in ("sequence", "past")
    assert inputs["past_key_values.0.key"][::2] == ["batch", "past"]


def test_the_command_line_goes_on_from_tokens(pruned: tuple[Program, Path]) -> None:
    for name in ("model.onnx", "model.int8.onnx"):
        result = CliRunner().invoke(app, ["generate", str(pruned[1] / name), "--ids", "1,2,3", "--tokens", "4"])
        assert result.exit_code == 0, result.output
        assert len(result.output.strip().split(",")) == 4
    result = CliRunner().invoke(app, ["generate", str(pruned[1] / "model.onnx"), "--prompt", "Once"])
    assert result.exit_code == 2
    assert "there is no tokenizer" in result.output


def test_a_file_without_a_cache_is_refused(tmp_path: Path) -> None:
    export(program(), tmp_path / "model.onnx")
    with pytest.raises(DataError, match="no key-value cache"):
        Decoder(tmp_path / "model.onnx")


def test_it_validates_as_the_program_with_both_kinds_of_calls(pruned: tuple[Program, Path]) -> None:
    options = "rounds=5 seconds=0.1 threads=1 memory=false batch_sizes=[1] lengths=[6]"
    found = irprune.validate(pruned[1], llama(), options=options).manifest.model_dump()
    points = found["onnx"]["points"]
    assert [(point["kind"], point["sizes"]) for point in points] == [
        ("prefill", {"batch": 1, "sequence": 6, "past": 0}),
        ("decode", {"batch": 1, "sequence": 1, "past": 6}),
    ]
    for point in points:
        assert set(point["files"]) == {"before", "after", "int8"}
        assert point["ideal_speedup"] > 1
        for file in point["files"].values():
            assert 0 < file["p50_ms"] <= file["p95_ms"]
            assert file["per_second"] > 0
    assert 0 < found["onnx"]["int8_relative_err"] < 0.2


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no ONNX")
    for path, found in ((text, "this is no ONNX file, or a part of one"), (tmp_path, "this is a directory")):
        with pytest.raises(DataError, match=found) as caught:
            Decoder(path)
        assert caught.value.hint == "name the ONNX file of a run"


@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_that_the_model_does_not_have_are_refused(token: int, pruned: tuple[Program, Path]) -> None:
    with pytest.raises(DataError, match=f"there is no token {token}"):
        list(Decoder(pruned[1] / "model.onnx", threads=1).greedy([1, token], 2))


def test_parity_runs_on_what_the_program_keeps() -> None:
    found = cached(llama())
    (ids, mask, *caches), _ = cache.real_inputs(found, {"batch": 3, "sequence": 2, "past": 5}, seed=1)
    assert (ids.shape, mask.shape) == ((3, 2), (3, 7))
    assert {state.shape[2] for state in caches} == {5}
    whole, _ = cache.real_inputs(found, {"batch": 3, "sequence": 7, "past": 0}, seed=1)
    assert torch.equal(whole[0][:, 5:], ids)
    (wanted, *_), (got, *_) = (found.program(*given) for given in (whole, (ids, mask, *caches)))
    assert torch.allclose(wanted[:, 5:], got, atol=1e-5)


def test_eight_bits_are_judged_on_a_prompt_whatever_the_axes_are_called(tmp_path: Path) -> None:
    example = torch.randint(32, (2, 12))
    traced = trace(Toy().eval(), (example,), dynamic={"ids": {0: "rows", 1: "tokens"}})
    file = written_as(traced, tmp_path / "model.onnx", like=(True, "float32"))
    assert file.computes is not None
    sizes = dynamic_sizes(file.computes[1].program.interface)
    given = precision._inputs(file, traced)
    assert given["ids"].shape == (2, sizes["tokens"] + sizes["past"])
    assert {value.shape[2] for name, value in given.items() if name != "ids"} == {0}
    assert quantised(file, tmp_path / "small.onnx", traced).cache
