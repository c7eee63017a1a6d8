"""Lazy targets: the weights stay in their files, and every result is that of weights in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from irprune_passes.lora import Lora
from irprune_passes.lora.adapters import adapters
from irprune_passes.score import segments
from safetensors.torch import load_file, save_file

import irprune.api as api
from irprune.backend import hf_export, hf_resize, hf_stream, stream
from irprune.backend.hf_config import factors_of
from irprune.errors import DataError, OutputError, RecipeError, ResumeError, TargetError, TraceError
from irprune.frontend import huggingface
from irprune.ir import program as programs
from irprune.ir.facts import Importance, Original, Pretrained, PruneReport, Workspace
from irprune.ir.snapshot import pack, unpack
from irprune.pipeline import manager
from irprune.pipeline.files import sha256
from irprune.pipeline.parser import parse, write
from irprune.pipeline.passes import Facts

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
    "short llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})),
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


@pytest.mark.parametrize("folder", [name for name in KINDS if name != "short llama"], indirect=True)
def test_a_lazy_program_computes_what_the_whole_one_computes(folder: Path) -> None:
    whole, _ = api.load(f"hf:{folder}")
    lazy, _ = api.load(f"hf:{folder}", lazy=True)
    assert all(lazy.tensors[name].is_meta for name in whole.tensors if whole.is_parameter(name))
    inputs = lazy.interface.example[1]
    assert torch.equal(lazy(**inputs), whole(**inputs))
    for name, tensor in whole.tensors.items():
        assert torch.equal(lazy.value(name), tensor), name


@pytest.mark.parametrize(("folder", "dtype"), [("short llama", "float32"), ("bloom", "bfloat16")], indirect=["folder"])
def test_a_lazy_trace_that_computes_something_else_is_refused(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model computes is seen although its weights are never in memory together."""
    program, _ = api.load(f"hf:{folder}", lazy=True, dtype=dtype)
    assert not any("was not compared" in note for note in program.interface.notes)
    kept = hf_stream.buffers_on_meta

    @contextlib.contextmanager
    def traced_as_another(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        norms = [part for part in model.modules() if hasattr(part, "eps") or hasattr(part, "variance_epsilon")]
        with kept(model) as held:
            for norm in norms:
                for name in {"eps", "variance_epsilon"} & set(vars(norm)):
                    setattr(norm, name, 100 * (before := getattr(norm, name)) + 1)
            yield held
            for norm in norms:
                for name in {"eps", "variance_epsilon"} & set(vars(norm)):
                    setattr(norm, name, before)

    monkeypatch.setattr(huggingface, "buffers_on_meta", traced_as_another)
    with pytest.raises(TraceError, match="does not compute what the model computes"):
        api.load(f"hf:{folder}", lazy=True, dtype=dtype)


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
def test_adapters_are_merged_into_a_lazy_program_as_into_a_whole_one(folder: Path, tmp_path: Path) -> None:
    program, facts = api.load(f"hf:{folder}")
    adapted = Lora(r=2).run(program, Facts()).program
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters(adapted):
        for name in (adapter.a, adapter.b):
            programs.set_tensor(adapted.module, name, torch.randn(adapted.tensors[name].shape, generator=generator))
    manager.run(parse("save_lora"), adapted.clone(), [*facts, Workspace(tmp_path)])
    held = []
    for lazy in (False, True):
        out = tmp_path / f"lazy={lazy}"
        api.run(f"hf:{folder}", [Lora(load=tmp_path), *parse("prune{ratio=0.2 kinds=ffn},merge,export{format=hf}")], out=out, lazy=lazy)
        held.append(load_file(out / "hf" / "model.safetensors"))
    before = {key: file for path in folder.glob("*.safetensors") for key, file in load_file(path).items()}
    assert any(name in before and before[name].shape == t.shape and not torch.equal(before[name], t) for name, t in held[0].items())
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        torch.testing.assert_close(held[1][name], tensor)


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


# -- nothing is lost --------------------------------------------------------------------------------

HALVED = "score,prune{ratio=0.5 of=indices kinds=[heads,ffn] allocation=uniform round_to=1}"
WRITTEN = f"{HALVED},export{{format=hf shard=4KB}}"


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def flipped(path: Path) -> None:
    """The last byte of a file is another one; its size and the time of its last writing are not."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def full_after(shards: int) -> Iterator[list[str]]:
    """The disk is full when so many shards are written. Gives the names of those that are begun."""
    real, begun = stream._shard, list[str]()

    def counted(path: Path, *rest: Any) -> str:
        begun.append(path.name)
        with pytest.MonkeyPatch.context() as patch:
            if len(begun) > shards:
                patch.setattr(os, "write", no_space)
            return real(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_shard", counted)
        yield begun


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("folder", ["short llama"], indirect=True)
def test_a_disk_that_is_full_while_shards_are_written(folder: Path, tmp_path: Path) -> None:
    """Nothing stays; with ``resume`` the shards that are whole stay, and the result is that of an undisturbed run.

    What the run wrote is read with its checksums.
    """
    before, target = digests(folder), f"hf:{folder}"
    api.run(target, WRITTEN, out=tmp_path / "undisturbed", lazy=True)
    shards = sorted(path.name for path in (tmp_path / "undisturbed" / "hf").glob("model-*.safetensors"))
    assert len(shards) > 3
    message = rf"at {tmp_path}/out/hf/{shards[2]}: cannot write: No space left on device"
    with full_after(2), pytest.raises(OutputError, match=message):
        api.run(target, WRITTEN, out=tmp_path / "out", lazy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "undisturbed"]
    with full_after(2), pytest.raises(OutputError, match=message):
        api.run(target, WRITTEN, out=tmp_path / "out", lazy=True, resume=True)
    with full_after(99) as begun:
        api.run(target, WRITTEN, out=tmp_path / "out", lazy=True, resume=True)
    assert begun == shards[2:]
    assert digests(tmp_path / "out" / "hf") == digests(tmp_path / "undisturbed" / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "undisturbed"]
    assert digests(folder) == before
    flipped(tmp_path / "out" / "hf" / shards[1])
    for lazy in (False, True):
        with pytest.raises(DataError, match=rf"{shards[1]}: the file's checksum is not the one in irprune.safetensors"):
            api.load(f"hf:{tmp_path / 'out' / 'hf'}", lazy=lazy)


@pytest.mark.parametrize("folder", ["short llama"], indirect=True)
def test_a_shard_of_the_input_that_changes_during_the_run_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, real = sorted(folder.glob("*.safetensors"))[1], stream._shard

    def changing(path: Path, *rest: Any) -> str:
        done = real(path, *rest)
        if path.name.startswith("model-00002"):
            flipped(shard)
        return done

    monkeypatch.setattr(stream, "_shard", changing)
    with pytest.raises(DataError, match="the file changed while the run was reading it") as caught:
        api.run(f"hf:{folder}", WRITTEN, out=tmp_path / "out", lazy=True)
    assert caught.value.where == str(shard)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("folder", ["short llama"], indirect=True)
def test_a_run_does_not_go_on_with_other_weights_data_or_settings(folder: Path, tokens: str, tmp_path: Path) -> None:
    """Scores of the first half of a run would be applied to weights that they were not measured on."""
    passes = f"{HALVED},repair,export{{format=hf shard=4KB}}"
    options: dict[str, Any] = {"lazy": True, "calibration": tokens, "out": tmp_path / "out", "resume": True}
    with full_after(2), pytest.raises(OutputError):
        api.run(f"hf:{folder}", passes, **options)
    with pytest.raises(ResumeError, match="its setting was 'lazy=True' and is 'lazy=True windows=3'"):
        api.run(f"hf:{folder}", passes, **options, windows=3)
    save_file({"input_ids": torch.randint(120, (6, 12), generator=torch.Generator().manual_seed(1))}, tmp_path / "other.safetensors")
    with pytest.raises(ResumeError, match="its calibration is another one"):
        api.run(f"hf:{folder}", passes, **{**options, "calibration": str(tmp_path / "other.safetensors")})
    flipped(sorted(folder.glob("*.safetensors"))[1])
    with pytest.raises(ResumeError, match="its model is another one"):
        api.run(f"hf:{folder}", passes, **options)


@pytest.mark.parametrize("folder", ["short llama"], indirect=True)
def test_refitted_weights_are_part_of_what_shards_are_made_of(folder: Path, tmp_path: Path) -> None:
    """A second export over what the first one left must not keep a shard that holds other values."""
    program, facts = api.load(f"hf:{folder}", lazy=True)
    known = manager.Facts([*facts, Original(program)])
    smaller, found = manager.run(parse(HALVED), program, known)

    name = "model.layers.0.mlp.down_proj.weight"
    values = [torch.randn(smaller.tensors[name].shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def export(value: torch.Tensor) -> None:
        refitted = smaller.clone()
        programs.set_tensor(refitted.module, name, value)
        options: dict[str, Any] = {"known": factors_of(program, found[PruneReport].keep), "max_shard_size": "4KB"}
        hf_export.export(refitted, program, found[Pretrained], tmp_path / "out", progress=tmp_path / "progress", **options)

    with full_after(3) as begun, pytest.raises(OutputError):
        export(values[0])
    with full_after(99) as again:
        export(values[1])
    assert begun == again[:4]
    written = {key: tensor for path in (tmp_path / "out").glob("model-*.safetensors") for key, tensor in load_file(path).items()}
    assert torch.equal(written[name], values[1])


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_a_pruned_lazy_program_is_the_same_from_a_snapshot(folder: Path) -> None:
    program, facts = api.load(f"hf:{folder}", lazy=True)
    smaller, _ = manager.run(parse(f"{HALVED},{HALVED}"), program, facts)
    data, tensors = pack(smaller, program)
    assert sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("kept/")) < 1000, "weights stay in their files"
    back = unpack(json.loads(json.dumps(data)), {name: tensor.clone() for name, tensor in tensors.items()}, program)
    assert smaller.source is not None
    assert back.source is not None
    assert back.source.identity() == smaller.source.identity()
    for name in smaller.tensors:
        assert back.tensors[name].is_meta == smaller.tensors[name].is_meta
        assert torch.equal(back.value(name), smaller.value(name)), name
    inputs = program.interface.example[1]
    assert torch.equal(back(**inputs)[0], smaller(**inputs)[0])


@pytest.mark.parametrize("folder", ["short llama"], indirect=True)
def test_a_recipe_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "intermediate_size": 32}))
    other.save_pretrained(tmp_path / "other")
    api.run(f"hf:{tmp_path / 'other'}", HALVED, out=tmp_path / "recipe", lazy=True)
    before = digests(folder)
    wrong = r"the recipe is for another model: tensor .*mlp\.\w+\.weight has shape .*; it was made for hf:.*other"
    passes = f"apply{{recipe={write(tmp_path / 'recipe' / 'recipe.safetensors')}}},export{{format=hf}}"
    with pytest.raises(RecipeError, match=wrong):
        api.run(f"hf:{folder}", passes, out=tmp_path / "out", lazy=True)
    assert not (tmp_path / "out").exists()
    assert digests(folder) == before


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose pooler the logits of the masked language model do not need."""
    folder = tmp_path_factory.mktemp("pretraining")
    torch.manual_seed(0)
    transformers.BertForPreTraining(transformers.BertConfig(**{**SIZES, "num_hidden_layers": 1})).save_pretrained(folder)
    return folder


POOLER = "bert.pooler.dense.weight"
NARROWER = "[heads,ffn,residual,other]"


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        ("ffn", {}),
        (NARROWER, {}),
        (NARROWER, {"lazy": True}),
        (NARROWER, {"outputs": "prediction_logits,seq_relationship_logits"}),
    ],
    ids=["same size", "narrower", "narrower, lazy", "traced"],
)
def test_a_part_that_was_not_traced(kinds: str, options: dict[str, Any], pretraining: Path, tmp_path: Path) -> None:
    """It stays where its size does; else it is as the class initialises it, which a note says."""
    program, facts = api.load(f"hf:{pretraining}", **options)
    passes = f"score,prune{{ratio=0.25 of=indices kinds={kinds} allocation=uniform round_to=1}},export{{format=hf}}"
    _, found = manager.run(parse(passes), program, [*facts, Original(program), Workspace(tmp_path)])
    had = load_file(pretraining / "model.safetensors")[POOLER]
    has, notes = load_file(tmp_path / "hf" / "model.safetensors")[POOLER], found[hf_export.HfCheckpoint].notes
    if kinds == "ffn":
        assert torch.equal(has, had)
    elif "outputs" in options:
        assert has.shape == (12, 12)
        assert bool(torch.isin(has, had).all()), "rows and columns of the checkpoint's"
    else:
        (note,) = notes
        why = "not needed for prediction_logits, so not traced, and of another size now, so newly initialised"
        assert note.startswith(f"{why}: {POOLER}, ")
        assert has.shape == (12, 12)
        assert 0.01 < float(has.std()) < 0.03
    assert len(notes) == (kinds == NARROWER and "outputs" not in options)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_lazy_export_in_half_precision_is_compared_in_float32(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    transformers.LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(half, max_shard_size="10KB")
    for lazy in (False, True):
        api.run(f"hf:{half}", WRITTEN, out=tmp_path / f"lazy-{lazy}", lazy=lazy, dtype="auto")
    whole, lazily = (tmp_path / f"lazy-{lazy}" / "hf" for lazy in (False, True))
    assert load_file(whole / hf_resize.REFERENCE)["output.logits"].dtype == torch.bfloat16
    assert load_file(lazily / hf_resize.REFERENCE)["output.logits"].dtype == torch.float32
    model, same = api.load_pretrained(lazily), transformers.AutoModelForCausalLM.from_pretrained(whole)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
