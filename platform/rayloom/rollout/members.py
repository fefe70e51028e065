"""The engines of a fleet: how they are started, asked, found dead or hanging, ended, and started again."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayloom.errors import JobError, RequestError, first_line
from rayloom.rollout.adapter_folders import sweep
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.engine import Engine
from rayloom.rollout.health import Health, State
from rayloom.rollout.request import EngineOptions, Probe, Served, Weights, difference
from rayloom.rollout.vllm_engine import process_environment

_RESOURCES_SECONDS = 30.0
_SAME = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.3}
"""By how much log-probabilities of two engines with the same weights may differ: each computes the probe in a batch of
another shape, and a logit of 16 has steps of 0.125 in bf16."""


class LostError(Exception):
    """An engine is dead, or did not answer in time. The message says which, and what was asked of it."""


class GoneError(JobError):
    """Whole weights are gone with the trainer that sent them: nobody else has a copy."""


class Member:
    """An engine as its coordinator sees it."""

    def __init__(self, number: int, config: RolloutConfig) -> None:
        self.number = number
        self.health = Health()
        self.actor: Any = None
        self.process = 0
        self.created = 0.0
        self.node = ""
        self.threads = 1
        self.seconds = 0.0
        """That it was busy with answers."""
        self.revival: asyncio.Task[None] | None = None
        self.troubles: list[dict[str, Any]] = []
        """The events that are over when it serves again: several where it dies anew while it starts."""
        self._config = config

    async def call(self, method: str, *arguments: Any, limit: str) -> Any:
        """Call the actor.

        Args:
            limit: the key of `RolloutConfig` that says how long it may take.

        Raises:
            LostError: it died, or the time is over.
            GoneError: the weights that it was to take are lost.
            JobError, RequestError: what the engine itself says.
        """
        seconds = getattr(self._config, limit)
        try:
            return await asyncio.wait_for(_result(getattr(self.actor, method).remote(*arguments)), seconds)
        except TimeoutError:
            self.health = self.health.late()
            raise LostError(
                f"the fleet waited {seconds:g} s for engine {self.number} to {method} (rollout.{limit})"
            ) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (JobError, RequestError)):
                raise error.cause from None
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise GoneError(
                    f"engine {self.number} failed to {method}: its weights are gone with the trainer"
                ) from None
            raise JobError(f"engine {self.number} failed to {method}: {first_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            raise LostError(f"engine {self.number} died while it was to {method}: {first_line(error)}") from None

    def serves(self, version: int) -> None:
        """It serves a version, and that was checked: what trouble there was is over."""
        self.health = self.health.synced(version)
        for event in self.troubles:
            event["seconds"] = round(time.time() - event["time"], 3)
        self.troubles = []


async def _result(reference: Any) -> Any:
    return await reference


class Members:
    """All engines, and the weights that they are to serve."""

    def __init__(self, config: RolloutConfig, options: EngineOptions, probe_prompt: tuple[int, ...]) -> None:
        self._config, self._options, self.probe_prompt = config, options, probe_prompt
        self.all = [Member(number, config) for number in range(config.engines)]
        self.events: list[dict[str, Any]] = []
        self.checked_version: int | None = None
        """Which all engines serve; None: nothing, or a sync is under way."""
        self._group: PlacementGroup | None = None
        self._weights: Weights | None = None
        self._served: dict[int, Served] = {}
        """What each engine has said of these weights."""
        self._accepted: Probe | None = None
        """What the first engine that was asked computed with them."""
        self.probes: list[Probe] = []
        """What engines computed, and nobody has asked for yet."""
        self._restarts = self._syncs = 0
        self._sync_seconds = 0.0
        self._failure: BaseException | None = None

    def metrics(self) -> dict[str, float]:
        version = self._weights.version if self._weights else -1
        busy = {f"busy_seconds_{member.number}": member.seconds for member in self.all}
        counts = {"restarts": self._restarts, "version": version, "syncs": self._syncs}
        return {**counts, "sync_seconds": self._sync_seconds, **busy}

    async def start(self) -> tuple[int, ...]:
        """Boot all engines; the tokens that end an answer."""
        await self._reserve()
        await self._count_threads()
        try:
            booted = await asyncio.gather(*(self._boot(member) for member in self.all))
        except LostError as error:
            raise JobError(str(error)) from None
        return booted[0]

    async def serving(self) -> list[Member]:
        """The engines that may be asked. Waits for one that is being started, where none is there.

        Raises:
            JobError: none is there, and none will be.
        """
        while not (healthy := [member for member in self.all if member.health.state is State.HEALTHY]):
            revivals = [member.revival for member in self.all if member.revival is not None]
            if self._failure is not None:
                raise self._failure
            if not revivals:
                raise JobError("the fleet was asked for answers before it had any weights")
            await asyncio.wait(revivals, return_when=asyncio.FIRST_COMPLETED)
        if self._failure is not None:
            raise self._failure
        return healthy

    async def sync(self, weights: Weights) -> list[Served]:
        """All engines take the weights, also those that are being started."""
        began = time.monotonic()
        await self._revivals()
        self._weights, self._served, self._accepted, self.checked_version = weights, {}, None, None
        for member in self.all:
            if member.health.state in (State.HEALTHY, State.STALE):
                member.health = member.health.outdated()
        kept, *results = await asyncio.gather(self._keep(weights), *map(self._give, self.all), return_exceptions=True)
        for member, result in zip(self.all, results, strict=True):  # also where another engine's fault ends this
            if isinstance(result, LostError):
                self.revive(member, str(result))
        for result in (*results, kept):
            if isinstance(result, BaseException) and not isinstance(result, LostError):
                raise result
        await self._revivals()
        without = [str(member.number) for member in self.all if member.health.state is not State.HEALTHY]
        if without:
            raise JobError(f"policy version {weights.version} did not arrive: engine {' '.join(without)} found it gone")
        self.checked_version = weights.version
        self._syncs += 1
        self._sync_seconds += time.monotonic() - began
        return [self._served[member.number] for member in self.all]  # also of those that were started again meanwhile

    async def _keep(self, weights: Weights) -> None:
        """Make a copy of an adapter for engines to come, which a trainer that dies does not take along."""
        if weights.kind == "adapter":
            self._weights = replace(weights, tensors=ray.put(await _result(weights.tensors)))

    async def _revivals(self) -> None:
        """Wait until no engine is being started again; one may die anew meanwhile.

        Raises:
            JobError, RequestError: one will not be there any more.
        """
        while waiting := [member.revival for member in self.all if member.revival is not None]:
            await asyncio.gather(*waiting)
        if self._failure is not None:
            raise self._failure

    def revive(self, member: Member, why: str) -> None:
        """Begin to start an engine again, beside what else goes on."""
        event = {"time": time.time(), "engine": member.number, "what": why, "seconds": None}
        self.events.append(event)
        member.health = member.health.died()
        if self._restarts >= self._config.max_restarts:
            self._failure = JobError(f"{why}; it is not started again (rollout.max_restarts: {self._restarts})")
            return
        self._restarts += 1
        member.troubles.append(event)
        member.revival = asyncio.create_task(self._revived(member))

    async def gpus(self) -> list[tuple[str, tuple[str, ...]]]:
        """Where the engines are: of each its node, and its GPUs there."""
        return list((await self._all("gpus")).values())

    async def rest(self) -> None:
        """Have all engines give up the memory of the GPUs that they share, also those that are being started again."""
        await self._all("rest")

    async def _all(self, method: str) -> dict[Member, Any]:
        """What every engine answers, also those that are being started again or must be."""
        answers: dict[Member, Any] = {}
        while left := [member for member in self.all if member not in answers]:
            await self._revivals()
            calls = (member.call(method, limit="sync_timeout") for member in left)
            for member, answer in zip(left, await asyncio.gather(*calls, return_exceptions=True), strict=True):
                if isinstance(answer, LostError):
                    self.revive(member, str(answer))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    answers[member] = answer
        return answers

    async def quiet(self) -> None:
        """Wait until the engines have done what they were asked for."""
        members = [member for member in self.all if member.health.state is State.HEALTHY]
        calls = (member.call("identity", limit="generate_timeout") for member in members)
        for member, result in zip(members, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(result, LostError):
                self.revive(member, str(result))

    async def stop(self) -> None:
        """End all engines and give their resources back."""
        await asyncio.gather(*map(self._stop, self.all))  # each may take its time to answer, or not to
        if self._group is not None:
            remove_placement_group(self._group)

    async def _stop(self, member: Member) -> None:
        if member.revival is not None:
            member.revival.cancel()
        if member.actor is not None:
            with suppress(TimeoutError, ray.exceptions.RayError):
                await asyncio.wait_for(_result(member.actor.close.remote()), 5)
            await self._end(member)

    async def _revived(self, member: Member) -> None:
        """End an engine for good, start it anew, and give it the weights that the others serve."""
        try:
            await self._end(member)
            member.health = member.health.restarted()
            await self._boot(member)
            if self._weights is not None:
                with suppress(GoneError):  # the trainer died too: the one that comes after it sends new ones
                    await self._give(member)
        except LostError as error:
            self.revive(member, str(error))
        except (JobError, RequestError) as error:
            self._failure = error
        except Exception as error:
            self._failure = JobError(f"engine {member.number} could not be started again: {first_line(error)}")
        else:
            member.revival = None
            return
        if member.revival is asyncio.current_task():
            member.revival = None

    async def _give(self, member: Member) -> Served:
        """Have an engine take the weights; from then on it may be asked.

        Raises:
            JobError: it serves something else.
        """
        weights = self._weights
        assert weights is not None
        served: Served = await member.call("sync", weights, limit="sync_timeout")
        if (fault := difference(weights, served)) is not None:
            raise JobError(f"policy version {weights.version} did not arrive: {fault}")
        self._served[member.number] = served
        member.serves(weights.version)
        return served

    def accept(self, probe: Probe) -> None:
        """Take what an engine has computed with the weights of now.

        Raises:
            JobError: it answers otherwise than another with the same weights.
        """
        if self._accepted is None:
            self._accepted = probe
        elif (fault := self._deviation(probe, self._accepted)) is not None:
            raise JobError(f"policy version {probe.version}: {fault}")
        self.probes.append(probe)

    def _deviation(self, probe: Probe, accepted: Probe) -> str | None:
        """How an engine's answer to the probe differs from another's with the same weights."""
        known, least = dict(zip(accepted.token_ids, accepted.log_probs, strict=True)), min(accepted.log_probs)
        # A token that only one of them names is at the other below all that it names, by nearly nothing at a near tie.
        said = zip(probe.token_ids, probe.log_probs, strict=True)
        most = max(abs(value - known.get(token, least)) for token, value in said)
        if most <= _SAME[self._options.precision]:
            return None
        return (
            f"engine {probe.engine} answers the probe otherwise than engine {accepted.engine}: "
            f"log-probabilities differ by {most:.4f}"
        )

    # --- processes ----------------------------------------------------------------------------------------------------

    async def _reserve(self) -> None:
        """Take the resources of all engines.

        Raises:
            RequestError: there are not so many in the cluster.
        """
        config, options = self._config, self._options
        bundle = {"CPU": float(config.cpus_per_engine)}
        if options.device == "gpu":
            bundle["GPU"] = config.gpus_per_engine
        # An engine on CPU computes with all cores of its node; on GPUs neighbours cost nothing.
        strategy = "PACK" if options.device == "gpu" else "SPREAD"
        self._group = placement_group([bundle] * config.engines, strategy=strategy)
        try:
            await asyncio.wait_for(_result(self._group.ready()), _RESOURCES_SECONDS)
        except TimeoutError:
            remove_placement_group(self._group)
            need = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            has, free = ray.cluster_resources(), ray.available_resources()
            there = ", ".join(f"{has.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in bundle)
            raise RequestError(
                f"rollout.engines: {config.engines}: each needs {need}, and the cluster has {there}; "
                "use fewer engines, or lower rollout.cpus_per_engine"
            ) from None

    async def _count_threads(self) -> None:
        """Engines of one node share its cores. Ray may have been told of more CPUs than there are."""
        remote: Any = ray.remote
        there = [PlacementGroupSchedulingStrategy(self._group, member.number) for member in self.all]  # type: ignore[arg-type]
        places = [remote(num_cpus=0, scheduling_strategy=place)(_node_and_cores).remote() for place in there]
        limit = self._config.start_timeout
        try:
            found = await asyncio.wait_for(asyncio.gather(*map(_result, places)), limit)
        except TimeoutError:
            raise JobError(
                f"the fleet waited {limit:g} s for the first word from the engines' nodes (rollout.start_timeout)"
            ) from None
        neighbours = Counter(node for node, _ in found)
        for member, (node, cores) in zip(self.all, found, strict=True):
            member.threads = max(1, cores // neighbours[node])

    async def _boot(self, member: Member) -> tuple[int, ...]:
        """Start an engine's actor and load the model."""
        config, options = self._config, self._options
        assert self._group is not None
        remote: Any = ray.remote  # its hints do not know all of its options
        member.actor = remote(
            num_cpus=config.cpus_per_engine,
            num_gpus=config.gpus_per_engine if options.device == "gpu" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, member.number),
            runtime_env={"env_vars": process_environment(options, member.threads)},
        )(Engine).remote(options, member.number)
        member.process, member.created, member.node = await member.call("identity", limit="start_timeout")
        started = await member.call("boot", limit="start_timeout")
        member.health = member.health.booted()
        return tuple(started.stop_token_ids)

    async def _end(self, member: Member) -> None:
        """End an engine's process, also one that hangs: Ray asks a process to end, and that one does not listen."""
        ray.kill(member.actor)
        if not member.process:
            return
        there = NodeAffinitySchedulingStrategy(member.node, soft=False)
        remote: Any = ray.remote
        ender = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_end_process)
        with suppress(TimeoutError, ray.exceptions.RayError):  # where the node is gone, so is the process
            await asyncio.wait_for(_result(ender.remote(member.process, member.created)), 30)
        member.process = 0


def _node_and_cores() -> tuple[str, int]:
    """Runs where an engine will."""
    return ray.get_runtime_context().get_node_id(), len(os.sched_getaffinity(0))


def _end_process(process: int, created: float) -> None:
    """Runs on the engine's node. A later process may have the same number, hence the time."""
    import psutil  # type: ignore[import-untyped]

    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process)
        if abs(found.create_time() - created) < 1:
            family = [found, *found.children(recursive=True)]  # vLLM's workers may hang with it, and hold a GPU
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=20)
    sweep()  # what it had written
