"""Continuously weighted contrast: a frozen network's similarity of two samples is the weight of the positive pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from contrast.core.embeddings import gather_all, normalise
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Mean
from contrast.losses.info_nce import InfoNCE
from contrast.losses.pair_loss import LOSSES, Extra

CHUNK = 256
"""Anchors per block for the entropy of their weights."""


@LOSSES.register("cwcl", aliases=("continuously_weighted",))
class CWCL(InfoNCE):
    r"""Contrast a frozen network's embeddings p with a trained one's q (towers): `CWCL()(p, q, reference=features)`.

    .. math::
        L = -\frac{1}{N} \sum_i \frac{\sum_j w_{ij} \log \mathrm{softmax}_j(p_i \cdot q_j / \tau)}{\sum_j w_{ij}}
            - \frac{1}{N} \sum_i \log \mathrm{softmax}_j(q_i \cdot p_j / \tau) \big|_{j = i}, \qquad
        w_{ij} = \frac{\langle u_i, u_j \rangle + 1}{2}

    for N samples and unit vectors u of the frozen network. Only the direction with anchors of the frozen view is
    weighted; the other is InfoNCE. The loss is the sum of both, so with identity weights it is twice CLIP's. The
    weights have no gradient. Since unrelated samples have weight 1/2, the first term's minimum is the entropy of the
    normalised weights, not 0: `metrics` has that "entropy" and the "excess" over it.

    The first view is the frozen one. Without `reference` its own embeddings are u (with heads, their mean cosine). With
    labels the positives of the second direction are the complete class; the weighted one uses the frozen network only.
    With targets for one view only, the remaining direction counts twice.

    Args:
        temperature: tau > 0, divides the cosine similarity.
        learn_temperature: learn log(1 / tau) from that start; 1 / tau stays at or below 100.

    Raises:
        ValueError: for a temperature that is not positive, or below 0.01 where it is learned; for another number of
            views than two; for extras without a reference of the views' width.

    Example:
        >>> features = torch.randn(4, 16)
        >>> value = CWCL()(z_a, z_b, reference=features)

    Source: Srinivasa et al. 2023, CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss,
    arXiv:2309.14580; the formula as in CellCLIP, suinleelab/CellCLIP.
    """

    def __init__(self, temperature: float = 0.07, learn_temperature: bool = False) -> None:
        super().__init__(temperature, learn_temperature, candidates="across")

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of each view with the other one, or with its targets."""
        if len(views) != 2:
            raise ValueError(f"CWCL takes two views, the frozen network's first: loss(p, q); got {len(views)}.")
        own, twins = self.embed(views, targets, sample, group, reference)
        if reference is None:
            reference = _as_reference(own[0].z.detach())
            own, twins = ([replace(part, reference=reference) for part in parts] for parts in (own, twins))
        extras = self.extras(extra, own)
        for part in extras:
            width = None if part.reference is None else part.reference.shape[1]
            if width != reference.shape[-1]:
                raise ValueError(
                    f"CWCL weights every candidate by the frozen network: extras are Embeddings with reference "
                    f"(K, {reference.shape[-1]}); got {'none' if width is None else f'(K, {width})'}."
                )
        others = twins or own
        return [Pairs(own, (*gather_all(others), *extras), across=True, views=len(others))]

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return 2 (log of the denominator - (weighted) mean logit): a sum of two means is twice their mean."""
        scale = self.scale()
        frozen = pairs.view == 0
        denominator, weighted, plain = pairs.reduce(
            LogSumExp(scale, "all"),
            Mean("all", weight="reference", rows=frozen),
            Mean("positive", rows=~frozen),
        )
        return 2 * (denominator - scale * (weighted + plain))

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute the similarities, the entropy of the frozen anchors' weights, and the weighted term's excess."""
        frozen = self._valid(pairs) & (pairs.view == 0)
        starts = range(0, max(len(pairs), 1), CHUNK)
        entropy = torch.cat([_entropy(pairs.block(slice(start, start + CHUNK))) for start in starts])
        count = frozen.sum().clamp(min=1)
        excess = self.rows(pairs) / 2 - entropy
        return {
            **super().measure(pairs),
            "entropy": torch.where(frozen, entropy, 0).sum() / count,
            "excess": torch.where(frozen, excess, 0).sum() / count,
        }


def _as_reference(z: Tensor) -> Tensor:
    """Return the frozen view's vectors as unit references; heads are concatenated: the cosine is their mean."""
    return z if z.ndim == 2 else normalise(z.movedim(0, -2).flatten(start_dim=1))


def _entropy(pairs: Pairs) -> Tensor:
    """Return the entropy of each anchor's normalised weights, (n,): log sum w - sum w log w / sum w."""
    weight = pairs.reference_weight.clamp(min=0) * pairs.relation("all")
    total = weight.sum(dim=-1)
    positive = total.where(total > 0, 1)
    entropy: Tensor = positive.log() - torch.special.xlogy(weight, weight).sum(dim=-1) / positive
    return entropy if entropy.ndim == 1 else entropy.mean(dim=0)
