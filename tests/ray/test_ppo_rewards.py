"""Several rewards of stage ppo in one job: a server's, a reward adapter's, a reward model's; their sum, normalized, is
what the policy learns from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
from tests.ray import test_ppo
from tests.ray.small_jobs import job, run
from tests.ray.test_ppo import ppo_job
from tests.unit.test_rewards import server
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.models.value_head import FILE
from rayloom.train.ppo_state import PpoState
from rayloom.train.run_dir import find_run

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.slow, pytest.mark.timeout(600)]

model, folder = test_ppo.model, test_ppo.folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory, connected: Any) -> Path:
    """What a small job of stage reward has saved."""
    made = tmp_path_factory.mktemp("reward")
    rows = [{"instruction": f"Say {n}.", "output": [f"It is {n}, I say.", "No."]} for n in range(60)]
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"path": str(made / "pairs.jsonl"), "ranking": True}]
    config = job(model, made, pairs, "judge", stage={"type": "reward"}, method={"rank": 4}, train={"max_steps": 8})
    run(config)
    return config.run_dir / "model"


@pytest.fixture(scope="module")
def judge(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same reward model as a model of its own: PEFT has merged the adapter."""
    made = tmp_path_factory.mktemp("judge")
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    merged.save_pretrained(made)
    AutoTokenizer.from_pretrained(model).save_pretrained(made)
    shutil.copy(adapter / FILE, made / FILE)
    return made


def test_the_sum_and_what_is_learnt_from_it(
    model: Path, folder: Path, adapter: Path, judge: Path, tmp_path: Path
) -> None:
    """All answers have eight tokens, a round has one step, and nothing is clipped or whitened: so its loss is the
    negative of its mean normalized reward. Adapter and model are one reward model, with weights that cancel."""
    prompts, rounds = 16, 4
    seen: list[dict[str, Any]] = []

    def reply(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        scores = [sum(map(ord, answer)) % 17 / 17 for answer in body["answers"]]
        seen.append({**body, "scores": scores})
        return 200, json.dumps({"scores": scores}).encode()

    stage = {"advantage": "reinforce++", "whiten": False, "value_learning_rate": None, "importance_cap": None}
    with server(reply) as url:
        sources = [
            {"type": "http", "name": "server", "url": url, "weight": 0.5, "batch_size": 4},
            {"type": "adapter", "path": str(adapter), "weight": 3.0},
            {"type": "model", "path": str(judge), "weight": -3.0},
            {"type": "length", "free": 6, "longest": 10, "weight": 2.0},
        ]
        config = ppo_job(
            model,
            folder,
            tmp_path,
            "sum",
            stage={**stage, "prompts": prompts, "epochs": 1, "kl": {"coefficient": 0.0}},
            rollout={"max_tokens": 8, "min_tokens": 8},
            rewards={"sources": sources, "normalize": True},
            train={"max_steps": rounds},
        )
        _, rows = run(config)
    assert [len(body["answers"]) for body in seen] == [4] * (rounds * prompts // 4)
    asked = [pair for body in seen for pair in zip(body["prompts"], body["references"], strict=True)]
    assert len({prompt for prompt, _ in asked}) == rounds * prompts
    assert all(f"word {reference}?" in prompt for prompt, reference in asked)
    scores = [score for body in seen for score in body["scores"]]
    assert len(rows) == rounds
    totals: list[float] = []
    for number, row in enumerate(rows):
        given = scores[number * prompts : (number + 1) * prompts]
        assert row["reward/server"] == pytest.approx(sum(given) / prompts, rel=1e-9)
        assert row["reward/length"] == -0.5
        assert row["answer_tokens"] == 8
        assert row["reward/adapter"] == pytest.approx(row["reward/model"], abs=1e-4)
        assert abs(row["reward/adapter"]) > 0.01
        parts = [row[f"reward/{name}"] for name in ("server", "adapter", "model", "length")]
        weighted = sum(weight * part for weight, part in zip((0.5, 3.0, -3.0, 2.0), parts, strict=True))
        assert row["reward"] == pytest.approx(weighted, rel=1e-9)
        of_round = [0.5 * score - 1.0 for score in given]
        totals += of_round
        mean = sum(totals) / len(totals)
        deviation = (sum((total - mean) ** 2 for total in totals) / len(totals)) ** 0.5
        assert row["loss"] == pytest.approx(-(sum(of_round) / prompts - mean) / deviation, abs=5e-3), number
    assert max(abs(row["loss"]) for row in rows) > 0.1
    checkpoint = find_run(config).latest_checkpoint()
    assert checkpoint is not None
    moments = PpoState.load(checkpoint).rewards
    assert (moments.count, moments.mean) == (len(totals), pytest.approx(mean, abs=1e-4))
    assert moments.deviation == pytest.approx(deviation, rel=1e-2)
