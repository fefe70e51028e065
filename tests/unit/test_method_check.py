"""A method that does not fit is refused from `config.json` alone, with the key and what would be right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.test_methods import load, method_of
from transformers import AutoConfig, AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.attach import attach_method
from rayloom.methods.check import check_method
from rayloom.methods.rules import check_combination
from rayloom.methods.tuners import REFUSED_TUNERS


@pytest.fixture
def light(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights: what is checked reads none."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(tiny_model, tmp_path / "light", ignore=ignored)


def job(model: Path, method: dict[str, Any], **parts: Any) -> JobConfig:
    data = {"train": ["a.jsonl"], **parts.pop("data", {})}
    return JobConfig.model_validate(
        {"name": "a", "model": {"path": str(model)}, "method": method, "data": data, **parts}
    )


def refusal(model: Path, method: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as refused:
        check_method(job(model, method))
    return "\n".join(refused.value.messages)


GOOD = [
    {"rank": 64},
    {"target": ["q_proj", "layers.0.mlp.down_proj"]},
    {"target": r".*\.layers\.1\..*_proj"},
    {"init": "pissa", "rank": 4},
    {"extra_modules": ["embed_tokens", "lm_head"]},
    {"type": "freeze", "last": 2},
    {"type": "freeze", "expand": 2, "modules": ["self_attn"]},
    {"type": "oft", "block_size": 64},
    {"type": "adapter"},
    {"type": "prompt", "init_text": "Hi"},
    {"type": "p_tuning"},
    {"type": "prefix"},
    {"type": "ia3"},
    {"type": "vera"},
    {"type": "peft", "peft_type": "lokr", "fields": {"r": 2}},
]


@pytest.mark.parametrize("method", GOOD)
def test_what_fits_is_let_through_and_no_weight_is_read(method, light):
    check_method(job(light, method))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"rank": 65},
            "method.rank: 65 is above the size of model.layers.0.mlp.down_proj (128 x 64); at most 64, or leave that "
            "layer out of method.target",
        ),
        ({"target": ["q_porj"]}, "method.target: the model has no module 'q_porj'; did you mean 'q_proj'"),
        ({"target": ["q_proj", "x"]}, "method.target: the model has no module 'x'; known here: model, embed_tokens,"),
        ({"target": ["self_attn"]}, "method.target: Target module LlamaAttention("),
        (
            {"target": "q_proj"},
            "method.target: no module's whole name matches 'q_proj'; for all modules of a name write a list ([q_proj])",
        ),
        ({"target": "(q_proj"}, "method.target: '(q_proj' is no regular expression: missing ), unterminated"),
        ({"extra_modules": ["head"]}, "method.extra_modules: the model has no module 'head'; did you mean 'lm_head'"),
        ({"init": "loftq"}, "method.init: loftq makes up for what is lost when weights are quantized to 4 bits"),
        ({"type": "freeze", "last": 3}, "method.last: 3 layers, but the model has 2"),
        ({"type": "freeze", "first": 9}, "method.first: 9 layers, but the model has 2"),
        (
            {"type": "freeze", "last": 1, "modules": ["attn"]},
            "method.modules: layer model.layers.1 has no module 'attn'; did you mean 'self_attn'?",
        ),
        (
            {"type": "freeze", "expand": 3},
            "method.expand: 2 layers cannot be divided into 3 equal groups; possible are 1, 2",
        ),
        (
            {"type": "oft", "block_size": 48},
            "method.block_size: 48 does not divide the 64 inputs of model.layers.1.mlp.up_proj; possible are "
            "2, 4, 8, 16, 32, 64",
        ),
        ({"type": "oft", "blocks": 3}, "method.blocks: 3 does not divide the 64 inputs of"),
        (
            {"type": "adapter", "layers": 3},
            "method.layers: Config specifies more adapter layers '3' than the model has",
        ),
        ({"type": "ia3", "target": ["k"]}, "method.target: the model has no module 'k'"),
        ({"type": "peft", "peft_type": "LOHAA"}, "method.peft_type: PEFT has no 'LOHAA'; did you mean 'LOHA'"),
        (
            {"type": "peft", "peft_type": "LOHA", "fields": {"alhpa": 4, "rank": 1}},
            "method.fields: LOHA has no field 'alhpa'; did you mean 'alpha'?\nmethod.fields: LOHA has no field 'rank'",
        ),
        (
            {"type": "peft", "peft_type": "LOHA", "fields": {"target_modules": ["nothing"]}},
            "method.fields: Target modules {'nothing'} not found in the base model.",
        ),
        (
            {"type": "peft", "peft_type": "LORA", "fields": {"init_lora_weights": "pissa"}},
            "method.fields: write `type: lora` with `init`",
        ),
        (
            {"type": "peft", "peft_type": "LORA", "fields": {"layers_pattern": "h", "target_modules": ["q_proj"]}},
            "method.fields: LORA: When `layers_pattern` is specified",
        ),
    ],
)
def test_what_does_not_fit_is_refused(method, message, light):
    assert refusal(light, method).startswith(message)


@pytest.mark.parametrize("name", sorted(REFUSED_TUNERS))
def test_tuners_that_need_more_than_fields_say_what(name, light):
    said = refusal(light, {"type": "peft", "peft_type": name.lower()})
    assert said == f"method.peft_type: {name} cannot be trained by its fields alone: {REFUSED_TUNERS[name]}"


def _config_folder(folder: Path, model_type: str, **fields: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    AutoConfig.for_model(model_type, vocab_size=128, **sizes, **fields).save_pretrained(folder)
    return folder


def test_gates_of_experts_may_be_smaller_than_the_rank(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4}
    folder = _config_folder(tmp_path / "moe", "qwen2_moe", shared_expert_intermediate_size=32, **experts)
    check_method(job(folder, {"rank": 16}))  # `shared_expert_gate` has one output
    assert "above the size of" in refusal(folder, {"rank": 33})


def test_families_that_a_method_does_not_know(tmp_path):
    qwen = _config_folder(tmp_path / "qwen", "qwen3", head_dim=16, num_key_value_heads=4)
    assert refusal(qwen, {"type": "adapter"}) == "method.type: Unsupported model type for adaption prompt: 'qwen3'."
    jamba = _config_folder(
        tmp_path / "jamba", "jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False
    )
    assert refusal(jamba, {"type": "freeze", "expand": 2}).startswith(
        "method.expand: jamba gives layers their roles by number"
    )


def test_a_quantized_checkpoint_cannot_train_its_own_weights(light):
    config = json.loads((light / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (light / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    assert refusal(light, {"type": "freeze", "last": 1}).startswith(
        "method.type: freeze trains the model's own weights"
    )
    check_method(job(light, {"type": "lora"}))


# --- the job alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parts", "message"),
    [
        ({"type": "prompt"}, {}, "data.packing: virtual tokens (method.type: prompt) stand before a row"),
        ({"type": "p_tuning"}, {}, "data.packing: virtual tokens (method.type: p_tuning) stand before a row"),
        ({"type": "prefix"}, {}, "data.packing: virtual tokens (method.type: prefix) stand before a row"),
        (
            {"type": "prefix"},
            {"data": {"packing": False}, "train": {"activation_checkpointing": True}},
            "train.activation_checkpointing: a prefix",
        ),
        ({"init": "pissa"}, {"train": {"deepspeed": "zero3"}}, "train.deepspeed: zero3 has shards of weights only"),
        (
            {"type": "freeze", "expand": 1},
            {"train": {"deepspeed": "zero3"}},
            "train.deepspeed: zero3 has shards of weights only, and method.expand copies whole layers; use zero2",
        ),
        (
            {"type": "peft", "peft_type": "loha"},
            {"train": {"deepspeed": "zero3"}},
            "train.deepspeed: zero3 has shards of weights only, and method.peft_type: LOHA is not known to train on",
        ),
    ],
)
def test_combinations_that_the_job_alone_rules_out(method, parts, message, tmp_path):
    with pytest.raises(RequestError) as refused:
        check_combination(job(tmp_path, method, **parts))
    assert refused.value.messages[0].startswith(message)


def test_combinations_that_go_together(tmp_path):
    check_combination(job(tmp_path, {"type": "prompt"}, data={"packing": False}))
    check_combination(job(tmp_path, {"type": "peft", "peft_type": "hra"}, train={"deepspeed": "zero3"}))
    check_combination(job(tmp_path, {"type": "lora"}, train={"deepspeed": "zero3", "activation_checkpointing": True}))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"new_adapter": True}, "`new_adapter` says what to do after `adapters`"),
        ({"dora": True, "init": "pissa"}, "`dora` and `init: pissa` cannot be saved"),
        ({"init": "orthogonal", "rank": 3}, "`init: orthogonal` needs an even rank, not 3"),
        ({"adapters": ["a"], "init": "pissa"}, "`init: pissa` is of a new adapter"),
        ({"init": "pisa"}, "unknown 'pisa'; known are default, gaussian"),
        ({"type": "freeze"}, "nothing would train"),
        ({"type": "freeze", "expand": 1, "last": 1}, "`expand` trains the new layers"),
        ({"type": "freeze", "extra_modules": ["norm"], "modules": ["mlp"]}, "`modules` are parts of layers"),
        ({"type": "oft", "blocks": 2, "block_size": 32}, "`block_size` and `blocks` are two ways"),
        ({"type": "ia3", "target": ["k_proj"], "feedforward": ["up_proj"]}, "`feedforward`: 'up_proj' is not in"),
    ],
)
def test_faults_within_the_method(method, message):
    with pytest.raises(ValueError, match="validation error") as refused:
        method_of({"type": "lora", **method})
    assert message in str(refused.value)


# --- adapters of before -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model that a test may damage."""
    attach_method(load(tiny_model), method_of({"type": "lora", "rank": 4})).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_of_this_model_goes_on(adapter, tiny_model):
    check_method(job(tiny_model, {"adapters": [str(adapter)]}))
    check_method(job(tiny_model, {"adapters": [str(adapter), str(adapter)], "new_adapter": True, "rank": 2}))


