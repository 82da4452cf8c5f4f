"""Search against plain sorting, on every road; approximate indices by their recall; k-means against scikit-learn."""

import ctypes
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from contrast import retrieval
from contrast.core.registry import InputError
from contrast.retrieval import Found, auto_index, build_index, kmeans, merge, nearest


def sorted_by_hand(queries, stored, k, exclude=()):
    """Every product by Python's exact sum, rounded to float32; then Python's sort."""
    rows = []
    for number, query in enumerate(queries.tolist()):
        found = []
        for place, other in enumerate(stored.tolist()):
            if any(of_query[number] == of_stored[place] for of_query, of_stored in exclude):
                continue
            product = math.fsum(a * b for a, b in zip(query, other, strict=True))
            found.append((-ctypes.c_float(product).value, place))
        rows.append(sorted(found)[:k] + [(math.inf, -1)] * (k - len(found)))
    value = [[-one for one, _ in row] for row in rows]
    place = [[two for _, two in row] for row in rows]
    return Found(torch.tensor(value).view(len(rows), k), torch.tensor(place, dtype=torch.int64).view(len(rows), k))


def assert_same(found, right):
    """The same bits."""
    assert found.position.tolist() == right.position.tolist()
    assert found.similarity.dtype == torch.float32
    assert torch.equal(found.similarity, right.similarity)


def tiles(monkeypatch, columns, tile, careful=4096, piece=2**19):
    monkeypatch.setitem(retrieval.COLUMNS, "cpu", columns)
    monkeypatch.setitem(retrieval.TILE, "cpu", tile)
    monkeypatch.setattr(retrieval, "CAREFUL", careful)
    monkeypatch.setattr(retrieval, "PIECE", piece)


ROADS = {
    "tiles": lambda queries, stored, k, exclude: nearest(queries, stored, k, exclude=exclude),
    "coarse": lambda queries, stored, k, exclude: nearest(
        queries, stored, k, exclude=exclude, search_dtype=torch.bfloat16
    ),
    "exact": lambda queries, stored, k, exclude: build_index(stored, "exact").search(queries, k, exclude=exclude),
    "Flat": lambda queries, stored, k, exclude: build_index(stored, "Flat").search(queries, k, exclude=exclude),
}


