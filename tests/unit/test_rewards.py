"""Rewards: rules, a user's function, a server, and their sum; each fault is told in one message."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayloom.errors import JobError, RequestError
from rayloom.losses.moments import Moments
from rayloom.rollout.rewards import function as function_module
from rayloom.rollout.rewards.combine import RewardSum
from rayloom.rollout.rewards.config import FormatReward, FunctionReward, HttpReward, LengthReward, RewardsConfig
from rayloom.rollout.rewards.function import FunctionScore, check_function
from rayloom.rollout.rewards.http import HttpScore
from rayloom.rollout.rewards.rules import FormatMatch, LengthPenalty, Unfinished
from rayloom.rollout.rewards.source import Answered


def answered(*texts: str, tokens: int = 3, reason: Any = "stop") -> list[Answered]:
    return [Answered(f"prompt {n}", text, f"reference {n}", tokens, reason) for n, text in enumerate(texts)]


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.0), (10, 0.0), (15, -0.5), (20, -1.0), (90, -1.0)])
def test_long_answers_cost(tokens: int, expected: float) -> None:
    rule = LengthPenalty(LengthReward(type="length", free=10, longest=20))
    assert rule.score(answered("a", tokens=tokens)) == [expected]


def test_the_whole_answer_must_match() -> None:
    rule = FormatMatch(FormatReward(type="format", pattern=r"<a>.*</a>"))
    assert rule.score(answered("<a>1\n2</a>", "x<a>1</a>", "<a>1</a> ", "")) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_that_goes_astray_is_given_up() -> None:
    rule = FormatMatch(FormatReward(type="format", pattern="(a|aa)+", timeout=0.2))
    assert rule.score(answered("aaa")) == [1.0]
    began = time.monotonic()
    with pytest.raises(JobError, match=r"the trainer waited 0.2 s for the reward format, whether 'aaa.* '\(a\|aa\)\+'"):
        rule.score(answered("a" * 60 + "b"))
    assert time.monotonic() - began < 20


def test_answers_that_were_cut_off() -> None:
    assert Unfinished().score([*answered("a", reason="length"), *answered("b")]) == [1.0, 0.0]


# --- a function of the user's -----------------------------------------------------------------------------------------


@contextmanager
def function(folder: Path, text: str, timeout: float = 30.0) -> Iterator[FunctionScore]:
    (folder / "mine.py").write_text(text)
    score = FunctionScore(
        FunctionReward(type="function", path=f"{folder / 'mine.py'}:score", timeout=timeout), "rewards.sources[0].path"
    )
    try:
        yield score
    finally:
        score.close()


def test_a_function_gets_texts_and_gives_numbers(tmp_path: Path) -> None:
    body = "[len(p + a + r) for p, a, r in zip(prompts, answers, references)]"
    text = f"def score(prompts, answers, references):\n    return {body}\n"
    with function(tmp_path, text) as score:
        assert score.score(answered("abc", "d")) == [8 + 3 + 11, 8 + 1 + 11]
        assert score.score(answered("abcd")) == [8 + 4 + 11]  # the same process again


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such thing')", r"raised: .*mine.py:2: ValueError: no such thing"),
        ("return [1.0]", "gave 1 numbers for 2 answers; it must give one for each"),
        ("return [1.0, float('nan')]", "gave nan for the answer 'b' to 'prompt 1'"),
        ("return [1.0, float('inf')]", "gave inf for the answer 'b' to 'prompt 1'"),
        ("return ['good', 'bad']", "must give a list of 2 numbers"),
        ("raise KeyError('gold')", "KeyError: 'gold'"),
        ("return None", "must give a list of 2 numbers, not None"),
        ("return {1.0: 'a', 2.0: 'b'}", "must give a list of 2 numbers, not {1.0: 'a', 2.0: 'b'}"),
        ("return {1.0, 2.0}", "must give a list of 2 numbers, not {1.0, 2.0}"),
        ("return (1 / 0 for _ in answers)", r"raised: .*mine.py:2: ZeroDivisionError"),
        ("return ('good' for _ in answers)", r"must give a list of 2 numbers, not \['good', 'good'\]"),
        ("return (1.0 for _ in answers[1:])", "gave 1 numbers for 2 answers"),
        ("import os; os._exit(7)", "ended its process"),
    ],
)
def test_what_a_function_does_wrong(tmp_path: Path, body: str, message: str) -> None:
    text = f"def score(prompts, answers, references):\n    {body}\n"
    with function(tmp_path, text) as score, pytest.raises(JobError, match=message):
        score.score(answered("a", "b"))


def test_a_generator_of_numbers_is_as_good(tmp_path: Path) -> None:
    with function(tmp_path, "def score(p, answers, r):\n    yield from map(len, answers)\n") as score:
        assert score.score(answered("a", "bcd")) == [1.0, 3.0]


def test_a_function_imports_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "marks_of_mine.py").write_text("BEST = 7.0\n")
    text = "import marks_of_mine\ndef score(p, answers, r):\n    return [marks_of_mine.BEST for _ in answers]\n"
    with function(tmp_path, text) as score:
        assert score.score(answered("a")) == [7.0]
    check_function(FunctionReward(type="function", path=f"{tmp_path}/mine.py:score"), "k")
    assert "marks_of_mine" not in sys.modules


def test_a_file_that_takes_too_long_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_module, "_LOAD_SECONDS", 3.0)
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\n")
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"k: the trainer waited 3 s for .*mine.py:score \(to be loaded\)"):
        check_function(FunctionReward(type="function", path=f"{tmp_path}/mine.py:score"), "k")
    assert time.monotonic() - began < 60


def test_a_function_that_holds_pythons_lock_is_ended(tmp_path: Path) -> None:
    """A regular expression that goes astray: a thread could not be ended."""
    body = "[float(bool(re.match('(a+)+b', 'a' * 40))) for _ in answers]"
    text = f"import re\ndef score(p, answers, r):\n    return {body}\n"
    with function(tmp_path, text, timeout=1.0) as score:
        began = time.monotonic()
        with pytest.raises(JobError, match=r"the trainer waited 1 s for the reward .*mine.py:score \(1 answers\)"):
            score.score(answered("a"))
        assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("{}/mine.py", "", r"must be FILE.py:FUNCTION"),
        ("{}/other.py:score", "", r"k: no such file: .*other.py"),
        ("{}/mine.py:score", "def scores(a, b, c): pass\n", r"k: .*mine.py: it has no function 'score'; it has scores"),
        ("{}/mine.py:score", "import nothing_of_this_name\n", r"k: .*mine.py:1: ModuleNotFoundError: No module"),
        ("{}/mine.py:score", "raise SystemExit(0)\n", r"k: .*mine.py:1: SystemExit: 0"),
        ("{}/mine.py:score", "def score(:\n", r"k: .*SyntaxError"),
        ("{}/mine.py:score", "import os; os._exit(3)\n", r"k: .*ended its process \(to be loaded\); exit code 3"),
        (
            "{}/mine.py:score",
            "def score(prompts, answers): pass\n",
            r"k: .*mine.py: score\(prompts, answers\) must take three arguments, .*: too many positional",
        ),
        (
            "{}/mine.py:score",
            "def score(a, b, c, d): pass\n",
            r"score\(a, b, c, d\) must take three arguments, .*: missing a required argument: 'd'",
        ),
    ],
)
def test_functions_that_cannot_be_loaded(tmp_path: Path, path: str, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RequestError, match=message):
        check_function(FunctionReward(type="function", path=path.format(tmp_path)), "k")


# --- a server ---------------------------------------------------------------------------------------------------------


@contextmanager
def server(reply: Callable[[int, dict[str, Any]], tuple[int, bytes]]) -> Iterator[str]:
    """A real one on this machine; `reply` gets the request's number and body."""
    count = iter(range(1000))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = reply(next(count), body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/score"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def http(url: str, **options: Any) -> HttpScore:
    return HttpScore(HttpReward(type="http", url=url, **{"timeout": 5.0, "retries": 0, **options}))


def lengths(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
    assert len(body["prompts"]) == len(body["answers"]) == len(body["references"])
    return 200, json.dumps({"scores": [len(answer) for answer in body["answers"]]}).encode()


def test_a_server_is_asked_in_batches_and_answers_stay_in_order() -> None:
    with server(lengths) as url:
        assert http(url, batch_size=2).score(answered("a", "bb", "ccc", "dddd", "eeeee")) == [1, 2, 3, 4, 5]


def test_a_request_that_fails_is_made_again() -> None:
    def reply(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        return (503, b"busy") if number == 0 else lengths(number, body)

    with server(reply) as url:
        assert http(url, retries=1).score(answered("abc")) == [3]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"out of memory", r"asked the reward server http://.* 2 times .*status 500: out of memory"),
        (404, b"no such page", r"refuses the request with status 404: no such page"),
        (200, b"not json", r'must answer with {"scores": \[...\]}'),
        (200, b'{"score": [1]}', r'must answer with {"scores": \[...\]}'),
        (200, b'{"scores": [1, 2]}', r"gave 2 numbers for 1 answers"),
        (200, b'{"scores": [NaN]}', r"gave nan for the answer 'abc'"),
    ],
)
def test_what_a_server_does_wrong(status: int, body: bytes, message: str) -> None:
    with server(lambda number, asked: (status, body)) as url, pytest.raises(JobError, match=message):
        http(url, retries=1).score(answered("abc"))


