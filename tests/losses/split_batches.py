"""A loss on a batch that is split over processes, and on the full batch in one process; imported by every process."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import contrast
from contrast.core import distributed
from tests.losses.cases import DIMS, Case

WIDTH = 3


@dataclass(frozen=True)
class SplitBatch:
    """One loss on one batch that is split over the processes.

    Args:
        case: the loss.
        sizes: the number of samples on each process.
        views: the number of views.
        given: some of "labels", "extra", "targets", "heads", "samples".
        wrap: "plain", or which part is inside DistributedDataParallel: "encoder" or "both".
        seed: of the inputs.
    """

    case: Case
    sizes: tuple[int, ...]
    views: int = 2
    given: frozenset[str] = field(default_factory=frozenset)
    wrap: str = "plain"
    seed: int = 3

    def __str__(self):
        return f"{self.case}, sizes {self.sizes}, {self.views} views, {sorted(self.given)}, {self.wrap}"


class Linear(nn.Module):
    """An encoder: the same linear map of every view on all processes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(WIDTH, DIMS, dtype=torch.float64, generator=generator))

    def forward(self, views):
        return [view @ self.weight for view in views]


class Both(nn.Module):
    """An encoder and a loss in one module."""

    def __init__(self, encoder, loss):
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, views, **given):
        return self.loss(*self.encoder(views), **given)


def full_batch(batch):
    """Return the inputs of the full batch: views, and the keyword arguments of the loss."""
    generator = torch.Generator().manual_seed(batch.seed)
    count = sum(batch.sizes)
    heads = (2,) if "heads" in batch.given else ()

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    views = [random(*heads, count, WIDTH) for _ in range(batch.views)]
    given: dict[str, Any] = {}
    if batch.case.targets or "targets" in batch.given:
        given["targets"] = [random(*heads, count, DIMS) for _ in range(batch.views)]
    if batch.case.extra or "extra" in batch.given:
        given["extra"] = [random(5, DIMS)]
    if "labels" in batch.given:
        given["group"] = torch.arange(count) % 3
    if batch.case.sample:
        given["sample"] = torch.arange(count)
    if "samples" in batch.given:
        given["sample"] = torch.arange(count) // 2 * 5
    return views, given


def local_batch(batch, rank):
    """Return the rows of the inputs on one process; of the full batch for None."""
    views, given = full_batch(batch)
    if rank is None:
        return views, given
    start = sum(batch.sizes[:rank])
    rows = slice(start, start + batch.sizes[rank])

    def local(value):
        return [z[..., rows, :] for z in value] if isinstance(value, list) else value[rows]

    return local(views), {key: value if key == "extra" else local(value) for key, value in given.items()}


def outcome(batch, rank=None, group=None):
    """Return the value, the averaged gradient of the encoder, and the gradients of the loss's parameters.

    Args:
        batch: the batch.
        rank: of this process, within `group` if nothing is wrapped; None for the full batch in one process.
        group: the process group of the loss.
    """
    encoder, loss = Linear(), batch.case.make().double()
    views, given = local_batch(batch, rank)
    if rank is None or batch.wrap == "plain":
        with contrast.process_group(group):
            value = loss(*encoder(views), **given)
        value.backward()
    elif batch.wrap == "encoder":
        wrapped = DistributedDataParallel(encoder)
        value = loss(*wrapped(views), **given)
        value.backward()
    else:
        wrapped = DistributedDataParallel(Both(encoder, loss))
        value = wrapped(views, **given)
        value.backward()
    gradient = encoder.weight.grad
    if rank is not None and batch.wrap == "plain":
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return value.detach(), gradient, [parameter.grad for parameter in loss.parameters()]


def outcomes(rank, world, batches):
    """Return the outcome of each batch on this process."""
    return [outcome(batch, rank) for batch in batches]


def local_on_one_process(rank, world, case):
    """Call the loss inside `local()` on process 0 only, where any communication would block."""
    if rank > 0:
        return None
    views, given = case.inputs(seed=rank)
    with contrast.local():
        value = case.make()(*views, **given)
        value.backward()
    return value.detach(), views[0].grad


def backward_inside_local(rank, world, batch):
    """Call the loss on all processes and the backward pass inside `local()`."""
    encoder, loss = Linear(), batch.case.make().double()
    views, given = local_batch(batch, rank)
    value = loss(*encoder(views), **given)
    with distributed.local():
        value.backward()
    dist.all_reduce(encoder.weight.grad)
    return encoder.weight.grad / world


def rows_of(rank, world, batch):
    """Return the local rows and the metrics; with `rank` None those of the full batch."""
    encoder, loss = Linear(), batch.case.make().double()
    views, given = local_batch(batch, rank)
    return loss(*encoder(views), **given, reduction="none").detach(), loss.metrics
