"""One LightningModule for every method: views, encoder, loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.core.seeding import derived
from contrast.data.dataset import Batch
from contrast.losses import BadPairs, Loss
from contrast.memory import Memory
from contrast.models.batch_norm import synchronise
from contrast.models.encoder import Encoder
from contrast.train.budget import Budget
from contrast.train.optimizers import Optimizer
from contrast.train.step import Step
from contrast.views.views import Views


class Pretraining(lightning.LightningModule):
    """Pretrains an encoder: random views of a batch, their embeddings, candidates from memories, one loss.

    Every random number of a step comes from the seed, the step and the process alone, so that a stopped run goes on
    as if it had never stopped.

    Args:
        encoder: backbone and head, with its momentum twin and predictor where the method has them.
        loss: the loss; `as_loss` makes one of a plain module.
        views: makes the views of a batch on its device.
        optimizer: how to step.
        budget: where the schedule ends.
        steps_per_epoch: whole batches of an epoch.
        memory: where more candidates come from.
        watching: memories that remember but give no candidates, such as the one by which the sampler finds neighbours.
        reference: raw batch -> (N, R), a frozen network's features.
        labels: (samples,) int64 by sample index, -1 for none; false negatives are counted by them, nothing else.
        seed: decides every view and every dropout.

    Attributes:
        measure_every: steps between two measurements.
        measured: what the last one gave.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: Loss,
        views: Views,
        optimizer: Optimizer,
        budget: Budget,
        *,
        steps_per_epoch: int,
        memory: Sequence[Memory] = (),
        watching: Sequence[Memory] = (),
        reference: Callable[[Tensor], Tensor] | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.views = views
        self.optimizer = optimizer
        self.budget = budget
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.memory = nn.ModuleList(memory)
        self.watching = nn.ModuleList(watching)
        self.labels = labels
        self.step = Step(encoder, loss, views, memory, watching, reference)
        # Memories are alike on every process as they are; DistributedDataParallel would send them around in each step.
        kept = ("loss.", "memory.", "watching.")
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if name.startswith(kept)]
        self._keys: list[Embeddings] = []
        self.measure_every = 1
        self.measured: dict[str, float] = {}
        self.seconds = 0.0
        self._since = time.monotonic()

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        return self.budget.progress(self.global_step, self.elapsed)

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all parts of a resumed run."""
        return self.seconds + time.monotonic() - self._since

    @property
    def epoch(self) -> float:
        """How many times the training set was seen."""
        return self.global_step / self.steps_per_epoch

    def configure_model(self) -> None:
        """Synchronise batch normalisation where several processes train together."""
        if distributed.world_size() > 1:
            synchronise(self.encoder)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the optimiser over encoder and loss."""
        return self.optimizer.build([self.encoder, self.loss])

    def on_fit_start(self) -> None:
        """Start the clock."""
        if isinstance(self.step.reference, nn.Module):
            self.step.reference.to(self.device)  # no part of the module: it is not trained and in no checkpoint
        self._since = time.monotonic()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed the step and set its learning rate."""
        torch.manual_seed(self.step_seed("dropout"))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimizer.learning_rate(self.budget.progress(self.global_step + 0.5, self.elapsed))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Give the loss of one batch."""
        generator = torch.Generator(self.device).manual_seed(self.step_seed("views"))
        taken = self.step.take(batch, generator)
        self._keys.append(taken.keys)
        return taken.loss

    def optimizer_step(self, *given: Any, **named: Any) -> None:
        """Step, and finish the step: move the momentum twin, let loss and memories remember, close their epoch.

        Lightning calls the callbacks' `on_train_batch_end` before the module's: here, what they save is finished.
        """
        step = self.global_step + 1
        super().optimizer_step(*given, **named)
        self.encoder.update_twin(self.budget.progress(step, self.elapsed))
        self.loss.update()
        if step % self.measure_every == 0 or step == self.budget.steps:
            # What a queue gave this step is what it holds now; after the next line other entries stand in their place.
            self.measured = {name: float(value) for name, value in self.measure().items()}
        keys, self._keys = self._keys, []
        self.step.remember(keys)
        if step % self.steps_per_epoch == 0:
            self.loss.end_epoch()
            for memory in (*self.step.memory, *self.step.watching):
                memory.end_epoch()

    def measure(self) -> dict[str, Tensor | float]:
        """Give what is worth logging of the last step: by the loss, the memories, and the labels where there are any.

        Labels count the false negatives among the candidates and are used for nothing else.
        """
        rows: dict[str, Tensor | float] = dict(self.loss.metrics)
        for memory in (*self.step.memory, *self.step.watching):
            rows |= memory.metrics
        if self.labels is not None:
            self.labels = self.labels.to(self.device)
            rows |= self.loss.false_negative_rates(self.labels)
        return rows

    def held_bad(self) -> dict[str, float]:
        """Give the shares of samples that bad-pair mining holds to be noisy and faulty by the epochs that have ended.

        `bad_pairs_count` says whether they weigh less in the next epoch. {} without such a loss.
        """
        for part in self.loss.modules():
            if isinstance(part, BadPairs):
                mass = (part.counts > 0).sum().clamp(min=1)
                return {
                    "noisy_samples": float(part.noisy.sum() / mass),
                    "faulty_samples": float(part.faulty.sum() / mass),
                    "bad_pairs_count": float(part.epoch >= part.warmup_epochs),
                }
        return {}

    def step_seed(self, purpose: str) -> int:
        """Give the seed of this step for this process; another purpose, another seed."""
        return derived(self.seed, purpose, self.global_step, distributed.rank())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seconds, for budgets in hours."""
        checkpoint["contrast_seconds"] = self.elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the seconds up again."""
        self.seconds = float(checkpoint["contrast_seconds"])
