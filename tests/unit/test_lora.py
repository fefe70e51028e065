"""LoRA's kin against PEFT itself: PiSSA turned back, adapters in a row, half precision, counts."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
from tests.unit.test_methods import load, logits_of, method_of, train
from transformers import AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.parameters import count_parameters
from rayloom.methods.save import finish_saved, keep_start


def attached(folder: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return attach_method(load(folder, dtype), method_of({"type": "lora", **fields}))


def trained_folder(base: Any, folder: Any, **fields: Any) -> tuple[Any, torch.Tensor]:
    """Train and save as a job does; the folder of the model, and its logits."""
    method = method_of({"type": "lora", **fields})
    model = attach_method(load(base), method)
    keep_start(model, method, folder / "start")
    train(model)
    logits = logits_of(model)
    model.save_pretrained(folder / "model")
    finish_saved(model, method, folder / "model", folder / "start")
    return folder / "model", logits


def test_a_new_adapter_is_pefts_own(tiny_model):
    ours = attached(tiny_model, rank=4, alpha=12, target=["q_proj", "v_proj"], rslora=True, dropout=0.1)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(load(tiny_model), config)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # of the dropout
        losses.append(train(model))
    # Not to the bit: on some processors a product depends on where its matrices lie.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ours.peft_config["default"] == theirs.peft_config["default"]


def test_all_is_every_linear_layer_but_the_head(tiny_model):
    model = attached(tiny_model, target="all")
    linear = {name for name, module in load(tiny_model).named_modules() if isinstance(module, torch.nn.Linear)} - {
        "lm_head"
    }
    assert set(model.targeted_module_names) == linear


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_a_start_from_the_weight_is_saved_as_plain_lora(init, tiny_model, tmp_path):
    folder, logits = trained_folder(tiny_model, tmp_path, rank=4, init=init)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 16)
    loaded = peft.PeftModel.from_pretrained(load(tiny_model), folder)
    weight = loaded.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    torch.testing.assert_close(weight, load(tiny_model).model.layers[0].mlp.up_proj.weight, rtol=0, atol=0)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-4)


def test_pissa_begins_with_the_largest_singular_values(tiny_model):
    layer = attached(tiny_model, rank=4, init="pissa").base_model.model.model.layers[0].mlp.up_proj
    weight = load(tiny_model).model.layers[0].mlp.up_proj.weight.detach().double()
    u, s, v = torch.linalg.svd(weight)
    principal = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    torch.testing.assert_close(layer.get_delta_weight("default").double(), principal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight.double(), weight - principal, rtol=1e-4, atol=1e-5)


# --- adapters of before -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """Two adapters of the tiny model, trained apart."""
    torch.manual_seed(3)
    first, _ = trained_folder(tiny_model, tmp_path_factory.mktemp("first"), rank=4)
    second, _ = trained_folder(tiny_model, tmp_path_factory.mktemp("second"), rank=2, target=["q_proj"])
    return str(first), str(second)


def merged_by_peft(base: Any, *folders: str) -> Any:
    model = load(base)
    for folder in folders:
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


def test_one_adapter_goes_on(two, tiny_model, tmp_path):
    model = attached(tiny_model, adapters=[two[0]])
    torch.testing.assert_close(logits_of(model), logits_of(merged_by_peft(tiny_model, two[0])), rtol=0, atol=1e-4)
    assert model.peft_config["default"].r == 4
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    folder, logits = trained_folder(tiny_model, tmp_path, adapters=[two[0]])
    assert not (folder / "base").exists()
    loaded = peft.PeftModel.from_pretrained(load(tiny_model), folder)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [False, True])
def test_earlier_adapters_become_part_of_the_weights(new, two, tiny_model, tmp_path):
    fields = {"adapters": list(two), "new_adapter": new, "rank": 2 if not new else 8}
    start = attached(tiny_model, **fields)
    torch.testing.assert_close(logits_of(start), logits_of(merged_by_peft(tiny_model, *two)), rtol=0, atol=1e-4)
    assert start.peft_config["default"].r == (8 if new else 2)
    folder, logits = trained_folder(tiny_model, tmp_path, **fields)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-6)
    by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(by_transformers), logits, rtol=0, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    expected = merged_by_peft(tiny_model, *(two if new else two[:1]))
    torch.testing.assert_close(logits_of(base), logits_of(expected), rtol=0, atol=1e-5)


# --- precision and counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [{"type": "lora", "extra_modules": ["norm"]}, {"type": "freeze", "last": 1}, {"type": "adapter"}]
)
def test_what_trains_stands_in_fp32_on_half_precision_weights(method, tiny_model):
    model = attach_method(load(tiny_model, torch.bfloat16), method_of(method))
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}


def test_trainable_parameters_are_counted_by_kind_of_module(tiny_model):
    report = count_parameters(attached(tiny_model, rank=4, target=["q_proj", "down_proj"], extra_modules=["norm"]))
    base = sum(p.numel() for p in load(tiny_model).parameters())
    by_kind = {"down_proj": 2 * 4 * (128 + 64), "q_proj": 2 * 4 * (64 + 64), "norm": 64}
    assert report.trained_in == by_kind
    assert list(report.trained_in) == ["down_proj", "q_proj", "norm"]
    assert report.trained == sum(by_kind.values())
    assert report.trained_bytes == 4 * report.trained
    assert report.all == base + report.trained
    assert report.lines()[0].startswith(f"trains {report.trained:,} of {report.all:,} parameters (")
    assert report.as_dict()["share"] == report.trained / report.all


def test_all_parameters_of_full_are_counted_once(tiny_model):
    model = load(tiny_model)
    report = count_parameters(model)
    assert report.trained == report.all == sum(p.numel() for p in model.parameters())
    assert "(all)" in report.lines()[0]
