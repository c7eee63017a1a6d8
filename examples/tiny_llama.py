"""A model file: a small LLaMA that writes like Python's reference manual.

It is trained when it is loaded, in about two minutes, on text that every Python installation carries: the
topics behind ``help()``. Grouped-query attention, rotary positions, gated feed-forward layers, 0.5 million
parameters. ``evaluate`` prints what the model writes, then measures its perplexity on text held out.
"""

import functools
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
LENGTH = 128
BATCH = 16
STEPS = 400
BATCHES = 64
PROMPT = "The following"
WORDS = 48


class Writer(nn.Module):
    """The language model from tokens ``(batch, length)`` to logits ``(batch, length, vocabulary)``."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, use_cache=False, **shape))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(input_ids=tokens).logits


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level pairs, learnt from the text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(topics.values(), trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
    return made


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Rows of tokens ``(n, LENGTH)``: to learn from, and the last tenth of every topic's text, which is held out."""
    known, held = [], []
    for text in topics.values():
        cut = len(text) * 9 // 10
        known.append(text[:cut])
        held.append(text[cut:])
    learn, keep = (torch.tensor(tokenizer().encode("\n\n".join(part)).ids) for part in (known, held))
    return tuple(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in (learn, keep))


def model() -> nn.Module:
    torch.manual_seed(0)
    rows, _ = data()
    net = Writer().train()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=6e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        optimiser.zero_grad()
        loss(net(batch), batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return net.eval()


def example_inputs() -> tuple[Tensor]:
    return (data()[0][:2],)


def dynamic_axes() -> dict[str, dict[int, str]]:
    return {"tokens": {0: "batch", 1: "length"}}


def calibration() -> Iterator[Tensor]:
    rows, _ = data()
    yield from rows[torch.randperm(len(rows))[: BATCHES * BATCH]].split(BATCH)


def loss(outputs: Tensor, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def write(predict: Callable[[Tensor], Tensor], prompt: str = PROMPT) -> str:
    """A prompt continued by ``WORDS`` tokens, drawn from the ten most likely ones each."""
    tokens = torch.tensor([tokenizer().encode(prompt).ids])
    generator = torch.Generator().manual_seed(0)
    for _ in range(WORDS):
        likely = torch.as_tensor(predict(tokens[:, -LENGTH:]))[0, -1].float().topk(10)
        drawn = torch.multinomial((likely.values / 0.8).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, likely.indices[drawn][None]], dim=1)
    return tokenizer().decode(tokens[0].tolist())


def evaluate(predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
    print("·", " ".join(write(predict).split()), flush=True)
    _, rows = data()
    losses = [float(loss(torch.as_tensor(predict(part)), part)) for part in rows[:128].split(BATCH) if len(part) == BATCH]
    return {"perplexity": float(torch.tensor(losses).mean().exp())}
