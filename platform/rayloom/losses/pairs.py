"""Two answers to each of some prompts, as the losses of preference training see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of chosen and rejected answers, summed over their tokens; all (pairs,).

    The reference's are None for losses that know no reference.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`r_w` and `r_l`.

        Raises:
            ValueError: there is no reference.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss needs the log-probabilities of a reference")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def margin(self) -> torch.Tensor:
        """`r_w - r_l`."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers' mean log-probabilities of a token under the policy."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def tail_weights(rows: torch.Tensor, labels: torch.Tensor, count: int, alpha: float) -> torch.Tensor:
    """What each token's log-probability counts, (kept,): 1, and `alpha` behind the length of the shorter answer of its
    pair (LD-DPO, Liu et al. 2024, https://arxiv.org/abs/2409.06411, equation 9).

    Args:
        rows: (kept,) which answer each position is of, rising; first all `count / 2` chosen ones, then the rejected.
        labels: (kept,); -100 is no token of an answer.
    """
    is_token = labels >= 0
    tokens = torch.zeros(count, dtype=torch.long, device=rows.device).index_add_(0, rows, is_token.long())
    place = torch.cumsum(is_token, 0) - (torch.cumsum(tokens, 0) - tokens)[rows]  # from 1, within its answer
    shorter = torch.minimum(*tokens.chunk(2)).repeat(2)
    return torch.where(place > shorter[rows], alpha, 1.0)


def logistic(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """`-(1 - e) log s(margin) - e log s(-margin)`, `e` being the share of pairs that are the wrong way round."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
