"""A memory as a user writes it, registered by `plugins=[tests.memory.plugin]`."""

import torch

from contrast.core.embeddings import REMEMBERED, Embeddings
from contrast.memory import MEMORIES, Memory


@MEMORIES.register("running_means")
class RunningMeans(Memory):
    """Running means of the embeddings of samples with equal indices modulo `means`, as further negatives.

    Args:
        means: how many.
        dim: D.
        momentum: the weight of the old mean.
    """

    counters = ("rows", "last")
    fixed = ("momentum",)

    def __init__(self, means: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        self.tensors["mean"] = torch.zeros(means, dim)
        self.rows = 0
        self.last = {"samples": []}

    @torch.no_grad()
    def update(self, embeddings, *, sample=None, group=None, reference=None):
        """Move the means towards the rows of all processes, one after the other."""
        gathered = embeddings.gathered()
        mean = self.tensors["mean"]
        # Created here, not by the constructor: what it is filled with decides its width.
        counts = self.tensors.setdefault("counts", torch.zeros(len(mean), dtype=torch.int64, device=mean.device))
        for row, place in zip(gathered.z.float(), (gathered.sample % len(mean)).tolist(), strict=True):
            mean[place] = self.momentum * mean[place] + (1 - self.momentum) * row
            counts[place] += 1
        self.updates += 1
        self.rows += len(gathered)
        self.last = {"samples": gathered.sample.tolist()}

    def candidates(self, anchor):
        """Return the means, of samples that no data set has."""
        self.move_to(anchor.z.device)
        # The counters take part, so that a run without them goes on differently.
        z = self.tensors["mean"] * (1 + self.rows / 100) + 0.01 * sum(self.last["samples"])
        sample = -1 - torch.arange(len(z), device=z.device)
        return Embeddings(z, sample, sample, torch.full_like(sample, REMEMBERED))
