"""The nearest candidates of each anchor where lists say who does not count: tiles, without masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contrast.core.embeddings import PADDING
from contrast.core.reductions import dense, sweep
from contrast.core.reductions.asked import Count, Relation
from contrast.core.reductions.identity import Matches, Run, by_tile, cut
from contrast.core.reductions.listed import Places
from contrast.core.reductions.work import Work

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

STRIP = 2**20
"""Similarities in a tile, over all heads."""


def topk(pairs: Pairs, k: int, over: Relation, among: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row, with gradient, and the positions of their candidates."""
    if torch.compiler.is_compiling():
        return sweep.topk(pairs, k, over, among, size)
    call = sweep._Call(pairs, [], lambda work: [Places(work, places)])
    work = call.work([z.detach() for z in call.inputs])
    blank = lists(work, over)
    if blank is None:
        return sweep.topk(pairs, k, over, among, size)
    dense.check(Count(over, among), pairs)
    values, places = nearest(work, k, blank, over, among)
    return (sweep._apply(call)[0] if any(call.wants) else values), places


def lists(work: Work, over: Relation) -> Matches | None:
    """Give the pairs that do not count, where they are listed and all others do; else None."""
    identity = work.identity
    if work.x.device.type != "cpu" or work.rules or work.across or over not in ("negative", "all"):
        return None
    if not identity.plain or any(run.view == PADDING for run in (*identity.anchor_runs, *identity.candidate_runs)):
        return None
    return identity.strangers if over == "negative" else identity.excluded


@torch.no_grad()
def nearest(work: Work, k: int, blank: Matches, over: Relation, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row and their places, (N, k) or (H, N, k); 0 and -1 for none.

    Args:
        work: the whole call.
        k: how many.
        blank: the pairs that do not count.
        over: the relation that says so.
        among: (M,) bool, the candidates that count; None for all.
    """
    heads, count, width = work.heads, work.x.shape[-2], work.starts[-1]
    room = STRIP // (heads[0] if heads else 1)
    mirrored = work.mirrored == len(work.parts)
    parts, starts = ([work.x], [0, count]) if mirrored else (work.parts, work.starts)
    # The largest so far need not see a row at once.
    side = math.isqrt(room) if k == 1 and count * width > room else width
    key = ("nearest", room, side, mirrored, over)
    if key not in work.identity.kept:
        strips = cut(Run(0, count, None), max(1, room // max(1, side)))
        columns = [
            block
            for part in range(len(parts))
            for block in cut(Run(starts[part], starts[part + 1], None, part), max(1, side))
        ]
        work.identity.kept[key] = strips, columns, by_tile(blank, strips, columns) if columns else {}
    strips, columns, entries = work.identity.kept[key]
    values, places = work.x.new_empty(*heads, count, k), torch.empty(*heads, count, k, dtype=torch.int64)
    # One tile for all: many that come and go between small tensors would leave the allocator with holes.
    longest = max((run.stop - run.start for run in columns), default=0)
    flat = work.x.new_empty(math.prod(heads) * longest * max((run.stop - run.start for run in strips), default=0))
    for i, strip in enumerate(strips):
        rows, found = slice(strip.start, strip.stop), []
        for j, block in enumerate(columns):
            within = slice(block.start - starts[block.part], block.stop - starts[block.part])
            shape = (*heads, strip.stop - strip.start, block.stop - block.start)
            s = flat[: math.prod(shape)].view(shape)
            torch.matmul(work.x[..., rows, :], parts[block.part][..., within, :].mT, out=s)
            if (i, j) in entries:
                s.view(*heads, -1).index_fill_(-1, entries[i, j], -torch.inf)
            if among is not None:
                s.masked_fill_(~among[block.start : block.stop], -torch.inf)
            largest, place = s.max(dim=-1, keepdim=True) if k == 1 else s.topk(min(k, s.shape[-1]), dim=-1)
            found.append((largest, place + block.start if block.start else place))
        values[..., rows, :], places[..., rows, :] = _largest(found, k, work.x[..., rows, :])
    missing = values == -torch.inf
    return values.masked_fill_(missing, 0), places.masked_fill_(missing, -1)


def _largest(found: list[tuple[Tensor, Tensor]], k: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Give the k largest of what was found in each block, -inf where there are fewer."""
    if len(found) == 1 and found[0][0].shape[-1] == k:
        return found[0]
    none = x.new_full((*x.shape[:-1], k), -torch.inf)
    values, order = torch.cat([none, *(largest for largest, _ in found)], dim=-1).topk(k, dim=-1)
    return values, torch.cat([none.to(torch.int64), *(place for _, place in found)], dim=-1).gather(-1, order)
