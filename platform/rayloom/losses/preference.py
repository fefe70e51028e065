"""What preference training minimises, pair by pair: DPO and its relatives.

Each function takes `Pairs` and returns the loss of each pair, (pairs,). `r` below is an answer's log-ratio, its
log-probability under the policy less that under the reference, and `w` and `l` are the chosen and the rejected answer.
`LOSSES` names them; `cpo`, `simpo` and `orpo` know no reference.

`kto_pair` and `aot` look at the batch as a whole: at one worker's batch, not the global one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from rayloom.losses.pairs import Pairs, logistic
from rayloom.losses.reference_free import cpo, orpo, simpo

PairLoss = Callable[..., torch.Tensor]


def sigmoid(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """`-(1 - e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l))`: DPO (Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290, equation 7); with `e`, the share of pairs that are the wrong way round, its
    conservative form."""
    return logistic(beta * pairs.margin, label_smoothing)


def robust(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """`(-(1 - e) log s(m) + e log s(-m)) / (1 - 2e)`, `m = beta (r_w - r_l)`: unbiased where a share `e`, below a half,
    of the pairs is the wrong way round (Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, equation 12)."""
    margin = beta * pairs.margin
    kept, flipped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta: float) -> torch.Tensor:
    """`max(0, 1 - beta (r_w - r_l))` (SLiC's, normalised by the reference; https://arxiv.org/abs/2309.06657)."""
    return torch.relu(1 - beta * pairs.margin)


def ipo(pairs: Pairs, beta: float) -> torch.Tensor:
    """`(r_w / |w| - r_l / |l| - 1 / (2 beta))^2` (Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17),
    with log-ratios per token, as its authors ran it."""
    chosen, rejected = pairs.ratios
    return (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens - 1 / (2 * beta)) ** 2


def kto_pair(pairs: Pairs, beta: float) -> torch.Tensor:
    """`(1 - s(beta (r_w - z_l)) + 1 - s(beta (z_w - r_l))) / 2`: KTO (https://arxiv.org/abs/2402.01306, equation 8) on
    pairs. `z` is the batch's mean log-ratio of the other side, at least 0 and held constant: an estimate of the
    divergence from the reference."""
    chosen, rejected = pairs.ratios
    z_chosen, z_rejected = (ratio.detach().mean().clamp(min=0) for ratio in (chosen, rejected))
    return 1 - (torch.sigmoid(beta * (chosen - z_rejected)) + torch.sigmoid(beta * (z_chosen - rejected))) / 2


def bco_pair(pairs: Pairs, beta: float, *, shift: float = 0.0) -> torch.Tensor:
    """`-log s(beta r_w - d) - log s(-(beta r_l - d))`: binary classifier optimization (Jung et al. 2024,
    https://arxiv.org/abs/2404.04656, equation 12) on pairs.

    Args:
        shift: `d`, the mean of the rewards `beta r` of all pairs before this step.
    """
    chosen, rejected = pairs.ratios
    return -logsigmoid(beta * chosen - shift) - logsigmoid(-(beta * rejected - shift))


def apo_zero(pairs: Pairs, beta: float) -> torch.Tensor:
    """`1 - s(beta r_w) + s(beta r_l)`: anchored (D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266,
    equation 7); for chosen answers that are better than the model's own."""
    chosen, rejected = pairs.ratios
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, beta: float) -> torch.Tensor:
    """`s(beta r_w) + 1 - s(beta (r_w - r_l))`: the same, equation 8; for chosen answers worse than the model's own."""
    chosen, _ = pairs.ratios
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * pairs.margin)


def sppo_hard(pairs: Pairs, beta: float) -> torch.Tensor:
    """`(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2`: self-play preference optimization (Wu et al. 2024,
    https://arxiv.org/abs/2405.00675, equation 4.7), the chosen answer winning always."""
    chosen, rejected = pairs.ratios
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def nca_pair(pairs: Pairs, beta: float) -> torch.Tensor:
    """`-log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2`: noise contrastive alignment (Chen et al. 2024,
    https://arxiv.org/abs/2402.05369, algorithm 1 for two answers)."""
    chosen, rejected = (beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def exo_pair(pairs: Pairs, beta: float, *, label_smoothing: float = 1e-3) -> torch.Tensor:
    """`KL(p || q)` of `p = (s(m), s(-m))`, `m = beta (r_w - r_l)`, from `q = (1 - e, e)`: efficient exact optimization
    (Ji et al. 2024, https://arxiv.org/abs/2402.00856, equation 16).

    Args:
        label_smoothing: `e`, above 0: what the rejected answer is held to be worth.
    """
    margin = beta * pairs.margin
    worth = margin.new_tensor([1 - label_smoothing, label_smoothing]).log()
    return torch.sigmoid(margin) * (logsigmoid(margin) - worth[0]) + torch.sigmoid(-margin) * (
        logsigmoid(-margin) - worth[1]
    )


def aot(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO on the batch's sorted margins, the policy's against the reference's: alignment via optimal transport
    (Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, equation 6). The i-th loss is no longer the i-th pair's."""
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        raise ValueError("this loss needs the log-probabilities of a reference")
    policy, _ = torch.sort(pairs.chosen - pairs.rejected)
    reference, _ = torch.sort(pairs.reference_chosen - pairs.reference_rejected)
    return logistic(beta * (policy - reference), label_smoothing)


def discopop(pairs: Pairs, beta: float, *, temperature: float = 0.05) -> torch.Tensor:
    """`-(1 - s(m / t)) log s(m) + s(m / t) exp(-m)`, `m = beta (r_w - r_l)`: the loss that a language model discovered
    (Lu et al. 2024, https://arxiv.org/abs/2406.08414, equation 5)."""
    margin = beta * pairs.margin
    blend = torch.sigmoid(margin / temperature)
    return -(1 - blend) * logsigmoid(margin) + blend * torch.exp(-margin)


LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "kto_pair": kto_pair,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "exo_pair": exo_pair,
    "aot": aot,
    "discopop": discopop,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
}
