"""The queue against a list from which the oldest leave, and its errors in a sentence."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.embeddings import REMEMBERED, normalise
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Queue
from tests.memory.model import DIM, PlainQueue, anchor, entries, push, samples_of_pushes


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(pushes=samples_of_pushes, size=st.integers(1, 14), heads=st.sampled_from([None, 1, 2]))
def test_any_pushes_leave_what_a_plain_list_keeps(pushes, size, heads):
    queue, plain = Queue(size, DIM, heads), PlainQueue(size)
    for seed, sample in enumerate(pushes):
        rows = push(sample, seed, heads=heads)
        queue.update(rows)
        plain.update(rows.z, rows.sample, rows.group)
        found = queue.candidates(anchor(heads=heads))
        assert entries(found) == sorted(plain.entries)
        assert queue.filled == queue.metrics["queue"] == len(found) == len(plain.entries)
        assert (found.view == REMEMBERED).all()


@given(pushes=samples_of_pushes, more=samples_of_pushes, size=st.integers(1, 14))
def test_a_checkpoint_goes_on_bit_for_bit(pushes, more, size):
    whole, resumed = Queue(size, DIM, reference_dim=2), Queue(size, DIM, reference_dim=2)
    for seed, sample in enumerate(pushes):
        whole.update(push(sample, seed, reference=2))
    resumed.load_state_dict(saved_and_loaded(whole.state_dict()))
    for seed, sample in enumerate(more):
        for queue in (whole, resumed):
            queue.update(push(sample, 50 + seed, reference=2))
    one, other = whole.candidates(anchor()), resumed.candidates(anchor())
    for name in ("z", "sample", "group", "reference"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (whole.position, whole.updates) == (resumed.position, resumed.updates)


def test_a_checkpoint_is_a_copy():
    queue = Queue(4, DIM)
    queue.update(push([0, 1, 2, 3], 0))
    state = queue.state_dict()
    before = copy.deepcopy(state)
    queue.update(push([4, 5], 1))
    assert torch.equal(state["_extra_state"]["z"], before["_extra_state"]["z"])


def test_plain_tensors_are_given_unit_length_and_their_sample_as_group():
    queue, z, index = Queue(4, DIM), torch.randn(2, DIM), torch.tensor([5, 3])
    queue.update(z.requires_grad_(), sample=index)
    found = queue.candidates(anchor())
    assert torch.equal(found.z, normalise(z.detach()))
    assert not found.z.requires_grad
    assert found.sample.tolist() == found.group.tolist() == [5, 3]
    queue.update(z, sample=index, group=torch.tensor([0, 1]))
    assert queue.candidates(anchor()).group.tolist() == [5, 3, 0, 1]


def test_the_own_sample_in_the_queue_is_neither_negative_nor_positive():
    queue, criterion = Queue(8, DIM), InfoNCE(0.2)
    index = torch.arange(4)
    z_a, z_b = torch.randn(2, 4, DIM)
    queue.update(torch.randn(3, DIM), sample=torch.tensor([2, 9, 2]))
    criterion(z_a, z_b, sample=index, extra=[queue])
    assert criterion.metrics["negatives"] == 6 + 3 - 2 / 4
    assert criterion.metrics["positives"] == 1


def a_step(queue, dtype=torch.float32):
    z = torch.randn(2, 4, DIM, dtype=dtype).requires_grad_()
    index = torch.arange(4)
    queue.update(torch.randn(4, DIM), sample=index + 10)
    return InfoNCE(0.2)(*z, sample=index, extra=[queue]), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: 2 * loss + 1])
def test_an_update_before_the_backward_pass_is_named(dtype, wrap):
    queue = Queue(6, DIM)
    loss, index = a_step(queue, dtype)
    queue.update(torch.randn(4, DIM), sample=index)
    with pytest.raises(RuntimeError, match=r"call a memory's update\(...\) after loss.backward\(\)"):
        wrap(loss).backward()


def test_also_where_the_embeddings_were_handed_over():
    queue, index = Queue(6, DIM), torch.arange(4)
    queue.update(torch.randn(4, DIM), sample=index + 10)
    z = torch.randn(2, 4, DIM).requires_grad_()
    loss = InfoNCE(0.2)(*z, sample=index, extra=[queue.candidates(anchor([0]))])
    queue.update(torch.randn(4, DIM), sample=index)
    with pytest.raises(RuntimeError, match=r"call a memory's update\(...\) after loss.backward\(\)"):
        loss.backward()


def test_an_update_after_a_loss_that_never_goes_back_is_fine():
    queue = Queue(6, DIM)
    _thrown_away, index = a_step(queue)
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
def test_casts_and_copies_leave_it_alone(cast):
    queue = Queue(5, DIM)
    queue.update(push([1, 2, 3], 0))
    other = cast(copy.deepcopy(queue))
    assert torch.equal(other.candidates(anchor()).z, queue.candidates(anchor()).z)
    other.update(push([4, 5], 1))
    assert queue.filled == 3


def test_it_moves_to_where_the_embeddings_are():
    queue = Queue(5, DIM).to("meta")
    assert queue.held["z"].device.type == "meta"
    queue = Queue(5, DIM)
    queue.follow(torch.device("meta"))
    assert {tensor.device.type for tensor in queue.held.values()} == {"meta"}


def test_references_are_remembered_where_they_are_wanted():
    queue, plain = Queue(5, DIM, reference_dim=2), Queue(5, DIM)
    rows = push([1, 2], 0, reference=2)
    queue.update(rows)
    plain.update(rows)
    assert torch.equal(queue.candidates(anchor()).reference, rows.reference)
    assert plain.candidates(anchor()).reference is None


INDEX = torch.arange(2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, "size must be 1 or more; got 0"),
        ({"dim": 0}, "dim must be 1 or more; got 0"),
        ({"heads": 0}, "heads must be 1 or more; got 0"),
        ({"reference_dim": 0}, "reference_dim must be 1 or more; got 0"),
    ],
)
def test_wrong_arguments_are_answered_in_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        Queue(**{"size": 4, "dim": DIM, **arguments})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q.update(torch.randn(2, 4), sample=INDEX), r"holds \(N, 3\) embeddings; got \(2, 4\)"),
        (lambda q: q.update(torch.randn(2, 2, 3), sample=INDEX), r"holds \(N, 3\) embeddings; got \(2, 2, 3\)"),
        (lambda q: q.update(torch.randn(2, 3)), r"call update\(z, sample=index\) with indices in the data set"),
        (lambda q: q.update(torch.randn(2, 3), sample=-1 - INDEX), "indices in the data set, from 0; got -2"),
        (lambda q: q.update(torch.randn(2, 3), sample=torch.arange(3)), r"sample must be \(2,\) whole numbers"),
        (lambda q: q.update(INDEX, sample=INDEX), "update takes Embeddings, or a floating"),
        (lambda q: q.update([1.0]), "update takes Embeddings, or a floating .* got list"),
        (lambda q: q.update(torch.full((2, 3), torch.nan), sample=INDEX), "values that are not finite"),
        (lambda q: q.update(push([1], 0), sample=INDEX), "Embeddings bring their sample"),
        (lambda q: InfoNCE()(*torch.randn(2, 4, 3), extra=[q]), r"call loss\(..., sample=index, extra=\[memory\]\)"),
        (lambda q: q.load_state_dict(Queue(5, 3).state_dict()), "this queue has size 4 and the checkpoint's has 5"),
        (lambda q: q.load_state_dict(Queue(4, 2).state_dict()), r"has width \(3, None, None\) and the checkpoint's"),
    ],
)
def test_wrong_calls_are_answered_in_a_sentence(call, words):
    queue = Queue(4, DIM)
    with pytest.raises(ValueError, match=words) as caught:
        call(queue)
    assert "\n" not in str(caught.value)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"holds reference vectors \(N, 2\); got none"):
        Queue(4, DIM, reference_dim=2).update(push([1], 0))


@pytest.mark.parametrize("alias", ["moco", "FIFO", "xbm", "cross_batch_memory", "memory_queue"])
def test_aliases_point_to_it(alias):
    with pytest.raises(ValueError, match=f"the memory '{alias}' is called 'queue' here"):
        MEMORIES[alias]
