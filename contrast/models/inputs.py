"""The encoder's door: from raw batches to what views expect, and from views to what a backbone reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contrast.core.registry import InputError

Numbers = Sequence[float] | NDArray[np.floating] | Tensor


class ImageInputs(nn.Module):
    """Images: raw values to [0, 1] for the views, standardised per channel for the backbone.

    Args:
        value_range: the raw values that become 0 and 1; values outside are clipped, since views work in [0, 1].
        mean, std: (C,), of the training images in [0, 1]; a channel that never varies is only centred.
    """

    def __init__(self, value_range: tuple[float, float], mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.low, self.high = (float(value) for value in value_range)
        if not self.low < self.high:
            raise InputError(f"value_range must rise from the darkest to the brightest value; got {value_range}.")
        self.mean, self.std = _statistics(self, mean, std, axes=2)

    def prepare(self, raw: Tensor) -> Tensor:
        """Give float32 (N, C, H, W) in [0, 1] for raw images of any type."""
        _check_shape(raw, "images (N, C, H, W)", 4, self.mean.numel())
        return ((raw.float() - self.low) / (self.high - self.low)).clamp(0, 1)

    def restore(self, x: Tensor) -> Tensor:
        """Give prepared images in raw values again, float32: what another network's `prepare` reads."""
        return x * (self.high - self.low) + self.low

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Give standardised images, and no mask."""
        return (x - self.mean) / self.std, None

    def statistics(self) -> dict[str, list[float]]:
        """Give the constructor's arguments in plain numbers."""
        return {
            "value_range": [self.low, self.high],
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }


class SeriesInputs(nn.Module):
    """Series: raw units to standardised ones with NaN kept for the views, then zeros and a mask for the backbone.

    Args:
        mean, std: (C,), of the observed training values in raw units; a channel that never varies is only centred.
    """

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.mean, self.std = _statistics(self, mean, std, axes=1)

    def prepare(self, raw: Tensor) -> Tensor:
        """Give float32 (N, C, L), standardised; NaN stays NaN."""
        _check_shape(raw, "series (N, C, L)", 3, self.mean.numel())
        return (raw.float() - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """Give prepared series in raw units again: what another network's `prepare` reads."""
        return x * self.std + self.mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give x with zeros for NaN, and the mask (N, L): True up to the last step with any observed channel.

        Gaps before that step are zeros, the training mean, and count. On the CPU, where looking costs no
        synchronisation, a mask that is True everywhere becomes None, the faster way to the same result.
        """
        seen = ~x.isnan()
        mask = seen.any(1).flip(-1).cumsum(-1).flip(-1) > 0
        x = torch.where(seen, x, 0.0)
        return (x, None) if mask.device.type == "cpu" and bool(mask.all()) else (x, mask)

    def statistics(self) -> dict[str, list[float]]:
        """Give the constructor's arguments in plain numbers."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}


def _statistics(module: nn.Module, mean: Numbers, std: Numbers, axes: int) -> tuple[Tensor, Tensor]:
    centre = torch.as_tensor(mean, dtype=torch.float32).flatten().nan_to_num(nan=0.0)
    spread = torch.as_tensor(std, dtype=torch.float32).flatten().nan_to_num(nan=0.0)
    if len(centre) != len(spread) or len(centre) == 0:
        raise InputError(f"mean and std must have one number a channel; got {len(centre)} and {len(spread)}.")
    spread = torch.where(spread > 0, spread, 1.0)
    for name, values in (("mean", centre), ("std", spread)):
        module.register_buffer(name, values.view(-1, *(1,) * axes).clone())
    return module.get_buffer("mean"), module.get_buffer("std")


def _check_shape(raw: Tensor, expected: str, dimensions: int, channels: int) -> None:
    if raw.dim() != dimensions or raw.shape[1] != channels:
        raise InputError(
            f"the encoder expects {expected} with {channels} channel(s); got the shape {tuple(raw.shape)}."
        )
