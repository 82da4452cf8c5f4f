"""InfoNCE: one softmax over all other embeddings, in all its usual forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contrast.core import distributed
from contrast.core.embeddings import gather_all
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Mean
from contrast.losses.checks import check_positive
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss

LARGEST_SCALE = 100.0
"""A learned 1 / temperature stays below this, as in CLIP."""


@LOSSES.register("info_nce", aliases=("nt_xent", "simclr", "supcon", "sup_con", "moco", "moco_v2", "moco_v3", "clip"))
class InfoNCE(PairLoss):
    r"""Classify each anchor's positives among all candidates: NT-Xent, SupCon, MoCo, CLIP.

    .. math:: \ell_i = \log \sum_{j \in A(i)} e^{s_{ij} / \tau} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip} / \tau

    with P(i) the positives and A(i) the positives and negatives of anchor i, s the cosine similarity. The
    candidates determine the method:

    ============================ =====================================================================================
    NT-Xent (SimCLR)             `InfoNCE()(z_a, z_b)`
    SupCon                       `InfoNCE()(z_a, z_b, group=labels)`, or one view: `InfoNCE()(z, group=labels)`
    MoCo v2                      `InfoNCE(candidates="memory")(q_a, targets=(None, k_b), sample=index, extra=[queue])`
    MoCo v3, mean of both sides  `InfoNCE(candidates="across")(q_a, q_b, targets=(k_a, k_b))`
    CLIP                         `InfoNCE(candidates="across", learn_temperature=True)(z_image, z_text)`
    ============================ =====================================================================================

    Where an anchor has several positives p, the others are

    ========= ================================================================== =====================================
    outside   log sum_A e^{s/tau} - mean_p s_p / tau                              SupCon, mean outside the logarithm
    inside    log sum_A e^{s/tau} - log sum_p e^{s_p/tau}                         all positives inside one logarithm
    alone     mean_p [ log(e^{s_p/tau} + sum_neg e^{s/tau}) - s_p / tau ]         each in its own denominator only
    ========= ================================================================== =====================================

    Args:
        temperature: tau > 0, divides the cosine similarity.
        learn_temperature: learn log(1 / tau) from that start; 1 / tau stays at or below 100.
        candidates: "all": all views of all samples; "across": only other views than the anchor's, with one softmax per
            target view if there are targets; "memory": the negatives of `extra` only.
        positives: where the other positives are: "outside", "inside" or "alone".

    Raises:
        ValueError: for a temperature that is not positive, or below 0.01 where it is learned.

    Example:
        >>> z_a, z_b = torch.randn(2, 64, 128)
        >>> loss = InfoNCE(temperature=0.2)(z_a, z_b)
        >>> rows = InfoNCE()(z_a, group=torch.arange(64) % 8, reduction="none")
        >>> rows.shape
        torch.Size([64])

    Source: van den Oord et al. 2018, arXiv:1807.03748; Chen et al. 2020 (SimCLR), arXiv:2002.05709; Khosla et al. 2020
    (SupCon), arXiv:2004.11362; He et al. 2019 (MoCo), arXiv:1911.05722; Radford et al. 2021 (CLIP), arXiv:2103.00020.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learn_temperature: bool = False,
        candidates: Literal["all", "across", "memory"] = "all",
        positives: Literal["outside", "inside", "alone"] = "outside",
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        if learn_temperature and temperature < 1 / LARGEST_SCALE:
            raise ValueError(f"a learned temperature starts at {1 / LARGEST_SCALE} or above; got {temperature}.")
        if candidates not in ("all", "across", "memory"):
            raise ValueError(f"candidates is 'all', 'across' or 'memory'; got {candidates!r}.")
        if positives not in ("outside", "inside", "alone"):
            raise ValueError(f"positives is 'outside', 'inside' or 'alone'; got {positives!r}.")
        self.temperature = temperature
        self.candidates = candidates
        self.takes_one_view = candidates != "across"
        self.positives = positives
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs that `candidates` selects."""
        if self.candidates == "memory" and not extra:
            raise ValueError("candidates='memory' uses the negatives of extra=[queue]; got no extra.")
        if self.candidates != "across":
            return super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)
        own, twins = self.embed(views, targets, sample, group, reference)
        extras = self.extras(extra, own)
        if twins:
            numbers = [view for view, target in enumerate(targets or ()) if target is not None]
            keys = list(zip(numbers, gather_all(twins), strict=True))
            return [
                Pairs(query, (key, *extras), across=True, views=1)
                for view, query in enumerate(own)
                for number, key in keys
                if number != view
            ]
        return [Pairs(own, (*gather_all(own), *extras), across=True, views=len(own))]

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return log of the denominator minus log of the numerator."""
        scale = self.scale()
        memory = self.candidates == "memory"
        if self.positives == "alone":
            repulsion = pairs.logsumexp(scale, over="remembered" if memory else "negative")
            return pairs.softplus_sum(-scale, repulsion, over="positive") / pairs.count("positive").clamp(min=1)
        inside = self.positives == "inside"
        attract = LogSumExp(scale, "positive") if inside else Mean("positive")
        if memory:
            repel, positives, numerator = pairs.reduce(
                LogSumExp(scale, "remembered"), LogSumExp(scale, "positive"), attract
            )
            denominator = torch.logaddexp(repel, positives)
        else:
            denominator, numerator = pairs.reduce(LogSumExp(scale, "all"), attract)
        return denominator - (numerator if inside else numerator * scale)

    def scale(self) -> float | Tensor:
        """Return 1 / tau."""
        if self.log_scale is None:
            return 1 / self.temperature
        scale = self.log_scale.exp()
        # Only on the CPU can the value be read without waiting for the device.
        readable = scale.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (readable and float(scale.detach()) <= LARGEST_SCALE):
            scale = _ClampAbove.apply(scale, LARGEST_SCALE)
        return distributed.shared(scale)

    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the similarities, and the temperature where it is learned."""
        measured = super().measure(pairs)
        if self.log_scale is not None:
            measured["temperature"] = 1 / self.log_scale.detach().exp().clamp(max=LARGEST_SCALE)
        return measured


class _ClampAbove(torch.autograd.Function):
    """x clamped to a bound; above it, only gradients that decrease x pass, so that x can return below the bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x > bound)
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return torch.where(above, gradients[0].clamp(min=0), gradients[0]), None
