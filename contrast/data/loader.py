"""Batches for training, a function of the seed and the step, so that a run can be resumed exactly.

The config's `sampler` selects an `Order` of the items: a class with `positions`, registered by
`@SAMPLERS.register(name)`. The sampler that torch's DataLoader calls is `StepSampler`, which divides an order into
batches. A *sample* is an item's index in the data set, a *position* its row in the training split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from contrast.core import distributed
from contrast.core.registry import InputError, Registry
from contrast.core.seeding import derived
from contrast.data.dataset import Batch, Samples

SAMPLERS = Registry("sampler")
"""The orders of items by name."""


class Order(Protocol):
    """The order of the items in an epoch, which `sampler` selects."""

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Return (count,) int64, every position once: a function of the epoch and the generator, also after resuming.

        Args:
            count: number of items in the training split.
            batch_size: items per batch, over all processes together; each batch is the next part of the order.
            epoch: from 0.
            generator: in the same state on every process.
        """


@SAMPLERS.register("shuffled", aliases=("random",))
class Shuffled:
    """A uniformly random order.

    Example:
        >>> sorted(Shuffled().positions(5, 2, epoch=0, generator=torch.Generator()).tolist())
        [0, 1, 2, 3, 4]
    """

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return a random order, (count,) int64."""
        return torch.randperm(count, generator=generator)


@SAMPLERS.register("neighbours", aliases=("neighbors", "hard_batches", "nearest"))
class Neighbours:
    """Nearest neighbours under the encoder are in one batch, so that hard negatives receive gradients.

    Every epoch has every item once: in random order, each item that is not in the order yet is followed by its nearest
    neighbours that are not either, up to the end of the batch. Epoch e uses the neighbours known at the start of epoch
    e - 1 (none for e < 2: random order), so that prefetching and resuming change nothing. Items of one group, which are
    not negatives, are not neighbours of each other.

    Args:
        neighbours: number of nearest neighbours that follow each item, 1 or more.
        refresh: how often they are searched, "1 epochs" or "200 steps".
        index: how they are searched: "auto", "exact" or one of FAISS's factory strings, "IVF256,Flat".

    Attributes:
        neighbours_at: epoch -> (count, K) int64, the positions of each item's neighbours, nearest first, -1 for none;
            None before the first search.

    Raises:
        ValueError: for fewer than one neighbour.

    Example:
        >>> order = Neighbours(neighbours=1)
        >>> order.neighbours_at = lambda epoch: torch.tensor([[1], [0], [3], [2]])
        >>> batches = order.positions(4, 2, epoch=2, generator=torch.Generator()).view(2, 2)
        >>> sorted(sorted(batch) for batch in batches.tolist())
        [[0, 1], [2, 3]]
    """

    def __init__(self, neighbours: int = 7, refresh: str = "1 epochs", index: str = "auto") -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours must be 1 or more; got {neighbours}.")
        self.neighbours, self.refresh, self.index = neighbours, refresh, index
        self.neighbours_at: Callable[[int], Tensor | None] = lambda _: None

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Return a random order in which neighbours follow each other, (count,) int64."""
        shuffled = torch.randperm(count, generator=generator)
        found = self.neighbours_at(epoch)
        if found is None:
            return shuffled
        nearest, used, order = found.tolist(), [False] * count, []
        for item in shuffled.tolist():
            if used[item]:
                continue
            used[item] = True
            order.append(item)
            missing = min(self.neighbours, -len(order) % batch_size)
            for other in nearest[item] if missing else ():
                if other >= 0 and not used[other]:
                    used[other] = True
                    order.append(other)
                    missing -= 1
                    if not missing:
                        break
        return torch.tensor(order)


class StepSampler(Sampler[list[int]]):
    """Endless batches of positions: a new order every epoch, without the incomplete last batch of an epoch.

    Args:
        count: number of items.
        batch_size: items per batch, over all processes together; each of W processes gets every W-th of them.
        seed: of the orders.
        start: the first step, counted from 0 at the beginning of training.
        order: of an epoch's items; None: shuffled.

    Raises:
        InputError: for a batch size below 2 or above the number of items.

    Example:
        >>> sampler = StepSampler(count=10, batch_size=4, seed=0)
        >>> sampler.steps_per_epoch, len(next(iter(sampler)))
        (2, 4)
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int = 0, start: int = 0, order: Order | None = None
    ) -> None:
        if not 2 <= batch_size <= count:
            raise InputError(
                f"batch_size must be between 2 and the {count:,} training items; got {batch_size:,}. "
                "Set a smaller batch_size, or use more data."
            )
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        self.order = order or Shuffled()

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete batches per epoch."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over this process's part of every batch from `start` on, endlessly."""
        rank, world = distributed.rank(), distributed.world_size()
        epoch, position = divmod(self.start, self.steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(derived(self.seed, "order", epoch))
            order = self.order.positions(self.count, self.batch_size, epoch, generator)
            for step in range(position, self.steps_per_epoch):
                yield order[step * self.batch_size : (step + 1) * self.batch_size][rank::world].tolist()
            epoch, position = epoch + 1, 0


def training_loader(samples: Samples, sampler: StepSampler, *, workers: int = 0) -> DataLoader[Batch]:
    """Return the loader of complete batches.

    Args:
        samples: the training split.
        sampler: the positions of each batch.
        workers: processes that read batches ahead; useful only where items are read from files when needed. 0: none.

    Example:
        >>> from contrast.data import open_data
        >>> train = open_data("digits").train
        >>> loader = training_loader(train, StepSampler(len(train), batch_size=64))
        >>> next(iter(loader)).x.shape
        torch.Size([64, 1, 8, 8])
    """
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_already_collated,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _already_collated(batch: Any) -> Any:
    return batch
