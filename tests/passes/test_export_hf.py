"""``export{format=hf}`` and ``irprune.load_pretrained`` on tiny models."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import irprune
from irprune.api import load
from irprune.backend import hf_export
from irprune.backend.hf_export import HfCheckpoint
from irprune.errors import DataError, ExportError, OutputError, ParityError, TargetError
from irprune.frontend.hf_pretrained import pretrained
from irprune.ir.facts import Fact, Original, Workspace
from irprune.ir.program import Program
from irprune.pipeline.manager import run
from irprune.pipeline.manifest import Manifest
from irprune.pipeline.parser import parse
from irprune.report.tables import run_lines

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = torch.randint(3, 48, (2, 10), generator=torch.Generator().manual_seed(0))
UNIFORM = "score,prune{ratio=0.5 of=indices allocation=uniform round_to=1}"
UNEVEN = "score,prune{ratio=0.3 of=indices allocation=global kinds=ffn round_to=1},score,prune{count=1 kinds=heads layers=1:}"


def lively(model: Any) -> Any:
    """Weights large enough that every layer is heard in the outputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))


Traced = tuple[Program, tuple[Fact, ...]]


@pytest.fixture(scope="module")
def traced(llama: Any) -> Traced:
    llama.config.use_cache = False
    return load(llama, example_inputs={"input_ids": TOKENS}, dynamic={"input_ids": {0: "batch", 1: "sequence"}})


def exported(traced: Traced, passes: str, folder: Path, options: str = "") -> tuple[Program, HfCheckpoint]:
    program, facts = traced
    pipeline = parse(f"{passes},export{{format=hf {options}}}")
    after, found = run(pipeline, program, [*facts, Original(program), Workspace(folder)])
    return after, found[HfCheckpoint]


@pytest.fixture(scope="module")
def plain(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, HfCheckpoint]:
    return exported(traced, UNIFORM, tmp_path_factory.mktemp("plain"), "layout=plain shard=10KB")


@pytest.fixture(scope="module")
def uneven(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, HfCheckpoint]:
    return exported(traced, UNEVEN, tmp_path_factory.mktemp("uneven"))


