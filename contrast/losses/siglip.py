"""SigLIP: every pair is classified independently, without a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contrast.core import distributed
from contrast.core.embeddings import gather_all
from contrast.core.pairs import Pairs
from contrast.core.reductions import SoftplusSum
from contrast.losses.checks import check_positive
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss


@LOSSES.register("siglip", aliases=("sigmoid", "sig_lip"))
class SigLIP(PairLoss):
    r"""Each pair of two views is classified as positive or negative by a sigmoid of its similarity.

    .. math:: L = -\frac{1}{n} \sum_{i=1}^n \sum_{j=1}^n \log \sigma\big(y_{ij} (t s_{ij} + b)\big), \quad
              y_{ij} = 1 \text{ for positives}, \; -1 \text{ for negatives}

    for n images i and texts j, s the cosine similarity. Here both sides are anchors, and each anchor's row has all its
    pairs; every pair is in two of the 2 n rows, so that their mean is the published sum divided by n.
    With V views it is V - 1 times the mean over the pairs of views. Candidates are of other views only; `extra` adds
    negatives. An anchor without a positive is left out.

    Args:
        scale: t > 0, multiplies the cosine similarity; the initial value if it is learned, as its logarithm.
        bias: b, added to it; the initial value if it is learned. Negative, since most pairs are negative.
        learn: learn t and b.

    Raises:
        ValueError: for a scale that is not positive, or a bias that is not finite.

    Example:
        >>> value = SigLIP()(z_a, z_b)

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
    """

    takes_one_view = False

    def __init__(self, scale: float = 10.0, bias: float = -10.0, learn: bool = True) -> None:
        super().__init__()
        check_positive(scale=scale)
        if not math.isfinite(bias):
            raise ValueError(f"bias must be a finite number; got {bias}.")
        self.scale = scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn else None
        self.bias = nn.Parameter(torch.tensor(float(bias))) if learn else bias

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of every view with the other ones, or with their targets."""
        own, twins = self.embed(views, targets, sample, group, reference)
        extras = self.extras(extra, own)
        others = twins or own
        return [Pairs(own, (*gather_all(others), *extras), across=True, views=len(others))]

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return -log sigmoid of t s + b summed over the positives, and of -(t s + b) over the negatives."""
        scale, bias = self._scale_and_bias()
        if isinstance(bias, Tensor):
            bias = bias.to(pairs.anchor_parts[0].z.dtype)
        positive, negative = pairs.reduce(SoftplusSum(-scale, -bias, "positive"), SoftplusSum(scale, bias, "negative"))
        return positive + negative

    def _scale_and_bias(self) -> tuple[float | Tensor, float | Tensor]:
        """Return t and b; learned ones are exchanged between processes in one tensor."""
        if self.log_scale is None or not isinstance(self.bias, Tensor):
            return self.scale, self.bias
        if distributed.world_size() == 1:
            return self.log_scale.exp(), self.bias
        scale, bias = distributed.shared(torch.stack([self.log_scale.exp(), self.bias])).unbind()
        return scale, bias

    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the similarities, and scale and bias where they are learned."""
        measured = super().measure(pairs)
        if self.log_scale is not None and isinstance(self.bias, Tensor):
            measured |= {"scale": self.log_scale.detach().exp(), "bias": self.bias.detach().clone()}
        return measured
