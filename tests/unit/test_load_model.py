"""Loading: the class from `config.json`, a checkpoint's tensors against the model's, the weights' format."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rayloom.errors import RequestError
from rayloom.models.architecture import read_architecture
from rayloom.models.check import check_model
from rayloom.models.checkpoint import Differences, compare, tensor_shapes
from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.precision import cast_trained


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def change_config(model, **fields):
    file = model / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def settings(model, **fields):
    return ModelConfig.model_validate({"path": str(model), **fields})


def refusal(model, **fields):
    with pytest.raises(RequestError) as refused:
        load_causal_lm(settings(model, **fields), torch.float32)
    return "\n".join(refused.value.messages)


# --- the class --------------------------------------------------------------------------------------------------------


def make(folder, config, model_class):
    model_class(config).save_pretrained(folder)
    return folder


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny model that sees, with a text side of Llama's kind."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TINY, intermediate_size=64, max_position_embeddings=128),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=63,
    )
    return make(tmp_path_factory.mktemp("llava"), config, transformers.LlavaForConditionalGeneration)


def test_a_text_model(tiny_model):
    architecture = read_architecture(settings(tiny_model))
    assert (architecture.model_type, architecture.auto_class) == ("llama", "AutoModelForCausalLM")
    assert (architecture.length, architecture.has_rope, architecture.experts) == (2048, True, 0)
    loaded = load_causal_lm(str(tiny_model), torch.float32)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not loaded.config.use_cache


def test_of_a_model_that_sees_only_the_text_side_trains(llava):
    architecture = read_architecture(settings(llava))
    assert (architecture.auto_class, architecture.is_composite) == ("AutoModelForImageTextToText", True)
    assert architecture.length == 128
    loaded = load_causal_lm(str(llava), torch.float32)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert all("vision_tower" in name or "projector" in name for name in frozen)
    assert all("language_model" in name or "lm_head" in name for name in trained)
    assert {name.split(".")[1] for name in frozen} == {"vision_tower", "multi_modal_projector"}
    ids = torch.arange(8).view(1, 8)
    loaded(input_ids=ids, labels=ids).loss.backward()
    assert all(loaded.get_parameter(name).grad is not None for name in trained)
    assert not loaded.config.get_text_config().use_cache


def test_what_is_no_causal_language_model(model):
    change_config(model, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    assert f"model.path: {model} (type t5) is an encoder-decoder; Rayloom trains causal" in refusal(model)
    change_config(model, model_type="vit", architectures=["ViTModel"], is_encoder_decoder=False)
    assert refusal(model) == f"model.path: {model} (type vit) is no causal language model; Rayloom cannot train it"


def test_code_that_comes_with_the_model_does_not_run_unless_allowed(model):
    (model / "loom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class LoomConfig(LlamaConfig):\n    model_type = 'loom'\n"
        "class LoomForCausalLM(LlamaForCausalLM):\n    config_class = LoomConfig\n"
    )
    code = {"AutoConfig": "loom.LoomConfig", "AutoModelForCausalLM": "loom.LoomForCausalLM"}
    change_config(model, model_type="loom", auto_map=code, architectures=["LoomForCausalLM"])
    assert refusal(model) == (
        f"model.path: {model} (type loom) needs Python code that comes with the model; "
        "say model.trust_remote_code: true if you trust its authors"
    )
    loaded = load_causal_lm(settings(model, trust_remote_code=True), torch.float32)
    assert type(loaded).__name__ == "LoomForCausalLM"


@pytest.mark.parametrize(
    ("kind", "message"), [("nonesuch", "model type 'nonesuch'"), (..., "model without a model_ty")]
)
def test_a_model_type_that_transformers_does_not_know(model, kind, message):
    change_config(model, model_type=kind)
    assert f"{model}: transformers {transformers.__version__} knows no {message}" in refusal(model)


def test_from_scratch_no_weight_is_the_checkpoints(tiny_model):
    transformers.set_seed(1)
    fresh = load_causal_lm(settings(tiny_model, train_from_scratch=True), torch.float32)
    own = load_causal_lm(str(tiny_model), torch.float32)
    assert not torch.equal(fresh.lm_head.weight, own.lm_head.weight)
    transformers.set_seed(1)
    again = load_causal_lm(settings(tiny_model, train_from_scratch=True), torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), again.parameters(), strict=True))


# --- the tensors ------------------------------------------------------------------------------------------------------


def change_tensors(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_misshapen_tensors_are_named(model):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(3)

    change_tensors(model, damage)
    assert refusal(model).splitlines() == [
        f"model.path: the checkpoint {model} lacks 1 tensors of the model: model.layers.1.mlp.up_proj.weight",
        f"model.path: the checkpoint {model} has tensors of another shape: "
        "model.norm.weight: checkpoint (3,), model (64,)",
        f"model.path: the checkpoint {model} holds 1 tensors that the model has no place for: "
        "model.layers.7.mlp.up_proj.weight (model.allow_extra_tensors: true leaves them out)",
    ]


def test_extra_tensors_may_be_left_out(model):
    change_tensors(model, lambda tensors: tensors.update(extra=torch.zeros(1)))
    load_causal_lm(settings(model, allow_extra_tensors=True), torch.float32)


def test_a_file_that_ends_too_early(model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refusal(model)


def test_a_pickle_is_read_where_it_is_allowed(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    loaded = load_causal_lm(settings(model, allow_pickle=True), torch.float32)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], tensors["model.norm.weight"])
    del tensors["model.norm.weight"]
    torch.save(tensors, model / "pytorch_model.bin")
    assert "lacks 1 tensors of the model: model.norm.weight" in refusal(model, allow_pickle=True)


def test_families_that_name_or_cut_their_tensors_otherwise(tmp_path):
    """What transformers saves as one file an expert, or under older names, is no difference."""
    moe = {**TINY, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    configs = [
        transformers.MixtralConfig(**moe, num_local_experts=4),
        transformers.Qwen3MoeConfig(**moe, num_experts=4, moe_intermediate_size=16),
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
        transformers.FalconConfig(**TINY),
        transformers.Phi3Config(**TINY, intermediate_size=64, pad_token_id=0),
    ]
    for config in configs:
        folder = make(
            tmp_path / config.model_type, config, transformers.AutoModelForCausalLM.from_config(config).__class__
        )
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config)
        differences = compare(empty, tensor_shapes(folder))
        assert differences == Differences(), config.model_type
    # One tensor an expert in the file, one for all in the model.
    assert any("experts.3" in name for name in tensor_shapes(tmp_path / "mixtral"))


# --- what is told before anything loads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cutoff", "message"),
    [
        (
            {"attention": "flash_attention_2"},
            64,
            "model.attention: flash_attention_2 needs a GPU, and the job runs on CPU",
        ),
        ({"attention": "flex"}, 64, "model.attention: flex needs a GPU, and the job runs on CPU; use sdpa, or auto"),
        ({"kernels": "liger"}, 64, "model.kernels: liger: its kernels run on a GPU, and the job runs on CPU"),
        ({"kernels": "unsloth"}, 64, "model.kernels: unsloth: its kernels run on a GPU, and the job runs on CPU"),
        ({"moe_aux_loss": 0.1}, 64, "model.moe_aux_loss: a model of type llama has no experts; leave it out"),
        ({"shifted_attention": True}, 100, "data.cutoff 100 does not divide into four groups of an even length"),
        ({"quantization": "eetq"}, 64, "model.quantization: eetq: needs a GPU, and the job runs on CPU"),
    ],
)
def test_refused_on_cpu(tiny_model, fields, cutoff, message):
    with pytest.raises(RequestError) as refused:
        check_model(settings(tiny_model, **fields), cutoff=cutoff, device="cpu")
    assert message in str(refused.value)


@pytest.mark.parametrize("fields", [{"attention": "flash_attention_2"}, {"kernels": "liger"}, {"kernels": "unsloth"}])
def test_packages_that_are_not_there_are_named(tiny_model, fields):
    with pytest.raises(RequestError, match=r"the Python package [\w-]+ is not installed"):
        check_model(settings(tiny_model, **fields), cutoff=64, device="gpu")


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "trained"), [("bf16", torch.float32), ("pure_bf16", torch.bfloat16)])
def test_what_trains_stands_in_fp32_and_the_rest_in_bf16(tiny_model, precision, trained):
    base = load_causal_lm(str(tiny_model), torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    cast_trained(model, precision)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {trained}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(tiny_model, attention):
    loaded = load_causal_lm(settings(tiny_model, attention=attention), torch.float32)
    assert loaded.config._attn_implementation == attention
