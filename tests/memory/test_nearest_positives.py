"""Nearest-neighbour positives against plain loops, and NNCLR's formula."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.embeddings import normalise
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Bank, NearestPositives, Queue, nearest_views
from tests.memory.model import DIM, anchor, rows_of

SAMPLES = 12


def neighbour(stored, query, sample):
    """Return the position of the nearest entry of another sample, by comparing all; None where there is none."""
    others = [place for place in range(len(stored)) if stored.sample[place] != sample]
    return max(others, key=lambda place: float(stored.z[place].double() @ query.double()), default=None)


def is_mutual(stored, place, sample, k):
    others = [other for other in range(len(stored)) if stored.sample[other] != stored.sample[place]]
    nearest = sorted(others, key=lambda other: -float(stored.z[other].double() @ stored.z[place].double()))[:k]
    return sample in [int(stored.sample[other]) for other in nearest]


@given(
    updates=st.lists(st.lists(st.integers(0, SAMPLES - 1), max_size=6, unique=True), max_size=4),
    batch=st.lists(st.integers(0, SAMPLES - 1), max_size=5, unique=True),
    kind=st.sampled_from(["queue", "bank"]),
    mutual=st.integers(0, 3),
)
def test_each_anchor_s_neighbour_is_the_nearest_of_another_sample(updates, batch, kind, mutual):
    store = Queue(9, DIM) if kind == "queue" else Bank(SAMPLES, DIM)
    memory = NearestPositives(store, mutual)
    for seed, sample in enumerate(updates):
        memory.update(rows_of(sample, seed))
    queries = rows_of(batch, 77)
    found = memory.positives(queries)
    stored = store.candidates(anchor())
    if not len(stored):
        assert found is None
        return
    for name in ("sample", "group", "view"):
        assert torch.equal(getattr(found, name), getattr(queries, name))
    replaced = 0
    for row, sample in enumerate(batch):
        place = neighbour(stored, queries.z[row], sample)
        if place is not None and mutual and not is_mutual(stored, place, sample, mutual):
            place = None
        replaced += place is not None
        assert torch.equal(found.z[row], queries.z[row] if place is None else stored.z[place])
    assert memory.metrics["neighbours"] == pytest.approx(replaced / max(len(batch), 1))
    assert len(memory.candidates(queries)) == 0


def test_a_step_equals_the_formula_of_nnclr():
    generator = torch.Generator().manual_seed(0)
    memory = NearestPositives(Queue(16, DIM))
    z_a, z_b, p_a, p_b = torch.randn(4, 5, DIM, generator=generator).requires_grad_().unbind()
    index = torch.arange(5)
    assert nearest_views(memory, (z_a, z_b), index) is None
    memory.update(torch.randn(10, DIM, generator=generator), sample=torch.arange(3, 13))
    anchors = nearest_views(memory, (z_a, z_b), index)
    assert not any(one.requires_grad for one in anchors)
    criterion = InfoNCE(0.2, candidates="across")
    loss = criterion(*anchors, targets=(p_a, p_b), sample=index, extra=[memory])
    total = 0
    for z, p in ((z_a, p_b), (z_b, p_a)):
        stored = memory.store.candidates(anchor())
        rows = [stored.z[neighbour(stored, normalise(z.detach())[row], row)] for row in range(5)]
        total = total + F.cross_entropy(torch.stack(rows) @ F.normalize(p, dim=1).T / 0.2, index)
    torch.testing.assert_close(loss, total / 2)
    found = torch.autograd.grad(loss, [p_a, p_b])
    for one, other in zip(found, torch.autograd.grad(total / 2, [p_a, p_b]), strict=True):
        torch.testing.assert_close(one, other)


def test_heads_and_float64_are_accepted():
    memory = NearestPositives(Queue(8, DIM, heads=2))
    memory.update(rows_of(range(6), 0, heads=2))
    anchors = nearest_views(
        memory, torch.randn(2, 2, 4, DIM, dtype=torch.float64), torch.arange(4), torch.arange(4) % 2
    )
    assert [one.shape for one in anchors] == [(2, 4, DIM)] * 2
    assert anchors[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NearestPositives(Queue(4, DIM), -1), "mutual must be from 0 to 3, .* got -1"),
        (
            lambda: NearestPositives(Bank(4, DIM), 4),
            "mutual must be from 0 to 3, below the size .* 4; got 4",
        ),
        (
            lambda: nearest_views(NearestPositives(Queue(4, DIM)), torch.randn(2, 2, DIM), torch.tensor([-1, 0])),
            r"call loss\(..., sample=index",
        ),
    ],
)
def test_wrong_arguments_raise_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_is_built_from_a_config():
    memory = MEMORIES.build(
        {"name": "nearest_positives", "store": {"name": "queue", "size": 8}}, dim=DIM, samples=SAMPLES, heads=None
    )
    assert isinstance(memory.store, Queue) and memory.stores() == [memory.store]
    with pytest.raises(ValueError, match="the memory 'nnclr' is called 'nearest_positives' here"):
        MEMORIES["nnclr"]
