"""What a small call holds: one matrix of similarities, and what each reduction reads of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contrast.core.embeddings import PADDING, REMEMBERED
from contrast.core.reductions.asked import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    Relation,
    SoftMean,
    SoftplusSum,
    arguments,
    settled,
    thresholds,
)
from contrast.core.reductions.frames import Block, Box, Facing, Folded, Frame, Spot, facing, spot
from contrast.core.reductions.identity import Identity, Matches
from contrast.core.reductions.shares import Arguments
from contrast.core.reductions.thresholds import kth_largest
from contrast.core.reductions.work import WIDEST, Work, nothing

FEW = 2**14
"""Numbers of which torch finds the k-th sooner than numpy."""
ALONE = Block(lacking=False)
"""What a reduction over single positives reads: all of their similarities."""


@dataclass(eq=False)
class _Plan:
    """What a call holds, kept for the next one like it.

    Args:
        alone: which reductions are about single positives and need no matrix.
        spots: what the others are about.
        frame: makes their matrix.
        flat: where the single positives stand in it, (N,) in the flat matrix; None where they do not.
        blocks: what each reduction reads; None until it is looked up.
    """

    alone: list[bool]
    spots: dict[int, Spot]
    frame: Callable[[Work], Frame] | None
    flat: Tensor | None = None
    blocks: list[Block] | None = None


class Matrix:
    """The reductions of a small call, and the matrix that serves them.

    Args:
        work: the whole call.
        numbers: which of its reductions.
    """

    any_exponent: ClassVar[bool] = False
    """Whether sums of exponentials are taken relative to their largest, by rows and by columns."""

    def __init__(self, work: Work, numbers: list[int]) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        # Thresholds that these ask for themselves come last, so that all meet one matrix.
        self.asked += thresholds(self.asked)
        self.scales = [number(getattr(asked, "scale", 1.0)) for asked in self.asked]
        kept, key = work.identity.kept, self._signature()
        plan: _Plan | None = None if key is None else kept.get(key)
        if plan is None:
            plan = self._plan()
            if key is not None:
                kept[key] = plan
        self.plan, self.alone = plan, plan.alone
        self.frame = None if plan.frame is None else plan.frame(work)

    def _signature(self) -> Hashable | None:
        """Give what decides the plan of a call about these pairs; None where it is not known from call to call."""
        work, identity = self.work, self.work.identity
        if not identity.canonical:
            return None
        named: list[Hashable] = [type(self).__name__, work.mirrored, work.unit, work.x.dtype]
        for place, asked in enumerate(self.asked):
            rows, above = getattr(asked, "rows", None), getattr(asked, "above", None)
            if not (identity.owns(rows) and identity.owns(asked.among)):
                return None
            shapes = tuple(v.shape if isinstance(v, Tensor) else type(v).__name__ for v in arguments(asked).values())
            reaches = ("kth", self.asked.index(above)) if isinstance(above, Kth) else above is not None
            named += [type(asked).__name__, asked.over, id(rows), id(asked.among), reaches, shapes]
            named.append(self._in_range(place))
        return tuple(named)

    def _plan(self) -> _Plan:
        """Say what the call holds."""
        positive = self._positive()
        alone = [positive is not None and self._suits(place) for place in range(len(self.asked))]
        spots = {place: self._spot(place) for place, is_alone in enumerate(alone) if not is_alone}
        return _Plan(alone, spots, self._frame(spots) if spots else None)

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

    def _read(self) -> None:
        """Look up what each reduction reads."""
        plan = self.plan
        if plan.blocks is None:
            positive = self._positive()
            plan.flat = self._flat(positive) if positive is not None and any(self.alone) else None
            plan.blocks = [self._block(place) if place in plan.spots else ALONE for place in range(len(self.asked))]
        self.flat, self.blocks = plan.flat, plan.blocks

    def _settle(self, s: Tensor) -> None:
        """Find the thresholds that reductions ask for themselves, in the whole matrix."""
        count = len(self.numbers)
        if len(self.asked) > count:
            blocks = self.blocks[count:]
            found = [self._ordered(place, block.of(s), block) for place, block in enumerate(blocks, start=count)]
            self.asked = settled(self.asked[:count], lambda _: found)
            self.blocks, self.alone = self.blocks[:count], self.alone[:count]

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

    def _in_range(self, place: int, bias: float = 0.0) -> bool:
        """Say whether the scale is a number with which no e^(scale * s + bias) leaves the range."""
        scale = self.scales[place]
        return scale is not None and self.work.unit and abs(scale) + abs(bias) <= WIDEST[self.work.x.dtype]

    def _spot(self, place: int) -> Spot:
        """Give the anchors and candidates that a reduction is about."""
        asked = self.asked[place]
        weighed = isinstance(asked, Mean) and not isinstance(asked.weight, Tensor)
        cut = weighed or (isinstance(asked, LogSumExp | SoftMean) and self._is_plain(place))
        cut = cut and getattr(asked, "above", None) is None
        return spot(self.work.identity, asked, cut)

    def _frame(self, spots: dict[int, Spot]) -> Callable[[Work], Frame]:
        """Give what makes the smallest matrix that holds these spots."""
        work = self.work
        start, stop = min(one.start for one in spots.values()), max(one.stop for one in spots.values())
        # Where each view's anchors meet their own candidates, nothing tells a part of them from the others.
        everyone = [one for one in spots.values() if one.stop - one.start == work.identity.rows]
        apart = any(one.exact and one.right - one.left < work.identity.columns for one in everyone)
        if stop - start == work.identity.rows and not apart and not any(map(self._spans_columns, spots)):
            met = facing(work.identity)
            if met is not None:
                folded = work.mirrored == len(work.parts) == 2 and all(map(self._may_fold, spots, spots.values()))
                return partial(Folded if folded else Facing, met=met)
        left, right = min(one.left for one in spots.values()), max(one.right for one in spots.values())
        return partial(Box, spot=Spot(start, stop, left, right, exact=True))

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
        if isinstance(asked, SoftplusSum) or self.any_exponent:
            return True
        return self._in_range(place)

    def _block(self, place: int) -> Block:
        """Give what a reduction reads; what the identities alone decide is kept."""
        asked, identity, frame, spot = self.asked[place], self.work.identity, self.frame, self.plan.spots[place]
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

    def _ordered(self, place: int, s: Tensor, block: Block) -> Tensor:
        """Give a count or a threshold."""
        asked = self.asked[place]
        if isinstance(asked, Count):
            counts = self._counting(place, s, block)
            assert counts is not None
            return counts.sum(dim=-1)
        # Added: choosing by a mask of bool takes several times longer.
        far = block.far(s)
        ordered = s.clone() if far is None else s + far
        k, alike = self._places(asked, block)
        if alike is not None and s.numel() <= FEW:
            # Of few numbers torch selects before numpy has begun.
            return ordered.kthvalue(s.shape[-1] - alike + 1, dim=-1).values
        found = kth_largest(ordered, k)
        return found.masked_fill((block.counted() == 0).expand(s.shape[:-1]), 0) if block.lacking else found

    def _places(self, asked: Kth, block: Block) -> tuple[Tensor, int | None]:
        """Give k of each anchor, (N,), at most as many as it has; and the number, where it is one for all."""
        key = ("k", asked.k if isinstance(asked.k, int) else id(asked.k))
        own = isinstance(asked.k, int) or self.work.identity.owns(asked.k)
        if own and key in block.places:
            return block.places[key]
        found = block.counted()
        k = torch.minimum(torch.as_tensor(asked.k, device=found.device), found).clamp(min=1)
        least, most = k.aminmax() if k.numel() else (k.new_zeros(()), k.new_ones(()))
        alike = int(least) if not block.lacking and bool(least == most) else None
        if own and not block.lacking:
            block.places[key] = k, alike
        return k, alike

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
        """Give the weights of a mean; twice those of references, as the block, which have the same mean."""
        asked, work = self.asked[place], self.work
        if not isinstance(asked.weight, str):
            return 1.0 if asked.weight is None else asked.weight
        spot = self.plan.spots[place]
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


def _reference_weight(work: Work, rows: slice, columns: slice) -> Tensor:
    """Give (n, m), <u_i, u_j> + 1 of the reference vectors of some anchors and candidates."""
    u = work.pairs.anchor.references(rows)
    assert u is not None
    met = []
    for part, start in zip(work.pairs.candidates, work.starts, strict=False):
        if start < columns.stop and start + len(part) > columns.start:
            assert part.reference is not None
            met.append(part.reference[max(columns.start - start, 0) : columns.stop - start])
    together = met[0] if len(met) == 1 else torch.cat(met or [u[:0]])
    return (u @ together.T).add_(1).to(work.x.dtype)


def number(value: Any) -> float | None:
    """Give an argument as a number; None where it is more than one."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return value if isinstance(value, float | int) else None


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
