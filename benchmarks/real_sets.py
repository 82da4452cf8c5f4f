"""The real data sets of the benchmarks, with the config that their cells share, and what is measured of features."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from contrast.core.registry import InputError
from contrast.data import Data
from contrast.evaluation.features import Encode, extract
from contrast.evaluation.protocols import evaluate
from contrast.retrieval import exact_search

METRIC = "balanced_accuracy"
"""The accuracy, where every class has the same number of test items."""
DRAWS = 5


@dataclass(frozen=True)
class RealSet:
    """A data set and the config that its cells share.

    Args:
        file: its path in the data folder.
        items: how many training items are drawn from it; None: all.
        overrides: the config, as on the command line.
    """

    file: str
    items: int | None
    overrides: tuple[str, ...]


_SERIES = (
    "views={name: series, jitter: 0.2, mask: 0.3, smallest_crop: 0.5}",
    "encoder.backbone={name: resnet1d, width: 16}",
)
_COMMON = ("optimizer={name: adamw, lr: 2.0e-3, weight_decay: 1.0e-4}", "batch_size=256", "logger=none")
SETS = {
    "fashion_mnist": RealSet(
        "fashion_mnist/fashion_mnist.npz",
        12_000,
        ("views={name: simclr}", "encoder.backbone={name: small_conv, width: 16, blocks: [1, 1, 1, 1]}", *_COMMON),
    ),
    "bonn_eeg": RealSet("bonn_eeg/epilepsy_178.npz", None, (*_SERIES, *_COMMON)),
    "mitbih_beats": RealSet("mitbih_beats/mitbih_beats_180hz.npz", 12_000, (*_SERIES, *_COMMON)),
}


def source_of(name: str, data: Path, folder: Path) -> Path:
    """Return the file of a set: its own, or one with the training items that are drawn, written to `folder` once.

    Raises:
        InputError: where the data folder lacks the set.
    """
    chosen = SETS[name]
    file = data / chosen.file
    if not file.is_file():
        raise InputError(f"{data} should contain {chosen.file}, and does not; name the folder of the real sets.")
    if chosen.items is None:
        return file
    drawn = folder / f"{name}-{chosen.items}.npz"
    if not drawn.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = drawn.with_name(f".{os.getpid()}-{drawn.name}")
        with np.load(file) as arrays:
            np.savez(unfinished, **draw_items({key: arrays[key] for key in arrays}, chosen.items))
        unfinished.replace(drawn)
    return drawn


def draw_items(arrays: Mapping[str, Any], items: int) -> dict[str, Any]:
    """Return the arrays with this many training items, drawn with seed 0 and in their order, and all test items."""
    count = len(arrays["x_train"])
    rows = np.sort(np.random.default_rng(0).permutation(count)[:items])
    return {key: array[rows] if key.endswith("_train") else array for key, array in arrays.items()}


def one_percent(data: Data) -> int:
    """Return how many labels per class make a hundredth of all labels, at least one."""
    labelled = int((data.train.target >= 0).sum())
    return max(1, round(labelled / 100 / len(data.classes)))


def probe(encode: Encode, data: Data, seed: int) -> dict[str, Any]:
    """Return the accuracy of linear probes of frozen features on 1 % and on 100 % of the labels.

    Args:
        encode: raw batch to (N, F).
        data: with labels.
        seed: of the label draws: cells of one seed have the same ones.
    """
    draws = {"name": "few_labels", "labels_per_class": one_percent(data), "draws": DRAWS}
    found = evaluate({"pretrained": encode}, data, protocols=["linear", draws], seed=seed)
    values = {row.protocol: row.value for row in found.results if row.metric == METRIC}
    return {
        "1_percent": values["few_labels"],
        "100_percent": values["linear"],
        "labels_per_class": draws["labels_per_class"],
        "warnings": found.warnings,
    }


def nearest_same_class(encode: Encode, data: Data, neighbours: int = 8) -> float:
    """Return the share of the training items' nearest other items, by cosine of features, that have their label."""
    features, target = extract(encode, data.train)
    unit, item = F.normalize(features), torch.arange(len(features))
    found = exact_search(unit, unit, neighbours, exclude=[(item, item)])
    return float((target[found.position] == target[:, None]).double().mean())
