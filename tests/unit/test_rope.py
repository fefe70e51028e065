"""RoPE scaling: the factor, the parameters, and the frequencies that transformers makes of them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from rayloom.errors import RequestError
from rayloom.models.architecture import read_architecture
from rayloom.models.check import check_model
from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.rope import rope_factor, scaled_parameters

LENGTH, THETA, SIZE = 2048, 10000.0, 32  # of the tiny model


@pytest.mark.parametrize(("cutoff", "length", "factor"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2), (17, 8, 3)])
def test_the_least_whole_factor_that_fits(cutoff, length, factor):
    assert rope_factor(cutoff, length) == factor


def settings(model, kind):
    return ModelConfig.model_validate({"path": str(model), "rope_scaling": kind})


def frequencies(model):
    return model.model.rotary_emb.inv_freq.double()


def plain_frequencies():
    return THETA ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_not_at_all_when_it_fits(tiny_model, kind):
    model = load_causal_lm(settings(tiny_model, kind), torch.float32, cutoff=LENGTH)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert model.config.max_position_embeddings == LENGTH


def test_linear_divides_every_frequency(tiny_model):
    model = load_causal_lm(settings(tiny_model, "linear"), torch.float32, cutoff=LENGTH + 1)
    torch.testing.assert_close(frequencies(model), plain_frequencies() / 2, rtol=1e-6, atol=0)
    assert model.config.max_position_embeddings == 2 * LENGTH


def test_dynamic_raises_the_base_with_the_length(tiny_model):
    """NTK-aware scaling: base * (factor * n / length - (factor - 1)) ** (d / (d - 2)), once n is longer."""
    model = load_causal_lm(settings(tiny_model, "dynamic"), torch.float32, cutoff=3 * LENGTH)
    torch.testing.assert_close(frequencies(model), plain_frequencies(), rtol=1e-6, atol=0)
    length = 3 * LENGTH
    position_ids = torch.arange(length).view(1, -1)
    model.model.rotary_emb(torch.zeros(1, length, 1), position_ids)
    base = THETA * (3 * length / LENGTH - 2) ** (SIZE / (SIZE - 2))
    wanted = base ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    torch.testing.assert_close(frequencies(model), wanted, rtol=1e-5, atol=0)


def test_llama3_leaves_short_waves_and_stretches_long_ones(tiny_model):
    model = load_causal_lm(settings(tiny_model, "llama3"), torch.float32, cutoff=4 * LENGTH)
    wanted = []
    for frequency in plain_frequencies().tolist():
        wavelength = 2 * math.pi / frequency
        smooth = (LENGTH / wavelength - 1.0) / (4.0 - 1.0)
        smooth = min(1.0, max(0.0, smooth))
        wanted.append((1 - smooth) * frequency / 4 + smooth * frequency)
    torch.testing.assert_close(frequencies(model), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=0)


def test_yarn_interpolates_slow_dimensions_and_scales_the_attention(tiny_model):
    model = load_causal_lm(settings(tiny_model, "yarn"), torch.float32, cutoff=4 * LENGTH)
    ratio = frequencies(model) / plain_frequencies()
    assert ratio[0] == pytest.approx(1, rel=1e-6)
    assert ratio[-1] == pytest.approx(1 / 4, rel=1e-6)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_only_layers_that_see_the_whole_row_are_stretched():
    own = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    scaled = scaled_parameters(own, "linear", 4, 100)
    assert scaled["sliding_attention"] == own["sliding_attention"]
    assert scaled["full_attention"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}


def test_a_model_without_rotary_positions(tiny_model, tmp_path):
    import transformers

    folder = shutil.copytree(tiny_model, tmp_path / "gpt2")
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64).save_pretrained(folder)
    with pytest.raises(RequestError, match=r"model\.rope_scaling: yarn: a model of type gpt2 has no rotary positions"):
        check_model(settings(folder, "yarn"), cutoff=4096)


def test_a_model_that_is_scaled_already(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "rope_theta": THETA}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": own}))
    check_model(settings(folder, "linear"), cutoff=LENGTH)
    with pytest.raises(RequestError, match=r"the model's positions are scaled already \(yarn, to 2048 tokens\)"):
        check_model(settings(folder, "linear"), cutoff=LENGTH + 1)


def test_a_scaled_model_is_saved_as_it_was_trained(tiny_model, tmp_path):
    model = load_causal_lm(settings(tiny_model, "yarn"), torch.float32, cutoff=2 * LENGTH)
    model.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), torch.float32)
    assert torch.equal(frequencies(again), frequencies(model))
    assert read_architecture(ModelConfig(path=str(tmp_path))).length == 2 * LENGTH
