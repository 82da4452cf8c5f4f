"""Rank, world size and the exact gather: the only file that talks to torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_AVAILABLE = dist.is_available()
_alone = ContextVar("contrast_alone", default=False)


@contextmanager
def local() -> Iterator[None]:
    """Switch communication off inside the block: a call of a loss on one process, validation for example."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def alone() -> bool:
    """Tell whether this call stands inside `local()`."""
    return _alone.get()


def world_size() -> int:
    """Count the processes that work together; 1 without a process group and inside `local()`."""
    if not (_AVAILABLE and dist.is_initialized()) or alone():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def exchange_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Give every process's list of sizes, in rank order, as host integers. All lists have the same length."""
    own = torch.tensor(list(sizes), dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return [[int(size) for size in row] for row in torch.stack(everyone).tolist()]


def gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate every process's rows in rank order, with gradient.

    The gradient that reaches `x` is the sum of what every process sends back to these rows.

    Args:
        x: (n, ...) this process's rows; n may differ between processes and may be 0.
        sizes: n of every process, in rank order.

    Returns:
        (sum(sizes), ...)
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x, tuple(sizes))
    return gathered


def sizes_of(own: int, device: torch.device) -> list[int]:
    """Give every process's number of rows, in rank order; every process calls it with its own."""
    return [own] if world_size() == 1 else [size for (size,) in exchange_sizes([own], device)]


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate every process's rows in rank order, with gradient, where sizes are not known yet."""
    return gather(x, sizes_of(len(x), x.device))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.start = sum(sizes[: rank()])
        ctx.size = len(x)
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded)
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.size], None


def shared(parameter: Tensor) -> Tensor:
    """Give a loss's own parameter unchanged, its gradient averaged over the processes.

    So the parameter stays equal everywhere also where only the encoder is wrapped in DistributedDataParallel; inside
    DistributedDataParallel it changes nothing, since an average of equal numbers is that number.
    """
    if world_size() == 1:
        return parameter
    same: Tensor = _Shared.apply(parameter)
    return same


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.world = world_size()
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean: Tensor = gradients[0].contiguous() / ctx.world
        dist.all_reduce(mean)
        return mean


def total(x: Tensor) -> Tensor:
    """Sum `x` over the processes, with gradient (the sum of every process's gradient)."""
    if world_size() == 1:
        return x
    summed: Tensor = _Total.apply(x)
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        summed = x.contiguous().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed
