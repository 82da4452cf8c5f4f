"""One thread for small work: several would wait for each other, most of all on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 500_000_000
"""Up to so many multiplications between two meetings of the threads are work for one of them."""


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Let one thread do what is small; afterwards the number of threads is what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
