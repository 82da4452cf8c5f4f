"""The way of small sizes: one matrix that holds every similarity, with as few operations as can be.

Below a few hundred embeddings the time of a loss is that of starting its operations, so masks are kept from call to
call, and what the forward pass computed is kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from contrast.embeddings import PADDING, REMEMBERED
from contrast.reductions.asked import Count, Kth, LogSumExp, Mean, Relation, SoftMean, SoftplusSum, arguments
from contrast.reductions.frames import Block, Box, Facing, Folded, Frame, Spot, facing, spot
from contrast.reductions.identity import Identity, Matches
from contrast.reductions.listed import add_dots, dots
from contrast.reductions.shares import Arguments, logits, shares, softplus
from contrast.reductions.thresholds import kth_largest
from contrast.reductions.work import WIDEST, Gradients, Work, nothing

ALONE = Block(lacking=False)
"""What a reduction over single positives reads: all of their similarities."""


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
        positive = self._positive()
        self.alone = [positive is not None and self._suits(place) for place in range(len(self.asked))]
        self.spots = {place: self._spot(place) for place, alone in enumerate(self.alone) if not alone}
        self.frame = self._frame(self.spots) if self.spots else None

    @staticmethod
    def accepts(work: Work) -> bool:
        """Say whether every reduction has numbers and tensors for arguments, and no rule decides who counts."""
        return not work.rules and not any(
            isinstance(value, nn.Module) for asked in work.asked for value in arguments(asked).values()
        )

    @property
    def size(self) -> int:
        """How many similarities stand in the matrix."""
        return 0 if self.frame is None else self.frame.size * math.prod(self.work.heads)

    @property
    def triangle(self) -> bool:
        """Whether every similarity stands there twice."""
        return isinstance(self.frame, Box) and self.frame.square

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each; kept are the similarities, and two tensors of each."""
        positive = self._positive()
        self.flat = self._flat(positive) if positive is not None and any(self.alone) else None
        self.blocks = [self._block(place) if place in self.spots else ALONE for place in range(len(self.asked))]
        s = self.work.x.new_zeros(0) if self.frame is None else self._similarities(self.frame)
        near = self._near(s) if any(self.alone) else None
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
                if near is None and not self._is_itself(asked):
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

    def _positive(self) -> Matches | None:
        """Give the positives if each anchor is known to have exactly one."""
        identity = self.work.identity
        if not identity.canonical:
            return None
        positive = identity.positive
        return positive if positive is not None and positive.one_each(identity.rows) else None

    def _flat(self, positive: Matches) -> Tensor | None:
        """Give where the single positives stand in the flat matrix, (N,), if there is one and they stand there."""
        if self.frame is None:
            return None
        kept, key = self.work.identity.kept, ("single", self.frame.key)
        if key not in kept:
            kept[key] = self.frame.flat(positive.rows, positive.columns)
        flat: Tensor | None = kept[key]
        return flat

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

    def _spot(self, place: int) -> Spot:
        """Give the anchors and candidates that a reduction is about; what the identities alone decide is kept."""
        asked, identity = self.asked[place], self.work.identity
        rows = getattr(asked, "rows", None)
        weighed = isinstance(asked, Mean) and not isinstance(asked.weight, Tensor)
        cut = weighed or (isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place))
        cut = cut and getattr(asked, "above", None) is None
        if not (identity.owns(rows) and identity.owns(asked.among)):
            return spot(identity, asked, cut)
        key = ("spot", asked.over, id(rows), id(asked.among), cut)
        if key not in identity.kept:
            identity.kept[key] = spot(identity, asked, cut)
        known: Spot = identity.kept[key]
        return known

    def _frame(self, spots: dict[int, Spot]) -> Frame:
        """Give the smallest matrix that holds these spots."""
        work = self.work
        start, stop = min(one.start for one in spots.values()), max(one.stop for one in spots.values())
        if stop - start == work.identity.rows and not any(self._spans_columns(place) for place in spots):
            met = facing(work.identity)
            if met is not None:
                folded = work.mirrored == len(work.parts) == 2 and all(map(self._may_fold, spots, spots.values()))
                return Folded(work, met) if folded else Facing(work, met)
        left, right = min(one.left for one in spots.values()), max(one.right for one in spots.values())
        return Box(work, Spot(start, stop, left, right, exact=True))

    def _spans_columns(self, place: int) -> bool:
        """Say whether an argument belongs to the candidates."""
        given = arguments(self.asked[place]).items()
        return any(name != "bias" and isinstance(v, Tensor) and v.ndim > 0 and v.shape[-1] > 1 for name, v in given)

    def _may_fold(self, place: int, spot: Spot) -> bool:
        """Say whether a reduction may be read by rows and by columns of one matrix: with numbers, and no maximum."""
        asked, scale = self.asked[place], self.scales[place]
        if not spot.exact or isinstance(asked, Count | Kth) or getattr(asked, "above", None) is not None:
            return False
        if isinstance(asked, Mean):
            halves = spot.stop - spot.start < self.work.identity.rows
            return asked.weight is None or (halves and isinstance(asked.weight, str))
        if isinstance(asked, SoftplusSum) and isinstance(asked.bias, Tensor) and asked.bias.numel() > 1:
            return False
        if not self._is_plain(place) or scale is None:
            return False
        return isinstance(asked, SoftplusSum) or (self.work.unit and abs(scale) <= WIDEST[self.work.x.dtype])

    def _block(self, place: int) -> Block:
        """Give what a reduction reads; what the identities alone decide is kept."""
        asked, identity, frame, spot = self.asked[place], self.work.identity, self.frame, self.spots[place]
        assert frame is not None
        rows = getattr(asked, "rows", None)
        mine = asked.among is None and rows is None
        kept = (identity.base if identity.base and asked.over == "all" and mine else identity).kept
        own = identity.owns(asked.among) and identity.owns(rows)
        needs_mask = isinstance(asked, Count | Kth)
        key = ("block", frame.key, asked.over, spot, needs_mask, id(rows), id(asked.among))
        block: Block | None = kept.get(key) if own else None
        if block is None:
            block = frame.block(spot)
            block.anchors = None if spot.stop - spot.start == identity.rows else spot.rows
            counts = frame.of_mask(self._relation(asked.over), spot)
            if not spot.exact and asked.among is not None:
                counts = counts & frame.of_mask(asked.among.expand(identity.rows, -1), spot)
            if not spot.exact and rows is not None:
                counts = counts & frame.of_mask(rows.unsqueeze(-1).expand(-1, identity.columns), spot)
            known = own and (identity.canonical or (identity.base is not None and asked.over == "all" and mine))
            if known:
                each = counts.any(dim=-1)
                block.lacking = not bool((torch.cat([each, counts.any(dim=-2)]) if block.both else each).all())
            elif mine:
                block.lacking = not identity.nobody_lacks(asked.over)
            block.counts = None if known and not needs_mask and bool(counts.all()) else counts
            if own:
                kept[key] = block
        return block

    def _rows_of(self, of_anchors: Tensor, block: Block) -> Tensor:
        """Give a reduction, or its gradient, of those anchors that it is about."""
        return of_anchors if block.anchors is None else of_anchors[..., block.anchors]

    def _widened(self, place: int, output: Tensor, block: Block) -> Tensor:
        """Give a reduction of some anchors for all of them."""
        if block.anchors is None:
            return output
        nobody = nothing(output.dtype) if isinstance(self.asked[place], LogSumExp) else 0.0
        whole = output.new_full(self.work.x.shape[:-1], nobody)
        whole[..., block.anchors] = output
        return whole

    def _counting(self, place: int, s: Tensor, block: Block) -> Tensor | None:
        """Give bool, as the similarities or to be broadcast: who counts; None where all do."""
        asked = self.asked[place]
        if block is ALONE:
            return None if asked.rows is None else asked.rows.unsqueeze(-1)
        above = getattr(asked, "above", None)
        if above is None:
            return block.counts
        high: Tensor = s >= above.unsqueeze(-1)
        return high if block.counts is None else high & block.counts

    def _ones(self, place: int, s: Tensor, block: Block) -> Tensor | None:
        """Give 1 where a pair counts and 0 where not; None where all do."""
        asked = self.asked[place]
        if block is ALONE:
            return None if asked.rows is None else asked.rows.unsqueeze(-1)
        if getattr(asked, "above", None) is None:
            return block.ones(s)
        # Numbers: multiplying by a mask of bool takes several times longer.
        high, ones = torch.ge(s, asked.above.unsqueeze(-1), out=torch.empty_like(s)), block.ones(s)
        return high if ones is None else high.mul_(ones)

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
        return Arguments(**given)

    def _weight(self, place: int) -> Any:
        """Give the weights of a mean; those of references as the block."""
        asked, work = self.asked[place], self.work
        if not isinstance(asked.weight, str):
            return 1.0 if asked.weight is None else asked.weight
        spot = self.spots[place]
        if isinstance(self.frame, Box):
            return _reference_weight(work, spot.rows, spot.columns)
        assert self.frame is not None
        halves = zip(self.frame.halves, self.frame.met, strict=True)
        made = [
            _reference_weight(work, rows, slice(run.start, run.stop))
            for rows, run in halves
            if spot.start < rows.stop and spot.stop > rows.start
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _reduce(self, place: int, s: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Give a reduction, and what its derivative needs."""
        asked, none = self.asked[place], s.new_zeros(0)
        if block is ALONE and self._is_itself(asked):
            alone = s.squeeze(-1)
            if isinstance(asked, LogSumExp):
                alone = alone * (self.scales[place] or 0.0)
            return (alone if asked.rows is None else alone * asked.rows), none, none
        if isinstance(asked, Mean) and asked.weight is None and asked.above is None:
            ones = block.ones(s)
            share = _share(block, s, ones)
            return block.sum(s if ones is None else ones * s).mul_(share), share, none
        if isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place):
            return self._soft(place, s, block)
        counts = self._counting(place, s, block)
        if isinstance(asked, SoftplusSum):
            exponent = logits(s, self._given(asked))
            each = softplus(exponent)
            return block.sum(each if counts is None else torch.where(counts, each, 0)), exponent, none
        if isinstance(asked, Mean):
            weight = torch.as_tensor(self._weight(place), dtype=s.dtype, device=s.device)
            weight = weight.expand(s.shape[-2:]) if counts is None else torch.where(counts, weight, 0)
            mass = weight.sum(dim=-1)
            mass = mass.where(mass != 0, 1)
            return (weight * s).sum(dim=-1) / mass, weight, mass
        assert counts is not None
        if isinstance(asked, Count):
            return counts.sum(dim=-1), none, none
        if isinstance(asked, Kth):
            found = counts.sum(dim=-1)
            k = torch.minimum(torch.as_tensor(asked.k, device=s.device), found).clamp(min=1)
            ordered = torch.where(counts, s, -torch.inf)
            return kth_largest(ordered, k).masked_fill((found == 0).expand(s.shape[:-1]), 0), none, none
        exponent = torch.where(counts, logits(s, self._given(asked)), -torch.inf)
        value = torch.logsumexp(exponent, dim=-1) if s.shape[-1] else exponent.sum(dim=-1) - torch.inf
        normaliser = torch.where(value == -torch.inf, torch.inf, value)
        if isinstance(asked, SoftMean):
            p = (exponent - normaliser.unsqueeze(-1)).exp()
            return (p * s).sum(dim=-1), normaliser, none
        return value.clamp(min=nothing(s.dtype)), normaliser, none

    @staticmethod
    def _is_itself(asked: Any) -> bool:
        """Say whether a reduction of one similarity is that similarity, or a multiple of it."""
        return isinstance(asked, Mean) or (isinstance(asked, LogSumExp | SoftMean) and asked.rows is None)

    def _soft(self, place: int, s: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Give a log-sum-exp or a soft mean with a number for a scale; kept are exponentials and 1 / their sums."""
        asked, scale = self.asked[place], self.scales[place]
        assert scale is not None
        shift = None
        if self.work.unit and abs(scale) <= WIDEST[s.dtype]:
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
        if block.lacking or (block is ALONE and asked.rows is not None):
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


def _share(block: Block, s: Tensor, ones: Tensor | None) -> Tensor:
    """Give what each candidate of an anchor has of a plain mean, by anchor."""
    key = ("share", s.dtype)
    if key not in block.made:
        counted = block.sum(s.new_ones(s.shape[-2:]) if ones is None else ones)
        block.made[key] = counted.clamp_(min=1).reciprocal_()
    return block.made[key]


def _reference_weight(work: Work, rows: slice, columns: slice) -> Tensor:
    """Give (n, m), (<u_i, u_j> + 1) / 2 of the reference vectors of some anchors and candidates."""
    u, v = work.anchor.reference, [part.reference for part in work.candidates]
    assert u is not None
    together = torch.cat([reference for reference in v if reference is not None])
    return (u[rows] @ together[columns].T + 1).div_(2).to(work.x.dtype)


def _number(value: Any) -> float | None:
    """Give an argument as a number; None where it is more than one."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return value if isinstance(value, float | int) else None


def _spread(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)
