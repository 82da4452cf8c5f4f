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
from contrast.reductions.identity import Identity
from contrast.reductions.shares import Arguments, logits, shares, softplus
from contrast.reductions.thresholds import kth_largest
from contrast.reductions.work import WIDEST, Gradients, Work, nothing


class Whole:
    """All reductions of a small call.

    Args:
        work: the whole call.
        numbers: which of its reductions.
    """

    def __init__(self, work: Work, numbers: list[int]) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        self.scales = [_number(getattr(asked, "scale", 1.0)) for asked in self.asked]
        single = self._single()
        self.single = [single if self._suits(place) else None for place in range(len(self.asked))]

    @staticmethod
    def accepts(work: Work) -> bool:
        """Say whether every reduction has numbers and tensors for arguments, and no rule decides who counts."""
        return not work.rules and not any(
            isinstance(value, nn.Module) for asked in work.asked for value in arguments(asked).values()
        )

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each; kept are the similarities, and two tensors of each."""
        s = self._similarities()
        outputs, saved = [], [s]
        for place in range(len(self.asked)):
            output, *kept = self._reduce(place, self._met(place, s))
            outputs.append(output)
            saved += kept
        return outputs, saved

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients."""
        s, total = saved[0], None
        listed: list[tuple[Tensor, Tensor]] = []
        for place, asked in enumerate(self.asked):
            if isinstance(asked, Count | Kth):
                continue
            first, second = saved[1 + 2 * place : 3 + 2 * place]
            met = self._met(place, s)
            to_s = self._differentiate(place, met, outputs[place], upstream[place], first, second, into)
            single = self.single[place]
            if single is not None:
                listed.append((single, to_s.squeeze(-1)))
            else:
                total = to_s if total is None else total.add_(to_s)
        if listed and total is None:
            total = torch.zeros_like(s)
        for single, to_s in listed:
            assert total is not None
            total.view(*s.shape[:-2], -1).index_add_(-1, single, to_s)
        if total is not None:
            self._send(total, into)

    def _send(self, total: Tensor, into: Gradients) -> None:
        """Add what dL/ds gives the anchors and the candidates."""
        work = self.work
        if into.anchor is not None and work.mirrored == len(work.parts):
            into.anchor += (total + total.mT) @ work.x
            return
        if into.anchor is not None:
            into.anchor += total @ self._candidates()
        for part, to_part in enumerate(into.parts):
            if to_part is not None:
                columns = slice(work.starts[part], work.starts[part + 1])
                to_part += (total[..., columns].mT @ work.x).sum_to_size(to_part.shape)

    def _similarities(self) -> Tensor:
        """Give (N, M) or (H, N, M); the next call about the same pairs finds them."""
        kept = self.work.pairs.__dict__
        known: Tensor | None = kept.get("similarities")
        if known is None:
            known = kept["similarities"] = self.work.x @ self._candidates().mT
        return known

    def _candidates(self) -> Tensor:
        work = self.work
        own = [work.x] if work.mirrored else []
        parts = [*own, *work.parts[work.mirrored :]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.expand(*work.heads, *part.shape[-2:]) for part in parts], dim=-2)

    def _single(self) -> Tensor | None:
        """Give where the positives stand in the flat matrix, (N,), if each anchor is known to have exactly one."""
        identity = self.work.identity
        if not identity.canonical:
            return None
        if "single" not in identity.kept:
            positive = identity.positive
            one = positive is not None and positive.one_each(identity.rows)
            identity.kept["single"] = positive.rows * identity.columns + positive.columns if positive and one else None
        known: Tensor | None = identity.kept["single"]
        return known

    def _suits(self, place: int) -> bool:
        """Say whether a reduction over single positives needs nothing but their similarities."""
        asked = self.asked[place]
        if asked.over != "positive" or asked.among is not None or isinstance(asked, Count | Kth):
            return False
        return self._is_plain(place) and getattr(asked, "above", None) is None

    def _is_plain(self, place: int) -> bool:
        """Say whether the arguments are numbers."""
        asked = self.asked[place]
        if isinstance(asked, Mean):
            return asked.weight is None
        return self.scales[place] is not None and getattr(asked, "log_weight", None) is None

    def _met(self, place: int, s: Tensor) -> Tensor:
        """Give the similarities that a reduction is about: those of single positives, (..., N, 1), or all."""
        single = self.single[place]
        if single is None:
            return s
        return s.view(*s.shape[:-2], -1).index_select(-1, single).unsqueeze(-1)

    def _counting(self, place: int, s: Tensor) -> Tensor | None:
        """Give bool, as the similarities or to be broadcast: who counts; None where all do."""
        asked, kept = self.asked[place], self.work.identity.kept
        if self.single[place] is not None:
            return None if asked.rows is None else asked.rows.unsqueeze(-1)
        key = ("counting", asked.over)
        if key not in kept:
            kept[key] = self._relation(asked.over)
        counts: Tensor = kept[key]
        if asked.among is not None:
            counts = counts & asked.among
        if getattr(asked, "rows", None) is not None:
            counts = counts & asked.rows.unsqueeze(-1)
        if getattr(asked, "above", None) is not None:
            counts = counts & (s >= asked.above.unsqueeze(-1))
        return counts

    def _ones(self, place: int, s: Tensor) -> Tensor | None:
        """Give 1 where a pair counts and 0 where not; None where all do."""
        asked, identity = self.asked[place], self.work.identity
        counts = self._counting(place, s)
        if counts is None:
            return None
        plain: Any = identity.kept.get(("counting", asked.over))
        if counts is not plain:
            return counts
        kept = identity.base.kept if identity.base and asked.over == "all" else identity.kept
        key = ("ones", asked.over, s.dtype)
        if key not in kept:
            kept[key] = plain.to(s.dtype)
        known: Tensor = kept[key]
        return known

    def _relation(self, over: Relation) -> Tensor:
        """Give (N, M) bool: who stands in this relation; all relations come of two masks."""
        identity, kept = self.work.identity, self.work.identity.kept
        allowed = _eligible(identity.base or identity)
        if over == "all":
            return allowed
        if "same group" not in kept:
            kept["same group"] = identity.anchor_group[:, None] == identity.group
        same_group: Tensor = kept["same group"]
        if over == "positive":
            return allowed & same_group
        negative = allowed & ~same_group
        return negative if over == "negative" else negative & (identity.view == REMEMBERED)

    def _given(self, asked: Any) -> Arguments:
        given: dict[str, Any] = {name: value for name, value in arguments(asked).items() if value is not None}
        if isinstance(given.get("bias"), Tensor) and given["bias"].ndim:
            given["bias"] = given["bias"].unsqueeze(-1)
        if isinstance(given.get("weight"), str):
            given["weight"] = self.work.pairs.reference_weight.to(self.work.x.dtype)
        return Arguments(**given)

    def _reduce(self, place: int, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give a reduction, and what its derivative needs."""
        asked, none = self.asked[place], s.new_zeros(0)
        if isinstance(asked, Mean) and asked.weight is None and asked.above is None:
            if self.single[place] is not None:
                alone = s.squeeze(-1)
                return (alone if asked.rows is None else alone * asked.rows), none, none
            share = self._share_of_mean(place, s)
            return (share * s).sum(dim=-1), share, none
        if isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place):
            return self._soft(place, s)
        counts = self._counting(place, s)
        if isinstance(asked, SoftplusSum):
            exponent = logits(s, self._given(asked))
            each = softplus(exponent)
            return (each if counts is None else torch.where(counts, each, 0)).sum(dim=-1), exponent, none
        assert counts is not None
        if isinstance(asked, Count):
            return counts.sum(dim=-1), none, none
        if isinstance(asked, Kth):
            found = counts.sum(dim=-1)
            k = torch.minimum(torch.as_tensor(asked.k, device=s.device), found).clamp(min=1)
            ordered = torch.where(counts, s, -torch.inf)
            return kth_largest(ordered, k).masked_fill((found == 0).expand(s.shape[:-1]), 0), none, none
        given = self._given(asked)
        if isinstance(asked, Mean):
            weight = torch.where(counts, torch.as_tensor(given.weight, dtype=s.dtype, device=s.device), 0)
            mass = weight.sum(dim=-1)
            mass = mass.where(mass != 0, 1)
            return (weight * s).sum(dim=-1) / mass, weight, mass
        exponent = torch.where(counts, logits(s, given), -torch.inf)
        value = torch.logsumexp(exponent, dim=-1) if s.shape[-1] else exponent.sum(dim=-1) - torch.inf
        normaliser = torch.where(value == -torch.inf, torch.inf, value)
        if isinstance(asked, SoftMean):
            p = (exponent - normaliser.unsqueeze(-1)).exp()
            return (p * s).sum(dim=-1), normaliser, none
        return value.clamp(min=nothing(s.dtype)), normaliser, none

    def _soft(self, place: int, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give a log-sum-exp or a soft mean with a number for a scale; kept are exponentials and 1 / their sums."""
        asked, scale = self.asked[place], self.scales[place]
        assert scale is not None
        shift = None
        if self.work.unit and abs(scale) <= WIDEST[s.dtype]:
            e, ones = (s * scale).exp_(), self._ones(place, s)
            if ones is not None:
                e.mul_(ones)
        else:
            counts = self._counting(place, s)
            e = s * scale
            if counts is not None:
                e = torch.where(counts, e, -torch.inf)
            if s.shape[-1]:
                shift = e.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
                e = e.sub_(shift).exp_()
        mass, empty = e.sum(dim=-1), None
        if not work_lacks_nobody(self.work, asked):
            empty = mass == 0
            mass.masked_fill_(empty, torch.inf)
        inverse = mass.reciprocal()
        if isinstance(asked, SoftMean):
            return (e * s).sum(dim=-1).mul_(inverse), e, inverse
        value = mass.log_()
        if shift is not None:
            value += shift.squeeze(-1)
        if empty is not None:
            value.masked_fill_(empty, nothing(s.dtype))
        return value, e, inverse

    def _differentiate(
        self, place: int, s: Tensor, output: Tensor, g: Tensor, first: Tensor, second: Tensor, into: Gradients
    ) -> Tensor:
        """Give dL/ds of a reduction, and add the gradient of its arguments."""
        asked, scale = self.asked[place], self.scales[place]
        if isinstance(asked, Mean) and asked.above is None:
            if self.single[place] is not None:
                return (g if asked.rows is None else g * asked.rows).unsqueeze(-1)
            if asked.weight is None:
                return first * g.unsqueeze(-1)
            if isinstance(asked.weight, str):
                return first * (g / second).unsqueeze(-1)
        if isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place):
            assert scale is not None
            return self._differentiate_soft(place, s, output, g * second, first, into)
        if isinstance(asked, SoftplusSum) and scale is not None:
            to_logit = torch.sigmoid(first).mul_(g.unsqueeze(-1))
            counts = self._ones(place, s)
            if counts is not None:
                to_logit = torch.where(counts, to_logit, 0) if counts.dtype == torch.bool else to_logit.mul_(counts)
            self._learn(into, place, "scale", to_logit, s)
            self._learn(into, place, "bias", to_logit)
            return to_logit.mul_(scale)
        counts, given = self._counting(place, s), self._given(asked)
        assert counts is not None
        normaliser = second if isinstance(asked, Mean) else first
        to_s, to_arguments = shares(asked, s, counts, given, _spread, g, output, normaliser)
        for name, share in to_arguments.items():
            self._learn(into, place, name, share)
        return to_s

    def _differentiate_soft(
        self, place: int, s: Tensor, output: Tensor, g: Tensor, e: Tensor, into: Gradients
    ) -> Tensor:
        """Give dL/ds; `g` is already divided by the mass of the exponentials `e`."""
        asked, scale = self.asked[place], self.scales[place]
        assert scale is not None
        learned = (self.numbers[place], "scale") in into.arguments
        if isinstance(asked, LogSumExp):
            if not learned:
                return e * (g * scale).unsqueeze(-1)
            to_logit = e * g.unsqueeze(-1)
            self._learn(into, place, "scale", to_logit, s)
            return to_logit.mul_(scale)
        assert isinstance(asked, SoftMean)
        if asked.detach:
            return e * g.unsqueeze(-1)
        if learned:
            self._learn(into, place, "scale", e * g.unsqueeze(-1) * (s - output.unsqueeze(-1)), s)
        # p (1 + scale (s - T)) g
        slope = g * scale
        return torch.addcmul((g - slope * output).unsqueeze(-1), s, slope.unsqueeze(-1)).mul_(e)

    def _share_of_mean(self, place: int, s: Tensor) -> Tensor:
        """Give (N, M): what each candidate has of the mean."""
        asked = self.asked[place]
        kept, plain = self.work.identity.kept, asked.among is None and asked.rows is None
        key = ("share", asked.over, s.dtype)
        if plain and key in kept:
            known: Tensor = kept[key]
            return known
        ones = self._ones(place, s)
        assert ones is not None
        ones = ones.to(s.dtype)
        share = ones / ones.sum(dim=-1, keepdim=True).clamp_(min=1)
        if plain:
            kept[key] = share
        return share

    def _learn(self, into: Gradients, place: int, name: str, share: Tensor, factor: Tensor | None = None) -> None:
        """Add the gradient of an argument, the sum of share * factor, if it is wanted."""
        to_argument = into.arguments.get((self.numbers[place], name))
        if to_argument is None:
            return
        if to_argument.numel() == 1:
            total = share.sum() if factor is None else torch.dot(share.reshape(-1), factor.reshape(-1))
            to_argument += total.reshape(to_argument.shape)
            return
        share = share if factor is None else share * factor
        if name == "bias":
            share = share.sum(dim=-1)
        shape = (1,) * (share.ndim - to_argument.ndim) + tuple(to_argument.shape)
        to_argument += share.sum_to_size(shape).reshape(to_argument.shape)


def _eligible(identity: Identity) -> Tensor:
    """Give (N, M) bool: who is positive or negative."""
    if "eligible" not in identity.kept:
        view = identity.anchor_view[:, None]
        remembered = identity.view == REMEMBERED
        same_view = view == identity.view
        eligible = ~((identity.anchor_sample[:, None] == identity.sample) & (same_view | remembered))
        eligible &= (view != PADDING) & (identity.view != PADDING)
        identity.kept["eligible"] = eligible & ~same_view if identity.across else eligible
    known: Tensor = identity.kept["eligible"]
    return known


def work_lacks_nobody(work: Work, asked: LogSumExp | SoftMean) -> bool:
    """Say whether every row is known to have candidates."""
    return asked.among is None and asked.rows is None and asked.above is None and work.identity.nobody_lacks(asked.over)


def _number(value: Any) -> float | None:
    """Give an argument as a number; None where it is more than one."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return value if isinstance(value, float | int) else None


def _spread(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)
