"""Rewards by a server."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

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
        size = self._config.batch_size
        batches = [answered[start : start + size] for start in range(0, len(answered), size)]
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            return list(chain.from_iterable(pool.map(self._ask, batches)))

    def close(self) -> None:
        """Nothing was started."""

    def _ask(self, answered: Sequence[Answered]) -> list[float]:
        body = {
            "prompts": [one.prompt for one in answered],
            "answers": [one.answer for one in answered],
            "references": [one.reference for one in answered],
        }
        request = urllib.request.Request(
            self._config.url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        said, pause = "", _FIRST_PAUSE
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                with urllib.request.urlopen(request, timeout=self._config.timeout) as response:
                    text = response.read()
                break
            except urllib.error.HTTPError as error:
                said = f"status {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code not in (408, 429):
                    raise JobError(f"{self._who} refuses the request with {said}") from None
            except TimeoutError:
                said = f"no answer within {self._config.timeout:g} s"
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # urllib's URLError is one; so is a connection that breaks off
                reason = getattr(error, "reason", error)
                said = (
                    f"no answer within {self._config.timeout:g} s" if isinstance(reason, TimeoutError) else f"{reason}"
                )
        else:
            raise JobError(
                f"the trainer asked {self._who} {self._config.retries + 1} times for the scores of {len(answered)} "
                f"answers; the last time: {said}"
            )
        try:
            found = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError):
            raise JobError(f'{self._who} must answer with {{"scores": [...]}}, not {text[:200]!r}') from None
        return checked_scores(found, answered, self._who)
