"""Which models' own losses are averaged over the tokens of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from rayloom.stages.step_loss import averages_over_step

SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS: dict[str, Any] = {
    "bart": lambda: transformers.BartForCausalLM(
        transformers.BartConfig(d_model=16, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, **SMALL)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **SMALL
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, **SMALL
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_told_as_the_loss_itself_tells_it(name: str) -> None:
    model = MODELS[name]().eval()
    ids = torch.tensor([[5, 6, 7, 8]])

    def loss(items: int) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(items)).loss)

    looks = loss(4) != pytest.approx(loss(40))
    assert looks == (name != "bart")
    assert averages_over_step(model) == looks
    target = "fc1" if name != "llama" else "up_proj"
    assert averages_over_step(get_peft_model(model, LoraConfig(target_modules=[target]))) == looks
