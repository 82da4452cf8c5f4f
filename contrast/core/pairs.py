"""Who is whose positive, and the row reductions from which losses are made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from contrast.core import reductions
from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings, concatenate, gather_all
from contrast.core.reductions import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    PairValue,
    Reduction,
    Relation,
    SoftMean,
    SoftplusSum,
    sweep,
)
from contrast.core.reductions import operator as one_operator
from contrast.core.reductions.identity import Identity, identify
from contrast.core.reductions.work import saved

Rule = Callable[..., Tensor]
"""rule(anchor, candidate, similarity, *rows of per_anchor) -> bool tile, True = leave this negative out."""


@dataclass(frozen=True, eq=False)
class Pairs:
    r"""N anchors and their M candidates; each anchor's row is reduced to a few numbers.

    ========== ==========================================================================================
    relation   of anchor i and candidate j
    ========== ==========================================================================================
    itself     same sample and same view (also a copy of it): never a candidate
    ignored    same sample, remembered: neither positive nor negative; so is what a rule of `ignoring` names
    positive   same group, and none of the above
    negative   another group
    ========== ==========================================================================================

    Every reduction gives (N,), or (H, N) for H heads, with gradient. Over nothing it is 0 (a logsumexp:
    `finfo.min / 2`) with zero gradient. Arguments that reductions share:

    * `scale`, `log_weight`, `weight`: a number; a tensor that spans at most one of N and M: (N, 1), (1, M),
      (H, 1, 1); or a PairFunction, a module `(anchor, candidate) -> (n, m)` or `(H, n, m)`. They may be learnable.
    * `over`: "positive", "negative", "remembered" (negatives that come from a memory) or "all" (positive + negative).
    * `among`: (M,) bool, only these candidates.
    * `above`: (N,) or (H, N), only similarities >= it; or a `Kth` of these pairs, which is found on the way.
    * `rows`: (N,) bool, only these anchors; the others have no candidates.

    Args:
        anchor: N embeddings; the rows.
        candidates: parts, never copied together: one a view, in view order, then the extras.
        across: whether only candidates of another view than the anchor's count (CLIP, SigLIP, MoCo v3).
        views: how many of the parts are views; the rest are extras. All of them where it is not given.
        rules: what `ignoring` added.
    """

    anchor: Embeddings
    candidates: Sequence[Embeddings]
    across: bool = False
    views: int | None = None
    rules: tuple[tuple[Rule, tuple[Tensor, ...]], ...] = ()

    def __len__(self) -> int:
        return len(self.anchor)

    @cached_property
    def identity(self) -> Identity:
        """What the identities say of all pairs, for the reductions."""
        return identify(self.anchor, self.candidates, self.across)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Give a tensor that the identities alone decide; what is known of them without looking makes it only once.

        Args:
            key: names it, among all that is made of identities.
            make: makes it; never written to afterwards.
        """
        if self.rules or torch.compiler.is_compiling():
            return make()
        return self.identity.once(key, make)

    @cached_property
    def mirrored(self) -> int:
        """How many of the first parts are, one after the other, the anchors themselves; 0 where they are not."""
        parts = self.anchor.parts
        same = len(parts) <= len(self.candidates) and all(map(operator.is_, parts, self.candidates))
        return len(parts) if same else 0

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
        """Give log sum_j exp(scale * s_ij + log_weight_ij)."""
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
        """Give sum_j w_ij s_ij / sum_j w_ij; `weight="reference"` stands for (<u_i, u_j> + 1) / 2."""
        if isinstance(weight, str) and weight != "reference":
            raise ValueError(f"weight is 'reference', a number, a tensor or a PairFunction; got {weight!r}.")
        return self.reduce(Mean(over, among, weight, above, rows))[0]  # type: ignore[arg-type]

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
        """Give sum_j p_ij s_ij with p = softmax_j(scale * s_ij); `detach` takes the gradient out of p."""
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
        """Give sum_j log(1 + exp(scale * s_ij + bias_i)); bias: a number or (N,), differentiable."""
        return self.reduce(SoftplusSum(scale, bias, over, among, rows))[0]

    def topk(self, k: int, over: Relation, *, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the k largest similarities, (N, k) with gradient, and their candidates' positions (-1 for none)."""
        return reductions.topk(self, k, over, among)

    def kth(self, k: int | Tensor, over: Relation, *, among: Tensor | None = None) -> Tensor:
        """Give the k-th largest similarity as a threshold, without gradient; k: a number, (N,) or (H, N)."""
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

    def reduce(self, *asked: Reduction) -> tuple[Tensor, ...]:
        """Give several reductions from one pass over the similarities, in the order asked."""
        return reductions.reduce(self, asked)

    def ignoring(self, rule: Rule, *per_anchor: Tensor) -> Pairs:
        """Leave out the negatives that `rule` names: false-negative control, for any loss.

        Args:
            rule: `rule(anchor, candidate, similarity, *rows) -> bool tile`, on two `Embeddings` and their (n, m)
                similarities; True = ignored. It must depend on each anchor and its candidates only.
            *per_anchor: (N,) each; the rule is given the rows that belong to its anchors, as (n, 1).
        """
        return replace(self, rules=(*self.rules, (rule, per_anchor)))

    def block(self, rows: slice) -> Pairs:
        """Give the same candidates for some of the anchors."""
        rules = tuple((rule, tuple(values[rows] for values in per_anchor)) for rule, per_anchor in self.rules)
        return replace(self, anchor=self.anchor[rows], rules=rules)

    @property
    def similarity(self) -> Tensor:
        """(N, M) or (H, N, M) inner products; only for a loss that says `reads_similarity = True`."""
        return torch.cat([_similarity(self.anchor, part) for part in self.candidates], dim=-1)

    @property
    def positive(self) -> Tensor:
        """(N, M) bool; only for a loss that says `reads_similarity = True`."""
        return self.relation("positive")

    @property
    def negative(self) -> Tensor:
        """(N, M) bool, or (H, N, M) where a rule ignores head by head; for a loss with `reads_similarity = True`."""
        return self.relation("negative")

    @property
    def reference_weight(self) -> Tensor:
        """(N, M), (<u_i, u_j> + 1) / 2 of the reference vectors, without gradient."""
        if self.anchor.reference is None or not all(part.refers for part in self.candidates):
            raise ValueError("weight 'reference' needs the vectors of a frozen tower: give the loss reference=(N, R).")
        references = [part.reference for part in self.candidates if part.reference is not None]
        return (self.anchor.reference @ torch.cat(references).T + 1) / 2

    def relation(self, over: Relation) -> Tensor:
        """Give (N, M) bool, or (H, N, M): which candidates stand in the relation `over` to which anchor."""
        return torch.cat([self._relation(over, part) for part in self.candidates], dim=-1)

    def _relation(self, over: Relation, candidate: Embeddings) -> Tensor:
        anchor = self.anchor
        same_sample = anchor.sample[:, None] == candidate.sample
        same_group = anchor.group[:, None] == candidate.group
        same_view = anchor.view[:, None] == candidate.view
        remembered = candidate.view == REMEMBERED
        eligible = ~(same_sample & (same_view | remembered))
        eligible &= (anchor.view[:, None] != PADDING) & (candidate.view != PADDING)
        if self.across:
            eligible &= ~same_view
        if over == "positive":
            return eligible & same_group
        negative = eligible & ~same_group
        for rule, per_anchor in self.rules:
            rows = [values.unsqueeze(-1) for values in per_anchor]
            with torch.no_grad():
                negative = negative & ~rule(anchor, candidate, _similarity(anchor, candidate), *rows)
        if over == "negative":
            return negative
        if over == "remembered":
            return negative & remembered
        if over == "all":
            return negative | (eligible & same_group)
        raise ValueError(f"over is 'positive', 'negative', 'remembered' or 'all'; got {over!r}.")


def _similarity(anchor: Embeddings, candidate: Embeddings) -> Tensor:
    return product(anchor.z, candidate.z)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Give a b^T, (..., n, m), in full precision also where `backward()` is called inside an autocast block."""
    function = _ProductOfTransforms if torch._C._are_functorch_transforms_active() else _Product
    result: Tensor = function.apply(a, b)
    return result


class _Product(torch.autograd.Function):
    """a b^T, in full precision also where `backward()` is called inside an autocast block."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b.transpose(-2, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gradient, (a, b) = gradients[0], saved(ctx)
        with torch.autocast(gradient.device.type, enabled=False):
            to_a = (gradient @ b).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
            to_b = (gradient.transpose(-2, -1) @ a).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return to_a, to_b


class _ProductOfTransforms(_Product):
    """The same inside torch.func, which wants the context apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return a @ b.transpose(-2, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)


def all_pairs(*views: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair every view with every view of all processes: SimCLR, SupCon. The anchors are this process's own."""
    return Pairs(concatenate(views), (*gather_all(views), *extra), views=len(views))


def cross_pairs(a: Embeddings, b: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair the anchors `a` with the candidates `b` of all processes: MoCo, one side of CLIP."""
    return Pairs(a, (b.gathered(), *extra), across=True, views=1)


def two_sided(a: Embeddings, b: Embeddings, extra: Sequence[Embeddings] = ()) -> Pairs:
    """Pair `a` with `b` and `b` with `a`, over all processes: CLIP, in one symmetric sweep."""
    return Pairs(concatenate([a, b]), (*gather_all([a, b]), *extra), across=True, views=2)


one_operator.register(sweep.prepared, Pairs)
