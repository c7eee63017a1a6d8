"""Lazy targets: the weights stay in their files, and every result is that of weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from irprune_passes.score import segments
from safetensors.torch import load_file, save_file

import irprune.api as api
from irprune.errors import DataError, TargetError
from irprune.ir import program as programs
from irprune.ir.facts import Importance
from irprune.pipeline import manager
from irprune.pipeline.parser import parse

SIZES = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=120, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
    "bare bert, loaded into a model with a head": (transformers.BertModel, transformers.BertConfig(**SIZES)),
    "bloom": (transformers.BloomForCausalLM, transformers.BloomConfig(vocab_size=120, hidden_size=16, n_layer=2, n_head=4)),
}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    model_class, config = KINDS[request.param]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_lazy_program_computes_what_the_whole_one_computes(folder: Path) -> None:
    whole, _ = api.load(f"hf:{folder}")
    lazy, _ = api.load(f"hf:{folder}", lazy=True)
    assert all(lazy.tensors[name].is_meta for name in whole.tensors if whole.is_parameter(name))
    inputs = lazy.interface.example[1]
    assert torch.equal(lazy(**inputs), whole(**inputs))
    for name, tensor in whole.tensors.items():
        assert torch.equal(lazy.value(name), tensor), name


@pytest.mark.parametrize("folder", ["llama", "gpt2", "bloom"], indirect=True)
@pytest.mark.parametrize("block", [64 * 2**20, 256])
def test_a_lazy_run_prunes_and_proves_as_a_whole_one(folder: Path, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "BLOCK", block)
    passes = "score,prune{ratio=0.3 kinds=[heads,ffn,residual] round_to=1}"
    whole = api.run(f"hf:{folder}", passes, out=tmp_path / "whole")
    lazy = api.run(f"hf:{folder}", passes, out=tmp_path / "lazy", lazy=True)
    assert lazy.manifest.checks is not None
    assert lazy.manifest.checks.numbers is not None
    assert lazy.manifest.checks.numbers.max_abs_err is not None
    assert set(lazy.program.tensors) == set(whole.program.tensors)
    for name, tensor in whole.program.tensors.items():
        assert torch.equal(lazy.program.value(name), tensor), name
        assert torch.equal(lazy.program.value(name, 1, 3), tensor[1:3]), name
    assert (tmp_path / "lazy" / "recipe.safetensors").read_bytes() == (tmp_path / "whole" / "recipe.safetensors").read_bytes()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_gradients_of_a_lazy_target_are_those_of_a_whole_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(120, (6, 12), generator=torch.Generator().manual_seed(0))}, calibration)
    monkeypatch.setattr(segments.segments, "__defaults__", (4096,))
    found = []
    for lazy in (False, True):
        program, facts = api.load(f"hf:{folder}", lazy=lazy, calibration=str(calibration))
        _, known = manager.run(parse("discover,score{criterion=taylor}"), program, facts)
        found.append(known[Importance].scores)
    for name, scores in found[0].items():
        torch.testing.assert_close(torch.from_numpy(found[1][name]), torch.from_numpy(scores), rtol=1e-4, atol=1e-9)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    save_file({"input_ids": torch.randint(120, (6, 12), generator=torch.Generator().manual_seed(0))}, tmp_path / "tokens.safetensors")
    return str(tmp_path / "tokens.safetensors")


@pytest.mark.parametrize("folder", ["llama", "gpt2", "bloom"], indirect=True)
@pytest.mark.parametrize("criterion", ["activation", "obs"])
def test_scores_from_activations_of_a_lazy_target_are_those_of_a_whole_one(criterion: str, folder: Path, tokens: str) -> None:
    found = []
    for lazy in (False, True):
        program, facts = api.load(f"hf:{folder}", lazy=lazy, calibration=tokens)
        _, known = manager.run(parse(f"discover,score{{criterion={criterion}}}"), program, facts)
        found.append(known[Importance].scores)
    assert found[0]
    for name, scores in found[0].items():
        torch.testing.assert_close(torch.from_numpy(found[1][name]), torch.from_numpy(scores), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_a_lazy_program_is_repaired_and_written_as_a_whole_one(folder: Path, tokens: str, tmp_path: Path) -> None:
    passes = "score,prune{ratio=0.3 of=indices kinds=[heads,ffn] allocation=uniform},repair,export{format=hf}"
    held = []
    for lazy in (False, True):
        out = tmp_path / f"lazy={lazy}"
        api.run(f"hf:{folder}", passes, out=out, lazy=lazy, calibration=tokens)
        held.append(load_file(out / "hf" / "model.safetensors"))
    before = {key: file for path in folder.glob("*.safetensors") for key, file in load_file(path).items()}
    assert any(name in before and before[name].shape != tensor.shape for name, tensor in held[0].items())
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        torch.testing.assert_close(held[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_proof_of_a_lazy_run_has_teeth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irprune.backend import rewrite
    from irprune.errors import ProofError

    read = rewrite.Sliced.read

    def wrong(self: Any, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        out = read(self, name, start, stop)
        return out.flip(0) if name.endswith("layers.1.mlp.down_proj.weight") else out

    monkeypatch.setattr(rewrite.Sliced, "read", wrong)
    program, facts = api.load(f"hf:{folder}", lazy=True)
    with pytest.raises(ProofError):
        manager.run(parse("discover,score,prune{ratio=0.2}"), program, facts)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_shard_that_is_cut_off_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(DataError, match="cut off") as caught:
        api.load(f"hf:{folder}", lazy=True)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        api.load(f"hf:{folder}", lazy=True)


def test_a_checkpoint_in_another_form_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    tensors = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"no tensor model\.layers\.0\.self_attn\.q_proj\.weight"):
        api.load(f"hf:{tmp_path}", lazy=True)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="no safetensors weights"):
        api.load(f"hf:{tmp_path}", lazy=True)
