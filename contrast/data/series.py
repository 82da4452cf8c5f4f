"""Series: arrays and lists of any length as one (N, C, L) array, NaN where nothing was observed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contrast.core.registry import InputError
from contrast.data.dataset import Array


def stack_series(series: Sequence[Array], names: Sequence[str], *, where: str) -> Array:
    """Return series of (C, any length) as (N, C, L) float32, the shorter ones padded with NaN at the end.

    Raises:
        InputError: for series that differ in channels, have no value, or have infinite values.
    """
    channels = {len(one) for one in series}
    if len(channels) > 1:
        first = len(series[0])
        row = next(row for row, one in enumerate(series) if len(one) != first)
        raise InputError(
            f"{where}: expected the same channels in every series; {names[0]} has {first} and {names[row]} has "
            f"{len(series[row])}. Fill what was not measured with NaN."
        )
    length = max(one.shape[1] for one in series)
    stacked = np.full((len(series), channels.pop(), length), np.nan, dtype=np.float32)
    for row, one in enumerate(series):
        stacked[row, :, : one.shape[1]] = one
    check_series(stacked, names, where=where)
    return stacked


def arrange_series(x: Array) -> Array:
    """Return an array (N, L) or (N, C, L) of real numbers as (N, C, L) float32."""
    if x.ndim == 2:
        x = x[:, None]
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def pad_series(x: Array, length: int) -> Array:
    """Return (N, C, L) padded with NaN at the end to `length` steps."""
    missing = length - x.shape[2]
    return x if missing == 0 else np.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)


def check_series(x: Array, names: Sequence[str], *, where: str) -> None:
    """Check that series have a value, no infinite values, and two or more steps, else raise an InputError."""
    infinite = np.asarray(np.isinf(x).any(axis=(1, 2)))
    if infinite.any():
        raise InputError(
            f"{where}: expected finite values or NaN for missing ones; {int(infinite.sum())} series contain infinite "
            f"values or values beyond float32, the first is {names[int(np.argmax(infinite))]}. Replace those by NaN."
        )
    empty = np.asarray(np.isnan(x).all(axis=(1, 2)))
    if empty.any():
        raise InputError(
            f"{where}: expected at least one value in every series; {int(empty.sum())} contain NaN only, the first is "
            f"{names[int(np.argmax(empty))]}. Remove those."
        )
    if x.shape[2] < 2:
        raise InputError(f"{where}: expected series of two steps or more; got {x.shape[2]}.")


def describe_gaps(x: Array) -> list[str]:
    """Return notes on unequal lengths and on missing values."""
    observed = ~np.isnan(x)
    steps = np.asarray(observed.any(axis=1))
    lengths = x.shape[2] - np.argmax(steps[:, ::-1], axis=1)
    notes = []
    if lengths.min() != lengths.max():
        notes.append(f"Series are {lengths.min()} to {lengths.max()} steps long; the shorter are padded at the end.")
    inside = np.arange(x.shape[2]) < lengths[:, None]
    missing = int((~observed & inside[:, None]).sum())
    if missing:
        share = missing / (int(inside.sum()) * x.shape[1])
        notes.append(f"{missing} values ({share:.1%}) inside the series are missing.")
    return notes
