"""Each anchor's only positive, where it is known to have one: what is asked of it follows from its similarity.

A loss asks for its positives more than once: a log-sum-exp first, then a softplus that reads it. Their similarities
come with the first call, so that the second is a few operations on (N,) and needs no way back of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contrast.core.reductions.asked import Count, Kth, LogSumExp, Mean, Reduction, SoftplusSum, arguments
from contrast.core.reductions.shares import scalar, softplus
from contrast.core.reductions.work import Once

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

NEAR = Mean("positive")
"""The similarity of the only positive."""


def only(asked: Any, pairs: Pairs) -> bool:
    """Say whether a reduction is a function of the similarity of an anchor's only positive and of numbers."""
    if asked.over != "positive" or not isinstance(asked, LogSumExp | Mean | SoftplusSum):
        return False
    if any(getattr(asked, name, None) is not None for name in ("among", "rows", "above", "weight", "log_weight")):
        return False
    scale = getattr(asked, "scale", 1.0)
    if isinstance(scale, nn.Module) or (isinstance(scale, Tensor) and scale.numel() > 1):
        return False
    return has_one(pairs)


def has_one(pairs: Pairs) -> bool:
    """Say whether each anchor is known to have exactly one positive."""
    identity = pairs.identity
    return identity.canonical and identity.positive is not None and identity.positive.one_each(identity.rows)


def known(pairs: Pairs) -> Tensor | None:
    """Give the similarities that a call about the same pairs has left, (N,) or (H, N); with history where it counts."""
    found: Tensor | None
    found, once = pairs.__dict__.get("near") or _in_matrix(pairs)
    if found is None or (torch.is_grad_enabled() and (once.used or not found.requires_grad)):
        return None
    return found if torch.is_grad_enabled() else found.detach()


def _in_matrix(pairs: Pairs) -> tuple[Tensor | None, Any]:
    """Give them of a matrix with history that a call about the same pairs has left, and whether that is used up."""
    for key, (s, once) in pairs.__dict__.get("live", {}).items():
        flat = pairs.identity.kept.get(("single", key))
        if flat is not None and s.requires_grad:
            return s.flatten(-2).index_select(-1, flat), once
    return None, None


def bare(pairs: Pairs) -> Pairs:
    """Give the same pairs without what is kept here: a call holds them, and would hold its own outputs."""
    made: Pairs | None = pairs.__dict__.get("bare")
    if made is None:
        made = object.__new__(type(pairs))
        made.__dict__.update(pairs.__dict__)
        pairs.__dict__["bare"] = made
    return made


def wanted(pairs: Pairs, asked: Sequence[Reduction], alone: Sequence[bool]) -> bool:
    """Say whether a call should find them too: another will ask, unless this one has what a loss asks of positives."""
    if not torch.is_grad_enabled() or not pairs.anchor.z.requires_grad or not has_one(pairs):
        return False
    if any(isinstance(value, nn.Module) for one in asked for value in arguments(one).values()):
        return False
    served = any(is_alone and not isinstance(one, LogSumExp) for one, is_alone in zip(asked, alone, strict=True))
    return (
        not served
        and all(one.over != "all" for one in asked)
        and not all(isinstance(one, Count | Kth) for one in asked)
    )


def remember(
    pairs: Pairs, asked: Sequence[Reduction], alone: Sequence[bool], found: Sequence[Tensor], once: Once
) -> None:
    """Keep them with the pairs, if they were found."""
    for one, is_alone, output in zip(asked, alone, found, strict=False):
        if is_alone and isinstance(one, Mean):
            pairs.__dict__["near"] = output, once


def of_one(asked: Reduction, near: Tensor) -> Tensor:
    """Give a reduction over one similarity."""
    if isinstance(asked, Mean):
        return near
    assert isinstance(asked, LogSumExp | SoftplusSum)
    value: Tensor = near * scalar(asked.scale)
    return value if isinstance(asked, LogSumExp) else softplus(value + scalar(asked.bias))
