"""Rank, world size and the exact gather: the only file that calls torch.distributed.

"Every process" means the processes of the current group: all, unless `process_group` or `set_process_group` names
another group. A backward pass uses the group of its forward pass.
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
_inside_local = ContextVar("contrast_local", default=False)


class _Group(NamedTuple):
    """A process group with its rank and size, because torch.compile guards numbers, not the contents of a group."""

    processes: dist.ProcessGroup
    rank: int
    size: int


_group_of_block: ContextVar[tuple[_Group | None, ...]] = ContextVar("contrast_process_group", default=())
_default_group: _Group | None = None


@contextmanager
def local() -> Iterator[None]:
    """Switch communication off inside the block, for a loss on one process: in validation, for example.

    Example:
        >>> with contrast.local():
        ...     value = loss(z_a, z_b)
    """
    token = _inside_local.set(True)
    try:
        yield
    finally:
        _inside_local.reset(token)


def is_local() -> bool:
    """True inside a `local()` block."""
    return _inside_local.get()


@contextmanager
def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> Iterator[None]:
    """Restrict the communication of losses and memories to `group` inside the block: for tensor parallelism, say.

    All processes of the group enter the block together and call the loss there; `backward()` may follow after the
    block, since it uses the group of the forward pass. Call `update()` and `end_epoch()` of memories inside too.
    `local()` inside or outside of the block still switches communication off.

    Args:
        group: the processes with different samples of one batch, as a ProcessGroup or a DeviceMesh of one dimension;
            None for all processes.

    Raises:
        TypeError: for an object of another type.
        ValueError: for a mesh of several dimensions, and for a group that this process is not in.

    Example:
        >>> z_a, z_b = torch.randn(2, 64, 128)
        >>> with contrast.process_group(None):  # mesh["data"] of a mesh with dimensions data and tensor
        ...     loss = contrast.losses.InfoNCE()(z_a, z_b)
    """
    token = _group_of_block.set((_check_group(group),))
    try:
        yield
    finally:
        _group_of_block.reset(token)


def set_process_group(group: dist.ProcessGroup | DeviceMesh | None) -> None:
    """Restrict the communication of losses and memories to `group`, except inside a `process_group` block.

    It applies to every thread until the next call; None, the initial value, means all processes. Arguments and errors
    are those of `process_group`.

    `contrast.pretrain` sets no group. Where one is set, its loader and the seed of each step follow the group's ranks,
    so processes of the same rank see the same batch; the run folder is written by process 0 of all.

    Example:
        >>> contrast.set_process_group(None)  # mesh["data"] of a mesh with dimensions data and tensor
    """
    global _default_group
    _default_group = _check_group(group)


def _check_group(group: object) -> _Group | None:
    if group is None:
        return None
    if not (_AVAILABLE and dist.is_initialized()):
        raise ValueError("a process group needs torch.distributed.init_process_group(...) first.")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"a process group is a mesh of one dimension; this one has {group.ndim}, named {group.mesh_dim_names}: "
                'pass the one over which samples differ, mesh["data"] for example.'
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
        f"process {dist.get_rank()} is not in this process group: pass each process the group that it is in."
    )


def _current_group() -> _Group | None:
    """Return the group of the innermost block, else the default; None for all processes."""
    block = _group_of_block.get()
    return block[0] if block else _default_group


def _processes() -> dist.ProcessGroup | None:
    """Return the current group as an argument for torch.distributed."""
    group = _current_group()
    return None if group is None else group.processes


def world_size() -> int:
    """Return the number of processes in the group; 1 without torch.distributed and inside `local()`."""
    if not (_AVAILABLE and dist.is_initialized()) or is_local():
        return 1
    group = _current_group()
    return dist.get_world_size() if group is None else group.size


def rank() -> int:
    """Return this process's number in the group, from 0."""
    if world_size() == 1:
        return 0
    group = _current_group()
    return dist.get_rank() if group is None else group.rank


def expected_world_size() -> int:
    """Return the world size; before the process group exists, the one that torchrun announces in WORLD_SIZE."""
    if _AVAILABLE and dist.is_initialized():
        return world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True in process 0 of all; before the process group exists, by the launcher's RANK and LOCAL_RANK."""
    if _AVAILABLE and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def barrier() -> None:
    """Wait for every process of the group."""
    if world_size() > 1:
        dist.barrier(_processes())


def exchange_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return every process's list of sizes, in rank order, as host integers. All lists have the same length."""
    own = torch.tensor(list(sizes), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own, _processes())
    return [[int(size) for size in row] for row in torch.stack(gathered).tolist()]


def gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate every process's rows in rank order, with gradient.

    The gradient of `x` is the sum of every process's gradient of these rows.

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
    """Return every process's number of rows, in rank order; all processes call it, each with its own number."""
    return [own] if world_size() == 1 else [size for (size,) in exchange_sizes([own], device)]


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate every process's rows in rank order, with gradient, after an exchange of their numbers."""
    return gather(x, sizes_of(len(x), x.device))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.group = _processes()
        ctx.start = sum(sizes[: rank()])
        ctx.size = len(x)
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, ctx.group)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.size], None


def shared(parameter: Tensor) -> Tensor:
    """Return a loss's own parameter unchanged, its gradient averaged over the processes.

    So the parameter stays the same on every process also where only the encoder is wrapped in DistributedDataParallel.
    Where the loss is wrapped too nothing changes, since the average of equal numbers is that number.
    """
    if world_size() == 1:
        return parameter
    same: Tensor = _Shared.apply(parameter)
    return same


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.group, ctx.world = _processes(), world_size()
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
        ctx.group = _processes()
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed
