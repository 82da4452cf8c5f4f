"""What the command does, as functions for Python: pretrain, evaluate, load."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrast.evaluation.features import raw_input
from contrast.evaluation.protocols import Evaluation
from contrast.evaluation.protocols import evaluate as measure
from contrast.experiment import config as configuration
from contrast.experiment import named_models
from contrast.experiment import run as runs
from contrast.experiment.build import read_data
from contrast.experiment.folder import RunFolder
from contrast.experiment.named_models import Model, load
from contrast.experiment.results import write_evaluations
from contrast.experiment.run import Run, Stopped

__all__ = ["Model", "Run", "Stopped", "evaluate", "load", "pretrain"]

log = logging.getLogger("contrast")


def pretrain(
    data: str | None = None, *, config: str | None = None, out: str | Path | None = None, **settings: Any
) -> Run:
    """Pretrain on a data set, evaluate and report; the keys are those of the command.

    Args:
        data: a path, "digits", "torchvision:NAME" or "aeon:NAME"; the config's own where it is not given.
        config: a shipped config or a .yaml file.
        out: the run's folder; the next free one under `runs/` where it is not given.
        **settings: of the config, a section as a mapping: `loss="cacr"`, `budget="2h"`, `optimizer={"lr": 1e-3}`;
            keys of `data` stand alone: `split_by="patient"`.

    Raises:
        InputError: for anything that does not fit, before anything is written.
        Stopped: where a signal ended training.
    """
    words = _words(settings)
    if data is not None:
        words.insert(0, f"data.source={data}")
    loaded = configuration.load(config, words, by="call")
    return runs.start(
        loaded,
        out=None if out is None else Path(out),
        name=Path(config).stem if config else None,
        command=shlex.join(["contrast", "pretrain", *filter(None, [config]), *words]),
    )


def evaluate(
    model: str | Path,
    data: str | None = None,
    *,
    out: str | Path | None = None,
    words: Sequence[str] = (),
    **settings: Any,
) -> Evaluation:
    """Measure a model's frozen features by the named protocols, beside raw input.

    Args:
        model: a run's folder, a weights file, "timm:NAME", "torchvision:NAME", or "module:function".
        data: as for `pretrain`; the run's own where it is not given.
        out: where to write `evaluations/`; a run's own folder where it is not given.
        words: `key=value` settings as on the command line.
        **settings: the same as arguments; keys of `data` may stand alone: `labels="labels.csv"`.

    Raises:
        InputError: for a model or data that cannot be had, or that do not fit each other.
    """
    model = str(model)
    own = RunFolder(Path(model)).config
    given = [*words, *_words(settings)]
    if data is not None:
        # Another data set is not split or labelled as the run's own was; it is read at the same size.
        fresh = ["data.labels=null", "data.target=null", "data.split_by=null", "data.splits=null"]
        fresh.append("data.positives=sample")
        given = [*(fresh if own.is_file() else []), f"data.source={data}", *given]
    by = "command line" if words else "call"
    config = configuration.load(str(own) if own.is_file() else None, given, by=by).config
    opened = read_data(config)
    name, encode = named_models.find(model, config, opened)
    found = measure({"raw": raw_input(opened), name: encode}, opened, **runs.measuring(config))
    target = Path(out) if out is not None else (Path(model) if own.is_file() else None)
    if target is not None:
        for folder in write_evaluations(RunFolder(target), opened, found):
            log.info("written: %s", folder)
    return found


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Give `key=value` for each setting as the command line has it; keys of `data` may have stood alone."""
    keys = {field.name for field in dataclasses.fields(configuration.DataSettings)}
    dotted = [(f"data.{key}" if key in keys else key, value) for key, value in _dotted(settings)]
    return [f"{key}={_word(value)}" for key, value in dotted]


def _dotted(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Give `key, value` for each setting, a section's keys with dots; a part stays whole."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" not in value:
            pairs += [(f"{key}.{inner}", one) for inner, one in _dotted(value)]
        else:
            pairs.append((key, value))
    return pairs


def _word(value: Any) -> str:
    """Give a value as it stands on the command line."""
    return str(value) if isinstance(value, Path) else configuration.in_words(value, whole=True)
