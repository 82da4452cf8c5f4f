"""A run from its config to its report: build, dry run, train, evaluate, write.

Lightning and the report are imported where they are used: they take seconds, and a wrong word is answered before.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from contrast.core import distributed
from contrast.core.registry import InputError
from contrast.core.text import format_duration
from contrast.data import Data
from contrast.data.dataset import Samples
from contrast.evaluation.features import extract, raw_input
from contrast.evaluation.protocols import Evaluation, evaluate
from contrast.evaluation.tables import text_table
from contrast.experiment import config as configuration
from contrast.experiment.build import Experiment, auto_steps, build, build_encoder_for, read_data, resolve_size
from contrast.experiment.config import Config, Loaded
from contrast.experiment.dry_run import DryRun, dry_run, peak_bytes
from contrast.experiment.folder import (
    COMMAND,
    CONFIG,
    DATA,
    ENVIRONMENT,
    LOG,
    SAMPLES,
    VIEWS,
    RunFolder,
)
from contrast.experiment.named_models import Encode, encode_with, reference_of
from contrast.experiment.results import clean_findings, write_results
from contrast.losses.loss import Loss
from contrast.models import save_backbone
from contrast.train.budget import Budget

if TYPE_CHECKING:
    from contrast.report.record import Findings
    from contrast.train.fit import TrainingResult

log = logging.getLogger("contrast")

_RUN = "CONTRAST_RUN"
"""The environment variable that names the run's folder to the further processes that Lightning starts."""
_MAY_CHANGE = ("budget", "data.workers", "trainer")


class Stopped(RuntimeError):
    """A signal stopped the run; everything is saved, and the message says how to continue.

    Example:
        >>> try:
        ...     run = contrast.pretrain("digits", budget="2 steps", evaluate={"protocols": []})
        ... except contrast.api.Stopped as stopped:  # Ctrl-C, or SIGTERM of a cluster
        ...     print(stopped)
    """


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        evaluation: what was measured; None without labels or protocols.
        report: the page.

    Example:
        >>> run.report.name
        'report.html'
        >>> run.table().split()[:2]
        ['model', 'k-NN']
    """

    path: Path
    evaluation: Evaluation | None
    report: Path

    def table(self) -> str:
        """Return the table of results as text."""
        return "" if self.evaluation is None else text_table(self.evaluation.results, self.evaluation.warnings)


def start(loaded: Loaded, *, out: Path | None = None, name: str | None = None, command: str | None = None) -> Run:
    """Train, evaluate and report an experiment in a new folder; nothing is written before all parts fit together.

    Args:
        loaded: the experiment.
        out: the folder; the next free one under `runs/` where it is not given.
        name: of the config, for the folder's name.
        command: the command that repeats this run; the command line of this process where it is not given.

    Raises:
        InputError: for anything that does not fit.
        Stopped: where a signal ended the run.
    """
    if out is not None and distributed.is_first_process():
        RunFolder.refuse_used(out)
    experiment, budget, trial = prepare(loaded, read_data(loaded.config))
    config, data = experiment.config, experiment.data
    for note in data.notes:
        log.info("data: %s", note)
    for key, value in experiment.chosen.items():
        log.info("chosen %s: %s", key, configuration.to_text(value))
    expected = f", about {format_duration(trial.seconds_per_step * budget.steps)} here" if budget.steps else ""
    log.info("training for %s in batches of %s%s", budget, config.batch_size, expected)
    folder = _new_folder(config, data, out, name)
    if distributed.is_first_process():
        folder.describe(command)
        folder.write(CONFIG, configuration.to_yaml(_with_absolute_paths(config)))
        folder.write_json(DATA, dict(data.fingerprint))
        if config.report.samples:
            folder.write(VIEWS, picture_of_views(trial, data))
        folder.set_state("running", 0)
    return _train_and_measure(experiment, budget, folder)


def resume(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Continue a run from its last checkpoint; only the budget, `trainer.*` and `data.workers` may change.

    Args:
        path: the run's folder.
        overrides: `key=value` each.

    Raises:
        InputError: where there is no run or no checkpoint, a file of it is damaged, the data has changed, or another
            key is given.
        Stopped: where a signal ended the run again.
    """
    folder = RunFolder.open(path)
    for override in overrides:
        key = override.partition("=")[0]
        if key not in _MAY_CHANGE and not key.startswith("trainer."):
            raise InputError(
                f"{key}: a resumed run continues as it was; only budget, trainer.* and data.workers may change."
            )
    if not folder.checkpoint.is_file():
        raise InputError(f"{folder.path} has no checkpoint to continue from; start it again with `contrast pretrain`.")
    step = folder.checkpoint_step()
    written = folder.read_config()
    if missing := [field.name for field in fields(Config) if field.name not in written]:
        raise InputError(f"{folder.config} is damaged (it has no {', '.join(missing)}); restore it.")
    config = configuration.load(str(folder.config), overrides).config
    from contrast.train.fit import check_trainer

    check_trainer(config.trainer)
    data = read_data(config)
    if folder.read_json(DATA) != dict(data.fingerprint):
        raise InputError(
            f"{data.source} is no longer the data that {folder.path} was started on; give it that data back."
        )
    experiment = build(config, data, reference_of(config, data))
    budget = Budget.parse(config.budget, steps_per_epoch=experiment.sampler().steps_per_epoch)
    if budget.steps and budget.steps < step:
        raise InputError(f"budget is {budget}, and {folder.path} has taken {step:,} steps; give that or more.")
    log.info("%s: continuing from step %s of %s", folder.path, f"{step:,}", budget)
    if overrides:
        folder.write(CONFIG, configuration.to_yaml(config))
    folder.drop_metrics_after(step)
    folder.set_state("running", step)
    return _train_and_measure(experiment, budget, folder, step=step)


