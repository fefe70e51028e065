"""What an encoder makes of an example: token ids, labels, and what it had to leave out."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""Label of a token that is not trained (`torch.nn.functional.cross_entropy`'s default `ignore_index`)."""


@dataclass(frozen=True)
class Encoding:
    """One example as tokens: `labels[i]` is `input_ids[i]` where it is trained, else `IGNORED`.

    Both are empty where there is a `fault`, and where no cut leaves anything to train within the cutoff (`cut` then
    counts every token of the example).
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    """Tokens that the whole example has and `input_ids` has not; 0: nothing was cut."""
    fault: str | None = None
    """Why the example cannot be encoded, in words for the user."""
    border: int = 0
    """Where the second of two sequences begins, each of which is an answer to one prompt (the chosen one, then the
    rejected one); 0: there is one sequence."""
    desirable: bool | None = None
    """Whether the answer was judged a good one; None: nobody judged it."""
    answer: str | None = None
    """Of a prompt, the answer that the data has to it, as text; None: `input_ids` is no bare prompt."""
    messages_cut: int = 0
    """Messages that were left out, behind the system message: images in them are not in `input_ids` either."""

    @property
    def parts(self) -> tuple[slice, ...]:
        """Where its sequences are: one, or two."""
        whole = len(self.input_ids)
        return (slice(0, self.border), slice(self.border, whole)) if self.border else (slice(0, whole),)
