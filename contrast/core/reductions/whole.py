"""The way of small sizes: one matrix that holds every similarity, with as few operations as can be.

Below a few hundred embeddings the time of a loss is that of starting its operations, so masks are kept from call to
call, and what the forward pass computed is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrast.core.reductions.asked import Count, Kth, LogSumExp, Mean, SoftMean, SoftplusSum
from contrast.core.reductions.frames import Block, Frame
from contrast.core.reductions.listed import add_dots, dots
from contrast.core.reductions.matrix import ALONE, Matrix, number
from contrast.core.reductions.shares import Arguments, logits, shares, softplus, sum_of_log1p
from contrast.core.reductions.work import Gradients, nothing


class Whole(Matrix):
    """All reductions of a small call, with written derivatives.

    Args:
        work: the whole call.
        numbers: which of its reductions.
    """

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each; kept are the similarities, and two tensors of each."""
        self._read()
        s = self.work.x.new_zeros(0) if self.frame is None else self._similarities(self.frame)
        near = self._near(s) if any(self.alone) else None
        self._settle(s)
        outputs, saved = [], [s]
        for place, (block, alone) in enumerate(zip(self.blocks, self.alone, strict=True)):
            output, *kept = self._reduce(place, near if alone and near is not None else block.of(s), block)
            outputs.append(self._widened(place, output, block))
            saved += kept
        return outputs, saved

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients."""
        s = saved[0]
        near: Tensor | None = None
        total: Tensor | None = None
        to_near: Tensor | None = None
        for place, (asked, block, alone) in enumerate(zip(self.asked, self.blocks, self.alone, strict=True)):
            if isinstance(asked, Count | Kth):
                continue
            first, second = saved[1 + 2 * place : 3 + 2 * place]
            g, output = self._rows_of(upstream[place], block), self._rows_of(outputs[place], block)
            if alone:
                learned = (self.numbers[place], "scale") in into.arguments
                if near is None and (learned or not self._is_itself(asked)):
                    near = self._near(s)
                to_s = self._differentiate(place, s if near is None else near, block, output, g, first, second, into)
                to_near = to_s if to_near is None else to_near + to_s
                continue
            to_s = self._differentiate(place, block.of(s), block, output, g, first, second, into)
            if total is None and to_s.shape == s.shape:
                total = to_s.mT if block.turned else to_s
            else:
                total = torch.zeros_like(s) if total is None else total
                block.of(total).add_(to_s)
        if to_near is not None:
            total = self._add_near(s, total, to_near.squeeze(-1), into)
        if total is not None and self.frame is not None:
            self.frame.send(total, into)

    def _add_near(self, s: Tensor, total: Tensor | None, to_near: Tensor, into: Gradients) -> Tensor | None:
        """Add the gradient of single positives: to that of the matrix where they stand in it, else to the vectors."""
        if self.flat is not None:
            total = torch.zeros_like(s) if total is None else total
            total.view(*s.shape[:-2], -1).index_add_(-1, self.flat, to_near)
            return total
        positive = self._positive()
        assert positive is not None
        add_dots(self.work, positive, to_near, into)
        return total

    def _similarities(self, frame: Frame) -> Tensor:
        """Give the matrix; the next call about the same pairs finds it."""
        kept: dict[Any, Tensor] = self.work.pairs.__dict__.setdefault("similarities", {})
        if frame.key not in kept:
            kept[frame.key] = frame.similarities()
        return kept[frame.key]

    def _near(self, s: Tensor) -> Tensor:
        """Give the similarities of single positives, (N, 1) or (H, N, 1)."""
        if self.flat is not None:
            return s.view(*s.shape[:-2], -1).index_select(-1, self.flat).unsqueeze(-1)
        positive = self._positive()
        assert positive is not None
        return dots(self.work, positive).unsqueeze(-1)

    def _reduce(self, place: int, s: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Give a reduction, and what its derivative needs."""
        asked, none = self.asked[place], s.new_zeros(0)
        if block is ALONE and self._is_itself(asked):
            alone = s.squeeze(-1)
            if isinstance(asked, LogSumExp):
                alone = alone * (self.scales[place] or 0.0)
            return (alone if asked.rows is None else alone * asked.rows), none, none
        if isinstance(asked, Mean) and asked.weight is None and asked.above is None:
            ones, share = block.ones(s), block.share(s)
            return block.sum(s if ones is None else ones * s).mul_(share), share, none
        if isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place):
            return self._soft(place, s, block)
        if isinstance(asked, Count | Kth):
            return self._ordered(place, s, block), none, none
        counts = self._counting(place, s, block)
        if isinstance(asked, SoftplusSum) and self._is_bounded(place, block):
            return self._softplus(place, s, block)
        if isinstance(asked, SoftplusSum):
            exponent = logits(s, self._given(asked))
            each = softplus(exponent)
            return block.sum(each if counts is None else torch.where(counts, each, 0)), exponent, none
        if isinstance(asked, Mean):
            weight = torch.as_tensor(self._weight(place), dtype=s.dtype, device=s.device)
            weight = weight + s.new_zeros(s.shape[-2:]) if counts is None else torch.where(counts, weight, 0)
            mass = weight.sum(dim=-1)
            mass = mass.where(mass != 0, 1)
            return (weight * s).sum(dim=-1) / mass, weight, mass
        exponent = logits(s, self._given(asked))
        if counts is not None:
            exponent = torch.where(counts, exponent, -torch.inf)
        value = torch.logsumexp(exponent, dim=-1) if s.shape[-1] else exponent.sum(dim=-1) - torch.inf
        normaliser = torch.where(value == -torch.inf, torch.inf, value)
        if isinstance(asked, SoftMean):
            p = (exponent - normaliser.unsqueeze(-1)).exp()
            return (p * s).sum(dim=-1), normaliser, none
        return value.clamp(min=nothing(s.dtype)), normaliser, none

    def _is_bounded(self, place: int, block: Block) -> bool:
        """Say whether scale and bias of a softplus are numbers that keep e^(scale * s + bias) in range."""
        bias = number(self.asked[place].bias)
        return block is not ALONE and bias is not None and self._in_range(place, bias)

    def _softplus(self, place: int, s: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Give sums of log(1 + e^(scale * s + bias)); kept are the exponentials."""
        asked, ones = self.asked[place], block.ones(s)
        e = (s * (self.scales[place] or 0.0)).add_(number(asked.bias) or 0.0).exp_()
        if ones is not None:
            e.mul_(ones)
        sums = [sum_of_log1p(e, dim) for dim in ((-1, -2) if block.both else (-1,))]
        return torch.cat(sums, dim=-1) if block.both else sums[0], e, s.new_zeros(0)

    @staticmethod
    def _is_itself(asked: Any) -> bool:
        """Say whether a reduction of one similarity is that similarity, or a multiple of it."""
        return isinstance(asked, Mean) or (isinstance(asked, LogSumExp | SoftMean) and asked.rows is None)

    def _soft(self, place: int, s: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Give a log-sum-exp or a soft mean with a number for a scale; kept are exponentials and 1 / their sums."""
        asked, scale = self.asked[place], self.scales[place]
        assert scale is not None
        shift = None
        if self._in_range(place):
            e, ones = (s * scale).exp_(), self._ones(place, s, block)
            if ones is not None:
                e.mul_(ones)
        else:
            counts = self._counting(place, s, block)
            e = s * scale
            if counts is not None:
                e = torch.where(counts, e, -torch.inf)
            if s.shape[-1]:
                shift = e.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
                e = e.sub_(shift).exp_()
        mass, empty = block.sum(e), None
        if block.lacking or asked.above is not None or (block is ALONE and asked.rows is not None):
            empty = mass == 0
            mass.masked_fill_(empty, torch.inf)
        inverse = mass.reciprocal()
        if isinstance(asked, SoftMean):
            return block.sum(e * s).mul_(inverse), e, inverse
        value = mass.log_()
        if shift is not None:
            value += shift.squeeze(-1)
        if empty is not None:
            value.masked_fill_(empty, nothing(s.dtype))
        return value, e, inverse

    def _differentiate(
        self,
        place: int,
        s: Tensor,
        block: Block,
        output: Tensor,
        g: Tensor,
        first: Tensor,
        second: Tensor,
        into: Gradients,
    ) -> Tensor:
        """Give dL/ds of a reduction, and add the gradient of its arguments."""
        asked, scale = self.asked[place], self.scales[place]
        if block is ALONE and self._is_itself(asked):
            given = (g if asked.rows is None else g * asked.rows).unsqueeze(-1)
            if not isinstance(asked, LogSumExp):
                return given
            self._learn(into, place, "scale", given, s)
            return given * (scale or 0.0)
        if isinstance(asked, Mean) and asked.above is None:
            if asked.weight is None:
                each, ones = block.spread(g * first), block.ones(s)
                return each.expand(s.shape).contiguous() if ones is None else ones * each
            if isinstance(asked.weight, str):
                return first * (g / second).unsqueeze(-1)
        if isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place):
            assert scale is not None
            return self._differentiate_soft(place, s, block, output, g * second, first, into)
        if isinstance(asked, SoftplusSum) and scale is not None:
            if self._is_bounded(place, block):
                to_logit = (first / (first + 1)).mul_(block.spread(g))
            else:
                to_logit = torch.sigmoid(first).mul_(block.spread(g))
                counts = self._ones(place, s, block)
                if counts is not None:
                    to_logit = torch.where(counts, to_logit, 0) if counts.dtype == torch.bool else to_logit.mul_(counts)
            self._learn(into, place, "scale", to_logit, s)
            self._learn(into, place, "bias", to_logit)
            return to_logit.mul_(scale)
        counts = self._counting(place, s, block)
        given = Arguments(weight=self._weight(place)) if isinstance(asked, Mean) else self._given(asked)
        everyone = torch.ones((), dtype=torch.bool, device=s.device).expand(s.shape[-2:])
        normaliser = second if isinstance(asked, Mean) else first
        of_pairs = shares(asked, s, everyone if counts is None else counts, given, _spread, g, output, normaliser)
        for name, share in of_pairs[1].items():
            self._learn(into, place, name, share)
        return of_pairs[0]

    def _differentiate_soft(
        self, place: int, s: Tensor, block: Block, output: Tensor, g: Tensor, e: Tensor, into: Gradients
    ) -> Tensor:
        """Give dL/ds; `g` is already divided by the mass of the exponentials `e`."""
        asked, scale = self.asked[place], self.scales[place]
        assert scale is not None
        learned = (self.numbers[place], "scale") in into.arguments
        if isinstance(asked, LogSumExp):
            if not learned:
                return e * block.spread(g * scale)
            to_logit = e * block.spread(g)
            self._learn(into, place, "scale", to_logit, s)
            return to_logit.mul_(scale)
        assert isinstance(asked, SoftMean)
        if asked.detach:
            return e * block.spread(g)
        if learned:
            of_means = torch.addcmul(block.spread(g * output), s, block.spread(g), value=-1).mul_(e).neg_()
            self._learn(into, place, "scale", of_means, s)
        # p (1 + scale (s - T)) g
        slope = g * scale
        return torch.addcmul(block.spread(g - slope * output), s, block.spread(slope)).mul_(e)

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


def _spread(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)
