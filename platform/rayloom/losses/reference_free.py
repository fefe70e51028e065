"""Losses of preference training that know no reference; `rayloom.losses.preference` has the others, and the list."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rayloom.losses.pairs import Pairs, logistic


def cpo(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """`-log s(beta (log p(w) - log p(l)))`: the preference term of contrastive preference optimization (Xu et al. 2024,
    https://arxiv.org/abs/2401.08417, equation 3), which stands beside a term that imitates the chosen answer."""
    return logistic(beta * (pairs.chosen - pairs.rejected), label_smoothing)


def simpo(pairs: Pairs, beta: float, *, gamma: float = 0.5) -> torch.Tensor:
    """`-log s(beta (mean log p(w) - mean log p(l)) - gamma)` (Meng et al. 2024, https://arxiv.org/abs/2405.14734,
    equation 6).

    Args:
        gamma: by how much the chosen answer's reward must be the larger.
    """
    chosen, rejected = pairs.means
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(pairs: Pairs, beta: float) -> torch.Tensor:
    """`-mean log p(w) - beta log s(log(odds(w) / odds(l)))`, `odds = p / (1 - p)` of the mean log-probabilities (Hong
    et al. 2024, https://arxiv.org/abs/2403.07691, equations 4 to 7)."""
    chosen, rejected = pairs.means
    odds = (chosen - _log_rest(chosen)) - (rejected - _log_rest(rejected))
    return -chosen - beta * logsigmoid(odds)


def _log_rest(log_probability: torch.Tensor) -> torch.Tensor:
    """`log(1 - p)` of `log p`, exact at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    below = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    near_one = below > -0.6931
    # Each branch sees only what it can take: a gradient of the other one must not be nan.
    close = torch.log(-torch.expm1(torch.where(near_one, below, -0.5)))
    return torch.where(near_one, close, torch.log1p(-torch.exp(torch.where(near_one, -1.0, below))))
