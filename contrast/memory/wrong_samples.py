"""Samples that a bank cannot take: the same one twice, or one that the data set does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_wrong(sample: Tensor, samples: int) -> None:
    """Refuse samples outside [0, samples), and the same one twice, by looking at them.

    Args:
        sample: (n,) int64 from 0, of all processes.
        samples: how many the data set has.
    """
    if not len(sample):
        return
    if sample.max() >= samples:
        raise ValueError(
            f"sample indices must lie in [0, {samples}), as samples={samples} says; got {int(sample.max())}."
        )
    ordered = sample.sort().values
    if (again := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
        raise ValueError(
            f"a bank keeps one embedding a sample, and sample {int(again[0])} stands twice in this update of all "
            "processes: update it with one view at a time, and with a sampler that does not repeat."
        )


class AsyncIndexCheck:
    """The same on a device that one does not wait for: each look reads what those before it found.

    Args:
        samples: how many the data set has.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._wrong: Tensor | None = None
        self._seen: Tensor | None = None

    def look(self, sample: Tensor) -> Tensor:
        """Give (n,) samples that all can be written to, or raise a ValueError for those of an earlier look."""
        if self._seen is not None and self._seen.any():
            raise ValueError(
                f"an earlier update of this bank had a sample twice, or one outside [0, {self.samples}): update it "
                "with one view at a time, and with a sampler that does not repeat."
            )
        if not len(sample):
            return sample
        ordered = sample.sort().values
        wrong = (ordered[1:] == ordered[:-1]).any() | (ordered[0] < 0) | (ordered[-1] >= self.samples)
        self._wrong = wrong if self._wrong is None else self._wrong.to(wrong.device) | wrong
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.bool, pin_memory=sample.is_cuda)
        self._seen.copy_(self._wrong, non_blocking=True)
        return sample.clamp(0, self.samples - 1)