def prepare(loaded: Loaded, data: Data, *, steps: int = 3) -> tuple[Experiment, Budget, DryRun]:
    """Build all parts, take a few steps on copies, and resolve the budget, before anything is written.

    The experiment's data may differ from the data given: without an accelerator large images may be read smaller.

    Raises:
        InputError: naming the key and where it was written, for parts that do not fit the data or each other.
    """
    try:
        return _prepare(loaded.config, data, steps)
    except InputError as error:
        raise InputError(configuration.with_origin(str(error), loaded.origins)) from error


def _prepare(config: Config, data: Data, steps: int) -> tuple[Experiment, Budget, DryRun]:
    from contrast.train.fit import check_trainer

    given_size = config.data.size
    config, data = resolve_size(config, data)
    check_trainer(config.trainer)
    experiment = build(config, data, reference_of(config, data))
    trial = dry_run(experiment.step(), experiment.optimizer, data, experiment.sampler(), steps=steps)
    chosen: dict[str, Any] = {} if config.data.size == given_size else {"data.size": config.data.size}
    if config.budget == "auto":
        chosen["budget"] = f"{auto_steps(experiment, trial.seconds_per_step)} steps"
    resolved = replace(experiment.config, budget=chosen.get("budget", config.budget))
    experiment = replace(experiment, config=resolved, chosen={**experiment.chosen, **chosen})
    budget = Budget.parse(experiment.config.budget, steps_per_epoch=experiment.sampler().steps_per_epoch)
    return experiment, budget, trial


def picture_of_views(trial: DryRun, data: Data) -> bytes:
    """Return a picture of some items and their views, as PNG."""
    from contrast.report import views_picture

    return views_picture(trial.originals, trial.views, data.kind, trial.names)


def evaluation_settings(config: Config) -> dict[str, Any]:
    """Return the arguments of `evaluate` that a config decides."""
    return {
        "protocols": config.evaluate.protocols,
        "seed": config.seed,
        "draws": config.evaluate.draws,
        "labels_per_class": config.evaluate.labels_per_class,
        "progress": lambda line: log.info("%s", line),
    }


