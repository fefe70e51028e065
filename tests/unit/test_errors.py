"""Errors cross process borders: Ray pickles them."""

from __future__ import annotations

import pickle

import pytest

from rayloom.errors import JobError, RequestError


@pytest.mark.parametrize("messages", [(), ("one",), ("first", "second")])
def test_a_request_error_survives_pickling(messages):
    copy = pickle.loads(pickle.dumps(RequestError(*messages)))
    assert (type(copy), copy.messages, str(copy)) == (RequestError, messages, "\n".join(messages))


def test_a_job_error_survives_pickling():
    copy = pickle.loads(pickle.dumps(JobError("what happened")))
    assert (type(copy), str(copy)) == (JobError, "what happened")


def test_the_two_are_told_apart():
    """An `except` for one must not catch the other: they mean different exit statuses."""
    assert not issubclass(RequestError, JobError)
    assert not issubclass(JobError, RequestError)
