"""Numbers in words: how every message, table and page prints a duration or a size in memory."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return a duration in its one or two largest units.

    Example:
        >>> [format_duration(seconds) for seconds in (0.25, 48, 252, 7200)]
        ['0.25 s', '48 s', '4 min 12 s', '2 h']
    """
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{rounded} s"
    if rounded < 3600:
        large, small = f"{rounded // 60} min", f"{rounded % 60} s"
    else:
        large, small = f"{rounded // 3600} h", f"{rounded % 3600 // 60} min"
    return large if small.startswith("0 ") else f"{large} {small}"


def format_bytes(count: float) -> str:
    """Return a number of bytes in the largest binary unit that it fills, with three digits.

    Example:
        >>> [format_bytes(count) for count in (512, 734_003_200, 1.5 * 2**30)]
        ['512 bytes', '700 MiB', '1.5 GiB']
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
