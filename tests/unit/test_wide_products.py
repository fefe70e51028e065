"""bf16 products computed in float32, against float64 and against the processor's own."""

import copy
from collections import Counter

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_model import small_model

from rayloom.methods.lora_product import LeanLinear, use_lean_products
from rayloom.models import wide_products
from rayloom.models.block_attention import causal_attention
from rayloom.models.wide_products import (
    FrozenLinear,
    adapted_gradients,
    adapted_linear,
    float32_is_faster,
    into_input,
    linear,
    use_wide_products,
)
from rayloom.train.frozen_head import frozen_head


@pytest.fixture
def faster(monkeypatch):
    """A processor that is faster in float32, and products of any number of rows."""
    monkeypatch.setattr(wide_products, "float32_is_faster", lambda: True)
    monkeypatch.setattr(wide_products, "_LEAST_ROWS", 1)


def _bf16(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    size=st.integers(1, 40),
    out=st.integers(1, 40),
    limits=st.tuples(st.integers(1, 24), st.integers(1, 400)),
    biased=st.booleans(),
)
def test_products_are_float64s_rounded_once(rows, size, out, limits, biased):
    x, weight, dy = _bf16(rows, size), _bf16(out, size, seed=1), _bf16(rows, out, seed=2)
    bias = _bf16(out, seed=3) if biased else None
    with pytest.MonkeyPatch.context() as patch:  # rows and tiles that do not divide what there is
        patch.setattr(wide_products, "_ROWS", limits[0])
        patch.setattr(wide_products, "_TILE", limits[1])
        y, dx = linear(x, weight, bias), into_input(dy, weight)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    # bf16 keeps 8 bits: half of the last one, and a little for sums in float32 that cancel.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(dx.double(), dy.double() @ weight.double(), rtol=2**-8, atol=1e-5)
    assert y.dtype == dx.dtype == torch.bfloat16


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    size=st.integers(1, 40),
    out=st.integers(1, 40),
    rank=st.integers(1, 9),
    limits=st.tuples(st.integers(1, 24), st.integers(1, 400)),
    biased=st.booleans(),
)
def test_products_of_an_adapted_layer_are_float64s_rounded_once(rows, size, out, rank, limits, biased):
    x, weight, dy = _bf16(rows, size), _bf16(out, size, seed=1), _bf16(rows, out, seed=2)
    bias = _bf16(out, seed=3) if biased else None
    down, up = _bf16(rank, size, seed=4).float() / 3, _bf16(out, rank, seed=5).float() / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_products, "_ROWS", limits[0])
        patch.setattr(wide_products, "_TILE", limits[1])
        y, small = adapted_linear(x, weight, bias, down, up, 1.5)
        gradients = adapted_gradients(dy, x, small, weight, down, up, 1.5)
    given = [one.double().requires_grad_() for one in (x, down, up)]
    exact = given[0] @ weight.double().T + 1.5 * (given[0] @ given[1].T) @ given[2].T
    if biased:
        exact = exact + bias.double()
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-8, atol=1e-4)
    exact.backward(dy.double())
    for found, of, tolerance in zip(gradients, given, (2**-8, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(found.double(), of.grad, rtol=tolerance, atol=1e-3)
    assert y.dtype == gradients[0].dtype == torch.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == torch.float32


def test_large_products_too():
    x, weight, dy = _bf16(1500, 700), _bf16(5000, 700, seed=1), _bf16(1500, 5000, seed=2)
    torch.testing.assert_close(linear(x, weight).double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(into_input(dy, weight).double(), dy.double() @ weight.double(), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("rows", "parts"), [(0, [0]), (1024, [1024]), (1056, [1056]), (1600, [800, 800])])
def test_a_small_rest_is_no_part_of_its_own(rows, parts, monkeypatch):
    """Else its few rows would have the whole weight converted once more."""
    converted = []
    wide = wide_products._SPACE.wide
    monkeypatch.setattr(
        wide_products._SPACE, "wide", lambda name, x: (converted.append((name, len(x))), wide(name, x))[1]
    )
    x, weight = _bf16(rows, 3), _bf16(5, 3)
    assert linear(x, weight).shape == (rows, 5)
    assert [length for name, length in converted if name == "inputs"] == parts
    assert [length for name, length in converted if name == "tile"] == [5] * len(parts)


def _layer(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    wide = copy.deepcopy(layer)
    wide.__class__ = FrozenLinear
    return layer, wide


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_frozen_layer_and_its_gradient(faster, bias, autocast):
    layer, wide = _layer(bias)
    x = torch.randn(3, 5, 24).to(torch.float32 if autocast else torch.bfloat16)
    of_layers = []
    for one in (layer, wide):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = one(own)
        (y.float() ** 2).sum().backward()
        of_layers.append((y.detach(), own.grad))
    (y, dx), (wide_y, wide_dx) = of_layers
    torch.testing.assert_close(wide_y, y, rtol=2**-7, atol=1e-3)
    assert wide_dx.dtype == dx.dtype
    assert (wide_dx - dx).norm() <= 0.01 * dx.norm()


@pytest.mark.parametrize("shape", [(0, 24), (7, 24), (2, 5, 24)])
def test_a_model_may_write_into_what_the_layer_returns(faster, shape):
    _, wide = _layer(bias=True)
    x, apart = (_bf16(*shape).requires_grad_() for _ in range(2))
    added = _bf16(*shape[:-1], 40, seed=1)
    wide(x).add_(added).float().square().sum().backward()  # as the shared expert of Llama 4 does
    (wide(apart) + added).float().square().sum().backward()
    assert torch.equal(x.grad, apart.grad)


def test_what_trains_gets_its_gradient(faster):
    for trained in ("weight", "bias"):
        _, wide = _layer(bias=True)
        getattr(wide, trained).requires_grad_()
        wide(_bf16(7, 24)).float().sum().backward()
        assert getattr(wide, trained).grad.abs().sum() > 0


def test_few_rows_and_other_types_are_the_layers_own(monkeypatch):
    monkeypatch.setattr(wide_products, "float32_is_faster", lambda: True)
    monkeypatch.setattr(wide_products, "linear", lambda *_: pytest.fail("converted for nothing"))
    layer, wide = _layer(bias=True)
    few = _bf16(wide_products._LEAST_ROWS - 1, 24)
    torch.testing.assert_close(wide(few), layer(few), rtol=0, atol=0)
    many = torch.randn(100, 24)
    torch.testing.assert_close(wide.float()(many), layer.float()(many), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("architecture", "name", "instructions", "is_faster"),
    [
        ("x86_64", "Intel Xeon", ["avx512_bf16"], True),
        ("x86_64", "Intel Xeon", ["avx512_bf16", "amx_bf16"], False),
        ("x86_64", "AMD EPYC", ["avx512_bf16"], False),
        ("x86_64", "AMD EPYC", [], True),
        ("aarch64", "Neoverse V2", ["arm_bf16"], False),
    ],
)
def test_it_is_told_from_what_the_processor_is(monkeypatch, architecture, name, instructions, is_faster):
    features = {"architecture": architecture, "cpu_name": name, **dict.fromkeys(instructions, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    float32_is_faster.cache_clear()
    try:
        assert float32_is_faster() is is_faster
    finally:
        float32_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "is_faster", "replaced"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
)
def test_layers_are_replaced_where_that_is_faster(monkeypatch, dtype, is_faster, replaced):
    monkeypatch.setattr(wide_products, "float32_is_faster", lambda: is_faster)
    model = small_model("Llama").to(dtype)
    use_wide_products(model)
    kinds = {type(one) for one in model.modules() if isinstance(one, torch.nn.Linear)}
    assert kinds == {FrozenLinear if replaced else torch.nn.Linear}
    assert frozen_head(model.requires_grad_(False)) is model.lm_head


def test_a_model_with_lora_is_as_near_to_float64_as_ever(faster, monkeypatch):
    exact = small_model("Llama").bfloat16().double()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    exact = peft.get_peft_model(exact, config)
    ids = torch.arange(40).view(2, 20)

    products, tiles = Counter(), wide_products._tiles

    def run(kind):
        monkeypatch.setattr(wide_products, "_tiles", lambda weight: products.update([kind]) or tiles(weight))
        monkeypatch.setattr(wide_products, "float32_is_faster", lambda: kind == "wide")
        model = copy.deepcopy(exact)
        if kind != "exact":
            for name, one in model.named_parameters():
                one.data = one.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
            if kind == "wide":
                use_wide_products(model.get_base_model())
            use_lean_products(model)
            assert any(isinstance(one, LeanLinear) for one in model.modules())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != "exact"):
            logits = model(input_ids=ids, use_cache=False).logits
        (logits.double() ** 2).sum().backward()
        return [logits.detach(), *(one.grad for one in model.parameters() if one.requires_grad)]

    truth = run("exact")
    wide, narrow = (
        [float((one.double() - at).norm() / at.norm()) for one, at in zip(run(kind), truth, strict=True)]
        for kind in ("wide", "narrow")
    )
    assert 0 < wide[0] < 0.05
    assert products == {"wide": 15 + 12}  # of 15 layers; what the first three read needs no gradient
    assert sum(wide) <= 1.1 * sum(narrow)  # what is left is the rounding between layers


def test_attention_rounds_inputs_and_outputs_only(monkeypatch):
    sizes = ((70, True), (3, False), (30, True))
    inputs = [_bf16(103, heads, 8, seed=heads) for heads in (4, 2, 2)]

    def error(is_faster):
        monkeypatch.setattr(wide_products, "float32_is_faster", lambda: is_faster)
        runs = []
        for dtype in (torch.float64, torch.bfloat16):
            given = [one.to(dtype, copy=True).requires_grad_() for one in inputs]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = causal_attention(*given, 0.3, sizes)
            assert out.dtype == dtype
            out.double().square().sum().backward()
            runs.append([out.detach(), *(one.grad for one in given)])
        return [float((one.double() - at).norm() / at.norm()) for at, one in zip(*runs, strict=True)]

    narrow, wide = error(False), error(True)
    assert all(0 < one < 0.01 for one in wide)
    assert all(one < other for one, other in zip(wide, narrow, strict=True))