def _train_and_measure(experiment: Experiment, budget: Budget, folder: RunFolder, *, step: int | None = None) -> Run:
    """Train from `step` on (None: from the start), then measure; however it ends, the state says so."""
    from contrast.train.fit import fit
    from contrast.train.module import Pretraining

    config = experiment.config
    sampler = experiment.sampler(step or 0)
    module = Pretraining(
        experiment.encoder,
        experiment.loss,
        experiment.views,
        experiment.optimizer,
        budget,
        steps_per_epoch=sampler.steps_per_epoch,
        memory=experiment.memory,
        sampler_memory=experiment.sampler_memory,
        reference=experiment.reference,
        labels=experiment.labels(),
        seed=config.seed,
    )
    continue_with = f"continue with: contrast resume {shlex.quote(str(folder.path))}"
    try:
        with _log_into(folder):
            outcome = fit(
                module,
                experiment.data,
                sampler,
                folder,
                resume=step is not None,
                trainer=config.trainer,
                tensorboard=config.logger == "tensorboard",
                workers=config.data.workers,
                probe_every=config.probe.every,
                probe_items=config.probe.items,
            )
            if not outcome.is_first_process:
                sys.exit(0)
            if not outcome.finished:
                raise Stopped(f"stopped at step {outcome.step:,} of {budget} and saved; {continue_with}")
            log.info("trained %s steps in %s", f"{outcome.step:,}", format_duration(outcome.seconds))
            return _measure(experiment, folder, outcome)
    except Stopped:
        folder.set_state("stopped", module.global_step)
        raise
    except KeyboardInterrupt:
        folder.set_state("stopped", module.global_step)
        raise Stopped(f"stopped; the last checkpoint is kept; {continue_with}") from None
    except SystemExit as leaving:
        # Lightning turns a second Ctrl-C into an exit of its own.
        if not leaving.code:
            raise
        folder.set_state("stopped", module.global_step)
        raise Stopped(f"stopped at once; the last checkpoint is kept; {continue_with}") from None
    except Exception as error:
        folder.set_state("failed", module.global_step, why=str(error))
        raise


def _measure(experiment: Experiment, folder: RunFolder, outcome: TrainingResult) -> Run:
    """Save the backbone, evaluate it next to raw input and its start, and write results and report."""
    from contrast.experiment.record import write_report
    from contrast.report import page_arrays

    config, data = experiment.config, experiment.data
    encoder = experiment.encoder.eval()
    description = {
        "backbone": config.encoder.backbone,
        "kind": data.kind,
        "shape": list(experiment.views.output_shapes(data.shape)[0]),
        "classes": list(data.classes),
    }
    save_backbone(encoder, folder.path, description)
    pretrained = encode_with(encoder)
    start = time.monotonic()
    evaluation = None
    if config.evaluate.protocols and len(data.test) and len(data.classes) > 1:
        models = {"raw": raw_input(data), **_before_training(experiment), "pretrained": pretrained}
        evaluation = evaluate(models, data, **evaluation_settings(config))
    elif config.evaluate.protocols:
        log.info("no protocol is evaluated: %s has no labelled test items", data.source)
    shown = data.train.subset(torch.linspace(0, len(data.train) - 1, min(len(data.train), 5000)).long().numpy())
    train_features, _ = extract(pretrained, shown)
    test_features = train_features[:0]
    if evaluation is not None and "pretrained" in evaluation.features:
        test_features = evaluation.features["pretrained"]
    elif len(data.test):
        test_features, _ = extract(pretrained, data.test)
    findings, found = _findings(experiment.loss, data.train, samples=config.report.samples)
    arrays = page_arrays(
        kind=data.kind,
        classes=data.classes,
        test=data.test,
        test_features=test_features,
        train=shown,
        train_features=train_features,
        prepare=lambda raw: encoder.cpu().prepare(raw),
        samples=config.report.samples,
        found=found,
    )
    folder.write_arrays(SAMPLES, arrays)
    about_run = _about_run(config, folder, outcome, time.monotonic() - start)
    write_results(folder, about_run, data, evaluation, findings=findings, names=config.report.samples)
    folder.set_state("done", outcome.step)
    log.info("writing the report")
    return Run(folder.path, evaluation, write_report(folder, samples=config.report.samples))


