"""Rewards by a server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rayloom.errors import JobError
from rayloom.rollout.rewards.config import HttpReward
from rayloom.rollout.rewards.source import Answered, checked_scores

_IN_FLIGHT = 4
_FIRST_PAUSE = 0.5
"""Seconds before a request is made again; then twice as long each time."""


class HttpScore:
    """Asks a server, some requests at a time."""

    def __init__(self, config: HttpReward) -> None:
        self._config = config
        self._who = f"the reward server {config.url}"

    def score(self, answered: Sequence[Answered]) -> list[float]:
        return asyncio.run(self._score(answered))

    def close(self) -> None:
        """Nothing was started."""

    async def _score(self, answered: Sequence[Answered]) -> list[float]:
        import aiohttp

        size = self._config.batch_size
        batches = [answered[start : start + size] for start in range(0, len(answered), size)]
        # The limit is for the whole request: a server that sends a byte now and then would keep any other waiting.
        limit = aiohttp.ClientTimeout(total=self._config.timeout)
        connector = aiohttp.TCPConnector(limit=_IN_FLIGHT)
        turns = asyncio.Semaphore(_IN_FLIGHT)  # a request's time begins when it is its turn
        async with aiohttp.ClientSession(timeout=limit, connector=connector, trust_env=True) as session:
            found = await asyncio.gather(*(self._ask(session, turns, batch) for batch in batches))
        return list(chain.from_iterable(found))

    async def _ask(self, session: Any, turns: asyncio.Semaphore, answered: Sequence[Answered]) -> list[float]:
        body = {
            "prompts": [one.prompt for one in answered],
            "answers": [one.answer for one in answered],
            "references": [one.reference for one in answered],
        }
        async with turns:
            text = await self._post(session, body)
        try:
            found = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError):
            raise JobError(f'{self._who} must answer with {{"scores": [...]}}, not {text[:200]!r}') from None
        return checked_scores(found, answered, self._who)

    async def _post(self, session: Any, body: dict[str, list[str]]) -> bytes:
        """What the server answers, asked again where it fails.

        Raises:
            JobError: it fails every time, or refuses.
        """
        import aiohttp

        said, pause = "", _FIRST_PAUSE
        for attempt in range(self._config.retries + 1):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            try:
                async with session.post(self._config.url, json=body, allow_redirects=False) as response:
                    text: bytes = await response.read()
                    status: int = response.status
            except TimeoutError:
                said = f"no answer within {self._config.timeout:g} s"
                continue
            except (aiohttp.ClientError, OSError) as error:
                reason = getattr(error, "os_error", error)  # why no connection was made
                code = getattr(reason, "errno", None) or 0
                said = os.strerror(code) if code > 0 else f"{reason}" or type(reason).__name__
                continue
            if status < 300:
                return text
            said = f"status {status}: {text[:200].decode(errors='replace')}"
            if status < 500 and status not in (408, 429):
                raise JobError(f"{self._who} refuses the request with {said}")
        raise JobError(
            f"the trainer asked {self._who} {self._config.retries + 1} times for the scores of {len(body['answers'])} "
            f"answers; the last time: {said}"
        )
