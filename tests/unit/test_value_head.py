"""The value head: what it computes, and that its file loads back (under ZeRO-3: tests/ray/test_loader_zero3.py)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayloom.errors import RequestError
from rayloom.models.value_head import FILE, ValueHead, load_value_head, save_value_head, value_head_for


def test_a_value_a_position_in_fp32(tiny_model):
    head = value_head_for(AutoModelForCausalLM.from_pretrained(tiny_model))
    states = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(states)
    assert (values.shape, values.dtype) == ((2, 5), torch.float32)
    weight, bias = head.summary.weight.double(), head.summary.bias.double()
    torch.testing.assert_close(values.double(), (states.double() @ weight.T + bias).squeeze(-1), rtol=1e-5, atol=1e-6)


def test_it_loads_back(tmp_path):
    head, other = ValueHead(8), ValueHead(8)
    torch.nn.init.ones_(head.summary.bias)
    save_value_head(head, tmp_path)
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / FILE).items()} == {
        "v_head.summary.weight": (1, 8),
        "v_head.summary.bias": (1,),
    }
    load_value_head(other, tmp_path)
    states = torch.randn(3, 4, 8)
    assert torch.equal(head(states), other(states))
    save_value_head(head, tmp_path / "nowhere", is_writer=False)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "no value head can be read"),
        ({"v_head.summary.weight": torch.zeros(1, 8)}, "holds no v_head.summary.bias"),
        (
            {"v_head.summary.weight": torch.zeros(1, 9), "v_head.summary.bias": torch.zeros(1)},
            r"v_head.summary.weight has the shape \(1, 9\), the model needs \(1, 8\)",
        ),
        (
            {"v_head.summary.weight": torch.zeros(1, 8), "v_head.summary.bias": torch.zeros(1), "x": torch.zeros(1)},
            "holds x, which is no part of a value head",
        ),
    ],
)
def test_a_file_that_is_no_value_head(tmp_path, tensors, message):
    if tensors is not None:
        save_file(tensors, tmp_path / FILE)
    with pytest.raises(RequestError, match=message):
        load_value_head(ValueHead(8), tmp_path)
