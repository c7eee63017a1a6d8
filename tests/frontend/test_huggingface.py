"""Hugging Face targets: tiny checkpoints of several kinds, what is derived from them, and what may be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

from irprune import api
from irprune.errors import DataError, IrpruneError, OptionError, TargetError
from irprune.frontend import text
from irprune.frontend.hf_checkpoint import Checkpoint
from irprune.frontend.target import load
from irprune.ir.facts import Task
from irprune.ir.program import Program

torch.set_num_threads(1)

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    raw = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    raw.train_from_iterator([text.shipped()], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    names = dict(zip(("unk_token", "cls_token", "sep_token", "mask_token", "pad_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)


Save = Callable[..., str]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast) -> Save:
    """Writes a tiny checkpoint with seeded weights and gives its target; the same one is written once."""
    written: dict[str, str] = {}

    def saver(model_class: Any, config: Any, *, name: str, with_tokenizer: bool = True) -> str:
        if name not in written:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model_class(config).save_pretrained(folder)
            if with_tokenizer:
                tokenizer.save_pretrained(folder)
            written[name] = f"hf:{folder}"
        return written[name]

    return saver


@pytest.fixture(scope="session")
def llama(save: Save) -> str:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return save(transformers.LlamaForCausalLM, config, name="llama")


@pytest.fixture(scope="session")
def bert(save: Save) -> str:
    return save(transformers.BertModel, transformers.BertConfig(**SIZES), name="bert")


def loaded(target: str, **options: Any) -> tuple[Program, Task]:
    program, facts = load(target, **{"sequence": 16, **options})
    task = next(fact for fact in facts if isinstance(fact, Task))
    assert isinstance(task, Task)
    return program, task


@pytest.fixture(scope="session")
def loaded_llama(llama: str) -> tuple[Program, Task]:
    return loaded(llama)


def error_of(target: str, **options: Any) -> IrpruneError:
    with pytest.raises(IrpruneError) as caught:
        load(target, **options)
    return caught.value


def plain(target: str, model_class: Any) -> Any:
    return model_class.from_pretrained(target.removeprefix("hf:")).eval()


def test_causal_lm(llama: str, loaded_llama: tuple[Program, Task]) -> None:
    program, task = loaded_llama
    model = plain(llama, transformers.LlamaForCausalLM)
    ids = torch.randint(VOCAB, (3, 9))
    torch.testing.assert_close(program(input_ids=ids), model(ids).logits)
    assert set(program.tensors) <= {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.interface.inputs == ("input_ids",)
    assert program.interface.dynamic == ({0: "batch", 1: "sequence"},)
    assert program.interface.outputs == ("logits",)
    assert program.interface.notes == ()
    assert any("scaled_dot_product" in str(node.target) for node in program.nodes)

    assert task.target == llama
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    assert task.evaluate is not None
    batches = list(task.calibration())
    assert len(batches) == 8
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, task.calibration(), strict=True))
    args, kwargs = task.inputs(batches[0])
    assert args == ()
    expected = model(kwargs["input_ids"], labels=kwargs["input_ids"]).loss
    torch.testing.assert_close(task.loss(program(**kwargs), batches[0]), expected)
    perplexity = task.evaluate(program)["perplexity"]
    assert perplexity == pytest.approx(VOCAB, rel=0.1)
    assert task.evaluate(lambda input_ids: program(input_ids=input_ids).detach().numpy()) == {"perplexity": pytest.approx(perplexity)}


def test_held_out_text_is_not_calibrated_with(llama: str) -> None:
    program, task = loaded(llama, windows=1000)
    seen: list[torch.Tensor] = []

    def predict(input_ids: torch.Tensor) -> torch.Tensor:
        seen.extend(input_ids)
        return program(input_ids=input_ids)

    assert task.calibration is not None
    assert task.evaluate is not None
    task.evaluate(predict)
    calibrated = {tuple(row.tolist()) for batch in task.calibration() for row in batch["input_ids"]}
    held_out = {tuple(row.tolist()) for row in seen}
    assert not calibrated & held_out
    assert len(held_out) == round(0.2 * (len(calibrated) + len(held_out)))


def test_attention_eager_and_half_precision(llama: str) -> None:
    program, _ = loaded(llama, attention="eager", dtype="bfloat16")
    assert program.tensors["model.norm.weight"].dtype == torch.bfloat16
    assert not any("scaled_dot_product" in str(node.target) for node in program.nodes)


def test_meta_needs_only_the_configuration(llama: str, loaded_llama: tuple[Program, Task], tmp_path: Path) -> None:
    config = Path(llama.removeprefix("hf:"), "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    program, task = loaded(f"hf:{tmp_path}", meta=True)
    assert all(tensor.is_meta for tensor in program.tensors.values())
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.interface.dynamic == ({0: "batch", 1: "sequence"},)
    assert task.calibration is None
    full, _ = loaded_llama
    assert {name: tensor.shape for name, tensor in program.tensors.items()} == {name: tensor.shape for name, tensor in full.tensors.items()}


def test_encoder_without_a_head(bert: str) -> None:
    program, task = loaded(bert)
    model = plain(bert, transformers.BertModel)
    assert program.interface.inputs == ("input_ids", "attention_mask")
    assert program.interface.outputs == ("last_hidden_state",)
    assert program.interface.notes == ("not needed for last_hidden_state and left out: pooler.dense.weight and 1 more",)
    ids, mask = torch.randint(VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    torch.testing.assert_close(program(input_ids=ids, attention_mask=mask), model(ids, mask).last_hidden_state)
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    assert task.evaluate is not None
    batch = next(iter(task.calibration()))
    ids = batch["input_ids"]
    assert ids.shape == (2, 16)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    task.loss(program(**task.inputs(batch)[1]), batch).backward()
    gradient = program.tensors["encoder.layer.0.attention.self.query.weight"].grad
    assert gradient is not None
    assert bool(gradient.any())
    assert task.evaluate(program) == {"cosine": pytest.approx(1.0)}
    assert task.evaluate(lambda **inputs: -program(**inputs)) == {"cosine": pytest.approx(-1.0)}


def test_chosen_outputs_and_nothing_is_printed(bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    program, _ = loaded(bert, outputs="pooler_output, last_hidden_state")
    assert capfd.readouterr() == ("", "")
    model = plain(bert, transformers.BertModel)
    ids = torch.randint(VOCAB, (2, 7))
    pooled, hidden = program(input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = model(ids)
    torch.testing.assert_close(pooled, expected.pooler_output)
    torch.testing.assert_close(hidden, expected.last_hidden_state)
    error = error_of(bert, outputs="logits")
    assert error.message == "the model has no output 'logits'; its outputs are last_hidden_state, pooler_output"


def test_masked_lm(save: Save) -> None:
    program, task = loaded(save(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES), name="masked"))
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    assert task.evaluate is not None
    batch = next(iter(task.calibration()))
    hidden = batch["input_ids"] == 3
    assert hidden.sum(1).tolist() == [2, 2]
    assert torch.equal(hidden, batch["labels"] != -100)
    logits = program(**task.inputs(batch)[1])
    expected = torch.nn.functional.cross_entropy(logits[hidden], batch["labels"][hidden])
    torch.testing.assert_close(task.loss(logits, batch), expected)
    assert task.evaluate(program)["perplexity"] == pytest.approx(VOCAB, rel=0.2)


def test_classifier_of_text(save: Save) -> None:
    config = transformers.BertConfig(**SIZES, num_labels=3)
    program, task = loaded(save(transformers.BertForSequenceClassification, config, name="classifier"))
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    assert task.evaluate is not None
    batch = next(iter(task.calibration()))
    logits = program(**task.inputs(batch)[1])
    assert torch.equal(batch["labels"], logits.argmax(1))
    torch.testing.assert_close(task.loss(logits, batch), torch.nn.functional.cross_entropy(logits, batch["labels"]))
    assert task.evaluate(program) == {"agreement": 1.0}
    assert task.evaluate(lambda **inputs: -program(**inputs))["agreement"] < 0.5


def test_sequence_to_sequence(save: Save) -> None:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=4)
    target = save(transformers.T5ForConditionalGeneration, config, name="t5")
    program, task = loaded(target)
    assert program.interface.inputs == ("input_ids", "attention_mask", "decoder_input_ids")
    assert program.interface.dynamic[2] == {0: "batch", 1: "decoder_sequence"}
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    batch = next(iter(task.calibration()))
    assert (batch["decoder_input_ids"][:, 0] == 4).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert torch.equal(batch["labels"][:, :-1], batch["decoder_input_ids"][:, 1:])
    assert (batch["labels"][:, -1] == -100).all()
    assert torch.isfinite(task.loss(program(**task.inputs(batch)[1]), batch))


def test_images_without_data_are_noise_and_say_so(save: Save, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    target = save(transformers.ViTForImageClassification, config, name="vit", with_tokenizer=False)
    program, task = loaded(target, batch=3, windows=6)
    assert program.interface.dynamic == ({0: "batch"},)
    assert program.interface.notes == ("calibration inputs are noise; give real ones with --calibration FILE",)
    assert task.calibration is not None
    assert task.evaluate is not None
    assert [batch["pixel_values"].shape for batch in task.calibration()] == [(3, 3, 16, 16)] * 2
    assert task.evaluate(program) == {"agreement": 1.0}

    images, labels = torch.rand(7, 3, 16, 16), torch.arange(7) % 2
    safetensors.torch.save_file({"pixel_values": images, "labels": labels}, tmp_path / "images.safetensors")
    program, task = loaded(target, calibration=str(tmp_path / "images.safetensors"))
    assert program.interface.notes == ()
    assert task.calibration is not None
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in task.calibration()]), images[:6])
    assert torch.equal(torch.cat([batch["labels"] for batch in task.calibration()]), labels[:6])


def test_class_that_refuses_sdpa_gets_eager_attention(save: Save) -> None:
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    program, _ = loaded(save(transformers.DebertaV2ForMaskedLM, config, name="deberta"))
    assert any("softmax" in str(node.target) for node in program.nodes)


def test_axis_that_the_model_makes_constant_is_a_note(save: Save) -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    program, _ = loaded(save(transformers.MambaForCausalLM, config, name="mamba"), sequence=4)
    assert program.interface.dynamic == ({0: "batch"},)
    assert program.interface.notes[0].startswith(
        "axis 1 ('sequence') of input 'input_ids' is not dynamic: the model works for size 4 only ("
    )


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    hidden, heads, kv, ffn, words = 16, 4, 2, 24, ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ▁."]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    for special, index in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{special}_token_id")(index)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(words), hidden),
        "output": (len(words), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    program, task = loaded(f"hf:{tmp_path}/tiny.gguf", sequence=8)
    torch.testing.assert_close(program.tensors["model.layers.0.mlp.gate_proj.weight"].detach(), weights["blk.0.ffn_gate"])
    assert program.interface.outputs == ("logits",)
    assert task.calibration is not None
    assert next(iter(task.calibration()))["input_ids"].shape == (2, 8)


# -- calibration text -----------------------------------------------------------------------------


def test_text_of_a_file(llama: str, tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    story = "The fox ran over the hill. " * 40
    (tmp_path / "story.txt").write_text(story, encoding="utf-8")
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": story}) + "\n", encoding="utf-8")
    tokens = tokenizer(story)["input_ids"]
    assert text.read(tmp_path / "story.txt") == text.read(tmp_path / "story.jsonl") == story
    _, task = loaded(llama, calibration=str(tmp_path / "story.jsonl"), windows=4)
    assert task.calibration is not None
    assert torch.cat([batch["input_ids"] for batch in task.calibration()]).flatten().tolist() == tokens[:64]


def test_token_indices_of_a_file(llama: str, tmp_path: Path) -> None:
    ids = torch.randint(VOCAB, (10, 12), dtype=torch.int32)
    safetensors.torch.save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    _, task = loaded(llama, calibration=str(tmp_path / "ids.safetensors"))
    assert task.calibration is not None
    assert torch.equal(torch.cat([batch["input_ids"] for batch in task.calibration()]), ids[:8].long())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no such calibration file"),
        ("empty.txt", b" \n", "the calibration text is empty"),
        ("short.txt", b"Hello", "tokens, too few for two windows of 62"),
        ("latin.txt", b"caf\xe9", "not a text in UTF-8: "),
        ("ids.jsonl", b'{"tokens": [1, 2]}', "the file has no 'input_ids'; it has tokens"),
        ("alpaca.jsonl", b'{"instruction": "a", "n": 1, "output": "b"}', "the samples hold text under instruction, output"),
        (
            "asked.jsonl",
            b'{"prompt": "a", "response": "b"}\n\n{"promt": "a"}',
            "no `prompt`, as others have; it has promt",
        ),
        ("empty.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}', "the response not empty"),
        ("told.jsonl", b'{"text": "a"}\n{"txt": "a"}', "no `text`, as others have; it has txt"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 1}', "`text` must be a text"),
    ],
)
def test_bad_text(llama: str, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = error_of(llama, calibration=str(tmp_path / name))
    assert isinstance(error, DataError)
    assert message in error.message
    assert error.hint
    if "as others have" in message:
        assert error.where == f"{tmp_path / name}:{len((content or b'').splitlines())}"


def test_prompts_do_not_count(llama: str, tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Labels are the response and the end of text; what fills a row up has none; a step's weight is what counts."""
    lines = [
        {"prompt": "Say a word: ", "response": "tree"},
        {"prompt": "One: ", "response": "two three four"},
        {"prompt": "A" * 500, "response": "x"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    _, task = loaded(llama, calibration=str(tmp_path / "train.jsonl"), sequence=24)
    assert task.calibration is not None
    assert task.read is not None
    assert task.positions is not None
    assert task.loss is not None
    (batch,) = task.read(tmp_path / "train.jsonl")()
    (first,) = task.calibration()
    assert all(torch.equal(first[key], value) for key, value in batch.items())
    rows = {tokenizer.decode(ids[labels != -100]): (ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)}
    assert {"".join(key.replace("Ġ", "").split()) for key in rows} == {"tree", "twothreefour"}
    counts = task.positions(batch)
    assert counts.shape == batch["labels"].shape
    assert int(counts.sum()) == int((batch["labels"] != -100).sum())
    logits = torch.randn(*batch["labels"].shape, 512, generator=torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(logits[counts], batch["labels"].roll(-1, 1)[counts])
    torch.testing.assert_close(task.loss(logits, batch), each)


def test_samples_that_are_left_out_are_counted(llama: str, tmp_path: Path) -> None:
    lines = [{"prompt": "A" * size, "response": "x"} for size in (2, 500, 3, 600)]
    for name, chosen in (("train", lines), ("long", lines[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    note = "2 of 4 samples of train.jsonl are left out: their prompts fill sequence=24 tokens; raise it with --set sequence"
    program, task = loaded(llama, calibration=str(tmp_path / "train.jsonl"), sequence=24)
    assert note in program.interface.notes
    _, task = loaded(llama, sequence=24)
    assert task.said == []
    assert task.read is not None
    task.read(tmp_path / "train.jsonl")
    assert task.said == [note]
    with pytest.raises(DataError, match="no response begins within sequence=24 tokens") as caught:
        task.read(tmp_path / "long.jsonl")
    assert caught.value.hint == "raise it with --set sequence"
    passes = f"lora{{r=2}},recover{{data={tmp_path / 'train.jsonl'} epochs=1 held_out=0}}"
    out = api.run(llama, passes, out=tmp_path / "out", sequence=24)
    assert note in out.manifest.notes


def test_a_response_ends_with_the_end_of_text() -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, content: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, content), *([0] if add_special_tokens else [])]}

    samples = [("ab", "c"), ("ab", "cdefgh"), ("abcdefgh", "c")]
    rows = text.masked(Letters(), samples, 6)
    assert rows == [
        ([1, 97, 98, 99, 0], [-100, -100, -100, 99, 0]),
        ([1, 97, 98, 99, 100, 101], [-100, -100, -100, 99, 100, 101]),
    ]
    assert text.padded(rows, 7)["input_ids"][0].tolist() == [1, 97, 98, 99, 0, 7]
    assert text.padded(rows, 7)["labels"][0].tolist() == [-100, -100, -100, 99, 0, -100]


def test_without_a_tokenizer_there_is_no_calibration(save: Save) -> None:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    program, task = loaded(save(transformers.LlamaForCausalLM, config, name="mute", with_tokenizer=False))
    assert task.calibration is None
    assert task.loss is None
    assert program.interface.notes[0].startswith("there is no tokenizer, so no calibration text: ")


# -- what may be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "target option 'dtype' is 'int8': input should be 'float32', 'bfloat16', 'float16' or 'auto'"),
        ({"attention": "flash"}, "target option 'attention' is 'flash': input should be 'sdpa' or 'eager'"),
        ({"batch": 1}, "target option 'batch' is 1: input should be greater than or equal to 2"),
        ({"sequence": "long"}, "target option 'sequence' is 'long': input should be a valid integer, unable to parse string as an integer"),
        ({"windows": 0}, "target option 'windows' is 0: input should be greater than or equal to 1"),
        ({"size": 3}, "unknown target option 'size'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    error = error_of("hf:nowhere", **options)
    assert isinstance(error, OptionError)
    assert error.message == message
    assert error.hint


def test_no_such_directory_or_configuration(tmp_path: Path) -> None:
    error = error_of(f"hf:{tmp_path}")
    assert str(error) == (
        f"[target] at hf:{tmp_path}: the directory {tmp_path} holds no config.json\n  to go on: name the directory of a checkpoint"
    )
    assert error_of(f"hf:{tmp_path}/none").message == f"the directory {tmp_path}/none holds no config.json"
    assert error_of(f"hf:{tmp_path}/none.gguf").message == f"the directory {tmp_path} holds no none.gguf"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert error_of(f"hf:{tmp_path}").message.startswith("transformers cannot load it: ValueError: Unrecognized model")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert error_of(f"hf:{tmp_path}").message.startswith("transformers cannot load it: OSError: ")


def test_missing_weights_and_weights_of_another_shape(llama: str, tmp_path: Path) -> None:
    source = Path(llama.removeprefix("hf:"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = error_of(f"hf:{tmp_path}")
    assert isinstance(error, TargetError)
    assert "no file named model.safetensors" in error.message
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert error_of(f"hf:{tmp_path}").message.startswith("the file is cut off or no safetensors file: ")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}), encoding="utf-8")
    assert error_of(f"hf:{tmp_path}").message.startswith("transformers cannot load it: RuntimeError")


def test_weights_that_the_checkpoint_lacks_are_a_note(llama: str, tmp_path: Path) -> None:
    source = Path(llama.removeprefix("hf:"))
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = safetensors.torch.load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del weights[name]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    program, _ = loaded(f"hf:{tmp_path}")
    assert program.interface.notes[0] == f"the checkpoint lacks {name}: newly initialised from the seed"
    checkpoint = Checkpoint.find(f"hf:{tmp_path}")
    for seed in (0, 1):
        model, _, _ = checkpoint.build(dtype="float32", attention="sdpa", how="whole", seed=seed)
        assert torch.equal(model.get_parameter(name), program.tensors[name]) == (seed == 0)


def test_own_code_runs_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}}),
        encoding="utf-8",
    )
    (tmp_path / "own.py").write_text("open('ran', 'w').close()\n", encoding="utf-8")
    error = error_of(f"hf:{tmp_path}")
    assert isinstance(error, TargetError)
    assert error.hint == "say trust_remote_code=true if you trust the checkpoint's own code"
    assert not Path("ran").exists()


def test_unknown_class(llama: str, tmp_path: Path) -> None:
    config = json.loads(Path(llama.removeprefix("hf:"), "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForDreams"]}), encoding="utf-8")
    assert error_of(f"hf:{tmp_path}").message == "transformers has no class 'LlamaForDreams'"
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}), encoding="utf-8")
    program, _ = loaded(f"hf:{tmp_path}", meta=True)
    assert program.interface.outputs == ("logits",)


# -- a real model ---------------------------------------------------------------------------------


def test_stories260k_predicts_its_own_kind_of_text(tmp_path: Path) -> None:
    shared = Path(os.environ.get("IRPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
    folder = shared / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"SKIPPED: no stories260k in {folder}; set IRPRUNE_SHARED")
    stories = (shared / "data" / "tinystories" / "tinystories_valid_cs336_sample.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "stories.txt").write_text(stories.replace("<|endoftext|>", ""), encoding="utf-8")
    program, task = loaded(f"hf:{folder}", calibration=str(tmp_path / "stories.txt"), sequence=128)
    assert sum(tensor.numel() for name, tensor in program.tensors.items() if program.is_parameter(name)) == 260_032
    assert task.evaluate is not None
    assert task.evaluate(program)["perplexity"] < 8.0
