"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, STORED = 1024, 16_384
"""No more similarities than 1,024 x 16,384 are held at a time."""


@dataclass(frozen=True)
class Neighbours:
    r"""A fitted k-NN classifier: the protocol of InstDisc, as lightly and others report it.

    .. math:: p(c) \propto \sum_{i \in \text{k nearest}} e^{s_i / \tau} \, [y_i = c]

    with s the cosine similarity. Of equally similar items the one that stands first in the train split counts.

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
        """Give each class's share of the votes, (N, C) float64, for features (N, F)."""
        similarity, index = nearest_items(F.normalize(features.float()), self.stored, self.neighbours)
        vote = (similarity.double() / self.temperature).softmax(1)
        votes = torch.zeros(len(features), self.classes, dtype=torch.float64)
        return votes.scatter_add_(1, self.target[index], vote)


def fit_neighbours(
    features: Tensor, target: Tensor, classes: int, neighbours: int, temperature: float = 0.1
) -> Neighbours:
    """Give the classifier of labelled features (M, F); k is at most the mean number of labels a class.

    With fewer labels than k a class, most of the k nearest must be of wrong classes, however good the features are.
    """
    k = max(1, min(neighbours, len(target) // len(torch.unique(target))))
    return Neighbours(F.normalize(features.float()), target, classes, k, temperature)


def nearest_items(queries: Tensor, stored: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest inner products of each query, largest first, and which stored vectors they belong to.

    Exact; equal products stand in the order of `stored`. A block of products is held at a time.

    Args:
        queries: (N, F).
        stored: (M, F), M >= k.
        k: at least 1.

    Returns:
        products (N, k) and positions (N, k) int64.
    """
    found = [_nearest_in_blocks(block, stored, k) for block in torch.split(queries, QUERIES)]
    return torch.cat([product for product, _ in found]), torch.cat([index for _, index in found])


def _nearest_in_blocks(queries: Tensor, stored: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(stored), STORED):
        product, index = _largest(queries @ stored[start : start + STORED].T, k)
        # The earlier blocks stand first, and the sort is stable: equal products stay in order.
        best, order = torch.cat([best, product], 1).sort(dim=1, descending=True, stable=True)
        where = torch.cat([where, index + start], 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, where


def _largest(product: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest of each row and their positions, by value, then by position."""
    k = min(k, product.shape[1])
    values, index = product.topk(k, 1)
    # topk picks freely among values equal to the last it takes; only those rows are worth a whole sort.
    torn = (product >= values[:, -1:]).sum(1) > k
    if torn.any():
        ordered, position = product[torn].sort(dim=1, descending=True, stable=True)
        values[torn], index[torn] = ordered[:, :k], position[:, :k]
    index, order = index.sort(1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, by_value)
