"""The bank against a dictionary of the newest embeddings, and its errors."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from contrast.core.embeddings import REMEMBERED
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Bank, sharding
from contrast.memory.bank import AsyncIndexCheck
from tests.memory.model import DIM, PlainBank, anchor, entries, rows_of, samples_of_updates, saved_and_loaded

SAMPLES = 12


@example(updates=[[*range(SAMPLES)], [0], [SAMPLES - 1]], heads=None)  # all samples, then the first and the last again
@example(updates=[[], [0], []], heads=2)
@given(updates=samples_of_updates, heads=st.sampled_from([None, 1, 2]))
def test_any_updates_leave_what_a_plain_dictionary_contains(updates, heads):
    bank, plain = Bank(SAMPLES, DIM, heads), PlainBank()
    for seed, sample in enumerate(updates):
        rows = rows_of(sample, seed, heads=heads, labels=2 + seed)
        bank.update(rows)
        plain.update(rows.z, rows.sample, rows.group)
        found = bank.candidates(anchor(heads=heads))
        assert entries(found) == sorted((row, one, group) for one, (row, group, _) in plain.entries.items())
        assert (found.view == REMEMBERED).all()
        ages = [plain.step - plain.entries[one][2] if one in plain.entries else -1 for one in range(SAMPLES)]
        assert bank.age.tolist() == ages
        assert bank.known.tolist() == sorted(plain.entries)
        known = [age for age in ages if age >= 0]
        assert bank.metrics["bank"] == len(known)
        assert bank.metrics["bank_age"] == pytest.approx(sum(known) / max(len(known), 1))


@example(updates=[], more=[[SAMPLES - 1]])
@example(updates=[[*range(SAMPLES)]], more=[[], [0]])
@given(updates=samples_of_updates, more=samples_of_updates)
def test_a_resumed_bank_equals_one_without_interruption_bit_for_bit(updates, more):
    uninterrupted, resumed = Bank(SAMPLES, DIM, reference_dim=2), Bank(SAMPLES, DIM, reference_dim=2)
    for seed, sample in enumerate(updates):
        uninterrupted.update(rows_of(sample, seed, reference=2))
    resumed.load_state_dict(saved_and_loaded(uninterrupted.state_dict()))
    for seed, sample in enumerate(more):
        for bank in (uninterrupted, resumed):
            bank.update(rows_of(sample, 50 + seed, reference=2))
    expected, actual = uninterrupted.candidates(anchor()), resumed.candidates(anchor())
    for name in ("z", "sample", "group", "reference"):
        assert torch.equal(getattr(expected, name), getattr(actual, name))
    assert torch.equal(uninterrupted.age, resumed.age)


def full(seed=0):
    bank = Bank(SAMPLES, DIM)
    bank.update(rows_of(list(range(SAMPLES)), seed, labels=SAMPLES))
    return bank


def test_the_own_sample_in_the_bank_is_neither_negative_nor_positive():
    criterion = InfoNCE(0.2)
    criterion(*torch.randn(2, 4, DIM), sample=torch.arange(4), extra=[full()])
    assert criterion.metrics["negatives"] == 6 + SAMPLES - 1
    assert criterion.metrics["positives"] == 1


@pytest.mark.parametrize("bank", [full(), Bank(SAMPLES, DIM)], ids=["full", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_before_the_backward_pass_raises_an_error_that_says_so(bank, dtype):
    index = torch.arange(4)
    loss = InfoNCE(0.2)(*torch.randn(2, 4, DIM, dtype=dtype).requires_grad_(), sample=index, extra=[bank])
    bank.update(torch.randn(4, DIM), sample=index)
    with pytest.raises(RuntimeError, match=r"call a memory's update\(...\) after loss.backward\(\)"):
        loss.backward()


def test_a_full_bank_is_not_copied():
    bank = full()
    assert bank.candidates(anchor()).z.data_ptr() == bank.tensors["z"].data_ptr()


def test_a_full_bank_that_loads_an_earlier_checkpoint_gives_its_samples_only():
    bank, earlier = full(), Bank(SAMPLES, DIM)
    bank.candidates(anchor())
    earlier.update(rows_of([2, 7], 1))
    bank.load_state_dict(saved_and_loaded(earlier.state_dict()))
    assert bank.candidates(anchor()).sample.tolist() == [2, 7]


@pytest.mark.parametrize("cast", [lambda x: x.half(), lambda x: x.double()])
def test_casts_do_not_change_it_and_copies_are_independent(cast):
    bank = full()
    other = cast(copy.deepcopy(bank))
    assert torch.equal(other.candidates(anchor()).z, bank.candidates(anchor()).z)
    other.update(rows_of([4, 5], 1))
    assert bank.age.tolist() == [0] * SAMPLES


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.update(rows_of([3, 1, 3], 0)), "sample 3 occurs twice in this update"),
        (lambda b: b.update(rows_of([3, 12], 0)), r"must be in \[0, 12\), since this bank has samples=12; got 12"),
        (lambda b: b.update(torch.randn(1, 3), sample=torch.tensor([-4])), "from 0; got -4"),
        (lambda b: b.update(torch.randn(1, 4), sample=torch.tensor([4])), r"stores \(N, 3\) embeddings; got \(1, 4\)"),
        (lambda b: b.load_state_dict(Bank(5, 3).state_dict()), "this Bank has samples 12 and the checkpoint's has 5"),
        (lambda b: InfoNCE()(*torch.randn(2, 4, 3), extra=[b]), r"call loss\(..., sample=index, extra=\[memory\]\)"),
        (lambda b: Bank(0, 3), "samples must be 1 or more, the size of the data set; got 0"),
    ],
)
def test_wrong_calls_raise_one_sentence(call, message):
    bank = full()
    before = bank.tensors["z"].clone()
    with pytest.raises(ValueError, match=message) as caught:
        call(bank)
    assert "\n" not in str(caught.value)
    assert torch.equal(bank.tensors["z"], before)


@pytest.mark.parametrize("sample", [[3, 1, 3], [12, 1], [-1, 2]])
def test_on_an_accelerator_a_later_update_names_what_was_wrong(sample):
    check = AsyncIndexCheck(SAMPLES)
    for correct in ([0, 1], [], [2]):
        assert check(torch.tensor(correct, dtype=torch.int64)).tolist() == correct
    found = check(torch.tensor(sample))
    assert found.min() >= 0 and found.max() < SAMPLES
    check._on_host.zero_()  # as while the device has not computed it yet
    check(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"an earlier update of this bank had .* one outside \[0, 12\)"):
        check(torch.tensor([4]))


def test_a_bank_larger_than_the_free_memory_is_refused_with_figures(monkeypatch):
    monkeypatch.setattr(sharding, "free_bytes", lambda: 3 * 2**30)
    with pytest.raises(ValueError, match=r"10000000 samples at 512 bytes needs 4.8 GiB, and 3.0 GiB of memory"):
        Bank(10_000_000, 128)
    monkeypatch.setenv("WORLD_SIZE", "8")
    Bank(10, 128)
    with pytest.raises(ValueError, match=r"needs 47.7 GiB, 6.0 GiB on each of 8 processes, and 3.0 GiB"):
        Bank(100_000_000, 128)
    with pytest.raises(ValueError, match=r"needs 4.8 GiB, and 3.0 GiB"):
        Bank(10_000_000, 128, bytes_per_process=2**40)


def test_the_free_memory_is_plausible():
    free = sharding.free_bytes()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("alias", ["memory_bank", "instance_discrimination"])
def test_an_alias_raises_an_error_with_the_right_name(alias):
    with pytest.raises(ValueError, match=f"the memory '{alias}' is called 'bank' here"):
        MEMORIES[alias]
