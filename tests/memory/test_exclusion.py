"""Remembered embeddings are never negatives or positives of their own sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.embeddings import REMEMBERED, Embeddings, normalise
from contrast.losses import InfoNCE
from contrast.memory import Bank, HardNegatives, Queue
from tests.memory.model import DIM, rows_of

SAMPLES = 12
MAKE = {
    "queue": lambda: Queue(9, DIM),
    "bank": lambda: Bank(SAMPLES, DIM),
    "hard_negatives": lambda: HardNegatives(Bank(SAMPLES, DIM), 3, "1 steps"),
}


@given(
    kinds=st.lists(st.sampled_from(sorted(MAKE)), min_size=1, max_size=3),
    updates=st.lists(st.lists(st.integers(0, SAMPLES - 1), max_size=8, unique=True), max_size=4),
    batch=st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=5, unique=True),
    labels=st.sampled_from([2, 3, SAMPLES]),
    targets=st.booleans(),
)
def test_an_entry_of_the_own_sample_is_neither_negative_nor_positive(kinds, updates, batch, labels, targets):
    memories = [MAKE[kind]() for kind in kinds]
    for seed, sample in enumerate(updates):
        for memory in memories:
            memory.update(rows_of(sample, seed, labels=labels))
    index = torch.tensor(batch)
    z_a, z_b = torch.randn(2, len(batch), DIM)
    options = {"targets": (z_b, z_a)} if targets else {}
    (pairs,) = InfoNCE().pairs(z_a, z_b, sample=index, group=index % labels, extra=memories, **options)
    start = 2 * len(batch)
    sample = torch.cat([part.sample for part in pairs.candidates[2:]])
    assert all((part.view == REMEMBERED).all() for part in pairs.candidates[2:])
    relations = {name: pairs.relation(name)[:, start:] for name in ("negative", "positive", "remembered")}
    for row, own in enumerate(pairs.anchor.sample.tolist()):
        for column, other in enumerate(sample.tolist()):
            same_label = own % labels == other % labels
            found = {name for name, relation in relations.items() if relation[row, column]}
            assert found == (set() if own == other else {"positive"} if same_label else {"negative", "remembered"})


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("groups", [None, torch.full((SAMPLES,), -1)], ids=["no group", "negative group"])
@pytest.mark.parametrize("as_embeddings", [False, True])
def test_entries_stored_without_a_label_are_positives_of_no_label(kind, groups, as_embeddings):
    """Sample indices and labels are numbers of the same range: sample 1 is not of class 1."""
    memory, every = MAKE[kind](), torch.arange(SAMPLES)
    z, unlabelled = torch.randn(SAMPLES, DIM), torch.full((SAMPLES,), -1)
    if as_embeddings:
        memory.update(Embeddings(normalise(z), every, unlabelled, torch.zeros_like(every)))
    else:
        memory.update(z, sample=every, group=groups)
    memory.end_epoch()
    index, criterion = torch.tensor([3, 4, 5, 6]), InfoNCE()
    criterion(*torch.randn(2, 4, DIM), sample=index, group=torch.tensor([0, 1, 2, 3]), extra=[memory])
    assert criterion.metrics["positives"] == 1
    stored = memory.candidates(rows_of(index.tolist(), 0))
    assert len(stored) >= 3, "the unlabelled are retrieved too: they are not one group"
    own = (stored.sample == index[:, None]).sum(dim=1).double().mean()
    assert criterion.metrics["negatives"] == 6 + len(stored) - own
