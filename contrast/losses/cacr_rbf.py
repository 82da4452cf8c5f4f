"""CACR with a Gaussian cost: the repulsion is the logarithm of a mean over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core import distributed
from contrast.core.autograd import full_precision
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp
from contrast.losses import inputs
from contrast.losses.cacr import view_pairs, views_of
from contrast.losses.checks import check_not_negative
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss, global_mean


@LOSSES.register("cacr_rbf")
class CACRRBF(PairLoss):
    r"""CACR whose negatives cost exp(-t d), with the logarithm outside the mean over the batch.

    .. math::
        L = \frac{\alpha}{V} \sum_x \frac{1}{n} \sum_i \sum_{k \neq x} w^+_{ik} d_{ik}
            + \frac{2 \beta}{V (V - 1)} \sum_{x < y} \log \frac{1}{n} \sum_i \sum_{j \neq i} w^-_{ij} e^{-t d_{ij}}

        w^+ = \mathrm{softmax}_k(t^+ d_{ik}), \quad w^- = \mathrm{softmax}_j(-t^- d_{ij}), \quad
        d_{ij} = \lVert z_i - z_j \rVert^2 = 2 - 2 s_{ij}

    for V views x, y of n samples, of all processes. In the authors' code it is a variant of the small-scale form,
    `CACR`, with the same attraction and view pairs; for a small t the repulsion is t times that of `CACR`. An anchor
    without negatives in a view pair is left out of that pair's mean.

    Because of the mean inside the logarithm, an anchor has no loss of its own: there are no `rows`, and wrappers that
    weight anchors refuse this loss.

    Args:
        attraction_scale: t+ >= 0, multiplies the squared distance; 0 for equal weights of the positives.
        repulsion_scale: t- >= 0, multiplies the squared distance; 0 for equal weights of the negatives.
        attraction_weight: alpha >= 0, multiplies the attraction.
        repulsion_weight: beta >= 0, multiplies the repulsion.
        cost_scale: t >= 0, multiplies the squared distance in the cost.

    Raises:
        ValueError: for a negative scale or weight, and for `reduction="none"`.

    Example:
        >>> value = CACRRBF(cost_scale=1.0)(z_a, z_b)

    Source: Zheng et al. 2023, Contrastive Attraction and Contrastive Repulsion for Representation Learning, TMLR,
    arXiv:2105.03746; the authors' repository JegZheng/CACR-SSL at fbc9d94, small_scale_experiments.
    """

    def __init__(
        self,
        attraction_scale: float = 1.0,
        repulsion_scale: float = 1.0,
        attraction_weight: float = 1.0,
        repulsion_weight: float = 1.0,
        cost_scale: float = 2.0,
    ) -> None:
        super().__init__()
        check_not_negative(
            attraction_scale=attraction_scale,
            repulsion_scale=repulsion_scale,
            attraction_weight=attraction_weight,
            repulsion_weight=repulsion_weight,
            cost_scale=cost_scale,
        )
        self.attraction_scale = attraction_scale
        self.repulsion_scale = repulsion_scale
        self.attraction_weight = attraction_weight
        self.repulsion_weight = repulsion_weight
        self.cost_scale = cost_scale

    def forward(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | Sequence[Tensor] | None = None,
        extra: Extra | Sequence[Extra] | None = (),
        reduction: Literal["mean", "none"] = "mean",
        **unknown: Any,
    ) -> Tensor:
        """Return the loss of these views over all processes, (); see `PairLoss.forward` for the arguments."""
        if reduction != "mean":
            raise ValueError(_NO_ROWS)
        self._check_call(views, targets, group, unknown)
        extras = inputs.as_list(extra)
        with full_precision(views[0]):
            (pairs,) = self.pairs(
                *views,
                targets=targets,
                sample=sample,
                group=group,
                reference=inputs.references(type(self).__name__, reference, views, targets),
                extra=extras,
            )
            valid = self._valid(pairs)
            self._last = [pairs.detach()]
            positive = pairs.soft_mean(-2 * self.attraction_scale, over="positive")
            positive = positive if positive.ndim == 1 else positive.mean(dim=0)
            attraction = global_mean(torch.where(valid, 2 - 2 * positive, 0), valid)
            repulsion = self._log_mean_cost(pairs, len(views))
            return self.attraction_weight * attraction + self.repulsion_weight * repulsion

    def per_anchor(self, pairs: Pairs) -> Tensor:  # noqa: ARG002
        """Raise a ValueError: an anchor has no loss of its own."""
        raise ValueError(_NO_ROWS)

    def _log_mean_cost(self, pairs: Pairs, views: int) -> Tensor:
        """Return the mean over the view pairs, and heads, of log mean_i sum_j w_ij e^{-t d_ij}."""
        # With d = 2 - 2 s, sum_j w_j e^{-t d_j} = sum_j e^{2 (t- + t) s_j} / sum_j e^{2 t- s_j} * e^{-2 t}.
        parts: list[tuple[Tensor | None, Tensor | None]] = list(view_pairs(pairs))
        if views_of(pairs) == 1 and not pairs.across:
            parts = [(None, None)]
        weight, cost = 2 * self.repulsion_scale, 2 * self.cost_scale
        if not parts:
            return pairs.anchor.z.new_zeros(())
        sums = pairs.reduce(
            *(
                LogSumExp(scale, "negative", among, rows=rows)
                for among, rows in parts
                for scale in (weight + cost, weight)
            )
        )
        logarithms, counts = [], []
        for (among, rows), numerator, denominator in zip(parts, sums[::2], sums[1::2], strict=True):
            has_negatives = pairs.count("negative", among=among, rows=rows) > 0
            for view in range(views):
                included = has_negatives & (pairs.view == view)
                logarithms.append(_masked_logsumexp(numerator - denominator - cost, included))
                counts.append(included.sum())
        count = distributed.total(torch.stack(counts).to(logarithms[0].dtype))
        total = _all_processes(torch.stack(logarithms, dim=-1)).logsumexp(dim=0)
        mean = torch.where(count > 0, total - count.clamp(min=1).log(), 0).sum(dim=-1) / (count > 0).sum().clamp(min=1)
        return mean.mean()


_NO_ROWS = "CACRRBF has no value per anchor: its logarithm is outside the mean over the batch; use CACR to get it."


def _masked_logsumexp(x: Tensor, included: Tensor) -> Tensor:
    """Return the log-sum-exp of the included numbers, (...) from (..., N); finfo.min / 2 without any."""
    empty = torch.finfo(x.dtype).min / 2
    return F.pad(x.masked_fill(~included, empty), (0, 1), value=empty).logsumexp(dim=-1)


def _all_processes(x: Tensor) -> Tensor:
    """Return x of every process, (W, ...) in rank order, with gradient."""
    world, rank = distributed.world_size(), distributed.rank()
    return distributed.total(torch.stack([x if process == rank else torch.zeros_like(x) for process in range(world)]))
