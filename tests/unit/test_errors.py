"""A fault of the request is found wherever Ray wrapped it."""

from __future__ import annotations

import pickle

import pytest

from rayloom.errors import JobError, RequestError, find_request_error

FAULT = RequestError("first", "second")


class WrapperError(Exception):
    """As Ray's errors: the original hangs on an attribute."""

    def __init__(self, **held: object) -> None:
        super().__init__("wrapped")
        self.__dict__.update(held)


class RequestTaskError(RequestError):
    """As Ray derives it: also of the original's class."""

    def __init__(self) -> None:
        Exception.__init__(self, "a traceback")
        self.messages = FAULT.messages


def raised_from(outer: Exception, inner: Exception, *, explicitly: bool) -> Exception:
    try:
        try:
            raise inner
        except Exception as caught:
            if explicitly:
                raise outer from caught
            raise outer  # noqa: B904 (the context is what is tested)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        FAULT,
        WrapperError(cause=FAULT),
        WrapperError(training_failure=WrapperError(cause=FAULT)),
        WrapperError(worker_failures={0: ValueError("x"), 1: WrapperError(cause=FAULT)}),
        raised_from(ValueError("outer"), FAULT, explicitly=True),
        raised_from(ValueError("outer"), FAULT, explicitly=False),
        WrapperError(cause=raised_from(KeyError("k"), WrapperError(worker_failures={3: FAULT}), explicitly=True)),
        RequestTaskError(),
    ],
)
def test_it_is_found(error):
    found = find_request_error(error)
    assert type(found) is RequestError
    assert found.messages == ("first", "second")


def test_what_is_none():
    circle = WrapperError()
    circle.cause = circle
    for error in (
        None,
        ValueError("x"),
        JobError("x"),
        WrapperError(cause="text"),
        WrapperError(worker_failures=[FAULT]),
        circle,
    ):
        assert find_request_error(error) is None


def test_it_crosses_process_borders():
    copy = pickle.loads(pickle.dumps(FAULT))
    assert (type(copy), copy.messages, str(copy)) == (RequestError, ("first", "second"), "first\nsecond")
