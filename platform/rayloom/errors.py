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


def first_line(error: BaseException) -> str:
    """What an exception says, without the advice that follows it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
