"""Hard negatives against sorting in plain loops, what is excluded, and when they are searched."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import contrast
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Bank, HardNegatives
from tests.memory.model import DIM, anchor, rows_of, saved_and_loaded

SAMPLES = 12


def nearest_of_other_groups(bank, sample, k):
    """Return the nearest samples of other groups by sorting, padded with -1."""
    z, group = bank.tensors["z"].double(), bank.tensors["group"]
    others = [other for other in bank.known.tolist() if group[other] != group[sample] and other != sample]
    nearest = sorted(others, key=lambda other: (-(z[sample] * z[other]).sum().float().item(), other))[:k]
    return nearest + [-1] * (k - len(nearest))


@given(
    updates=st.lists(st.lists(st.integers(0, SAMPLES - 1), max_size=SAMPLES, unique=True), max_size=4),
    labels=st.sampled_from([1, 2, 3, SAMPLES]),
    k=st.integers(1, SAMPLES - 1),
    index=st.sampled_from(["exact", "auto", "Flat"]),
)
def test_the_table_is_what_sorting_finds(updates, labels, k, index):
    bank = Bank(SAMPLES, DIM)
    hard = HardNegatives(bank, k, index=index)
    for seed, sample in enumerate(updates):
        hard.update(rows_of(sample, seed, labels=labels))
    hard.end_epoch()
    known = bank.known.tolist()
    for sample in range(SAMPLES):
        expected = nearest_of_other_groups(bank, sample, k) if sample in known else [-1] * k
        assert hard.table[sample].tolist() == expected


@given(
    updates=st.lists(st.lists(st.integers(0, SAMPLES - 1), max_size=SAMPLES, unique=True), max_size=4),
    batch=st.lists(st.integers(0, SAMPLES - 1), max_size=5, unique=True),
    labels=st.sampled_from([2, 3, SAMPLES]),
)
def test_the_own_sample_and_group_are_never_retrieved(updates, batch, labels):
    hard = HardNegatives(Bank(SAMPLES, DIM), 4)
    for seed, sample in enumerate(updates):
        hard.update(rows_of(sample, seed, labels=labels))
    hard.refresh()
    group = torch.arange(SAMPLES) % labels
    found = hard.candidates(anchor(batch, labels=labels))
    table = hard.table[batch]
    assert found.sample.tolist() == sorted({int(one) for row in table for one in row if one >= 0})
    for sample, row in zip(batch, table, strict=True):
        assert all(one < 0 or group[one] != group[sample] for one in row.tolist())
    assert torch.equal(found.z, hard.bank.tensors["z"][found.sample])
    # A sample retrieved for another anchor is neither negative nor positive in its own row.
    if batch:
        index, criterion = torch.tensor(batch), InfoNCE()
        criterion(*torch.randn(2, len(batch), DIM), sample=index, group=group[index], extra=[hard])
        counts = {"negatives": 0, "positives": 0}
        for sample in batch:
            for other in [*batch, *batch, *found.sample.tolist()]:
                if other != sample:
                    counts["positives" if group[other] == group[sample] else "negatives"] += 1
        assert criterion.metrics["negatives"] == pytest.approx(counts["negatives"] / len(batch))
        assert criterion.metrics["positives"] == pytest.approx(1 + counts["positives"] / len(batch))


def full(refresh="1 epochs", **options):
    hard = HardNegatives(Bank(SAMPLES, DIM), 3, refresh, **options)
    hard.update(rows_of(range(SAMPLES), 0, labels=SAMPLES))
    return hard


def test_the_similarities_of_heads_are_added():
    bank = Bank(SAMPLES, DIM, heads=2)
    hard = HardNegatives(bank, 2)
    hard.update(rows_of(range(SAMPLES), 0, heads=2, labels=SAMPLES))
    hard.refresh()
    similarity = torch.einsum("hid,hjd->ij", bank.tensors["z"], bank.tensors["z"]).fill_diagonal_(-torch.inf)
    assert torch.equal(hard.table, similarity.topk(2).indices)
    assert hard.candidates(anchor([3, 4], heads=2)).z.shape == (2, len(hard.table[[3, 4]].unique()), DIM)


def test_it_searches_at_an_interval_of_epochs():
    hard = full("2 epochs")
    assert not len(hard.candidates(anchor([1])))
    hard.end_epoch()
    assert not len(hard.candidates(anchor([1])))
    hard.end_epoch()
    assert len(hard.candidates(anchor([1]))) == 3
    before = hard.table
    hard.update(rows_of(range(SAMPLES), 7, labels=SAMPLES))
    hard.end_epoch()
    assert torch.equal(hard.table, before)
    hard.end_epoch()
    assert not torch.equal(hard.table, before)


def test_it_searches_at_an_interval_of_steps():
    hard = full("3 steps")
    assert not len(hard.candidates(anchor([1])))
    hard.update(rows_of([1], 1, labels=SAMPLES))
    hard.end_epoch()
    assert not len(hard.candidates(anchor([1])))
    hard.update(rows_of([1], 2, labels=SAMPLES))
    assert len(hard.candidates(anchor([1]))) == 3
    assert hard.refreshed_at == 3
    assert hard.metrics["mined"] == 3
    assert hard.search_seconds > 0


def test_a_call_inside_local_does_not_search():
    hard = full("1 steps")
    with contrast.local():
        assert not len(hard.candidates(anchor([1])))
    assert len(hard.candidates(anchor([1]))) == 3


def test_candidates_are_the_newest_embeddings():
    hard = full()
    hard.refresh()
    hard.update(rows_of(range(SAMPLES), 7, labels=SAMPLES))
    found = hard.candidates(anchor([1]))
    assert torch.equal(found.z, rows_of(range(SAMPLES), 7).z[found.sample])


def test_a_resumed_run_equals_one_without_interruption_bit_for_bit():
    def train(hard, steps):
        found = []
        for step in steps:
            found.append(hard.candidates(anchor([step % SAMPLES, (5 * step) % SAMPLES])).z)
            hard.update(rows_of([(step * k) % SAMPLES for k in (1,)] + [(step + 3) % SAMPLES], step, labels=SAMPLES))
            if step % 4 == 3:
                hard.end_epoch()
        return found

    for refresh in ("1 epoch", "3 steps"):
        complete = full(refresh)
        uninterrupted = train(complete, range(20))
        first = full(refresh)
        train(first, range(10))
        resumed = HardNegatives(Bank(SAMPLES, DIM), 3, refresh)
        resumed.load_state_dict(saved_and_loaded(first.state_dict()))
        for actual, expected in zip(train(resumed, range(10, 20)), uninterrupted[10:], strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(resumed.table, complete.table)


def test_a_copy_has_its_own_bank():
    hard = full()
    other = copy.deepcopy(hard)
    other.update(rows_of([1], 5, labels=SAMPLES))
    assert hard.bank.updates == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardNegatives(Bank(5, DIM), 5), "neighbours must be from 1 to 4, fewer than the bank's 5 .* got 5"),
        (lambda: HardNegatives(Bank(5, DIM), 0), "neighbours must be from 1 to 4"),
        (lambda: full("weekly"), "'1 epochs' or '200 steps'; got 'weekly'"),
        (lambda: full("0 steps"), "'1 epochs' or '200 steps'; got '0 steps'"),
        (lambda: full("1.5 epochs"), "got '1.5 epochs'"),
        (lambda: full().candidates(anchor([SAMPLES])), r"must be in \[0, 12\), the bank's samples; got 12"),
        (lambda: full(index="IVFnonsense").refresh(), "IVFnonsense"),
        (lambda: InfoNCE()(*torch.randn(2, 4, DIM), extra=[full()]), r"call loss\(..., sample=index"),
        (
            lambda: full().load_state_dict(HardNegatives(Bank(SAMPLES, DIM), 2).state_dict()),
            "HardNegatives has neighbours 3 and",
        ),
    ],
)
def test_wrong_arguments_and_calls_raise_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_it_is_built_from_a_config():
    hard = MEMORIES.build(
        {"name": "hard_negatives", "neighbours": 2, "bank": {"name": "bank"}}, samples=SAMPLES, dim=DIM, heads=None
    )
    assert isinstance(hard.bank, Bank) and hard.stores() == [hard.bank]


def test_a_wrong_index_is_refused_by_the_constructor():
    bank = Bank(600, dim=8)
    with pytest.raises(ValueError, match="faiss does not take 'Flatt'"):
        HardNegatives(bank, 4, index="Flatt")
    with pytest.raises(ValueError, match="trains on 1,024 vectors or more, and the bank has 600 samples"):
        HardNegatives(bank, 4, index="IVF1024,Flat")


def test_the_search_is_exact_while_the_bank_has_fewer_vectors_than_the_index_trains_on(monkeypatch):
    bank, indices = Bank(600, dim=8), []
    hard = HardNegatives(bank, 4, index="IVF64,Flat")
    build = bank.search_index
    monkeypatch.setattr(bank, "search_index", lambda index, **more: indices.append(index) or build(index, **more))
    for first, last in ((0, 63), (63, 64)):
        bank.update(torch.randn(last - first, 8), sample=torch.arange(first, last))
        hard.refresh()
    assert indices == ["exact", "IVF64,Flat"]
