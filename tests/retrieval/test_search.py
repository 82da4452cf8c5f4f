"""Every exact search against plain sorting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.registry import InputError
from contrast.retrieval import Found, build_index, exact_search, merge, search
from tests.retrieval.reference import assert_same_bits, search_by_sorting, use_tiles

SEARCHES = {
    "float32": lambda queries, stored, k, exclude: exact_search(queries, stored, k, exclude=exclude),
    "bfloat16": lambda queries, stored, k, exclude: exact_search(
        queries, stored, k, exclude=exclude, search_dtype=torch.bfloat16
    ),
    "exact": lambda queries, stored, k, exclude: build_index(stored, "exact").search(queries, k, exclude=exclude),
    "Flat": lambda queries, stored, k, exclude: build_index(stored, "Flat").search(queries, k, exclude=exclude),
}


@st.composite
def searches(draw):
    """From one to 150 vectors; random, of integers, nearly equal, repeated or zero; with and without exclusions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, m, d = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 7, 40, 150])), draw(st.sampled_from([1, 3, 17]))
    kind = draw(st.sampled_from(["random", "integers", "nearly equal", "repeated", "zero"]))

    def vectors(count):
        if kind == "integers":  # Products are exact, and many are equal.
            return torch.randint(-1, 2, (count, d), generator=generator).float()
        x = torch.randn(count, d, generator=generator)
        if kind == "nearly equal":  # Closer to each other than float32 products can distinguish.
            return 1 + 1e-7 * x
        if kind == "repeated":
            return x[torch.randint(0, max(1, count // 5), (count,), generator=generator)]
        return x if kind == "random" else x * torch.randint(0, 2, (count, 1), generator=generator)

    ids = draw(st.sampled_from([0, 2, 5, 1000]))  # Of 2, half of all vectors are excluded.
    exclude = [
        (torch.randint(0, most, (q,), generator=generator), torch.randint(0, most, (m,), generator=generator))
        for most in ([ids] if ids else [])
    ]
    if exclude and draw(st.booleans()):
        exclude.append((torch.arange(q), torch.arange(m)))
    return vectors(q), vectors(m), draw(st.integers(0, m)), exclude


@pytest.mark.parametrize("name", SEARCHES)
@given(case=searches())
def test_every_exact_search_finds_what_sorting_finds(name, case):
    queries, stored, k, exclude = case
    assert_same_bits(SEARCHES[name](queries, stored, k, exclude), search_by_sorting(queries, stored, k, exclude))


@given(
    case=searches(),
    columns=st.sampled_from([1, 5, 32, 64]),
    products=st.integers(1, 300),
    float64_columns=st.integers(1, 60),
    cached_numbers=st.integers(1, 200),
)
def test_tiles_change_nothing(case, columns, products, float64_columns, cached_numbers):
    queries, stored, k, exclude = case
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, columns, products, float64_columns, cached_numbers)
        found = exact_search(queries, stored, k, exclude=exclude)
    assert_same_bits(found, search_by_sorting(queries, stored, k, exclude))


@given(case=searches(), shards=st.integers(1, 4))
def test_merged_shards_find_what_one_search_finds(case, shards):
    queries, stored, k, exclude = case
    parts = []
    for first in range(shards):
        own = torch.arange(len(stored))[first::shards]
        of_shard = [(query_id, stored_id[own]) for query_id, stored_id in exclude]
        part = exact_search(queries, stored[own], min(k, len(own)), exclude=of_shard)
        position = own[part.position.clamp(min=0)] if len(own) else part.position
        parts.append(Found(part.similarity, torch.where(part.position < 0, -1, position)))
    assert_same_bits(merge(parts, k), search_by_sorting(queries, stored, k, exclude))


@pytest.mark.parametrize("name", SEARCHES)
def test_many_vectors_in_many_tiles_are_found_as_by_one_sort(name, many, monkeypatch):
    stored, _, exclude, (value, position) = many
    use_tiles(monkeypatch, columns=1024, products=100_000)
    assert_same_bits(SEARCHES[name](stored[:200], stored, 10, exclude), Found(value[:, :10], position[:, :10]))


def test_nearly_all_rows_are_complete_without_the_search_in_float64(many, monkeypatch):
    stored, _, exclude, _ = many
    rows = []
    in_float64 = search._search_in_float64
    monkeypatch.setattr(
        search, "_search_in_float64", lambda queries, *rest: rows.append(len(queries)) or in_float64(queries, *rest)
    )
    exact_search(stored[:200], stored, 10, exclude=exclude)
    assert sum(rows) <= 4
    # Also where most vectors are excluded.
    group = (torch.arange(len(stored)) % 10 > 0).long()
    exact_search(stored[:200], stored, 10, exclude=[*exclude, (group[:200], group)])
    assert sum(rows) <= 8
    exact_search(stored[:5], stored[:1].expand(1000, -1), 10)
    assert rows[-1] == 5


@pytest.mark.parametrize("name", SEARCHES)
def test_nearly_equal_vectors_are_ordered_across_tiles(name, monkeypatch):
    use_tiles(monkeypatch, columns=64, products=200, float64_columns=7, cached_numbers=40)
    generator = torch.Generator().manual_seed(0)
    stored, queries = (1 + 1e-7 * torch.randn(count, 5, generator=generator) for count in (150, 4))
    exclude = [(torch.arange(4) % 3, torch.arange(150) % 3)]
    assert_same_bits(SEARCHES[name](queries, stored, 9, exclude), search_by_sorting(queries, stored, 9, exclude))


def test_merging_pads_what_is_missing():
    found = merge(
        [Found(torch.tensor([[-0.5]]), torch.tensor([[7]])), Found(torch.zeros(1, 0), torch.zeros(1, 0).long())], 3
    )
    assert found.similarity.tolist() == [[-0.5, -math.inf, -math.inf]] and found.position.tolist() == [[7, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["exact", "Flat"])
def test_other_types_are_used_as_float32(dtype, name):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same_bits(build_index(x, name).search(x[:9], 7), search_by_sorting(x[:9].float(), x.float(), 7))


def test_the_matmul_precision_and_autocast_change_nothing():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    expected = exact_search(x[:200], x, 7, search_dtype=torch.float16)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert_same_bits(exact_search(x[:200], x, 7), expected)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_same_bits(exact_search(x[:200], x, 7), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_operands_rounded_as_medium_precision_permits_change_nothing(monkeypatch):
    """As on a device that rounds the operands to bfloat16 at "medium", which not every CPU does."""
    x = 1 + 0.01 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    expected = exact_search(x[:50], x, 7)
    exactly = search._Products._tile
    monkeypatch.setattr(
        search._Products, "_tile", lambda self, *both: exactly(self, *(z.bfloat16().float() for z in both))
    )
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert_same_bits(exact_search(x[:50], x, 7), expected)


def test_a_search_has_no_autograd_history():
    x = torch.randn(9, 3, requires_grad=True)
    assert not exact_search(x, x, 2).similarity.requires_grad
    assert not build_index(x, "Flat").search(x, 2).similarity.requires_grad


X = torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_search(X, X, 6), "k must be from 0 to 5, the number of stored vectors; got 6"),
        (lambda: exact_search(X, X[:, :3], 1), r"same D; got the shapes \(5, 4\) and \(5, 3\)"),
        (lambda: exact_search(X[0], X, 1), r"got the shapes \(4,\)"),
        (lambda: exact_search(X, X[0], 1), r"stored vectors are \(M, D\); got the shape \(4,\)"),
        (lambda: exact_search(X, X * math.nan, 1), "some stored vectors contain NaN or inf"),
        (
            lambda: exact_search(X * 1e30, X, 1),
            "some queries contain NaN or inf, or have a norm whose square overflows",
        ),
        (lambda: exact_search(X, X, 1, exclude=[(torch.arange(4), torch.arange(5))]), r"\(5,\) of the queries"),
        (lambda: exact_search(X.to("meta"), X, 1), "on one device; got meta and cpu"),
    ],
)
def test_wrong_arguments_raise_one_sentence(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
