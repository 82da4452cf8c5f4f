"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.retrieval import exact_search


@dataclass(frozen=True)
class StoredNeighbours:
    r"""A fitted k-NN classifier: the weighted vote of InstDisc.

    .. math:: p(c) \propto \sum_{i \in \text{k nearest}} e^{s_i / \tau} \, [y_i = c]

    with s the cosine similarity. Of equally similar items the first in the train split counts.

    Args:
        stored: (M, F) float32, unit length (a zero vector stays zero).
        target: (M,) int64.
        classes: C.
        neighbours: k, from 1 to M.
        temperature: tau.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    arXiv:1805.01978, section 3.4 (there tau = 0.07, k = 200).
    """

    stored: Tensor
    target: Tensor
    classes: int
    neighbours: int
    temperature: float

    def probabilities(self, features: Tensor) -> Tensor:
        """Return each class's share of the votes, (N, C) float64, for features (N, F)."""
        similarity, index = exact_search(F.normalize(features.float()), self.stored, self.neighbours)
        vote = (similarity.double() / self.temperature).softmax(1)
        votes = torch.zeros(len(features), self.classes, dtype=torch.float64)
        return votes.scatter_add_(1, self.target[index], vote)


def fit_neighbours(
    features: Tensor, target: Tensor, classes: int, neighbours: int, temperature: float = 0.1
) -> StoredNeighbours:
    """Return the classifier of labelled features (M, F); k is at most the mean number of labels per class.

    With fewer than k labels per class, most of the k nearest items are of wrong classes, however good the features are.
    """
    k = max(1, min(neighbours, len(target) // len(torch.unique(target))))
    return StoredNeighbours(F.normalize(features.float()), target, classes, k, temperature)
