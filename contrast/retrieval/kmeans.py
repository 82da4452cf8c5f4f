"""k-means clustering, reproducible by seed on any device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.registry import InputError
from contrast.retrieval.search import TILE_COLUMNS, TILE_PRODUCTS, StoredVectors, slices

START_SAMPLES = 32
"""Vectors per cluster among which k-means++ chooses the first centroids."""


class Clusters(NamedTuple):
    """The result of k-means.

    Args:
        centroids: (k, D) float32.
        assignment: (N,) int64, the cluster of each vector.
        inertia: the sum of the squared distances of the vectors to their centroids.

    Example:
        >>> clusters = kmeans(torch.tensor([[0.0], [0.2], [5.0], [5.2]]), clusters=2)
        >>> clusters.assignment[0] == clusters.assignment[1], round(clusters.inertia, 2)
        (tensor(True), 0.04)
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float


@torch.no_grad()
def kmeans(x: Tensor, clusters: int, *, spherical: bool = False, iterations: int = 50, seed: int = 0) -> Clusters:
    """Return k-means clusters of vectors (N, D), the same for the same seed.

    It starts from k-means++ on a sample of the vectors and stops when no assignment changes. A cluster that loses all
    its vectors restarts from one of those farthest from their centroids. (faiss's k-means is faster and, since it
    starts from vectors drawn uniformly, ends at a higher inertia.)

    Args:
        x: (N, D), any floating type; used as float32.
        clusters: k, from 1 to N.
        spherical: whether vectors and centroids are scaled to unit length, so that the cosine decides.
        iterations: at most.
        seed: of the first centroids.

    Raises:
        InputError: for a k that does not fit, another shape, and vectors that are not finite.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, k-means++; Dhillon and Modha 2001 for the spherical form.

    Example:
        >>> kmeans(torch.randn(100, 8), clusters=5).centroids.shape
        torch.Size([5, 8])
    """
    x = StoredVectors.of(x).x
    if not 1 <= clusters <= len(x):
        raise InputError(f"clusters must be from 1 to {len(x)}, the number of vectors; got {clusters}.")
    x = F.normalize(x) if spherical else x
    generator = torch.Generator().manual_seed(seed)
    squared = x.square().sum(1)
    centroids = _first_centroids(x, squared, clusters, generator)
    assignment, distance = _assign(x, squared, centroids)
    for _ in range(iterations):
        centroids = _means(x, assignment, distance, clusters)
        centroids = F.normalize(centroids) if spherical else centroids
        before = assignment
        assignment, distance = _assign(x, squared, centroids)
        if torch.equal(assignment, before):
            break
    inertia = sum(
        float((x[rows] - centroids[assignment[rows]]).double().square().sum())
        for rows in slices(len(x), max(1, TILE_PRODUCTS["cpu"] // 4 // x.shape[1]))
    )
    return Clusters(centroids, assignment, inertia)


def _first_centroids(x: Tensor, squared: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose centroids by greedy k-means++: of several drawn by squared distance, the one with the least inertia."""
    if len(x) > START_SAMPLES * clusters:
        chosen = torch.randperm(len(x), generator=generator)[: START_SAMPLES * clusters].to(x.device)
        x, squared = x[chosen], squared[chosen]
    trials = 2 + int(math.log(clusters))
    centroids = x.new_empty(clusters, x.shape[1])
    centroids[0] = x[torch.randint(len(x), (), generator=generator)]
    distance = _distances(x, squared, centroids[:1])[0]
    for number in range(1, clusters):
        total = distance.cumsum(0, dtype=torch.float64)
        drawn = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device) * total[-1]
        candidate = torch.searchsorted(total, drawn, right=True).clamp(max=len(x) - 1)
        shorter = torch.minimum(distance, _distances(x, squared, x[candidate]))
        best = shorter.sum(1).argmin()
        distance, centroids[number] = shorter[best], x[candidate[best]]
    return centroids


def _distances(x: Tensor, squared: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared distances to a small number k of centroids, (k, N)."""
    product = centroids @ x.T
    return (squared + centroids.square().sum(1, keepdim=True) - 2 * product).clamp_(min=0)


def _assign(x: Tensor, squared: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each vector's nearest centroid, the first of equals, and the squared distance to it."""
    assignment, distance = torch.empty_like(squared, dtype=torch.int64), torch.empty_like(squared)
    half = -centroids.square().sum(1) / 2
    kind = "cuda" if x.device.type == "cuda" else "cpu"
    width = min(len(centroids), TILE_COLUMNS[kind])
    for rows in slices(len(x), max(1, TILE_PRODUCTS[kind] // 4 // width)):
        best, best_centroid = x.new_full((len(x[rows]),), -math.inf), assignment[rows]
        for columns in slices(len(centroids), width):
            value, index = torch.addmm(half[columns], x[rows], centroids[columns].T).max(1)
            nearer = value > best
            best = torch.where(nearer, value, best)
            best_centroid.copy_(torch.where(nearer, index + columns.start, best_centroid))
        torch.sub(squared[rows], best, alpha=2, out=distance[rows])
    return assignment, distance


def _means(x: Tensor, assignment: Tensor, distance: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster; an empty one gets a vector that is far from its centroid."""
    count = torch.bincount(assignment, minlength=clusters)
    # Each bag is summed in order: the same bits every time, on a GPU too.
    order = assignment.argsort(stable=True)
    means = F.embedding_bag(order, x, count.cumsum(0) - count, mode="sum") / count.clamp(min=1)[:, None]
    empty = (count == 0).nonzero().squeeze(1)
    if len(empty):
        means[empty] = x[distance.topk(len(empty)).indices]
    return means
