"""Exact nearest-neighbour search by inner product, a tile of products at a time, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.registry import InputError

TILE_COLUMNS = {"cpu": 16_384, "cuda": 65_536}
"""Stored vectors per tile, by device."""
TILE_PRODUCTS = {"cpu": 2**23, "cuda": 2**27}
"""Products per tile, by device."""
BLOCK_SIZE = 32
"""Products per block on a CPU; a block whose maximum is too small is skipped."""
MAX_UNMASKED = 64
"""Up to this many excluded vectors per query are removed after the search, more are masked before it."""
FLOAT64_COLUMNS = 4096
"""Stored vectors per tile of the search in float64."""
CACHED_NUMBERS = 2**19
"""Numbers processed at a time where similarities are computed again, so that they stay in the processor's cache."""

Exclude = Sequence[tuple[Tensor, Tensor]]
"""Pairs of identities (query ids (Q,), stored ids (M,)), int64: a stored vector with an equal id is left out."""


class Found(NamedTuple):
    """The result of a search, nearest first.

    Args:
        similarity: (Q, k) float32, inner products; -inf where fewer than k vectors were found.
        position: (Q, k) int64, positions of the stored vectors; -1 where fewer than k were found.

    Example:
        >>> found = exact_search(torch.eye(3), torch.eye(3), k=1)
        >>> found.similarity.squeeze(1), found.position.squeeze(1)
        (tensor([1., 1., 1.]), tensor([0, 1, 2]))
    """

    similarity: Tensor
    position: Tensor


@torch.no_grad()
def exact_search(
    queries: Tensor, stored: Tensor, k: int, *, exclude: Exclude = (), search_dtype: torch.dtype | None = None
) -> Found:
    r"""Return the k stored vectors with the largest inner products, exactly and without the (Q, M) matrix.

    Products are computed in float32, a tile at a time, and somewhat more than k of each query are fetched. Their
    similarity is computed again in float64, in a fixed order of summation, and rounded to float32; by it they are
    sorted, equal ones by position. No vector that was not fetched can be among the k nearest where

    .. math:: s_k > p_{last} + \varepsilon

    with p_last the smallest product fetched and epsilon the bound of its rounding error. Rows for which this is
    not true, those of many nearly equal vectors, are searched in float64. So the result does not depend on tiles,
    device or search_dtype, and equals that of the index "Flat".

    Args:
        queries: (Q, D), any floating type; used as float32.
        stored: (M, D), on the same device.
        k: from 0 to M.
        exclude: pairs of identities (query ids (Q,), stored ids (M,)), int64: a stored vector whose id equals the
            query's in any pair is left out before the k nearest are chosen (own sample, own group).
        search_dtype: bfloat16 or float16 to fetch candidates by coarser products, which is faster on some GPUs.

    Raises:
        InputError: for shapes, devices or a k that do not fit, and for vectors that are not finite.

    Example:
        >>> index = torch.arange(3)
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> exact_search(points, points, k=1, exclude=[(index, index)]).position.squeeze(1)
        tensor([1, 0, 1])
    """
    vectors = StoredVectors.of(stored)
    queries = checked_queries(queries, vectors, k, exclude)
    if queries.device.type == "mps":  # which has no float64
        on_host = [(query_id.cpu(), stored_id.cpu()) for query_id, stored_id in exclude]
        found = exact_search(queries.cpu(), stored.cpu(), k, exclude=on_host, search_dtype=search_dtype)
        return Found(*(part.to(queries.device) for part in found))
    if not k or not len(queries):
        return nothing_found(queries, k)
    with torch.autocast(queries.device.type, enabled=False):
        products = _Products(vectors, search_dtype)
        most = most_excluded(exclude)
        masked: Exclude = exclude if most > MAX_UNMASKED else ()
        count = min(products.fetch_count(k) + (0 if masked else most), len(stored))
        parts, complete = [], []
        for rows in slices(len(queries), products.rows):
            batch = queries[rows]
            product, position = products.largest(batch, count, exclude_rows(masked, rows))
            part = ranked(batch, vectors, position, k, exclude_rows(exclude, rows))
            parts.append(part)
            complete.append(is_complete(part, product, products.error(batch), count >= len(stored)))
        return completed(concatenate_found(parts), torch.cat(complete), queries, vectors, k, exclude)


