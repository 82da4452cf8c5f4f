"""The nearest candidates of each anchor where lists say who does not count: strips of whole rows, without masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.embeddings import PADDING
from contrast.reductions import dense, sweep
from contrast.reductions.asked import Count, Relation
from contrast.reductions.identity import Matches, Run, by_tile, cut
from contrast.reductions.listed import Places
from contrast.reductions.work import Work

if TYPE_CHECKING:
    from contrast.pairs import Pairs

STRIP = 2**20
"""Similarities in a strip of whole rows."""


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
    heads, (count, _), width = work.heads, work.x.shape[-2:], work.starts[-1]
    height = max(1, STRIP // max(1, width * (heads[0] if heads else 1)))
    key = ("nearest", height, over)
    if key not in work.identity.kept:
        strips = cut(Run(0, count, None), height)
        work.identity.kept[key] = strips, by_tile(blank, strips, [Run(0, width, None)])
    strips, entries = work.identity.kept[key]
    parts = [work.x] if work.mirrored == len(work.parts) else work.parts
    values, places = work.x.new_empty(*heads, count, k), torch.empty(*heads, count, k, dtype=torch.int64)
    room = work.x.new_empty(*heads, min(height, count), width)
    for number, strip in enumerate(strips):
        rows = slice(strip.start, strip.stop)
        s = room[..., : strip.stop - strip.start, :]
        if len(strips) == 1 and len(parts) == 1:
            torch.matmul(work.x, parts[0].mT, out=s)
        else:
            start = 0
            for part in parts:
                s[..., start : start + part.shape[-2]] = work.x[..., rows, :] @ part.mT
                start += part.shape[-2]
        listed = entries.get((number, 0))
        if listed is not None:
            s.flatten(-2).index_fill_(-1, listed, -torch.inf)
        if among is not None:
            s.masked_fill_(~among, -torch.inf)
        values[..., rows, :], places[..., rows, :] = _largest(s, k)
    missing = values == -torch.inf
    return values.masked_fill_(missing, 0), places.masked_fill_(missing, -1)


def _largest(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k != 1:
        return F.pad(s, (0, max(k - s.shape[-1], 0)), value=-torch.inf).topk(k, dim=-1)
    if not s.shape[-1]:
        return s.new_full((*s.shape[:-1], 1), -torch.inf), torch.zeros(*s.shape[:-1], 1, dtype=torch.int64)
    return s.max(dim=-1, keepdim=True)
