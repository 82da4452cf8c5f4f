"""The linear probe: logistic regression on standardised frozen features; its strength is not chosen on test items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrast.evaluation.logistic import ROUGH, prepare, solve

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
FOLDS = 5
MOST_FOR_CHOICE = 20_000
"""The most items on which a strength is chosen; the final fit uses all of them."""


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Args:
        mean, scale: (F,) float64, of the fitted items; a feature that is constant there has scale 0.
        weight, bias: (F, P) and (P,) float64, for the P classes of those items.
        present: (P,) int64, those classes.
        classes: C, of the data set.
        strength: lambda of the fit.
        converged: True if the fit reached its gradient tolerance.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    present: Tensor
    classes: int
    strength: float
    converged: bool

    def probabilities(self, features: Tensor) -> Tensor:
        """Return (N, C) float64 for features (N, F); a class without fitted items has probability 0."""
        logits = _standardised(features, self.mean, self.scale) @ self.weight + self.bias
        return _over_all_classes(logits.softmax(1), self.present, self.classes)


def fit_probe(features: Tensor, target: Tensor, classes: int, strength: float) -> Probe:
    """Fit a probe of one strength to labelled features (N, F), targets (N,) in [0, C)."""
    mean, scale = standardisation(features)
    present, index = torch.unique(target, return_inverse=True)
    found = solve(prepare(_standardised(features, mean, scale)), index, len(present), torch.tensor([strength]))
    return Probe(
        mean, scale, found.weight[0], found.bias[0], present, classes, float(strength), bool(found.converged[0])
    )


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation (F,) in float64; 0 for features that are constant up to rounding."""
    wide = features.double()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    constant = std <= 10 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(wide, torch.inf, 0)
    return mean, torch.where(constant, 0.0, 1 / std)


def _standardised(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return (features - mean) * scale in float64, with one copy only: train splits are large."""
    return features.to(torch.float64, copy=True).sub_(mean).mul_(scale)


def choose_on_validation(
    features: Tensor, target: Tensor, held_out: Tensor, strengths: Sequence[float], seed: int
) -> tuple[float, dict[float, float]]:
    """Return the strength with the smallest log loss on held-out items, and the log loss of each strength tried.

    Strengths are tried in descending order until the log loss rises: weaker ones take longer to fit, and fit noise.

    Args:
        features: of labelled items, (N, F).
        target: (N,) int64.
        held_out: (N,) bool, for choosing; the others are fitted, at most 20,000 drawn by `seed`.
        strengths: the grid; of equal log losses the strongest is chosen.
        seed: of that draw.
    """
    fitted = _items_for_choice(torch.nonzero(~held_out).squeeze(1), seed)
    mean, scale = standardisation(features[fitted])
    present, index = torch.unique(target[fitted], return_inverse=True)
    validated = torch.nonzero(held_out & torch.isin(target, present)).squeeze(1)
    design = prepare(_standardised(features[fitted], mean, scale))
    x, truth = _standardised(features[validated], mean, scale), torch.searchsorted(present, target[validated])
    losses: dict[float, float] = {}
    for strength in sorted(strengths, reverse=True):
        found = solve(design, index, len(present), torch.tensor([strength]), tolerance=ROUGH)
        loss = float(_log_loss(x @ found.weight + found.bias[:, None], truth).mean())
        rises = bool(losses) and loss > min(losses.values())
        losses[strength] = loss
        if rises:
            break
    return min(losses, key=losses.__getitem__), losses


def choose_by_folds(
    features: Tensor, target: Tensor, strengths: Sequence[float], seed: int
) -> tuple[float, dict[float, float]]:
    """Return the strength with the smallest log loss in stratified five-fold cross-validation, and each log loss.

    All folds share the standardisation of all N items, which uses no labels. The only item of a class is not held out.
    Where no item can be held out, with one label per class, the losses are empty and the strength is the middle of the
    grid. At most 20,000 items are used, drawn by `seed`.
    """
    strengths = sorted(strengths, reverse=True)
    rows = _items_for_choice(torch.arange(len(target)), seed)
    present, index = torch.unique(target[rows], return_inverse=True)
    fold = torch.from_numpy(stratified_folds(index.numpy(), FOLDS, seed))
    used = [number for number in range(FOLDS) if (fold == number).any()]
    if not used:
        return strengths[len(strengths) // 2], {}
    mean, scale = standardisation(features[rows])
    x = _standardised(features[rows], mean, scale)
    fitted = torch.stack([fold != number for number in used]).repeat_interleave(len(strengths), 0)
    found = solve(prepare(x), index, len(present), torch.tensor(strengths).repeat(len(used)), fitted, tolerance=ROUGH)
    total = torch.stack(
        [
            (_log_loss(x @ weight + bias, index) * ~in_fit).sum()
            for weight, bias, in_fit in zip(found.weight, found.bias, fitted, strict=True)
        ]
    )
    means = total.view(len(used), -1).sum(0) / (fold >= 0).sum()
    losses = dict(zip(strengths, means.tolist(), strict=True))
    return min(losses, key=losses.__getitem__), losses


def _items_for_choice(items: Tensor, seed: int) -> Tensor:
    if len(items) <= MOST_FOR_CHOICE:
        return items
    drawn = np.random.default_rng(seed).permutation(len(items))[:MOST_FOR_CHOICE]
    return items[torch.from_numpy(np.sort(drawn))]


def stratified_folds(target: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return each item's fold, (N,): every class is spread evenly, at random; -1 for the only item of a class."""
    generator = np.random.default_rng(seed)
    fold = np.full(len(target), -1)
    assigned = 0
    for label in np.unique(target):
        items = generator.permutation(np.flatnonzero(target == label))
        if len(items) > 1:
            # Each class continues where the last one ended, so that small classes are not all in the first folds.
            fold[items] = (assigned + np.arange(len(items))) % folds
            assigned += len(items)
    return fold


def draw_labels(target: np.ndarray, labels_per_class: int, seed: int) -> np.ndarray:
    """Return the sorted positions of a random draw: `labels_per_class` labels of each class, or all that a class has.

    Args:
        target: (N,) int64, -1 where there is no label.
        labels_per_class: at least 1.
        seed: determines the draw together with `target`; every model gets the same.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(target[target >= 0])
    drawn = [generator.permutation(np.flatnonzero(target == label))[:labels_per_class] for label in classes]
    return np.sort(np.concatenate(drawn))


def _log_loss(logits: Tensor, index: Tensor) -> Tensor:
    """Return (..., N), minus the log-probability of each item's class, for logits (..., N, P) and classes (N,)."""
    chosen = index.expand(logits.shape[:-1])[..., None]
    return -logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)


def _over_all_classes(probability: Tensor, present: Tensor, classes: int) -> Tensor:
    full = probability.new_zeros(len(probability), classes)
    full[:, present] = probability
    return full
