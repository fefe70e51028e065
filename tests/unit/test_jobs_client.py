"""Which cluster a client talks to, with which token, and a log that survives broken connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from rayloom.errors import JobError, RequestError
from rayloom.jobs import client as jobs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        ("http://a:1/", {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "http://c:3"}, "http://a:1"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "http://c:3"}, "http://b:2"),
        (None, {"RAY_ADDRESS": "https://c:3"}, "https://c:3"),
    ],
)
def test_address_from_argument_then_environment(
    argument: str | None, environment: dict[str, str], expected: str
) -> None:
    assert jobs._address(argument, environment) == expected


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_ADDRESS": "auto"}])
def test_no_address_says_what_to_set(environment: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="set RAY_API_SERVER_ADDRESS"):
        jobs.connect(environment=environment)


def test_address_that_is_no_dashboard() -> None:
    with pytest.raises(RequestError, match="address: ray://a:10001: the Jobs API is at the dashboard's address"):
        jobs.connect("ray://a:10001", environment={})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RAY_AUTH_TOKEN": "a"}, "a"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a"}, "a"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "a"}, None),
    ],
)
def test_token_by_mode(home: Path, environment: dict[str, str], expected: str | None) -> None:
    assert jobs._token(environment) == expected


def test_token_from_file_and_home(home: Path) -> None:
    (home / "mine").write_text("from file\n")
    assert jobs._token({"RAY_AUTH_TOKEN_PATH": str(home / "mine")}) == "from file"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("from home\n")
    assert jobs._token({}) == jobs._token({"RAY_AUTH_MODE": "token"}) == "from home"


def test_token_that_is_missing(home: Path) -> None:
    with pytest.raises(RequestError, match="RAY_AUTH_TOKEN is not set"):
        jobs._token({"RAY_AUTH_MODE": "token"})
    with pytest.raises(RequestError, match=r"no token in .*nowhere"):
        jobs._token({"RAY_AUTH_TOKEN_PATH": str(home / "nowhere")})
    with pytest.raises(RequestError, match="RAY_AUTH_MODE: kerberos: must be token or disabled"):
        jobs._token({"RAY_AUTH_MODE": "kerberos"})


def test_address_without_a_host(home: Path) -> None:
    with pytest.raises(RequestError, match="cannot reach a Ray dashboard at http://:8265"):
        jobs.connect("http://:8265", environment={})


def test_nobody_listens(home: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(RequestError, match=f"cannot reach a Ray dashboard at {address}"):
        jobs.connect(address, environment={})


def test_somebody_else_listens_and_never_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_HELLO_SECONDS", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        begin = time.monotonic()
        with pytest.raises(RequestError, match="did not answer in time"):
            jobs.connect(f"http://127.0.0.1:{mute.getsockname()[1]}", environment={})
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]"])
def test_somebody_else_answers(home: Path, body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *message: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RequestError, match="not as a Ray dashboard"):
            jobs.connect(f"http://127.0.0.1:{server.server_port}", environment={})
        server.shutdown()


def test_environment_stays_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    with jobs._only_address("http://here:2"):
        assert jobs.os.environ["RAY_API_SERVER_ADDRESS"] == "http://here:2"
    assert jobs.os.environ["RAY_API_SERVER_ADDRESS"] == "http://elsewhere:1"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with jobs._only_address("http://here:2"):
        pass
    assert "RAY_API_SERVER_ADDRESS" not in jobs.os.environ


class _FakeClient:
    """Serves a log over connections that each end as told; the job is over when the last connection is."""

    def __init__(self, log: str, connections: list[Callable[[], Iterator[str]]]) -> None:
        self.log = log
        self.connections = connections

    def get_address(self) -> str:
        return "http://fake:1"

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(
            submission_id=job_id,
            status=JobStatus.RUNNING if self.connections else JobStatus.SUCCEEDED,
            metadata={},
            entrypoint="x",
            message=None,
            start_time=1,
            end_time=None,
            driver_exit_code=None,
        )

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for chunk in self.connections.pop(0)():
            yield chunk


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)


def test_follow_loses_and_repeats_nothing(no_waiting: None) -> None:
    def dropped() -> Iterator[str]:
        yield "one\ntw"
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def dropped_earlier() -> Iterator[str]:
        yield "one"
        raise ConnectionResetError

    def to_the_end() -> Iterator[str]:
        yield "one\n"
        yield "two\nthr"
        yield "ee\n"

    client: Any = _FakeClient("one\ntwo\nthree\nfour, unended", [dropped, dropped_earlier, to_the_end])
    assert list(jobs.follow_logs(client, "j")) == ["one", "two", "three", "four, unended"]


def test_follow_can_be_left(no_waiting: None) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again\n"

    client: Any = _FakeClient("", [endless])
    lines = jobs.follow_logs(client, "j")
    assert next(lines) == "again"
    lines.close()  # type: ignore[attr-defined]


def test_follow_gives_up_on_a_lost_cluster(no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Iterator[str]:
        return iter(())

    client: Any = _FakeClient("", [nothing, nothing, nothing, nothing])
    lines = jobs.follow_logs(client, "j")

    def unreachable(job_id: str) -> Any:
        raise ConnectionError("Failed to connect to Ray at address: http://fake:1.")

    client.get_job_info = unreachable
    monkeypatch.setattr(jobs, "_LOST_SECONDS", 0.0)
    with pytest.raises(JobError, match="lost the log of j, which may be running still: cannot reach"):
        list(lines)


def test_errors_of_the_server_become_one_line() -> None:
    with pytest.raises(JobError, match=r"^http://a:1: ValueError: no such thing$"), jobs._translated("http://a:1"):
        raise RuntimeError("Request failed with status code 500: Traceback\n  File x\nValueError: no such thing\n")
