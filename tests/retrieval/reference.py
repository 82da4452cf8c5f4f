"""Search as Python's sort does it, the same vectors for several tests, and small tiles."""

import ctypes
import math

import torch
import torch.nn.functional as F

from contrast.retrieval import Found, search


def search_by_sorting(queries, stored, k, exclude=()):
    """Return every product by Python's exact sum, rounded to float32, in the order of Python's sort."""
    rows = []
    for number, query in enumerate(queries.tolist()):
        found = []
        for place, other in enumerate(stored.tolist()):
            if any(query_id[number] == stored_id[place] for query_id, stored_id in exclude):
                continue
            product = math.fsum(a * b for a, b in zip(query, other, strict=True))
            found.append((-ctypes.c_float(product).value, place))
        rows.append(sorted(found)[:k] + [(math.inf, -1)] * (k - len(found)))
    value = [[-negative for negative, _ in row] for row in rows]
    place = [[position for _, position in row] for row in rows]
    return Found(torch.tensor(value).view(len(rows), k), torch.tensor(place, dtype=torch.int64).view(len(rows), k))


def assert_same_bits(found, expected):
    assert found.position.tolist() == expected.position.tolist()
    assert found.similarity.dtype == torch.float32
    assert torch.equal(found.similarity, expected.similarity)


def clustered(count=8000, clusters=100, dims=32, seed=0, noise=0.7):
    """Return unit vectors in clusters, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(clusters, dims, generator=generator)
    cluster = torch.randint(0, clusters, (count,), generator=generator)
    return F.normalize(centre[cluster] + noise * torch.randn(count, dims, generator=generator)), cluster


def use_tiles(monkeypatch, columns, products, float64_columns=4096, cached_numbers=2**19):
    """Compute in tiles of these sizes."""
    monkeypatch.setitem(search.TILE_COLUMNS, "cpu", columns)
    monkeypatch.setitem(search.TILE_PRODUCTS, "cpu", products)
    monkeypatch.setattr(search, "FLOAT64_COLUMNS", float64_columns)
    monkeypatch.setattr(search, "CACHED_NUMBERS", cached_numbers)
