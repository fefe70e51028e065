"""The Ray that the environment names: can it be reached, and has this user a token for it?"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from rayloom.doctor.finding import Finding
from rayloom.errors import JobError, RequestError

_CONNECT_SECONDS = 5.0
_WAIT_SECONDS = 6.0


class ClusterCheck:
    """Asks after the cluster's addresses, from the moment it is made, beside the other checks."""

    def __init__(self) -> None:
        self._found: list[list[Finding]] = [[], []]
        self._threads = [
            threading.Thread(target=self._run, args=(number, check), daemon=True)
            for number, check in enumerate((_cluster, _jobs_api))
        ]
        for thread in self._threads:
            thread.start()

    def findings(self) -> Iterator[Finding]:
        for thread, found in zip(self._threads, self._found, strict=True):
            thread.join(_WAIT_SECONDS)
            yield from found or [Finding("Ray", "bad", f"no answer from a cluster within {_WAIT_SECONDS:g} s")]

    def _run(self, number: int, check: Callable[[], Finding]) -> None:
        try:
            self._found[number].append(check())
        except Exception as error:  # told, like every other fault
            self._found[number].append(Finding("Ray", "bad", f"{type(error).__name__}: {error}"))


def _cluster() -> Finding:
    """The cluster on which `rayloom train` would run."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        said = f"RAY_ADDRESS is {address}" if address else "RAY_ADDRESS is not set"
        return Finding("Ray", "ok", f"{said}: `rayloom train` starts a Ray of its own here")
    if address == "auto":
        return Finding("Ray", "ok", "RAY_ADDRESS is auto: `rayloom train` joins the Ray that runs here (not checked)")
    if address.startswith(("http://", "https://")):
        return Finding("Ray", "ok", "RAY_ADDRESS is a dashboard's: for `rayloom submit`, not for `rayloom train`")
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        return Finding("Ray", "bad", f"RAY_ADDRESS: {address}: write it as HOST:6379, the address of the head node")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = (
            f"no answer within {_CONNECT_SECONDS:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        )
        return Finding("Ray", "bad", f"RAY_ADDRESS: nothing can be reached at {host}:{port}: {reason}")
    return Finding("Ray", "ok", f"RAY_ADDRESS: {host}:{port} accepts connections; {_authentication()}")


def _jobs_api() -> Finding:
    """The dashboard to which `rayloom submit` would send a job."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    address = next((os.environ[name] for name in names if os.environ.get(name, "").startswith("http")), "")
    if not address and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        return Finding("Ray", "ok", "RAY_API_SERVER_ADDRESS is not set: `rayloom submit` needs it")
    from rayloom.jobs.client import connect

    try:
        connect()
    except (RequestError, JobError) as error:
        return Finding("Ray", "bad", str(error))
    return Finding("Ray", "ok", f"{address} takes jobs; {_authentication()}")


def _authentication() -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    token = "there is a token" if has_token else "there is no token"
    return f"RAY_AUTH_MODE is {mode or 'not set'}, {token}"
