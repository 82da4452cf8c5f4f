"""Decoupled contrastive learning: the positives leave the denominator."""

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
    r"""InfoNCE whose denominator holds negatives only, so that small batches keep their gradient: DCL and DCLW.

    .. math:: \ell_i = \log \sum_{j \in N(i)} e^{s_{ij} / \tau} - w_i \, \bar s_i / \tau, \quad
              \bar s_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}

    with N(i) the negatives and P(i) the positives of anchor i, s the cosine similarity. DCL has w = 1. DCLW weighs down
    the anchors whose positives are near already, by the negative von Mises-Fisher function

    .. math:: w_i = 2 - \frac{e^{\bar s_i / \sigma}}{\mathrm{mean}_k \, e^{\bar s_k / \sigma}}

    whose mean runs over the valid anchors of all views and processes; w is a constant to the gradient. An anchor
    without positives or without negatives is left out. The paper has one positive; several are averaged, in w too.

    Args:
        temperature: tau > 0, divides the cosine similarity.
        weighting: "none": DCL; "von_mises_fisher": DCLW.
        sigma: sigma > 0, divides the similarity inside the weighting.

    Raises:
        ValueError: for a temperature or sigma that is not positive.

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

    def pairs(self, *views: Tensor, **given: Any) -> list[Pairs]:
        """Let every view meet every view; for the weighting, pairs that know what all anchors have on average."""
        prepared = list(super().pairs(*views, **given))
        if self.weighting == "none":
            return prepared
        log_mean = self._log_mean(prepared)
        return [
            _Compared(p.anchor_parts, p.candidates, p.across, p.views, p.rules, log_mean=log_mean) for p in prepared
        ]

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the repulsion of the negatives minus the weighted attraction of the positives."""
        repel, near = pairs.reduce(LogSumExp(1 / self.temperature, "negative"), Mean("positive"))
        if self.weighting == "none":
            return repel - near / self.temperature
        return repel - self._weight(pairs, near.detach()) * near / self.temperature

    def _weight(self, pairs: Pairs, near: Tensor) -> Tensor:
        if not isinstance(pairs, _Compared):
            raise ValueError("weighting compares an anchor with all others: take the pairs from this loss's pairs().")
        share = near / self.sigma - pairs.log_mean.unsqueeze(-1)
        # A valid anchor's share is at most their number; only an invalid one's could overflow.
        return 2 - share.clamp(max=math.log(torch.finfo(share.dtype).max) / 2).exp()

    @torch.no_grad()
    def _log_mean(self, prepared: list[Pairs]) -> Tensor:
        """Return log mean_k exp(s_k / sigma) over the valid anchors of all processes, () or (H,)."""
        near = torch.cat([pairs.mean("positive") for pairs in prepared], dim=-1)
        valid = torch.cat([self._valid(pairs) for pairs in prepared])
        # A mean is a sum of exponentials by a sum of ones; gathered as logarithms, neither can vanish.
        terms = torch.stack([near / self.sigma, torch.zeros_like(near)])
        own = terms.masked_fill(~valid, torch.finfo(near.dtype).min / 2).logsumexp(dim=-1)
        sums = distributed.gather(own.unsqueeze(0), [1] * distributed.world_size()).logsumexp(dim=0)
        return sums[0] - sums[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Compared(Pairs):
    """Pairs that know log mean_k exp(s_k / sigma), a number of all anchors, so that a row remains its anchor's own."""

    log_mean: Tensor