def test_what_is_no_adapter(adapter, tiny_model, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert refusal(tiny_model, {"adapters": [nowhere]}) == f"method.adapters[0]: no such adapter folder: {nowhere}"
    assert refusal(tiny_model, {"adapters": [str(adapter), str(tiny_model)]}).endswith(
        "has no adapter_config.json; it holds no adapter"
    )
    change_config(adapter, peft_type="LROA")
    assert refusal(tiny_model, {"adapters": [str(adapter)]}).endswith("PEFT has no 'LROA'")
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be understood" in refusal(tiny_model, {"adapters": [str(adapter)]})


def test_a_pickle_is_refused(adapter, tiny_model):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    said = refusal(tiny_model, {"adapters": [str(adapter)]})
    assert "adapter_model.bin, a pickle, which can run code when it is loaded" in said
    (adapter / "adapter_model.bin").unlink()
    assert refusal(tiny_model, {"adapters": [str(adapter)]}).endswith("has no adapter_model.safetensors")


def test_missing_and_extra_tensors_are_named(adapter, tiny_model):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({key: value for key, value in tensors.items() if key != name} | {"left.over": tensors[name]}, file)
    said = refusal(tiny_model, {"adapters": [str(adapter)]})
    assert said == f"method.adapters[0]: {adapter} does not fit {tiny_model}: it lacks {name}, and has also left.over"
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refusal(tiny_model, {"adapters": [str(adapter)]})


def test_an_adapter_of_another_base(adapter, tiny_model, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model, hidden_size=32, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    said = refusal(tmp_path / "other", {"adapters": [str(adapter)]})
    assert said.startswith(
        f"method.adapters[0]: {adapter} was trained on another base ({tiny_model}): base_model.model."
    )
    assert said.endswith(f"is 4 x 64, and {tmp_path / 'other'} needs 4 x 32")


def test_the_same_shape_is_not_the_same_base(adapter, tiny_model, tmp_path):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    check_method(job(moved, {"adapters": [str(adapter)]}))  # another name, the same weights
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    assert f"was trained on {tiny_model}, and model.path is {moved}" in refusal(moved, {"adapters": [str(adapter)]})
    change_config(adapter, base_model_name_or_path="someone/moved")
    check_method(job(moved, {"adapters": [str(adapter)]}))


def test_what_the_job_says_of_an_adapter_that_goes_on_must_be_so(adapter, tiny_model):
    said = refusal(tiny_model, {"adapters": [str(adapter)], "rank": 16})
    assert said.startswith("method.rank: 16, but the adapter that goes on has 4; leave it out")
    check_method(job(tiny_model, {"adapters": [str(adapter)], "rank": 4, "alpha": 8}))
    assert refusal(tiny_model, {"adapters": [str(adapter)], "alpha": 9}).startswith("method.alpha: 9.0, but")


def test_only_lora_goes_on(tiny_model, tmp_path):
    vera = attach_method(load(tiny_model), method_of({"type": "vera", "rank": 4}))
    vera.save_pretrained(tmp_path / "vera")
    assert refusal(tiny_model, {"adapters": [str(tmp_path / "vera")]}).endswith("is VERA; only LoRA adapters go on")
    check_method(job(tiny_model, {"adapters": [str(tmp_path / "vera")], "new_adapter": True}))