def merge(parts: Sequence[Found], k: int) -> Found:
    """Return the k nearest of several searches with the same queries.

    Args:
        parts: one per shard, with positions that count over all shards; their widths may differ and may be 0.
        k: how many to return per query.

    Example:
        >>> shards = [Found(torch.tensor([[s]]), torch.tensor([[p]])) for s, p in ((0.2, 5), (0.9, 3))]
        >>> merge(shards, k=1).position
        tensor([[3]])
    """
    similarity = torch.cat([part.similarity for part in parts], dim=1)
    position = torch.cat([part.position for part in parts], dim=1)
    if (missing := k - position.shape[1]) > 0:
        similarity = F.pad(similarity, (0, missing), value=-math.inf)
        position = F.pad(position, (0, missing), value=-1)
    return _sorted(similarity, position, k)


# ------------------------------------------------------------------------------------------- input, shared with indices


class StoredVectors(NamedTuple):
    """Vectors to search.

    Args:
        x: (M, D) float32.
        largest_norm: () float64, the largest Euclidean norm of a vector, by which rounding errors are bounded.
    """

    x: Tensor
    largest_norm: Tensor

    @classmethod
    def of(cls, x: Tensor) -> StoredVectors:
        """Convert vectors of any floating type; InputError for another shape and for values that are not finite."""
        if x.ndim != 2:
            raise InputError(f"stored vectors are (M, D); got the shape {tuple(x.shape)}.")
        x = x.detach().to(torch.float32).contiguous()
        return cls(x, _largest_norm(x, "stored vectors"))


def checked_queries(queries: Tensor, stored: StoredVectors, k: int, exclude: Exclude) -> Tensor:
    """Return the queries, (Q, D) float32; InputError for what does not fit together."""
    shape = stored.x.shape
    if queries.ndim != 2 or queries.shape[1] != shape[1]:
        raise InputError(
            "queries and stored vectors are (Q, D) and (M, D) with the same D; "
            f"got the shapes {tuple(queries.shape)} and {tuple(shape)}."
        )
    if queries.device != stored.x.device:
        raise InputError(
            f"queries and stored vectors must be on one device; got {queries.device} and {stored.x.device}."
        )
    if not 0 <= k <= shape[0]:
        raise InputError(f"k must be from 0 to {shape[0]}, the number of stored vectors; got {k}.")
    for query_id, stored_id in exclude:
        if query_id.shape != (len(queries),) or stored_id.shape != (shape[0],):
            raise InputError(
                f"exclude is a list of pairs of ids, ({len(queries)},) of the queries and ({shape[0]},) of the stored "
                f"vectors; got the shapes {tuple(query_id.shape)} and {tuple(stored_id.shape)}."
            )
    queries = queries.detach().to(torch.float32).contiguous()
    _largest_norm(queries, "queries")
    return queries


def _largest_norm(x: Tensor, name: str) -> Tensor:
    """Return the largest norm of vectors (n, D), () float64; InputError, with their name, where it is not finite."""
    largest = _norms(x).amax() if len(x) else x.new_zeros((), dtype=torch.float64)
    if not torch.isfinite(largest):
        raise InputError(f"some {name} contain NaN or inf, or have a norm whose square overflows.")
    return largest


def most_excluded(exclude: Exclude) -> int:
    """Return the largest number of stored vectors that are excluded for one query."""
    most = 0
    for query_id, stored_id in exclude:
        if len(query_id) and len(stored_id):
            ordered = stored_id.sort().values
            last = torch.searchsorted(ordered, query_id, right=True)
            most += int((last - torch.searchsorted(ordered, query_id)).max())
    return most


