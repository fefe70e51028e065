"""What a reward model minimises, pair by pair."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, *, center: float = 0.0) -> torch.Tensor:
    """`-log s(r_w - r_l) + c (r_w + r_l)^2`, (pairs,): that the chosen answer is the better one, by its reward's lead
    (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        chosen: `r_w`, the rewards of the chosen answers, (pairs,).
        rejected: `r_l`, those of the rejected ones.
        center: `c`, 0 or above: only differences count in the first term, the second keeps rewards around 0
            (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, section 2).
    """
    losses = -logsigmoid(chosen - rejected)
    return losses + center * (chosen + rejected) ** 2 if center else losses
