"""The two ways in which a job ends badly. The command line turns each into an exit status."""

from __future__ import annotations


class RequestError(Exception):
    """The request was wrong: the user can mend it. Exit status 2, nothing written.

    Holds one message per fault; each names the key, file or line, and what would be right.
    It crosses process borders (Ray pickles it), hence the plain tuple of strings as only argument.
    """

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = messages

    def __str__(self) -> str:
        return "\n".join(self.messages)


class JobError(Exception):
    """The job was right and failed: exit status 1. The message says what happened and what to do next."""


def find_request_error(error: BaseException | None) -> RequestError | None:
    """The `RequestError` at the root of a chain of wrapped exceptions, if there is one.

    Ray wraps what a remote function raises (`RayTaskError`, `UserCodeException`, `WorkerGroupError`); the
    original hangs on `cause`, `__cause__`, `__context__` or, one per rank, in `worker_failures`.
    """
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RequestError):
            # Ray's derived class mixes the wrapper in; hand back a clean one.
            return RequestError(*current.messages)
        pending += [getattr(current, name, None) for name in ("cause", "__cause__", "__context__", "training_failure")]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            pending += list(failures.values())
    return None
