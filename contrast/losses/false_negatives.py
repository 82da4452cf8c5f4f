"""False-negative control: negatives that are likely of the anchor's kind are left out, with any loss."""

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
    r"""Any loss over pairs, without the negatives that one of these rules takes for false ones.

    .. math:: N'(i) = \{ j \in N(i) : s_{ij} \leq b_i, \; \langle u_i, u_j \rangle \leq g_i \}

    with b_i the least of the bounds of these rules:

    =================== ================================= =============================================================
    `above`             above                             what is more alike than this goes
    `margin`            s_i - margin                      ... within this of the positive
    `relative_margin`   s_i (1 - relative_margin)         ... within this share of it: 0.05 is the 95 % rule
    `top`               below the `top` largest s_ij      ... the most similar ones
    `guide`             g_i                               ... what a frozen network finds closer than the positive
    =================== ================================= =============================================================

    s_i is the mean similarity of anchor i's positives, g_i their mean similarity to the frozen network, whose vectors u
    of every view are the call's `reference` (one (N, R) a view: of one vector a sample nobody is closer than oneself).
    Several rules may be given; each is judged on all negatives of the loss inside. An anchor without a positive loses
    none to the rules that ask for one; of negatives that are equally similar at the end of the `top`, none is left out.
    What a rule leaves out is neither negative nor positive; no gradient flows through the rules.

        criterion = FalseNegatives(InfoNCE(0.2), relative_margin=0.05)
        loss = criterion(z_a, z_b, sample=index, extra=[queue])

    Args:
        loss: the loss inside, any over pairs.
        above: a cosine similarity.
        margin: >= 0, in cosine similarity.
        relative_margin: in [0, 1].
        top: 1 or more, a number of negatives of each anchor.
        guide: whether to ask the frozen network.

    Attributes:
        reference_of: what a training loop hands over as `reference`: "view" for a guide, else what the loss inside asks
            for.

    Raises:
        ValueError: for a loss without pairs, no rule, impossible numbers, and a guide without vectors of every view and
            every extra candidate.

    Source: Solatorio 2024 (GISTEmbed), arXiv:2402.16829, for `guide`.
    """

    traced = False

    does = "leaves negatives of a PairLoss out"

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
        """Pair as the loss inside does, and say which negatives to ignore."""
        if self.guide and (reference is None or reference.ndim != 3):
            raise ValueError(
                "guide compares what a frozen network sees in every view: give the loss reference=(u_a, u_b), one "
                f"(N, R) a view; got {'none' if reference is None else 'one for all views'}."
            )
        prepared = super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)
        return [self._ruled(pairs) for pairs in prepared]

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return what the loss inside measures, and the share of all negatives that is ignored."""
        every = pairs.without_rules().count("negative").sum()
        return {**super().measure(pairs), "ignored": 1 - pairs.count("negative").sum() / every.clamp(min=1)}

    @torch.no_grad()
    def _ruled(self, pairs: Pairs) -> Pairs:
        bound = self._bound(pairs)
        ruled = pairs
        if bound is not None:
            ruled = ruled.ignoring(_nearer, *([bound] if bound.ndim == 1 else bound.unbind()))
        if self.guide:
            seen = _as_the_guide_sees(pairs)
            ruled = ruled.ignoring(_nearer_to_the_guide, _where_positive(seen, seen.mean("positive")))
        return ruled

    def _bound(self, pairs: Pairs) -> Tensor | None:
        """Return the similarity above which negatives are ignored, (N,) or (H, N): the least of all rules."""
        bounds = []
        if self.above is not None:
            bounds.append(torch.full_like(pairs.anchor.z[..., 0], self.above))
        if self.margin is not None or self.relative_margin is not None:
            positive = pairs.mean("positive")
            margins = [] if self.margin is None else [positive - self.margin]
            margins += [] if self.relative_margin is None else [positive * (1 - self.relative_margin)]
            bounds += [_where_positive(pairs, bound) for bound in margins]
        if self.top is not None:
            # Between the last that goes and the first that stays; above both where they are alike. A threshold lies
            # 8 units in the last place below its similarity.
            last, first = pairs.kth(self.top, "negative"), pairs.kth(self.top + 1, "negative")
            alike = first + 16 * torch.finfo(first.dtype).eps * first.abs().clamp(min=0.125)
            bound = torch.maximum((last + first) / 2, alike)
            bounds.append(torch.where(pairs.count("negative") > self.top, bound, -torch.inf))
        return torch.stack(bounds).amin(dim=0) if bounds else None


def _where_positive(pairs: Pairs, bound: Tensor) -> Tensor:
    """Return the bound of each anchor with a positive, inf for the others."""
    return torch.where(pairs.count("positive") > 0, bound, torch.inf)


def _as_the_guide_sees(pairs: Pairs) -> Pairs:
    def seen(part: Embeddings) -> Embeddings:
        if part.reference is None:
            raise ValueError(
                "guide compares all candidates: extra candidates need reference vectors too; give the memory "
                "reference_dim and its updates a reference."
            )
        return Embeddings(part.reference, part.sample, part.group, part.view)

    of_guide = {id(part): seen(part) for part in (*pairs.anchor_parts, *pairs.candidates)}
    anchors, candidates = ([of_guide[id(part)] for part in parts] for parts in (pairs.anchor_parts, pairs.candidates))
    return Pairs(anchors, candidates, pairs.across, pairs.views)


def _nearer(anchor: Embeddings, candidate: Embeddings, similarity: Tensor, *bounds: Tensor) -> Tensor:  # noqa: ARG001
    return similarity > (bounds[0] if similarity.ndim == 2 else torch.stack(bounds))


def _nearer_to_the_guide(
    anchor: Embeddings,
    candidate: Embeddings,
    similarity: Tensor,  # noqa: ARG001
    bound: Tensor,
) -> Tensor:
    assert anchor.reference is not None
    assert candidate.reference is not None
    return anchor.reference @ candidate.reference.T > bound
