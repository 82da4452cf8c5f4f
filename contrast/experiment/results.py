"""`results.json` and `evaluations/`: every number of a run with what is needed to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from contrast.data.dataset import Data
from contrast.evaluation.protocols import Evaluation
from contrast.experiment.folder import EVALUATIONS, PREDICTIONS, RESULT, RESULTS, RunFolder

SCHEMA = 1


def write_results(
    run: RunFolder, about: Mapping[str, Any], data: Data, evaluation: Evaluation | None, *, names: bool = True
) -> Path:
    """Write `results.json`, schema 1, and a folder for each protocol with its rows and predictions.

    Args:
        run: where to write.
        about: the run: command, config hash, commit, seed, status, device, seconds and the like.
        data: what was read.
        evaluation: what was measured; None where there was nothing to measure.
        names: whether the predictions say what each item is called.
    """
    rows = [] if evaluation is None else [result.row() for result in evaluation.results]
    if evaluation is not None:
        write_evaluations(run, data, evaluation, names=names)
    return run.write_json(
        RESULTS,
        {
            "schema": SCHEMA,
            "run": dict(about),
            "data": describe(data),
            "results": rows,
            "warnings": [] if evaluation is None else evaluation.warnings,
        },
    )


def describe(data: Data) -> dict[str, Any]:
    """Give each split's source, fingerprint and number of samples."""
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
        names: whether the predictions say what each item is called; its sample index stays either way.
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
    """Write a row an item and model: what it is, what was said, and how likely each class was held to be."""
    import pandas

    named = dict(zip(data.test.sample.tolist(), data.test.names, strict=True))
    frames = []
    for model, said in models.items():
        frame = {
            "model": model,
            **({"item": [named[sample] for sample in said.sample.tolist()]} if names else {}),
            "sample": said.sample,
            "target": [data.classes[target] for target in said.target],
            "predicted": [data.classes[predicted] for predicted in said.predicted],
        }
        frame |= {
            f"probability_{label}": np.asarray(said.probabilities[:, place], dtype=np.float32)
            for place, label in enumerate(data.classes)
        }
        frames.append(pandas.DataFrame(frame))
    pandas.concat(frames, ignore_index=True).to_parquet(file, index=False)
