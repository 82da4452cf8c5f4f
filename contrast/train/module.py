"""The LightningModule of every method: views, encoder, loss."""

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
from contrast.losses import Loss
from contrast.memory import Memory
from contrast.models.batch_norm import synchronise
from contrast.models.encoder import Encoder
from contrast.train.budget import Budget
from contrast.train.optimizers import Optimizer
from contrast.train.step import Step
from contrast.views.views import Views


class Pretraining(lightning.LightningModule):
    """Pretrains an encoder: random views of a batch, their embeddings, candidates from memories, one loss.

    Every random number of a step depends only on the seed, the step and the process, so a resumed run continues as if
    it had not been stopped.

    Args:
        encoder: see `Step`; as are loss, views, memory, sampler_memory and reference.
        loss: its parameters are trained too.
        views: draws the views of a batch on its device.
        optimizer: of encoder and loss, with the learning rate's schedule.
        budget: the length of the training and of the schedule.
        steps_per_epoch: full batches per epoch.
        memory: sources of further candidates.
        sampler_memory: memories of the sampler, which are no candidates.
        reference: raw batch -> (N, R), a frozen network's features.
        labels: (samples,) int64 by sample index, -1 for none; used only to count false negatives.
        seed: of the views and of dropout.

    Attributes:
        measure_every: steps between two measurements.
        measured: the last measurements, by name.
        seconds: of training in the earlier parts of a resumed run.
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
        sampler_memory: Sequence[Memory] = (),
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
        self.sampler_memory = nn.ModuleList(sampler_memory)
        self.labels = labels
        self.step = Step(encoder, loss, views, memory, sampler_memory, reference)
        # These buffers are equal on every process already; DistributedDataParallel would broadcast them in each step.
        equal = ("loss.", "memory.", "sampler_memory.")
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if name.startswith(equal)]
        self._to_store: list[Embeddings] = []
        self.measure_every = 1
        self.measured: dict[str, float] = {}
        self.seconds = 0.0
        self._start = time.monotonic()

    @property
    def progress(self) -> float:
        """The share of the budget that is used, in [0, 1]."""
        return self.budget.progress(self.global_step, self.elapsed)

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all parts of a resumed run."""
        return self.seconds + time.monotonic() - self._start

    @property
    def epoch(self) -> float:
        """Epochs of training so far, a fraction within an epoch."""
        return self.global_step / self.steps_per_epoch

    def configure_model(self) -> None:
        """Synchronise batch normalisation if there are several processes."""
        if distributed.world_size() > 1:
            synchronise(self.encoder)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser of encoder and loss."""
        return self.optimizer.build([self.encoder, self.loss])

    def on_fit_start(self) -> None:
        """Move the frozen network to the device, and start the clock."""
        if isinstance(self.step.reference, nn.Module):
            self.step.reference.to(self.device)  # not a submodule: it is neither trained nor in checkpoints
        self._start = time.monotonic()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed the step and set its learning rate."""
        torch.manual_seed(self.step_seed("dropout"))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimizer.learning_rate(self.budget.progress(self.global_step + 0.5, self.elapsed))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one batch, ()."""
        generator = torch.Generator(self.device).manual_seed(self.step_seed("views"))
        output = self.step.compute(batch, generator)
        self._to_store.append(output.keys)
        return output.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update momentum twin, loss and memories; after an epoch call `end_epoch` of loss and memories.

        Not in `on_train_batch_end`, which Lightning calls after that of the callbacks: a checkpoint that these write
        must contain the complete step.
        """
        step = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        self.encoder.update_twin(self.budget.progress(step, self.elapsed))
        self.loss.update()
        if step % self.measure_every == 0 or step == self.budget.steps:
            # Before the memories are updated, since some metrics read this step's candidates again.
            self.measured = {name: float(value) for name, value in self.measure().items()}
        keys, self._to_store = self._to_store, []
        self.step.update_memories(keys)
        if step % self.steps_per_epoch == 0:
            self.loss.end_epoch()
            for memory in self.step.memories:
                memory.end_epoch()

    def measure(self) -> dict[str, Tensor | float]:
        """Return the last step's metrics of the loss and the memories, and with labels its false negatives."""
        metrics: dict[str, Tensor | float] = dict(self.loss.metrics)
        for memory in self.step.memories:
            metrics |= memory.metrics
        if self.labels is not None:
            self.labels = self.labels.to(self.device)
            metrics |= self.loss.false_negative_rates(self.labels)
        return metrics

    def step_seed(self, purpose: str) -> int:
        """Return the seed of this step on this process, different for every purpose."""
        return derived(self.seed, purpose, self.global_step, distributed.rank())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seconds, for budgets in hours."""
        checkpoint["contrast_seconds"] = self.elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seconds."""
        self.seconds = float(checkpoint["contrast_seconds"])
