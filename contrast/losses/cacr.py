"""Contrastive attraction and contrastive repulsion: far positives pull more, near negatives push more."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrast.losses.pair_loss import LOSSES, PairLoss
from contrast.pairs import Pairs


@LOSSES.register("cacr", aliases=("contrastive_attraction_repulsion", "cacl"))
class CACR(PairLoss):
    r"""Attract the far positives, repel the near negatives, each weighted by its own softmax of squared distances.

    .. math::
        L = \frac{\alpha}{V} \sum_x \frac{1}{n} \sum_i \sum_{k \neq x} w^+_{ik} d_{ik}
            - \frac{2 \beta}{V (V - 1)} \sum_{x < y} \frac{1}{n} \sum_i \sum_{j \neq i} w^-_{ij} d_{ij}

        w^+ = \mathrm{softmax}_k(t^+ d_{ik}), \quad w^- = \mathrm{softmax}_j(-t^- d_{ij}), \quad
        d_{ij} = \lVert z_i - z_j \rVert^2 = 2 - 2 s_{ij}

    for V views x, y of n samples. This is the small-scale form of the authors' code: the repulsion of a view pair is
    computed once, from the earlier view, against samples of the later one. Gradient flows through both softmaxes.
    With `targets`, where (x, y) and (y, x) are different pairs, both count. Remembered candidates join every
    repulsion. An anchor without negatives is attracted only.

    Args:
        attraction_scale: t+ >= 0, multiplies the squared distance; 0 weighs all positives alike (uniform attraction).
        repulsion_scale: t- >= 0, multiplies the squared distance; 0 weighs all negatives alike (uniform repulsion).
        attraction_weight: alpha >= 0, multiplies the attraction.
        repulsion_weight: beta >= 0, multiplies the repulsion.
        repulsion: "view_pairs": the published form; "all": one softmax over the negatives of all views at once.
        detach_weights: whether the weights w are constants to the gradient.

    Raises:
        ValueError: for a negative scale or weight.

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
    ) -> None:
        super().__init__()
        numbers = {
            "attraction_scale": attraction_scale,
            "repulsion_scale": repulsion_scale,
            "attraction_weight": attraction_weight,
            "repulsion_weight": repulsion_weight,
        }
        for name, number in numbers.items():
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} must be a number of 0 or more; got {number}.")
        if repulsion not in ("view_pairs", "all"):
            raise ValueError(f"repulsion is 'view_pairs' or 'all'; got {repulsion!r}.")
        self.attraction_scale = attraction_scale
        self.repulsion_scale = repulsion_scale
        self.attraction_weight = attraction_weight
        self.repulsion_weight = repulsion_weight
        self.repulsion = repulsion
        self.detach_weights = detach_weights

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Give alpha * attraction - beta * repulsion."""
        # softmax(t d) = softmax(-2 t s) and mean of d = 2 - 2 mean of s, since d = 2 - 2 s.
        near = pairs.soft_mean(-2 * self.attraction_scale, over="positive", detach=self.detach_weights)
        attraction = 2 - 2 * near
        repulsion = self._repelled(pairs) if self.repulsion == "all" else self._repelled_by_view(pairs)
        return self.attraction_weight * attraction - self.repulsion_weight * repulsion

    def _repelled(self, pairs: Pairs, among: Tensor | None = None) -> Tensor:
        near = pairs.soft_mean(2 * self.repulsion_scale, over="negative", among=among, detach=self.detach_weights)
        return torch.where(pairs.count("negative", among=among) > 0, 2 - 2 * near, 0)

    def _repelled_by_view(self, pairs: Pairs) -> Tensor:
        """Give the mean squared distance to the near negatives of each view that the anchor's view is paired with."""
        sizes = [len(part) for part in pairs.candidates]
        part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(pairs.anchor.z.device)
        views = len(sizes) if pairs.views is None else pairs.views
        repulsion, partners = pairs.anchor.z.new_zeros(len(pairs)), pairs.anchor.z.new_zeros(len(pairs))
        for number, candidate in enumerate(pairs.candidates[:views]):
            if not len(candidate):
                continue
            view = candidate.view[:1]
            paired = pairs.anchor.view != view if pairs.across else pairs.anchor.view < view
            repelled = self._repelled(pairs, among=(part == number) | (part >= views))
            repulsion = repulsion + torch.where(paired, repelled, 0)
            partners = partners + paired
        if pairs.across:
            return repulsion / partners.clamp(min=1)
        # The mean over all V n anchors becomes the mean over the V (V - 1) / 2 view pairs and their n anchors.
        return repulsion * (2 / max(views - 1, 1))
