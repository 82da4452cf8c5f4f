"""Hard negatives by weight: the debiased contrastive loss, and its hardness-weighted form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Relation
from contrast.losses.checks import check_not_negative, check_positive
from contrast.losses.pair_loss import LOSSES, PairLoss


@LOSSES.register("hard_negative", aliases=("hcl", "debiased", "robinson", "hard_negatives"))
class HardNegative(PairLoss):
    r"""Larger weights for similar negatives, and an estimate of the unknown positives among them is subtracted: HCL.

    .. math::
        R_i = |N(i)| \frac{\sum_{j \in N(i)} e^{(1 + \beta) s_{ij} / \tau}}{\sum_{j \in N(i)} e^{\beta s_{ij} / \tau}}

        G_i = \max\Big(\frac{R_i - \tau^+ |N(i)| \, \mathrm{mean}_{p \in P(i)} e^{s_{ip} / \tau}}{1 - \tau^+}
        , \; |N(i)| e^{-1 / \tau}\Big)

        \ell_i = \mathrm{mean}_{p \in P(i)} \left[ \log\big(e^{s_{ip} / \tau} + G_i\big) - s_{ip} / \tau \right]

    with N(i) the negatives and P(i) the positives of anchor i, s the cosine similarity. Gradient flows through the
    hardness weights, as in the published code; where the maximum takes its second value, G has none.
    beta = 0 is the debiased loss; beta = 0 and tau+ = 0 is NT-Xent, `InfoNCE(positives="alone")`.

    The papers have one positive (two views); here each of several has its own term, and all are the M positives of the
    debiased loss, which estimate the unknown ones. An anchor without negatives is left out.

    Args:
        temperature: tau > 0, divides the cosine similarity.
        hardness: beta >= 0, multiplies s / tau in the weights of the negatives; 0 for equal weights.
        positive_prior: tau+ in [0, 1), the share of negatives that are unknown positives.

    Raises:
        ValueError: for a temperature that is not positive, a negative hardness, or a prior outside [0, 1).

    Example:
        >>> value = HardNegative(hardness=2.0)(z_a, z_b)

    Source: Robinson et al. 2020, Contrastive Learning with Hard Negative Samples, arXiv:2010.04592; Chuang et al. 2020,
    Debiased Contrastive Learning, arXiv:2007.00224.
    """

    needs_negative = True

    def __init__(self, temperature: float = 0.5, hardness: float = 1.0, positive_prior: float = 0.1) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_not_negative(hardness=hardness)
        if not 0 <= positive_prior < 1:
            raise ValueError(f"positive_prior is a share of the negatives, in [0, 1); got {positive_prior}.")
        self.temperature = temperature
        self.hardness = hardness
        self.positive_prior = positive_prior

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the mean over the positives p of log(1 + G e^{-s_p / tau})."""
        log_negatives = self._log_negatives(pairs)
        total = pairs.softplus_sum(-1 / self.temperature, log_negatives, over="positive")
        return total / pairs.count("positive").clamp(min=1)

    def _log_negatives(self, pairs: Pairs) -> Tensor:
        """Return log G; its terms differ by a factor of e^200 at a temperature of 0.01, hence the logarithms."""
        scale, beta, dtype = 1 / self.temperature, self.hardness, pairs.anchor_parts[0].z.dtype
        log_count = _log_count(pairs, "negative", dtype)
        sums = [LogSumExp((1 + beta) * scale, "negative")]
        if beta:
            sums.append(LogSumExp(beta * scale, "negative"))
        if self.positive_prior:
            sums.append(LogSumExp(scale, "positive"))
        log_r, *more = pairs.reduce(*sums)
        if beta:
            log_r = log_count + log_r - more[0]
        if self.positive_prior == 0:
            return log_r  # R is never below |N| e^{-1/tau}
        log_positive = more[-1] - _log_count(pairs, "positive", dtype)
        hidden = math.log(self.positive_prior) + log_count + log_positive - log_r
        floor = log_count - scale
        # log(R - hidden R) needs hidden < 1; a remainder of rounding errors is negligible next to the positives.
        has_remainder = hidden < -torch.finfo(dtype).eps
        log_remainder = torch.log(-torch.expm1(torch.where(has_remainder, hidden, -1)))
        debiased = log_r + log_remainder - math.log1p(-self.positive_prior)
        return torch.where(has_remainder & (debiased > floor), debiased, floor)


def _log_count(pairs: Pairs, over: Relation, dtype: torch.dtype) -> Tensor:
    return pairs.count(over).clamp(min=1).to(dtype).log()
