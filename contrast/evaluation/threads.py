"""One thread for small operations, on which several threads mostly wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 500_000_000
"""Below this many multiplications per parallel region, one thread is faster."""


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Use one thread inside the block for fewer than SMALL multiplications; then restore the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
