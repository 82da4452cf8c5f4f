"""Decoupled contrastive learning: InfoNCE without positives in the denominator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Mean
from contrast.losses.checks import check_positive
from contrast.losses.pair_loss import LOSSES, PairLoss


@LOSSES.register("decoupled", aliases=("dcl", "dclw"))
class DecoupledInfoNCE(PairLoss):
    r"""InfoNCE with only negatives in the denominator, so that small batches keep their gradient: DCL and DCLW.

    .. math:: \ell_i = \log \sum_{j \in N(i)} e^{s_{ij} / \tau} - w_i \, \bar s_i / \tau, \quad
              \bar s_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}

    with N(i) the negatives and P(i) the positives of anchor i, s the cosine similarity. DCL has w = 1. DCLW
    down-weights anchors that are similar to their positives, by the negative von Mises-Fisher function

    .. math:: w_i = 2 - \frac{e^{\bar s_i / \sigma}}{\mathrm{mean}_k \, e^{\bar s_k / \sigma}}

    with the mean over the valid anchors k of all views and processes; w is a constant to the gradient. An anchor
    without positives or without negatives is left out. The paper has one positive; several are averaged, in w too.

    Args:
        temperature: tau > 0, divides the cosine similarity.
        weighting: "none": DCL; "von_mises_fisher": DCLW.
        sigma: sigma > 0, divides the similarity inside the weighting.

    Raises:
        ValueError: for a temperature or sigma that is not positive.

    Example:
        >>> value = DecoupledInfoNCE(weighting="von_mises_fisher")(z_a, z_b)

    Source: Yeh et al. 2021, Decoupled Contrastive Learning, arXiv:2110.06848.
    """

    needs_negative = True

    def __init__(
        self,
        temperature: float = 0.1,
        weighting: Literal["none", "von_mises_fisher"] = "none",
        sigma: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature, sigma=sigma)
        if weighting not in ("none", "von_mises_fisher"):
            raise ValueError(f"weighting is 'none' or 'von_mises_fisher'; got {weighting!r}.")
        self.temperature = temperature
        self.weighting = weighting
        self.sigma = sigma

    def pairs(self, *views: Tensor, **arguments: Any) -> list[Pairs]:
        """Return the pairs of every view with every view; for the weighting, with the mean over all anchors."""
        prepared = list(super().pairs(*views, **arguments))
        if self.weighting == "none":
            return prepared
        log_mean = self._log_mean(prepared)
        return [
            _PairsWithMean(p.anchor_parts, p.candidates, p.across, p.views, p.rules, log_mean=log_mean)
            for p in prepared
        ]

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the repulsion of the negatives minus the weighted attraction of the positives."""
        repulsion, similarity = pairs.reduce(LogSumExp(1 / self.temperature, "negative"), Mean("positive"))
        if self.weighting == "none":
            return repulsion - similarity / self.temperature
        return repulsion - self._weight(pairs, similarity.detach()) * similarity / self.temperature

    def _weight(self, pairs: Pairs, similarity: Tensor) -> Tensor:
        if not isinstance(pairs, _PairsWithMean):
            raise ValueError("weighting compares an anchor with all others: use the pairs of this loss's pairs().")
        share = similarity / self.sigma - pairs.log_mean.unsqueeze(-1)
        # A valid anchor's share is at most the number of anchors; only an invalid anchor's could overflow.
        return 2 - share.clamp(max=math.log(torch.finfo(share.dtype).max) / 2).exp()

    @torch.no_grad()
    def _log_mean(self, prepared: list[Pairs]) -> Tensor:
        """Return log mean_k exp(s_k / sigma) over the valid anchors of all processes, () or (H,)."""
        similarity = torch.cat([pairs.mean("positive") for pairs in prepared], dim=-1)
        valid = torch.cat([self._valid(pairs) for pairs in prepared])
        # The mean is a sum of exponentials divided by a sum of ones; gathered as logarithms, neither can underflow.
        terms = torch.stack([similarity / self.sigma, torch.zeros_like(similarity)])
        own = terms.masked_fill(~valid, torch.finfo(similarity.dtype).min / 2).logsumexp(dim=-1)
        sums = distributed.gather(own.unsqueeze(0), [1] * distributed.world_size()).logsumexp(dim=0)
        return sums[0] - sums[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class _PairsWithMean(Pairs):
    """Pairs with log mean_k exp(s_k / sigma), a statistic of all anchors that each row needs."""

    log_mean: Tensor
