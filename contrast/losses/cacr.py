"""Contrastive attraction and contrastive repulsion: far positives pull more, near negatives push more."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.core.reductions import SoftMean
from contrast.losses.checks import check_not_negative
from contrast.losses.pair_loss import LOSSES, PairLoss


@LOSSES.register("cacr", aliases=("contrastive_attraction_repulsion", "cacl"))
class CACR(PairLoss):
    r"""Attract far positives and repel near negatives, each weighted by its own softmax of squared distances.

    .. math::
        L = \frac{\alpha}{V} \sum_x \frac{1}{n} \sum_i \sum_{k \neq x} w^+_{ik} d_{ik}
            - \frac{2 \beta}{V (V - 1)} \sum_{x < y} \frac{1}{n} \sum_i \sum_{j \neq i} w^-_{ij} d_{ij}

        w^+ = \mathrm{softmax}_k(t^+ d_{ik}), \quad w^- = \mathrm{softmax}_j(-t^- d_{ij}), \quad
        d_{ij} = \lVert z_i - z_j \rVert^2 = 2 - 2 s_{ij}

    for V views x, y of n samples. This is the small-scale form of the authors' code: the repulsion of a view pair is
    computed once, from the earlier view, against samples of the later one. Gradient flows through both softmaxes.
    With `targets`, where (x, y) and (y, x) are different pairs, both count. Remembered candidates are in every
    repulsion. An anchor without negatives is attracted only. One view with labels has no view pairs: its repulsion is
    that of `repulsion="all"`.

    Without labels a share tau+ of the negatives are unknown positives. The mean over all negatives is
    tau+ E_pos + (1 - tau+) E_neg, so the mean over the true ones, which `positive_prior` estimates, is

    .. math:: \frac{1}{1 - \tau^+} \Big( \sum_{j \neq i} w^-_{ij} d_{ij} - \tau^+ d_i^+ \Big)

    in place of each repulsion, with d+ the anchor's mean distance to its positives in that view pair. Departs from the
    authors' code, whose positive term has the opposite sign and lacks beta.

    The authors' two other forms are `CACRQueue` (momentum keys and a queue) and `CACRMultiCrop` (momentum keys and
    crops); `CACRRBF` has this one's repulsion with a Gaussian cost.

    Args:
        attraction_scale: t+ >= 0, multiplies the squared distance; 0 for equal weights (uniform attraction).
        repulsion_scale: t- >= 0, multiplies the squared distance; 0 for equal weights (uniform repulsion).
        attraction_weight: alpha >= 0, multiplies the attraction.
        repulsion_weight: beta >= 0, multiplies the repulsion.
        repulsion: "view_pairs": the published form; "all": one softmax over the negatives of all views at once.
        detach_weights: no gradient through the weights w.
        positive_prior: tau+ in [0, 1), the share of negatives that are unknown positives; 0.1 in the authors' code.

    Raises:
        ValueError: for a negative scale or weight, or a prior outside [0, 1).

    Example:
        >>> value = CACR(repulsion_scale=2.0)(z_a, z_b)

    Source: Zheng et al. 2023, Contrastive Attraction and Contrastive Repulsion for Representation Learning, TMLR,
    arXiv:2105.03746; the authors' repository JegZheng/CACR-SSL at fbc9d94, small_scale_experiments.
    """

    def __init__(
        self,
        attraction_scale: float = 1.0,
        repulsion_scale: float = 1.0,
        attraction_weight: float = 1.0,
        repulsion_weight: float = 1.0,
        repulsion: Literal["view_pairs", "all"] = "view_pairs",
        detach_weights: bool = False,
        positive_prior: float = 0.0,
    ) -> None:
        super().__init__()
        check_not_negative(
            attraction_scale=attraction_scale,
            repulsion_scale=repulsion_scale,
            attraction_weight=attraction_weight,
            repulsion_weight=repulsion_weight,
        )
        if repulsion not in ("view_pairs", "all"):
            raise ValueError(f"repulsion is 'view_pairs' or 'all'; got {repulsion!r}.")
        if not 0 <= positive_prior < 1:
            raise ValueError(f"positive_prior is a share, 0 or more and below 1; got {positive_prior}.")
        self.attraction_scale = attraction_scale
        self.repulsion_scale = repulsion_scale
        self.attraction_weight = attraction_weight
        self.repulsion_weight = repulsion_weight
        self.repulsion = repulsion
        self.detach_weights = detach_weights
        self.positive_prior = positive_prior

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return alpha * attraction - beta * repulsion."""
        # softmax(t d) = softmax(-2 t s) and mean of d = 2 - 2 mean of s, since d = 2 - 2 s.
        joint = self.repulsion == "all" or (views_of(pairs) == 1 and not pairs.across)
        parts = [(None, None)] if joint else list(view_pairs(pairs))
        scale, detach = 2 * self.repulsion_scale, self.detach_weights
        far_positives = SoftMean(-2 * self.attraction_scale, "positive", detach=detach)
        near_negatives = [SoftMean(scale, "negative", among, detach, rows=rows) for among, rows in parts]
        positive, *negatives = pairs.reduce(far_positives, *near_negatives)
        attraction, repulsion = 1 - positive, self._repulsion(pairs, parts, negatives)
        if self.attraction_weight != self.repulsion_weight:
            return 2 * (self.attraction_weight * attraction - self.repulsion_weight * repulsion)
        return 2 * self.attraction_weight * (attraction - repulsion)

    def _repulsion(
        self, pairs: Pairs, parts: Sequence[tuple[Tensor | None, Tensor | None]], similarities: Sequence[Tensor]
    ) -> Tensor:
        """Return the mean over the anchor's view pairs of half the squared distance to its near negatives."""
        repulsion: Tensor | float = 0.0
        for number, ((among, rows), similarity) in enumerate(zip(parts, similarities, strict=True)):
            distance = 1 - similarity
            if self.positive_prior:
                positive = 1 - pairs.mean("positive", among=among, rows=rows)
                distance = (distance - self.positive_prior * positive) / (1 - self.positive_prior)
            repulsion = repulsion + distance * self._share(pairs, parts, number, similarity.dtype)
        return torch.as_tensor(repulsion, device=pairs.view.device)

    @staticmethod
    def _share(
        pairs: Pairs, parts: Sequence[tuple[Tensor | None, Tensor | None]], number: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the share of a view pair in each anchor's mean, (N,) or (H, N); 0 without negatives in the pair."""
        among, rows = parts[number]
        has_negatives = (pairs.count("negative", among=among, rows=rows) > 0).to(dtype)
        if among is None or pairs.across:
            partners = sum(torch.ones_like(has_negatives) if rows is None else rows for _, rows in parts)
            return has_negatives / torch.as_tensor(partners).clamp(min=1)
        # The mean over all V n anchors becomes the mean over the V (V - 1) / 2 view pairs and their n anchors.
        return has_negatives * (2 / max(views_of(pairs) - 1, 1))


def views_of(pairs: Pairs) -> int:
    """Return how many parts of the candidates are views; the rest are extras."""
    return len(pairs.candidates) if pairs.views is None else pairs.views


def among_parts(pairs: Pairs, numbers: Container[int]) -> Tensor:
    """Return (M,) bool: the candidates of the parts with these numbers."""
    chosen = [
        torch.full_like(part.view, number in numbers, dtype=torch.bool) for number, part in enumerate(pairs.candidates)
    ]
    return torch.cat(chosen)


def view_pairs(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, per view, its candidates with the extras, (M,) bool, and the anchors that it is paired with, (N,) bool."""
    views = views_of(pairs)
    for number, part in enumerate(pairs.candidates[:views]):
        earlier_exist = number > 0 or pairs.across
        if len(part) and earlier_exist:
            numbers = (number, *range(views, len(pairs.candidates)))
            view = part.view[:1]
            yield among_parts(pairs, numbers), pairs.view != view if pairs.across else pairs.view < view
