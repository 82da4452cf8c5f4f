"""A linear probe during training."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrast.data.dataset import Data, Samples
from contrast.evaluation.features import frozen
from contrast.models.encoder import Encoder
from contrast.train.callbacks import MetricsLogger
from contrast.train.module import Pretraining

BATCH = 256
"""Items per forward pass."""


class OnlineProbe(lightning.Callback):
    """Logs the accuracy of a linear probe during training, without any influence on training.

    A ridge classifier is solved in closed form on the encoder's features, in evaluation mode, of some training items,
    and its accuracy on held-out validation items is logged. It has no parameters to train, draws no random number,
    writes no buffer, and never uses the test set.

    Args:
        data: its training items; without labelled items on both sides there is no probe.
        logger: logs the accuracy.
        every: steps between two probes.
        items: the most items on either side.
    """

    def __init__(self, data: Data, logger: MetricsLogger, *, every: int, items: int = 1000) -> None:
        labelled = data.train.target >= 0
        fit = (labelled & ~data.validation).nonzero()[0]
        held_out = (labelled & data.validation).nonzero()[0]
        self.logger, self.every = logger, max(every, 1)
        self.classes = len(data.classes)
        self.fit = data.train.subset(_evenly_spaced(fit, items))
        self.held_out = data.train.subset(_evenly_spaced(held_out, items))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate the probe every `every` steps, and after the last."""
        assert isinstance(module, Pretraining)
        step = module.global_step
        if (step % self.every and step != module.budget.steps) or not len(self.held_out) or not len(self.fit):
            return
        if trainer.is_global_zero:
            accuracy = self.accuracy(module)
            row = {"step": step, "epoch": round(module.epoch, 4), "probe_accuracy": accuracy}
            self.logger.add(trainer, row)
        if trainer.world_size > 1:
            trainer.strategy.barrier("online probe")

    @torch.no_grad()
    def accuracy(self, module: Pretraining) -> float:
        """Return the share of held-out training items that a ridge classifier on frozen features classifies right."""
        with frozen(module.encoder), torch.autocast(module.device.type, enabled=False):
            fit, held_out = (_features(module.encoder, samples, module.device) for samples in (self.fit, self.held_out))
        mean, deviation = fit.mean(dim=0), fit.std(dim=0)
        deviation = torch.where(deviation > 0, deviation, 1)
        fit, held_out = (torch.nan_to_num((features - mean) / deviation) for features in (fit, held_out))
        target = torch.nn.functional.one_hot(torch.as_tensor(self.fit.target), self.classes).double()
        gram = fit.T @ fit + len(fit) * torch.eye(fit.shape[1], dtype=fit.dtype)
        weight = torch.linalg.solve(gram, fit.T @ (target - target.mean(dim=0)))
        predicted = (held_out @ weight + target.mean(dim=0)).argmax(dim=1)
        return float((predicted == torch.as_tensor(self.held_out.target)).double().mean())


def _features(encoder: Encoder, samples: Samples, device: torch.device) -> Tensor:
    """Return the features of all samples, (N, F) float64 on the CPU."""
    batches = [list(range(start, min(start + BATCH, len(samples)))) for start in range(0, len(samples), BATCH)]
    features = [
        encoder.features(encoder.prepare(samples.__getitems__(batch).x.to(device))).float() for batch in batches
    ]
    return torch.cat(features).cpu().double()


def _evenly_spaced(positions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return at most `count` of the positions, evenly spaced."""
    if len(positions) <= count:
        return positions
    chosen: NDArray[np.int64] = positions[torch.linspace(0, len(positions) - 1, count).long().numpy()]
    return chosen
