"""Methods on a model that bitsandbytes has quantized to 4 bits, on CPU: QLoRA, QOFT, LoftQ and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.unit.test_methods import load, logits_of, method_of, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rayloom.methods.attach import attach_method
from rayloom.methods.parameters import count_parameters

pytest.importorskip("bitsandbytes")
METHODS = [
    {"type": "lora", "rank": 4},
    {"type": "lora", "rank": 4, "dora": True},
    {"type": "lora", "rank": 4, "init": "loftq"},
    {"type": "oft", "block_size": 16},
    {"type": "ia3"},
    {"type": "vera", "rank": 16},
    {"type": "prompt", "virtual_tokens": 4},
    {"type": "prefix", "virtual_tokens": 4},
]


def quantized(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=["lm_head"],
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, use_cache=False, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_a_quantized_model_learns_and_its_adapter_loads(method, tiny_model, tmp_path):
    torch.manual_seed(0)
    model = attach_method(quantized(tiny_model), method_of(method))
    assert not any(p.requires_grad for name, p in model.named_parameters() if p.dtype == torch.uint8)
    losses = train(model)
    assert losses[2] < losses[0]
    logits = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(tiny_model), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-5)


def test_loftq_takes_back_a_part_of_what_quantization_lost(tiny_model):
    exact = load(tiny_model).model.layers[0].mlp.up_proj.weight.detach()

    def error(init: str) -> float:
        model = attach_method(quantized(tiny_model), method_of({"type": "lora", "rank": 16, "init": init}))
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        ones = torch.eye(layer.in_features)
        with torch.no_grad():
            return float((layer(ones).T - exact).norm())

    assert error("loftq") < 0.9 * error("default")


def test_packed_weights_are_counted_as_what_they_stand_for(tiny_model):
    plain = count_parameters(attach_method(load(tiny_model), method_of({"type": "lora"})))
    packed = count_parameters(attach_method(quantized(tiny_model), method_of({"type": "lora"})))
    assert (packed.trained, packed.all) == (plain.trained, plain.all)
