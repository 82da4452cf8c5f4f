"""Checks of a reduction's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from contrast.core.reductions.kinds import Kth, Reduction, arguments
from contrast.core.reductions.layout import Layout


def check(reduction: Reduction, layout: Layout) -> None:
    """Check the relation, the shapes of masks and arguments, and that references exist if they are needed.

    Raises:
        ValueError: for an argument that does not fit.
    """
    if reduction.over not in ("positive", "negative", "remembered", "all"):
        raise ValueError(f"over is 'positive', 'negative', 'remembered' or 'all'; got {reduction.over!r}.")
    for name, size in (("among", layout.candidate_count), ("rows", layout.anchor_count)):
        mask = getattr(reduction, name, None)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (size,)):
            raise ValueError(f"{name} is ({size},) bool; got {mask.dtype} of shape {tuple(mask.shape)}.")
    if isinstance(reduction, Kth):
        _check_k(reduction.k, layout)
    above = getattr(reduction, "above", None)
    if isinstance(above, Kth):
        check(above, layout)
    elif isinstance(above, Tensor):
        shape = (*layout.heads, layout.anchor_count)
        if above.shape not in (shape, shape[-1:]):
            raise ValueError(f"above is a tensor of thresholds, {shape}, or a Kth; got the shape {tuple(above.shape)}.")
    elif above is not None:
        raise ValueError(f"above is a tensor of thresholds, (N,) or (H, N), or a Kth; got {above!r}.")
    for name, value in arguments(reduction).items():
        if isinstance(value, Tensor):
            _check_shape(name, value, layout)
        elif isinstance(value, str):
            if value != "reference":
                raise ValueError(f"weight is 'reference', a number, a tensor or a PairFunction; got {value!r}.")
            layout.check_references()


def _check_shape(name: str, value: Tensor, layout: Layout) -> None:
    """Check that an argument can be broadcast over the pairs and spans at most one of N and M."""
    n, m, heads = layout.anchor_count, layout.candidate_count, layout.heads
    if value.numel() == 1:
        return
    if name == "bias":
        if value.shape not in ((n,), (*heads, n)):
            raise ValueError(f"bias is a number, ({n},) or {(*heads, n)}; got the shape {tuple(value.shape)}.")
        return
    if value.ndim >= 2 and value.shape[-2] > 1 and value.shape[-1] > 1:
        raise ValueError(
            "a scale, weight or log_weight spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); got the shape "
            f"{tuple(value.shape)}. For a value per pair pass a PairFunction, a module (anchor, candidate) -> tile."
        )
    fits = zip(reversed(value.shape), (m, n, *heads), strict=False)
    if value.ndim > 2 + len(heads) or not all(size in (1, full) for size, full in fits):
        raise ValueError(
            f"{name} must broadcast over {(*heads, n, m)} pairs: a number, ({n}, 1), (1, {m})"
            f"{f' or ({heads[0]}, 1, 1)' if heads else ''}; got the shape {tuple(value.shape)}."
        )


def _check_k(k: int | Tensor, layout: Layout) -> None:
    """Check that k is a number of candidates, for all anchors or per anchor."""
    if isinstance(k, Tensor):
        shape = (*layout.heads, layout.anchor_count)
        if k.dtype != torch.int64 or k.shape not in ((), shape, shape[-1:]):
            raise ValueError(f"k is a number, or {tuple(shape)} int64; got {k.dtype} of shape {tuple(k.shape)}.")
    elif not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k is a whole number, 1 or more; got {k!r}.")
