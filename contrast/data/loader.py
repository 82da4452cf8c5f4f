"""Batches for training, a function of the seed and the step: a run goes on exactly where it stopped."""

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
    """In which order an epoch walks over the items."""

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Give (count,) int64, every position once: a function of the epoch and the generator, also after resuming.

        Args:
            count: how many items there are.
            batch_size: items in a batch, over all processes together; batches follow each other in this order.
            epoch: from 0.
            generator: every process's is the same.
        """


@SAMPLERS.register("shuffled", aliases=("random",))
class Shuffled:
    """Every order is as likely."""

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Give a random order."""
        return torch.randperm(count, generator=generator)


@SAMPLERS.register("neighbours", aliases=("neighbors", "hard_batches", "nearest"))
class Neighbours:
    """Items that the encoder holds to be alike come into one batch, so that hard negatives get their gradient too.

    Every epoch walks over every item once: in random order, each item that was not met yet is followed by its nearest
    ones that were not met yet, as many as fit the batch. Which are near is found again and again while training goes
    on; an epoch goes by what was known an epoch before it began, so that reading ahead and resuming change nothing. The
    first two epochs are shuffled. Items of one group, which are no negatives, are never put together by this.

    Args:
        neighbours: how many of the nearest follow each item, 1 or more.
        refresh: how often they are found again, "1 epochs" or "200 steps".
        index: how they are found: "auto", "exact" or one of FAISS's factory strings, "IVF256,Flat".

    Attributes:
        table: epoch -> (count, k) int64 positions, nearest first, -1 for none; None before there are any.
    """

    def __init__(self, neighbours: int = 7, refresh: str = "1 epochs", index: str = "auto") -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours must be 1 or more; got {neighbours}.")
        self.neighbours, self.refresh, self.index = neighbours, refresh, index
        self.table: Callable[[int], Tensor | None] = lambda _: None

    def positions(self, count: int, batch_size: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Give a random order in which neighbours follow each other."""
        shuffled = torch.randperm(count, generator=generator)
        table = self.table(epoch)
        if table is None:
            return shuffled
        near, met, order = table.tolist(), [False] * count, []
        for item in shuffled.tolist():
            if met[item]:
                continue
            met[item] = True
            order.append(item)
            room = min(self.neighbours, -len(order) % batch_size)
            for other in near[item] if room else ():
                if other >= 0 and not met[other]:
                    met[other] = True
                    order.append(other)
                    room -= 1
                    if not room:
                        break
        return torch.tensor(order)


class StepSampler(Sampler[list[int]]):
    """Endless batches of positions: a new order every epoch, the incomplete last batch of an epoch left out.

    Args:
        count: how many items there are.
        batch_size: items in a batch, over all processes together; each process takes every W-th of them.
        seed: decides every order.
        start: the first step, counted from 0 at the beginning of training.
        order: of an epoch's items; shuffled where it is not given.

    Raises:
        InputError: for fewer items than the batch.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int = 0, start: int = 0, order: Order | None = None
    ) -> None:
        if not 2 <= batch_size <= count:
            raise InputError(
                f"batch_size must lie between 2 and the {count:,} training items; got {batch_size:,}. "
                f"Give a smaller batch_size, or more data."
            )
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        self.order = order or Shuffled()

    @property
    def steps_per_epoch(self) -> int:
        """Count the whole batches of an epoch."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Walk over this process's share of every batch from `start` on, without end."""
        rank, world = distributed.rank(), distributed.world_size()
        epoch, position = divmod(self.start, self.steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(derived(self.seed, "order", epoch))
            order = self.order.positions(self.count, self.batch_size, epoch, generator)
            for step in range(position, self.steps_per_epoch):
                yield order[step * self.batch_size : (step + 1) * self.batch_size][rank::world].tolist()
            epoch, position = epoch + 1, 0


def training_loader(samples: Samples, sampler: StepSampler, *, workers: int = 0) -> DataLoader[Batch]:
    """Give the loader of whole batches; `workers` processes read ahead, which only lazily read folders need."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
