"""From scored answers to the loss: each advantage through the whole, and batches that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayloom.losses.advantage import leave_one_out
from rayloom.rollout.request import Rollout
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.experience import Experience, Scored, make_experience
from rayloom.train.ppo_answers import Answer, Asked, make_answer_batch, mask_of, spread
from rayloom.train.ppo_loss import TokenScores, Totals, step_loss

LENGTHS = [3, 1, 4, 2]


def answers() -> list[Answer]:
    """Two prompts with two answers each."""
    made = []
    for number, length in enumerate(LENGTHS):
        asked = Asked(number // 2, 0, number // 2, 0, (5, 6, 7)[: 2 + number // 2], "")
        log_probs = tuple(-1.0 - 0.1 * n for n in range(length))
        made.append(
            Answer(asked, Rollout(asked.number, number % 2, tuple(range(10, 10 + length)), log_probs, "stop", 0, 0))
        )
    return made


def scored(seed: int = 0) -> Scored:
    torch.manual_seed(seed)
    mask = mask_of(answers())
    tables = [torch.randn(mask.shape) * 0.2 * mask for _ in range(3)]
    return Scored(mask, tables[0] - 1.0 * mask, tables[1] - 1.0 * mask, tables[2])


def experience(**stage: Any) -> Experience:
    return make_experience(answers(), scored(), [1.0, 0.0, 0.5, 2.0], PpoConfig(**stage), 0.1)


def test_batches_predict_the_answers_tokens() -> None:
    batch = make_answer_batch(answers(), pad_token=0, packed=False)
    ids, width = batch["input_ids"].flatten(), batch["input_ids"].shape[1]
    assert batch["input_ids"][2].tolist() == [5, 6, 7, 10, 11, 12, 13]
    assert ids[batch["positions"] + 1].tolist() == batch["labels"][0].tolist()
    assert batch["labels"][0].tolist() == [10, 11, 12, 10, 10, 11, 12, 13, 10, 11]
    assert batch["last"].tolist() == [4, width + 2, 2 * width + 6, 3 * width + 4]
    table = spread(batch["labels"][0].float(), mask_of(answers()))
    assert table[3].tolist() == [10, 11, 0, 0]


@pytest.mark.parametrize("row", [2048, 8])
def test_rows_of_several_answers_predict_the_same(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """In one row; in three, of which two have padding."""
    monkeypatch.setattr("rayloom.train.batch.ROW", row)
    batch = make_answer_batch(answers(), pad_token=0, packed=True)
    ids = batch["input_ids"].flatten()
    assert ids[batch["positions"] + 1].tolist() == batch["labels"][0].tolist()
    assert batch["labels"][0].tolist() == [10, 11, 12, 10, 10, 11, 12, 13, 10, 11]
    assert ids[batch["last"]].tolist() == [12, 10, 13, 11]
    if row == 2048:
        assert batch["input_ids"].tolist() == [[5, 6, 10, 11, 12, 5, 6, 10, 5, 6, 7, 10, 11, 12, 13, 5, 6, 7, 10, 11]]
        assert batch["position_ids"].tolist() == [[*range(5), *range(3), *range(7), *range(5)]]
    else:
        assert batch["input_ids"].tolist() == [
            [5, 6, 7, 10, 11, 12, 13, 0],
            [5, 6, 10, 11, 12, 5, 6, 10],
            [5, 6, 7, 10, 11, 0, 0, 0],
        ]
        assert batch["position_ids"].tolist() == [
            [*range(7), 0],
            [*range(5), *range(3)],
            [*range(5), *range(3)],
        ]


@pytest.mark.parametrize("packed", [False, True])
def test_no_answers_make_one_row_of_padding(packed: bool) -> None:
    batch = make_answer_batch([], pad_token=9, packed=packed)
    assert batch["input_ids"].tolist() == [[9, 9]]
    assert batch["positions"].tolist() == [0]
    assert batch["labels"].tolist() == [[-100]]


def test_of_rloo_the_divergence_is_part_of_the_reward() -> None:
    found, given = experience(advantage="rloo", samples=2), scored()
    assert given.reference is not None
    totals = torch.tensor([1.0, 0.0, 0.5, 2.0]) - 0.1 * ((given.log_probs - given.reference) * given.mask).sum(1)
    expected = leave_one_out(totals, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(found.tables["advantages"], expected.unsqueeze(1) * given.mask)


def test_of_grpo_it_is_part_of_the_loss_only() -> None:
    found = experience(advantage="grpo")
    rows = found.tables["advantages"][:, 0]
    torch.testing.assert_close(rows[:2], torch.tensor([0.5, -0.5]) / (0.5**0.5 + 1e-4), rtol=1e-5, atol=1e-6)
    assert "reference" in found.tables
    assert "returns" not in found.tables


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo", "reinforce++"])
def test_parts_of_a_step_add_up(advantage: str) -> None:
    """The loss of all answers at once is the sum of those of any parts of them, gradients too."""
    stage = PpoConfig(advantage=advantage, samples=2, entropy=0.01)  # type: ignore[arg-type]
    found = experience(advantage=advantage, samples=2, entropy=0.01)
    torch.manual_seed(3)
    new, values, entropies = (torch.randn(found.mask.shape, requires_grad=True) for _ in range(3))

    def loss(parts: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
        for tensor in (new, values, entropies):
            tensor.grad = None
        everything = torch.arange(4)
        totals, sum_ = Totals.over_ranks(found, everything, "cpu"), 0.0
        for part in parts:
            chosen, mask = torch.tensor(part), found.mask[torch.tensor(part)]
            said = TokenScores(new[chosen][mask] - 1, entropies[chosen][mask], values[chosen][mask])
            one, _ = step_loss(said, found.known(chosen), stage, totals, max_tokens=6, kl_coefficient=0.1)
            one.backward()
            sum_ += one.item()
        return sum_, [tensor.grad.clone() for tensor in (new, entropies) if tensor.grad is not None]

    whole, gradients = loss([[0, 1, 2, 3]])
    for parts in ([[0, 1], [2, 3]], [[3], [1], [0, 2]]):
        again, others = loss(parts)
        assert again == pytest.approx(whole, rel=1e-5)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_totals_count_answers_and_tokens() -> None:
    totals = Totals.over_ranks(experience(), torch.tensor([0, 3]), "cpu")
    assert (totals.answers, totals.tokens, totals.all_tokens) == (2, 5, 5 + 2 + 3)


def test_what_the_engine_saw_otherwise_weighs_less() -> None:
    known = experience(importance_cap=1.1).known(torch.tensor([0]))
    expected = (scored().log_probs[0, :3] - torch.tensor([-1.0, -1.1, -1.2])).exp().clamp(max=1.1)
    torch.testing.assert_close(known["importance"], expected)
    assert "importance" not in experience(importance_cap=None).tables
