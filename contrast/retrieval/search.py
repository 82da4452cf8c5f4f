"""Which stored vectors are nearest: exact search on any device, FAISS's indices, k-means; the only file with faiss."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.registry import InputError

Exclude = Sequence[tuple[Tensor, Tensor]]
"""Pairs (number of each query (Q,), number of each stored vector (M,)): of equal numbers, the vector is left out."""


class Found(NamedTuple):
    """What a search found for each query, nearest first.

    Args:
        similarity: (Q, k) float32 inner products; -inf where there is nothing more.
        position: (Q, k) int64, which stored vectors; -1 where there is nothing more.
    """

    similarity: Tensor
    position: Tensor


@torch.no_grad()
def nearest(
    queries: Tensor, stored: Tensor, k: int, *, exclude: Exclude = (), search_dtype: torch.dtype | None = None
) -> Found:
    r"""Give the k stored vectors with the largest inner products, exactly and without the (Q, M) matrix.

    Products are computed in float32, a tile at a time. Of each query a few more than k are kept; their similarity is
    computed again in float64, in one fixed order of summation, and rounded to float32, and by that they are ordered,
    equal ones by position. No vector left out can belong inside where

    .. math:: s_k > p_{last} + \varepsilon

    with p_last the smallest product kept and epsilon the bound of its rounding error. The rows that cannot be certified
    so, of many nearly equal vectors, are searched in float64. Therefore the answer does not depend on tiles, device or
    search_dtype, and is what an index "Flat" answers.

    Args:
        queries: (Q, D) in any floating type; used as float32.
        stored: (M, D), on the same device.
        k: from 0 to M.
        exclude: pairs of numbers, (Q,) and (M,) int64: a stored vector that has the query's number in any pair is
            left out before anything is counted (own sample, own group).
        search_dtype: bfloat16 or float16 to find candidates by coarser products, quicker on some GPUs.

    Raises:
        InputError: for shapes, devices or a k that do not fit, and for vectors that are not finite.
    """
    vectors = _Stored.of(stored)
    queries = _fitting(queries, vectors, k, exclude)
    if queries.device.type == "mps":  # It has no float64.
        pairs = [(of_query.cpu(), of_stored.cpu()) for of_query, of_stored in exclude]
        found = nearest(queries.cpu(), stored.cpu(), k, exclude=pairs, search_dtype=search_dtype)
        return Found(*(part.to(queries.device) for part in found))
    if not k or not len(queries):
        return _nothing(queries, k)
    with torch.autocast(queries.device.type, enabled=False):
        search = _Products(vectors, search_dtype)
        most = _most_left_out(exclude)
        masked: Exclude = exclude if most > FEW else ()
        count = min(search.more_than(k) + (0 if masked else most), len(stored))
        parts, certain = [], []
        for rows in _slices(len(queries), search.rows):
            few, own = queries[rows], _of(exclude, rows)
            product, position = search.largest(few, count, _of(masked, rows))
            part = _ranked(few, vectors, position, k, own)
            parts.append(part)
            certain.append(_certain(part, product, search.error(few), count >= len(stored)))
        return _completed(_joined(parts), torch.cat(certain), queries, vectors, k, exclude)


def merge(parts: Sequence[Found], k: int) -> Found:
    """Give the k nearest of what several searches found for the same queries, at positions of their own.

    Args:
        parts: one of each shard, with positions that count over all shards; their widths may differ, also be 0.
        k: how many to keep.
    """
    similarity = torch.cat([part.similarity for part in parts], dim=1)
    position = torch.cat([part.position for part in parts], dim=1)
    if (lacking := k - position.shape[1]) > 0:
        similarity = F.pad(similarity, (0, lacking), value=-math.inf)
        position = F.pad(position, (0, lacking), value=-1)
    return _ordered(similarity, position, k)


# ------------------------------------------------------------------------------------------------------------- indices


class Index(ABC):
    """Stored vectors, ready to be searched. They must not change as long as the index is used.

    Args:
        stored: (M, D).
    """

    def __init__(self, stored: Tensor) -> None:
        self._stored = _Stored.of(stored)

    @abstractmethod
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        """Give the k nearest stored vectors of queries (Q, D) as `nearest` does; positions are -1 only where there are
        fewer than k exclude in all. Which vectors are found may be approximate; their similarities are not.
        """

    @abstractmethod
    def refill(self, stored: Tensor) -> None:
        """Put other vectors in the place of the stored ones; what was trained on the first ones is kept."""


AUTO = {"cpu": 20_000, "cuda": 2_000_000}
"""Up to so many stored vectors, on such a device, "auto" searches exactly."""


def build_index(stored: Tensor, index: str = "auto", *, probes: int | None = None, seed: int = 0) -> Index:
    """Give an index of vectors (M, D) by name.

    Args:
        stored: in any floating type; used as float32. Where it is on a GPU and the installed faiss has one, so is the
            index.
        index: "auto" is "exact" or, for many vectors, inverted lists (`auto_index` says which); "exact" searches by
            `nearest`; any other is a factory string of FAISS: "Flat", "IVF4096,Flat", "HNSW32", "IVF256,PQ32". Without
            faiss "auto" and "Flat" are "exact", which answers the same as "Flat".
        probes: how many lists of an IVF index a query looks into; None is `default_probes` of them.
        seed: of what an index trains. HNSW builds its graph on all cores in no fixed order, so that two of them differ.

    Raises:
        InputError: where faiss is missing or refuses the string, or where there are too few vectors to train it.
    """
    if index == "auto":
        index = auto_index(len(stored), stored.device.type)
    if _needs_no_faiss(index):
        return _Exact(stored)
    return _Faiss(stored, index, probes, seed)


def least_vectors(index: str, dim: int) -> int:
    """Give how many vectors an index needs before it can be built: as many as it trains lists or codes, else 1.

    Args:
        index: as for `build_index`.
        dim: D, of the vectors.

    Raises:
        InputError: where faiss is missing or refuses the string.
    """
    if index == "auto" or _needs_no_faiss(index):
        return 1
    inner = _innermost(_factory(index, dim))
    codes = [getattr(part, "ksub", 0) for part in (getattr(inner, "pq", None), inner) if part is not None]
    return max(1, getattr(inner, "nlist", 0), *codes)


def auto_index(count: int, device: str = "cpu") -> str:
    """Name the index that "auto" is for so many vectors: "exact", or inverted lists where they are quicker."""
    if count <= AUTO.get(device, AUTO["cpu"]) or not has_faiss():
        return "exact"
    return f"IVF{default_lists(count)},Flat"


def default_lists(count: int) -> int:
    """Give the number of lists of "auto" for so many vectors: the power of two nearest to 4 sqrt(count)."""
    return 1 << round(math.log2(4 * math.sqrt(max(1, count))))


def default_probes(lists: int) -> int:
    """Give into how many of its lists a query looks: one in 64, at least 16."""
    return min(lists, max(16, lists // 64))


def has_faiss() -> bool:
    """Tell whether faiss is installed."""
    try:
        _faiss()
    except ImportError:
        return False
    return True


def _needs_no_faiss(index: str) -> bool:
    """Tell whether an index is searched by `nearest`."""
    return index == "exact" or (index == "Flat" and not has_faiss())


class _Exact(Index):
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        return nearest(queries, self._stored.x, k, exclude=exclude)

    def refill(self, stored: Tensor) -> None:
        self._stored = _Stored.of(stored)


class _Faiss(Index):
    """An index of FAISS's factory, by inner product; what it finds is ranked as `nearest` does.

    Args:
        stored: (M, D).
        name: the factory string.
        probes: how many lists a query looks into, where there are lists; an attribute that may be set.
        seed: of the training.
    """

    def __init__(self, stored: Tensor, name: str, probes: int | None, seed: int) -> None:
        super().__init__(stored)
        self.name = name
        self._index = _factory(name, stored.shape[1])
        self._prepare(seed)
        self.probes = probes or default_probes(getattr(self._lists, "nlist", 1))
        self._to_device()
        try:
            self._index.train(self._own(self._stored.x))
            self._index.add(self._own(self._stored.x))
        except RuntimeError as error:
            raise InputError(
                f"faiss cannot make the index '{name}' of {len(stored)} vectors: {_reason(error)}. Take fewer lists or "
                "codes, or 'exact', which needs no training."
            ) from None

    def _prepare(self, seed: int) -> None:
        """Find what has lists or a graph, and seed what is trained."""
        inner = _innermost(self._index)
        self._graph = getattr(inner, "hnsw", None)
        self._lists = inner if hasattr(inner, "nprobe") else None
        for trained in (inner, getattr(inner, "pq", None)):
            if (settings := getattr(trained, "cp", None)) is not None:
                settings.seed = seed % 2**31
                # Few vectors a list are the caller's choice; faiss would print a warning a training.
                settings.min_points_per_centroid = 1
        if self._lists is not None:
            inner.cp.max_points_per_centroid = TRAINED

    def _to_device(self) -> None:
        """Move the index to the GPU of the vectors where faiss has it there; else vectors travel to the host."""
        self._on_gpu, faiss = False, _faiss()
        device = self._stored.x.device
        if device.type != "cuda" or not getattr(faiss, "get_num_gpus", int)():
            return
        number = device.index or 0
        try:
            moved = faiss.index_cpu_to_gpu(_gpu_resources(number), number, self._index)
        except RuntimeError:  # HNSW and others are made for the CPU alone.
            return
        if hasattr(moved, "getDevice"):
            self._index, self._on_gpu = moved, True
            self._lists = moved if self._lists is not None else None

    def _own(self, x: Tensor) -> Tensor:
        return x if self._on_gpu else x.cpu()

    def refill(self, stored: Tensor) -> None:
        self._stored = _Stored.of(stored)
        self._index.reset()
        self._index.add(self._own(self._stored.x))

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        queries = _fitting(queries, self._stored, k, exclude)
        if not k or not len(queries):
            return _nothing(queries, k)
        most = _most_left_out(exclude)
        parts, done = [], []
        for rows in _slices(len(queries), AT_ONCE):
            part, found = self._search_some(queries[rows], k, _of(exclude, rows), most)
            parts.append(part)
            done.append(found)
        return _completed(_joined(parts), torch.cat(done), queries, self._stored, k, exclude)

    def _search_some(self, queries: Tensor, k: int, exclude: Exclude, most: int) -> tuple[Found, Tensor]:
        """Give what the index finds, and which rows are complete, (n,) bool: the others must be searched exactly.

        Where many vectors are no exclude, the rows that lack some are searched again for more.
        """
        everything = min(len(self._stored.x), 2048) if self._on_gpu else len(self._stored.x)
        # Vectors that were stored coarsely are found coarsely: more of them are looked at as they are.
        whole = re.search(r"(^|,)(Flat|HNSW\d+)$", self.name) is not None
        count = (2 * k + 32 if self._on_gpu else k + max(4, k // 8)) if whole else 4 * k + 16
        count = min(count + min(most, FEW), everything)
        found, done = _nothing(queries, k), torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        while True:
            rows = (~done).nonzero().squeeze(1)
            few = queries[rows]
            product, position = self._fetch(few, count)
            part = _ranked(few, self._stored, position, k, _of(exclude, rows))
            found.similarity[rows], found.position[rows] = part
            if self.name == "Flat":
                error = _error(few, self._stored, operands=2.0**-10 if self._on_gpu else 0.0)
                done[rows] = _certain(part, product, error, count >= len(self._stored.x))
            else:
                done[rows] = part.position[:, -1] >= 0
            if done.all() or most <= FEW or count >= min(MOST_FETCHED, everything):
                return found, done
            count = min(4 * count, everything)

    def _fetch(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self._graph is not None:
            self._graph.efSearch = max(64, 2 * count)
        if self._lists is not None:
            self._lists.nprobe = min(self.probes, self._lists.nlist)
        product, position = self._index.search(self._own(queries.contiguous()), count)
        return product.to(queries.device), position.to(queries.device)


def _factory(name: str, dim: int) -> Any:
    """Give an empty index of faiss by its factory string."""
    try:
        faiss = _faiss()
    except ImportError:
        raise InputError(
            f"the index '{name}' needs faiss, which is not installed: pip install \"contrast-learning[faiss-cpu]\" "
            "(or [faiss-gpu]); 'exact' and 'auto' do without."
        ) from None
    try:
        return faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"faiss does not take '{name}' as an index of vectors with {dim} numbers: "
            f"{_reason(error)}. It takes 'Flat', 'IVF256,Flat', 'HNSW32' or 'IVF256,PQ32', for example."
        ) from None


def _innermost(index: Any) -> Any:
    """Give the index inside of those that only change or renumber vectors."""
    faiss = _faiss()
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index


def _reason(error: RuntimeError) -> str:
    """Give what faiss said, without the place in its source."""
    said = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error), flags=re.DOTALL)
    return re.sub(r"^Error: '.*?' failed:? ?", "", said).strip().rstrip(".") or said.strip()


@cache
def _faiss() -> Any:
    # torch is imported above: in the other order the two libraries have crashed. torch_utils lets faiss take tensors.
    import faiss
    import faiss.contrib.torch_utils

    return faiss


_scratch: dict[int, Any] = {}


def _gpu_resources(number: int) -> Any:
    """Give faiss's scratch memory on a GPU, one for all indices: by default each would take 1.5 GB."""
    if number not in _scratch:
        _scratch[number] = _faiss().StandardGpuResources()
        _scratch[number].setTempMemory(2**28)
    return _scratch[number]


