"""Callbacks of the trainer: metrics, checkpoints and the end of training."""

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

from contrast.train.module import Pretraining


class TrainingFailure(RuntimeError):
    """Training cannot continue; the message is one sentence."""


class RunWriter(Protocol):
    """What training writes to the folder of a run."""

    @property
    def checkpoint(self) -> Path:
        """The file of the newest checkpoint."""
        ...

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        ...

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one line to the metrics; it must contain "step"."""
        ...

    def set_state(self, state: Literal["running"], step: int) -> None:
        """Write that the run has reached `step`."""
        ...


HEARTBEAT = 5.0
"""Minimum seconds between two updates of the run's state file."""
BAR_COLUMNS = {"loss": "loss", "probe_accuracy": "probe"}
"""Metrics of the progress bar, and their names there."""


class MetricsLogger(lightning.Callback):
    """Writes metrics and the state of the run, logs to TensorBoard, and shows a progress bar.

    Args:
        run: the folder to write to.
        every: steps between two lines of metrics; below 1 it is 1.
        quiet: show no progress bar.
    """

    def __init__(self, run: RunWriter, *, every: int, quiet: bool = False) -> None:
        self.run, self.every, self.quiet = run, max(every, 1), quiet
        self._losses: list[torch.Tensor] = []
        self._bar: Any = None
        self._last_heartbeat = 0.0
        self._bar_texts: dict[str, str] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Open the progress bar, and set the steps at which the module measures."""
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
        """Log the mean loss since the last line, and the module's measurements, every `every` steps.

        Raises:
            TrainingFailure: if that mean is not finite.
        """
        assert isinstance(module, Pretraining)
        self._losses.append(outputs["loss"].detach())
        step = module.global_step
        if self._bar is not None:
            self._bar.update((step if module.budget.steps else int(module.progress * 1000)) - self._bar.n)
        if step % self.every and step != module.budget.steps:
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
        if time.time() - self._last_heartbeat > HEARTBEAT and trainer.is_global_zero:
            self._last_heartbeat = time.time()
            self.run.set_state("running", step)

    def add(self, trainer: lightning.Trainer, row: dict[str, float | int]) -> None:
        """Write one line of metrics, with its "step", to the file, TensorBoard and the progress bar."""
        if not trainer.is_global_zero:
            return
        self.run.append_metrics(row)
        if trainer.logger is not None:
            trainer.logger.log_metrics({key: float(value) for key, value in row.items() if key != "step"}, row["step"])  # type: ignore[arg-type]
        self._bar_texts |= {name: f"{row[key]:.3f}" for key, name in BAR_COLUMNS.items() if key in row}
        if self._bar is not None:
            self._bar.set_postfix(self._bar_texts, refresh=False)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Close the progress bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the progress bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Checkpoints(lightning.Callback):
    """Writes the newest checkpoint: soon after the start, every few minutes and at the end.

    Each is written completely before it replaces the last.

    Args:
        run: the folder to write to.
        minutes: between two checkpoints; the first is written after a tenth of that.
    """

    def __init__(self, run: RunWriter, *, minutes: float = 5.0) -> None:
        self.run, self.minutes = run, minutes
        self._saved = time.monotonic() - 0.9 * 60 * minutes

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the last checkpoint is older than `minutes`."""
        due = time.monotonic() - self._saved > 60 * self.minutes
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Save the last step."""
        self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint to another file of the folder, then replace the last one."""
        self._saved = time.monotonic()
        incomplete = self.run.checkpoint.with_suffix(".part")
        trainer.save_checkpoint(incomplete, weights_only=False)
        if trainer.is_global_zero:
            incomplete.replace(self.run.checkpoint)


class StopTraining(lightning.Callback):
    """Ends training where a budget in hours is used or a signal (Ctrl-C, SIGTERM) arrives; at once on a second signal.

    Attributes:
        stopped: True after the first signal.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Replace Lightning's signal handlers; `fit` restores the original ones."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        os.write(2, b"\nstopping after this step, then saving; once more to stop at once.\n")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop every process if one received a signal, or if a budget in hours is used."""
        assert isinstance(module, Pretraining)
        if trainer.world_size > 1:
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        used = module.budget.seconds is not None and module.progress >= 1
        if trainer.world_size > 1:
            used = trainer.strategy.reduce_boolean_decision(used, all=False)
        if self.stopped or used:
            trainer.should_stop = True
