"""Scores of predicted class probabilities: accuracy, balanced accuracy, macro-F1, AUROC, and scores per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


@dataclass(frozen=True)
class Scores:
    """The scores of one set of predictions.

    Args:
        values: metric -> value in [0, 1]; without `auroc` where all items are of one class.
        errors: metric -> standard error from the finite number of items, for accuracy and balanced accuracy.
        per_class: class name -> recall, precision, f1, support (number of items).
        absent: classes without items, which are left out of every mean over classes.
    """

    values: dict[str, float]
    errors: dict[str, float]
    per_class: dict[str, dict[str, float]]
    absent: tuple[str, ...]


def score(target: NDArray[np.int64], probability: NDArray[Any], classes: Sequence[str]) -> Scores:
    """Return the scores of probabilities (N, C) for targets (N,) in [0, C).

    The prediction is the class of the largest probability, of equal ones the first. A class without items is left out
    of the means, but predicting it is an error. A class without predictions has precision 0. AUROC is the mean over
    classes of one class against the rest; for two classes this is the usual one.
    """
    predicted = probability.argmax(1)
    count = len(classes)
    confusion = np.bincount(target * count + predicted, minlength=count * count).reshape(count, count)
    hit, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    present = np.flatnonzero(support)
    recall = hit[present] / support[present]
    precision = hit[present] / np.maximum(claimed[present], 1)
    f1 = 2 * hit[present] / (support[present] + claimed[present])
    accuracy = hit.sum() / len(target)
    values = {
        "accuracy": float(accuracy),
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float(f1.mean()),
    }
    if len(present) > 1:
        values["auroc"] = float(np.mean([_auroc(probability[:, label], target == label) for label in present]))
    errors = {
        "accuracy": float(np.sqrt(accuracy * (1 - accuracy) / len(target))),
        "balanced_accuracy": float(np.sqrt((recall * (1 - recall) / support[present]).sum()) / len(present)),
    }
    per_class = {
        classes[label]: {
            "recall": float(recall[i]),
            "precision": float(precision[i]),
            "f1": float(f1[i]),
            "support": int(support[label]),
        }
        for i, label in enumerate(present)
    }
    absent = tuple(classes[label] for label in np.flatnonzero(support == 0))
    return Scores(values, errors, per_class, absent)


def _auroc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Return the probability that a positive item scores above a negative one; ties count half."""
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, scores[positive], side="left")
    not_above = np.searchsorted(negatives, scores[positive], side="right")
    return float((below + not_above).mean() / 2 / len(negatives))


def mean_per_class(scores: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Return each class's scores averaged over several predictions of the same items."""
    first = scores[0].per_class
    return {
        name: {key: float(np.mean([one.per_class[name][key] for one in scores])) for key in numbers}
        for name, numbers in first.items()
    }
