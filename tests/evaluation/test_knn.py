import math

import pytest
import torch

from contrast.evaluation import knn
from contrast.evaluation.knn import fit_neighbours, nearest_items


def sorted_by_hand(queries, stored, k):
    """Every product in plain loops; equal ones in the order of the stored vectors."""
    rows = []
    for query in queries.tolist():
        products = [sum(a * b for a, b in zip(query, other, strict=True)) for other in stored.tolist()]
        rows.append(sorted(range(len(products)), key=lambda j: (-products[j], j))[:k])
    return rows


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_nearest_items_are_exact_and_ordered_also_among_ties(block, monkeypatch):
    monkeypatch.setattr(knn, "STORED", block)
    monkeypatch.setattr(knn, "QUERIES", 4)
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: the products are exact, and many are equal.
    stored = torch.randint(-1, 2, (40, 3), generator=generator).float()
    queries = torch.randint(-1, 2, (11, 3), generator=generator).float()
    product, index = nearest_items(queries, stored, k=6)
    assert index.tolist() == sorted_by_hand(queries, stored, 6)
    torch.testing.assert_close(product, (queries @ stored.T).gather(1, index))


def test_votes_are_weighted_by_the_exponential_of_the_similarity():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [-3.0, 0.0], [0.6, 0.8]])
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    found = fit_neighbours(features, target, 2, neighbours=2, temperature=0.5)
    # The query (1, 0): similarity 1 with item 0 (class 0), 0.6 with item 5 (class 1).
    probability = found.probabilities(torch.tensor([[10.0, 0.0]]))[0]
    votes = [math.exp(1 / 0.5), math.exp(0.6 / 0.5)]
    assert probability.tolist() == pytest.approx([vote / sum(votes) for vote in votes], abs=1e-6)


def test_k_is_at_most_the_mean_number_of_labels_a_class():
    features = torch.randn(12, 3)
    assert fit_neighbours(features, torch.arange(12) % 3, 3, neighbours=20).neighbours == 4
    assert fit_neighbours(features, torch.arange(12) % 3, 3, neighbours=2).neighbours == 2
    assert fit_neighbours(features[:2], torch.arange(2), 2, neighbours=20).neighbours == 1


def test_zero_vectors_are_neighbours_of_nobody_in_particular():
    found = fit_neighbours(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 2, neighbours=20)
    assert found.probabilities(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).argmax(1).tolist() == [0, 1]
