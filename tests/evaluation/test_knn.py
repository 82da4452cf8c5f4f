import math

import pytest
import torch

from contrast.evaluation.knn import fit_neighbours


def test_votes_are_weighted_by_the_exponential_of_the_similarity():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [-3.0, 0.0], [0.6, 0.8]])
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    found = fit_neighbours(features, target, 2, neighbours=2, temperature=0.5)
    # The query (1, 0): similarity 1 with item 0 (class 0), 0.6 with item 5 (class 1).
    probability = found.probabilities(torch.tensor([[10.0, 0.0]]))[0]
    votes = [math.exp(1 / 0.5), math.exp(0.6 / 0.5)]
    assert probability.tolist() == pytest.approx([vote / sum(votes) for vote in votes], abs=1e-6)


def test_k_is_at_most_the_mean_number_of_labels_per_class():
    features = torch.randn(12, 3)
    assert fit_neighbours(features, torch.arange(12) % 3, 3, neighbours=20).neighbours == 4
    assert fit_neighbours(features, torch.arange(12) % 3, 3, neighbours=2).neighbours == 2
    assert fit_neighbours(features[:2], torch.arange(2), 2, neighbours=20).neighbours == 1


def test_a_zero_vector_has_no_preferred_neighbours():
    found = fit_neighbours(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 2, neighbours=20)
    assert found.probabilities(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).argmax(1).tolist() == [0, 1]


def test_of_equally_similar_items_the_first_of_the_train_split_count():
    # All items but the last are the same: whichever two of the first ten counted, the vote would be another.
    features = torch.tensor([[1.0, 1.0]] * 10 + [[1.0, -1.0]])
    found = fit_neighbours(features, torch.tensor([1, 0, *[1] * 9]), 2, neighbours=2)
    assert found.neighbours == 2
    assert found.probabilities(torch.tensor([[3.0, 3.0]]))[0].tolist() == pytest.approx([0.5, 0.5])
