"""The k-th largest similarity of each row, from strips of whole rows that are written again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrast.core.reductions.asked import Kth
from contrast.core.reductions.grid import blocks, low_tiles
from contrast.core.reductions.identity import Identity, by_tile
from contrast.core.reductions.work import Gradients, Work

SHARED = 2**19
"""From so many numbers on, processors share the selecting."""
AT_ONCE = 2**18
"""Numbers selected from at a time, so that what is made of them stays in the processor's cache."""
PLACES = 16
"""Rows that ask for more different places than this are sorted."""
SAMPLED = 16
"""One number in so many is looked at first."""
LONG = 512
"""Shorter rows are not worth looking at first."""


class Thresholds:
    """Some `Kth` over negatives or all, where the pairs that do not count are listed.

    Args:
        work: the whole call.
        numbers: which of its reductions.
        size: rows and columns of a tile.
    """

    def __init__(self, work: Work, numbers: list[int], size: int) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        self.rows, self.columns = blocks(work, *low_tiles(work, size))

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether this is a threshold that lists can serve."""
        asked = work.asked[number]
        return isinstance(asked, Kth) and not work.heads and not work.rules and lists(work.identity, asked)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the thresholds, (N,) each."""
        return [self.find(asked) for asked in self.asked], []

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """A threshold has no gradient."""

    def find(self, asked: Kth) -> Tensor:
        """Give the thresholds, (N,)."""
        made = self.work.new_rows()
        for _, rows, strip, k in self._strips(asked):
            made[rows] = kth_largest(strip, k)
        return self._blank(made, asked)

    def find_and_sum(
        self, asked: Kth, scale: float, shift: float, see: Callable[[int, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Give the thresholds, (N,), and the sums of exp(scale * s - shift) at or above them, (N,).

        Args:
            asked: the thresholds.
            scale: multiplies the similarities.
            shift: is taken from the exponents.
            see: is shown each block of rows, its number and (n, M) similarities, -inf where a pair does not count.
        """
        made, sums = self.work.new_rows(), self.work.new_rows()
        for i, rows, strip, k in self._strips(asked):
            see(i, strip)
            made[rows], sums[rows] = kth_and_sum(strip, k, scale, shift)
        return self._blank(made, asked), sums

    def _blank(self, made: Tensor, asked: Kth) -> Tensor:
        """Write 0 for the threshold of nobody."""
        return made.masked_fill_(self.work.identity.count(asked.over, asked.among, None) == 0, 0)

    def _strips(self, asked: Kth) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Give the blocks of rows, one after the other in the same place, with the place of each row's threshold."""
        work, identity = self.work, self.work.identity
        blank = identity.excluded if asked.over == "all" else identity.strangers
        assert blank is not None
        entries = by_tile(blank, self.rows, self.columns)
        found = identity.count(asked.over, asked.among, None)
        height = max((run.stop - run.start for run in self.rows), default=0)
        strip, tile = work.x.new_empty(height, work.starts[-1]), work.x.new_empty(0)
        for i, rows in enumerate(self.rows):
            own = strip[: rows.stop - rows.start]
            for j, columns in enumerate(self.columns):
                place = own[:, columns.start : columns.stop]
                if not identity.meets(rows, columns, asked.over):
                    place.fill_(-torch.inf)
                    continue
                start = work.starts[columns.part]
                others = work.parts[columns.part][columns.start - start : columns.stop - start]
                tile = torch.mm(work.x[rows.start : rows.stop], others.T, out=tile.resize_(place.shape))
                if (i, j) in entries:
                    tile.view(-1).index_fill_(0, entries[i, j], -torch.inf)
                place.copy_(tile)
            if asked.among is not None:
                own.masked_fill_(~asked.among, -torch.inf)
            where = slice(rows.start, rows.stop)
            k = asked.k[where] if isinstance(asked.k, Tensor) and asked.k.ndim else asked.k
            yield i, where, own, torch.minimum(torch.as_tensor(k), found[where]).clamp(min=1)


def lists(identity: Identity, asked: Kth) -> bool:
    """Say whether the pairs that do not count are listed."""
    return asked.over == "all" or (asked.over != "positive" and identity.strangers is not None)


def kth_largest(s: Tensor, k: Tensor) -> Tensor:
    """Give the k-th largest of each row of (..., M), which may be reordered; k: (...) from 1 to M."""
    if not s.shape[-1]:
        return s.sum(dim=-1)
    if s.device.type != "cpu":
        return s.sort(dim=-1, descending=True).values.gather(-1, (k - 1).unsqueeze(-1)).squeeze(-1)
    return _select(s, k, None, 0.0)[0]


def kth_and_sum(s: Tensor, k: Tensor, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """Give the same of (N, M) on the CPU, and the sums of exp(scale * s - shift) over what is not less, but -inf."""
    return _select(s, k, scale, shift) if s.shape[-1] else (s.sum(dim=-1), s.sum(dim=-1))


def _select(s: Tensor, k: Tensor, scale: float | None, shift: float) -> tuple[Tensor, Tensor]:
    # numpy selects several times faster than torch, and lets go of Python's lock.
    rows, places = s.view(-1, s.shape[-1]).numpy(), k.expand(s.shape[:-1]).reshape(-1).numpy()
    threads = torch.get_num_threads() if rows.size >= SHARED else 1
    step = max(1, min(AT_ONCE // rows.shape[1], -(-len(rows) // threads)))
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    found, sums = np.empty(len(rows), rows.dtype), np.empty(len(rows), rows.dtype)

    def select(block: slice) -> None:
        found[block], promising = _of_promising(rows[block], places[block])
        if scale is not None:
            sums[block] = _sum(promising, found[block], scale, shift)

    if threads == 1:
        for block in blocks:
            select(block)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(select, blocks))
    return torch.from_numpy(found).view(s.shape[:-1]), torch.from_numpy(sums).view(s.shape[:-1])


def _of_promising(rows: Any, k: Any) -> tuple[Any, Any]:
    """Give the k-th largest of each row, from those at or above a bound that a sample of the row suggests.

    With it comes a matrix whose rows hold everything that is not less, in any order.
    """
    length, most = rows.shape[1], int(k.max())
    share = most / SAMPLED
    # Four standard deviations deeper than the sample's own k-th: rows that nevertheless hold fewer are rare.
    rank = math.ceil(share + 4 * math.sqrt(share)) + 1
    if length < LONG or 2 * rank * SAMPLED > length:
        return _of_all(rows, k), rows
    sample = np.ascontiguousarray(rows[:, ::SAMPLED])
    place = sample.shape[1] - rank
    sample.partition(place, axis=1)
    promising = np.flatnonzero(rows >= sample[:, place, None])
    counts = np.diff(np.searchsorted(promising, np.arange(len(rows) + 1) * length))
    width = int(counts.max())
    if bool((counts < k).any()) or 2 * width > length:
        return _of_all(rows, k), rows
    packed = np.full((len(rows), width), -np.inf, rows.dtype)
    packed[np.arange(width) < counts[:, None]] = rows.reshape(-1)[promising]
    return _of_all(packed, k), packed


def _of_all(rows: Any, k: Any) -> Any:
    """Give the k-th largest of each row, which is reordered."""
    place = rows.shape[1] - k
    places = np.unique(place)
    if len(places) <= PLACES:
        rows.partition(places, axis=1)
    else:
        rows.sort(axis=1)
    return rows[np.arange(len(rows)), place]


def _sum(rows: Any, least: Any, scale: float, shift: float) -> Any:
    """Give the sum of exp(scale * s - shift) over what is `least` or more, and finite."""
    counts = (rows >= least[:, None]) & (rows > -np.inf)
    exponents = np.where(counts, rows, 0)
    exponents *= scale
    exponents -= shift
    np.exp(exponents, out=exponents)
    exponents *= counts
    return exponents.sum(axis=1)
