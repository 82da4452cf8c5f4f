"""k-means against scikit-learn and against its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.registry import InputError
from contrast.retrieval.kmeans import _means, kmeans
from tests.retrieval.reference import clustered, use_tiles


@pytest.mark.parametrize(("count", "clusters", "spherical"), [(3000, 40, False), (3000, 300, False), (3000, 40, True)])
def test_k_means_has_the_inertia_of_scikit_learn(count, clusters, spherical):
    from sklearn.cluster import KMeans

    # The clusters are well separated: first centroids that miss some of them cost much.
    x = clustered(count, 40, noise=0.3)[0]
    theirs = [KMeans(clusters, n_init=1, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3)]
    ours = [kmeans(x, clusters, spherical=spherical, seed=seed).inertia for seed in range(3)]
    # Centroids on the sphere have a slightly larger inertia where the clusters are wide.
    assert sum(ours) <= (1.05 if spherical else 1.03) * sum(theirs)


@given(
    count=st.integers(1, 60),
    clusters=st.integers(1, 60),
    spherical=st.booleans(),
    integers=st.booleans(),
    seed=st.integers(0, 9),
)
def test_k_means_ends_where_no_assignment_changes(count, clusters, spherical, integers, seed):
    """Each vector is with its nearest centroid, and each centroid is the mean of its vectors, in plain loops."""
    clusters = min(clusters, count)
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    x = x.round() if integers else x
    found = kmeans(x, clusters, spherical=spherical, seed=seed, iterations=200)
    x = F.normalize(x) if spherical else x
    assert found.centroids.shape == (clusters, 3) and found.assignment.shape == (count,)
    distance = torch.tensor([[float((a - b).square().sum()) for b in found.centroids] for a in x])
    own = distance[range(count), found.assignment]
    torch.testing.assert_close(own, distance.min(1).values, rtol=1e-4, atol=1e-5)
    assert found.inertia == pytest.approx(float(own.sum()), rel=1e-4, abs=1e-6)
    for number, centroid in enumerate(found.centroids):
        members = x[found.assignment == number]
        if len(members):
            mean = F.normalize(members.mean(0), dim=0) if spherical else members.mean(0)
            torch.testing.assert_close(centroid, mean, rtol=1e-3, atol=1e-4)
    if len(x.unique(dim=0)) == count and not spherical:
        assert len(found.assignment.unique()) == clusters


def test_k_means_is_the_same_for_the_same_seed_and_in_any_tiles(monkeypatch):
    x, _ = clustered(2000, 20)
    first, again = kmeans(x, 30, seed=3), kmeans(x, 30, seed=3)
    assert torch.equal(first.centroids, again.centroids) and torch.equal(first.assignment, again.assignment)
    assert not torch.equal(first.centroids, kmeans(x, 30, seed=4).centroids)
    use_tiles(monkeypatch, columns=7, products=280)
    tiled = kmeans(x, 30, seed=3)
    assert torch.equal(first.assignment, tiled.assignment)
    torch.testing.assert_close(first.centroids, tiled.centroids)


def test_a_cluster_without_vectors_restarts_from_the_farthest():
    x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    assignment, distance = torch.tensor([0, 0, 2, 2]), torch.tensor([0.25, 0.25, 3.0, 4.0])
    assert _means(x, assignment, distance, 4).tolist() == [[0.5], [9.0], [7.0], [5.0]]


def test_k_means_of_equal_vectors_and_of_zeros_ends():
    assert kmeans(torch.ones(50, 3), 4).inertia == pytest.approx(0, abs=1e-6)
    assert kmeans(torch.zeros(50, 3), 4, spherical=True).inertia == 0
    found = kmeans(torch.randn(7, 3), 7)
    assert found.inertia == pytest.approx(0, abs=1e-5) and len(found.assignment.unique()) == 7


def test_more_clusters_than_vectors_are_refused():
    with pytest.raises(InputError, match="clusters must be from 1 to 5, the number of vectors; got 6"):
        kmeans(torch.randn(5, 4), 6)
