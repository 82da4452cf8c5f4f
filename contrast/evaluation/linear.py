"""The linear probe: logistic regression on standardised frozen features, its strength never chosen on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contrast.evaluation.logistic import ROUGH, prepare, solve

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
FOLDS = 5
FIRST = 20_000
"""A strength is chosen on at most so many items; the final fit takes all of them."""


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Args:
        mean, scale: (F,) float64, of the items it was fitted to; a feature that never varied there has scale 0.
        weight, bias: (F, P) and (P,) float64, for the P classes that occurred there.
        present: (P,) int64, which classes those are.
        classes: C, of the whole data set.
        strength: lambda of the fit.
        converged: whether the fit reached its gradient tolerance.
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
        """Give (N, C) float64 for features (N, F); a class that the fit never saw has probability 0."""
        logits = _standardised(features, self.mean, self.scale) @ self.weight + self.bias
        return _over_all_classes(logits.softmax(1), self.present, self.classes)


def fit_probe(features: Tensor, target: Tensor, classes: int, strength: float) -> Probe:
    """Give the probe of labelled features (N, F), targets (N,) in [0, C), for one strength."""
    mean, scale = standardisation(features)
    present, index = torch.unique(target, return_inverse=True)
    found = solve(prepare(_standardised(features, mean, scale)), index, len(present), torch.tensor([strength]))
    return Probe(
        mean, scale, found.weight[0], found.bias[0], present, classes, float(strength), bool(found.converged[0])
    )


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and 1 / standard deviation (F,) in float64; 0 for features that are constant up to rounding."""
    wide = features.double()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    constant = std <= 10 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(wide, torch.inf, 0)
    return mean, torch.where(constant, 0.0, 1 / std)


def _standardised(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Give (features - mean) * scale in float64, with one copy only: train splits are large."""
    return features.to(torch.float64, copy=True).sub_(mean).mul_(scale)


def choose_on_validation(
    features: Tensor, target: Tensor, held_out: Tensor, strengths: Sequence[float], seed: int
) -> tuple[float, dict[float, float]]:
    """Give the strength with the smallest log loss on the items held out, and the log loss of each strength tried.

    From the strongest to weaker ones, until the log loss rises: what comes after fits longer and longer, to noise.

    Args:
        features: of labelled items, (N, F).
        target: (N,) int64.
        held_out: (N,) bool, for choosing; the others are fitted (20,000 drawn by `seed` where there are more).
        strengths: the grid; of equal ones the stronger is chosen.
        seed: of that drawing.
    """
    fitted = _at_most_first(torch.nonzero(~held_out).squeeze(1), seed)
    mean, scale = standardisation(features[fitted])
    present, index = torch.unique(target[fitted], return_inverse=True)
    judged = torch.nonzero(held_out & torch.isin(target, present)).squeeze(1)
    design = prepare(_standardised(features[fitted], mean, scale))
    x, truth = _standardised(features[judged], mean, scale), torch.searchsorted(present, target[judged])
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
    """Give the strength with the smallest log loss in stratified five-fold cross-validation, and each one's log loss.

    All folds share the standardisation of all N items, which knows no labels. The only item of a class is never
    held out. Where nothing can be held out, one label a class, the losses are empty and the strength is the grid's
    middle one. Of more than 20,000 items so many are drawn by `seed`.
    """
    strengths = sorted(strengths, reverse=True)
    some = _at_most_first(torch.arange(len(target)), seed)
    present, index = torch.unique(target[some], return_inverse=True)
    fold = torch.from_numpy(stratified_folds(index.numpy(), FOLDS, seed))
    used = [number for number in range(FOLDS) if (fold == number).any()]
    if not used:
        return strengths[len(strengths) // 2], {}
    mean, scale = standardisation(features[some])
    x = _standardised(features[some], mean, scale)
    kept = torch.stack([fold != number for number in used]).repeat_interleave(len(strengths), 0)
    found = solve(prepare(x), index, len(present), torch.tensor(strengths).repeat(len(used)), kept, tolerance=ROUGH)
    total = torch.stack(
        [
            (_log_loss(x @ weight + bias, index) * ~which).sum()
            for weight, bias, which in zip(found.weight, found.bias, kept, strict=True)
        ]
    )
    means = total.view(len(used), -1).sum(0) / (fold >= 0).sum()
    losses = dict(zip(strengths, means.tolist(), strict=True))
    return min(losses, key=losses.__getitem__), losses


def _at_most_first(items: Tensor, seed: int) -> Tensor:
    if len(items) <= FIRST:
        return items
    drawn = np.random.default_rng(seed).permutation(len(items))[:FIRST]
    return items[torch.from_numpy(np.sort(drawn))]


def stratified_folds(target: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Give each item's fold, (N,): every class spread evenly, at random; -1 for the only item of a class."""
    generator = np.random.default_rng(seed)
    fold = np.full(len(target), -1)
    dealt = 0
    for label in np.unique(target):
        items = generator.permutation(np.flatnonzero(target == label))
        if len(items) > 1:
            # Each class goes on where the last one stopped, so that small classes do not all sit in the first folds.
            fold[items] = (dealt + np.arange(len(items))) % folds
            dealt += len(items)
    return fold


def draw_labels(target: np.ndarray, labels_per_class: int, seed: int) -> np.ndarray:
    """Give the sorted positions of a random draw: so many labels a class, or all that a class has.

    Args:
        target: (N,) int64, -1 where there is no label.
        labels_per_class: at least 1.
        seed: decides, with `target`, everything; the model has no part in it.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(target[target >= 0])
    drawn = [generator.permutation(np.flatnonzero(target == label))[:labels_per_class] for label in classes]
    return np.sort(np.concatenate(drawn))


def _log_loss(logits: Tensor, index: Tensor) -> Tensor:
    """Give (..., N), minus the log-probability of each item's class, for logits (..., N, P) and classes (N,)."""
    chosen = index.expand(logits.shape[:-1])[..., None]
    return -logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)


def _over_all_classes(probability: Tensor, present: Tensor, classes: int) -> Tensor:
    full = probability.new_zeros(len(probability), classes)
    full[:, present] = probability
    return full
