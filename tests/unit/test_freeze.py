"""Block expansion in families that name and count their layers differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.config import FreezeConfig
from rayloom.methods.freeze import chosen_layers, layer_list

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},  # alternating kinds of attention
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_neox": {},
    "mamba": {},
}
IDS = torch.tensor([[5, 9, 17, 33, 65, 100, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_new_layers_change_nothing_until_they_train_and_are_saved_as_layers(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}))
    before = logits(model)
    model = attach_method(model, FreezeConfig(expand=2))
    name, layers = layer_list(model)
    assert len(layers) == 6
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    trains = {key.removeprefix(f"{name}.").split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
    assert trains == {"2", "5"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert not torch.allclose(logits(model), before, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert loaded.config.num_hidden_layers == 6
    assert loaded.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 10)  # layers have caches of their own


@pytest.mark.parametrize(
    ("fields", "layers"), [({"last": 2}, [3, 4]), ({"first": 1}, [0]), ({"first": 3, "last": 3}, [0, 1, 2, 3, 4])]
)
def test_layers_are_counted_from_either_end(fields, layers):
    assert chosen_layers(FreezeConfig(**fields), 5) == layers
