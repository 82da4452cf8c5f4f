"""`results.json` and `evaluations/`: the numbers of a run with protocol, data, draws and spread."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from contrast.data.dataset import Data
from contrast.evaluation.protocols import Evaluation
from contrast.experiment.folder import EVALUATIONS, PREDICTIONS, RESULT, RESULTS, RunFolder
from contrast.losses.loss import Loss

SCHEMA = 1

log = logging.getLogger("contrast")


def write_results(
    run: RunFolder,
    about: Mapping[str, Any],
    data: Data,
    evaluation: Evaluation | None,
    *,
    findings: Mapping[str, Any],
    names: bool = True,
) -> Path:
    """Write `results.json`, schema 1, and a folder per protocol with its rows and predictions.

    Args:
        run: where to write.
        about: the run: command, config hash, commit, seed, status, device, seconds and the like.
        data: what was read.
        evaluation: what was measured; None where there was nothing to measure.
        findings: what the loss found, as `clean_findings` returns it.
        names: False leaves the items' names out of the predictions.
    """
    results = [] if evaluation is None else [result.row() for result in evaluation.results]
    if evaluation is not None:
        write_evaluations(run, data, evaluation, names=names)
    return run.write_json(
        RESULTS,
        {
            "schema": SCHEMA,
            "run": dict(about),
            "data": describe(data),
            "results": results,
            "findings": dict(findings),
            "warnings": [] if evaluation is None else evaluation.warnings,
        },
    )


def clean_findings(loss: Loss, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what the loss found as JSON can contain it: an error in it must not cost the results of a run.

    Numbers that are not finite become None. A table that does not consist of rows, or all of them where `findings`
    raises, are left out with a warning.
    """
    clean: dict[str, list[dict[str, Any]]] = {}
    try:
        findings: object = loss.findings(names)
        if not isinstance(findings, Mapping):
            raise TypeError(f"expected a mapping from title to rows; got {type(findings).__name__}")
        tables = list(findings.items())
    except Exception as error:
        _warn_of_findings(loss, "all findings", error)
        return clean
    for title, rows in tables:
        try:
            clean[str(title)] = _clean_rows(rows)
        except Exception as error:
            _warn_of_findings(loss, f"{title!r}", error)
    return clean


def _clean_rows(rows: object) -> list[dict[str, Any]]:
    if not isinstance(rows, Iterable):
        raise TypeError(f"expected a list of rows; got {type(rows).__name__}")
    clean = []
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"expected a mapping from column to value in each row; got {type(row).__name__}")
        clean.append({str(column): _clean_value(value) for column, value in row.items()})
    return clean


def _clean_value(value: Any) -> str | int | float | bool | None:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, int | float):
        return value if abs(value) <= sys.float_info.max else None
    return value if value is None or isinstance(value, str) else str(value)


def _warn_of_findings(loss: Loss, what: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    log.warning("%s.findings: %s left out (%s)", type(loss).__name__, what, reason)


def describe(data: Data) -> dict[str, Any]:
    """Return each split's source, fingerprint and number of samples."""
    splits = {
        "train": int((~data.validation).sum()),
        "validation": int(data.validation.sum()),
        "test": len(data.test),
    }
    return {
        split: {
            "source": data.source,
            "fingerprint": data.fingerprint.get(split),
            "samples": samples,
            "split_by": data.split_by,
        }
        for split, samples in splits.items()
        if samples
    }


def write_evaluations(run: RunFolder, data: Data, evaluation: Evaluation, *, names: bool = True) -> list[Path]:
    """Write `evaluations/<protocol>-v1-<data>-<hash>/` with `result.json` and `predictions.parquet`.

    Args:
        run: where to write.
        data: what was read.
        evaluation: what was measured.
        names: False leaves the items' names out; their sample indices stay.
    """
    folders = []
    for protocol, models in evaluation.predictions.items():
        results = [result for result in evaluation.results if result.protocol == protocol]
        source = Path(data.source).stem if Path(data.source).exists() else data.source
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in source)
        folder = f"{EVALUATIONS}/{protocol}-{results[0].protocol_version}-{name}-{results[0].protocol_hash[:8]}"
        run.write_json(
            f"{folder}/{RESULT}",
            {"schema": SCHEMA, "data": describe(data), "results": [result.row() for result in results]},
        )
        _write_predictions(run.path / folder / PREDICTIONS, data, models, names=names)
        folders.append(run.path / folder)
    return folders


def _write_predictions(file: Path, data: Data, models: Mapping[str, Any], *, names: bool) -> None:
    """Write one row per item and model: its target, the predicted class and the probability of each class."""
    import pandas

    item_names = dict(zip(data.test.sample.tolist(), data.test.names, strict=True))
    frames = []
    for model, predictions in models.items():
        frame = {
            "model": model,
            **({"item": [item_names[sample] for sample in predictions.sample.tolist()]} if names else {}),
            "sample": predictions.sample,
            "target": [data.classes[target] for target in predictions.target],
            "predicted": [data.classes[predicted] for predicted in predictions.predicted],
        }
        frame |= {
            f"probability_{label}": np.asarray(predictions.probabilities[:, index], dtype=np.float32)
            for index, label in enumerate(data.classes)
        }
        frames.append(pandas.DataFrame(frame))
    pandas.concat(frames, ignore_index=True).to_parquet(file, index=False)
