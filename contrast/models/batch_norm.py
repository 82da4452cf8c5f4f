"""Batch normalisation whose statistics exclude padding, and batch normalisation over all processes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrast.core import distributed
from contrast.core.registry import InputError


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose mean and variance include only the steps where a mask is True.

    Without a mask it is PyTorch's own. With one, x is (N, C, L) and mask (N, L) bool; the output at the other steps is
    meaningless and must be masked before it is read.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return the normalised (N, C, L)."""
        if mask is None or not _uses_batch(self):
            return super().forward(input)
        return _apply_moments(self, input, _moments(input, mask))


class SynchronisedBatchNorm(_BatchNorm):
    """Batch normalisation over the samples of all processes: equal to one process on the concatenation.

    Value and gradient are exact, also with unequal and with empty local batches, on any device and backend (PyTorch's
    SyncBatchNorm does not support the CPU). Each process sends its count, mean and sum of squared deviations, which
    are combined as by Chan, Golub and LeVeque 1983, without cancellation. In evaluation mode nothing is sent.

    x is (N, C, ...); the optional mask is (N, L) for x (N, C, L). `drop` and `act` follow the normalisation, as in
    timm's BatchNormAct layers.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), at least 2 axes; got {input.dim()}.")

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return the normalised (N, C, ...)."""
        self._check_input_dim(input)
        if not _uses_batch(self):
            normalised = super().forward(input)
        else:
            normalised = _apply_moments(self, input, _global_moments(*_moments(input, mask)))
        return cast(Tensor, self.act(self.drop(normalised)))


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation inside `module` by a synchronised one with the same parameters and buffers.

    The names in the state dict do not change. Returns `module`, or its replacement if it is itself a batch
    normalisation.

    Raises:
        InputError: for a subclass of PyTorch's batch normalisation with its own computation.

    Example:
        >>> network = synchronise(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
        >>> type(network[1]).__name__
        'SynchronisedBatchNorm'
    """
    if isinstance(module, SynchronisedBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        return _synchronised(module)
    for name, child in module.named_children():
        replacement = synchronise(child)
        if replacement is not child:
            module.add_module(name, replacement)
    return module


def _synchronised(norm: _BatchNorm) -> SynchronisedBatchNorm:
    supported = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, MaskedBatchNorm1d)
    activated = isinstance(getattr(norm, "drop", None), nn.Module) and isinstance(getattr(norm, "act", None), nn.Module)
    if type(norm) not in supported and not activated:
        raise InputError(
            f"batch normalisation of the kind {type(norm).__name__} cannot be synchronised over processes; "
            "use torch.nn.BatchNorm1d, 2d or 3d in the network, or train on one process."
        )
    new = SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    if activated:
        new.drop, new.act = cast(nn.Module, norm.drop), cast(nn.Module, norm.act)
    return new.train(norm.training)


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the number of values per channel (), their mean (C,) and their sum of squared deviations (C,)."""
    x = x if x.dtype == torch.float64 else x.float()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    if mask is not None:
        weight = mask[:, None].to(x.dtype)
        count = weight.sum()
        mean = (x * weight).sum(axes) / count.clamp_min(1)
        deviation = (x - mean[:, None]) * weight
        return count, mean, deviation.square().sum(axes)
    count = torch.full((), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        # A process without rows must still communicate in the backward pass, hence the sum instead of zeros.
        return count, x.sum(axes), x.sum(axes)
    variance, mean = torch.var_mean(x, axes, correction=0)
    return count, mean, variance * count


def _global_moments(count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same three values over all processes."""
    if distributed.world_size() == 1:
        return count, mean, squares
    own_row = torch.arange(distributed.world_size(), device=mean.device) == distributed.rank()
    own = torch.cat([count[None], mean, squares])
    table = distributed.total(own_row.to(own.dtype)[:, None] * own)
    counts, means, all_squares = table.detach()[:, :1], table[:, 1 : 1 + len(mean)], table[:, 1 + len(mean) :]
    total = counts.sum()
    common = (counts * means).sum(0) / total.clamp_min(1)
    return total, common, (all_squares + counts * (means - common).square()).sum(0)


def _apply_moments(norm: _BatchNorm, x: Tensor, moments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    count, mean, squares = moments
    variance = squares / count.clamp_min(1)
    if norm.training and norm.track_running_stats:
        _update_running_statistics(norm, count, mean.detach(), squares.detach() / (count - 1).clamp_min(1))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    spread = (1, -1) + (1,) * (x.dim() - 2)
    return torch.addcmul(shift.view(spread), x.to(scale.dtype), scale.view(spread)).to(x.dtype)


@torch.no_grad()
def _update_running_statistics(norm: _BatchNorm, count: Tensor, mean: Tensor, unbiased_variance: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    # Without any observed value the running statistics must not change.
    share = torch.where(count > 0, share, 0.0)
    # Through .data, as PyTorch's own kernel does: an earlier call without a mask has saved the running statistics for
    # its backward pass and, though it does not read them there, would raise an error for ones changed in place.
    norm.running_mean.data += share * (mean.to(norm.running_mean.dtype) - norm.running_mean)
    norm.running_var.data += share * (unbiased_variance.to(norm.running_var.dtype) - norm.running_var)