def exclude_rows(exclude: Exclude, rows: slice | Tensor) -> Exclude:
    """Return the exclusions, ids (n,) and (M,), of some of the Q queries."""
    return [(query_id[rows], stored_id) for query_id, stored_id in exclude]


def slices(count: int, size: int) -> list[slice]:
    """Return consecutive slices of at most `size`, which cover `count` rows."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# ------------------------------------------------------------------------------------------------- products in float32


class _Products:
    """The largest inner products with the stored vectors, computed a tile at a time.

    Args:
        stored: the vectors.
        dtype: of the products; float32 if None.
    """

    def __init__(self, stored: StoredVectors, dtype: torch.dtype | None) -> None:
        self.stored, self.dtype = stored, dtype or torch.float32
        kind = "cuda" if stored.x.device.type == "cuda" else "cpu"
        self.columns = max(1, min(len(stored.x), TILE_COLUMNS[kind]))
        self.rows = max(1, TILE_PRODUCTS[kind] // self.columns)
        self._coarse = self.dtype != torch.float32
        # At a lower matmul precision PyTorch rounds the operands of float32 products too.
        rounding = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
        self._operand_error = torch.finfo(self.dtype).eps if self._coarse else rounding
        self._buffer = stored.x.new_empty(0)

    def fetch_count(self, k: int) -> int:
        """Return how many to fetch so that k are complete for nearly every query."""
        return 2 * k + 32 if self._operand_error else k + max(4, k // 8)

    def error(self, queries: Tensor) -> Tensor:
        """Return a bound of the rounding error of the products of each query, (n,) float64."""
        return product_error(queries, self.stored, operand_error=self._operand_error)

    def largest(self, queries: Tensor, count: int, masked: Exclude) -> tuple[Tensor, Tensor]:
        """Return the `count` largest products of each query and their positions, (n, count), unsorted."""
        best = queries.new_full((len(queries), count), -math.inf)
        best_position = torch.full_like(best, -1, dtype=torch.int64)
        converted = queries.to(self.dtype)
        for columns in slices(len(self.stored.x), self.columns):
            tile = self._tile(converted, self.stored.x[columns])
            for query_id, stored_id in masked:
                tile.masked_fill_(query_id[:, None] == stored_id[columns], -math.inf)
            product, column = self._largest_of_tile(tile, best)
            if product.shape[1]:
                best, order = torch.cat([best, product], dim=1).topk(count, dim=1, sorted=False)
                best_position = torch.cat([best_position, column + columns.start], dim=1).gather(1, order)
        return best, best_position

    def _tile(self, queries: Tensor, stored: Tensor) -> Tensor:
        if not self._coarse:
            if self._buffer.numel() < len(queries) * len(stored):
                self._buffer = stored.new_empty(len(queries) * len(stored))
            out = self._buffer[: len(queries) * len(stored)].view(len(queries), len(stored))
            return torch.mm(queries, stored.T, out=out)
        if stored.device.type == "cuda":
            return torch.mm(queries, stored.to(self.dtype).T, out_dtype=torch.float32)
        return torch.mm(queries, stored.to(self.dtype).T).float()

    def _largest_of_tile(self, tile: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products of a tile (n, m) that may exceed `best` (n, count), and their columns, (n, w).

        After the first tiles they are rare; on a CPU the maxima of blocks find them at a fraction of the cost of topk.
        """
        blocks = tile.shape[1] // BLOCK_SIZE
        if tile.device.type == "cpu" and tile.shape[1] % BLOCK_SIZE == 0:
            least = best.amin(1)
            # A block is every blocks-th column, so that the maxima are taken over contiguous vectors.
            by_block = tile.view(len(tile), BLOCK_SIZE, blocks)
            row, block = (by_block.amax(1) > least[:, None]).nonzero(as_tuple=True)
            if 8 * len(row) <= len(tile) * blocks:
                product = by_block[row, :, block]
                pair, member = (product > least[row, None]).nonzero(as_tuple=True)
                return _padded(row[pair], product[pair, member], member * blocks + block[pair], len(tile))
        return tile.topk(min(best.shape[1], tile.shape[1]), dim=1, sorted=False)


