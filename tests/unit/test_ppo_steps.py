"""Which answers the steps of a round learn from."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.permutation import permutation
from rayloom.rollout.request import Rollout
from rayloom.train.ppo_answers import Answer, Asked, make_answer_batch, row_length
from rayloom.train.ppo_trainer import PpoTrainer


def _answer(number, prompt, length):
    drawn = Rollout(number, 0, tuple(range(length)), (0.0,) * length, "stop", 0, 0)
    return Answer(Asked(number, 0, number, 0, tuple(range(prompt)), ""), drawn)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=20),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_every_answer_once_an_epoch_and_those_of_a_step_by_length(sizes, batch, accumulation, epochs):
    answers = [_answer(number, *size) for number, size in enumerate(sizes)]
    trainer = SimpleNamespace(
        _settings=SimpleNamespace(batch_size=batch, accumulation=accumulation, seed=7),
        _stage=SimpleNamespace(epochs=epochs),
        _state=SimpleNamespace(rounds=3),
        args=SimpleNamespace(device="cpu", process_index=0),
    )
    steps = [step.tolist() for step in PpoTrainer._deal_steps(trainer, answers)]
    each = -(-len(answers) // (batch * accumulation))
    assert len(steps) == epochs * each
    for epoch in range(epochs):
        order = list(permutation(len(answers), 7, "answers", 3, epoch, 0))
        of_epoch = steps[epoch * each : (epoch + 1) * each]
        assert [sorted(step) for step in of_epoch] == [
            sorted(order[start : start + batch * accumulation])
            for start in range(0, len(answers), batch * accumulation)
        ]
        for step in of_epoch:
            lengths = [row_length(answers[number]) for number in step]
            assert lengths == sorted(lengths, reverse=True)


def test_a_batch_of_answers_is_padded_to_its_longest():
    batch = make_answer_batch([_answer(0, 3, 5), _answer(1, 2, 2)], pad_token=9, packed=False)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 9, 9, 9, 9]]
    assert torch.equal(batch["positions"], torch.tensor([2, 3, 4, 5, 6, 9, 10]))
