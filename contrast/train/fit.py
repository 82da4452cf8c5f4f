"""Training of an experiment in the folder of its run, from the start or from a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

from contrast.core.registry import InputError
from contrast.data.dataset import Data
from contrast.data.loader import StepSampler, training_loader
from contrast.train.callbacks import Checkpoints, MetricsLogger, RunWriter, StopTraining, TrainingFailure
from contrast.train.module import Pretraining
from contrast.train.online_probe import OnlineProbe


@dataclass(frozen=True)
class TrainingResult:
    """How training ended.

    Args:
        finished: False if a signal stopped it before the budget was used.
        step: optimiser steps, over all parts of a resumed run.
        seconds: of training, over all parts of a resumed run.
        is_first_process: True for the process that evaluates next; the others have finished.
        processes: the world size.
        device: the name of the GPU, or "cpu".
        precision: as Lightning names it.
    """

    finished: bool
    step: int
    seconds: float
    is_first_process: bool
    processes: int
    device: str
    precision: str


def fit(
    module: Pretraining,
    data: Data,
    sampler: StepSampler,
    run: RunWriter,
    *,
    resume: bool = False,
    trainer: Mapping[str, Any] | None = None,
    tensorboard: bool = True,
    workers: int = 0,
    probe_every: int | None = None,
    probe_items: int = 1000,
    quiet: bool = False,
) -> TrainingResult:
    """Train until the budget is used or a signal arrives, and write a checkpoint.

    Args:
        module: the module to train.
        data: the training set.
        sampler: the batches, starting with the first step of this training.
        run: the folder to write to.
        resume: continue from the run's last checkpoint.
        trainer: further arguments of Lightning's Trainer.
        tensorboard: log to TensorBoard too.
        workers: processes that read items ahead.
        probe_every: steps between two online probes; None: twenty per run.
        probe_items: items on either side of the online probe; 0: no probe.
        quiet: show no progress bar.

    Raises:
        TrainingFailure: if the loss or the embeddings are no longer finite.
    """
    budget = module.budget
    steps = budget.steps or 20 * module.steps_per_epoch
    logger = MetricsLogger(run, every=max(1, steps // 200), quiet=quiet)
    callbacks: list[lightning.Callback] = [logger]
    if probe_items:
        every = probe_every or max(1, steps // 20)
        callbacks.append(OnlineProbe(data, logger, every=every, items=probe_items))
    callbacks += [Checkpoints(run), StopTraining()]
    events = run.tensorboard
    lightning_trainer = _new_trainer(
        max_steps=budget.steps or -1,
        max_epochs=-1,
        callbacks=callbacks,
        logger=TensorBoardLogger(events.parent, name="", version=events.name) if tensorboard else False,
        **(trainer or {}),
    )
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        lightning_trainer.fit(
            module,
            training_loader(data.train, sampler, workers=workers),
            ckpt_path=run.checkpoint if resume else None,
            weights_only=True if resume else None,
        )
    except ValueError as error:
        raise TrainingFailure(f"training ended at step {module.global_step:,}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return TrainingResult(
        finished=module.progress >= 1,
        step=module.global_step,
        seconds=module.elapsed,
        is_first_process=lightning_trainer.is_global_zero,
        processes=lightning_trainer.world_size,
        device=torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type,
        precision=str(lightning_trainer.precision),
    )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Check that Lightning accepts `trainer.*`, before anything is written.

    Raises:
        InputError: with Lightning's message, for a device that does not exist or incompatible values.
    """
    try:
        _new_trainer(logger=False, **trainer)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        settings = ", ".join(f"trainer.{key}={value}" for key, value in trainer.items())
        message = " ".join(str(error).split())
        raise InputError(f"{settings}: Lightning's Trainer does not accept this here: {message}") from None


def _new_trainer(**settings: Any) -> lightning.Trainer:
    """Return Lightning's Trainer with our defaults, without its messages."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for message in (".*num_workers.*", ".*does not have many workers.*", ".*`IterableDataset`.*", ".*sync_dist.*"):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
    defaults: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
        "deterministic": "warn" if torch.cuda.is_available() else None,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(**{**defaults, **settings})
