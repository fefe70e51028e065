"""Layers that keep less: the same bits forward, the same gradients, less memory."""

import copy

import peft
import psutil
import pytest
import torch
import transformers
from tests.tiny_model import small_model

from rayloom.methods.lora_product import use_lean_products
from rayloom.models.lean_layers import use_lean_layers


def _model(name="Llama"):
    model = small_model(name)
    for weight in model.parameters():
        if weight.dim() == 1:  # a norm's, else all 1
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def _lean(model):
    model = copy.deepcopy(model)
    use_lean_layers(model)
    return model


def _lean_names(model):
    return {type(module).__name__ for module in model.modules() if hasattr(module, "is_lean")}


def _gradients(model, **autocast):
    ids = torch.arange(24).reshape(2, 12)
    model.zero_grad()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_model_computes_the_same(name):
    plain = _model(name)
    lean = _lean(plain)
    assert _lean_names(lean) == {f"{name}RMSNorm", f"{name}MLP"}
    (loss, gradients), (lean_loss, lean_gradients) = _gradients(plain), _gradients(lean)
    assert torch.equal(loss, lean_loss)
    assert gradients.keys() == lean_gradients.keys()
    for one, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[one], gradient, rtol=1e-5, atol=1e-7, msg=one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_it_is_as_near_to_float32_as_the_model_is(dtype):
    """Weights in bf16, or in float32 under autocast."""
    exact = _gradients(_model())[1]
    plain = _model().to(dtype)
    found = [_gradients(model, dtype=torch.bfloat16)[1] for model in (plain, _lean(plain))]
    assert _lean_names(_lean(plain))
    for name, gradient in exact.items():
        usual, ours = ((one[name].float() - gradient).norm() / gradient.norm() for one in found)
        assert ours <= 1.25 * usual + 1e-3, name


def test_others_are_left_as_they_are():
    gemma = _lean(_model("Gemma"))  # its norm multiplies by 1 + weight
    assert _lean_names(gemma) == {"GemmaMLP"}
    assert not _lean_names(_lean(_model("GPTNeoX")))


def test_under_lora_a_gated_layer_keeps_two_inner_tensors_of_four():
    rows, inner = 2048, 8192  # tensors of 64 MB, which the allocator gives back to the system at once
    kept = []
    for lean in (False, True):
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=inner, num_attention_heads=2)
        layer = torch.nn.Sequential(transformers.models.llama.modeling_llama.LlamaMLP(config))
        if lean:
            use_lean_layers(layer)
        wrapped = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_modules="all-linear"))
        use_lean_products(wrapped)
        x = torch.randn(rows, 16, requires_grad=True)
        before = psutil.Process().memory_info().rss
        y = wrapped(x)
        kept.append((psutil.Process().memory_info().rss - before) / (rows * inner * 4))
        y.sum().backward()
    assert kept == pytest.approx([4, 2], abs=0.3)