def outputs(program: Program) -> torch.Tensor:
    with torch.no_grad():
        return program(input_ids=TOKENS).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_uniform_pruning_needs_no_irprune_to_load(plain: tuple[Program, HfCheckpoint], tmp_path: Path) -> None:
    program, written = plain
    assert written.changed == {"intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert (written.layout, written.found) == ("plain", "table")
    assert len(list(written.path.glob("model-*.safetensors"))) > 1
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("irprune", "irprune_passes"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
try:
    import irprune
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("irprune can be imported")
tokens = torch.load(sys.argv[2], weights_only=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(input_ids=tokens).logits, sys.argv[3])
"""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", script, str(written.path), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), outputs(program), rtol=1e-5, atol=1e-5)


def test_layers_of_different_sizes_are_the_genuine_class(uneven: tuple[Program, HfCheckpoint]) -> None:
    program, written = uneven
    assert written.layout == "resized"
    assert written.notes[0].startswith("load it with irprune.load_pretrained: ")
    model = irprune.load_pretrained(written.path)
    assert type(model) is transformers.LlamaForCausalLM
    torch.testing.assert_close(logits(model), outputs(program))
    layers = [layer.self_attn for layer in model.model.layers]
    assert len({layer.k_proj.out_features for layer in layers}) > 1, "the toy must have layers of different sizes"
    assert all(layer.q_proj.out_features == layer.q_proj.weight.shape[0] for layer in layers)
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(written.path)


def test_generation_with_a_cache_of_different_sizes_per_layer(uneven: tuple[Program, HfCheckpoint]) -> None:
    model = irprune.load_pretrained(uneven[1].path)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(TOKENS[:1], use_cache=True, **settings)
    assert torch.equal(cached, model.generate(TOKENS[:1], use_cache=False, **settings))


def test_what_save_pretrained_makes_of_it_loads_too(uneven: tuple[Program, HfCheckpoint], tmp_path: Path) -> None:
    """As after fine-tuning: other weights, no reference."""
    model = irprune.load_pretrained(uneven[1].path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(irprune.load_pretrained(tmp_path)), logits(model))


def test_it_can_be_pruned_again(uneven: tuple[Program, HfCheckpoint], tmp_path: Path) -> None:
    first = irprune.load_pretrained(uneven[1].path)
    done = irprune.run(
        f"hf:{uneven[1].path}",
        "prune{ratio=0.3 kinds=ffn of=indices round_to=1},export{format=hf}",
        out=tmp_path / "again",
        sequence=8,
    )
    model = irprune.load_pretrained(tmp_path / "again" / "hf")
    assert [x.mlp.up_proj.out_features for x in model.model.layers] == [
        n - round(0.3 * n) for n in (x.mlp.up_proj.out_features for x in first.model.layers)
    ]
    inputs = done.program.interface.example[1]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, done.program(**inputs))
    told = list(run_lines(done.manifest))
    assert any(line.startswith("hf: LlamaForCausalLM, outputs within ") and "without irprune" not in line for line in told)
    assert any(line.startswith("load it with irprune.load_pretrained: its layers already had sizes") for line in told)
    card = (tmp_path / "again" / "hf" / "README.md").read_text()
    assert "irprune.load_pretrained" in card
    assert done.manifest.pipeline in card
    assert f"{done.manifest.model.after.params:,} of {done.manifest.model.before.params:,} parameters" in card
    assert Manifest.read(tmp_path / "again").files.keys() >= {"hf/README.md", "hf/config.json", "hf/model.safetensors"}


@pytest.mark.parametrize("library", ["peft", "accelerate"])
@pytest.mark.parametrize("layout", ["plain", "uneven"])
def test_a_training_step(library: str, layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    module = pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    model = irprune.load_pretrained(request.getfixturevalue(layout)[1].path)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    if library == "accelerate":
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        settings = transformers.TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
        transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
        assert all(not torch.equal(before[name], value) for name, value in model.named_parameters() if name.endswith("proj.weight"))
        return
    wrapped = module.get_peft_model(model, module.LoraConfig(r=2, target_modules="all-linear"))
    optimiser = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.1)
    wrapped(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimiser.step()
    merged = wrapped.merge_and_unload()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], merged.model.layers[0].mlp.up_proj.weight)


class Passed(nn.Module):
    """A layer that is not there any more."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


def test_a_program_with_a_layer_less(llama: Any, traced: Traced, tmp_path: Path) -> None:
    shorter = transformers.LlamaForCausalLM(llama.config)
    shorter.load_state_dict(llama.state_dict())
    shorter.model.layers[1] = Passed()
    program, _ = load(shorter.eval(), example_inputs={"input_ids": TOKENS})
    written = hf_export.export(program, traced[0], pretrained(llama), tmp_path / "hf")
    assert (written.layout, written.changed) == ("plain", {"num_hidden_layers": 2})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, llama.model.layers[2].mlp.up_proj.weight)
    torch.testing.assert_close(logits(model), outputs(program))


def test_a_layer_that_lost_a_part_is_refused(llama: Any, traced: Traced, tmp_path: Path) -> None:
    changed = transformers.LlamaForCausalLM(llama.config)
    changed.load_state_dict(llama.state_dict())
    changed.model.layers[1].mlp = Passed()
    program, _ = load(changed.eval(), example_inputs={"input_ids": TOKENS})
    with pytest.raises(ExportError, match=r"LlamaForCausalLM cannot be without model.layers.1.mlp.gate_proj.weight"):
        hf_export.export(program, traced[0], pretrained(llama), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


# -- refusals ---------------------------------------------------------------------------------------


def test_plain_is_refused_where_layers_differ(traced: Traced, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        exported(traced, UNEVEN, tmp_path, "layout=plain")
    assert "LlamaForCausalLM cannot have these sizes: model.layers.0." in str(caught.value)
    assert "load it with irprune.load_pretrained" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("passes", ["prune{kinds=[residual] of=indices ratio=0.25}", "prune{ratio=0.3}"])
def test_depthwise_convolutions_have_fewer_groups(passes: str, tmp_path: Path) -> None:
    """Their number of groups is the number of channels, which differs from layer to layer."""
    sizes = {"num_channels": 3, "hidden_sizes": [16, 24], "depths": [1, 2], "num_stages": 2, "num_labels": 4, "image_size": 16}
    torch.manual_seed(0)
    model = lively(transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes)))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    after, made = exported(load(model, example_inputs={"pixel_values": pixels}), passes, tmp_path)
    loaded = irprune.load_pretrained(made.path)
    depthwise = [module for module in loaded.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert len(depthwise) == 3
    assert all(conv.groups == conv.in_channels == conv.out_channels == conv.weight.shape[0] for conv in depthwise)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).logits, after(pixel_values=pixels).logits)


