"""Quantized weights: each way loads and trains an adapter on CPU, or says in one sentence what is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rayloom.errors import RequestError
from rayloom.methods.targets import linear_layers
from rayloom.models.architecture import read_architecture
from rayloom.models.check import check_model
from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.precision import cast_trained
from rayloom.models.quantization import Quantized, leave_out_of_broadcast, quantized_as

IDS = torch.arange(40).view(2, 20)


def settings(path, quantization=None):
    return ModelConfig.model_validate({"path": str(path), "quantization": quantization})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def linear_bytes(model):
    """Bytes of the decoder's linear weights as they lie in memory."""
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in layers
        for tensor in (layer.W_q if hasattr(layer, "W_q") else layer.weight,)
    )


with_hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed (extra `hqq`)")


@pytest.mark.parametrize(
    ("way", "bits", "error"),
    [
        ("nf4", 4, 0.2),
        ({"type": "nf4", "double": False}, 4, 0.2),
        ("fp4", 4, 0.25),
        ("int8", 8, 0.03),
        pytest.param("hqq", 4, 0.2, marks=with_hqq),
        pytest.param({"type": "hqq", "bits": 8, "group_size": 32}, 8, 0.02, marks=with_hqq),
        pytest.param({"type": "hqq", "bits": 2}, 2, 0.8, marks=with_hqq),
    ],
)
def test_a_quantized_model_computes_about_the_same_and_an_adapter_on_it_trains(tiny_model, way, bits, error):
    check_model(settings(tiny_model, way), cutoff=64, device="cpu")
    plain = load_causal_lm(str(tiny_model), torch.float32)
    base = load_causal_lm(settings(tiny_model, way), torch.float32)
    wanted = logits(plain)
    assert (logits(base) - wanted).norm() / wanted.norm() < error
    assert linear_bytes(base) == linear_bytes(plain) * bits // 32
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=linear_layers(base)))
    cast_trained(model, "fp32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 14  # two factors for each of the seven linear layers of both blocks
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def gradients(model):
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("way", ["nf4", "fp4", "int8", pytest.param("hqq", marks=with_hqq)])
def test_gradients_are_the_same_after_an_evaluation(tiny_model, way):
    """bitsandbytes repacks 4-bit weights in evaluation for a kernel that has no backward pass."""
    torch.manual_seed(0)
    base = load_causal_lm(settings(tiny_model, way), torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=linear_layers(base), init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    before = gradients(model)
    logits(model)
    after = gradients(model)
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao(tiny_model):
    base = load_causal_lm(settings(tiny_model, "torchao"), torch.float32)
    wanted = logits(load_causal_lm(str(tiny_model), torch.float32))
    assert (logits(base) - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_torchao_is_named_where_it_is_missing(tiny_model):
    with pytest.raises(RequestError) as refused:
        check_model(settings(tiny_model, "torchao"), cutoff=64)
    assert str(refused.value) == "model.quantization: torchao: needs the Python package torchao, which is not installed"


def test_zero3_cannot_shard_them(tiny_model):
    with pytest.raises(RequestError, match=r"model\.quantization: nf4: train\.deepspeed zero3 cannot shard"):
        check_model(settings(tiny_model, "nf4"), cutoff=64, zero3=True)


# --- checkpoints that are quantized already ---------------------------------------------------------------------------


def quantized(model, tmp_path, **config):
    folder = shutil.copytree(model, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "weights quantized with gptq: needs the Python package optimum and gptqmod",
        ),
        ({"quant_method": "awq", "bits": 4}, "weights quantized with awq: needs the Python package gptqmodel, which"),
        (
            {"quant_method": "aqlm"},
            "weights quantized with aqlm: needs the Python package aqlm, which is not installed",
        ),
        ({"quant_method": "eetq"}, "weights quantized with eetq: needs a GPU, and the job runs on CPU"),
        (
            {"quant_method": "vptq"},
            "are quantized with vptq, which Rayloom cannot train on; it knows bitsandbytes, gptq",
        ),
    ],
)
def test_a_checkpoint_that_cannot_load_here(tiny_model, tmp_path, config, message):
    with pytest.raises(RequestError) as refused:
        check_model(settings(quantized(tiny_model, tmp_path, **config)), cutoff=64, device="cpu")
    (text,) = refused.value.messages
    assert text.startswith("model.path: ")
    assert message in text


def test_a_quantized_checkpoint_is_not_quantized_again(tiny_model, tmp_path):
    folder = quantized(tiny_model, tmp_path, quant_method="fp8")
    with pytest.raises(RequestError, match=r"model\.quantization: the weights of .* are quantized already \(fp8\)"):
        check_model(settings(folder, "nf4"), cutoff=64)


def test_what_methods_are_told(tiny_model, tmp_path):
    def told(path, way=None):
        model = settings(path, way)
        return quantized_as(model, read_architecture(model))

    assert told(tiny_model) is None
    assert told(tiny_model, "nf4") == Quantized("nf4", in_checkpoint=False, dequantized=False)
    assert told(tiny_model, "nf4").is_frozen
    fp8 = told(quantized(tiny_model, tmp_path, quant_method="fp8"))
    assert fp8 == Quantized("fp8", in_checkpoint=True, dequantized=True)
    assert not fp8.is_frozen


def test_a_bitsandbytes_checkpoint(tiny_model, tmp_path):
    base = load_causal_lm(settings(tiny_model, "nf4"), torch.float32)
    base.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), torch.float32)
    assert torch.equal(logits(again), logits(base))
    assert quantized_as(settings(tmp_path), read_architecture(settings(tmp_path))).method == "bitsandbytes"


def test_an_fp8_checkpoint_becomes_ordinary_weights(tiny_model, tmp_path):
    """Blocks of 32 x 32 with one scale each, as DeepSeek and Qwen publish them (with 128)."""
    block = 32
    folder = quantized(tiny_model, tmp_path, quant_method="fp8", weight_block_size=[block, block])
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name]
        rows, columns = (size // block for size in weight.shape)
        blocks = weight.view(rows, block, columns, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).reshape_as(weight).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scale
        wanted[name] = (stored.float().view_as(blocks) * scale[:, None, :, None]).reshape_as(weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(str(folder), torch.float32)
    for name, weight in wanted.items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "saved"), torch.float32)), logits(model))


def test_an_mxfp4_checkpoint_becomes_ordinary_weights(tmp_path):
    """The experts of gpt-oss: two 4-bit floats a byte, blocks of 32 with a power of two as scale."""
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=64, layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    tensors = load_file(tmp_path / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    wanted = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width_in, width_out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, width_out, width_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, width_out, width_in // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
        plain = pairs * torch.exp2(scales.float() - 127).unsqueeze(-1)
        wanted[name] = plain.flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(str(tmp_path), torch.float32)
    for name, weight in wanted.items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    model(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6)).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in wanted)


def test_weights_of_a_class_of_their_own_are_not_sent():
    """DDP reads the names from the model that it wraps; what trains it must send."""

    class Own(torch.Tensor):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    leave_out_of_broadcast(model)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    model[1].weight = torch.nn.Parameter(torch.zeros(2, 2).as_subclass(Own), requires_grad=False)
    leave_out_of_broadcast(model)
    assert model._ddp_params_and_buffers_to_ignore == ["1.weight"]
