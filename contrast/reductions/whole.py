"""The way of small sizes: one tile that holds every similarity, with as few operations as can be.

Below a few hundred embeddings the time of a loss is that of starting its operations, so masks are kept from call to
call, and what the forward pass computed is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from contrast.embeddings import PADDING, REMEMBERED
from contrast.reductions.asked import Count, Kth, LogSumExp, Mean, Relation, SoftMean, SoftplusSum, arguments
from contrast.reductions.shares import Arguments, logits, shares, softplus
from contrast.reductions.thresholds import kth_largest
from contrast.reductions.work import Gradients, Work, nothing


class Whole:
    """All reductions of a small call.

    Args:
        work: the whole call.
        numbers: which of its reductions.
    """

    def __init__(self, work: Work, numbers: list[int]) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]

    @staticmethod
    def accepts(work: Work) -> bool:
        """Say whether every reduction has numbers and tensors for arguments, and no rule decides who counts."""
        return not work.rules and all(
            not any(isinstance(value, nn.Module | str) for value in arguments(asked).values()) for asked in work.asked
        )

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each; kept are the similarities and a normaliser of each."""
        work = self.work
        s = work.x @ self._candidates().mT
        outputs, saved = [], [s]
        for asked in self.asked:
            output, normaliser = self._reduce(asked, s)
            outputs.append(output)
            saved.append(normaliser)
        return outputs, saved

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients."""
        (s, *normalisers), total = saved, None
        for number, asked, output, g, normaliser in zip(
            self.numbers, self.asked, outputs, upstream, normalisers, strict=True
        ):
            if isinstance(asked, Count | Kth):
                continue
            plain = getattr(asked, "above", None) is None
            if plain and isinstance(asked, Mean) and asked.weight is None:
                to_s = self._share_of_mean(asked) * g.unsqueeze(-1)
            elif (
                plain
                and isinstance(asked, LogSumExp)
                and asked.log_weight is None
                and isinstance(asked.scale, float | int)
            ):
                to_s = self._share_of_softmax(asked, s, g, normaliser)
            else:
                counts, given = self._counting(asked, s), self._given(asked)
                to_s, to_arguments = shares(asked, s, counts, given, _spread, g, output, normaliser)
                for name, share in to_arguments.items():
                    if (number, name) in into.arguments:
                        self._learn(into.arguments[number, name], share, name)
            total = to_s if total is None else total.add_(to_s)
        if total is None:
            return
        if into.anchor is not None:
            into.anchor += total @ self._candidates()
        for part, to_part in enumerate(into.parts):
            if to_part is not None:
                columns = slice(self.work.starts[part], self.work.starts[part + 1])
                to_part += (total[..., columns].mT @ self.work.x).sum_to_size(to_part.shape)

    def _share_of_softmax(self, asked: Any, s: Tensor, g: Tensor, normaliser: Tensor) -> Tensor:
        """Give dL/ds of a log-sum-exp with a number for a scale, in fewer steps than the general way."""
        p = torch.where(self._counting(asked), s * asked.scale - normaliser.unsqueeze(-1), -torch.inf).exp_()
        return p.mul_((g * asked.scale).unsqueeze(-1))

    def _candidates(self) -> Tensor:
        work = self.work
        own = [work.x] if work.mirrored else []
        parts = [*own, *work.parts[work.mirrored :]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.expand(*work.heads, *part.shape[-2:]) for part in parts], dim=-2)

    def _counting(self, asked: Any, s: Tensor | None = None) -> Tensor:
        """Give (N, M) bool, or (H, N, M): who counts."""
        kept = self.work.identity.kept
        key = ("counting", asked.over)
        if key not in kept:
            kept[key] = self._relation(asked.over)
        counts: Tensor = kept[key]
        if asked.among is not None:
            counts = counts & asked.among
        if getattr(asked, "rows", None) is not None:
            counts = counts & asked.rows.unsqueeze(-1)
        if s is not None and getattr(asked, "above", None) is not None:
            counts = counts & (s >= asked.above.unsqueeze(-1))
        return counts

    def _relation(self, over: Relation) -> Tensor:
        """Give (N, M) bool: who stands in this relation; all relations come of two masks."""
        identity, kept = self.work.identity, self.work.identity.kept
        if "eligible" not in kept:
            view = identity.anchor_view[:, None]
            remembered = identity.view == REMEMBERED
            same_view = view == identity.view
            eligible = ~((identity.anchor_sample[:, None] == identity.sample) & (same_view | remembered))
            eligible &= (view != PADDING) & (identity.view != PADDING)
            kept["eligible"] = eligible & ~same_view if identity.across else eligible
            kept["same group"] = identity.anchor_group[:, None] == identity.group
        allowed: Tensor = kept["eligible"]
        same_group: Tensor = kept["same group"]
        if over == "all":
            return allowed
        if over == "positive":
            return allowed & same_group
        negative = allowed & ~same_group
        return negative if over == "negative" else negative & (identity.view == REMEMBERED)

    def _share_of_mean(self, asked: Mean) -> Tensor:
        """Give (N, M): what each candidate has of the mean."""
        kept, plain = self.work.identity.kept, asked.among is None and asked.rows is None
        key = ("share", asked.over, self.work.x.dtype)
        if plain and key in kept:
            known: Tensor = kept[key]
            return known
        counts = self._counting(asked)
        share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1).to(self.work.x.dtype)
        if plain:
            kept[key] = share
        return share

    def _given(self, asked: Any) -> Arguments:
        given = {name: value for name, value in arguments(asked).items() if value is not None}
        if isinstance(given.get("bias"), Tensor) and given["bias"].ndim:
            given["bias"] = given["bias"].unsqueeze(-1)
        return Arguments(**given)

    def _reduce(self, asked: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(asked, Mean) and asked.weight is None and asked.above is None:
            return (self._share_of_mean(asked) * s).sum(dim=-1), s.new_zeros(0)
        counts = self._counting(asked, s)
        if isinstance(asked, Count):
            return counts.sum(dim=-1), s.new_zeros(0)
        if isinstance(asked, Kth):
            found = counts.sum(dim=-1)
            k = torch.minimum(torch.as_tensor(asked.k, device=s.device), found).clamp(min=1)
            ordered = torch.where(counts, s, -torch.inf)
            return kth_largest(ordered, k).masked_fill((found == 0).expand(s.shape[:-1]), 0), s.new_zeros(0)
        given = self._given(asked)
        if isinstance(asked, Mean):
            weight = torch.where(counts, torch.as_tensor(given.weight, dtype=s.dtype, device=s.device), 0)
            mass = weight.sum(dim=-1)
            mass = mass.where(mass != 0, 1)
            return (weight * s).sum(dim=-1) / mass, mass
        exponent = logits(s, given)
        if isinstance(asked, SoftplusSum):
            return torch.where(counts, softplus(exponent), 0).sum(dim=-1), s.new_zeros(0)
        exponent = torch.where(counts, exponent, -torch.inf)
        value = torch.logsumexp(exponent, dim=-1) if s.shape[-1] else exponent.sum(dim=-1) - torch.inf
        if isinstance(asked, LogSumExp) and work_lacks_nobody(self.work, asked):
            return value, value
        normaliser = torch.where(value == -torch.inf, torch.inf, value)
        if isinstance(asked, SoftMean):
            p = (exponent - normaliser.unsqueeze(-1)).exp()
            return (p * s).sum(dim=-1), normaliser
        return value.clamp(min=nothing(s.dtype)), normaliser

    def _learn(self, to_argument: Tensor, share: Tensor, name: str) -> None:
        if name == "bias":
            share = share.sum(dim=-1)
        shape = (1,) * (share.ndim - to_argument.ndim) + tuple(to_argument.shape)
        to_argument += share.sum_to_size(shape).reshape(to_argument.shape)


def work_lacks_nobody(work: Work, asked: LogSumExp) -> bool:
    """Say whether every row is known to have candidates."""
    return asked.among is None and asked.rows is None and asked.above is None and work.identity.nobody_lacks(asked.over)


def _spread(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)
