"""Several answers in one row: what the model says of them, and its gradient, is what it says of each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.test_experience import answers
from transformers import AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.packed_attention import packs_cheaply
from rayloom.models.value_head import attach_critic
from rayloom.train.batch import TrainedPositions
from rayloom.train.ppo_answers import make_answer_batch
from rayloom.train.token_scores import TokenScorer


def policy(tiny_model: Path) -> Any:
    """With a critic and an adapter that change something."""
    torch.manual_seed(0)
    model = attach_method(load_causal_lm(str(tiny_model), torch.float32).double(), LoraConfig(rank=4)).double()
    attach_critic(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "v_head" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("row", [2048, 8])
def test_each_is_what_it_is_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    monkeypatch.setattr("rayloom.train.batch.ROW", row)
    model = policy(tiny_model)
    say = TokenScorer(model, TrainedPositions(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def found(batches: list[list[Any]], packed: bool) -> list[torch.Tensor]:
        made = [make_answer_batch(chosen, pad_token=0, packed=packed) for chosen in batches]
        said = [say(model, batch, temperature=0.7, entropy="trained") for batch in made]
        parts = [torch.cat([getattr(one, name) for one in said]) for name in ("log_probs", "entropies", "values")]
        weights = torch.linspace(0.5, 2, len(parts[0]))
        sum(((part * weights).sum() for part in parts), torch.tensor(0.0)).backward()
        gradients = [parameter.grad.flatten() for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        return [*(part.detach() for part in parts), torch.cat(gradients)]

    together, alone = found([answers()], True), found([[answer] for answer in answers()], False)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_where_rows_hold_several(tiny_model: Path) -> None:
    """Where a model computes nothing between the answers of a row; not on a GPU, whose sdpa has a mask for it, nor in
    a model whose attention is not ours."""
    model = load_causal_lm(str(tiny_model), torch.float32)
    assert packs_cheaply(model, torch.device("cpu"))
    assert not packs_cheaply(model, torch.device("cuda"))
    assert not packs_cheaply(AutoModelForCausalLM.from_pretrained(tiny_model), torch.device("cpu"))
    model.config._attn_implementation = "flash_attention_2"
    assert packs_cheaply(model, torch.device("cuda"))
    model.config.model_type = "falcon_mamba"
    assert not packs_cheaply(model, torch.device("cuda"))
