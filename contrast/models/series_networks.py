"""Networks for series: a 1-d ResNet, a dilated-convolution encoder, a small transformer.

Each takes x (N, C, L), zero where nothing was observed, and mask (N, L) bool, True up to the series' own length (None:
all steps), and returns (N, F). The result does not depend on the amount of padding: padded steps are zeroed before
every convolution, so that they equal the zero padding of the convolution itself, and pooling excludes them. Every
length from 1 on works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.models.batch_norm import MaskedBatchNorm1d


class ResNet1d(nn.Module):
    """A residual network over time: a strided first convolution, then stages of two-convolution blocks, mean pooling.

    Every stage after the first halves the length and doubles the channels; F = width * 2 ** (stages - 1). BatchNorm
    uses observed steps only.

    Args:
        channels: C of the series.
        width: channels of the first stage.
        blocks: number of blocks per stage.
        kernel: steps of each convolution, odd.
        stride: of the first convolution, in steps.

    Source: after Wang, Yan and Oates 2017, Time series classification from scratch, arXiv:1611.06455, with strides.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"series"})

    def __init__(
        self, channels: int, width: int = 64, blocks: Sequence[int] = (1, 1, 1), kernel: int = 7, stride: int = 2
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or kernel < 1:
            raise ValueError(f"needs an odd kernel, which has a middle step; got {kernel}.")
        if width < 1 or stride < 1 or not blocks or min(blocks) < 1:
            raise ValueError(f"needs positive numbers; got width {width}, stride {stride}, blocks {blocks}.")
        self.stem = _NormedConvolution(channels, width, kernel, stride)
        widths = [width * 2**stage for stage in range(len(blocks)) for _ in range(blocks[stage])]
        self.blocks = nn.ModuleList(
            _ResidualBlock(before, after, kernel) for before, after in zip([width, *widths[:-1]], widths, strict=True)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features (N, F) of series (N, C, L)."""
        x, mask = self.stem(x, mask)
        x = F.relu(x)
        for block in self.blocks:
            x, mask = block(x, mask)
        return masked_mean(x, mask)


class Dilated(nn.Module):
    """Residual convolutions over time whose dilation doubles from layer to layer, as in TS2Vec, then pooling.

    The receptive field of `depth` + 1 layers is about 2 ** (depth + 3) steps. TS2Vec itself has depth 10 and compares
    single steps; here they are pooled to one vector per series.

    Args:
        channels: C of the series.
        width: channels of the inner layers.
        out: F.
        depth: layers with dilation 1, 2, 4, ...; one more layer has F output channels.
        pooling: over time: max (as TS2Vec's instance representation) or mean.

    Source: Yue et al. 2022, TS2Vec, arXiv:2106.10466, section 2.4.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"series"})

    def __init__(
        self,
        channels: int,
        width: int = 64,
        out: int = 320,
        depth: int = 8,
        pooling: Literal["max", "mean"] = "max",
    ) -> None:
        super().__init__()
        if min(width, out, depth) < 1:
            raise ValueError(f"needs positive numbers; got width {width}, out {out}, depth {depth}.")
        self.stem = nn.Conv1d(channels, width, 1)
        self.layers = nn.ModuleList(
            _DilatedLayer(width, out if layer == depth else width, 2**layer) for layer in range(depth + 1)
        )
        self.pool = masked_max if pooling == "max" else masked_mean

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features (N, F) of series (N, C, L)."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.pool(x, mask)


class Transformer1d(nn.Module):
    """A small transformer over patches of the series, with sinusoidal positions, mean pooling; F = width.

    Args:
        channels: C of the series.
        shape: (C, L) of the series; sets `patch` if that is None.
        width: F, a multiple of 2 * heads.
        depth: layers.
        heads: attention heads.
        patch: steps per token; None: the power of two that makes about 64 to 128 tokens of L steps.
        dropout: in [0, 1).
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"series"})

    def __init__(
        self,
        channels: int,
        shape: Sequence[int] = (1, 512),
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        patch: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % (2 * heads) or (patch is not None and patch < 1):
            raise ValueError(
                "needs positive depth, heads and patch, and a width that is a multiple of 2 * heads; "
                f"got width {width}, depth {depth}, heads {heads}, patch {patch}."
            )
        self.patch = patch or 2 ** int(math.log2(max(shape[-1] // 64, 1)))
        self.stem = nn.Conv1d(channels, width, self.patch, self.patch)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        # TransformerEncoder copies one layer with its weights: without this all layers start equal.
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features (N, F) of series (N, C, L)."""
        x = F.pad(zero_padding(x, mask), (0, -x.shape[-1] % self.patch))
        tokens = self.stem(x).transpose(1, 2)
        tokens = tokens + sinusoids(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)
        mask = strided_mask(mask, self.patch)
        ignored = None
        if mask is not None:
            # A softmax over no token is NaN: a series without observations attends to its first token, and pools none.
            ignored = ~mask
            ignored[:, 0] = False
        tokens = self.layers(tokens, src_key_padding_mask=ignored)
        return masked_mean(tokens.transpose(1, 2), mask)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (N, C, L) with zeros where the mask (N, L) is False."""
    return x if mask is None else x * mask[:, None].to(x.dtype)


def strided_mask(mask: Tensor | None, stride: int) -> Tensor | None:
    """Return the mask of a strided convolution's output: that of the step on which each output step is centred."""
    return mask if mask is None or stride == 1 else mask[:, ::stride]


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the mean (N, C) over the steps where the mask is True; zeros if there are none."""
    if mask is None:
        return x.mean(-1)
    return zero_padding(x, mask).sum(-1) / mask.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)


def masked_max(x: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the maximum (N, C) over the steps where the mask is True; zeros if there are none."""
    if mask is None:
        return x.amax(-1)
    largest = x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min).amax(-1)
    return largest.masked_fill(~mask.any(-1, keepdim=True), 0)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Return the (length, width) position encoding of Vaswani et al. 2017, arXiv:1706.03762, section 3.5."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class _NormedConvolution(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = nn.Conv1d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.norm = MaskedBatchNorm1d(out)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.convolution(zero_padding(x, mask))
        mask = strided_mask(mask, self.stride)
        return self.norm(x, mask), mask


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.first = _NormedConvolution(channels, out, kernel, stride)
        self.second = _NormedConvolution(out, out, kernel)
        self.shortcut = None if channels == out else _NormedConvolution(channels, out, 1, stride)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shortcut = x if self.shortcut is None else self.shortcut(x, mask)[0]
        y, mask = self.first(x, mask)
        y, mask = self.second(F.relu(y), mask)
        return F.relu(y + shortcut), mask


class _DilatedLayer(nn.Module):
    def __init__(self, channels: int, out: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, out, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv1d(out, out, 3, padding=dilation, dilation=dilation)
        self.shortcut = None if channels == out else nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.first(zero_padding(F.gelu(x), mask))
        return cast(Tensor, self.second(zero_padding(F.gelu(y), mask)) + shortcut)
