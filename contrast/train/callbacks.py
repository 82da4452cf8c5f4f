"""What happens beside the training step: records, checkpoints, the stop signal, the online probe."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import lightning
import torch
from tqdm import tqdm

from contrast.data.dataset import Data
from contrast.evaluation.features import frozen
from contrast.train.module import Pretraining


class TrainingFailure(RuntimeError):
    """Training cannot go on; the message is one sentence."""


class RunWriter(Protocol):
    """What training needs of the folder of a run."""

    @property
    def checkpoint(self) -> Path:
        """The file of the newest checkpoint."""
        ...

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        ...

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one line to the metrics."""
        ...

    def set_state(self, state: Literal["running"], step: int) -> None:
        """Write that the run has reached `step`."""
        ...


class MetricsLogger(lightning.Callback):
    """Writes the metrics and the heartbeat, logs to TensorBoard, and moves the progress bar.

    Args:
        run: where to write.
        every: steps between two lines.
        quiet: whether to leave the progress bar out.
    """

    def __init__(self, run: RunWriter, *, every: int, quiet: bool = False) -> None:
        self.run, self.every, self.quiet = run, max(every, 1), quiet
        self._losses: list[torch.Tensor] = []
        self._bar: Any = None
        self._beat = 0.0
        self._shown: dict[str, str] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Open the bar, and have measured what is written."""
        assert isinstance(module, Pretraining)
        module.measure_every = self.every
        if trainer.is_global_zero and not self.quiet:
            steps = module.budget.steps
            self._bar = tqdm(
                total=steps or 1000,
                initial=module.global_step if steps else int(module.progress * 1000),
                desc="pretraining",
                unit="step" if steps else "‰",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step."""
        assert isinstance(module, Pretraining)
        self._losses.append(outputs["loss"].detach())
        step = module.global_step
        if step % module.steps_per_epoch == 0 and (held_bad := module.held_bad()):
            self.add(trainer, {"step": step, "epoch": round(module.epoch, 4), **held_bad})
        if self._bar is not None:
            self._bar.update((step if module.budget.steps else int(module.progress * 1000)) - self._bar.n)
        last = step == module.budget.steps
        if step % self.every and not last:
            return
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TrainingFailure(
                f"the loss is {loss} at step {step}: training diverged; try a lower optimizer.lr or a longer warmup."
            )
        row: dict[str, float | int] = {
            "step": step,
            "epoch": round(module.epoch, 4),
            "loss": loss,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(module.elapsed, 2),
        }
        row |= module.measured
        self.add(trainer, row)
        if time.time() - self._beat > 5 and trainer.is_global_zero:
            self._beat = time.time()
            self.run.set_state("running", step)

    def add(self, trainer: lightning.Trainer, row: dict[str, float | int]) -> None:
        """Record one line, in the file, in TensorBoard and on the bar."""
        if not trainer.is_global_zero:
            return
        self.run.append_metrics(row)
        if trainer.logger is not None:
            trainer.logger.log_metrics({key: float(value) for key, value in row.items() if key != "step"}, row["step"])  # type: ignore[arg-type]
        self._shown |= {name: f"{row[key]:.3f}" for key, name in _ON_THE_BAR.items() if key in row}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_ON_THE_BAR = {"loss": "loss", "probe_accuracy": "probe"}


