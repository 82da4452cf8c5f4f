"""Named evaluation protocols: all choices are made on training items, then the test split is predicted once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrast.core.registry import InputError, Registry
from contrast.evaluation.features import Encode, Health, extract, health
from contrast.evaluation.knn import fit_neighbours
from contrast.evaluation.linear import (
    FOLDS,
    STRENGTHS,
    choose_by_folds,
    choose_on_validation,
    draw_labels,
    fit_probe,
)
from contrast.evaluation.metrics import METRICS, Scores, mean_per_class, score
from contrast.evaluation.results import Result, subject

if TYPE_CHECKING:
    from contrast.data.dataset import Data, Samples

PROTOCOLS = Registry("protocol")


class Classifier(Protocol):
    """A fitted probe, or stored neighbours."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Return (N, C) for features (N, F)."""
        ...


@dataclass(frozen=True)
class Labelled:
    """The labelled training items, which are all that a protocol may use.

    features: (N, F) float32. target: (N,) int64 in [0, C). validation: (N,) bool, for choosing. classes: their C names.
    """

    features: Tensor
    target: Tensor
    validation: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """The classifiers that a protocol fitted to the training items.

    classifiers: one per draw. seeds: one per classifier. selected_on: what the hyperparameters were selected on.
    chosen: what was selected, for the result's settings.
    """

    classifiers: list[Classifier]
    seeds: list[int]
    selected_on: str
    chosen: dict[str, Any]


class ProbeProtocol(Protocol):
    """A named evaluation of features, as a dataclass whose fields are its settings."""

    name: ClassVar[str]
    version: ClassVar[str]

    @property
    def labels(self) -> str:
        """How many labels the classifier is given: "all" or "10 per class"."""
        ...

    def fit(self, train: Labelled, seed: int) -> Fitted:
        """Choose and fit, on training items only."""
        ...


@PROTOCOLS.register("knn", aliases=("nearest_neighbours", "k_nn"))
@dataclass(frozen=True)
class NearestNeighbours:
    """k-nearest neighbours by cosine similarity with all labels, votes weighted by exp(similarity / temperature).

    Args:
        neighbours: k; the mean number of labels per class where that is smaller.
        temperature: tau > 0.
    """

    name: ClassVar[str] = "knn"
    version: ClassVar[str] = "v1"
    neighbours: int = 20
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.temperature <= 0:
            raise ValueError(
                "neighbours must be at least 1 and temperature above 0; "
                f"got {self.neighbours} and {self.temperature:g}."
            )

    @property
    def labels(self) -> str:
        """How many labels the classifier is given: "all" or "10 per class"."""
        return "all"

    def fit(self, train: Labelled, seed: int) -> Fitted:
        """Store the training items; nothing is selected."""
        found = fit_neighbours(
            train.features, train.target, len(train.classes), self.neighbours, temperature=self.temperature
        )
        return Fitted([found], [seed], "nothing to select", {"neighbours_used": found.neighbours})


@PROTOCOLS.register("linear", aliases=("linear_probe", "logistic_regression"))
@dataclass(frozen=True)
class Linear:
    """A linear probe on all labels: its strength by log loss on the validation items, then fitted to all items.

    Where the data have no validation items, stratified five-fold cross-validation replaces them.

    Args:
        strengths: the grid of L2 strengths lambda > 0, as of `contrast.evaluation.logistic.solve`.
    """

    name: ClassVar[str] = "linear"
    version: ClassVar[str] = "v1"
    strengths: tuple[float, ...] = STRENGTHS

    def __post_init__(self) -> None:
        _check_strengths(self.strengths)

    @property
    def labels(self) -> str:
        """How many labels the classifier is given: "all" or "10 per class"."""
        return "all"

    def fit(self, train: Labelled, seed: int) -> Fitted:
        """Select the strength, then fit."""
        x, target, held_out = train.features, train.target, train.validation
        if held_out.any() and len(torch.unique(target[~held_out])) > 1:
            strength, losses = choose_on_validation(x, target, held_out, self.strengths, seed)
            selected_on = f"log loss on {int(held_out.sum()):,} validation items"
        else:
            strength, losses = choose_by_folds(x, target, self.strengths, seed)
            selected_on = f"log loss in {FOLDS}-fold cross-validation of the training items"
        probe = fit_probe(x, target, len(train.classes), strength)
        chosen = {"strength": strength, "log_loss": _listed(losses), "converged": probe.converged, "items": len(target)}
        return Fitted([probe], [seed], selected_on, chosen)


