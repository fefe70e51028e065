"""What a worker of stage ppo gets of the job file."""

from __future__ import annotations

from typing import Any

import torch
from tests.unit.test_ppo_rules import job, source

from rayloom.rollout.request import Sampling
from rayloom.train.ppo_setup import trainer_parts


def test_engines_are_told_how_the_job_wants_its_answers() -> None:
    rollout = {"max_tokens": 9, "min_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop": ["\n\n", "END"]}
    asked = job(
        stage={"advantage": "grpo", "samples": 3},
        rollout=rollout,
        rewards=source(type="unfinished"),
        train={"seed": 7},
    )
    client: Any = None  # nothing is asked
    parts = trainer_parts(asked, client, None, torch.float32, "fp32", rank=1, ranks=2)
    fleet = parts["fleet"]
    assert fleet.sampling == Sampling(
        max_tokens=9, temperature=0.7, top_p=0.9, top_k=5, min_tokens=3, stop=("\n\n", "END")
    )
    assert (fleet.rank, fleet.ranks, fleet.samples, fleet.seed) == (1, 2, 3, 7)
    assert parts["per_rank"] == 4
