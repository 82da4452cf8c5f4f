"""Search of vectors: exact, by the indices of FAISS, and k-means."""

from contrast.retrieval.search import (
    Clusters,
    Found,
    Index,
    auto_index,
    build_index,
    default_lists,
    default_probes,
    has_faiss,
    kmeans,
    least_vectors,
    merge,
    nearest,
)

__all__ = [
    "Clusters",
    "Found",
    "Index",
    "auto_index",
    "build_index",
    "default_lists",
    "default_probes",
    "has_faiss",
    "kmeans",
    "least_vectors",
    "merge",
    "nearest",
]