def test_a_server_that_is_down_or_silent() -> None:
    with server(lengths) as url:
        pass
    with pytest.raises(JobError, match=r"asked the reward server http://127.0.0.1:\d+/score 2 times .*refused"):
        http(url, retries=1).score(answered("a"))

    def silent(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(2)
        return 200, b""

    with server(silent) as url, pytest.raises(JobError, match=r"no answer within 0.2 s"):
        http(url, timeout=0.2).score(answered("a"))


def test_the_limit_is_for_the_whole_request() -> None:
    """A server that sends a byte now and then is never silent, and never done."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(200):
                        connection.sendall(b" ")
                        time.sleep(0.1)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(JobError, match=r"1 times .*no answer within 0.5 s"):
            http(f"http://127.0.0.1:{listening.getsockname()[1]}/", timeout=0.5).score(answered("a"))
        assert time.monotonic() - began < 10
    thread.join(timeout=5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/a b", r"' ' cannot stand in an address"),
        ("http://hôst/score", r"'ô' cannot stand in an address; write it percent-encoded, a host in ASCII"),
        ("http://host/score\n", r"cannot stand in an address"),
        ("http://host:/score", r"'http://host:/score' is no address: behind the colon of the host there is no port"),
        ("http://host:0/score", r"there is no port"),
        ("http://host:port/score", r"'http://host:port/score' is no address: Port could not be cast"),
        ("http://host:99999/score", r"is no address: Port out of range"),
        ("http://:80/score", r"it names no host"),
        ("http://[::1/score", r"is no address: Invalid IPv6"),
        ("ftp://host/score", r"pattern"),
    ],
)
def test_addresses_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HttpReward(type="http", url=url)


@pytest.mark.parametrize("url", ["http://host", "https://a.b:8443/x?y=%20z", "http://[::1]:80/", "http://10.0.0.1:1"])
def test_addresses(url: str) -> None:
    assert HttpReward(type="http", url=url).url == url


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_the_sum_is_weighted_and_its_parts_are_kept() -> None:
    config = RewardsConfig.model_validate(
        {
            "sources": [
                {"type": "format", "pattern": "[0-9]+", "weight": 2.0, "name": "number"},
                {"type": "unfinished", "weight": -0.5},
                {"type": "adapter", "path": "x", "weight": 10.0},
            ]
        }
    )
    found = RewardSum(config).judge([*answered("12"), *answered("a", reason="length")], {"adapter": [0.1, 0.2]})
    assert found.parts == {"number": [1.0, 0.0], "unfinished": [0.0, 1.0], "adapter": [0.1, 0.2]}
    assert found.total == pytest.approx([2.0 + 1.0, -0.5 + 2.0])


def test_a_model_that_gives_no_number_is_told() -> None:
    """Else its advantages would be none, and the loss would be blamed."""
    config = RewardsConfig.model_validate({"sources": [{"type": "adapter", "path": "r", "name": "judge"}]})
    with pytest.raises(JobError, match=r"rewards: judge gave nan for the answer 'b'"):
        RewardSum(config).judge(answered("a", "b"), {"judge": [0.5, float("nan")]})


def test_normalized_or_whitened_and_clipped() -> None:
    so_far, of_round = Moments.of([1.0, 3.0, 5.0]), Moments.of([2.0, 6.0])

    def settled(total: list[float], **parts: Any) -> list[float]:
        config = RewardsConfig.model_validate({"sources": [{"type": "unfinished"}], **parts})
        return RewardSum(config).settled(total, so_far, of_round)

    assert settled([1.0, 9.0]) == [1.0, 9.0]
    deviation = (8 / 3) ** 0.5
    normalized = settled([1.0, 2.0, 3.0, 9.0], normalize=True, clip=1.0)
    assert normalized == pytest.approx([-1.0, -1 / deviation, 0.0, 1.0])
    assert settled([2.0, 6.0, 9.0], whiten=True) == pytest.approx([-1.0, 1.0, 2.5])
    assert settled([2.0, 6.0, 9.0], whiten=True, clip=2.0) == pytest.approx([-1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="normalize takes the moments of the whole training, whiten those of a round"):
        settled([], normalize=True, whiten=True)


def test_moments_merge_to_those_of_all_numbers() -> None:
    numbers = [1.0, 4.0, -2.0, 8.0, 8.0, 0.5]
    whole = Moments.of(numbers)
    for cut in range(len(numbers) + 1):
        merged = Moments.of(numbers[:cut]).merged(Moments.of(numbers[cut:]))
        assert merged.as_dict() == pytest.approx(whole.as_dict())
    far = [number + 1e9 for number in numbers]
    halves = Moments.of(far[:3]).merged(Moments.of(far[3:]))
    assert halves.deviation == pytest.approx(whole.deviation, rel=1e-6)
    mean = sum(numbers) / len(numbers)
    assert whole.deviation == pytest.approx((sum((n - mean) ** 2 for n in numbers) / len(numbers)) ** 0.5)
