"""Configurations of pruned Hugging Face models: by the table, by trying, and why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from irprune.backend.hf_config import Factors, Place, Sizes, Unfit, configure, listed, table, uneven, with_fields

LLAMA = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Factors]]] = {
    # model: class, configuration, what changes, factors of attention axes
    "llama": (
        transformers.LlamaForCausalLM,
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 6},
        {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"q_proj.weight:0": ((4, 2), (2, 2), (2, 2), (3, 3)), "k_proj.weight:0": ((4, 2), (2, 2), (3, 3))},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
        {"n_embd": 24, "n_head": 6, "n_inner": 80},
        {"attn.c_proj.weight:0": ((8, 6), (4, 4))},
    ),
    "bert": (
        transformers.BertModel,
        LLAMA,
        {"hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 28},
        {"query.weight:0": ((8, 6), (4, 4))},
    ),
    "opt": (
        transformers.OPTForCausalLM,
        {"vocab_size": 40, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"ffn_dim": 20},
        {},
    ),
}


def build(model_class: Any) -> Callable[[Any], Any]:
    def on_meta(config: Any) -> Any:
        with torch.device("meta"):
            return model_class(config)

    return on_meta


def case(name: str) -> tuple[Any, dict[str, Any], Sizes, Callable[[Any], Any]]:
    model_class, before, change, known = CASES[name]
    config, make = model_class.config_class(**before), build(model_class)
    old = {name: tuple(tensor.shape) for name, tensor in make(config).state_dict().items()}
    new = {name: tuple(tensor.shape) for name, tensor in make(with_fields(config, change)).state_dict().items()}
    factors: dict[Place, Factors] = {}
    for text, found in known.items():
        tensor, _, axis = text.partition(":")
        factors |= {(name, axis): found for name in new if name.endswith(tensor)}
    return config, change, Sizes.between(old, new, factors), make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use_table", [True, False])
def test_the_table_and_trying_agree(name: str, use_table: bool) -> None:
    config, change, sizes, make = case(name)

    def agrees(tried: Any) -> str | None:
        return None if all(getattr(tried, field) == value for field, value in change.items() if "head" in field) else "numbers differ"

    found, how = configure(config, sizes, make, agrees, use_table=use_table)
    assert {field: getattr(found, field) for field in change} == change
    assert how == ("table" if use_table else "tried")
    untouched = {key: value for key, value in config.to_dict().items() if key not in change}
    assert {key: value for key, value in found.to_dict().items() if key in untouched} == untouched


def test_every_type_of_the_table_exists() -> None:
    for kind, entry in table().items():
        config = transformers.AutoConfig.for_model(kind)
        assert [field for field in entry if not hasattr(config, field) and field != "head_dim"] == []


def test_a_type_that_is_not_listed() -> None:
    config = transformers.BloomConfig()
    assert listed(config, Sizes({}, {})) is None


def test_layers_that_differ_have_no_configuration() -> None:
    old = {"layers.0.up.weight": (8, 4), "layers.1.up.weight": (8, 4)}
    sizes = Sizes.between(old, {"layers.0.up.weight": (6, 4), "layers.1.up.weight": (8, 4)})
    assert uneven(sizes) == "layers.0.up.weight has shape [6, 4] and layers.1.up.weight [8, 4]"
    with pytest.raises(Unfit, match=r"layers.0.up.weight has shape \[6, 4\]"):
        configure(transformers.LlamaConfig(), sizes, lambda config: None, lambda config: None)


def test_what_the_class_refuses_is_said() -> None:
    """Five heads do not divide a width of 32."""
    config = transformers.LlamaConfig(**LLAMA, head_dim=4)
    make = build(transformers.LlamaForCausalLM)
    old = {name: tuple(tensor.shape) for name, tensor in make(config).state_dict().items()}
    heads = {name: (5 * shape[0] // 8, shape[1]) for name, shape in old.items() if name.endswith(("q_proj.weight", "k_proj.weight"))}
    heads |= {name: (5 * shape[0] // 8, shape[1]) for name, shape in old.items() if name.endswith("v_proj.weight")}
    heads |= {name: (shape[0], 5 * shape[1] // 8) for name, shape in old.items() if name.endswith("o_proj.weight")}
    factors = {(name, "0"): ((8, 5), (4, 4)) for name in heads if "o_proj" not in name}
    with pytest.raises(Unfit, match=r"refuses num_attention_heads=5, num_key_value_heads=5.*not a multiple"):
        configure(config, Sizes.between(old, {**old, **heads}, factors), make, lambda config: None)


def test_factors_that_are_not_those_of_the_shapes_are_not_used() -> None:
    sizes = Sizes.between({"w": (8,)}, {"w": (6,)}, {("w", "0"): ((4, 4), (2, 2))})
    assert sizes.factors == {("w", "0"): ((8, 6),)}
    assert list(sizes.readings()) == [(("w", "0"), 0, 1, 8, 6)]
