"""Mixtures of experts: the router's loss counts once a step, and ZeRO-3 takes blocks as a whole."""

from __future__ import annotations

import pytest
import torch
import transformers
from deepspeed.utils import z3_leaf_module

from rayloom.errors import RequestError
from rayloom.models.check import check_model
from rayloom.models.config import ModelConfig
from rayloom.models.experts import expert_blocks, mark_expert_blocks
from rayloom.models.load import load_causal_lm

IDS = torch.arange(24).view(2, 12)
TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tiny_model, tmp_path_factory):
    """A tiny Mixtral of four experts, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("mixtral")
    for file in tiny_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=4)).save_pretrained(folder)
    return folder


def load(path, coefficient, batches=1):
    model = ModelConfig.model_validate({"path": str(path), "moe_aux_loss": coefficient})
    check_model(model, cutoff=64)
    return load_causal_lm(model, torch.float32, batches_per_step=batches)


def balance(router_logits, experts, top_k):
    """Switch Transformer's equation 4: experts * sum of (share of tokens) * (mean probability), over all layers."""
    probabilities = torch.cat(list(router_logits)).double().softmax(-1)
    chosen = torch.nn.functional.one_hot(probabilities.topk(top_k).indices, experts).double()
    return experts * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()


def test_the_routers_loss_is_added(mixtral):
    plain = load(mixtral, None)(input_ids=IDS, labels=IDS).loss
    model = load(mixtral, 0.5)
    output = model(input_ids=IDS, labels=IDS)
    wanted = balance(output.router_logits, 4, 2)
    torch.testing.assert_close(output.loss - plain, 0.5 * wanted.float(), rtol=1e-5, atol=0)
    assert model.config.router_aux_loss_coef == 0.5


def test_over_the_batches_of_a_step_it_counts_as_its_mean(mixtral):
    """A step sums what its batches return; each has its share of the tokens' loss, and so of the router's."""
    plain = load(mixtral, None)(input_ids=IDS, labels=IDS).loss
    once = load(mixtral, 0.5)(input_ids=IDS, labels=IDS).loss - plain
    share = load(mixtral, 0.5, batches=4)(input_ids=IDS, labels=IDS).loss - plain
    torch.testing.assert_close(4 * share, once, rtol=1e-5, atol=0)


def test_a_family_whose_router_has_no_such_loss(tiny_model, tmp_path):
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = transformers.DeepseekV3Config(num_hidden_layers=1, hidden_size=32, n_routed_experts=4)
    config.save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), moe_aux_loss=0.1, train_from_scratch=True)
    with pytest.raises(RequestError, match=r"model\.moe_aux_loss: models of type deepseek_v3 have no such loss"):
        check_model(model, cutoff=64)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (transformers.MixtralConfig(**TINY, num_local_experts=4), "MixtralSparseMoeBlock"),
        (transformers.Qwen3MoeConfig(**TINY, num_experts=4, moe_intermediate_size=16), "Qwen3MoeSparseMoeBlock"),
        (transformers.OlmoeConfig(**{**TINY, "num_key_value_heads": 4}, num_experts=4), "OlmoeSparseMoeBlock"),
        (transformers.GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2), "GptOssMLP"),
        (transformers.LlamaConfig(**TINY), None),
    ],
)
def test_blocks_that_zero3_takes_as_a_whole(config, block):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert [one.__name__ for one in expert_blocks(model)] == ([block] if block else [])
    classes = mark_expert_blocks(model)
    marked = [type(module) for module in model.modules() if z3_leaf_module(module)]
    assert marked == classes * 2  # one in each layer
