"""Approximate indices by their recall, and the choice of an index by name."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from contrast.core.registry import InputError
from contrast.retrieval import auto_index, build_index, exact_search, indices, least_vectors
from tests.retrieval.reference import assert_same_bits, clustered, search_by_sorting


def recall(found, expected):
    return (expected[:, :10, None] == found.position[:, None]).any(2).float().mean().item()


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("IVF64,Flat", 0.99),
        ("HNSW32", 0.97),
        ("IVF32,PQ8x4", 0.85),
        ("PCA24,IVF32,SQ8", 0.8),
        ("SQ8", 0.99),
        ("HNSW16,Flat", 0.95),
    ],
)
def test_an_approximate_index_finds_most_and_returns_exact_similarities(name, floor, many):
    stored, _, exclude, (value, position) = many
    found = build_index(stored, name).search(stored[:200], 10, exclude=exclude)
    assert recall(found, position) >= floor
    hit = found.position == position[:, :10]
    assert torch.equal(found.similarity[hit], value[:, :10][hit])
    assert (found.position != torch.arange(200)[:, None]).all()
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_more_probes_find_more(many):
    stored, _, exclude, (_, position) = many
    index = build_index(stored, "IVF256,Flat", probes=1)
    with_one = recall(index.search(stored[:200], 10, exclude=exclude), position)
    index.probes = 256
    assert with_one < 0.95 and recall(index.search(stored[:200], 10, exclude=exclude), position) == 1


@pytest.mark.parametrize("name", ["IVF64,Flat", "HNSW32", "Flat"])
def test_an_index_finds_vectors_beyond_an_excluded_large_group(name, many):
    """The nearest eighty of a vector are of its own cluster, all of which is excluded."""
    stored, cluster, exclude, _ = many
    exclude = [*exclude, (cluster[:200], cluster)]
    found = build_index(stored, name).search(stored[:200], 10, exclude=exclude)
    exact = exact_search(stored[:200], stored, 10, exclude=exclude)
    assert (found.position >= 0).all()
    assert (cluster[found.position] != cluster[:200, None]).all()
    assert recall(found, exact.position) >= 0.9


def test_an_index_finds_fewer_than_k_only_where_the_rest_is_excluded():
    stored, _ = clustered(2000, 5)
    group = (torch.arange(2000) >= 3).long()
    for name in ("IVF16,Flat", "HNSW32", "Flat", "exact"):
        found = build_index(stored, name).search(stored[3:6], 5, exclude=[(group[3:6], group)])
        assert (found.position[:, :3].sort(dim=1).values == torch.arange(3)).all(), name
        assert (found.position[:, 3:] == -1).all() and (found.similarity[:, 3:] == -math.inf).all()


def test_a_trained_index_is_the_same_for_the_same_seed(many):
    stored, *_ = many

    def found(seed):
        return build_index(stored, "IVF64,SQ8", probes=1, seed=seed).search(stored[:200], 10)

    assert_same_bits(found(0), found(0))
    assert not torch.equal(found(0).position, found(1).position)


@pytest.mark.parametrize("name", ["exact", "Flat", "IVF64,Flat", "HNSW32"])
def test_a_refilled_index_contains_the_new_vectors_only(name):
    stored, _ = clustered(4000, 50)
    index = build_index(stored, name)
    moved = F.normalize(stored.flip(0) + 0.05)[:3000]
    index.refill(moved)
    found = index.search(moved[:50], 1)
    assert (found.position.squeeze(1) == torch.arange(50)).float().mean() >= 0.96
    with pytest.raises(InputError, match="from 0 to 3000"):
        index.search(moved[:50], 3001)


X = torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_index(X).search(X, -1), "from 0 to 5, the number of stored vectors; got -1"),
        (lambda: build_index(X * math.inf, "Flat"), "some stored vectors contain NaN or inf"),
        (lambda: build_index(X, "Flatt"), "faiss does not take 'Flatt'.*could not parse.*'IVF256,Flat'"),
        (lambda: build_index(X, "PQ3"), "multiple of the number of subquantizers"),
        (lambda: build_index(X, "IVF4096,Flat"), "of 5 vectors: Number of training points.*4096.*Take fewer lists"),
        (lambda: least_vectors("Foo", 32), "faiss does not take 'Foo'"),
    ],
)
def test_wrong_arguments_raise_one_sentence(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and "faiss/" not in str(caught.value)


def test_the_least_number_of_vectors_is_known_before_building():
    assert [least_vectors(name, 32) for name in ("auto", "exact", "Flat", "HNSW32")] == [1] * 4
    assert least_vectors("IVF512,Flat", 32) == 512
    assert least_vectors("IVF16,PQ8", 32) == 256


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    indices._faiss.cache_clear()
    yield
    indices._faiss.cache_clear()


@pytest.mark.usefixtures("without_faiss")
def test_without_faiss_search_is_exact_and_other_indices_name_the_extra_to_install():
    x, _ = clustered(300, 10)
    for name in ("auto", "exact", "Flat"):
        assert_same_bits(build_index(x, name).search(x[:5], 4), search_by_sorting(x[:5], x, 4))
    assert auto_index(10**7) == "exact"
    with pytest.raises(InputError, match=r"'HNSW32' needs faiss.*pip install \"contrast-learning\[faiss-cpu\]\""):
        build_index(x, "HNSW32")


def test_auto_is_exact_for_small_sets_and_inverted_lists_for_large_ones(monkeypatch):
    x, _ = clustered(3000, 30)
    assert_same_bits(build_index(x).search(x[:5], 4), build_index(x, "exact").search(x[:5], 4))
    assert auto_index(indices.AUTO_EXACT["cpu"]) == auto_index(indices.AUTO_EXACT["cuda"], "cuda") == "exact"
    assert auto_index(100_000) == "IVF1024,Flat" and auto_index(1_000_000) == "IVF4096,Flat"
    monkeypatch.setitem(indices.AUTO_EXACT, "cpu", 2999)
    assert build_index(x).name == auto_index(3000) == "IVF256,Flat"