def test_what_cannot_be_loaded_again_is_one_error(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("sizes of two tensors do not match\nand more")

    monkeypatch.setattr(hf_export.hf_resize, "load", refuse)
    with pytest.raises(ExportError, match=r"cannot be loaded: sizes of two tensors do not match\n  to go on"):
        exported(traced, UNIFORM, tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_differ_are_refused(llama: Any, traced: Traced, tmp_path: Path) -> None:
    """The class computes with another epsilon than the traced program."""
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rms_norm_eps=0.5))
    other.load_state_dict(llama.state_dict())
    with pytest.raises(ExportError, match="does not compute what the program computes"):
        hf_export.export(traced[0], traced[0], pretrained(other.eval()), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_no_hugging_face_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no Hugging Face model"):
        irprune.run(nn.Linear(4, 4), "export{format=hf}", example_inputs=(torch.randn(2, 4),), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copied(uneven: tuple[Program, HfCheckpoint], tmp_path: Path) -> Path:
    return Path(shutil.copytree(uneven[1].path, tmp_path / "copy"))


def test_a_truncated_file_is_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model.safetensors: the file is cut off"):
        irprune.load_pretrained(copied)
    with pytest.raises(TargetError, match=r"model.safetensors: the file is cut off"):
        load(f"hf:{copied}")


def test_another_checksum_is_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model.safetensors: the file's checksum is not the one in irprune.safetensors"):
        irprune.load_pretrained(copied)
    assert not torch.equal(irprune.load_pretrained(copied, verify=False).model.norm.weight, weights["model.norm.weight"] - 1)


def test_outputs_that_are_not_the_reference_are_refused(copied: Path) -> None:
    settings = json.loads((copied / "config.json").read_text())
    settings["rms_norm_eps"] = 0.5
    (copied / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ParityError, match="output logits differs from the reference"):
        irprune.load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"model.no.weight": [3, 3]}}, "model.no.weight is not there"),
        ({"shapes": {"model.norm.weight": [3, 3]}}, r"model.norm.weight has shape \[32\]"),
        ({"attributes": {"model.layers.0.self_attn": {"head_dim": [5, 3]}}}, "head_dim is 4; they want 5"),
        ({"format": 9}, "damaged or of another version: format"),
    ],
)
def test_sizes_of_another_model_are_refused(copied: Path, change: dict[str, Any], message: str) -> None:
    settings = json.loads((copied / "config.json").read_text())
    settings["irprune"].update(change)
    (copied / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=message):
        irprune.load_pretrained(copied)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Writing past ``limit`` bytes fails, as on a full disk."""
    import signal

    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing(traced: Traced, tmp_path: Path) -> None:
    with small_files(20_000), pytest.raises(OutputError, match=r"at .*hf: cannot write: .*File too large"):
        exported(traced, UNIFORM, tmp_path)
    assert list(tmp_path.iterdir()) == []