@PROTOCOLS.register("few_labels", aliases=("few_shot", "low_shot"))
@dataclass(frozen=True)
class FewLabels:
    """Linear probes on random draws of a few labels per class; every model gets the same draws.

    Each draw's strength is selected by cross-validation inside the draw, so that no further label is used.

    Args:
        labels_per_class: at least 1; of a class with fewer, all labels are used.
        draws: how many, at least 1.
        strengths: the grid of L2 strengths lambda > 0.
    """

    name: ClassVar[str] = "few_labels"
    version: ClassVar[str] = "v1"
    labels_per_class: int = 10
    draws: int = 5
    strengths: tuple[float, ...] = STRENGTHS

    def __post_init__(self) -> None:
        if self.labels_per_class < 1 or self.draws < 1:
            raise ValueError(
                f"labels_per_class and draws must be at least 1; got {self.labels_per_class} and {self.draws}."
            )
        _check_strengths(self.strengths)

    @property
    def labels(self) -> str:
        """How many labels the classifier is given: "all" or "10 per class"."""
        return f"{self.labels_per_class} per class"

    def fit(self, train: Labelled, seed: int) -> Fitted:
        """Draw the labels, select the strength and fit, once per draw."""
        target = train.target.numpy()
        seeds = [int(value) for value in np.random.SeedSequence(seed).generate_state(self.draws)]
        draws = [torch.from_numpy(draw_labels(target, self.labels_per_class, one)) for one in seeds]
        probes, losses = [], []
        for draw, one in zip(draws, seeds, strict=True):
            x, y = train.features[draw], train.target[draw]
            strength, each = choose_by_folds(x, y, self.strengths, one)
            losses.append(_listed(each))
            probes.append(fit_probe(x, y, len(train.classes), strength))
        chosen: dict[str, Any] = {
            "strength": [probe.strength for probe in probes],
            "log_loss": losses,
            "converged": all(probe.converged for probe in probes),
            "items": len(draws[0]),
        }
        available = np.bincount(target, minlength=len(train.classes))
        if fewer := {train.classes[c]: int(n) for c, n in enumerate(available) if 0 < n < self.labels_per_class}:
            chosen["classes_with_fewer_labels"] = fewer
        selected_on = (
            f"log loss in {FOLDS}-fold cross-validation inside each draw"
            if all(losses)
            else "nothing: one label per class leaves none to select on"
        )
        return Fitted(list(probes), seeds, selected_on, chosen)


def _listed(losses: Mapping[float, float]) -> dict[str, float]:
    return {f"{strength:g}": loss for strength, loss in losses.items()}


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"strengths must be at least one number above 0; got {list(strengths)}.")


def settings(protocol: ProbeProtocol) -> dict[str, Any]:
    """Return a protocol's settings as results.json has them."""
    listed: dict[str, Any] = asdict(protocol)  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in listed.items()}


