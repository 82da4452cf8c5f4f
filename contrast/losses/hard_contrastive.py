"""Hard negatives by selection: the contrastive loss over each anchor's hardest negatives only."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.core.reductions import Count, Kth, Mean
from contrast.losses.checks import check_not_negative, check_positive
from contrast.losses.pair_loss import LOSSES, PairLoss


@LOSSES.register("hard_contrastive", aliases=("wang_liu", "hard_simple"))
class HardContrastive(PairLoss):
    r"""InfoNCE, or a plain difference of similarities, over the negatives at or above each anchor's own threshold.

    .. math::
        \text{softmax:} \quad \ell_i = \mathrm{mean}_{p \in P(i)} \Big[
            \log\big(e^{s_{ip} / \tau} + \sum_{j \in H(i)} e^{s_{ij} / \tau}\big) - s_{ip} / \tau \Big]

        \text{simple:} \quad \ell_i = -\mathrm{mean}_{p \in P(i)} \, s_{ip} + \lambda \sum_{j \in H(i)} s_{ij}

        H(i) = \{ j \in N(i) : s_{ij} \geq s_\alpha^{(i)} \}

    with N(i) the negatives and P(i) the positives of anchor i, s the cosine similarity, and the threshold the upper
    alpha-quantile of the anchor's own negatives, which has no gradient. All negatives that are equal to the threshold
    are selected, so there may be more than `hardest`. Several positives (the paper has one) have a denominator each, as
    in `InfoNCE(positives="alone")`, to which `hardest=1.0` is equal.

    Args:
        temperature: tau > 0, divides the cosine similarity; the simple form has none.
        hardest: alpha in (0, 1], the share of each anchor's negatives to select, rounded and at least one; or an int,
            their number (1 is one, 1.0 all).
        form: "softmax" or "simple".
        negative_weight: lambda >= 0, multiplies the negatives of the simple form.

    Raises:
        ValueError: for a temperature that is not positive, a negative weight, or nothing selected.

    Example:
        >>> value = HardContrastive(hardest=2)(z_a, z_b)

    Source: Wang and Liu 2021, Understanding the Behaviour of Contrastive Loss, arXiv:2012.09740.
    """

    def __init__(
        self,
        temperature: float = 0.3,
        hardest: int | float = 0.1,
        form: Literal["softmax", "simple"] = "softmax",
        negative_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        if isinstance(hardest, bool) or not (hardest >= 1 if isinstance(hardest, int) else 0 < hardest <= 1):
            raise ValueError(
                f"hardest is a number of negatives, 1 or more, or a share of them in (0, 1]; got {hardest}."
            )
        if form not in ("softmax", "simple"):
            raise ValueError(f"form is 'softmax' or 'simple'; got {form!r}.")
        check_not_negative(negative_weight=negative_weight)
        self.temperature = temperature
        self.hardest = hardest
        self.form = form
        self.negative_weight = negative_weight

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the loss against the negatives at or above the threshold."""
        threshold = self._threshold(pairs)
        if self.form == "simple":
            positive, negative, count = pairs.reduce(
                Mean("positive"), Mean("negative", above=threshold), Count("negative", above=threshold)
            )
            return self.negative_weight * (count * negative) - positive
        repulsion = pairs.logsumexp(1 / self.temperature, over="negative", above=threshold)
        total = pairs.softplus_sum(-1 / self.temperature, repulsion, over="positive")
        return total / pairs.count("positive").clamp(min=1)

    def _threshold(self, pairs: Pairs) -> Kth | None:
        """Return s_alpha; None where all negatives are selected."""
        if isinstance(self.hardest, int):
            return Kth(self.hardest, over="negative")
        if self.hardest == 1:
            return None
        return Kth(self._number_selected(pairs), over="negative")

    def _number_selected(self, pairs: Pairs) -> Tensor:
        """Return how many negatives of each anchor are selected, (N,) or (H, N) int64."""
        share = pairs.count("negative") * self.hardest
        return share.round().clamp(min=1).long()
