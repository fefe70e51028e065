"""Every recipe in `jobs/` is a job: it reads, and what it says goes together."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.methods.config import FullConfig, LoraConfig
from rayloom.methods.rules import check_combination
from rayloom.stages.rules import check_stage
from rayloom.train.ppo_rules import check_ppo

JOBS = Path(__file__).resolve().parents[2] / "jobs"
RECIPES = [path for path in sorted(JOBS.rglob("*.yaml")) if path.parent.name != "pipelines"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_job(recipe, monkeypatch):
    monkeypatch.chdir(JOBS.parent)  # a reward's file is named from there
    job = read_job(recipe)
    assert job.name == recipe.stem
    check_combination(job)
    check_stage(job)
    check_ppo(job)
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job, "as it reaches the workers"
    assert recipe.read_text().startswith("# "), "a recipe begins with what it shows"
    assert all((JOBS.parent / item.path).exists() for item in job.data.train)


def test_every_type_of_method_has_a_recipe():
    known = {kind.model_fields["type"].default for kind in (FullConfig, LoraConfig)}
    types = {read_job(recipe).method.type for recipe in RECIPES}
    known |= {"freeze", "oft", "adapter", "prompt", "p_tuning", "prefix", "ia3", "vera", "peft"}
    assert types == known