def _padded(row: Tensor, value: Tensor, column: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Arrange values and columns (P,), sorted by row (P,), as (rows, w) with w the most of one row; padding is -inf."""
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    values = value.new_full((rows, int(count.max())), -math.inf)
    columns = torch.zeros_like(values, dtype=torch.int64)
    values[row, place], columns[row, place] = value, column
    return values, columns


def product_error(queries: Tensor, stored: StoredVectors, *, operand_error: float) -> Tensor:
    """Return a bound of the difference of float32 products (D terms in any order) and similarities, (n,) float64.

    Args:
        queries: (n, D).
        stored: the M vectors.
        operand_error: the relative rounding error of the numbers before they are multiplied, and of the sum.
    """
    unit, terms = torch.finfo(torch.float32).eps / 2, stored.x.shape[1]
    relative = (terms + 4) * unit / (1 - (terms + 4) * unit) + operand_error * (3 + 3 * operand_error)
    bound: Tensor = _norms(queries) * stored.largest_norm * relative + terms * torch.finfo(torch.float32).tiny
    return bound


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1).double() * (1 + 2.0**-20)
    return norms


def is_complete(part: Found, product: Tensor, error: Tensor, everything: bool) -> Tensor:
    """Return for each query whether no vector that was not fetched can be among the k nearest, (n,) bool.

    Args:
        part: (n, k), the nearest of the fetched vectors.
        product: (n, count), their products as fetched.
        error: (n,) float64, from `product_error`.
        everything: True if all stored vectors were fetched.
    """
    if everything or not part.position.shape[1]:
        return torch.ones(len(product), dtype=torch.bool, device=product.device)
    least = product.amin(1).double()
    return (part.similarity[:, -1].double() > least + error) | (least == -math.inf)


# ---------------------------------------------------------------------------------------------- similarities in float64


def completed(
    found: Found, complete: Tensor, queries: Tensor, stored: StoredVectors, k: int, exclude: Exclude
) -> Found:
    """Return `found` after its incomplete rows were replaced by a search in float64.

    Args:
        found: (Q, k).
        complete: (Q,) bool, from `is_complete`.
        queries: (Q, D).
        stored: the M vectors.
        k: how many per query.
        exclude: as for `exact_search`.
    """
    unsure = (~complete).nonzero().squeeze(1)
    for rows in torch.split(unsure, max(1, TILE_PRODUCTS["cpu"] // 2 // min(len(stored.x), FLOAT64_COLUMNS))):
        if len(rows):
            part = _search_in_float64(queries[rows], stored, k, exclude_rows(exclude, rows))
            found.similarity[rows], found.position[rows] = part
    return found


def _search_in_float64(queries: Tensor, stored: StoredVectors, k: int, exclude: Exclude) -> Found:
    """Return (n, k) by the similarities of all pairs, a tile at a time: correctly rounded, so no bound is needed."""
    converted = queries.double()
    best = queries.new_empty(len(queries), 0)
    best_position = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    place = torch.arange(len(stored.x), device=queries.device)
    for columns in slices(len(stored.x), FLOAT64_COLUMNS):
        # Of equal similarities the earlier ones are returned: a later one must be larger.
        above = best[:, -1:] if best.shape[1] == k else None
        similarity = _rounded(converted @ stored.x[columns].double().T, queries, stored, place[columns], above)
        for query_id, stored_id in exclude:
            similarity.masked_fill_(query_id[:, None] == stored_id[columns], -math.inf)
        value, index = _largest_in_order(similarity, min(k, similarity.shape[1]))
        # The earlier tiles come first and the sort is stable, so equal similarities stay in order.
        best, order = torch.cat([best, value], dim=1).sort(dim=1, descending=True, stable=True)
        best_position = torch.cat([best_position, index + columns.start], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    return Found(best, best_position.masked_fill(best == -math.inf, -1))


def _largest_in_order(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their positions, sorted by value, then by position."""
    values, index = x.topk(k, dim=1)
    # topk chooses freely among values equal to its last; only the rows where there are more need a full sort.
    tied = (x >= values[:, -1:]).sum(1) > k
    if tied.any():
        ordered, position = x[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = ordered[:, :k], position[:, :k]
    return _sorted(values, index, k)


def ranked(queries: Tensor, stored: StoredVectors, position: Tensor, k: int, exclude: Exclude) -> Found:
    """Return the k most similar of the stored vectors at some positions, without what is excluded, (n, k).

    Args:
        queries: (n, D).
        stored: the M vectors.
        position: (n, count) int64, -1 for none.
        k: how many per query.
        exclude: as for `exact_search`.
    """
    missing, place = position < 0, position.clamp(min=0)
    for query_id, stored_id in exclude:
        missing |= query_id[:, None] == stored_id[place]
    value = _similarity(queries, stored, place).masked_fill_(missing, -math.inf)
    return merge([Found(value, position.masked_fill(missing, -1))], k)


def _sorted(similarity: Tensor, position: Tensor, k: int) -> Found:
    """Return the first k by similarity, largest first, and by position among equals."""
    position, order = position.sort(dim=1)
    similarity, by_value = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Found(similarity[:, :k].contiguous(), position.gather(1, by_value)[:, :k].contiguous())


def _similarity(queries: Tensor, stored: StoredVectors, position: Tensor) -> Tensor:
    """Return the similarities of queries (n, D) and the stored vectors at (n, count) positions, (n, count) float32."""
    similarity = queries.new_empty(position.shape)
    for rows in slices(len(queries), max(1, CACHED_NUMBERS // max(1, position.shape[1] * queries.shape[1]))):
        product = stored.x[position[rows]].double().mul_(queries[rows].double()[:, None]).sum(2)
        similarity[rows] = _rounded(product, queries[rows], stored, position[rows])
    return similarity


def _rounded(
    product: Tensor, queries: Tensor, stored: StoredVectors, position: Tensor, above: Tensor | None = None
) -> Tensor:
    """Return (n, m) float64 products, summed in any order, as similarities in float32.

    Only where the error of the sum may change the rounding is the sum computed again in its defined order.

    Args:
        product: (n, m) float64.
        queries: (n, D).
        stored: the M vectors.
        position: (m,) or (n, m), of the stored vectors.
        above: (n, 1); similarities up to it need not be correct.
    """
    error = _norms(queries)[:, None] * (stored.largest_norm * stored.x.shape[1] * 4 * torch.finfo(torch.float64).eps)
    low, high = (product - error).float(), (product + error).float()
    unsure = low != high if above is None else (low != high) & (high > above)
    row, column = unsure.nonzero(as_tuple=True)
    if len(row):
        high[row, column] = _defined_similarity(queries, stored.x, row, position.expand_as(high)[row, column])
    return high


def _defined_similarity(queries: Tensor, stored: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Return the inner products of the pairs (row, position), (P,) float32, the same on every device.

    Products of float32 numbers are exact in float64. They are summed by adding the second half of the terms to the
    first until one is left, which is rounded to float32.
    """
    similarity = queries.new_empty(len(row))
    for piece in slices(len(row), max(1, CACHED_NUMBERS // max(1, stored.shape[1]))):
        terms = queries[row[piece]].double().mul_(stored[position[piece]])
        while (width := terms.shape[1]) > 1:
            half = (width + 1) // 2
            terms[:, : width - half] += terms[:, half:]
            terms = terms[:, :half]
        similarity[piece] = terms.sum(1)
    return similarity


def nothing_found(queries: Tensor, k: int) -> Found:
    """Return a result without vectors, (Q, k): similarity -inf and position -1."""
    similarity = queries.new_full((len(queries), k), -math.inf)
    return Found(similarity, torch.full_like(similarity, -1, dtype=torch.int64))


def concatenate_found(parts: Sequence[Found]) -> Found:
    """Return results (n, k) of consecutive queries as one, (sum of n, k)."""
    return Found(torch.cat([part.similarity for part in parts]), torch.cat([part.position for part in parts]))
