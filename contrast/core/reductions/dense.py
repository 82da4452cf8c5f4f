"""The dense road: the similarities as one matrix; the reference for every other road, and right for small sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from contrast.core import distributed
from contrast.core.reductions.asked import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    PairValue,
    Reduction,
    Relation,
    SoftMean,
    SoftplusSum,
    arguments,
    settled,
)

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs


def reduce(pairs: Pairs, reductions: Sequence[Reduction]) -> tuple[Tensor, ...]:
    """Give each reduction of each anchor's row, (N,) or (H, N), from one computation of the similarities."""
    for reduction in reductions:
        check(reduction, pairs)
    similarity = pairs.similarity
    reductions = settled(reductions, lambda wanted: [_kth(pairs, similarity, one) for one in wanted])
    return tuple(_DENSE[type(reduction)](pairs, similarity, reduction) for reduction in reductions)


def topk(pairs: Pairs, k: int, over: Relation, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row, with gradient, and the positions of their candidates.

    Where a row has fewer than k, its last values are 0 and their positions -1.
    """
    similarity, counts = pairs.similarity, _counting(pairs, over, among)
    short = max(k - similarity.shape[-1], 0)
    eligible = F.pad(similarity.masked_fill(~counts, -torch.inf), (0, short), value=-torch.inf)
    values, positions = eligible.topk(k, dim=-1)
    missing = values == -torch.inf
    return values.masked_fill(missing, 0), positions.masked_fill(missing, -1)


def _logsumexp(pairs: Pairs, similarity: Tensor, asked: LogSumExp) -> Tensor:
    logits = _value(asked.scale, pairs, similarity) * similarity
    if asked.log_weight is not None:
        logits = logits + _value(asked.log_weight, pairs, similarity)
    counts = _counting(pairs, asked.over, asked.among, similarity, asked.above, asked.rows)
    logits = logits.masked_fill(~counts, -torch.inf)
    empty = (logits == -torch.inf).all(dim=-1)
    logits = logits.masked_fill(empty.unsqueeze(-1), 0)
    nothing = torch.finfo(similarity.dtype).min / 2
    return _logsumexp_rows(logits).masked_fill(empty, nothing)


def _logsumexp_rows(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1) if logits.shape[-1] else logits.sum(dim=-1)


def _mean(pairs: Pairs, similarity: Tensor, asked: Mean) -> Tensor:
    counts = _counting(pairs, asked.over, asked.among, similarity, asked.above, asked.rows)
    if asked.weight is None:
        weight = counts.to(similarity.dtype)
    elif isinstance(asked.weight, str):
        weight = pairs.reference_weight.masked_fill(~counts, 0)
    else:
        weight = torch.as_tensor(_value(asked.weight, pairs, similarity), dtype=similarity.dtype).where(counts, 0)
    mass = weight.sum(dim=-1)
    return (weight * similarity).sum(dim=-1) / mass.where(mass != 0, 1)


def _soft_mean(pairs: Pairs, similarity: Tensor, asked: SoftMean) -> Tensor:
    logits = _value(asked.scale, pairs, similarity) * similarity
    counts = _counting(pairs, asked.over, asked.among, similarity, asked.above, asked.rows)
    logits = logits.masked_fill(~counts, -torch.inf)
    logits = logits.masked_fill(~counts.any(dim=-1, keepdim=True), 0)
    weight = torch.softmax(logits, dim=-1).masked_fill(~counts, 0)
    return ((weight.detach() if asked.detach else weight) * similarity).sum(dim=-1)


def _softplus_sum(pairs: Pairs, similarity: Tensor, asked: SoftplusSum) -> Tensor:
    bias = asked.bias.unsqueeze(-1) if isinstance(asked.bias, Tensor) and asked.bias.ndim else asked.bias
    logits = _value(asked.scale, pairs, similarity) * similarity + bias
    # torch calls softplus(x) x above the threshold; its default of 20 loses digits in float64.
    counts = _counting(pairs, asked.over, asked.among, rows=asked.rows)
    return F.softplus(logits, threshold=40).masked_fill(~counts, 0).sum(dim=-1)


def _kth(pairs: Pairs, similarity: Tensor, asked: Kth) -> Tensor:
    counts = _counting(pairs, asked.over, asked.among)
    ordered = similarity.detach().masked_fill(~counts, -torch.inf).sort(dim=-1, descending=True).values
    found = counts.sum(dim=-1)
    k = torch.as_tensor(asked.k, device=similarity.device)
    position = (torch.minimum(k, found) - 1).clamp(min=0).expand(ordered.shape[:-1])
    if not ordered.shape[-1]:
        return ordered.sum(dim=-1)
    return ordered.gather(-1, position.unsqueeze(-1)).squeeze(-1).masked_fill(found == 0, 0)


def _count(pairs: Pairs, similarity: Tensor, asked: Count) -> Tensor:
    return _counting(pairs, asked.over, asked.among, similarity, asked.above, asked.rows).sum(dim=-1)


_DENSE: dict[type, Callable[..., Tensor]] = {
    LogSumExp: _logsumexp,
    Mean: _mean,
    SoftMean: _soft_mean,
    SoftplusSum: _softplus_sum,
    Kth: _kth,
    Count: _count,
}


def _counting(
    pairs: Pairs,
    over: Relation,
    among: Tensor | None,
    similarity: Tensor | None = None,
    above: Tensor | Kth | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Give (N, M) or (H, N, M) bool: the candidates that count."""
    counts = pairs.relation(over)
    if among is not None:
        counts = counts & among
    if rows is not None:
        counts = counts & rows.unsqueeze(-1)
    if isinstance(above, Tensor) and similarity is not None:
        counts = counts & (similarity >= above.unsqueeze(-1))
    return counts


def _value(value: PairValue, pairs: Pairs, similarity: Tensor) -> float | Tensor:
    if isinstance(value, nn.Module):
        parameters = {name: distributed.shared(parameter) for name, parameter in value.named_parameters()}
        tiles: list[Tensor] = [functional_call(value, parameters, (pairs.anchor, part)) for part in pairs.candidates]
        return torch.cat(tiles, dim=-1).to(similarity.dtype)
    return value


def check(asked: Reduction, pairs: Pairs) -> None:
    """Refuse a relation that is none, references that are missing, an argument that spans both N and M."""
    if asked.over not in ("positive", "negative", "remembered", "all"):
        raise ValueError(f"over is 'positive', 'negative', 'remembered' or 'all'; got {asked.over!r}.")
    for name in ("among", "rows"):
        which = getattr(asked, name, None)
        if which is not None:
            size = len(pairs) if name == "rows" else sum(map(len, pairs.candidates))
            if which.dtype != torch.bool or which.shape != (size,):
                raise ValueError(f"{name} is ({size},) bool; got {which.dtype} of shape {tuple(which.shape)}.")
    if isinstance(asked, Kth):
        _check_places(asked.k, pairs)
    above = getattr(asked, "above", None)
    if isinstance(above, Kth):
        check(above, pairs)
    elif above is not None and not isinstance(above, Tensor):
        raise ValueError(f"above is a tensor of thresholds, (N,) or (H, N), or a Kth; got {above!r}.")
    for name, value in arguments(asked).items():
        if isinstance(value, Tensor):
            if name != "bias" and value.ndim >= 2 and value.shape[-2] > 1 and value.shape[-1] > 1:
                raise ValueError(
                    "a scale, weight or log_weight spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); got the "
                    f"shape {tuple(value.shape)}. For a value of each pair give a PairFunction, a module "
                    "(anchor, candidate) -> tile."
                )
        elif value == "reference" and not all(part.refers for part in (pairs.anchor, *pairs.candidates)):
            raise ValueError("weight 'reference' needs the vectors of a frozen tower: give the loss reference=(N, R).")


def _check_places(k: int | Tensor, pairs: Pairs) -> None:
    """Refuse a k that is no number of candidates, of all anchors or of each."""
    if isinstance(k, Tensor):
        shape = pairs.anchor.z.shape[:-1]
        if k.dtype != torch.int64 or k.shape not in ((), shape, shape[-1:]):
            raise ValueError(f"k is a number, or {tuple(shape)} int64; got {k.dtype} of shape {tuple(k.shape)}.")
    elif not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k is a whole number, 1 or more; got {k!r}.")
