"""Negative cosine similarity: only positives, as in SimSiam."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss


@LOSSES.register("negative_cosine", aliases=("simsiam", "byol", "sym_neg_cosine"))
class NegativeCosine(PairLoss):
    r"""Minus the mean similarity of each anchor and its positives among the targets.

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}

    With two views, predictions p and stop-gradient projections z, `loss(p_a, p_b, targets=(z_a, z_b))` is SimSiam's
    -cos(p_a, z_b) / 2 - cos(p_b, z_a) / 2. Without a stop-gradient or a momentum twin all embeddings become equal, so
    targets are required.

    Raises:
        ValueError: without targets.

    Example:
        >>> value = NegativeCosine()(z_a, z_b, targets=(z_b.detach(), z_a.detach()))

    Source: Chen and He 2020, Exploring Simple Siamese Representation Learning, arXiv:2011.10566.
    """

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of every view with the targets of the other views."""
        if not targets or all(target is None for target in targets):
            raise ValueError(
                "NegativeCosine needs targets=(z_a, z_b), stop-gradient or momentum projections: "
                "without them all embeddings become equal."
            )
        return super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return minus the mean similarity of the positives."""
        return -pairs.mean(over="positive")
