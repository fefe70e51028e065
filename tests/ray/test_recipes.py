"""Each recipe of the folders in `jobs/` trains two steps on a tiny model, and what it saves loads."""

from __future__ import annotations

import json
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.read import read_job
from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig
from rayloom.train.driver import run_job

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("methods", "models", "optimizers", "losses", "preferences", "training")
RECIPES = [path for folder in FOLDERS for path in sorted((ROOT / "jobs" / folder).glob("*.yaml"))]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]

# What suits thirty layers does not suit two.
SMALLER = {
    "freeze": ["method.last=1"],
    "llama-pro": ["method.expand=1"],
    "llama-adapter": ["method.layers=1"],
    "second-adapter": ["method.adapters=[ADAPTER]"],
    "long-context": ["data.cutoff=256"],
    "apollo": ["optimizer.rank=8"],
    "galore": ["optimizer.rank=8"],
    "galore-layerwise": ["optimizer.rank=8"],
}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, as one that a job of before has saved."""
    folder = tmp_path_factory.mktemp("adapter")
    attach_method(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(
    recipe: Path, tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        f"model.path={tiny_model}",
        f"output_dir={tmp_path}",
        f"data.train[0].path={ROOT}/{read_job(recipe).data.train[0].path}",  # the shared head's workers stand elsewhere
        "train.max_steps=2",
        "train.batch_size=2",
        "train.logging_steps=1",
        "train.device=cpu",
        "train.precision=fp32",
        *(text.replace("ADAPTER", str(adapter)) for text in SMALLER.get(recipe.stem, [])),
    ]
    job = read_job(recipe, overrides)
    result = run_job(job, started=time.time())
    assert (result["status"], result["steps"]) == ("finished", 2)
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows if "loss" in row]
    assert norms == [None, None] if recipe.stem == "galore-layerwise" else min(norms) > 0
    parameters = result["parameters"]
    assert 0 < parameters["trained"] <= parameters["all"]
    if not recipe.stem.startswith("badam"):  # it trains a part at a time, which the report of the start does not know
        assert f"trains {parameters['trained']:,} of {parameters['all']:,} parameters" in capsys.readouterr().out

    model, ids = job.run_dir / "model", torch.arange(5, 20).unsqueeze(0)
    kind = peft.AutoPeftModelForCausalLM if (model / "adapter_config.json").exists() else AutoModelForCausalLM
    if job.model.add_special_tokens:  # an adapter of a vocabulary that has grown
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(model)), pad_to_multiple_of=64)
        loaded = peft.PeftModel.from_pretrained(base, model)
    else:
        loaded = kind.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        trained = loaded.eval()(input_ids=ids).logits[..., :384]  # what the tiny model knows
        untrained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()(input_ids=ids).logits
    assert trained.isfinite().all()
    assert not torch.equal(trained[:, -15:], untrained)


def test_virtual_tokens_go_on_from_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps, then two more, are the four of one run: the network behind the tokens is in the checkpoint."""
    overrides = [
        f"model.path={tiny_model}",
        f"data.train[0].path={ROOT}/jobs/data/identity.jsonl",
        "train={batch_size: 2, logging_steps: 1, device: cpu, precision: fp32, scheduler: constant, warmup: 0}",
    ]
    recipe = ROOT / "jobs" / "methods" / "p-tuning.yaml"

    def losses(name: str, *more: str) -> list[float]:
        job = read_job(recipe, [*overrides, f"output_dir={tmp_path}", f"name={name}", *more])
        run_job(job, started=time.time())
        return [json.loads(line)["loss"] for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]

    whole = losses("whole", "train.max_steps=4")
    losses("parts", "train.max_steps=2")
    assert losses("parts", "train.max_steps=4", "resume=true") == pytest.approx(whole, abs=1e-6)
    assert len(whole) == 4
