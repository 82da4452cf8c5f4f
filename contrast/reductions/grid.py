"""How anchors and candidates are cut into tiles."""

from __future__ import annotations

from contrast.reductions.identity import Run, cut
from contrast.reductions.work import Work

STRIP = 2**21
"""Numbers in a strip of whole rows, for what must see a row at once."""


def low_tiles(work: Work, size: int) -> tuple[int, int]:
    """Give the rows and columns of a tile for what must see whole rows: low where rows are long, and as large.

    A threshold found by `kth` must meet the same similarities to the bit, so whoever compares with one takes these.
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
