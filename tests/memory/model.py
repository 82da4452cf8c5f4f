"""Queue and bank in plain Python, and random rows for both."""

import io

import torch
from hypothesis import strategies as st

from contrast.core.embeddings import Embeddings, normalise

DIM = 3


class PlainQueue:
    """A list of (vector, sample, group) from which the oldest are removed.

    Args:
        size: how many it stores at most.
    """

    def __init__(self, size):
        self.size, self.entries = size, []

    def update(self, z, sample, group):
        for row, row_sample, row_group in zip(z.movedim(-2, 0), sample.tolist(), group.tolist(), strict=True):
            self.entries.append((row.tolist(), row_sample, row_group))
            if len(self.entries) > self.size:
                self.entries.pop(0)


class PlainBank:
    """A dictionary sample -> (vector, group, the step in which it was written)."""

    def __init__(self):
        self.entries, self.step = {}, 0

    def update(self, z, sample, group):
        self.step += 1
        for row, row_sample, row_group in zip(z.movedim(-2, 0), sample.tolist(), group.tolist(), strict=True):
            self.entries[row_sample] = (row.tolist(), row_group, self.step)


def entries(embeddings):
    """Return embeddings as a sorted list of (vector, sample, group)."""
    rows = zip(embeddings.z.movedim(-2, 0), embeddings.sample.tolist(), embeddings.group.tolist(), strict=True)
    return sorted((row.tolist(), sample, group) for row, sample, group in rows)


def rows_of(sample, seed, *, heads=None, labels=3, reference=None):
    """Return random unit embeddings of these samples."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sample), DIM) if heads is None else (heads, len(sample), DIM)
    sample = torch.tensor(sample, dtype=torch.int64)
    vectors = None
    if reference is not None:
        vectors = normalise(torch.randn(len(sample), reference, generator=generator))
    z = normalise(torch.randn(shape, generator=generator))
    return Embeddings(z, sample, sample % labels, torch.zeros_like(sample), vectors)


def anchor(sample=(), **options):
    """Return anchors of these samples."""
    return rows_of(list(sample), seed=99, **options)


samples_of_updates = st.lists(st.lists(st.integers(0, 11), max_size=12, unique=True), max_size=7)
"""Some updates, each the samples of its rows: from none to more than a small queue stores."""


def saved_and_loaded(state):
    """Return a state dict as `torch.load` reads it from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