@st.composite
def searches(draw):
    """Few vectors or some hundreds; random, whole, nearly equal, copied or zero; exclude or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, m, d = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 7, 40, 150])), draw(st.sampled_from([1, 3, 17]))
    kind = draw(st.sampled_from(["random", "whole", "nearly equal", "copies", "zero"]))

    def vectors(count):
        if kind == "whole":  # Products are exact, and many are equal.
            return torch.randint(-1, 2, (count, d), generator=generator).float()
        x = torch.randn(count, d, generator=generator)
        if kind == "nearly equal":  # Nearer to each other than float32 products tell.
            return 1 + 1e-7 * x
        if kind == "copies":
            return x[torch.randint(0, max(1, count // 5), (count,), generator=generator)]
        return x if kind == "random" else x * torch.randint(0, 2, (count, 1), generator=generator)

    numbers = draw(st.sampled_from([0, 2, 5, 1000]))  # Of 2, half of all are no exclude.
    exclude = [
        (torch.randint(0, most, (q,), generator=generator), torch.randint(0, most, (m,), generator=generator))
        for most in ([numbers] if numbers else [])
    ]
    if exclude and draw(st.booleans()):
        exclude.append((torch.arange(q), torch.arange(m)))
    return vectors(q), vectors(m), draw(st.integers(0, m)), exclude


@pytest.mark.parametrize("road", ROADS)
@given(search=searches())
def test_every_exact_road_answers_as_sorting_does(road, search):
    queries, stored, k, exclude = search
    assert_same(ROADS[road](queries, stored, k, exclude), sorted_by_hand(queries, stored, k, exclude))


@given(
    search=searches(),
    columns=st.sampled_from([1, 5, 32, 64]),
    tile=st.integers(1, 300),
    careful=st.integers(1, 60),
    piece=st.integers(1, 200),
)
def test_tiles_change_nothing(search, columns, tile, careful, piece):
    queries, stored, k, exclude = search
    with pytest.MonkeyPatch.context() as patch:
        tiles(patch, columns, tile, careful, piece)
        assert_same(nearest(queries, stored, k, exclude=exclude), sorted_by_hand(queries, stored, k, exclude))


@given(search=searches(), shards=st.integers(1, 4))
def test_shards_merged_are_the_whole(search, shards):
    queries, stored, k, exclude = search
    parts = []
    for first in range(shards):
        own = torch.arange(len(stored))[first::shards]
        some = [(of_query, of_stored[own]) for of_query, of_stored in exclude]
        part = nearest(queries, stored[own], min(k, len(own)), exclude=some)
        position = own[part.position.clamp(min=0)] if len(own) else part.position
        parts.append(Found(part.similarity, torch.where(part.position < 0, -1, position)))
    assert_same(merge(parts, k), sorted_by_hand(queries, stored, k, exclude))


def clustered(count=8000, clusters=100, dims=32, seed=0, noise=0.7):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(clusters, dims, generator=generator)
    own = torch.randint(0, clusters, (count,), generator=generator)
    return F.normalize(centre[own] + noise * torch.randn(count, dims, generator=generator)), own


@pytest.fixture(scope="module")
def fixed():
    """8,000 vectors, 200 of them as queries, and their 10 nearest, themselves left out, by one big sort."""
    stored, cluster = clustered()
    own = torch.arange(200)
    product = (stored[own].double() @ stored.double().T).float()
    product[own, own] = -math.inf
    return stored, cluster, [(own, torch.arange(len(stored)))], product.sort(dim=1, descending=True, stable=True)


def recall(found, right):
    return (right[:, :10, None] == found.position[:, None]).any(2).float().mean().item()


@pytest.mark.parametrize("road", ["tiles", "coarse", "exact", "Flat"])
def test_many_vectors_in_many_tiles_are_found_as_by_one_sort(road, fixed, monkeypatch):
    stored, _, exclude, (value, position) = fixed
    tiles(monkeypatch, columns=1024, tile=100_000)
    assert_same(ROADS[road](stored[:200], stored, 10, exclude), Found(value[:, :10], position[:, :10]))


def test_the_certificate_spares_nearly_every_row_the_careful_search(fixed, monkeypatch):
    stored, _, exclude, _ = fixed
    rows = []
    careful = retrieval._careful
    monkeypatch.setattr(
        retrieval, "_careful", lambda queries, *rest: rows.append(len(queries)) or careful(queries, *rest)
    )
    nearest(stored[:200], stored, 10, exclude=exclude)
    assert sum(rows) <= 4
    # Also where most vectors are no exclude.
    group = (torch.arange(len(stored)) % 10 > 0).long()
    nearest(stored[:200], stored, 10, exclude=[*exclude, (group[:200], group)])
    assert sum(rows) <= 8
    nearest(stored[:5], stored[:1].expand(1000, -1), 10)
    assert rows[-1] == 5


@pytest.mark.parametrize("road", ROADS)
def test_nearly_equal_vectors_are_told_apart_in_whatever_tile_they_lie(road, monkeypatch):
    tiles(monkeypatch, columns=64, tile=200, careful=7, piece=40)
    generator = torch.Generator().manual_seed(0)
    stored, queries = (1 + 1e-7 * torch.randn(count, 5, generator=generator) for count in (150, 4))
    exclude = [(torch.arange(4) % 3, torch.arange(150) % 3)]
    assert_same(ROADS[road](queries, stored, 9, exclude), sorted_by_hand(queries, stored, 9, exclude))


def test_merging_fills_up_what_is_lacking():
    found = merge(
        [Found(torch.tensor([[-0.5]]), torch.tensor([[7]])), Found(torch.zeros(1, 0), torch.zeros(1, 0).long())], 3
    )
    assert found.similarity.tolist() == [[-0.5, -math.inf, -math.inf]] and found.position.tolist() == [[7, -1, -1]]


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
def test_an_approximate_index_finds_most_and_says_true_similarities(name, floor, fixed):
    stored, _, exclude, (value, right) = fixed
    found = build_index(stored, name).search(stored[:200], 10, exclude=exclude)
    assert recall(found, right) >= floor
    hit = found.position == right[:, :10]
    assert torch.equal(found.similarity[hit], value[:, :10][hit])
    assert (found.position != torch.arange(200)[:, None]).all()
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_more_probes_find_more(fixed):
    stored, _, exclude, (_, right) = fixed
    index = build_index(stored, "IVF256,Flat", probes=1)
    one = recall(index.search(stored[:200], 10, exclude=exclude), right)
    index.probes = 256
    assert one < 0.95 and recall(index.search(stored[:200], 10, exclude=exclude), right) == 1


@pytest.mark.parametrize("name", ["IVF64,Flat", "HNSW32", "Flat"])
def test_an_index_finds_strangers_of_large_groups(name, fixed):
    """The nearest eighty of a vector are of its own cluster, of which nothing may come."""
    stored, cluster, exclude, _ = fixed
    exclude = [*exclude, (cluster[:200], cluster)]
    found = build_index(stored, name).search(stored[:200], 10, exclude=exclude)
    exact = nearest(stored[:200], stored, 10, exclude=exclude)
    assert (found.position >= 0).all()
    assert (cluster[found.position] != cluster[:200, None]).all()
    assert recall(found, exact.position) >= 0.9


def test_an_index_gives_fewer_only_where_there_are_no_more_strangers():
    stored, _ = clustered(2000, 5)
    group = (torch.arange(2000) >= 3).long()
    for name in ("IVF16,Flat", "HNSW32", "Flat", "exact"):
        found = build_index(stored, name).search(stored[3:6], 5, exclude=[(group[3:6], group)])
        assert (found.position[:, :3].sort(dim=1).values == torch.arange(3)).all(), name
        assert (found.position[:, 3:] == -1).all() and (found.similarity[:, 3:] == -math.inf).all()


def test_an_index_that_trains_is_the_same_for_the_same_seed(fixed):
    stored, *_ = fixed

    def answer(seed):
        return build_index(stored, "IVF64,SQ8", probes=1, seed=seed).search(stored[:200], 10)

    assert_same(answer(0), answer(0))
    assert not torch.equal(answer(0).position, answer(1).position)


@pytest.mark.parametrize("name", ["exact", "Flat", "IVF64,Flat", "HNSW32"])
def test_a_refilled_index_knows_the_new_vectors_alone(name):
    stored, _ = clustered(4000, 50)
    index = build_index(stored, name)
    moved = F.normalize(stored.flip(0) + 0.05)[:3000]
    index.refill(moved)
    found = index.search(moved[:50], 1)
    assert (found.position.squeeze(1) == torch.arange(50)).float().mean() >= 0.96
    with pytest.raises(InputError, match="3000 vectors are stored"):
        index.search(moved[:50], 3001)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["exact", "Flat"])
def test_other_types_are_used_as_float32(dtype, name):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(build_index(x, name).search(x[:9], 7), sorted_by_hand(x[:9].float(), x.float(), 7))


def test_coarse_products_of_the_users_choice_change_nothing():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    right = nearest(x[:200], x, 7, search_dtype=torch.float16)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert_same(nearest(x[:200], x, 7), right)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_same(nearest(x[:200], x, 7), right)
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_that_are_as_coarse_as_was_allowed_change_nothing(monkeypatch):
    """A device that rounds the operands to bfloat16 where "medium" lets it, as not every CPU does."""
    x = 1 + 0.01 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    right = nearest(x[:50], x, 7)
    exactly = retrieval._Products._tile
    monkeypatch.setattr(
        retrieval._Products, "_tile", lambda self, *both: exactly(self, *(z.bfloat16().float() for z in both))
    )
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert_same(nearest(x[:50], x, 7), right)


def test_a_search_takes_no_part_in_autograd():
    x = torch.randn(9, 3, requires_grad=True)
    assert not nearest(x, x, 2).similarity.requires_grad
    assert not build_index(x, "Flat").search(x, 2).similarity.requires_grad


# -------------------------------------------------------------------------------------------------------- what is said


def test_wrong_requests_are_answered_in_a_sentence():
    x = torch.randn(5, 4)
    for wrong, said in {
        lambda: nearest(x, x, 6): "6 neighbours of each query are asked for, and 5 vectors are stored; ask for 0 to 5",
        lambda: build_index(x).search(x, -1): "-1 neighbours",
        lambda: nearest(x, x[:, :3], 1): r"same D; got the shapes \(5, 4\) and \(5, 3\)",
        lambda: nearest(x[0], x, 1): r"got the shapes \(4,\)",
        lambda: nearest(x, x[0], 1): r"stored vectors are \(M, D\); got the shape \(4,\)",
        lambda: nearest(x, x * math.nan, 1): "some stored vectors are NaN",
        lambda: build_index(x * math.inf, "Flat"): "some stored vectors are NaN, infinite",
        lambda: nearest(x * 1e30, x, 1): "some queries are NaN, infinite or too long",
        lambda: nearest(x, x, 1, exclude=[(torch.arange(4), torch.arange(5))]): r"\(5,\) of the queries",
        lambda: nearest(x.to("meta"), x, 1): "on one device; got meta and cpu",
        lambda: build_index(x, "Flatt"): "faiss does not take 'Flatt'.*could not parse.*'IVF256,Flat'",
        lambda: build_index(x, "PQ3"): "multiple of the number of subquantizers",
        lambda: build_index(x, "IVF4096,Flat"): "of 5 vectors: Number of training points.*4096.*Take fewer lists",
        lambda: kmeans(x, 6): "6 clusters are asked for, of 5 vectors; ask for 1 to 5",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            wrong()
        assert "\n" not in str(caught.value) and "faiss/" not in str(caught.value)


def test_the_least_an_index_needs_is_known_beforehand():
    assert [retrieval.least_vectors(name, 32) for name in ("auto", "exact", "Flat", "HNSW32")] == [1] * 4
    assert retrieval.least_vectors("IVF512,Flat", 32) == 512
    assert retrieval.least_vectors("IVF16,PQ8", 32) == 256
    with pytest.raises(InputError, match="faiss does not take 'Foo'"):
        retrieval.least_vectors("Foo", 32)


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    retrieval._faiss.cache_clear()
    yield
    retrieval._faiss.cache_clear()


@pytest.mark.usefixtures("without_faiss")
def test_without_faiss_search_is_exact_and_other_indices_say_how_to_get_it():
    x, _ = clustered(300, 10)
    for name in ("auto", "exact", "Flat"):
        assert_same(build_index(x, name).search(x[:5], 4), sorted_by_hand(x[:5], x, 4))
    assert auto_index(10**7) == "exact"
    with pytest.raises(InputError, match=r"'HNSW32' needs faiss.*pip install \"contrast-learning\[faiss-cpu\]\""):
        build_index(x, "HNSW32")


def test_auto_is_exact_for_few_vectors_and_lists_for_many(monkeypatch):
    x, _ = clustered(3000, 30)
    assert_same(build_index(x).search(x[:5], 4), build_index(x, "exact").search(x[:5], 4))
    assert auto_index(retrieval.AUTO["cpu"]) == auto_index(retrieval.AUTO["cuda"], "cuda") == "exact"
    assert auto_index(100_000) == "IVF1024,Flat" and auto_index(1_000_000) == "IVF4096,Flat"
    monkeypatch.setitem(retrieval.AUTO, "cpu", 2999)
    assert build_index(x).name == auto_index(3000) == "IVF256,Flat"


# -------------------------------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize(("count", "clusters", "spherical"), [(3000, 40, False), (3000, 300, False), (3000, 40, True)])
def test_k_means_is_as_good_as_scikit_learns(count, clusters, spherical):
    from sklearn.cluster import KMeans

    # The clusters lie apart: a start that misses some costs much.
    x = clustered(count, 40, noise=0.3)[0]
    theirs = [KMeans(clusters, n_init=1, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3)]
    ours = [kmeans(x, clusters, spherical=spherical, seed=seed).inertia for seed in range(3)]
    # Spherical centroids lie on the sphere, which costs a little where the clusters are wide.
    assert sum(ours) <= (1.05 if spherical else 1.03) * sum(theirs)


@given(
    count=st.integers(1, 60),
    clusters=st.integers(1, 60),
    spherical=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 9),
)
def test_k_means_ends_where_nothing_moves(count, clusters, spherical, whole, seed):
    """Each vector is with its nearest centroid, and each centroid is the mean of its vectors, in plain loops."""
    clusters = min(clusters, count)
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    x = x.round() if whole else x
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
    tiles(monkeypatch, columns=7, tile=280)
    small = kmeans(x, 30, seed=3)
    assert torch.equal(first.assignment, small.assignment)
    torch.testing.assert_close(first.centroids, small.centroids)


def test_a_cluster_without_vectors_starts_anew_from_the_farthest():
    x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    assignment, distance = torch.tensor([0, 0, 2, 2]), torch.tensor([0.25, 0.25, 3.0, 4.0])
    assert retrieval._means(x, assignment, distance, 4).tolist() == [[0.5], [9.0], [7.0], [5.0]]


def test_k_means_of_equal_vectors_and_of_zeros_ends():
    assert kmeans(torch.ones(50, 3), 4).inertia == pytest.approx(0, abs=1e-6)
    assert kmeans(torch.zeros(50, 3), 4, spherical=True).inertia == 0
    found = kmeans(torch.randn(7, 3), 7)
    assert found.inertia == pytest.approx(0, abs=1e-5) and len(found.assignment.unique()) == 7
