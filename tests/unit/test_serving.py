"""What is served of what a job has trained: one folder of whole weights, and the settings of the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, validate_job
from rayloom.errors import RequestError
from rayloom.export.merge import whole_model
from rayloom.serve import app
from rayloom.serve.app import ServeArguments, build, engine_settings

IDS = torch.arange(3, 40).unsqueeze(0)


def _job(model: Path, output: Path, **parts: Any) -> JobConfig:
    data = {"name": "run", "output_dir": str(output), "model": {"path": str(model)}, "data": {"train": ["x.jsonl"]}}
    return validate_job(Document("job.yaml", {**data, **parts}))


def _train(config: peft.PeftConfig, job: JobConfig, seed: int = 0) -> torch.Tensor:
    """An adapter as a job leaves it, with weights that are not small; the logits of the model with it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(job.model.path, dtype=torch.float32)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(job.run_dir / "model")
    AutoTokenizer.from_pretrained(job.model.path).save_pretrained(job.run_dir / "model")
    with torch.no_grad():
        return model(IDS).logits


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
        peft.OFTConfig(oft_block_size=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ],
    ids=["lora", "dora", "oft", "ia3"],
)
def test_the_merged_model_says_what_the_adapted_one_says(
    config: peft.PeftConfig, tiny_model: Path, tmp_path: Path
) -> None:
    job = _job(tiny_model, tmp_path)
    expected = _train(config, job)
    folder = whole_model(job)
    assert (_logits(tiny_model) - expected).abs().max() > 0.01
    torch.testing.assert_close(_logits(folder), expected, rtol=1e-4, atol=1e-4)
    template = AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_it_is_merged_once_for_each_state_of_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    job, config = _job(tiny_model, tmp_path), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    _train(config, job)
    first = whole_model(job)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert whole_model(job) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    expected = _train(config, job, seed=1)  # it went on
    second = whole_model(job)
    torch.testing.assert_close(_logits(second), expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in second.parent.iterdir()] == [second.name]


def test_whole_weights_are_served_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    job = _job(tiny_model, tmp_path, method={"type": "full"})
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(job.run_dir / "model")
    assert whole_model(job) == job.run_dir / "model"
    assert not (job.run_dir / "served").exists()


def test_an_adapter_that_went_on_from_merged_ones_has_a_base_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    job = _job(tiny_model, tmp_path, method={"type": "lora", "adapters": ["before"], "new_adapter": True})
    base = job.run_dir / "model" / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    expected = _train(peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), _job(base, tmp_path))
    torch.testing.assert_close(_logits(whole_model(job)), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(tiny_model: Path, tmp_path: Path) -> None:
    job = _job(tiny_model, tmp_path)
    with pytest.raises(RequestError, match="holds no model: run the job run first"):
        whole_model(job)
    _train(peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), job)
    with pytest.raises(RequestError, match="stands beside the weights and cannot become a part of them"):
        whole_model(job)
    with pytest.raises(RequestError, match="is an address: copy s3://bucket/run/model to a folder"):
        whole_model(job.model_copy(update={"output_dir": "s3://bucket"}))
    assert not (job.run_dir / "served").exists()


def test_engines_follow_the_rollout(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "computes_bf16", lambda device: False)
    rollout = {"max_tokens": 100, "cpus_per_engine": 1.5, "kv_cache_gib": 2.0, "tensor_parallel": 2, "gpu_memory": 0.5}
    job = _job(tiny_model, tmp_path, rollout=rollout, data={"train": ["x.jsonl"], "cutoff": 60})
    told = ServeArguments.model_validate({"job": "j", "min_replicas": "2", "max_replicas": 3})
    settings = engine_settings(job, told, tiny_model, "cpu")
    assert settings["model_loading_config"] == {"model_id": "run", "model_source": str(tiny_model)}
    assert settings["deployment_config"]["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 3}
    assert settings["placement_group_config"] == {"bundles": [{"CPU": 2}]}
    engine = settings["engine_kwargs"]
    assert (engine["max_model_len"], engine["dtype"], engine["kv_cache_memory_bytes"]) == (160, "float32", 2**31)
    settings = engine_settings(job, told, tiny_model, "gpu")
    engine = settings["engine_kwargs"]
    assert (engine["dtype"], engine["tensor_parallel_size"], engine["gpu_memory_utilization"]) == ("bfloat16", 2, 0.5)
    assert "accelerator_config" not in settings
    longer = job.model_copy(update={"data": job.data.model_copy(update={"cutoff": 10**6})})
    limit = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    assert engine_settings(longer, told, tiny_model, "gpu")["engine_kwargs"]["max_model_len"] == limit


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "job: Field required"),
        ({"job": "j.yaml", "replicas": 2}, "replicas: Extra inputs are not permitted"),
        ({"job": "j.yaml", "min_replicas": 0}, "min_replicas: Input should be greater than or equal to 1"),
        ({"job": "nope.yaml"}, "nope.yaml: no such job file"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        build(arguments)


def test_a_judge_is_not_served(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(_job(tiny_model, tmp_path, stage={"type": "reward"})))
    with pytest.raises(RequestError, match="run has trained a model that judges answers, and writes none"):
        build({"job": str(file)})
