"""What one process of several computes of a loss, and what they must all agree with; imported by every process."""

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
class Scene:
    """One loss on one batch that is split over the processes.

    Args:
        case: the loss.
        sizes: how many samples each process holds.
        views: how many views.
        asked: "labels", "extra", "targets", "heads", "samples".
        wrap: "plain", or "encoder" or "both" for what stands inside DistributedDataParallel.
        seed: of the inputs.
    """

    case: Case
    sizes: tuple[int, ...]
    views: int = 2
    asked: frozenset[str] = field(default_factory=frozenset)
    wrap: str = "plain"
    seed: int = 3

    def __str__(self):
        return f"{self.case}, sizes {self.sizes}, {self.views} views, {sorted(self.asked)}, {self.wrap}"


class Linear(nn.Module):
    """The encoder: one linear map of every view, the same on all processes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(WIDTH, DIMS, dtype=torch.float64, generator=generator))

    def forward(self, views):
        return [view @ self.weight for view in views]


class Both(nn.Module):
    """Encoder and loss in one module."""

    def __init__(self, encoder, loss):
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, views, **given):
        return self.loss(*self.encoder(views), **given)


def whole(scene):
    """Give the inputs of the whole batch: views, and what the loss is given besides."""
    generator = torch.Generator().manual_seed(scene.seed)
    count = sum(scene.sizes)
    heads = (2,) if "heads" in scene.asked else ()

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    views = [random(*heads, count, WIDTH) for _ in range(scene.views)]
    given: dict[str, Any] = {}
    if scene.case.targets or "targets" in scene.asked:
        given["targets"] = [random(*heads, count, DIMS) for _ in range(scene.views)]
    if scene.case.extra or "extra" in scene.asked:
        given["extra"] = [random(5, DIMS)]
    if "labels" in scene.asked:
        given["group"] = torch.arange(count) % 3
    if scene.case.sample:
        given["sample"] = torch.arange(count)
    if "samples" in scene.asked:
        given["sample"] = torch.arange(count) // 2 * 5
    return views, given


def part(scene, views, given, rows):
    """Give one process's rows of the inputs."""
    given = {key: value if key == "extra" else split(value, rows) for key, value in given.items()}
    return [view[..., rows, :] for view in views], given


def split(value, rows):
    if isinstance(value, list):
        return [one[..., rows, :] for one in value]
    return value[rows]


def outcome(scene, rank=None, group=None):
    """Give value, gradient of the encoder after averaging, and gradients of the loss's parameters as they were left.

    Where nothing is wrapped, `rank` counts within the process group `group`, of which only the loss is told.
    """
    encoder, loss = Linear(), scene.case.make().double()
    views, given = whole(scene)
    if rank is not None:
        start = sum(scene.sizes[:rank])
        views, given = part(scene, views, given, slice(start, start + scene.sizes[rank]))
    if rank is None or scene.wrap == "plain":
        with contrast.process_group(group):
            value = loss(*encoder(views), **given)
        value.backward()
    elif scene.wrap == "encoder":
        wrapped = DistributedDataParallel(encoder)
        value = loss(*wrapped(views), **given)
        value.backward()
    else:
        wrapped = DistributedDataParallel(Both(encoder, loss))
        value = wrapped(views, **given)
        value.backward()
    gradient = encoder.weight.grad
    if rank is not None and scene.wrap == "plain":
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return value.detach(), gradient, [parameter.grad for parameter in loss.parameters()]


def outcomes(rank, world, scenes):
    """Give each scene's outcome on this process."""
    return [outcome(scene, rank) for scene in scenes]


def alone_on_one_process(rank, world, case):
    """Call the loss inside `local()` on process 0 only: any communication would wait for the others for ever."""
    if rank > 0:
        return None
    views, given = case.inputs(seed=rank)
    with contrast.local():
        value = case.make()(*views, **given)
        value.backward()
    return value.detach(), views[0].grad


def backward_inside_local(rank, world, scene):
    """Call the loss on all processes and go back inside `local()`."""
    encoder, loss = Linear(), scene.case.make().double()
    start = sum(scene.sizes[:rank])
    views, given = part(scene, *whole(scene), slice(start, start + scene.sizes[rank]))
    value = loss(*encoder(views), **given)
    with distributed.local():
        value.backward()
    dist.all_reduce(encoder.weight.grad)
    return encoder.weight.grad / world


def rows_of(rank, world, scene):
    """Give the local rows, and the metrics."""
    encoder, loss = Linear(), scene.case.make().double()
    start = sum(scene.sizes[:rank])
    views, given = part(scene, *whole(scene), slice(start, start + scene.sizes[rank]))
    return loss(*encoder(views), **given, reduction="none").detach(), loss.metrics
