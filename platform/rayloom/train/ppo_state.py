"""What stage ppo must know to go on, besides model, optimizer and position; the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayloom.data.plan import Position
from rayloom.losses.kl_control import KlControl
from rayloom.losses.moments import Moments
from rayloom.rollout.request import Rollout
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.meter import StepCount
from rayloom.train.ppo_answers import Answer, Asked
from rayloom.train.ppo_rounds import Round

FILE = "ppo.json"


@dataclass
class PpoState:
    """Between two rounds."""

    rounds: int
    """Rounds that have been learnt from: the version of the weights."""
    kl: KlControl
    rewards: Moments
    """Of all rewards so far."""
    ahead: list[Round]
    """Rounds that were answered, but not learnt from: of all ranks together where it was loaded or is to be saved."""

    @classmethod
    def start(cls, stage: PpoConfig) -> PpoState:
        """Before the first round."""
        return cls(0, KlControl(stage.kl.coefficient, stage.kl.target, stage.kl.horizon), Moments(), [])

    def save(self, folder: Path) -> None:
        state = {
            "rounds": self.rounds,
            "kl": self.kl.as_dict(),
            "rewards": self.rewards.as_dict(),
            "ahead": [_round_dict(one) for one in self.ahead],
        }
        (folder / FILE).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PpoState:
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        ahead = [_round_from(one) for one in state["ahead"]]
        return cls(state["rounds"], KlControl(**state["kl"]), Moments(**state["rewards"]), ahead)


def rank_part(of_round: Round, rank: int, per_rank: int) -> Round:
    """Of a round of all ranks the part of one: that which it would have been dealt."""
    mine = {asked.number: asked for asked in of_round.asked if asked.number // per_rank == rank}
    answers = [answer for answer in of_round.answers or [] if answer.asked.number in mine]
    return Round(of_round.number, list(mine.values()), of_round.count, answers)


def whole_round(parts: Sequence[Round]) -> Round:
    """The ranks' parts of one round, put together."""
    asked = [asked for part in parts for asked in part.asked]
    answers = [answer for part in parts for answer in part.answers or []]
    return Round(parts[0].number, asked, parts[0].count, answers)


def _round_dict(of_round: Round) -> dict[str, object]:
    count = of_round.count
    assert count is not None  # it is a round of the training
    return {
        "number": of_round.number,
        "asked": [asdict(asked) for asked in of_round.asked],
        "rollouts": [asdict(answer.rollout) for answer in of_round.answers or []],
        "count": {**asdict(count), "position": count.position.as_dict()},
    }


def _round_from(state: dict[str, Any]) -> Round:
    asked = [Asked(**{**one, "token_ids": tuple(one["token_ids"])}) for one in state["asked"]]
    by_number = {one.number: one for one in asked}
    rollouts = [
        Rollout(**{**one, "token_ids": tuple(one["token_ids"]), "log_probs": tuple(one["log_probs"])})
        for one in state["rollouts"]
    ]
    count = StepCount(**{**state["count"], "position": Position.from_dict(state["count"]["position"])})
    answers = [Answer(by_number[one.prompt], one) for one in rollouts]
    return Round(state["number"], asked, count, answers)
