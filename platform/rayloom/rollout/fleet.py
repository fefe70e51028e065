"""The fleet: one coordinator between the train workers and the engines.

    every rank -> Fleet.ask, collect -> split over the engines -> answers back, ordered by (prompt, sample)
    rank 0     -> Fleet.sync         -> every engine, each checked
                  Fleet.probes       <- what each computed beside its first prompts; the trainer compares it with itself

Rounds and weights take their turn in the order in which they were first asked for, so a round is answered by exactly
one policy version. Which engine answers a prompt depends on the prompts alone, not on who asked first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rayloom.data.pack import split_evenly
from rayloom.errors import JobError, RequestError, first_line
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.members import LostError, Member, Members
from rayloom.rollout.request import EngineOptions, Probe, Prompt, Rollout, Sampling, Served, Weights

_WORD_SECONDS = 60.0
"""For calls that the coordinator answers at once."""


@dataclass
class _Round:
    """What the train workers ask for together."""

    number: int
    ranks: int
    sampling: Sampling
    prompts: dict[int, list[Prompt]] = field(default_factory=dict)
    whole: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Task[dict[int, list[Rollout]]] | None = None
    collected: set[int] = field(default_factory=set)

    def missing(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank not in self.prompts]


class Fleet:
    """The coordinator, an actor without CPUs on the driver's node. Its methods are what a `FleetClient` calls."""

    def __init__(self, config: RolloutConfig, options: EngineOptions, probe_prompt: Sequence[int]) -> None:
        self._config = config
        self._members = Members(config, options, tuple(probe_prompt))
        self._turn = asyncio.Lock()  # first come, first served
        self._synced = asyncio.Condition()
        self._rounds: dict[int, _Round] = {}
        self._count = {"prompts": 0, "tokens": 0, "generate_seconds": 0.0}

    async def start(self) -> tuple[int, ...]:
        """Boot all engines at once; the tokens that end an answer.

        Raises:
            RequestError: the cluster has not the resources.
            JobError: an engine failed, or took longer than `rollout.start_timeout`.
        """
        return await self._members.start()

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def ask(self, number: int, rank: int, ranks: int, prompts: list[Prompt], sampling: Sampling) -> None:
        """A rank's prompts of a round. Every rank asks once for each; the first one's call gives it its turn.

        Args:
            number: of the round.
            ranks: how many will ask for it.
            sampling: the same from every rank.
        """
        asked = self._rounds.get(number)
        if asked is None:
            asked = self._rounds[number] = _Round(number, ranks, sampling)
            asked.answers = asyncio.create_task(self._answer_round(asked))
        if rank in asked.prompts:
            raise JobError(f"rank {rank} asked twice for the answers of round {number}")
        if (ranks, sampling) != (asked.ranks, asked.sampling):
            raise JobError(f"rank {rank} asked for round {number} in another way than the ranks before")
        asked.prompts[rank] = prompts
        if not asked.missing():
            asked.whole.set()

    async def collect(self, number: int, rank: int) -> list[Rollout]:
        """Answers to a rank's prompts of a round, ordered by (prompt, sample)."""
        asked = self._rounds.get(number)
        if asked is None or asked.answers is None:
            raise _dropped(number)
        try:
            answers = await asyncio.shield(asked.answers)
        except asyncio.CancelledError:
            raise _dropped(number) from None
        asked.collected.add(rank)
        if len(asked.collected) == asked.ranks:
            self._rounds.pop(number, None)
        return answers[rank]

    async def is_answered(self, number: int) -> bool:
        """Whether a round that was asked for has its answers, or will never have any."""
        asked = self._rounds.get(number)
        return asked is not None and asked.answers is not None and asked.answers.done()

    async def _answer_round(self, asked: _Round) -> dict[int, list[Rollout]]:
        """Wait for all ranks, then have all of their prompts answered."""
        async with self._turn:
            limit = self._config.generate_timeout
            try:
                await asyncio.wait_for(asked.whole.wait(), limit)
            except TimeoutError:
                missing = ", ".join(map(str, asked.missing()))
                raise JobError(
                    f"the fleet waited {limit:g} s for the prompts of rank {missing} in round {asked.number} "
                    f"(rollout.generate_timeout); of {asked.ranks} ranks {len(asked.prompts)} have asked"
                ) from None
            owner = {prompt.number: rank for rank, prompts in asked.prompts.items() for prompt in prompts}
            everything = sorted((p for prompts in asked.prompts.values() for p in prompts), key=lambda p: p.number)
            if len(owner) != len(everything):
                raise JobError(f"round {asked.number}: two of its {len(everything)} prompts have the same number")
            rollouts = await self._answer(everything, asked.sampling)
            answers: dict[int, list[Rollout]] = {rank: [] for rank in asked.prompts}
            for rollout in sorted(rollouts, key=lambda rollout: (rollout.prompt, rollout.sample)):
                answers[owner[rollout.prompt]].append(rollout)
            return answers

    async def _answer(self, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
        """Ask the engines until every prompt is answered; what an engine lost is asked again of those that serve."""
        began = time.monotonic()
        rollouts: list[Rollout] = []
        left = prompts
        while left:
            members = await self._members.serving()
            shares = split_evenly([prompt.work(sampling.max_tokens) for prompt in left], len(members))
            asked = [
                (member, [left[index] for index in share])
                for member, share in zip(members, shares, strict=True)
                if share
            ]
            results = await _all(self._ask(member, share, sampling) for member, share in asked)
            left = []
            for (_, share), result in zip(asked, results, strict=True):
                if result is None:
                    left += share
                else:
                    rollouts += result
        if self._config.share_gpus:  # before anyone trains on them
            await self._members.rest()
        self._count["prompts"] += len(prompts)
        self._count["tokens"] += sum(len(rollout.token_ids) for rollout in rollouts)
        self._count["generate_seconds"] += time.monotonic() - began
        return rollouts

    async def _ask(self, member: Member, prompts: list[Prompt], sampling: Sampling) -> list[Rollout] | None:
        """An engine's answers; None: it is lost, and is being started again."""
        try:
            probe = self._members.probe_prompt
            rollouts, said, seconds = await member.call("generate", prompts, sampling, probe, limit="generate_timeout")
        except LostError as error:
            self._members.revive(member, str(error))
            return None
        member.seconds += seconds
        if said is not None:
            self._members.accept(said)
        return rollouts

    # --- weights ------------------------------------------------------------------------------------------------------

    async def sync(self, weights: Weights) -> list[Served]:
        """Have all engines serve these weights, and check that they hold them.

        Raises:
            JobError: an engine serves something else.
        """
        async with self._turn:
            served = await self._members.sync(weights)
        async with self._synced:
            self._synced.notify_all()
        return served

    async def probes(self) -> list[Probe]:
        """What engines have computed on the probe, each with the first prompts that it got after a sync, since the last
        call."""
        probes, self._members.probes = self._members.probes, []
        return probes

    async def gpus(self) -> list[tuple[str, tuple[str, ...]]]:
        """Of each engine Ray's id of its node, and the numbers of its GPUs there."""
        return await self._members.gpus()

    async def wait_for(self, version: int) -> None:
        """Return when the engines serve a version, and that was checked."""
        async with self._synced:
            await self._synced.wait_for(lambda: self._members.checked_version == version)

    async def abandon(self) -> None:
        """Forget all rounds: the train workers that asked for them are gone. Engines end what they are at first."""
        rounds, self._rounds = list(self._rounds.values()), {}
        for asked in rounds:
            if asked.answers is not None:
                asked.answers.cancel()
        await asyncio.gather(*(r.answers for r in rounds if r.answers is not None), return_exceptions=True)
        async with self._turn:
            await self._members.quiet()
            if self._config.share_gpus:
                await self._members.rest()
            self._members.probes = []

    # --- what happened ------------------------------------------------------------------------------------------------

    async def events(self) -> list[dict[str, Any]]:
        """What went wrong and was mended: `time` (of day, seconds), `engine`, `what`, and `seconds` until it served
        again, None where it does not."""
        return self._members.events

    async def metrics(self) -> dict[str, float]:
        """Counts since the start: `prompts`, `tokens` (of answers), `generate_seconds`, `restarts`, `version` (-1:
        none), `syncs` and `sync_seconds`, and each engine's `busy_seconds_<n>`."""
        return {**self._count, **self._members.metrics()}

    async def processes(self) -> dict[int, int]:
        """The process id of each engine that is there."""
        return {member.number: member.process for member in self._members.all if member.process}

    async def stop(self) -> None:
        """End all engines."""
        await self._members.stop()


def _dropped(number: int) -> JobError:
    return JobError(f"round {number} was dropped: other train workers have begun")


async def _all(calls: Any) -> list[Any]:
    """Like `asyncio.gather`, but where one fails the others are waited for before it is raised."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


# --- from outside -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pending:
    """A round that was asked for."""

    number: int
    rank: int
    client: FleetClient

    @property
    def is_ready(self) -> bool:
        """Whether `collect` would return, or raise, at once."""
        said = self.client.fleet.is_answered.remote(self.number)
        return bool(self.client._get(said, f"whether round {self.number} is answered", _WORD_SECONDS))

    def collect(self) -> list[Rollout]:
        """Wait for the answers; ordered by (prompt, sample)."""
        client = self.client
        answers = client.fleet.collect.remote(self.number, self.rank)
        return client._get(answers, f"the answers of round {self.number}", client.patience)


@dataclass(frozen=True)
class FleetClient:
    """What a train worker, or the driver, holds of the fleet; it can be sent to other nodes."""

    fleet: Any
    """The coordinator's actor handle."""
    patience: float
    """Seconds after which the coordinator itself is taken for lost: more than all of its own limits together."""
    probe_prompt: tuple[int, ...]
    """What probes answer."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer."""

    def generate(self, number: int, rank: int, ranks: int, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
        """Ask for a round and wait for the answers to this rank's prompts, ordered by (prompt, sample).

        Raises:
            JobError: other ranks did not ask in time, or engines failed too often.
            RequestError: a prompt is too long.
        """
        return self.ask(number, rank, ranks, prompts, sampling).collect()

    def ask(self, number: int, rank: int, ranks: int, prompts: list[Prompt], sampling: Sampling) -> Pending:
        """The same without waiting for the answers. Weights that are sent afterwards come after this round."""
        said = self.fleet.ask.remote(number, rank, ranks, prompts, sampling)
        # Ray starts an actor's calls in any order; from here on this one has its place.
        self._get(said, f"its word that it has the prompts of round {number}", _WORD_SECONDS)
        return Pending(number, rank, self)

    def sync(self, weights: Weights) -> list[Served]:
        """Send new weights, behind the rounds that were asked for. One rank does.

        Raises:
            JobError: an engine does not serve them.
        """
        return self._get(self.fleet.sync.remote(weights), f"the sync of version {weights.version}", self.patience)

    def probes(self) -> list[Probe]:
        """What engines computed on the probe since the last call (`Fleet.probes`)."""
        return self._get(self.fleet.probes.remote(), "the probes", _WORD_SECONDS)

    def gpus(self) -> list[tuple[str, tuple[str, ...]]]:
        """Where the engines are (`Fleet.gpus`)."""
        return self._get(self.fleet.gpus.remote(), "where the engines are", self.patience)

    def wait_for(self, version: int) -> None:
        """Wait until the engines serve a version that another rank sends."""
        self._get(self.fleet.wait_for.remote(version), f"the sync of version {version} by rank 0", self.patience)

    def abandon(self) -> None:
        """Drop all rounds: a new set of train workers begins."""
        self._get(self.fleet.abandon.remote(), "the end of the rounds that were dropped", self.patience)

    def events(self) -> list[dict[str, Any]]:
        """What went wrong and was mended (`Fleet.events`)."""
        return self._get(self.fleet.events.remote(), "the list of events", _WORD_SECONDS)

    def metrics(self) -> dict[str, float]:
        """Counts since the start (`Fleet.metrics`)."""
        return self._get(self.fleet.metrics.remote(), "the counts", _WORD_SECONDS)

    def processes(self) -> dict[int, int]:
        """The process id of each engine that is there."""
        return self._get(self.fleet.processes.remote(), "the engines' processes", _WORD_SECONDS)

    def stop(self) -> None:
        """End the engines and the coordinator. For who started them."""
        try:
            self._get(self.fleet.stop.remote(), "the end of the engines", _WORD_SECONDS)
        finally:
            ray.kill(self.fleet)

    def _get(self, reference: Any, what: str, seconds: float) -> Any:
        try:
            return ray.get(reference, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise JobError(f"this process waited {seconds:g} s for {what} from the fleet's coordinator") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (JobError, RequestError)):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise JobError(f"the fleet's coordinator died; {what} did not come: {first_line(error)}") from None


def patience_of(config: RolloutConfig) -> float:
    """Seconds in which a fleet does, or gives up, all that may stand before one call: rounds that were asked for ahead,
    each with its wait for the last rank and its answers, and every restart."""
    rounds = (config.max_staleness + 1) * 2 * config.generate_timeout
    restarts = (config.max_restarts + 1) * (config.generate_timeout + config.start_timeout + config.sync_timeout)
    return rounds + restarts + config.sync_timeout + _WORD_SECONDS


def start_fleet(config: RolloutConfig, options: EngineOptions, probe_prompt: Sequence[int]) -> FleetClient:
    """Start the engines, on a cluster that this process is connected to, and wait until all are there. They serve
    nothing before the first `sync`.

    Args:
        probe_prompt: what probes answer (`request.probe_prompt` makes it long enough).

    Raises:
        RequestError: the cluster has not the resources for so many engines.
        JobError: an engine failed, or took longer than `rollout.start_timeout`.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its hints do not know all of its options
    fleet = remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)(Fleet).remote(
        config, options, tuple(probe_prompt)
    )
    patience = patience_of(config)
    client = FleetClient(fleet, patience, tuple(probe_prompt), ())
    try:
        ends = client._get(fleet.start.remote(), "the engines", 2 * config.start_timeout + 120)
    except BaseException:
        ray.kill(fleet)
        raise
    return FleetClient(fleet, patience, tuple(probe_prompt), tuple(ends))
