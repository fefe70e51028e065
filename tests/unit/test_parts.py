"""What is language and what is not, in models that also see or hear."""

from __future__ import annotations

import pytest
import torch
import transformers

from rayloom.methods.targets import linear_layers
from rayloom.models.parts import freeze_parts, frozen_modules, parts_of

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip


MROPE = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4}


def llava():
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**CLIP)
    )


def gemma3():
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **TEXT, head_dim=16, num_key_value_heads=1, layer_types=["full_attention"]
        ),
        vision_config=transformers.SiglipVisionConfig(**CLIP),
    )


def qwen2_5_vl():
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": MROPE},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )  # fmt: skip


def build(config):
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    ("config", "vision", "projector"),
    [
        (llava(), "model.vision_tower.", "model.multi_modal_projector."),
        (gemma3(), "model.vision_tower.", "model.multi_modal_projector."),
        (qwen2_5_vl(), "model.visual.", None),  # its merger is in the tower
    ],
    ids=["llava", "gemma3", "qwen2_5_vl"],
)
def test_every_parameter_belongs_to_a_part(config, vision, projector):
    model = build(config)
    parts = parts_of(model)
    for name, part in parts.items():
        wanted = "vision" if name.startswith(vision) else "language"
        if projector and name.startswith(projector):
            wanted = "projector"
        assert part == wanted, name
    freeze_parts(model)
    assert {parts[name] for name, p in model.named_parameters() if p.requires_grad} == {"language"}
    frozen = frozen_modules(model)
    assert frozen == [name.rstrip(".") for name in (vision, projector) if name]
    assert linear_layers(model)
    assert not [name for name in linear_layers(model) if name.startswith((vision, "lm_head"))]


def test_other_parts_may_be_chosen():
    model = build(llava())
    freeze_parts(model, ("projector",))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("multi_modal_projector" in name for name in trained)
    assert "model.language_model" in frozen_modules(model, ("projector",))


def test_a_text_model_is_all_language():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT))
    assert set(parts_of(model).values()) == {"language"}
    assert frozen_modules(model) == []
    assert len(linear_layers(model)) == 7


def test_gpt2s_transposed_layers_are_linear_too():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2))
    assert [name.rpartition("h.0.")[2] for name in linear_layers(model)] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
