"""The trainer of stage ppo.

    round: weights to the engines -> prompts to answers -> rewards, log-probabilities, values -> advantages
           -> optimizer steps, each on some of the round's answers, `stage.epochs` times over

To transformers' Trainer an optimizer step is a step; between two rounds `get_batch_samples` makes the next one.
Checkpoints and evaluations wait for the end of a round, so a resumed job begins with new prompts, on whatever number of
workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from rayloom.data.permutation import permutation
from rayloom.losses.moments import Moments
from rayloom.models.packed_attention import packs_cheaply
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.rewards.combine import Judged, RewardSum
from rayloom.rollout.rewards.source import Answered
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.batch import Batch
from rayloom.train.collective import of_all_ranks, over_ranks
from rayloom.train.experience import Experience, Scored, make_experience, round_measures
from rayloom.train.head_file import HeadTrainer
from rayloom.train.head_scores import Entropy
from rayloom.train.means import Means
from rayloom.train.meter import StreamMeter
from rayloom.train.monitor import answer
from rayloom.train.policy_sync import PolicySync
from rayloom.train.ppo_answers import Answer, lengths_of, make_answer_batch, mask_of, row_length, spread
from rayloom.train.ppo_loss import Totals, step_loss
from rayloom.train.ppo_rounds import RankFleet, Round, RoundEnd, RoundReader, asked_of
from rayloom.train.ppo_setup import RewardModels
from rayloom.train.ppo_state import PpoState, rank_part, whole_round
from rayloom.train.schedule import learning_rate_factor


class PpoTrainer(HeadTrainer):
    """Learns from its own answers. The model has a critic already where the stage has one (`attach_critic`)."""

    _stage: PpoConfig

    def __init__(
        self,
        *,
        fleet: RankFleet,
        sync: PolicySync,
        rewards: RewardSum,
        reward_models: RewardModels,
        per_rank: int,
        rollout: RolloutConfig,
        **kw: Any,
    ) -> None:
        """`per_rank`: prompts of a round that each rank has."""
        super().__init__(**kw)
        self._fleet, self._sync, self._rewards = fleet, sync, rewards
        self._reward_models = reward_models(self._trained_positions)
        models = [kw["model"], *(judge.model for judge in self._reward_models.values())]
        self._packs = all(packs_cheaply(model, self.args.device) for model in models)
        self._per_rank, self._rollout = per_rank, rollout
        self._head = kw["model"].v_head if self._stage.has_value_head else None
        self._head_rate = self._stage.value_learning_rate
        self._state = PpoState.start(self._stage)
        self._kl_coefficient = self._state.kl.coefficient  # of the round that is learnt from
        self._reader: RoundReader | None = None
        self._experience: Experience | None = None
        self._steps: deque[torch.Tensor] = deque()  # of each step that is left of the round: its answers here
        self._of_rounds, self._of_steps = Means(), Means()
        self.add_callback(RoundEnd(self.end_step))

    # --- from round to step -------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[pa.Table], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The batches of one optimizer step; before the first of a round, the round."""
        before = self._progress()
        if self._is_over or (not self._steps and not self._begin_round(epoch_iterator)):
            self._end()
            return [], None
        assert self._schedule is not None  # made before the first step
        chosen, size = self._steps.popleft(), self._settings.batch_size
        parts = [chosen[start : start + size] for start in range(0, num_batches * size, size)]
        batches = [self._answer_batch(part) for part in parts]
        assert self._experience is not None  # made with the round
        self._totals = Totals.over_ranks(self._experience, chosen, self.args.device)
        self.meter.tokens += self._totals.all_tokens
        self.meter.trained_tokens += self._totals.tokens
        middle = (before + self._progress(1)) / 2
        self._schedule.set(learning_rate_factor(middle, self._settings.scheduler, self._settings.warmup))
        return batches, torch.tensor(self._totals.tokens, device=device)

    def _begin_round(self, tables: Iterator[pa.Table]) -> bool:
        """Have the next round answered and judged. False: told to stop, or the stream has ended."""
        if self._agree_to_stop():
            self.stopped = True
            return False
        if self._reader is None:
            self._reader = self._make_reader(tables)
        self._serve()
        with self._clock.part("data"):
            taken = self._reader.take(self._state.rounds)
        self._compare_with_engines()
        if taken is None:
            if self._reader.rest is not None:
                self._reader.rest.add_to(self.meter, tokens=False)
            return False
        self._row_clock.start(self.meter.tokens, self.state.global_step)
        assert taken.count is not None  # it is a round of the training
        taken.count.add_to(self.meter, tokens=False)  # those of prompts and answers count with each step
        self._taken = [(answer.asked.set, answer.asked.row) for answer in taken.answers or []]
        if self._manifest:
            self._post_manifest()
        self._experience = self._learn_from(taken)
        self._steps = deque(self._deal_steps(self._experience.answers))
        return True

    def _describe_bad_step(self, what: str, rows: Sequence[str], whose: str) -> str:
        return super()._describe_bad_step(what, rows, f"the round of {whose}")

    def end_step(self) -> bool:
        """After an optimizer step: whether it was the round's last. Then the weights are a new version."""
        if self._steps:
            return False
        self._state.rounds += 1
        self._experience = None
        return True

    def _agree_to_stop(self) -> bool:
        stop = bool(self.is_world_process_zero() and answer(self._monitor.stop_requested.remote(), "rank 0"))
        return bool(over_ranks(torch.tensor([float(stop)]), self.args.device)[0])

    def _make_reader(self, tables: Iterator[pa.Table]) -> RoundReader:
        kept = [rank_part(one, self._fleet.rank, self._per_rank) for one in self._state.ahead]
        self._state.ahead = []
        return RoundReader(
            tables,
            self._fleet,
            per_rank=self._per_rank,
            sets=len(self.meter.examples),
            max_staleness=self._rollout.max_staleness,
            device=self.args.device,
            first=self._state.rounds,
            kept=kept,
        )

    def _deal_steps(self, answers: Sequence[Answer]) -> Iterator[torch.Tensor]:
        """Which answers each step of the round learns from: every answer once an epoch, in another order each. All
        ranks make as many steps, also where one has fewer answers. Those of a step stand by their length, for less
        padding: its loss is one sum, whichever batch they fall into."""
        size = self._settings.batch_size * self._settings.accumulation
        most = _most_of_ranks(len(answers), self.args.device)
        lengths = torch.tensor([row_length(answer) for answer in answers], dtype=torch.long)
        for epoch in range(self._stage.epochs):
            key = (self._settings.seed, "answers", self._state.rounds, epoch, self.args.process_index)
            order = torch.as_tensor(permutation(len(answers), *key), dtype=torch.long)
            for start in range(0, most, size):
                step = order[start : start + size]
                yield step[lengths[step].argsort(descending=True, stable=True)]

    # --- the model ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Let the engines serve the weights as they are now, if they do not yet."""
        with self._clock.part("sync"):
            self._sync.serve(self._state.rounds, self.accelerator.unwrap_model(self.model_wrapped))

    def _compare_with_engines(self) -> None:
        """See whether the engines compute with the weights as they are now. Behind a round's answers: before them, the
        engines would wait for it, and beside them it would take their cores where they share a machine."""
        with self._clock.part("sync"):
            self._sync.compare(self._next_log_probs)

    def _next_log_probs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(vocab,) the policy's log-probabilities, at temperature 1, of what comes behind a text; on CPU."""
        ids = torch.tensor([list(token_ids)], device=self.args.device)
        self._trained_positions.choose(torch.tensor([len(token_ids) - 1], device=self.args.device))
        with self._scoring():
            logits = self.model_wrapped(input_ids=ids, use_cache=False).logits[0, 0]
        return logits.float().log_softmax(-1).cpu()

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Inside, the model computes without gradients and dropout."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    # --- from answers to experience -----------------------------------------------------------------------------------

    def _learn_from(self, of_round: Round) -> Experience:
        """Judge a round's answers, and work out what each token of them was worth."""
        answers = of_round.answers or []
        with self._clock.part("rewards"):
            judged = self._judge(answers)
            moments = reduce(Moments.merged, of_all_ranks(Moments.of(judged.total)))
            self._state.rewards = self._state.rewards.merged(moments)
            rewards = self._rewards.settled(judged.total, self._state.rewards, moments)
        with self._clock.part("scores"):
            scored = self._score(answers)
        self._kl_coefficient = self._state.kl.coefficient
        experience = make_experience(answers, scored, rewards, self._stage, self._kl_coefficient)
        measures = round_measures(answers, scored, judged.total)
        if "kl" in measures:
            total = torch.tensor([measures["kl"].sum(), len(answers)], dtype=torch.float64)
            divergence, count = over_ranks(total, self.args.device).tolist()
            self._state.kl = self._state.kl.after(divergence / max(1.0, count), int(count))
        self._of_rounds.add({**measures, **self._parts(judged)})
        ages = [self._state.rounds - answer.rollout.policy_version for answer in answers]
        self._of_rounds.add({"staleness": torch.tensor(ages, dtype=torch.float64)})
        return experience

    @staticmethod
    def _parts(judged: Judged) -> dict[str, torch.Tensor]:
        """What each reward gave, where there are several."""
        if len(judged.parts) == 1:
            return {}
        return {f"reward/{name}": torch.tensor(found, dtype=torch.float64) for name, found in judged.parts.items()}

    def _judge(self, answers: Sequence[Answer]) -> Judged:
        """What each answer got, from every reward."""
        texts = [self._answered(answer) for answer in answers]
        given = {name: torch.zeros(len(answers)) for name in self._reward_models}
        if given:
            with self._scoring():
                for numbers, batch in self._by_length(answers):
                    for name, model in self._reward_models.items():
                        given[name][numbers] = model.score(batch)[: len(numbers)].float().cpu()
        return self._rewards.judge(texts, {name: values.tolist() for name, values in given.items()})

    def _answered(self, answer: Answer) -> Answered:
        tokenizer: Any = self.processing_class
        return Answered(
            prompt=tokenizer.decode(list(answer.asked.token_ids)),
            answer=tokenizer.decode(list(answer.rollout.token_ids), skip_special_tokens=True),
            reference=answer.asked.reference,
            tokens=len(answer.rollout.token_ids),
            finish_reason=answer.rollout.finish_reason,
        )

    def _score(self, answers: Sequence[Answer]) -> Scored:
        """What policy, reference and critic say of each token, before the first step of the round."""
        mask, temperature = mask_of(answers), self._rollout.temperature
        tables: dict[str, torch.Tensor] = {}
        with self._scoring():
            for numbers, batch in self._by_length(answers):
                said = self._scorer(self.model_wrapped, batch, temperature=temperature)
                found = {"log_probs": said.log_probs, "values": said.values}
                if self._stage.has_reference:
                    found["reference"] = self._said_before(batch, temperature).log_probs
                for name, values in found.items():
                    if values is not None and numbers:
                        table = tables.setdefault(name, torch.zeros(mask.shape))
                        table[numbers] = spread(values.float().cpu(), mask[numbers])
        return Scored(
            mask, tables.get("log_probs", torch.zeros(mask.shape)), tables.get("reference"), tables.get("values")
        )

    def _by_length(self, answers: Sequence[Answer]) -> Iterator[tuple[list[int], Batch]]:
        """All answers in batches of nearly one length, and their numbers; as many batches on every rank."""
        order = sorted(range(len(answers)), key=lambda n: row_length(answers[n]), reverse=True)
        size = self._settings.batch_size
        for start in range(0, _most_of_ranks(len(answers), self.args.device), size):
            numbers = order[start : start + size]
            yield numbers, self._prepare_inputs(self._batch_of(answers, numbers))

    def _batch_of(self, answers: Sequence[Answer], numbers: Sequence[int]) -> Batch:
        return make_answer_batch([answers[n] for n in numbers], self._pad_token, packed=self._packs)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def _answer_batch(self, chosen: torch.Tensor) -> Batch:
        """The batch of some of the round's answers, and under `known` what the loss takes of them, (kept,) each."""
        assert self._experience is not None  # made with the round
        batch = self._batch_of(self._experience.answers, chosen.tolist())
        return {**batch, "known": self._experience.known(chosen)}

    def _loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """This batch's share of the mean over the step's tokens or answers, times the ranks, whose gradients are
        averaged."""
        entropy: Entropy = "trained" if self._stage.entropy else "measured"
        said = self._scorer(model, inputs, temperature=self._rollout.temperature, entropy=entropy)
        known = inputs["known"]
        if not len(known["advantages"]):  # one row of padding that stands for no answer
            return (said.log_probs.sum() + (said.values.sum() if said.values is not None else 0.0)) * 0.0
        loss, measures = step_loss(
            said,
            known,
            self._stage,
            self._totals,
            max_tokens=self._rollout.max_tokens,
            kl_coefficient=self._kl_coefficient,
        )
        self._of_steps.add(measures)
        return loss * self.accelerator.num_processes

    # --- what is measured, evaluated, kept ----------------------------------------------------------------------------

    def _stage_metrics(self) -> dict[str, float | None]:
        """Means over the answers or tokens since the last row; of rounds those of the last one, where none is new."""
        return {
            **self._of_rounds.read(self.args.device),
            **self._of_steps.read(self.args.device),
            "kl_coefficient": self._state.kl.coefficient,
            "policy_version": float(self._state.rounds),
            "sync_seconds": self._sync.seconds,
            "probe_difference": self._sync.difference,
        }

    def _eval_metrics(self, tables: list[pa.Table]) -> dict[str, float]:
        """`eval_reward` and how long the answers are, drawn with the same seeds at every evaluation; and of each set
        where there are several."""
        self._serve()
        asked = [one for number, table in enumerate(tables) for one in asked_of(table, self._eval_first(number))]
        evaluation = Round(-1 - self.state.global_step, asked, None)
        self._fleet.ask(evaluation)
        self._fleet.collect(evaluation)
        self._compare_with_engines()
        answers = evaluation.answers or []
        judged = self._judge(answers)
        reward = torch.tensor(judged.total, dtype=torch.float64)
        numbers = {"reward": reward, "answer_tokens": lengths_of(answers).double(), **self._parts(judged)}
        means = Means()
        means.add(numbers)
        found = {f"eval_{name}": value for name, value in means.read(self.args.device).items()}
        sets = torch.tensor([answer.asked.set for answer in answers])
        for number, name in enumerate(self._eval_names if len(self._eval_names) > 1 else []):
            of_set = Means()
            of_set.add({key: values[sets == number] for key, values in numbers.items()})
            found |= {f"eval_{key}/{name}": value for key, value in of_set.read(self.args.device).items()}
        return found

    def _eval_first(self, table: int) -> int:
        """The number of the first prompt of this rank's evaluation table: none is given twice."""
        size = self._settings.batch_size
        return (table * self._fleet.ranks + self._fleet.rank) * size

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step != self._saved_step:
            self._gather_ahead()
        super()._save_checkpoint(model, trial)

    def _gather_ahead(self) -> None:
        """Put the rounds that have been answered ahead together, on every rank."""
        parts = of_all_ranks(self._reader.answered_ahead() if self._reader else [])
        if self._reader:  # what is kept was answered by engines that compute what this version of the policy does
            self._compare_with_engines()
        self._state.ahead = [whole_round(of_round) for of_round in zip(*parts, strict=False)]

    def _saved_meter(self) -> StreamMeter:
        """The stream goes on behind the rounds that were answered ahead."""
        if not self._state.ahead:
            return self.meter
        behind = self._state.ahead[-1].count
        assert behind is not None  # it is a round of the training
        return replace(self.meter, position=behind.position)

    def save_own(self, folder: Path) -> None:
        self._state.save(folder)

    def restore_own(self, folder: Path) -> None:
        super().restore_own(folder)
        self._state = PpoState.load(folder)


def _most_of_ranks(count: int, device: torch.device) -> int:
    return int(over_ranks(torch.tensor([float(count)]), device, "max")[0])