# ------------------------------------------------------------------------------------------------------- exact search

FEW = 64
"""Up to so many vectors that are no exclude are fetched and dropped; of more, the products are masked."""
TRAINED = 64
"""Vectors a list that lists are trained on; faiss takes 256, four times as long."""
AT_ONCE = 2**15
"""Queries that are handed to an index at a time."""
MOST_FETCHED = 1024
"""An index is asked for no more than so many; queries that still lack exclude are searched exactly."""
COLUMNS = {"cpu": 16_384, "cuda": 65_536}
TILE = {"cpu": 2**23, "cuda": 2**27}
"""How many products are held at a time, and of how many stored vectors."""
GROUP = 32
"""So many products have one maximum, by which most are passed over."""
PIECE = 2**19
"""Numbers worked on at a time where similarities are computed again: they stay in the cache."""


class _Stored(NamedTuple):
    """Vectors (M, D) float32, and the length of the longest, () float64, by which rounding errors are bounded."""

    x: Tensor
    longest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Stored:
        """Take vectors in any floating type, or say in a sentence what is wrong with them."""
        if x.ndim != 2:
            raise InputError(f"stored vectors are (M, D); got the shape {tuple(x.shape)}.")
        made = x.detach().to(torch.float32).contiguous()
        return cls(made, _longest(made, "stored vectors"))


