"""False-negative control: leave out negatives that are probably of the anchor's class, with any loss over pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss
from contrast.losses.wrapper import LossWrapper


@LOSSES.register("false_negatives", aliases=("false_negative_control", "gist", "gistembed"))
class FalseNegatives(LossWrapper):
    r"""Any loss over pairs, without the negatives that a rule identifies as false ones.

    .. math:: N'(i) = \{ j \in N(i) : s_{ij} \leq b_i, \; \langle u_i, u_j \rangle \leq g_i \}

    with b_i the smallest of the bounds of these rules:

    =================== ================================= =============================================================
    rule                bound                             leaves out the negatives ...
    =================== ================================= =============================================================
    `above`             above                             more similar than a constant
    `margin`            s_i - margin                      more similar than the positive minus a margin
    `relative_margin`   s_i (1 - relative_margin)         the same with a share of it: 0.05 is the 95 % rule
    `top`               below the `top` largest s_ij      among the most similar ones
    `guide`             g_i                               more similar than the positive to a frozen network
    =================== ================================= =============================================================

    s_i is the mean similarity of anchor i's positives and g_i the same for the frozen network, whose vectors u of every
    view are the call's `reference`, one (N, R) per view (with one vector per sample, every positive would be at
    similarity 1). Several rules may be combined; each is evaluated on all negatives of the inner loss. An anchor
    without a positive loses no negative to the rules that need one. Where negatives tie at the end of the `top`, none
    of them is left out. What a rule leaves out is neither negative nor positive; no gradient flows through the rules.

    Args:
        loss: the inner loss, any over pairs.
        above: a cosine similarity.
        margin: >= 0, in cosine similarity.
        relative_margin: in [0, 1].
        top: 1 or more, a number of negatives per anchor.
        guide: use the frozen network.

    Attributes:
        reference_of: "view" with a guide, otherwise that of the inner loss.

    Raises:
        ValueError: for a loss without pairs, no rule, impossible numbers, and a guide without vectors of every view and
            every extra candidate.

    Example:
        >>> criterion = FalseNegatives(InfoNCE(0.2), relative_margin=0.05)
        >>> value = criterion(z_a, z_b)
        >>> ignored = criterion.metrics["ignored"]

    Source: Solatorio 2024 (GISTEmbed), arXiv:2402.16829, for `guide`.
    """

    traced = False

    purpose = "leaves negatives of a PairLoss out"

    def __init__(
        self,
        loss: PairLoss,
        above: float | None = None,
        margin: float | None = None,
        relative_margin: float | None = None,
        top: int | None = None,
        guide: bool = False,
    ) -> None:
        super().__init__(loss)
        if above is None and margin is None and relative_margin is None and top is None and not guide:
            raise ValueError("FalseNegatives needs a rule: above, margin, relative_margin, top or guide.")
        if above is not None and not math.isfinite(above):
            raise ValueError(f"above is a similarity; got {above}.")
        if margin is not None and not (margin >= 0 and math.isfinite(margin)):
            raise ValueError(f"margin must be 0 or more; got {margin}.")
        if relative_margin is not None and not 0 <= relative_margin <= 1:
            raise ValueError(f"relative_margin is a share, in [0, 1]; got {relative_margin}.")
        if top is not None and top < 1:
            raise ValueError(f"top must be 1 or more; got {top}.")
        self.above = above
        self.margin = margin
        self.relative_margin = relative_margin
        self.top = top
        self.guide = guide
        if guide:
            self.reference_of = "view"

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of the inner loss, with rules that ignore negatives."""
        if self.guide and (reference is None or reference.ndim != 3):
            raise ValueError(
                "guide compares a frozen network's vectors of every view: pass reference=(u_a, u_b), one (N, R) per "
                f"view; got {'none' if reference is None else 'one for all views'}."
            )
        prepared = super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)
        return [self._ruled(pairs) for pairs in prepared]

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute the metrics of the inner loss, and the share of all negatives that is ignored."""
        total = pairs.without_rules().count("negative").sum()
        return {**super().measure(pairs), "ignored": 1 - pairs.count("negative").sum() / total.clamp(min=1)}

    @torch.no_grad()
    def _ruled(self, pairs: Pairs) -> Pairs:
        bound = self._bound(pairs)
        ruled = pairs
        if bound is not None:
            ruled = ruled.ignoring(_above_bound, *([bound] if bound.ndim == 1 else bound.unbind()))
        if self.guide:
            guided = _with_reference_vectors(pairs)
            ruled = ruled.ignoring(_reference_above_bound, _where_positive(guided, guided.mean("positive")))
        return ruled

    def _bound(self, pairs: Pairs) -> Tensor | None:
        """Return the smallest bound of all rules, (N,) or (H, N); negatives above it are ignored."""
        bounds = []
        if self.above is not None:
            bounds.append(torch.full_like(pairs.anchor.z[..., 0], self.above))
        if self.margin is not None or self.relative_margin is not None:
            positive = pairs.mean("positive")
            margins = [] if self.margin is None else [positive - self.margin]
            margins += [] if self.relative_margin is None else [positive * (1 - self.relative_margin)]
            bounds += [_where_positive(pairs, bound) for bound in margins]
        if self.top is not None:
            # The bound is between the last one ignored and the next; above both where they are equal. `kth` returns
            # a threshold that is 8 units in the last place below its similarity.
            last, following = pairs.kth(self.top, "negative"), pairs.kth(self.top + 1, "negative")
            above_following = following + 16 * torch.finfo(following.dtype).eps * following.abs().clamp(min=0.125)
            bound = torch.maximum((last + following) / 2, above_following)
            bounds.append(torch.where(pairs.count("negative") > self.top, bound, -torch.inf))
        return torch.stack(bounds).amin(dim=0) if bounds else None


def _where_positive(pairs: Pairs, bound: Tensor) -> Tensor:
    """Return the bounds, inf for anchors without a positive."""
    return torch.where(pairs.count("positive") > 0, bound, torch.inf)


def _with_reference_vectors(pairs: Pairs) -> Pairs:
    """Return the same pairs of the frozen network's vectors."""

    def reference_of(part: Embeddings) -> Embeddings:
        if part.reference is None:
            raise ValueError(
                "guide compares all candidates, so extra candidates need reference vectors too: construct the memory "
                "with reference_dim and pass reference to its update()."
            )
        return Embeddings(part.reference, part.sample, part.group, part.view)

    # Parts that are anchors and candidates stay the same objects, so that similarities serve both directions.
    references = {id(part): reference_of(part) for part in (*pairs.anchor_parts, *pairs.candidates)}
    anchors, candidates = ([references[id(part)] for part in parts] for parts in (pairs.anchor_parts, pairs.candidates))
    return Pairs(anchors, candidates, pairs.across, pairs.views)


def _above_bound(anchor: Embeddings, candidate: Embeddings, similarity: Tensor, *bounds: Tensor) -> Tensor:  # noqa: ARG001
    return similarity > (bounds[0] if similarity.ndim == 2 else torch.stack(bounds))


def _reference_above_bound(
    anchor: Embeddings,
    candidate: Embeddings,
    similarity: Tensor,  # noqa: ARG001
    bound: Tensor,
) -> Tensor:
    assert anchor.reference is not None
    assert candidate.reference is not None
    return anchor.reference @ candidate.reference.T > bound
