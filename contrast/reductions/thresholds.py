"""The k-th largest similarity of each row, from strips of whole rows that are written again and again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from contrast.reductions.asked import Kth
from contrast.reductions.grid import blocks, low_tiles
from contrast.reductions.identity import by_tile
from contrast.reductions.work import Gradients, Work

SHARED = 2**17
"""From so many numbers on, processors share the selecting."""
PLACES = 16
"""Rows that ask for more different places than this are sorted."""


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
        return (
            isinstance(asked, Kth)
            and not work.heads
            and not work.rules
            and (asked.over == "all" or (asked.over != "positive" and work.identity.strangers is not None))
        )

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the thresholds, (N,) each."""
        return [self._kth(asked) for asked in self.asked], []

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """A threshold has no gradient."""

    def _kth(self, asked: Kth) -> Tensor:
        work, identity = self.work, self.work.identity
        blank = identity.excluded if asked.over == "all" else identity.strangers
        assert blank is not None
        entries = by_tile(blank, self.rows, self.columns)
        found = identity.count(asked.over, asked.among, None)
        made = work.new_rows()
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
            count = found[rows.start : rows.stop]
            k = asked.k[rows.start : rows.stop] if isinstance(asked.k, Tensor) and asked.k.ndim else asked.k
            k = torch.minimum(torch.as_tensor(k), count).clamp(min=1)
            made[rows.start : rows.stop] = kth_largest(own, k).masked_fill_(count == 0, 0)
        return made


def kth_largest(s: Tensor, k: Tensor) -> Tensor:
    """Give the k-th largest of each row of (..., M), which may be reordered; k: (...) from 1 to M."""
    if not s.shape[-1]:
        return s.sum(dim=-1)
    if s.device.type != "cpu":
        return s.sort(dim=-1, descending=True).values.gather(-1, (k - 1).unsqueeze(-1)).squeeze(-1)
    # numpy selects several times faster than torch; one call serves rows that ask for different places.
    place = s.shape[-1] - k.expand(s.shape[:-1])
    flat, places = s.view(-1, s.shape[-1]).numpy(), torch.unique(place).numpy()
    _rows_at_once(lambda rows: rows.partition(places, axis=-1) if len(places) <= PLACES else rows.sort(axis=-1), flat)
    return s.gather(-1, place.unsqueeze(-1)).squeeze(-1)


def _rows_at_once(work: Callable[[Any], None], flat: Any) -> None:
    """Do this to all rows of an array, some on each processor where they are many; numpy lets go of Python's lock."""
    threads = torch.get_num_threads() if flat.size >= SHARED else 1
    if threads == 1:
        work(flat)
        return
    step = -(-len(flat) // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [flat[start : start + step] for start in range(0, len(flat), step)]))
