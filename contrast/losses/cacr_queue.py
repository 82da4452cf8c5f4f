"""CACR with momentum keys and a queue: keys attract, the queue and the batch's own queries repel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from contrast.core.embeddings import gather_all
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, SoftMean
from contrast.losses.cacr import among_parts, views_of
from contrast.losses.checks import check_not_negative
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss


@LOSSES.register("cacr_queue", aliases=("cacr_moco", "cacr_moco_v2"))
class CACRQueue(PairLoss):
    r"""CACR in its authors' MoCo v2 form: `CACRQueue()(q_a, q_b, targets=(k_a, k_b), sample=index, extra=[queue])`.

    .. math::
        L = \frac{1}{V n} \sum_{x, i} \Big( \alpha \sum_{y \neq x} w^+_{iy} \lVert q_i^x - k_i^y \rVert^2
            - \beta \sum_{u \in Q \cup B_i^x} w^-_{iu} \lVert q_i^x - u \rVert^2 \Big), \qquad
        B_i^x = \{ q_j^x : j \neq i \}

        w^+ = \mathrm{softmax}_y(t^+ \lVert q_i^x - k_i^y \rVert^2), \quad
        w^- = \mathrm{softmax}_u(-t^- \lVert q_i^x - u \rVert^2)

    for V views x, y of n samples, queries q, keys k and the queue Q. With labels, keys and remembered candidates of the
    anchor's class attract too; the queries of its class neither attract nor repel. Without `extra` only the batch
    repels. Departs from the authors' code, which uses the first view's products with the queue for every view; B has
    the samples of all processes, theirs those of one.

    Args:
        attraction_scale: t+ >= 0, multiplies the squared distance to the keys.
        repulsion_scale: t- >= 0, multiplies the squared distance to the negatives.
        attraction_weight: alpha >= 0, multiplies the attraction.
        repulsion_weight: beta >= 0, multiplies the repulsion.
        constant_weights: which weights are constants to the gradient: "published": w+, and in w- the logits of the
            queue, while gradient flows through those of the batch; "all"; "none".

    Raises:
        ValueError: for a negative scale or weight, or a call without targets.

    Example:
        >>> k_a, k_b, queue = torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8)
        >>> value = CACRQueue()(z_a, z_b, targets=(k_a, k_b), extra=[queue])

    Source: Zheng et al. 2023, Contrastive Attraction and Contrastive Repulsion for Representation Learning, TMLR,
    arXiv:2105.03746; the authors' repository JegZheng/CACR-SSL at fbc9d94, large_scale_shift_experiments.
    """

    def __init__(
        self,
        attraction_scale: float = 1.0,
        repulsion_scale: float = 2.0,
        attraction_weight: float = 1.0,
        repulsion_weight: float = 1.0,
        constant_weights: Literal["published", "all", "none"] = "published",
    ) -> None:
        super().__init__()
        check_not_negative(
            attraction_scale=attraction_scale,
            repulsion_scale=repulsion_scale,
            attraction_weight=attraction_weight,
            repulsion_weight=repulsion_weight,
        )
        if constant_weights not in ("published", "all", "none"):
            raise ValueError(f"constant_weights is 'published', 'all' or 'none'; got {constant_weights!r}.")
        self.attraction_scale = attraction_scale
        self.repulsion_scale = repulsion_scale
        self.attraction_weight = attraction_weight
        self.repulsion_weight = repulsion_weight
        self.constant_weights = constant_weights

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Pair each view's queries with themselves, then the keys of the other views, then the extras."""
        own, twins = self.embed(views, targets, sample, group, reference)
        if not twins:
            raise ValueError("CACRQueue attracts momentum keys: pass targets=(k_a, k_b), or use CACR without keys.")
        extras = self.extras(extra, own)
        numbers = [view for view, target in enumerate(targets or ()) if target is not None]
        gathered = gather_all([*own, *twins])
        prepared = []
        for view, query in enumerate(own):
            keys = [key for number, key in zip(numbers, gathered[len(own) :], strict=True) if number != view]
            if keys:
                prepared.append(Pairs(query, (gathered[view], *keys, *extras), views=1 + len(keys)))
        return prepared

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return alpha * attraction - beta * repulsion."""
        # softmax(t d) = softmax(-2 t s) and mean of d = 2 - 2 mean of s, since d = 2 - 2 s.
        attracting = among_parts(pairs, range(1, len(pairs.candidates)))
        constant = self.constant_weights != "none"
        attraction = 2 - 2 * pairs.soft_mean(
            -2 * self.attraction_scale, over="positive", among=attracting, detach=constant
        )
        return self.attraction_weight * attraction - self.repulsion_weight * self._repulsion(pairs)

    def _repulsion(self, pairs: Pairs) -> Tensor:
        scale, parts = 2 * self.repulsion_scale, range(views_of(pairs), len(pairs.candidates))
        batch, queue = among_parts(pairs, (0,)), among_parts(pairs, parts)
        if self.constant_weights == "published":
            # One softmax over both, in two factors: within each part, and between the parts.
            in_batch, batch_logit, in_queue, queue_logit = pairs.reduce(
                SoftMean(scale, "negative", batch),
                LogSumExp(scale, "negative", batch),
                SoftMean(scale, "negative", queue, detach=True),
                LogSumExp(scale, "negative", queue),
            )
            log_odds = batch_logit - queue_logit.detach()
            similarity = torch.sigmoid(log_odds) * in_batch + torch.sigmoid(-log_odds) * in_queue
        else:
            detach = self.constant_weights == "all"
            similarity = pairs.soft_mean(scale, over="negative", among=batch | queue, detach=detach)
        return torch.where(pairs.count("negative", among=batch | queue) > 0, 2 - 2 * similarity, 0)