def _findings(loss: Loss, train: Samples, *, samples: bool) -> tuple[Findings, Samples]:
    """Return what the loss found, and the training items that its rows are about; only with `samples` any item."""
    from contrast.report import without_items

    names = [""] * (int(train.sample.max()) + 1)
    if samples:
        for sample, name in zip(train.sample.tolist(), train.names, strict=True):
            names[sample] = str(name)
    found: Findings = clean_findings(loss, names)
    if not samples:
        found = without_items(found)
    for title, rows in found.items():
        log.info("the loss found: %s (%s rows)", title, f"{len(rows):,}")
    samples_found = [row.get("sample") for rows in found.values() for row in rows]
    items = [sample for sample in samples_found if isinstance(sample, int)]
    return found, train.subset(np.flatnonzero(np.isin(train.sample, items)))


def _about_run(config: Config, folder: RunFolder, outcome: TrainingResult, evaluation_seconds: float) -> dict[str, Any]:
    environment = folder.read_json(ENVIRONMENT)
    return {
        "command": folder.read_text(COMMAND).strip(),
        "config_hash": hashlib.blake2b(configuration.to_yaml(config).encode(), digest_size=8).hexdigest(),
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "seed": config.seed,
        "status": "done",
        "device": outcome.device,
        "processes": outcome.processes,
        "precision": outcome.precision,
        "batch_size": config.batch_size,
        "steps": outcome.step,
        "seconds": round(outcome.seconds, 2),
        "evaluation_seconds": round(evaluation_seconds, 2),
        "peak_bytes": peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _before_training(experiment: Experiment) -> dict[str, Encode]:
    """Return the encoder as it started: untrained, and off the shelf where it started from published weights."""
    config, data, views = experiment.config, experiment.data, experiment.views
    started = {"untrained": build_encoder_for(config, data, views, pretrained=False)}
    backbone = config.encoder.backbone
    if isinstance(backbone, Mapping) and backbone.get("pretrained"):
        started["off_the_shelf"] = build_encoder_for(config, data, views)
    return {name: encode_with(encoder) for name, encoder in started.items()}


def _new_folder(config: Config, data: Data, out: Path | None, name: str | None) -> RunFolder:
    """Create the run's folder in the first process; other processes get its path, or a temporary folder."""
    if not distributed.is_first_process():
        return RunFolder(Path(os.environ.get(_RUN) or tempfile.mkdtemp()))
    source = Path(data.source).stem if Path(data.source).exists() else data.source.rpartition(":")[2]
    loss = config.loss["name"] if isinstance(config.loss, Mapping) else config.loss
    folder = RunFolder.create(f"{source}-{config.name or name or loss}", out=out)
    os.environ[_RUN] = str(folder.path.resolve())
    return folder


def _with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute paths of its files, so that a run can be resumed from any folder."""
    if Path(config.data.source).exists():
        config = replace(config, data=replace(config.data, source=str(Path(config.data.source).resolve())))
    reference = config.encoder.reference
    if reference is not None and Path(reference).exists():
        config = replace(config, encoder=replace(config.encoder, reference=str(Path(reference).resolve())))
    plugins = [str(Path(file).resolve()) if str(file).endswith(".py") else file for file in config.plugins]
    return replace(config, plugins=plugins)


@contextmanager
def _log_into(folder: RunFolder) -> Iterator[None]:
    """Write the package's log into the run's folder too, in the first process."""
    if not distributed.is_first_process():
        yield
        return
    handler = logging.FileHandler(folder.path / LOG, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
