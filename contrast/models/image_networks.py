"""A convolutional network for small images that is fast enough to train on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn


class SmallConv(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU for images of 8 to 64 pixels, then the mean over the image.

    The first convolution has the stride that brings the longer side to 16 pixels or fewer; each further stage halves
    the side and doubles the channels. Convolutions after a stage's first are residual. Any size and number of channels
    works; F = width * 2 ** (stages - 1).

    Args:
        channels: C of the images.
        shape: (C, H, W) of the images, which sets the first stride; other sizes work too, at the same stride.
        width: channels of the first stage.
        blocks: number of convolutions per stage.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(
        self, channels: int, shape: Sequence[int] = (1, 16, 16), width: int = 64, blocks: Sequence[int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        if width < 1 or not blocks or min(blocks) < 1:
            raise ValueError(f"needs a positive width and blocks; got width {width} and blocks {blocks}.")
        stride = 1
        while max(shape[1:]) > 16 * stride and stride < 8:
            stride *= 2
        layers: list[nn.Module] = []
        for stage, repeats in enumerate(blocks):
            out = width * 2**stage
            # With a kernel of 2 * stride + 1 neighbouring positions of the first convolution overlap.
            layers.append(
                _Convolution(channels, out, 2, 3) if stage else _Convolution(channels, out, stride, 2 * stride + 1)
            )
            layers += [_Convolution(out, out, 1, 3, residual=True) for _ in range(repeats - 1)]
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (N, F) of images (N, C, H, W)."""
        return cast(Tensor, self.layers(x)).mean((2, 3))


class _Convolution(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, kernel: int, residual: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.residual = residual
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.norm(self.convolution(x)))
        return F.relu(x + y if self.residual else y)
