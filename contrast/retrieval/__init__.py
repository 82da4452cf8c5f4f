"""Nearest-neighbour search of vectors, exact or by the indices of FAISS, and k-means; needs torch and numpy only."""

from contrast.retrieval.indices import (
    Index,
    auto_index,
    build_index,
    default_lists,
    default_probes,
    has_faiss,
    least_vectors,
)
from contrast.retrieval.kmeans import Clusters, kmeans
from contrast.retrieval.search import Found, exact_search, merge

__all__ = [
    "Clusters",
    "Found",
    "Index",
    "auto_index",
    "build_index",
    "default_lists",
    "default_probes",
    "exact_search",
    "has_faiss",
    "kmeans",
    "least_vectors",
    "merge",
]
