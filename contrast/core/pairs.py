"""Anchors with their candidates, positives and negatives, and the row reductions from which losses are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from contrast.core import reductions
from contrast.core.embeddings import Embeddings, concatenate, gather_all
from contrast.core.reductions import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    PairValue,
    Reduction,
    Relation,
    Rule,
    SoftMean,
    SoftplusSum,
)
from contrast.core.reductions.layout import Layout


class _Anchor:
    """The field `anchor`: one `Embeddings` or several are assigned, one is read."""

    def __get__(self, pairs: Pairs | None, owner: type) -> Embeddings:
        if pairs is None:
            raise AttributeError("anchor")  # the field has no default
        # Not cached: a copy made under `no_grad` would have no gradient later.
        return concatenate(pairs.anchor_parts)

    def __set__(self, pairs: Pairs, given: Embeddings | Sequence[Embeddings]) -> None:
        object.__setattr__(pairs, "anchor_parts", (given,) if isinstance(given, Embeddings) else tuple(given))


@dataclass(frozen=True, eq=False)
class Pairs:
    r"""N anchors and their M candidates; each anchor's row is reduced to a few numbers.

    ========== ==========================================================================================
    relation   of anchor i and candidate j
    ========== ==========================================================================================
    itself     same sample and same view (also a copy of it): never a candidate
    ignored    same sample, remembered: neither positive nor negative; also the pairs that a rule of `ignoring` names
    positive   same group, and none of the above
    negative   another group
    ========== ==========================================================================================

    Every reduction returns (N,), or (H, N) for H heads, with gradient. Over no candidates it is 0 (a logsumexp:
    `finfo.min / 2`) with zero gradient. Arguments that reductions share:

    * `scale`, `log_weight`, `weight`: a number; a tensor that spans at most one of N and M: (N, 1), (1, M), with heads
      also (H, 1, 1), (H, N, 1) or (H, 1, M); or a PairFunction, a module `(anchor, candidate) -> (n, m)` or
      `(H, n, m)`. They may be learnable.
    * `over`: "positive", "negative", "remembered" (negatives that come from a memory) or "all" (positive + negative).
    * `among`: (M,) bool, only these candidates.
    * `above`: (N,) or (H, N), only similarities >= it; or a `Kth` of these pairs, which is computed first.
    * `rows`: (N,) bool, only these anchors; the others have no candidates.

    Args:
        anchor: N embeddings; the rows. Several `Embeddings`, one per view, are read as one: `pairs.anchor` is a
            concatenated copy, `pairs.anchor_parts` are the originals. (`dataclasses.replace` passes the copy: results
            stay the same, but each similarity is then computed twice.)
        candidates: M embeddings in several parts: one per view, in view order, then the extras. If the first parts are
            the same objects as the anchors, each similarity is computed once for both directions.
        across: True if only candidates of another view than the anchor's count (CLIP, SigLIP, MoCo v3).
        views: how many of the candidates' parts are views; the rest are extras. None: all parts are views.
        rules: set by `ignoring`.

    Example:
        >>> index = torch.arange(4)
        >>> a, b = (Embeddings(normalise(torch.randn(4, 8)), index, index, index * 0 + v) for v in (0, 1))
        >>> pairs = Pairs([a, b], [a, b])
        >>> loss = pairs.logsumexp(10.0, over="all") - 10.0 * pairs.mean(over="positive")
        >>> loss.shape
        torch.Size([8])
    """

    anchor: _Anchor = _Anchor()
    candidates: Sequence[Embeddings] = ()
    across: bool = False
    views: int | None = None
    rules: tuple[tuple[Rule, tuple[Tensor, ...]], ...] = ()
    anchor_parts: tuple[Embeddings, ...] = field(init=False, repr=False)

    def __len__(self) -> int:
        return sum(len(part) for part in self.anchor_parts)

    @property
    def view(self) -> Tensor:
        """(N,) int64, the views of the anchors; `pairs.anchor` would copy their vectors too."""
        return torch.cat([part.view for part in self.anchor_parts])

    @property
    def layout(self) -> Layout:
        """The pairs of each relation, found from the identities when a reduction first needs them."""
        # torch.compile cannot trace `cached_property` in Python 3.11; a compiled graph reads no identities anyhow.
        return self._new_layout() if torch.compiler.is_compiling() else self._layout

    @cached_property
    def _layout(self) -> Layout:
        return self._new_layout()

    def _new_layout(self) -> Layout:
        return Layout(self.anchor_parts, tuple(self.candidates), self.across, self.rules)

    def logsumexp(
        self,
        scale: PairValue,
        over: Relation,
        *,
        among: Tensor | None = None,
        log_weight: PairValue | None = None,
        above: Tensor | Kth | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute log sum_j exp(scale * s_ij + log_weight_ij)."""
        return self.reduce(LogSumExp(scale, over, among, log_weight, above, rows))[0]

    def mean(
        self,
        over: Relation,
        *,
        among: Tensor | None = None,
        weight: PairValue | str | None = None,
        above: Tensor | Kth | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute sum_j w_ij s_ij / sum_j w_ij; `weight="reference"` is (<u_i, u_j> + 1) / 2."""
        return self.reduce(Mean(over, among, weight, above, rows))[0]

    def soft_mean(
        self,
        scale: PairValue,
        over: Relation,
        *,
        among: Tensor | None = None,
        detach: bool = False,
        above: Tensor | Kth | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute sum_j p_ij s_ij with p = softmax_j(scale * s_ij); `detach` treats p as a constant in the gradient."""
        return self.reduce(SoftMean(scale, over, among, detach, above, rows))[0]

    def softplus_sum(
        self,
        scale: PairValue,
        bias: float | Tensor,
        over: Relation,
        *,
        among: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute sum_j log(1 + exp(scale * s_ij + bias_i)); bias: a number, (N,) or (H, N), differentiable."""
        return self.reduce(SoftplusSum(scale, bias, over, among, rows))[0]

    def topk(self, k: int, over: Relation, *, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the k largest similarities, (N, k) with gradient, and the candidates' indices (-1 where fewer)."""
        return reductions.topk(self.layout, k, over, among)

    def kth(self, k: int | Tensor, over: Relation, *, among: Tensor | None = None) -> Tensor:
        """Return the k-th largest similarity as a threshold, without gradient; k: a number, (N,) or (H, N)."""
        return self.reduce(Kth(k, over, among))[0]

    def count(
        self,
        over: Relation,
        *,
        among: Tensor | None = None,
        above: Tensor | Kth | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Count the candidates, int64."""
        return self.reduce(Count(over, among, above, rows))[0]

    def reduce(self, *requested: Reduction) -> tuple[Tensor, ...]:
        """Compute several reductions in one pass over the similarities.

        Example:
            >>> index = torch.arange(4)
            >>> a, b = (Embeddings(torch.eye(4), index, index, index * 0 + view) for view in (0, 1))
            >>> pairs = Pairs(a, [b])
            >>> repel, attract = pairs.reduce(LogSumExp(10.0, "all"), Mean("positive"))
        """
        return reductions.reduce(self.layout, requested)

    def ignoring(self, rule: Rule, *per_anchor: Tensor) -> Pairs:
        """Return the same pairs without the negatives that `rule` names: false-negative control, for any loss.

        Args:
            rule: `rule(anchor, candidate, similarity, *rows) -> bool tile`, on two `Embeddings` and their (n, m)
                similarities; True = ignored. It must depend on each anchor and its candidates only.
            *per_anchor: (N,) each; the rule receives the rows of its anchors, as (n, 1).
        """
        return replace(self, anchor=self.anchor_parts, rules=(*self.rules, (rule, per_anchor)))

    def without_rules(self) -> Pairs:
        """Return the same pairs without the rules of `ignoring`."""
        return replace(self, anchor=self.anchor_parts, rules=())

    def block(self, rows: slice) -> Pairs:
        """Return the same candidates for some of the anchors."""
        rules = tuple((rule, tuple(values[rows] for values in per_anchor)) for rule, per_anchor in self.rules)
        return replace(self, anchor=self.anchor[rows], rules=rules)

    def detach(self) -> Pairs:
        """Return the same pairs without the autograd history of their embeddings."""
        own = {id(part): part.detach() for part in (*self.anchor_parts, *self.candidates)}
        anchor, candidates = ([own[id(part)] for part in parts] for parts in (self.anchor_parts, self.candidates))
        return replace(self, anchor=anchor, candidates=candidates)

    @property
    def similarity(self) -> Tensor:
        """(N, M) or (H, N, M) inner products; only for a loss with `reads_similarity = True`."""
        return reductions.dense.similarity(self.layout)

    @property
    def positive(self) -> Tensor:
        """(N, M) bool; only for a loss with `reads_similarity = True`."""
        return self.relation("positive")

    @property
    def negative(self) -> Tensor:
        """(N, M) bool, or (H, N, M) where a rule ignores per head; only for a loss with `reads_similarity = True`."""
        return self.relation("negative")

    @property
    def reference_weight(self) -> Tensor:
        """(N, M), (<u_i, u_j> + 1) / 2 of the reference vectors, without gradient."""
        return reductions.dense.reference_weight(self.layout)

    def relation(self, over: Relation) -> Tensor:
        """Return (N, M) bool, or (H, N, M): True where a candidate is in the relation `over` to an anchor."""
        return reductions.dense.relation(self.layout, over)


def all_pairs(*views: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair every view with every view of all processes: SimCLR, SupCon. The anchors are this process's own.

    Example:
        >>> index = torch.arange(4)
        >>> a, b = (Embeddings(torch.eye(4), index, index, torch.full_like(index, view)) for view in (0, 1))
        >>> all_pairs(a, b).count("negative")
        tensor([6, 6, 6, 6, 6, 6, 6, 6])
    """
    return Pairs(views, (*gather_all(views), *extra), views=len(views))


def cross_pairs(a: Embeddings, b: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair the anchors `a` with the candidates `b` of all processes: MoCo, one side of CLIP.

    Example:
        >>> index = torch.arange(4)
        >>> a, b = (Embeddings(torch.eye(4), index, index, torch.full_like(index, view)) for view in (0, 1))
        >>> cross_pairs(a, b).count("negative")
        tensor([3, 3, 3, 3])
    """
    return Pairs(a, (b.gathered(), *extra), across=True, views=1)


def two_sided(a: Embeddings, b: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair `a` with `b` and `b` with `a`, over all processes: CLIP, in one symmetric pass.

    Example:
        >>> index = torch.arange(4)
        >>> a, b = (Embeddings(torch.eye(4), index, index, torch.full_like(index, view)) for view in (0, 1))
        >>> two_sided(a, b).count("negative")
        tensor([3, 3, 3, 3, 3, 3, 3, 3])
    """
    return Pairs((a, b), (*gather_all([a, b]), *extra), across=True, views=2)
