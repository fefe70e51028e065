"""Which number format is computed in, for every device and wish."""

from __future__ import annotations

import pytest
import torch

from rayloom.errors import RequestError
from rayloom.models.precision import choose_precision, computes_bf16, engine_precision


@pytest.mark.parametrize(
    ("requested", "device", "bf16", "chosen"),
    [
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("auto", "gpu", True, "bf16"),
        ("auto", "gpu", False, "fp16"),
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "gpu", True, "bf16"),
        ("fp16", "gpu", True, "fp16"),
        ("fp16", "gpu", False, "fp16"),
        ("fp32", "cpu", True, "fp32"),
        ("fp32", "cpu", False, "fp32"),
        ("fp32", "gpu", True, "fp32"),
        ("fp32", "gpu", False, "fp32"),
    ],
)
def test_what_is_chosen(requested, device, bf16, chosen):
    assert choose_precision(requested, device, bf16=bf16) == chosen


@pytest.mark.parametrize(
    ("requested", "device", "bf16", "message"),
    [
        ("bf16", "cpu", False, "train.precision: bf16: this CPU has no bf16 arithmetic; use fp32, or auto"),
        ("bf16", "gpu", False, "train.precision: bf16: this GPU has no bf16 arithmetic; use fp16 or fp32, or auto"),
        ("fp16", "cpu", False, "train.precision: fp16 needs a GPU; on CPU use bf16, fp32 or auto"),
        ("fp16", "cpu", True, "train.precision: fp16 needs a GPU; on CPU use bf16, fp32 or auto"),
    ],
)
def test_what_is_refused(requested, device, bf16, message):
    with pytest.raises(RequestError) as refused:
        choose_precision(requested, device, bf16=bf16)
    assert refused.value.messages == (message,)


def test_a_word_that_no_job_can_say():
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        choose_precision("fp8", "gpu", bf16=True)


@pytest.mark.parametrize(
    ("capabilities", "answer"),
    [
        ({}, False),
        ({"avx2": True, "avx512": True}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"arm_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx10_2": False}, False),
    ],
)
def test_a_cpu_computes_bf16_where_it_has_the_instructions(monkeypatch, capabilities, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computes_bf16("cpu") is answer


def test_torch_knows_the_capabilities_that_are_asked_for():
    """The names are torch's; where it renames them, bf16 would go unnoticed."""
    known = set(torch.cpu.get_capabilities())
    asked = {"avx512_bf16", "amx_bf16"} if "avx2" in known else {"arm_bf16", "bf16"}
    assert known & asked, f"none of {sorted(asked)} in {sorted(known)}"


@pytest.mark.parametrize(
    ("available", "supported", "answer"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_a_gpu_must_compute_bf16_itself(monkeypatch, available, supported, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    assert computes_bf16("gpu") is answer


@pytest.mark.parametrize(
    ("requested", "trained", "device", "is_faster", "expected"),
    [
        ("auto", "bf16", "cpu", False, "bf16"),
        ("auto", "bf16", "cpu", True, "fp32"),
        ("auto", "pure_bf16", "gpu", True, "bf16"),
        ("auto", "fp16", "gpu", True, "fp16"),
        ("auto", "fp32", "cpu", False, "fp32"),
        ("bf16", "fp32", "cpu", True, "bf16"),
    ],
)
def test_engines_compute_in_what_the_trainer_does(monkeypatch, requested, trained, device, is_faster, expected):
    monkeypatch.setattr("rayloom.models.wide_products.float32_is_faster", lambda: is_faster)
    assert engine_precision(requested, trained, device) == expected
