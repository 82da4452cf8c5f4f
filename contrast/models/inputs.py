"""The encoder's inputs: raw batches to the values that views change, and views to the backbone's input."""

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

    Example:
        >>> inputs = ImageInputs((0, 255), mean=[0.5], std=[0.25])
        >>> prepared = inputs.prepare(torch.tensor([[[[0, 51, 255]]]]))
        >>> prepared.flatten(), inputs(prepared)[0].flatten()
        (tensor([0.0000, 0.2000, 1.0000]), tensor([-2.0000, -1.2000,  2.0000]))
    """

    def __init__(self, value_range: tuple[float, float], mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.low, self.high = (float(value) for value in value_range)
        if not self.low < self.high:
            raise InputError(f"value_range must rise from the darkest to the brightest value; got {value_range}.")
        self.mean, self.std = _register_statistics(self, mean, std, axes=2)

    def prepare(self, raw: Tensor) -> Tensor:
        """Return float32 (N, C, H, W) in [0, 1] for raw images of any type."""
        _check_raw_shape(raw, "images (N, C, H, W)", 4, self.mean.numel())
        return ((raw.float() - self.low) / (self.high - self.low)).clamp(0, 1)

    def restore(self, x: Tensor) -> Tensor:
        """Return prepared images in raw values, float32: the input of another network's `prepare`."""
        return x * (self.high - self.low) + self.low

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return standardised images, and no mask."""
        return (x - self.mean) / self.std, None

    def statistics(self) -> dict[str, list[float]]:
        """Return the constructor's arguments in plain numbers."""
        return {
            "value_range": [self.low, self.high],
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }


class SeriesInputs(nn.Module):
    """Series: standardised values with NaN for the views, then zeros and a mask for the backbone.

    Args:
        mean, std: (C,), of the observed training values in raw units; a channel that never varies is only centred.

    Example:
        >>> inputs = SeriesInputs(mean=[10.0], std=[2.0])
        >>> values, mask = inputs(inputs.prepare(torch.tensor([[[12.0, torch.nan, 8.0, torch.nan]]])))
        >>> values.tolist(), mask.tolist()
        ([[[1.0, 0.0, -1.0, 0.0]]], [[True, True, True, False]])
    """

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.mean, self.std = _register_statistics(self, mean, std, axes=1)

    def prepare(self, raw: Tensor) -> Tensor:
        """Return float32 (N, C, L), standardised; NaN stays NaN."""
        _check_raw_shape(raw, "series (N, C, L)", 3, self.mean.numel())
        return (raw.float() - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """Return prepared series in raw units: the input of another network's `prepare`."""
        return x * self.std + self.mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x with zeros for NaN, and the mask (N, L): True up to the last step with any observed channel.

        Gaps before that step are zeros, the training mean, and part of the series. On the CPU, where the test needs no
        synchronisation, a mask that is True everywhere becomes None, which is faster and gives the same result.
        """
        observed = ~x.isnan()
        mask = observed.any(1).flip(-1).cumsum(-1).flip(-1) > 0
        x = torch.where(observed, x, 0.0)
        return (x, None) if mask.device.type == "cpu" and bool(mask.all()) else (x, mask)

    def statistics(self) -> dict[str, list[float]]:
        """Return the constructor's arguments in plain numbers."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}


def _register_statistics(module: nn.Module, mean: Numbers, std: Numbers, axes: int) -> tuple[Tensor, Tensor]:
    centre = torch.as_tensor(mean, dtype=torch.float32).flatten().nan_to_num(nan=0.0)
    spread = torch.as_tensor(std, dtype=torch.float32).flatten().nan_to_num(nan=0.0)
    if len(centre) != len(spread) or len(centre) == 0:
        raise InputError(f"mean and std must have one number per channel; got {len(centre)} and {len(spread)}.")
    spread = torch.where(spread > 0, spread, 1.0)
    for name, values in (("mean", centre), ("std", spread)):
        module.register_buffer(name, values.view(-1, *(1,) * axes).clone())
    return module.get_buffer("mean"), module.get_buffer("std")


def _check_raw_shape(raw: Tensor, expected: str, dimensions: int, channels: int) -> None:
    if raw.dim() != dimensions or raw.shape[1] != channels:
        raise InputError(
            f"the encoder expects {expected} with {channels} channel(s); got the shape {tuple(raw.shape)}."
        )
