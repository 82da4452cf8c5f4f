"""Whether a memory fits into the machine's, said before training."""

from __future__ import annotations

import os
from pathlib import Path

from contrast.core import distributed

GIB = 2**30


def check_free_memory(samples: int, bytes_each: int, bytes_per_process: int) -> None:
    """Refuse a bank that is larger than the free memory.

    Args:
        samples: how many embeddings.
        bytes_each: of one embedding.
        bytes_per_process: above this the processes share them.
    """
    needed = samples * bytes_each
    processes = distributed.world_size()
    if processes == 1:  # torchrun says how many there will be
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = needed // processes if needed > bytes_per_process else needed
    free = free_bytes()
    if free is not None and share > free:
        shared = f", {share / GIB:.1f} GiB on each of {processes} processes" if share < needed else ""
        raise ValueError(
            f"a bank of {samples} samples at {bytes_each} bytes needs {needed / GIB:.1f} GiB{shared}, and "
            f"{free / GIB:.1f} GiB of memory are free: take a queue, a smaller dim, or more processes."
        )


def free_bytes() -> int | None:
    """Give the memory that is free or can be freed; None where the system does not tell."""
    figures = Path("/proc/meminfo")
    if figures.exists():
        for line in figures.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
