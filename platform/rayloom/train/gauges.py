"""What Prometheus reads of a job: gauges of Ray, which its nodes export as `ray_rayloom_<measure>`.

The rows of `metrics.jsonl` are given by `rayloom.train.track`; what is in no row (how the job stands, how old its last
checkpoint is, what the engines do meanwhile) by the driver, every few seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

HELP = {
    # of every job
    "step": "Optimizer steps that were made",
    "epoch": "Epochs of the stream that are done",
    "progress": "Share of the training that is done, 0 to 1",
    "loss": "Mean loss since the row before",
    "loss_is_no_number": "1 where the loss of the last row is NaN or infinite, which Ray does not export; else 0",
    "learning_rate": "Learning rate of the last step",
    "grad_norm": "Norm of the gradient before it is clipped",
    "tokens_per_second": "Tokens trained on in a second, of all workers, since the row before",
    "data_wait": "Share of the time that waited for data since the row before, 0 to 1",
    "step_seconds": "Seconds of a step by its parts, on the first worker",
    "tokens": "Tokens trained on",
    "examples_seen": "Examples trained on",
    "examples": "Examples trained on, by data set",
    # of some stages
    "perplexity": "Exponential of the mean loss of a token",
    "accuracy": "Share that is right, 0 to 1: of the likeliest tokens, of pairs, or of judged answers",
    "rewards": "Mean reward of answers by their kind: chosen and rejected, or desirable and undesirable",
    "divergence": "Mean divergence of the policy from the reference on answers to other prompts, in nats",
    # of stage ppo
    "reward": "Mean reward of an answer; by its source where there are several",
    "answer_tokens": "Mean tokens of an answer",
    "unfinished": "Share of the answers that were cut off at rollout.max_tokens, 0 to 1",
    "kl": "Mean divergence of an answer from the reference, in nats",
    "kl_coefficient": "Weight of the divergence from the reference",
    "step_kl": "Mean divergence of a token from the policy before the round, in nats",
    "mismatch": "Mean absolute difference of a token's log-probability, of engine and trainer",
    "mismatch_kl": "Mean difference of a token's log-probability, of engine and trainer",
    "probe_difference": "Mean absolute difference of a probe's log-probabilities, of engine and trainer",
    "staleness": "Mean age of the answers that are learnt from, in policy versions",
    "policy_version": "Version of the trainer's weights: rounds learnt from",
    "policy_loss": "Mean policy loss of a token",
    "value_loss": "Mean loss of the value head of a token",
    "clipped": "Share of the tokens whose probability ratio was clipped, 0 to 1",
    "entropy": "Mean entropy of the policy at a token, in nats",
    "sync_seconds": "Seconds of the last sync of weights, with its checks",
    # of the engines, since they were started; between rows too
    "engine_prompts": "Prompts that the engines have answered",
    "engine_tokens": "Tokens of the answers that the engines gave",
    "engine_generate_seconds": "Seconds in which rounds were answered",
    "engine_busy_seconds": "Seconds in which an engine answered, by its number",
    "engine_restarts": "Engines that were started again after they died or hung",
    "engine_version": "Version of the weights that the engines were given last; -1: none yet",
    "engine_syncs": "Syncs of weights that are done",
    "engine_sync_seconds": "Seconds of all syncs of weights",
    # of the job itself; between rows too
    "state": "1 for what the job does now: starting, training or stopping; 0 for the others",
    "breaks": "How often the job went on from a checkpoint, by why: a fault, or moved to other nodes",
    "checkpoint_time": "Time of day of the last checkpoint that counts, or of the first row of metrics, in seconds",
    # of a search, under its name; its trials have all of the above, each under its own
    "search_trials": "Trials of the search by their status; waiting: not begun",
    "search_best": "Best of the trials' last values of the metric that the search goes by",
    "search_exploits": "Checkpoints that trials of a population have taken over from others",
}
"""What each measure is. Of an evaluation they begin with `eval_`."""
STATES = ("starting", "training", "stopping")
_BREAKS = ("fault", "moved")


class Gauges:
    """One gauge for each measure; labels: `job`, and `of` for parts of one."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._made: dict[str, Any] = {}

    def set(self, measure: str, value: float, of: str = "") -> None:
        if measure not in self._made:
            from ray.util.metrics import Gauge

            name = "rayloom_" + re.sub(r"[^a-zA-Z0-9_]", "_", measure)
            self._made[measure] = Gauge(name, description=help_text(measure), tag_keys=("job", "of"))
        self._made[measure].set(float(value), tags={"job": self._job, "of": of})


class JobGauges:
    """What is in no row of metrics. Between two calls nothing happens; no call waits.

    Args:
        fleet: the engines of stage ppo (`rayloom.rollout.fleet.FleetClient`), if there are any.
    """

    def __init__(self, gauges: Gauges, fleet: Any) -> None:
        self._gauges, self._fleet = gauges, fleet
        self._asked: Any = None  # the answer that the fleet's coordinator owes

    def show(self, state: str, breaks: Iterable[str], checkpoint_time: float | None) -> None:
        """How the job stands.

        Args:
            state: one of `STATES`.
            breaks: the kind of each so far.
            checkpoint_time: None: it does not train yet.
        """
        for name in STATES:
            self._gauges.set("state", name == state, name)
        counts = Counter(breaks)
        for kind in _BREAKS:
            self._gauges.set("breaks", counts[kind], kind)
        if checkpoint_time is not None:
            self._gauges.set("checkpoint_time", checkpoint_time)
        if self._fleet is not None:
            self._show_engines()

    def _show_engines(self) -> None:
        """What the coordinator said since the last call. It may have its hands full, so it is not waited for."""
        import ray
        import ray.exceptions

        with suppress(ray.exceptions.RayError):  # that it has died, the workers will say
            if self._asked is not None:
                if not ray.wait([self._asked], timeout=0)[0]:
                    return
                answered, self._asked = self._asked, None
                for name, value in ray.get(answered).items():
                    measure, of = engine_measure(name)
                    self._gauges.set(measure, value, of)
            self._asked = self._fleet.fleet.metrics.remote()


def engine_measure(name: str) -> tuple[str, str]:
    """The measure, and the part of it, of a count of `Fleet.metrics`."""
    busy = re.fullmatch(r"busy_seconds_(\d+)", name)
    return ("engine_busy_seconds", busy[1]) if busy else (f"engine_{name}", "")


def help_text(measure: str) -> str:
    """What Prometheus shows beside a measure."""
    of_evaluation = measure.removeprefix("eval_")
    text = HELP.get(of_evaluation, f"{of_evaluation} of metrics.jsonl")
    return text if of_evaluation == measure else f"Of the evaluation: {text[0].lower()}{text[1:]}"