class Checkpoints(lightning.Callback):
    """Saves the newest checkpoint: soon after the start, every few minutes and at the end.

    Each is written whole before it replaces the last.

    Args:
        run: where to write.
        minutes: between two checkpoints; the first comes after a tenth of that.
    """

    def __init__(self, run: RunWriter, *, minutes: float = 5.0) -> None:
        self.run, self.minutes = run, minutes
        self._saved = time.monotonic() - 0.9 * 60 * minutes

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time."""
        due = time.monotonic() - self._saved > 60 * self.minutes
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Save the end of training, or where it was stopped."""
        self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint beside the last one, then move it over."""
        self._saved = time.monotonic()
        beside = self.run.checkpoint.with_suffix(".part")
        trainer.save_checkpoint(beside, weights_only=False)
        if trainer.is_global_zero:
            beside.replace(self.run.checkpoint)


class StopOnSignal(lightning.Callback):
    """Lets Ctrl-C and SIGTERM end training after the step in hand; a second one ends it at once.

    Attributes:
        stopped: whether a signal came.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Take the signals over from Lightning, until `fit` gives them back."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        os.write(2, b"\nstopping after this step, then saving; once more to stop at once.\n")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop every process where one was asked to; end a budget in hours."""
        assert isinstance(module, Pretraining)
        if trainer.world_size > 1:
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        spent = module.budget.seconds is not None and module.progress >= 1
        if trainer.world_size > 1:
            spent = trainer.strategy.reduce_boolean_decision(spent, all=False)
        if self.stopped or spent:
            trainer.should_stop = True


class OnlineProbe(lightning.Callback):
    """Follows a linear probe while training goes on, without any way to influence it.

    Every now and then the frozen features of a few training items are taken in evaluation mode, a ridge classifier is
    solved in closed form on the fitting part, and its accuracy on the held-out validation part is recorded. It has no
    parameters to train, draws no random number, writes no buffer, and never sees the test set.

    Args:
        data: its training items; nothing happens where too few are labelled.
        recorder: takes the accuracy.
        every: steps between two probes.
        items: at most so many items on either side.
    """

    def __init__(self, data: Data, recorder: MetricsLogger, *, every: int, items: int = 1000) -> None:
        labelled = data.train.target >= 0
        fit = (labelled & ~data.validation).nonzero()[0]
        held_out = (labelled & data.validation).nonzero()[0]
        self.recorder, self.every = recorder, max(every, 1)
        self.classes = len(data.classes)
        self.fit = data.train.subset(_spread(fit, items))
        self.held_out = data.train.subset(_spread(held_out, items))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe where it is time."""
        assert isinstance(module, Pretraining)
        step = module.global_step
        if (step % self.every and step != module.budget.steps) or not len(self.held_out) or not len(self.fit):
            return
        if trainer.is_global_zero:
            accuracy = self.accuracy(module)
            row = {"step": step, "epoch": round(module.epoch, 4), "probe_accuracy": accuracy}
            self.recorder.add(trainer, row)
        if trainer.world_size > 1:
            trainer.strategy.barrier("online probe")

    @torch.no_grad()
    def accuracy(self, module: Pretraining) -> float:
        """Give the share of held-out training items that a ridge classifier on frozen features gets right."""
        encoder = module.encoder
        with frozen(encoder), torch.autocast(module.device.type, enabled=False):
            sides = []
            for samples in (self.fit, self.held_out):
                blocks = [
                    encoder.features(encoder.prepare(samples.__getitems__(block).x.to(module.device))).float()
                    for block in _blocks(len(samples), 256)
                ]
                sides.append(torch.cat(blocks).cpu().double())
        fit, held_out = sides
        mean, deviation = fit.mean(dim=0), fit.std(dim=0)
        deviation = torch.where(deviation > 0, deviation, 1)
        fit, held_out = (torch.nan_to_num((side - mean) / deviation) for side in (fit, held_out))
        target = torch.as_tensor(self.fit.target)
        wanted = torch.nn.functional.one_hot(target, self.classes).double()
        gram = fit.T @ fit + len(fit) * torch.eye(fit.shape[1], dtype=fit.dtype)
        weight = torch.linalg.solve(gram, fit.T @ (wanted - wanted.mean(dim=0)))
        predicted = (held_out @ weight + wanted.mean(dim=0)).argmax(dim=1)
        return float((predicted == torch.as_tensor(self.held_out.target)).double().mean())


def _spread(positions: Any, items: int) -> Any:
    """Give at most `items` of the positions, evenly spread."""
    if len(positions) <= items:
        return positions
    return positions[torch.linspace(0, len(positions) - 1, items).long().numpy()]


def _blocks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
