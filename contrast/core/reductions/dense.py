"""The backend `dense`: every similarity in one (N, M) matrix. The reference for the other backends, and for reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from contrast.core.autograd import product
from contrast.core.embeddings import Embeddings, concatenate
from contrast.core.reductions import layout as layouts
from contrast.core.reductions.formulas import empty_logsumexp, softplus
from contrast.core.reductions.kinds import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    Reduction,
    Relation,
    SoftMean,
    SoftplusSum,
    below,
    with_thresholds,
)
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.pair_functions import averaged


def reduce(layout: Layout, reductions: Sequence[Reduction]) -> tuple[Tensor, ...]:
    """Compute each reduction of each anchor's row, (N,) or (H, N)."""
    pairs = _AllPairs(layout)
    resolved = with_thresholds(reductions, lambda kths: [_kth(pairs, kth) for kth in kths])
    return tuple(_REDUCE[type(reduction)](pairs, reduction) for reduction in resolved)


def topk(layout: Layout, k: int, over: Relation, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the k largest similarities of each row, with gradient, and the indices of their candidates.

    Where a row has fewer than k, its last values are 0 and their indices -1.
    """
    pairs = _AllPairs(layout)
    s = pairs.s.masked_fill(~pairs.counts(Count(over, among)), -torch.inf)
    values, indices = F.pad(s, (0, max(k - s.shape[-1], 0)), value=-torch.inf).topk(k, dim=-1)
    missing = values == -torch.inf
    return values.masked_fill(missing, 0), indices.masked_fill(missing, -1)


def similarity(layout: Layout) -> Tensor:
    """Compute the inner products, (N, M) or (H, N, M)."""
    vectors = dict(zip(map(id, layout.sources), layout.vectors, strict=True))
    x = torch.cat([vectors[id(part)] for part in layout.anchors], dim=-2)
    return torch.cat([product(x, vectors[id(part)]) for part in layout.candidates], dim=-1)


def relation(layout: Layout, over: Relation) -> Tensor:
    """Return (N, M) bool, or (H, N, M): True where a candidate is in the relation `over` to an anchor."""
    anchor = concatenate(layout.anchors)

    def of_part(part: Embeddings) -> Tensor:
        s = product(anchor.z, part.z) if layout.rules else None
        return layouts.relation(anchor, part, over, layout.across, layout.rules, s)

    return torch.cat([of_part(part) for part in layout.candidates], dim=-1)


def reference_weight(layout: Layout) -> Tensor:
    """Compute (<u_i, u_j> + 1) / 2 of the reference vectors, (N, M)."""
    layout.check_references()
    u, v = (
        torch.cat([part.reference for part in parts if part.reference is not None])
        for parts in (layout.anchors, layout.candidates)
    )
    return (u @ v.T + 1) / 2


class _AllPairs:
    """The similarities of all pairs, with the masks and arguments of reductions at these pairs."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.s = layout, similarity(layout)

    def counts(self, reduction: Any) -> Tensor:
        """Return bool, (N, M) or (H, N, M): the pairs that count in a reduction."""
        counts = relation(self.layout, reduction.over)
        if reduction.among is not None:
            counts = counts & reduction.among
        if getattr(reduction, "rows", None) is not None:
            counts = counts & reduction.rows.unsqueeze(-1)
        above = getattr(reduction, "above", None)
        return counts if above is None else counts & (self.s >= above.unsqueeze(-1))

    def value(self, value: Any) -> Any:
        """Return an argument at these pairs: a number, or a tensor that broadcasts over the similarities."""
        if isinstance(value, str):
            return reference_weight(self.layout)
        if not isinstance(value, nn.Module):
            return value
        anchor = concatenate(self.layout.anchors)
        parameters = {name: averaged(parameter) for name, parameter in value.named_parameters()}
        tiles = [functional_call(value, parameters, (anchor, part)) for part in self.layout.candidates]
        return torch.cat(tiles, dim=-1).to(self.s.dtype)


def _exponents(pairs: _AllPairs, reduction: LogSumExp | SoftMean) -> tuple[Tensor, Tensor]:
    """Return the exponents, -inf where a pair does not count, and which rows are empty; these have exponents of 0."""
    exponents = pairs.value(reduction.scale) * pairs.s
    if isinstance(reduction, LogSumExp) and reduction.log_weight is not None:
        exponents = exponents + pairs.value(reduction.log_weight)
    counts = pairs.counts(reduction)
    exponents = exponents.masked_fill(~counts, -torch.inf)
    empty = (exponents == -torch.inf).all(dim=-1, keepdim=True)
    return exponents.masked_fill(empty, 0), empty.squeeze(-1)


def _logsumexp(pairs: _AllPairs, reduction: LogSumExp) -> Tensor:
    exponents, empty = _exponents(pairs, reduction)
    value = torch.logsumexp(exponents, dim=-1) if exponents.shape[-1] else exponents.sum(dim=-1)
    return value.masked_fill(empty, empty_logsumexp(value.dtype))


def _soft_mean(pairs: _AllPairs, reduction: SoftMean) -> Tensor:
    exponents, empty = _exponents(pairs, reduction)
    weight = torch.softmax(exponents, dim=-1)
    return ((weight.detach() if reduction.detach else weight) * pairs.s).sum(dim=-1).masked_fill(empty, 0)


def _mean(pairs: _AllPairs, reduction: Mean) -> Tensor:
    weight = 1.0 if reduction.weight is None else pairs.value(reduction.weight)
    weight = torch.as_tensor(weight, dtype=pairs.s.dtype, device=pairs.s.device) * pairs.counts(reduction)
    mass = weight.sum(dim=-1)
    return (weight * pairs.s).sum(dim=-1) / mass.where(mass != 0, 1)


def _softplus_sum(pairs: _AllPairs, reduction: SoftplusSum) -> Tensor:
    bias = reduction.bias
    if isinstance(bias, Tensor) and bias.ndim:
        bias = bias.unsqueeze(-1)
    terms = softplus(pairs.value(reduction.scale) * pairs.s + bias)
    return terms.masked_fill(~pairs.counts(reduction), 0).sum(dim=-1)


def _kth(pairs: _AllPairs, reduction: Kth) -> Tensor:
    counts = pairs.counts(reduction)
    number = counts.sum(dim=-1)
    ordered = pairs.s.detach().masked_fill(~counts, -torch.inf).sort(dim=-1, descending=True).values
    if not ordered.shape[-1]:
        return ordered.sum(dim=-1)
    index = (torch.minimum(torch.as_tensor(reduction.k, device=number.device), number) - 1).clamp(min=0)
    index = index.expand(ordered.shape[:-1]).unsqueeze(-1)
    longest = max(torch.linalg.vector_norm(part.z, dim=-1).max() for part in pairs.layout.candidates if len(part))
    reach = torch.linalg.vector_norm(concatenate(pairs.layout.anchors).z, dim=-1) * longest
    return below(ordered.gather(-1, index).squeeze(-1), reach.detach()).masked_fill(number == 0, 0)


def _count(pairs: _AllPairs, reduction: Count) -> Tensor:
    counts, layout = pairs.counts(reduction).sum(dim=-1), pairs.layout
    return counts if layout.same_count_per_head(reduction.over, reduction.above) else counts.expand(*layout.heads, -1)


_REDUCE: dict[type, Callable[..., Tensor]] = {
    LogSumExp: _logsumexp,
    Mean: _mean,
    SoftMean: _soft_mean,
    SoftplusSum: _softplus_sum,
    Kth: _kth,
    Count: _count,
}
