"""The lean LoRA product against PEFT's own."""

import copy

import peft
import pytest
import torch

from rayloom.methods.lora_product import LeanLinear, use_lean_products


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 40)
        self.gate = torch.nn.Linear(24, 40, bias=False)  # reads the same input
        self.second = torch.nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)) * self.gate(x))


def _both(**options):
    """PEFT's model, and the same with lean products; B is not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["first", "gate", "second"], **options)
    plain = peft.get_peft_model(_Net(), config)
    for name, weight in plain.named_parameters():
        if "lora_" in name and weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    lean = copy.deepcopy(plain)
    use_lean_products(lean)
    return plain, lean


def _run(model, x, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        y = model(x)
    (y.float() * torch.arange(y.numel()).reshape(y.shape).float().sin()).sum().backward()
    return y, {"x": x.grad, **{n: w.grad for n, w in model.named_parameters() if w.grad is not None}}


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_pefts(shape, dtype):
    plain, lean = (model.to(dtype) for model in _both())
    x = torch.randn(shape, dtype=dtype)
    (y, gradients), (lean_y, lean_gradients) = _run(plain, x), _run(lean, x)
    assert any(isinstance(module, LeanLinear) for module in lean.modules())
    torch.testing.assert_close(lean_y, y, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == lean_gradients.keys()
    assert len(gradients) == 7
    for name, gradient in gradients.items():
        assert (lean_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("shape", [(0, 24), (7, 24), (2, 5, 24)])
def test_a_model_may_write_into_what_the_layer_returns(shape):
    _, lean = _both()
    layer = lean.get_base_model().first
    x, apart = (torch.ones(shape).requires_grad_() for _ in range(2))
    layer(x).mul_(2).square().sum().backward()  # as the shared expert of Llama 4 adds into it
    (layer(apart) * 2).square().sum().backward()
    assert torch.equal(x.grad, apart.grad)


def test_under_autocast_it_is_as_near_to_float32_as_peft_is():
    plain, lean = _both()
    x = torch.randn(64, 24)
    exact, of_exact = _run(plain, x)
    plain.zero_grad()
    runs = {name: _run(model, x, dtype=torch.bfloat16) for name, model in (("peft", plain), ("lean", lean))}
    for name, (y, gradients) in runs.items():
        assert y.dtype == torch.bfloat16
        assert (y - exact).norm() <= 0.01 * exact.norm(), name
        for weight, gradient in of_exact.items():
            assert gradients[weight].dtype == torch.float32
            assert (gradients[weight] - gradient).norm() <= 0.02 * gradient.norm(), (name, weight)


def test_layers_that_read_the_same_input_keep_it_once():
    def kept(model):
        seen = {}
        x = torch.randn(512, 24).bfloat16().requires_grad_()

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.shape
            return tensor

        for name, weight in model.named_parameters():
            if "lora_" not in name:  # frozen in half precision, the adapter in float32: as jobs train
                weight.data = weight.data.bfloat16()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(x)
            found = list(seen.values()).count(x.shape)
        del output
        return found

    plain, lean = map(kept, _both())
    assert lean == 1 < plain


@pytest.mark.parametrize("case", ["dropout", "dora", "disabled", "merged"])
def test_what_is_not_plain_is_left_to_peft(case):
    options = {"lora_dropout": 0.5} if case == "dropout" else {"use_dora": True} if case == "dora" else {}
    plain, lean = _both(**options)
    x = torch.randn(9, 24)
    if case == "merged":
        plain.merge_adapter(), lean.merge_adapter()
    if case == "disabled":
        with plain.disable_adapter(), lean.disable_adapter():
            torch.testing.assert_close(lean(x), plain(x))
        return
    torch.manual_seed(5)
    expected = plain(x)
    torch.manual_seed(5)
    torch.testing.assert_close(lean(x), expected)


def test_the_adapter_is_saved_as_pefts():
    plain, lean = _both()
    theirs, ours = (peft.get_peft_model_state_dict(model) for model in (plain, lean))
    assert theirs.keys() == ours.keys()
