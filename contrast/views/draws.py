"""Random numbers per sample, on the batch's device without synchronisation, and checks of operations' arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(x: Tensor, low: float, high: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Return uniform numbers in [low, high) of the given shape, by default (N,), one per sample of x."""
    drawn = torch.rand(shape or x.shape[:1], generator=generator, device=x.device, dtype=torch.float32)
    return drawn.mul_(high - low).add_(low)


def normal(x: Tensor, mean: float, deviation: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Return normally distributed numbers of the given shape."""
    drawn = torch.randn(shape, generator=generator, device=x.device, dtype=torch.float32)
    return drawn.mul_(deviation).add_(mean)


def bernoulli(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return a mask that is True for each of x's N samples with probability p, shaped to broadcast over x."""
    return uniform(x, 0, 1, generator).lt(p).view(-1, *(1,) * (x.dim() - 1))


def check_share(**shares: float) -> None:
    """Check that every argument is in [0, 1], else raise a ValueError that names the first that is not."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share in [0, 1]; got {value}.")


def check_amount(**amounts: float) -> None:
    """Check that every argument is finite and at least 0, else raise a ValueError that names the first that is not."""
    for name, value in amounts.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0; got {value}.")


def check_range(name: str, bounds: tuple[float, float], *, most: float = float("inf")) -> None:
    """Check that 0 < low <= high <= most, else raise a ValueError."""
    low, high = bounds
    if not 0 < low <= high <= most or high == float("inf"):
        bound = f" <= {most:g}" if most < float("inf") else ""
        raise ValueError(f"{name} is a range [low, high] with 0 < low <= high{bound}; got [{low}, {high}].")
