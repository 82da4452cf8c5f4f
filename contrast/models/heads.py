"""Heads: from features to the embeddings that a loss compares; discarded after pretraining.

A head is a function that returns an nn.Module, or a class, with `@HEADS.register(name)`; `width` is the features'.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from contrast.core.registry import Registry

HEADS = Registry("head")
"""The heads by name."""


@HEADS.register("none", aliases=["identity"])
def none() -> nn.Module:
    """Return the identity, (N, F) -> (N, F)."""
    return nn.Identity()


@HEADS.register("linear")
def linear(width: int, out: int = 128, bias: bool = True) -> nn.Module:
    """Return one linear layer, (N, width) -> (N, out).

    Args:
        width: of the features; filled in by the run.
        out: width of the embeddings.
        bias: whether the layer adds a constant.
    """
    _check_positive(width=width, out=out)
    return nn.Linear(width, out, bias)


@HEADS.register("mlp", aliases=["projection", "projector", "predictor"])
def mlp(
    width: int,
    hidden: int | None = None,
    out: int = 128,
    layers: int = 2,
    batch_norm: bool = True,
    last_batch_norm: bool = False,
) -> nn.Module:
    """Return linear layers with ReLU between them, (N, width) -> (N, out).

    Args:
        width: of the features; filled in by the run.
        hidden: width of the inner layers; None: that of the features.
        out: width of the embeddings.
        layers: number of linear layers; 1 is a linear head.
        batch_norm: between each linear layer and its ReLU.
        last_batch_norm: also after the last layer, without scale and shift, as in SimSiam and MoCo v3.
    """
    hidden = width if hidden is None else hidden
    _check_positive(width=width, hidden=hidden, out=out, layers=layers)
    parts: list[nn.Module] = []
    for layer in range(layers - 1):
        parts.append(nn.Linear(width if layer == 0 else hidden, hidden, bias=not batch_norm))
        if batch_norm:
            parts.append(nn.BatchNorm1d(hidden))
        parts.append(nn.ReLU(inplace=True))
    parts.append(nn.Linear(width if layers == 1 else hidden, out, bias=not last_batch_norm))
    if last_batch_norm:
        parts.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*parts)


@HEADS.register("multi_head")
class MultiHead(nn.Module):
    """H parallel heads, (N, width) -> (H, N, out), as in AMCL.

    Args:
        width: of the features; filled in by the run.
        heads: H.
        hidden: width of the inner layers of each head; None: as the features.
        out: width of the embeddings of each head.
        layers: how many linear layers each head has.
        batch_norm: between each linear map and its ReLU.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        hidden: int | None = None,
        out: int = 128,
        layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        _check_positive(heads=heads)
        self.heads = nn.ModuleList(mlp(width, hidden, out, layers, batch_norm) for _ in range(heads))

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings (H, N, out)."""
        return torch.stack([cast(Tensor, head(features)) for head in self.heads])


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} of a head must be 1 or more; got {number}.")
