"""What the command does, as functions for Python: pretrain, evaluate, load."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrast.evaluation.features import raw_input
from contrast.evaluation.protocols import Evaluation
from contrast.evaluation.protocols import evaluate as measure
from contrast.experiment import config as configuration
from contrast.experiment import named_models
from contrast.experiment import run as runs
from contrast.experiment.build import read_data
from contrast.experiment.config import DataSettings, Override
from contrast.experiment.folder import RunFolder
from contrast.experiment.named_models import Model, load
from contrast.experiment.results import write_evaluations
from contrast.experiment.run import Run, Stopped

__all__ = ["Model", "Run", "Stopped", "evaluate", "load", "pretrain"]

log = logging.getLogger("contrast")


def pretrain(
    data: str | Path | None = None, *, config: str | None = None, out: str | Path | None = None, **settings: Any
) -> Run:
    """Pretrain on a data set, evaluate and report; the keys are those of the command.

    Args:
        data: a path, "digits", "torchvision:NAME" or "aeon:NAME"; the config's own where it is not given.
        config: a shipped config or a .yaml file.
        out: the run's folder; the next free one under `runs/` where it is not given.
        **settings: of the config, a section as a mapping: `loss="cacr"`, `budget="2h"`, `optimizer={"lr": 1e-3}`;
            keys of `data` may be given directly: `split_by="patient"`.

    Raises:
        InputError: for anything that does not fit, before anything is written.
        Stopped: where a signal ended training.

    Example:
        >>> run = contrast.pretrain("digits", loss="cacr", budget="2 steps", evaluate={"protocols": []})
        >>> run.path.name
        'digits-cacr-001'
    """
    overrides = _overrides(settings)
    if data is not None:
        overrides.insert(0, ("data.source", str(data)))
    words = [f"{key}={configuration.to_text(value)}" for key, value in overrides]
    return runs.start(
        configuration.load(config, overrides, by="call"),
        out=None if out is None else Path(out),
        name=Path(config).stem if config else None,
        command=shlex.join(["contrast", "pretrain", *filter(None, [config]), *words]),
    )


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Evaluation:
    """Measure a model's frozen features by the named protocols, next to raw input.

    Args:
        model: a run's folder, a weights file, "timm:NAME", "torchvision:NAME", or "module:function".
        data: as for `pretrain`; the run's own where it is not given.
        out: where to write `evaluations/`; a run's own folder where it is not given.
        overrides: `key=value` settings as on the command line.
        **settings: the same as arguments; keys of `data` may be given directly: `labels="labels.csv"`.

    Raises:
        InputError: for a model or data that cannot be read, or that do not fit each other.

    Example:
        >>> found = contrast.evaluate(run.path, "digits", evaluate={"protocols": [{"name": "knn", "neighbours": 5}]})
        >>> found.results[0].settings["neighbours"]
        5
    """
    model = str(model)
    named_models.check_name(model)
    own = RunFolder(Path(model)).config
    given: list[Override] = [*overrides, *_overrides(settings)]
    if data is not None:
        given.insert(0, ("data.source", str(data)))
        if own.is_file():
            # Another data set is not split or labelled as the run's own was; it is read at the same size.
            unset = [(f"data.{key}", None) for key in ("labels", "target", "split_by", "splits")]
            given = [*unset, ("data.positives", "sample"), *given]
    by = "command line" if overrides else "call"
    config = configuration.load(str(own) if own.is_file() else None, given, by=by).config
    opened = read_data(config)
    name, encode = named_models.find(model, config, opened)
    found = measure({"raw": raw_input(opened), name: encode}, opened, **runs.evaluation_settings(config))
    target = Path(out) if out is not None else (Path(model) if own.is_file() else None)
    if target is not None:
        for folder in write_evaluations(RunFolder(target), opened, found, names=config.report.samples):
            log.info("written: %s", folder)
    return found


def _overrides(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (key, value) for each setting, a section's keys with dots; keys of `data` may have been given directly."""
    of_data = {field.name for field in dataclasses.fields(DataSettings)}
    direct = [(f"data.{key}", value) for key, value in settings.items() if key in of_data]
    return direct + list(_dotted({key: value for key, value in settings.items() if key not in of_data}))


def _dotted(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over (key, value), a mapping's keys with dots; a part stays a mapping."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" not in value:
            yield from ((f"{key}.{inner}", one) for inner, one in _dotted(value))
        else:
            yield key, value
