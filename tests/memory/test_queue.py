"""The queue against a list from which the oldest are removed, and its errors."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from contrast.core.embeddings import REMEMBERED, UNLABELLED, normalise
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Queue
from tests.memory.model import DIM, PlainQueue, anchor, entries, rows_of, samples_of_updates, saved_and_loaded


@example(updates=[[0, 1, 2], [3, 4, 5]], size=6, heads=None)  # filled exactly
@example(updates=[[0, 1, 2], [3, 4, 5], [6, 7, 8]], size=6, heads=2)  # the next update starts at the first entry
@example(updates=[[0, 1, 2], [3, 4, 5]], size=5, heads=None)  # wraps by one row
@example(updates=[[0], [1, 2, 3, 4, 5, 6, 7, 8]], size=3, heads=None)  # a batch larger than the queue
@example(updates=[[0], [1, 2, 3, 4]], size=4, heads=1)  # a batch as large as the queue
@example(updates=[[], [0], []], size=1, heads=None)
@given(updates=samples_of_updates, size=st.integers(1, 14), heads=st.sampled_from([None, 1, 2]))
def test_any_updates_leave_what_a_plain_list_contains(updates, size, heads):
    queue, plain = Queue(size, DIM, heads), PlainQueue(size)
    for seed, sample in enumerate(updates):
        rows = rows_of(sample, seed, heads=heads)
        queue.update(rows)
        plain.update(rows.z, rows.sample, rows.group)
        found = queue.candidates(anchor(heads=heads))
        assert entries(found) == sorted(plain.entries)
        assert queue.filled == queue.metrics["queue"] == len(found) == len(plain.entries)
        assert (found.view == REMEMBERED).all()


@example(updates=[[0, 1, 2]], more=[[3, 4]], size=3)  # saved when filled exactly
@example(updates=[[0, 1], [2, 3]], more=[[4]], size=3)  # saved after it wrapped by one row
@example(updates=[], more=[[0, 1, 2]], size=2)
@given(updates=samples_of_updates, more=samples_of_updates, size=st.integers(1, 14))
def test_a_resumed_queue_equals_one_without_interruption_bit_for_bit(updates, more, size):
    uninterrupted, resumed = Queue(size, DIM, reference_dim=2), Queue(size, DIM, reference_dim=2)
    for seed, sample in enumerate(updates):
        uninterrupted.update(rows_of(sample, seed, reference=2))
    resumed.load_state_dict(saved_and_loaded(uninterrupted.state_dict()))
    for seed, sample in enumerate(more):
        for queue in (uninterrupted, resumed):
            queue.update(rows_of(sample, 50 + seed, reference=2))
    expected, actual = uninterrupted.candidates(anchor()), resumed.candidates(anchor())
    for name in ("z", "sample", "group", "reference"):
        assert torch.equal(getattr(expected, name), getattr(actual, name))
    assert (uninterrupted.position, uninterrupted.updates) == (resumed.position, resumed.updates)


def test_a_checkpoint_is_a_copy():
    queue = Queue(4, DIM)
    queue.update(rows_of([0, 1, 2, 3], 0))
    state = queue.state_dict()
    before = copy.deepcopy(state)
    queue.update(rows_of([4, 5], 1))
    assert torch.equal(state["_extra_state"]["tensors"]["z"], before["_extra_state"]["tensors"]["z"])


def test_plain_tensors_are_scaled_to_unit_length_and_are_unlabelled_without_a_group():
    queue, z, index = Queue(4, DIM), torch.randn(2, DIM), torch.tensor([5, 3])
    queue.update(z.requires_grad_(), sample=index)
    found = queue.candidates(anchor())
    assert torch.equal(found.z, normalise(z.detach()))
    assert not found.z.requires_grad
    assert found.sample.tolist() == [5, 3]
    assert found.group.tolist() == [UNLABELLED - 5, UNLABELLED - 3]
    queue.update(z, sample=index, group=torch.tensor([0, -1]))
    assert queue.candidates(anchor()).group[2:].tolist() == [0, UNLABELLED - 3]


def test_the_own_sample_in_the_queue_is_neither_negative_nor_positive():
    queue, criterion = Queue(8, DIM), InfoNCE(0.2)
    index = torch.arange(4)
    z_a, z_b = torch.randn(2, 4, DIM)
    queue.update(torch.randn(3, DIM), sample=torch.tensor([2, 9, 2]))
    criterion(z_a, z_b, sample=index, extra=[queue])
    # Two views of 3 other samples, and 3 entries; 2 entries are of sample 2, one of the 4 anchors' samples.
    assert criterion.metrics["negatives"] == 3 * 2 + 3 - 2 / 4
    assert criterion.metrics["positives"] == 1


def a_step(queue, dtype=torch.float32):
    z = torch.randn(2, 4, DIM, dtype=dtype).requires_grad_()
    index = torch.arange(4)
    queue.update(torch.randn(4, DIM), sample=index + 10)
    return InfoNCE(0.2)(*z, sample=index, extra=[queue]), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: 2 * loss + 1])
def test_an_update_before_the_backward_pass_raises_an_error_that_says_so(dtype, wrap):
    queue = Queue(6, DIM)
    loss, index = a_step(queue, dtype)
    queue.update(torch.randn(4, DIM), sample=index)
    with pytest.raises(RuntimeError, match=r"call a memory's update\(...\) after loss.backward\(\)"):
        wrap(loss).backward()


def test_an_update_before_the_backward_pass_raises_an_error_where_the_loss_got_embeddings():
    queue, index = Queue(6, DIM), torch.arange(4)
    queue.update(torch.randn(4, DIM), sample=index + 10)
    z = torch.randn(2, 4, DIM).requires_grad_()
    loss = InfoNCE(0.2)(*z, sample=index, extra=[queue.candidates(anchor([0]))])
    queue.update(torch.randn(4, DIM), sample=index)
    with pytest.raises(RuntimeError, match=r"call a memory's update\(...\) after loss.backward\(\)"):
        loss.backward()


def test_an_update_after_a_loss_without_a_backward_pass_is_allowed():
    queue = Queue(6, DIM)
    _, index = a_step(queue)
    queue.update(torch.randn(4, DIM), sample=index)
    with torch.no_grad():
        a_step(queue)
    queue.update(torch.randn(4, DIM), sample=index)
    loss, index = a_step(queue)
    loss.backward()
    queue.update(torch.randn(4, DIM), sample=index)
    # Three steps, each with an update of its own before the loss.
    assert queue.updates == 6


@pytest.mark.parametrize("cast", [lambda x: x.half(), lambda x: x.double(), lambda x: x.to("cpu", torch.bfloat16)])
def test_casts_do_not_change_it_and_copies_are_independent(cast):
    queue = Queue(5, DIM)
    queue.update(rows_of([1, 2, 3], 0))
    other = cast(copy.deepcopy(queue))
    assert torch.equal(other.candidates(anchor()).z, queue.candidates(anchor()).z)
    other.update(rows_of([4, 5], 1))
    assert queue.filled == 3


def test_it_moves_to_the_device_of_the_embeddings():
    queue = Queue(5, DIM).to("meta")
    assert queue.tensors["z"].device.type == "meta"
    queue = Queue(5, DIM)
    queue.move_to(torch.device("meta"))
    assert {tensor.device.type for tensor in queue.tensors.values()} == {"meta"}


def test_references_are_stored_where_the_queue_has_a_width_for_them():
    queue, plain = Queue(5, DIM, reference_dim=2), Queue(5, DIM)
    rows = rows_of([1, 2], 0, reference=2)
    queue.update(rows)
    plain.update(rows)
    assert torch.equal(queue.candidates(anchor()).reference, rows.reference)
    assert plain.candidates(anchor()).reference is None


INDEX = torch.arange(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be 1 or more; got 0"),
        ({"dim": 0}, "dim must be 1 or more; got 0"),
        ({"heads": 0}, "heads must be 1 or more; got 0"),
        ({"reference_dim": 0}, "reference_dim must be 1 or more; got 0"),
    ],
)
def test_wrong_arguments_raise_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        Queue(**{"size": 4, "dim": DIM, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: q.update(torch.randn(2, 4), sample=INDEX), r"stores \(N, 3\) embeddings; got \(2, 4\)"),
        (lambda q: q.update(torch.randn(2, 2, 3), sample=INDEX), r"stores \(N, 3\) embeddings; got \(2, 2, 3\)"),
        (lambda q: q.update(torch.randn(2, 3)), r"call update\(z, sample=index\) with indices in the data set"),
        (lambda q: q.update(torch.randn(2, 3), sample=-1 - INDEX), "indices in the data set, from 0; got -2"),
        (lambda q: q.update(torch.randn(2, 3), sample=torch.arange(3)), r"sample must be \(2,\) whole numbers"),
        (lambda q: q.update(INDEX, sample=INDEX), "update takes Embeddings, or a floating"),
        (lambda q: q.update([1.0]), "update takes Embeddings, or a floating .* got list"),
        (lambda q: q.update(torch.full((2, 3), torch.nan), sample=INDEX), "values that are not finite"),
        (lambda q: q.update(rows_of([1], 0), sample=INDEX), "Embeddings have a sample"),
        (lambda q: InfoNCE()(*torch.randn(2, 4, 3), extra=[q]), r"call loss\(..., sample=index, extra=\[memory\]\)"),
        (lambda q: q.load_state_dict(Queue(5, 3).state_dict()), "this Queue has size 4 and the checkpoint's has 5"),
        (
            lambda q: q.load_state_dict(Queue(4, 2).state_dict()),
            "Queue has dim 3 and the checkpoint's has 2; make",
        ),
    ],
)
def test_wrong_calls_raise_one_sentence(call, message):
    queue = Queue(4, DIM)
    with pytest.raises(ValueError, match=message) as caught:
        call(queue)
    assert "\n" not in str(caught.value)


def test_a_missing_reference_raises_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"stores reference vectors \(N, 2\); got none"):
        Queue(4, DIM, reference_dim=2).update(rows_of([1], 0))


@pytest.mark.parametrize("alias", ["moco", "FIFO", "xbm", "cross_batch_memory", "memory_queue"])
def test_an_alias_raises_an_error_with_the_right_name(alias):
    with pytest.raises(ValueError, match=f"the memory '{alias}' is called 'queue' here"):
        MEMORIES[alias]
