"""Batches for training, as a function of the seed and the step alone: a run goes on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from contrast import distributed
from contrast.data.dataset import Batch, Samples
from contrast.registry import InputError
from contrast.seeding import derived


class StepSampler(Sampler[list[int]]):
    """Endless batches of positions: a new order every epoch, the incomplete last batch of an epoch left out.

    Args:
        count: how many items there are.
        batch_size: items in a batch, over all processes together; each process takes every W-th of them.
        seed: decides every order.
        start: the first step, counted from 0 at the beginning of training.

    Raises:
        InputError: for fewer items than the batch.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0, start: int = 0) -> None:
        if not 2 <= batch_size <= count:
            raise InputError(
                f"batch_size must lie between 2 and the {count:,} training items; got {batch_size:,}. "
                f"Give a smaller batch_size, or more data."
            )
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start

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
            order = torch.randperm(self.count, generator=generator)
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
