"""What one pair has of a row's gradient: the closed derivatives of every reduction, for tiles and for listed pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.reductions.asked import LogSumExp, Mean, Reduction, SoftMean, SoftplusSum


@dataclass(eq=False)
class Arguments:
    """The arguments of a reduction at some pairs: numbers, or tensors that broadcast over them."""

    scale: float | Tensor = 1.0
    log_weight: float | Tensor = 0.0
    weight: float | Tensor = 1.0
    bias: float | Tensor = 0.0


def logits(s: Tensor, given: Arguments) -> Tensor:
    """Give scale * s + log_weight + bias."""
    made = given.scale * s
    for more in (given.log_weight, given.bias):
        if isinstance(more, Tensor) or more:
            made = made + more
    return made


def shares(
    asked: Reduction,
    s: Tensor,
    counts: Tensor,
    given: Arguments,
    spread: Callable[[Tensor], Tensor],
    upstream: Tensor,
    output: Tensor,
    normaliser: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give dL/ds of each pair, and dL/d(argument) of each pair by the argument's name.

    Args:
        asked: the reduction.
        s: the similarities.
        counts: which pairs count, bool.
        given: its arguments at these pairs.
        spread: makes a number of each row a number of each pair.
        upstream: dL/d(reduction) of each row.
        output: the reduction itself.
        normaliser: what the forward pass kept: a log-sum-exp (inf for an empty row), or a mean's mass.
    """
    g = spread(upstream)
    if isinstance(asked, Mean):
        assert normaliser is not None
        per_mass = torch.where(counts, g / spread(normaliser), 0)
        return per_mass * given.weight, {"weight": per_mass * (s - spread(output))}
    exponent = logits(s, given)
    if isinstance(asked, SoftplusSum):
        to_logit = torch.where(counts, g * torch.sigmoid(exponent), 0)
        return to_logit * given.scale, {"scale": to_logit * s, "bias": to_logit}
    assert normaliser is not None
    p = torch.where(counts, exponent - spread(normaliser), -torch.inf).exp()
    if isinstance(asked, LogSumExp):
        to_logit = g * p
        return to_logit * given.scale, {"scale": to_logit * s, "log_weight": to_logit}
    assert isinstance(asked, SoftMean)
    direct = g * p
    if asked.detach:
        return direct, {"scale": torch.zeros_like(direct)}
    to_logit = direct * (s - spread(output))
    return direct + to_logit * given.scale, {"scale": to_logit * s}


def scalar(value: Any) -> Any:
    """Give a tensor of one number without dimensions, so that it takes part in any shape; all else as it is."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def softplus(x: Tensor) -> Tensor:
    """Give log(1 + e^x); torch calls it x above a threshold whose default of 20 loses digits in float64."""
    return F.softplus(x, threshold=40)


def sum_of_log1p(e: Tensor, dim: int) -> Tensor:
    """Sum log(1 + e) by logarithms of products, kept without their 1: (1 + a)(1 + b) - 1 = a + b + ab."""
    product = e
    for _ in range(3):
        half = product.shape[dim] // 2
        if not half or product.shape[dim] % 2:
            break
        first, second = torch.split(product, half, dim)
        product = torch.addcmul(first + second, first, second)
    total = torch.log1p(product).sum(dim)
    return total if bool(torch.isfinite(total).all()) else torch.log1p(e).sum(dim)