class _Products:
    """The largest inner products with the stored vectors, found a tile at a time."""

    def __init__(self, stored: _Stored, dtype: torch.dtype | None) -> None:
        self.stored, self.dtype = stored, dtype or torch.float32
        kind = "cuda" if stored.x.device.type == "cuda" else "cpu"
        self.columns = max(1, min(len(stored.x), COLUMNS[kind]))
        self.rows = max(1, TILE[kind] // self.columns)
        self._coarse = self.dtype != torch.float32
        # PyTorch rounds the operands of float32 products, too, where it was told to.
        told = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
        self._operands = torch.finfo(self.dtype).eps if self._coarse else told
        self._buffer = stored.x.new_empty(0)

    def more_than(self, k: int) -> int:
        """Say how many to fetch so that k are nearly always certain."""
        return 2 * k + 32 if self._operands else k + max(4, k // 8)

    def error(self, queries: Tensor) -> Tensor:
        """Bound the rounding error of the products of each query, (n,) float64."""
        return _error(queries, self.stored, operands=self._operands)

    def largest(self, queries: Tensor, count: int, masked: Exclude) -> tuple[Tensor, Tensor]:
        """Give the `count` largest products of each query and their positions, (n, count), in no order."""
        best = queries.new_full((len(queries), count), -math.inf)
        where = torch.full_like(best, -1, dtype=torch.int64)
        own = queries.to(self.dtype)
        for columns in _slices(len(self.stored.x), self.columns):
            tile = self._tile(own, self.stored.x[columns])
            for of_query, of_stored in masked:
                tile.masked_fill_(of_query[:, None] == of_stored[columns], -math.inf)
            product, column = self._promising(tile, best)
            if product.shape[1]:
                best, order = torch.cat([best, product], dim=1).topk(count, dim=1, sorted=False)
                where = torch.cat([where, column + columns.start], dim=1).gather(1, order)
        return best, where

    def _tile(self, queries: Tensor, stored: Tensor) -> Tensor:
        if not self._coarse:
            if self._buffer.numel() < len(queries) * len(stored):
                self._buffer = stored.new_empty(len(queries) * len(stored))
            out = self._buffer[: len(queries) * len(stored)].view(len(queries), len(stored))
            return torch.mm(queries, stored.T, out=out)
        if stored.device.type == "cuda":
            return torch.mm(queries, stored.to(self.dtype).T, out_dtype=torch.float32)
        return torch.mm(queries, stored.to(self.dtype).T).float()

    def _promising(self, tile: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Give the products of a tile that may come among the best, -inf beside them, and their columns.

        After the first tiles few do: the maxima of groups tell where they are, a fraction of what topk costs a CPU.
        """
        groups = tile.shape[1] // GROUP
        if tile.device.type == "cpu" and tile.shape[1] % GROUP == 0:
            least = best.amin(1)
            # A group is every groups-th column, so that maxima are taken of whole vectors.
            grouped = tile.view(len(tile), GROUP, groups)
            row, group = (grouped.amax(1) > least[:, None]).nonzero(as_tuple=True)
            if 8 * len(row) <= len(tile) * groups:
                product = grouped[row, :, group]
                pair, member = (product > least[row, None]).nonzero(as_tuple=True)
                return _side_by_side(row[pair], product[pair, member], member * groups + group[pair], len(tile))
        return tile.topk(min(best.shape[1], tile.shape[1]), dim=1, sorted=False)


def _side_by_side(row: Tensor, value: Tensor, column: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Put a list of values and columns into (rows, w), those of a row beside one another; -inf fills up."""
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    values = value.new_full((rows, int(count.max())), -math.inf)
    columns = torch.zeros_like(values, dtype=torch.int64)
    values[row, place], columns[row, place] = value, column
    return values, columns


def _error(queries: Tensor, stored: _Stored, *, operands: float) -> Tensor:
    """Bound how far float32 products (D terms in any order) are from the similarity, (n,) float64.

    Args:
        queries: (n, D).
        stored: (M, D).
        operands: by what share of itself a number may be rounded before it is multiplied, and a sum after.
    """
    unit, terms = torch.finfo(torch.float32).eps / 2, stored.x.shape[1]
    share = (terms + 4) * unit / (1 - (terms + 4) * unit) + operands * (3 + 3 * operands)
    bound: Tensor = _lengths(queries) * stored.longest * share + terms * torch.finfo(torch.float32).tiny
    return bound


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1).double() * (1 + 2.0**-20)
    return lengths


def _certain(part: Found, product: Tensor, error: Tensor, everything: bool) -> Tensor:
    """Tell of each row whether nothing that was not fetched can belong inside, (n,) bool."""
    if everything or not part.position.shape[1]:
        return torch.ones(len(product), dtype=torch.bool, device=product.device)
    least = product.amin(1).double()
    return (part.similarity[:, -1].double() > least + error) | (least == -math.inf)


def _completed(found: Found, certain: Tensor, queries: Tensor, stored: _Stored, k: int, exclude: Exclude) -> Found:
    """Search the rows that are not certain with care."""
    torn = (~certain).nonzero().squeeze(1)
    for few in torch.split(torn, max(1, TILE["cpu"] // 2 // min(len(stored.x), CAREFUL))):
        if len(few):
            part = _careful(queries[few], stored, k, _of(exclude, few))
            found.similarity[few], found.position[few] = part
    return found


CAREFUL = 4096
"""Stored vectors in a tile of the careful search."""


def _careful(queries: Tensor, stored: _Stored, k: int, exclude: Exclude) -> Found:
    """Search by the similarities themselves, for rows of many nearly equal ones: in float64, a tile at a time.

    Every product of a query is rounded to the similarity, so that no certificate is needed.
    """
    own = queries.double()
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    place = torch.arange(len(stored.x), device=queries.device)
    for columns in _slices(len(stored.x), CAREFUL):
        # What comes later must be larger to come in.
        above = best[:, -1:] if best.shape[1] == k else None
        similarity = _rounded(own @ stored.x[columns].double().T, queries, stored, place[columns], above)
        for of_query, of_stored in exclude:
            similarity.masked_fill_(of_query[:, None] == of_stored[columns], -math.inf)
        value, index = _largest_in_order(similarity, min(k, similarity.shape[1]))
        # The earlier tiles stand first, and the sort is stable: equal similarities stay in order.
        best, order = torch.cat([best, value], dim=1).sort(dim=1, descending=True, stable=True)
        where = torch.cat([where, index + columns.start], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    return Found(best, where.masked_fill(best == -math.inf, -1))


def _largest_in_order(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest of each row and their positions, by value, then by position."""
    values, index = x.topk(k, dim=1)
    # topk picks freely among values equal to the last it takes; only those rows are worth a whole sort.
    torn = (x >= values[:, -1:]).sum(1) > k
    if torn.any():
        ordered, position = x[torn].sort(dim=1, descending=True, stable=True)
        values[torn], index[torn] = ordered[:, :k], position[:, :k]
    return _ordered(values, index, k)


def _ranked(queries: Tensor, stored: _Stored, position: Tensor, k: int, exclude: Exclude) -> Found:
    """Give the k exclude at (n, count) positions with the largest similarities, in order."""
    missing, place = position < 0, position.clamp(min=0)
    for of_query, of_stored in exclude:
        missing |= of_query[:, None] == of_stored[place]
    value = _similarity(queries, stored, place).masked_fill_(missing, -math.inf)
    return merge([Found(value, position.masked_fill(missing, -1))], k)


def _ordered(similarity: Tensor, position: Tensor, k: int) -> Found:
    """Sort by similarity, largest first, and equal ones by position; the first k."""
    position, order = position.sort(dim=1)
    similarity, by_value = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Found(similarity[:, :k].contiguous(), position.gather(1, by_value)[:, :k].contiguous())


def _similarity(queries: Tensor, stored: _Stored, position: Tensor) -> Tensor:
    """Give the inner products of queries (n, D) and the stored vectors at (n, count) positions, (n, count) float32.

    They are `_defined`; a sum in float64 in any order tells them wherever its error cannot change the rounding.
    """
    found = queries.new_empty(position.shape)
    for rows in _slices(len(queries), max(1, PIECE // max(1, position.shape[1] * queries.shape[1]))):
        product = stored.x[position[rows]].double().mul_(queries[rows].double()[:, None]).sum(2)
        found[rows] = _rounded(product, queries[rows], stored, position[rows])
    return found


def _rounded(
    product: Tensor, queries: Tensor, stored: _Stored, position: Tensor, above: Tensor | None = None
) -> Tensor:
    """Round products in float64 (n, m) to similarities; those at most `above`, (n, 1), need not be right."""
    error = _lengths(queries)[:, None] * (stored.longest * stored.x.shape[1] * 4 * torch.finfo(torch.float64).eps)
    low, high = (product - error).float(), (product + error).float()
    unsure = low != high if above is None else (low != high) & (high > above)
    row, column = unsure.nonzero(as_tuple=True)
    if len(row):
        high[row, column] = _defined(queries, stored.x, row, position.expand_as(high)[row, column])
    return high


def _defined(queries: Tensor, stored: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Give the inner products of the pairs (row, position), (P,) float32: what a similarity is, on every device.

    Products of float32 numbers are exact in float64; halves of the terms are added, then halves of the sums, which is
    the same order everywhere. At last the sum is rounded to float32.
    """
    found = queries.new_empty(len(row))
    for piece in _slices(len(row), max(1, PIECE // max(1, stored.shape[1]))):
        terms = queries[row[piece]].double().mul_(stored[position[piece]])
        while (width := terms.shape[1]) > 1:
            half = (width + 1) // 2
            terms[:, : width - half] += terms[:, half:]
            terms = terms[:, :half]
        found[piece] = terms.sum(1)
    return found


# --------------------------------------------------------------------------------------------------------- small parts


def _fitting(queries: Tensor, stored: _Stored, k: int, exclude: Exclude) -> Tensor:
    """Give queries as float32, or say in a sentence what does not fit."""
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
        raise InputError(
            f"{k} neighbours of each query are asked for, and {shape[0]} vectors are stored; ask for 0 to {shape[0]}."
        )
    for of_query, of_stored in exclude:
        if of_query.shape != (len(queries),) or of_stored.shape != (shape[0],):
            raise InputError(
                f"exclude are pairs of numbers, ({len(queries)},) of the queries and ({shape[0]},) of the stored "
                f"vectors; got the shapes {tuple(of_query.shape)} and {tuple(of_stored.shape)}."
            )
    queries = queries.detach().to(torch.float32).contiguous()
    _longest(queries, "queries")
    return queries


def _longest(x: Tensor, name: str) -> Tensor:
    """Give the length of the longest vector; NaN and what cannot be squared raises an InputError."""
    longest = _lengths(x).amax() if len(x) else x.new_zeros((), dtype=torch.float64)
    if not torch.isfinite(longest):
        raise InputError(f"some {name} are NaN, infinite or too long to be squared; look where they come from.")
    return longest


def _nothing(queries: Tensor, k: int) -> Found:
    similarity = queries.new_full((len(queries), k), -math.inf)
    return Found(similarity, torch.full_like(similarity, -1, dtype=torch.int64))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _of(exclude: Exclude, rows: slice | Tensor) -> Exclude:
    return [(of_query[rows], of_stored) for of_query, of_stored in exclude]


def _joined(parts: Sequence[Found]) -> Found:
    return Found(torch.cat([part.similarity for part in parts]), torch.cat([part.position for part in parts]))


def _most_left_out(exclude: Exclude) -> int:
    """Give how many stored vectors at most have the number of one query."""
    most = 0
    for of_query, of_stored in exclude:
        if len(of_query) and len(of_stored):
            known = of_stored.sort().values
            last = torch.searchsorted(known, of_query, right=True)
            most += int((last - torch.searchsorted(known, of_query)).max())
    return most


# -------------------------------------------------------------------------------------------------------------- k-means


class Clusters(NamedTuple):
    """What k-means found.

    Args:
        centroids: (k, D) float32.
        assignment: (N,) int64, to which each vector belongs.
        inertia: the sum of the squared distances of the vectors to their centroids.
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float


@torch.no_grad()
def kmeans(x: Tensor, clusters: int, *, spherical: bool = False, iterations: int = 50, seed: int = 0) -> Clusters:
    """Give k-means clusters of vectors (N, D), the same for the same seed.

    It starts from k-means++ on a sample of the vectors and stops when nothing moves. A cluster that loses all its
    vectors starts anew from one of those farthest from their centroids. (faiss has a k-means too, which is quicker and,
    since it starts from vectors drawn evenly, ends worse.)

    Args:
        x: in any floating type; used as float32.
        clusters: k, from 1 to N.
        spherical: vectors and centroids are made unit length first, so that the cosine decides.
        iterations: at most.
        seed: of the start.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, k-means++; Dhillon and Modha 2001 for the spherical form.
    """
    x = _Stored.of(x).x
    if not 1 <= clusters <= len(x):
        raise InputError(f"{clusters} clusters are asked for, of {len(x)} vectors; ask for 1 to {len(x)}.")
    x = F.normalize(x) if spherical else x
    generator = torch.Generator().manual_seed(seed)
    squared = x.square().sum(1)
    centroids = _spread_out(x, squared, clusters, generator)
    assignment, distance = _assigned(x, squared, centroids)
    for _ in range(iterations):
        centroids = _means(x, assignment, distance, clusters)
        centroids = F.normalize(centroids) if spherical else centroids
        before = assignment
        assignment, distance = _assigned(x, squared, centroids)
        if torch.equal(assignment, before):
            break
    inertia = sum(
        float((x[rows] - centroids[assignment[rows]]).double().square().sum())
        for rows in _slices(len(x), max(1, TILE["cpu"] // 4 // x.shape[1]))
    )
    return Clusters(centroids, assignment, inertia)


SAMPLE = 32
"""Vectors a cluster among which k-means++ chooses."""


def _spread_out(x: Tensor, squared: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose the first centroids by greedy k-means++: of a few drawn by squared distance, the one that helps most."""
    if len(x) > SAMPLE * clusters:
        chosen = torch.randperm(len(x), generator=generator)[: SAMPLE * clusters].to(x.device)
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
    """Give the squared distances, (k, N) for k few."""
    product = centroids @ x.T
    return (squared + centroids.square().sum(1, keepdim=True) - 2 * product).clamp_(min=0)


def _assigned(x: Tensor, squared: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Give each vector's nearest centroid, the first of equals, and the squared distance to it."""
    assignment, distance = torch.empty_like(squared, dtype=torch.int64), torch.empty_like(squared)
    half = -centroids.square().sum(1) / 2
    kind = "cuda" if x.device.type == "cuda" else "cpu"
    width = min(len(centroids), COLUMNS[kind])
    for rows in _slices(len(x), max(1, TILE[kind] // 4 // width)):
        best, where = x.new_full((len(x[rows]),), -math.inf), assignment[rows]
        for columns in _slices(len(centroids), width):
            value, index = torch.addmm(half[columns], x[rows], centroids[columns].T).max(1)
            nearer = value > best
            best = torch.where(nearer, value, best)
            where.copy_(torch.where(nearer, index + columns.start, where))
        torch.sub(squared[rows], best, alpha=2, out=distance[rows])
    return assignment, distance


def _means(x: Tensor, assignment: Tensor, distance: Tensor, clusters: int) -> Tensor:
    """Give the mean of each cluster; an empty one takes a vector that is far from its centroid."""
    count = torch.bincount(assignment, minlength=clusters)
    # Bags are added up in order, each by itself: the same bits every time, on a GPU too.
    order = assignment.argsort(stable=True)
    means = F.embedding_bag(order, x, count.cumsum(0) - count, mode="sum") / count.clamp(min=1)[:, None]
    empty = (count == 0).nonzero().squeeze(1)
    if len(empty):
        means[empty] = x[distance.topk(len(empty)).indices]
    return means
