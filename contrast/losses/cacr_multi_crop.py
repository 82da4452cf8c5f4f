"""CACR over crops: each momentum key attracts all other views of its sample, the farthest ones most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings, gather_all
from contrast.core.pairs import Pairs
from contrast.losses.checks import check_positive
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss


@LOSSES.register("cacr_multi_crop", aliases=("cacr_moco_v3", "cacr_crops"))
class CACRMultiCrop(PairLoss):
    r"""CACR in its authors' MoCo v3 form: `CACRMultiCrop()(q_a, q_b, q_crop, targets=(k_a, k_b, None))`.

    .. math::
        L = \frac{1}{|K|} \sum_{y \in K} \frac{1}{n} \sum_i \sum_{x \neq y} p_{xi} \, c(q_i^x, k_i^y), \qquad
        p_{\cdot i} = \mathrm{softmax}_x \big( \lVert q_i^x - k_i^y \rVert^2 / \tau \big)

        c_{\mathrm{rbf}} = 2 \tau \Big( \log \sum_j e^{q_i^x \cdot k_j^y / \tau} - q_i^x \cdot k_i^y / \tau \Big)

        c_{\mathrm{euclidean}} = (1 - q_i^x \cdot k_i^y)
            - \sum_{j \neq i} \mathrm{softmax}_j (q_i^x \cdot k_j^y / \tau) (1 - q_i^x \cdot k_j^y)

    for queries q of all views x and keys k of the views K that have a target. The weights p, and the softmax in the
    euclidean cost, are constants to the gradient. With two views and no crops p = 1, and the rbf cost is 2 tau times
    MoCo v3's InfoNCE, averaged over both directions: attraction begins with crops. With labels the keys of a class are
    positives, by their mean similarity. Extras are further keys j. The authors' code sums the euclidean cost over the
    batch; this is the mean.

    A row is one sample under one key view: `reduction="none"` gives (|K| N,), or (|K| H N,) with heads.

    Args:
        temperature: tau > 0, divides the cosine similarity and the squared distance.
        cost: "rbf" or "euclidean".

    Raises:
        ValueError: for a temperature that is not positive, or a call without targets.

    Example:
        >>> k_a, k_b, crop = torch.randn(3, 4, 8)
        >>> value = CACRMultiCrop()(z_a, z_b, crop, targets=(k_a, k_b, None))

    Source: Zheng et al. 2023, Contrastive Attraction and Contrastive Repulsion for Representation Learning, TMLR,
    arXiv:2105.03746; the authors' repository JegZheng/CACR-SSL at fbc9d94, imagenet_pretraining.
    """

    def __init__(self, temperature: float = 1.0, cost: Literal["rbf", "euclidean"] = "rbf") -> None:
        super().__init__()
        check_positive(temperature=temperature)
        if cost not in ("rbf", "euclidean"):
            raise ValueError(f"cost is 'rbf' or 'euclidean'; got {cost!r}.")
        self.temperature = temperature
        self.cost = cost

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return pairs of each view's keys (and each head's) with the queries of all other views, stacked as heads."""
        own, twins = self.embed(views, targets, sample, group, reference)
        if not twins:
            raise ValueError("CACRMultiCrop needs momentum keys: pass targets=(k_a, k_b), or use CACR without keys.")
        extras = self.extras(extra, own)
        numbers = [view for view, target in enumerate(targets or ()) if target is not None]
        prepared = []
        for number, key in zip(numbers, gather_all(twins), strict=True):
            others = [query for view, query in enumerate(own) if view != number]
            for head in range(len(views[0]) if views[0].ndim == 3 else 1):
                if others:
                    queries = torch.stack([_of_head(query, head).z for query in others])
                    candidates = [_of_head(part, head) for part in (key, *extras)]
                    prepared.append(Pairs(replace(others[0], z=queries), candidates, views=1))
        return prepared

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the costs of the sample's queries, weighted by p."""
        similarity, scale = pairs.mean(over="positive"), 1 / self.temperature
        # softmax(d / tau) = softmax(-2 s / tau), since d = 2 - 2 s.
        weight = torch.softmax(-2 * scale * similarity.detach(), dim=0)
        if self.cost == "rbf":
            cost = 2 * self.temperature * (pairs.logsumexp(scale, over="all") - similarity * scale)
        else:
            repulsion = 1 - pairs.soft_mean(scale, over="negative", detach=True)
            cost = 1 - similarity - torch.where(pairs.count("negative") > 0, repulsion, 0)
        return (weight * cost).sum(dim=0)


def _of_head(embeddings: Embeddings, head: int) -> Embeddings:
    return embeddings if embeddings.z.ndim == 2 else replace(embeddings, z=embeddings.z[head])
