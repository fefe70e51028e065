"""The job's `optimizer` part: every name, what refuses what, and the recipes."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from tests.job_text import JOB
from transformers.training_args import OptimizerNames

from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.methods.optimizers import support
from rayloom.methods.optimizers.build import library_class, optim_name
from rayloom.methods.optimizers.config import LibraryConfig, OptimizerConfig
from rayloom.methods.optimizers.support import SUPPORT, check_environment, check_precision

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "optimizers"
OURS = {"badam", "muon", "adam_mini"}
CLASSES = {
    kind: member
    for member in get_args(get_args(OptimizerConfig)[0])
    for kind in get_args(member.model_fields["type"].annotation)
}


def job(**parts: Any) -> JobConfig:
    return JobConfig.model_validate({"name": "a", "model": {"path": "m"}, "data": {"train": ["a.jsonl"]}, **parts})


def test_every_name_of_transformers_has_a_config_and_a_line_in_the_table():
    assert set(CLASSES) == {name.value for name in OptimizerNames} | OURS == set(SUPPORT)


def test_without_a_type_it_is_torchs_fused_adamw():
    assert job().optimizer.type == job(optimizer={}).optimizer.type == "adamw_torch_fused"
    assert job(optimizer={"beta2": 0.95}).optimizer.beta2 == 0.95


HERE = [kind for kind in SUPPORT if issubclass(CLASSES[kind], LibraryConfig)]


@pytest.mark.parametrize("kind", HERE)
def test_a_library_optimizer_is_made_with_the_arguments_of_its_config(kind, tmp_path):
    config = CLASSES[kind](type=kind)
    needs = SUPPORT[kind]
    if needs.device or (needs.package and find_spec(needs.package[0]) is None):
        with pytest.raises(RequestError, match=f"optimizer.type: {kind} needs"):
            check_environment(config, "cpu")
        return
    check_environment(config, "cpu")
    args = transformers.TrainingArguments(tmp_path, optim=optim_name(config), report_to=[], use_cpu=True)
    model = torch.nn.Linear(80, 80)
    made, arguments = library_class(config, args, model)
    known = inspect.signature(made).parameters
    assert set(arguments) <= set(known), f"{kind} does not know {set(arguments) - set(known)}"
    for name, value in config.arguments().items():
        assert value is None or arguments[name] == value
    if "torch_4bit" in kind or "torch_8bit" in kind:  # compile for half a minute
        return
    optimizer = made(model.parameters(), **arguments)
    before = model.weight.detach().clone()
    model(torch.ones(2, 80)).square().sum().backward()
    optimizer.step()
    assert (model.weight != before).any()
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("kind", sorted(OURS | {k for k in SUPPORT if k.startswith(("galore", "apollo"))}))
def test_those_of_our_own_are_made_by_us(kind):
    assert optim_name(CLASSES[kind](type=kind)) == "adamw_torch"


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("paged_adamw_8bit", "cpu", "paged_adamw_8bit needs a CUDA GPU; this job trains on CPU"),
        ("adamw_torch_npu_fused", "gpu", "adamw_torch_npu_fused needs an Ascend NPU; this job trains on GPU"),
        ("adamw_torch_xla", "auto", "adamw_torch_xla needs a TPU"),
        ("adamw_anyprecision", "cpu", "adamw_anyprecision needs the package torchdistx, which is not installed"),
    ],
)
def test_a_missing_device_or_package_is_named(kind, device, message):
    with pytest.raises(RequestError, match=message):
        check_environment(CLASSES[kind](type=kind), device)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORT if SUPPORT[kind].package])
def test_no_package_no_job(kind, monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda module: None)
    with pytest.raises(RequestError, match="needs"):
        check_environment(CLASSES[kind](type=kind), "auto")


FULL = {"type": "full"}
NO_CLIP = {"max_grad_norm": None}


@pytest.mark.parametrize(
    ("optimizer", "train", "method", "message"),
    [
        (
            {"type": "galore_adamw"},
            {"deepspeed": "zero2"},
            FULL,
            "does not work with train.deepspeed: zero2: ZeRO hands",
        ),
        ({"type": "muon"}, {"deepspeed": "zero3"}, FULL, "whole matrices; use none"),
        ({"type": "adam_mini"}, {"deepspeed": "zero1"}, FULL, "flat pieces"),
        ({"type": "badam"}, {"deepspeed": "zero3"}, FULL, "lays out its pieces once"),
        ({"type": "adafactor"}, {"deepspeed": "zero1"}, FULL, "flat pieces"),
        ({"type": "galore_adamw"}, {}, {"type": "lora"}, "not those of method lora; use method full or freeze"),
        ({"type": "galore_adamw_layerwise"}, {**NO_CLIP, "workers": 2}, FULL, "needs train.workers: 1, not 2"),
        ({"type": "galore_adamw_layerwise"}, {}, FULL, "needs train.max_grad_norm: null"),
        (
            {"type": "apollo_adamw_layerwise"},
            {**NO_CLIP, "gradient_accumulation": 4},
            FULL,
            "needs train.gradient_accumulation: 1, not 4",
        ),
        ({"type": "lomo"}, {**NO_CLIP, "on_bad_step": "skip"}, FULL, "needs train.on_bad_step: stop"),
        ({"type": "lomo"}, {**NO_CLIP, "device": "gpu", "precision": "fp16"}, FULL, "the loss scale of fp16"),
        ({"type": "schedule_free_adamw"}, {}, FULL, "needs train.scheduler: constant, not cosine"),
        ({"lora_plus_ratio": 4.0}, {}, FULL, "lora_plus_ratio needs method lora"),
        ({"type": "grokadamw"}, {}, FULL, "grokadamw cannot be used"),
        ({"type": "badam", "mode": "ratio", "start_block": 3}, {}, FULL, "mode ratio has no start_block"),
        ({"type": "badam", "mask_mode": "scatter"}, {}, FULL, "mode layer has no mask_mode"),
        ({"type": "sgd", "nesterov": True}, {}, FULL, "nesterov needs a momentum above 0"),
        ({"type": "adamw_torch", "rank": 4}, {}, FULL, "rank"),
        ({"type": "galore_adamw", "rank": 0}, {}, FULL, "greater than or equal to 1"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_reason(optimizer, train, method, message):
    with pytest.raises(ValueError, match=message):
        job(optimizer=optimizer, train=train, method=method)


def test_every_fault_is_in_the_message(job_file):
    job_file.write_text(JOB + "method: {type: full}\noptimizer: {type: galore_adamw_layerwise}\n")
    with pytest.raises(RequestError) as refused:
        read_job(job_file, ["train.workers=2", "train.deepspeed=zero2"])
    (message,) = refused.value.messages
    assert all(key in message for key in ("train.workers: 1", "train.deepspeed", "train.max_grad_norm: null"))


def test_a_wrong_name_gets_a_near_one(job_file):
    job_file.write_text(JOB + "optimizer: {type: adam-mini}\n")
    with pytest.raises(RequestError, match=r"optimizer.type: unknown 'adam-mini'; did you mean 'adam_mini'\?"):
        read_job(job_file)
    job_file.write_text(JOB + "optimizer: {type: adamw_torch, beta_2: 0.9}\n")
    with pytest.raises(RequestError, match=r"unknown key 'optimizer.beta_2'; did you mean 'beta2'\?"):
        read_job(job_file)


def test_fp16_that_was_not_asked_for_is_refused_too():
    with pytest.raises(RequestError, match=r"cannot train in fp16; set train.precision: fp32"):
        check_precision(CLASSES["galore_adamw_layerwise"](type="galore_adamw_layerwise"), "fp16")
    check_precision(CLASSES["galore_adamw"](), "fp16")


def test_neftune_is_for_sft():
    assert job(stage={"neftune": 5.0}).stage.neftune == 5.0
    with pytest.raises(ValueError, match=r"stage\.pretrain\.neftune"):
        job(stage={"type": "pretrain", "neftune": 5.0})


RECIPES = {
    "galore": "galore_adamw",
    "galore-layerwise": "galore_adamw_layerwise",
    "apollo": "apollo_adamw",
    "apollo-mini": "apollo_adamw",
    "badam": "badam",
    "badam-ratio": "badam",
    "muon": "muon",
    "adam-mini": "adam_mini",
    "adamw-8bit": "adamw_8bit",
    "loraplus": "adamw_torch_fused",
    "neftune": "adamw_torch_fused",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    recipe = read_job(JOBS / f"{name}.yaml")
    assert (recipe.name, recipe.optimizer.type) == (name, RECIPES[name])
