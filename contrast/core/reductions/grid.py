"""How anchors and candidates are cut into tiles."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

from contrast.core.reductions.identity import Run, cut
from contrast.core.reductions.work import Work

LINE = 64
"""Bytes of a line of the processor's cache."""
STRIP = 2**21
"""Numbers in a strip of whole rows, for what must see a row at once."""


def low_tiles(work: Work, size: int) -> tuple[int, int]:
    """Give the rows and columns of a tile for what must see whole rows: low where rows are long, and as large.

    A threshold found by `kth` must meet the same similarities to the bit, so whoever compares with one takes these, or
    tiles that are `alike`.
    """
    heads = work.heads[0] if work.heads else 1
    height = min(size, max(16, STRIP // max(1, heads * work.starts[-1])))
    return height, size * (size // height)


def blocks(work: Work, height: int, width: int) -> tuple[list[Run], list[Run]]:
    """Cut anchors and candidates into blocks of one view, as far as views are known, none beyond its part."""
    identity = work.identity
    if work.x.device.type == "cpu":
        rows, columns = identity.anchor_runs, identity.candidate_runs
    else:
        rows = [Run(0, work.x.shape[-2], None)]
        columns = [
            Run(start, stop, None, part)
            for part, (start, stop) in enumerate(zip(work.starts, work.starts[1:], strict=False))
        ]
    return [block for run in rows for block in cut(run, height)], [
        block for run in columns for block in cut(run, width)
    ]


def alike(work: Work, shapes: Iterable[tuple[int, int]], size: int) -> bool:
    """Say whether a similarity has the same bits in tiles of all these shapes, and seen from its candidate's side.

    It is tried out once with random vectors: whether sums are formed in the same order depends on shapes alone, where
    every vector starts at the beginning of a line of the processor's cache.
    """
    if any(z.data_ptr() % LINE or z.stride(-2) * z.element_size() % LINE for z in (work.x, *work.parts)):
        return False
    made = (frozenset(shapes), size, work.x.shape[-1], work.x.dtype)
    return _alike(*made, torch.get_num_threads(), torch.get_float32_matmul_precision())


@lru_cache(maxsize=64)
def _alike(
    shapes: frozenset[tuple[int, int]],
    size: int,
    dims: int,
    dtype: torch.dtype,
    threads: int,  # noqa: ARG001
    precision: str,  # noqa: ARG001
) -> bool:
    most = max((width for _, width in shapes), default=0)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, dims, dtype=dtype, generator=generator) for count in (size, most + -most % size))
    for start in range(0, len(y), size):
        others = y[start : start + size]
        square = x @ others.T
        if not torch.equal(square, (others @ x.T).T):
            return False
        for height, width in shapes:
            if height > size:
                return False
            if width > start and not torch.equal(
                (x[:height] @ y[:width].T)[:, start : start + size], square[:height, : width - start]
            ):
                return False
    return True
