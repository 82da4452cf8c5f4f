"""Search indices by name: exact, or any that FAISS makes; the only file that imports faiss."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

from contrast.core.registry import InputError
from contrast.retrieval.search import (
    MAX_UNMASKED,
    Exclude,
    Found,
    StoredVectors,
    checked_queries,
    completed,
    concatenate_found,
    exact_search,
    exclude_rows,
    is_complete,
    most_excluded,
    nothing_found,
    product_error,
    ranked,
    slices,
)

AUTO_EXACT = {"cpu": 20_000, "cuda": 2_000_000}
"""Up to this many stored vectors, by device, "auto" searches exactly."""
TRAINING_VECTORS = 64
"""Vectors per list on which lists are trained; faiss uses 256, which takes four times as long."""
QUERIES_AT_ONCE = 2**15
"""Queries that are passed to an index at a time."""
MAX_FETCHED = 1024
"""Vectors fetched per query at most; queries for which they do not suffice are searched exactly."""


class Index(ABC):
    """Stored vectors, prepared for searching. They must not change while the index is used.

    Args:
        stored: (M, D).

    Example:
        >>> index = build_index(torch.eye(3), "exact")
        >>> index.search(torch.tensor([[0.0, 1.0, 0.0]]), k=1).position
        tensor([[1]])
    """

    def __init__(self, stored: Tensor) -> None:
        self._stored = StoredVectors.of(stored)

    @abstractmethod
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        """Return the k nearest stored vectors of queries (Q, D), with the arguments of `exact_search`.

        Which vectors are found may be approximate; their similarities are exact. Fewer than k are found only where
        there are no more that are not excluded.
        """

    @abstractmethod
    def refill(self, stored: Tensor) -> None:
        """Replace the stored vectors; what was trained on the first ones remains."""


def build_index(stored: Tensor, index: str = "auto", *, probes: int | None = None, seed: int = 0) -> Index:
    """Build an index of vectors (M, D) by name.

    Args:
        stored: (M, D), any floating type; used as float32. Where they are on a GPU and the installed faiss has GPU
            support, so is the index.
        index: "auto" is "exact" or, for many vectors, inverted lists (`auto_index` returns which); "exact" is
            `exact_search`; any other is a factory string of FAISS: "Flat", "IVF4096,Flat", "HNSW32", "IVF256,PQ32".
            Without faiss "auto" and "Flat" are "exact", which finds the same as "Flat".
        probes: how many lists of an IVF index are searched per query; `default_probes` if None.
        seed: of the training. HNSW builds its graph in parallel in no fixed order, so two of them differ.

    Raises:
        InputError: where faiss is missing or refuses the string, or there are too few vectors to train it.

    Example:
        >>> index = build_index(torch.randn(1000, 8))
        >>> index.search(torch.randn(5, 8), k=3).position.shape
        torch.Size([5, 3])
    """
    if index == "auto":
        index = auto_index(len(stored), stored.device.type)
    if _is_exact(index):
        return _ExactIndex(stored)
    return _FaissIndex(stored, index, probes, seed)


def least_vectors(index: str, dim: int) -> int:
    """Return how many vectors an index needs at least: as many as it trains lists or codes, else 1.

    Args:
        index: as for `build_index`.
        dim: D, of the vectors.

    Raises:
        InputError: where faiss is missing or refuses the string.

    Example:
        >>> least_vectors("exact", dim=128)
        1
    """
    if index == "auto" or _is_exact(index):
        return 1
    inner = _innermost(_from_factory(index, dim))
    codes = [getattr(part, "ksub", 0) for part in (getattr(inner, "pq", None), inner) if part is not None]
    return max(1, getattr(inner, "nlist", 0), *codes)


def auto_index(count: int, device: str = "cpu") -> str:
    """Return the name of the index that "auto" is for `count` vectors: "exact", or inverted lists.

    Example:
        >>> auto_index(1000)
        'exact'
    """
    if count <= AUTO_EXACT.get(device, AUTO_EXACT["cpu"]) or not has_faiss():
        return "exact"
    return f"IVF{default_lists(count)},Flat"


def default_lists(count: int) -> int:
    """Return the number of lists of "auto" for `count` vectors: the power of two nearest to 4 sqrt(count).

    Example:
        >>> default_lists(1_000_000)
        4096
    """
    return 1 << round(math.log2(4 * math.sqrt(max(1, count))))


def default_probes(lists: int) -> int:
    """Return how many of its lists an index searches per query: one in 64, at least 16.

    Example:
        >>> default_probes(4096)
        64
    """
    return min(lists, max(16, lists // 64))


def has_faiss() -> bool:
    """True if faiss is installed.

    Example:
        >>> name = "IVF64,Flat" if has_faiss() else "exact"
    """
    try:
        _faiss()
    except ImportError:
        return False
    return True


def _is_exact(index: str) -> bool:
    return index == "exact" or (index == "Flat" and not has_faiss())


class _ExactIndex(Index):
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        return exact_search(queries, self._stored.x, k, exclude=exclude)

    def refill(self, stored: Tensor) -> None:
        self._stored = StoredVectors.of(stored)


class _FaissIndex(Index):
    """An index of FAISS's factory, by inner product; what it finds is ranked as by `exact_search`.

    Args:
        stored: (M, D).
        name: the factory string.
        probes: how many lists are searched per query, where there are lists; may be set later.
        seed: of the training.
    """

    def __init__(self, stored: Tensor, name: str, probes: int | None, seed: int) -> None:
        super().__init__(stored)
        self.name = name
        self._index = _from_factory(name, stored.shape[1])
        self._configure(seed)
        self.probes = probes or default_probes(getattr(self._lists, "nlist", 1))
        self._move_to_device()
        try:
            self._index.train(self._input(self._stored.x))
            self._index.add(self._input(self._stored.x))
        except RuntimeError as error:
            raise InputError(
                f"faiss cannot make the index '{name}' of {len(stored)} vectors: {_reason(error)}. Take fewer lists or "
                "codes, or 'exact', which needs no training."
            ) from None

    def _configure(self, seed: int) -> None:
        """Find the lists or the graph, and seed the training."""
        inner = _innermost(self._index)
        self._graph = getattr(inner, "hnsw", None)
        self._lists = inner if hasattr(inner, "nprobe") else None
        for trained in (inner, getattr(inner, "pq", None)):
            if (settings := getattr(trained, "cp", None)) is not None:
                settings.seed = seed % 2**31
                # How many vectors per list are too few is the caller's choice; faiss would print a warning.
                settings.min_points_per_centroid = 1
        if self._lists is not None:
            inner.cp.max_points_per_centroid = TRAINING_VECTORS

    def _move_to_device(self) -> None:
        """Move the index to the GPU of the vectors where faiss supports it; else vectors are copied to the host."""
        self._on_gpu, faiss = False, _faiss()
        device = self._stored.x.device
        if device.type != "cuda" or not getattr(faiss, "get_num_gpus", int)():
            return
        number = device.index or 0
        try:
            moved = faiss.index_cpu_to_gpu(_gpu_resources(number), number, self._index)
        except RuntimeError:  # HNSW and others exist on the CPU only.
            return
        if hasattr(moved, "getDevice"):
            self._index, self._on_gpu = moved, True
            self._lists = moved if self._lists is not None else None

    def _input(self, x: Tensor) -> Tensor:
        return x if self._on_gpu else x.cpu()

    def refill(self, stored: Tensor) -> None:
        self._stored = StoredVectors.of(stored)
        self._index.reset()
        self._index.add(self._input(self._stored.x))

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, *, exclude: Exclude = ()) -> Found:
        queries = checked_queries(queries, self._stored, k, exclude)
        if not k or not len(queries):
            return nothing_found(queries, k)
        most = most_excluded(exclude)
        parts, complete = [], []
        for rows in slices(len(queries), QUERIES_AT_ONCE):
            part, done = self._search_block(queries[rows], k, exclude_rows(exclude, rows), most)
            parts.append(part)
            complete.append(done)
        return completed(concatenate_found(parts), torch.cat(complete), queries, self._stored, k, exclude)

    def _search_block(self, queries: Tensor, k: int, exclude: Exclude, most: int) -> tuple[Found, Tensor]:
        """Return what the index finds, and which rows are complete, (n,) bool: the others must be searched exactly.

        Where many vectors are excluded, the rows with fewer than k are searched again for more.
        """
        everything = min(len(self._stored.x), 2048) if self._on_gpu else len(self._stored.x)
        # An index of compressed vectors finds approximately: more of them are compared in full precision.
        uncompressed = re.search(r"(^|,)(Flat|HNSW\d+)$", self.name) is not None
        count = (2 * k + 32 if self._on_gpu else k + max(4, k // 8)) if uncompressed else 4 * k + 16
        count = min(count + min(most, MAX_UNMASKED), everything)
        found, done = nothing_found(queries, k), torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        while True:
            rows = (~done).nonzero().squeeze(1)
            remaining = queries[rows]
            product, position = self._fetch(remaining, count)
            part = ranked(remaining, self._stored, position, k, exclude_rows(exclude, rows))
            found.similarity[rows], found.position[rows] = part
            if self.name == "Flat":
                error = product_error(remaining, self._stored, operand_error=2.0**-10 if self._on_gpu else 0.0)
                done[rows] = is_complete(part, product, error, count >= len(self._stored.x))
            else:
                done[rows] = part.position[:, -1] >= 0
            if done.all() or most <= MAX_UNMASKED or count >= min(MAX_FETCHED, everything):
                return found, done
            count = min(4 * count, everything)

    def _fetch(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self._graph is not None:
            self._graph.efSearch = max(64, 2 * count)
        if self._lists is not None:
            self._lists.nprobe = min(self.probes, self._lists.nlist)
        product, position = self._index.search(self._input(queries.contiguous()), count)
        return product.to(queries.device), position.to(queries.device)


def _from_factory(name: str, dim: int) -> Any:
    """Return an empty index of faiss by its factory string."""
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
    """Return the index inside those that only transform or renumber vectors."""
    faiss = _faiss()
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index


def _reason(error: RuntimeError) -> str:
    """Return the message of faiss without the line of its source."""
    message = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error), flags=re.DOTALL)
    return re.sub(r"^Error: '.*?' failed:? ?", "", message).strip().rstrip(".") or message.strip()


@cache
def _faiss() -> Any:
    # torch is imported first: in the other order the two libraries have crashed. With torch_utils faiss takes tensors.
    import faiss
    import faiss.contrib.torch_utils

    return faiss


_resources: dict[int, Any] = {}


def _gpu_resources(number: int) -> Any:
    """Return faiss's temporary memory on a GPU, one for all indices: by default each would allocate 1.5 GB."""
    if number not in _resources:
        _resources[number] = _faiss().StandardGpuResources()
        _resources[number].setTempMemory(2**28)
    return _resources[number]