def protocol_hash(protocol: ProbeProtocol) -> str:
    """Return 12 hexadecimal digits of name, version and settings; results of equal hashes are comparable."""
    text = json.dumps([protocol.name, protocol.version, settings(protocol)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Predictions:
    """The predictions of one model's classifier for the labelled test items; of several draws, the first.

    sample: (N,) int64, index in the data set. target, predicted: (N,) int64. probabilities: (N, C) float64.
    """

    sample: NDArray[np.int64]
    target: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Args:
        results: the rows of results.json.
        predictions: protocol -> model -> predictions for the test items.
        features: model -> features (N, F) of all test items, in order.
        health: model -> the check of its features.
        fitted: protocol -> model -> the classifiers and what was selected.
        notes: sentences about classes and labels.
    """

    results: list[Result] = field(default_factory=list)
    predictions: dict[str, dict[str, Predictions]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    health: dict[str, Health] = field(default_factory=dict)
    fitted: dict[str, dict[str, Fitted]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """Sentences on encoders with broken features, then the notes."""
        return [verdict.sentence for verdict in self.health.values() if not verdict.usable] + self.notes


def evaluate(
    models: Mapping[str, Encode],
    data: Data,
    *,
    protocols: Sequence[str | Mapping[str, Any]] = ("knn", "linear", "few_labels"),
    seed: int = 0,
    draws: int = 5,
    labels_per_class: int = 10,
    batch_size: int = 256,
    progress: Callable[[str], object] | None = None,
) -> Evaluation:
    """Measure frozen features by every protocol.

    First all classifiers of all models are selected and fitted on the labelled items of `data.train`; then each model
    encodes the test items, once.

    Args:
        models: name -> encoder, raw batch -> (N, F); a module is in evaluation mode meanwhile.
        data: with labels, of at least two classes, in train and test.
        protocols: names, or {name: ..., settings}.
        seed: of the label draws, the folds and the items that a selection uses.
        draws: of `few_labels`, where its own settings lack it.
        labels_per_class: of `few_labels`, where its own settings lack it.
        batch_size: items per batch, for the features.
        progress: called with a line about each step.

    Raises:
        InputError: for an unknown protocol or setting, data without the required labels, an encoder that does not
            return one vector per item. NaN features and a collapsed encoder are no error, but reported in `health`.
    """
    chosen = _build(protocols, draws=draws, labels_per_class=labels_per_class, classes=len(data.classes))
    if not models:
        raise InputError("evaluation needs at least one model; none was given.")
    train, validation = _labelled_train(data)
    labelled_test = _labelled_test(data)
    report = progress or (lambda _: None)
    found = Evaluation()
    seconds: dict[tuple[str, str], float] = {}
    for model, encode in models.items():
        report(f"{subject(model)}: {', '.join(each.name for each in chosen)} on {len(train):,} labelled training items")
        features, target = extract(encode, train, batch_size)
        found.health[model] = health(features, subject(model))
        if not found.health[model].finite:
            continue
        labelled = Labelled(features, target, validation, data.classes)
        for protocol in chosen:
            start = time.perf_counter()
            found.fitted.setdefault(protocol.name, {})[model] = protocol.fit(labelled, seed)
            seconds[protocol.name, model] = time.perf_counter() - start
    for model, encode in models.items():
        if not found.health[model].finite:
            continue
        report(f"{subject(model)}: {len(labelled_test):,} test items")
        features, target = extract(encode, data.test, batch_size)
        verdict = health(features, subject(model))
        if not verdict.finite:
            found.health[model] = verdict
            continue
        found.features[model] = features
        for protocol in chosen:
            fitted = found.fitted[protocol.name][model]
            start = time.perf_counter()
            probabilities = [each.probabilities(features[labelled_test]).numpy() for each in fitted.classifiers]
            scores = [score(target[labelled_test].numpy(), each, data.classes) for each in probabilities]
            spent = seconds[protocol.name, model] + time.perf_counter() - start
            found.results.extend(_rows(model, protocol, fitted, scores, spent))
            found.predictions.setdefault(protocol.name, {})[model] = Predictions(
                data.test.sample[labelled_test.numpy()],
                target[labelled_test].numpy(),
                probabilities[0].argmax(1),
                probabilities[0],
            )
    found.notes.extend(_class_notes(data, train))
    return found


def _build(protocols: Sequence[str | Mapping[str, Any]], **facts: int) -> list[ProbeProtocol]:
    built: list[ProbeProtocol] = [
        PROTOCOLS.build(part, where=f"evaluate.protocols[{number}]", **facts) for number, part in enumerate(protocols)
    ]
    names = [protocol.name for protocol in built]
    if not names or len(set(names)) < len(names):
        raise InputError(f"evaluate.protocols must name at least one protocol, each once; got {names}.")
    return built


def _labelled_train(data: Data) -> tuple[Samples, Tensor]:
    """Return the labelled training items and which of them are for validation."""
    has_label = np.flatnonzero(data.train.target >= 0)
    present = np.unique(data.train.target[has_label])
    if len(present) < 2:
        raise InputError(
            f"a probe needs labelled training items of at least two classes; {data.source} has {len(has_label):,} "
            f"labelled training items of {len(present)} {'class' if len(present) == 1 else 'classes'}."
        )
    return data.train.subset(has_label), torch.from_numpy(np.asarray(data.validation, dtype=bool)[has_label])


def _labelled_test(data: Data) -> Tensor:
    """Return the positions of the labelled test items; nothing else of the test split is read here."""
    labelled = np.flatnonzero(data.test.target >= 0) if len(data.test) else np.zeros(0, dtype=np.int64)
    if len(labelled) == 0:
        raise InputError(
            f"evaluation needs labelled test items; {data.source} has {len(data.test):,} test items, "
            "none with a label. Give labels, or splits that leave some labelled items for test."
        )
    return torch.from_numpy(labelled)


def _class_notes(data: Data, train: Samples) -> list[str]:
    test_only = sorted(set(data.test.target[data.test.target >= 0].tolist()) - set(train.target.tolist()))
    test_absent = sorted(set(range(len(data.classes))) - set(data.test.target.tolist()))
    notes = []
    if test_only:
        names = ", ".join(data.classes[label] for label in test_only)
        notes.append(f"no labelled training item for: {names}; their test items count as errors.")
    if test_absent:
        names = ", ".join(data.classes[label] for label in test_absent)
        notes.append(f"no labelled test item for: {names}; left out of every mean over classes.")
    return notes


def _rows(
    model: str, protocol: ProbeProtocol, fitted: Fitted, scores: Sequence[Scores], seconds: float
) -> list[Result]:
    """Return one row per metric."""
    listed = {**settings(protocol), **fitted.chosen}
    if scores[0].absent:
        listed["classes_left_out"] = list(scores[0].absent)
    rows = []
    for metric in (name for name in METRICS if name in scores[0].values):
        values = [one.values[metric] for one in scores]
        row = Result(
            model=model,
            protocol=protocol.name,
            protocol_version=protocol.version,
            protocol_hash=protocol_hash(protocol),
            split="test",
            labels=protocol.labels,
            metric=metric,
            value=float(np.mean(values)),
            spread=None,
            spread_kind="none",
            n=len(values),
            values=values,
            seeds=fitted.seeds,
            selected_on=fitted.selected_on,
            saw_test=False,
            settings=listed,
            per_class=mean_per_class(scores) if metric == "accuracy" else None,
            seconds=seconds,
        )
        if len(values) > 1:
            row = replace(row, spread=float(np.std(values, ddof=1)), spread_kind="standard deviation over draws")
        elif metric in scores[0].errors:
            row = replace(row, spread=scores[0].errors[metric], spread_kind="standard error over test items")
        rows.append(row)
    return rows
