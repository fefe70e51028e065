"""The reference of preference training: the model beneath, whatever the method puts before or into it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig, PromptConfig
from rayloom.methods.prompts import virtual_tokens
from rayloom.train.batch import TrainedPositions


@pytest.mark.parametrize("method", [LoraConfig(dropout=0.5), PromptConfig(virtual_tokens=4)], ids=["lora", "prompt"])
def test_without_its_adapter_a_model_is_what_it_was(method, tiny_model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids, positions = torch.arange(5, 25).view(2, 10), torch.tensor([3, 4, 17])
    with torch.no_grad():
        expected = plain(ids).logits.flatten(0, 1)[positions]
    model = attach_method(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = TrainedPositions(model, skip=virtual_tokens(model))
    with torch.no_grad():
        head.choose(positions)
        assert not torch.allclose(model.eval()(input_ids=ids).logits[0], expected, atol=1e-3)
        head.choose(positions, adapted=False)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits[0], expected)
        head.choose(positions)
        assert model(input_ids=ids).logits.shape[1] == 3
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
