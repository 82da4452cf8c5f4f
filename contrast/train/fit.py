"""Trains an experiment in its run's folder, from the start or from where it stopped."""

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
from contrast.train.callbacks import Checkpoints, MetricsLogger, OnlineProbe, RunWriter, StopOnSignal, TrainingFailure
from contrast.train.module import Pretraining


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Args:
        finished: False where a signal stopped it before the budget was spent.
        step: optimiser steps taken, over all parts of the run.
        seconds: of training, over all parts of the run.
        main: whether this is the process that goes on to evaluate; the others are done.
        processes: how many trained together.
        device: what trained.
        precision: Lightning's word for it.
    """

    finished: bool
    step: int
    seconds: float
    main: bool
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
) -> Outcome:
    """Train until the budget is spent or a signal comes, and leave a checkpoint either way.

    Args:
        module: what to train.
        data: the training set.
        sampler: the batches, from the step on at which training starts.
        run: where everything is written.
        resume: whether to take up the run's last checkpoint.
        trainer: further arguments of Lightning's Trainer.
        tensorboard: whether to log there.
        workers: processes that read items ahead.
        probe_every: steps between two online probes; None: twenty a run.
        probe_items: items on either side of the online probe; 0: no probe.
        quiet: whether to leave the progress bar out.

    Raises:
        TrainingFailure: where the loss or the embeddings stop being finite.
    """
    budget = module.budget
    log_every = max(1, (budget.steps or 20 * module.steps_per_epoch) // 200)
    recorder = MetricsLogger(run, every=log_every, quiet=quiet)
    signals = StopOnSignal()
    callbacks: list[lightning.Callback] = [recorder]
    if probe_items:
        every = probe_every or max(1, (budget.steps or 20 * module.steps_per_epoch) // 20)
        callbacks.append(OnlineProbe(data, recorder, every=every, items=probe_items))
    callbacks += [Checkpoints(run), signals]
    made = _trainer(run, callbacks, budget.steps, dict(trainer or {}), tensorboard=tensorboard)
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        made.fit(
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
    return Outcome(
        finished=module.progress >= 1,
        step=module.global_step,
        seconds=module.elapsed,
        main=made.is_global_zero,
        processes=made.world_size,
        device=torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type,
        precision=str(made.precision),
    )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Let Lightning judge `trainer.*` before anything is written.

    Raises:
        InputError: in Lightning's words, for a device that is not there or values that do not go together.
    """
    try:
        _lightning(logger=False, **trainer)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        given = ", ".join(f"trainer.{key}={value}" for key, value in trainer.items())
        said = " ".join(str(error).split())
        raise InputError(f"{given}: Lightning's Trainer does not take this here: {said}") from None


def _trainer(
    run: RunWriter,
    callbacks: list[lightning.Callback],
    steps: int | None,
    further: dict[str, Any],
    *,
    tensorboard: bool,
) -> lightning.Trainer:
    events = run.tensorboard
    logger = TensorBoardLogger(save_dir=events.parent, name="", version=events.name) if tensorboard else False
    return _lightning(max_steps=steps or -1, max_epochs=-1, callbacks=callbacks, logger=logger, **further)


def _lightning(**settings: Any) -> lightning.Trainer:
    """Make Lightning's Trainer; what it prints about itself is left out."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for quiet in (".*num_workers.*", ".*does not have many workers.*", ".*`IterableDataset`.*", ".*sync_dist.*"):
        warnings.filterwarnings("ignore", quiet)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
    ours: dict[str, Any] = {
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
    return lightning.Trainer(**{**ours, **settings})
