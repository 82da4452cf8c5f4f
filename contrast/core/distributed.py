"""Rank, world size and the exact gather: the only file that calls torch.distributed.

Everything here counts the processes of the chosen process group: every process, unless `process_group` or
`set_process_group` names another. A backward pass uses the group of its forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_AVAILABLE = dist.is_available()
_alone = ContextVar("contrast_alone", default=False)


class _Group(NamedTuple):
    """A process group; rank and size stand beside it because torch.compile guards numbers, not what a group holds."""

    processes: dist.ProcessGroup
    rank: int
    size: int


_of_block: ContextVar[tuple[_Group | None, ...]] = ContextVar("contrast_process_group", default=())
_of_program: _Group | None = None


@contextmanager
def local() -> Iterator[None]:
    """Switch communication off inside the block: a call of a loss on one process, validation for example.

    Example:
        >>> with contrast.local():
        ...     value = loss(z_a, z_b)
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def alone() -> bool:
    """True if this call stands inside `local()`."""
    return _alone.get()


@contextmanager
def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> Iterator[None]:
    """Let losses and memories communicate within `group` inside the block: with tensor parallelism, for example.

    All processes of the group enter the block together and call the loss there; `backward()` may come after the block,
    since it uses the group of the forward pass. What else communicates belongs inside too: `update()` and `end_epoch()`
    of memories. `local()` inside or outside of the block still switches communication off.

    Args:
        group: the processes that hold different samples of one batch, as a ProcessGroup or a DeviceMesh of one
            dimension; None for all processes.

    Raises:
        TypeError: for what is neither.
        ValueError: for a mesh of several dimensions, and for a group that this process is not in.

    Example:
        >>> z_a, z_b = torch.randn(2, 64, 128)
        >>> with contrast.process_group(None):  # mesh["data"] of a mesh with dimensions data and tensor
        ...     loss = contrast.losses.InfoNCE()(z_a, z_b)
    """
    token = _of_block.set((_checked(group),))
    try:
        yield
    finally:
        _of_block.reset(token)


def set_process_group(group: dist.ProcessGroup | DeviceMesh | None) -> None:
    """Let losses and memories communicate within `group` wherever no `process_group` block names another.

    It holds in every thread until it is called again; None, as at the start, stands for all processes. Arguments and
    errors are those of `process_group`.

    `contrast.pretrain` sets no group. Where one is set, its loader and the seed of each step follow the group's ranks,
    so processes of the same rank see the same batch; the run folder is written by process 0 of all.

    Example:
        >>> contrast.set_process_group(None)  # mesh["data"] of a mesh with dimensions data and tensor
    """
    global _of_program
    _of_program = _checked(group)


def _checked(group: object) -> _Group | None:
    if group is None:
        return None
    if not (_AVAILABLE and dist.is_initialized()):
        raise ValueError("a process group needs torch.distributed.init_process_group(...) first.")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"a process group is a mesh of one dimension; this one has {group.ndim}, named {group.mesh_dim_names}: "
                'take the one over which samples differ, mesh["data"] for example.'
            )
        group = dist.GroupMember.NON_GROUP_MEMBER if group.get_coordinate() is None else group.get_group()
    if isinstance(group, dist.ProcessGroup):
        if dist.get_rank(group) >= 0:
            return _Group(group, dist.get_rank(group), dist.get_world_size(group))
    elif group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "a process group is a torch.distributed.ProcessGroup, a DeviceMesh of one dimension, or None for all "
            f"processes; got {type(group).__name__}."
        )
    raise ValueError(
        f"process {dist.get_rank()} is not in this process group: give each process the group that it is in."
    )


def _chosen() -> _Group | None:
    """Return the chosen group; None for all processes."""
    block = _of_block.get()
    return block[0] if block else _of_program


def _group() -> dist.ProcessGroup | None:
    """Return the chosen group as torch.distributed takes it; None for all processes."""
    chosen = _chosen()
    return None if chosen is None else chosen.processes


def world_size() -> int:
    """Count the processes that work together; 1 without a process group and inside `local()`."""
    if not (_AVAILABLE and dist.is_initialized()) or alone():
        return 1
    chosen = _chosen()
    return dist.get_world_size() if chosen is None else chosen.size


def rank() -> int:
    """Return this process's number in the group, from 0."""
    if world_size() == 1:
        return 0
    chosen = _chosen()
    return dist.get_rank() if chosen is None else chosen.rank


def announced_world_size() -> int:
    """Return the world size; before the process group exists, the one that torchrun announces in WORLD_SIZE."""
    if _AVAILABLE and dist.is_initialized():
        return world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True in process 0 of all; before the process group exists, by RANK and LOCAL_RANK as launchers set them."""
    if _AVAILABLE and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def barrier() -> None:
    """Wait until every process of the group is here."""
    if world_size() > 1:
        dist.barrier(_group())


def exchange_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return every process's list of sizes, in rank order, as host integers. All lists have the same length."""
    own = torch.tensor(list(sizes), dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own, _group())
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
    """Return every process's number of rows, in rank order; every process calls it with its own."""
    return [own] if world_size() == 1 else [size for (size,) in exchange_sizes([own], device)]


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate every process's rows in rank order, with gradient, where sizes are not known yet."""
    return gather(x, sizes_of(len(x), x.device))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.group = _group()
        ctx.start = sum(sizes[: rank()])
        ctx.size = len(x)
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded, ctx.group)
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.size], None


def shared(parameter: Tensor) -> Tensor:
    """Return a loss's own parameter unchanged, its gradient averaged over the processes.

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
        ctx.group, ctx.world = _group(), world_size()
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean: Tensor = gradients[0].contiguous() / ctx.world
        dist.all_reduce(mean, group=ctx.group)
        return mean


def total(x: Tensor) -> Tensor:
    """Sum `x` over the processes, with gradient (the sum of every process's gradient)."""
    if world_size() == 1:
        return x
    summed: Tensor = _Total.apply(x)
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.group = _group()
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed
