"""Several processes store what one stores that gets all their rows; a sharded bank equals a replicated one."""

import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import contrast
from contrast.losses import FalseNegatives, InfoNCE
from contrast.memory import Bank, HardNegatives, NearestPositives, Queue, nearest_views
from tests.memory.model import DIM, anchor, rows_of

SAMPLES = 23
SIZES = [(3, 5, 1, 4), (6, 0, 2, 0), (0, 4, 0, 5), (2, 2, 2, 2)]
"""Rows per step, for each of up to four processes."""


def batches(world, *, heads=None, reference=None):
    """Yield for each step the embeddings of all processes, and the slice of each process."""
    generator = torch.Generator().manual_seed(5)
    for step in range(8):
        sizes = SIZES[step % len(SIZES)][:world]
        sample = torch.randperm(SAMPLES, generator=generator)[: sum(sizes)].tolist()
        starts = [sum(sizes[:rank]) for rank in range(world)]
        rows = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        yield rows_of(sample, step, heads=heads, labels=SAMPLES, reference=reference), rows


def updated(memory, rank, world, **options):
    """Return the memory after an update per step, with one process's rows or, without a rank, with all."""
    for complete, rows in batches(world, **options):
        memory.update(complete if rank is None else complete[rows[rank]])
    return memory


def fields(embeddings):
    return {name: getattr(embeddings, name) for name in ("z", "sample", "group", "view", "reference")}


def assert_same(one, other):
    for name, value in one.items():
        assert (value is None and other[name] is None) or torch.equal(value, other[name]), name


def queue_of(rank, world, size, heads, reference):
    queue = updated(Queue(size, DIM, heads, reference), rank, world, heads=heads, reference=reference)
    return fields(queue.candidates(anchor(heads=heads)))


@pytest.mark.parametrize("size", [2, 7, 40])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("reference", [None, 2])
def test_a_queue_is_the_same_on_every_process(processes, size, heads, reference):
    expected = queue_of(None, processes.world, size, heads, reference)
    for found in processes.run(queue_of, size, heads, reference):
        assert_same(found, expected)


def bank_of(rank, world, heads, reference):
    bank = Bank(SAMPLES, DIM, heads, reference_dim=reference)
    updated(bank, rank, world, heads=heads, reference=reference)
    return {**fields(bank.candidates(anchor(heads=heads))), "age": bank.age}


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("reference", [None, 2])
def test_a_bank_is_the_same_on_every_process(processes, heads, reference):
    expected = bank_of(None, processes.world, heads, reference)
    for found in processes.run(bank_of, heads, reference):
        assert_same(found, expected)


def searched(rank, world, sharded, heads, index):
    """Return what the searches of a bank find for this process's anchors, or without a rank for all anchors."""
    bank = Bank(SAMPLES, DIM, heads, bytes_per_process=1 if sharded else 2**30, reference_dim=2)
    updated(bank, rank, world, heads=heads, reference=2)
    assert bank.sharded == (sharded and rank is not None)
    hard = HardNegatives(bank, 5, index=index)
    hard.refresh()
    queries = rows_of([1, 5, 9, 2, 20, 7, 7, 3][: 5 if world == 2 else 8], 50, heads=heads)
    ends = [0, 4, 5, 5, 8]
    queries = queries if rank is None else queries[ends[rank] : ends[rank + 1]]
    found = hard.candidates(queries)
    k = SAMPLES - 1
    nearest = bank.search(queries, k)
    positives = [NearestPositives(bank, mutual).positives(queries).z.movedim(-2, 0) for mutual in (0, 4)]
    return hard.table, fields(found), nearest.similarity, nearest.position, positives


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("index", ["exact", "auto"])
def test_searches_find_what_one_process_finds(processes, sharded, heads, index):
    table, found, similarity, position, positives = searched(None, processes.world, False, heads, index)
    answers = processes.run(searched, sharded, heads, index)
    assert (table >= 0).any()
    for its_table, its_found, *_ in answers:
        assert torch.equal(its_table, table)
        assert_same(its_found, found)
    assert torch.equal(torch.cat([answer[2] for answer in answers]), similarity)
    assert torch.equal(torch.cat([answer[3] for answer in answers]), position)
    for place, expected in enumerate(positives):
        assert torch.equal(torch.cat([answer[4][place] for answer in answers]), expected)


def train(rank, world, kind, sharded):
    """Train a linear map with a memory for some steps; return every value and gradient."""
    weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    bank = Bank(SAMPLES, DIM, bytes_per_process=1 if sharded else 2**30)
    memory = {
        "queue": lambda: Queue(9, DIM),
        "bank": lambda: bank,
        "hard_negatives": lambda: HardNegatives(bank, 3, "2 steps"),
        "nearest_positives": lambda: NearestPositives(bank if sharded else Queue(9, DIM)),
        "mutual": lambda: NearestPositives(bank, 3),
    }[kind]()
    criterion = FalseNegatives(InfoNCE(0.4), relative_margin=0.1) if kind == "hard_negatives" else InfoNCE(0.4)
    steps = []
    for complete, rows in batches(world):
        own = complete if rank is None else complete[rows[rank]]
        views = [own.z.double() @ weight, (own.z.double() + 0.3) @ weight]
        anchors = nearest_views(memory, views, own.sample)
        if anchors:
            value = criterion(*anchors, targets=views, sample=own.sample, extra=[memory])
        else:
            value = criterion(*views, sample=own.sample, extra=[memory])
        (gradient,) = torch.autograd.grad(value, weight)
        if rank is not None:
            torch.distributed.all_reduce(gradient)
            gradient /= world
        steps.append((value.detach(), gradient))
        memory.update(views[1], sample=own.sample)
        with torch.no_grad():
            weight -= 0.5 * gradient
    return steps


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [
        ("queue", False),
        ("bank", False),
        ("hard_negatives", False),
        ("hard_negatives", True),
        ("nearest_positives", False),
        ("nearest_positives", True),
        ("mutual", False),
        ("mutual", True),
    ],
)
def test_a_loss_with_a_memory_equals_one_process(processes, kind, sharded):
    # One process does the same with the same store, never sharded.
    expected = train(None, processes.world, kind, sharded)
    for answer in processes.run(train, kind, sharded):
        for (value, gradient), (one, its_gradient) in zip(answer, expected, strict=True):
            torch.testing.assert_close(value, one, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(gradient, its_gradient, rtol=1e-5, atol=1e-7)


def saved(rank, world):
    """Return a checkpoint of a sharded bank as the bytes of a file, with the table and the ages of process 0."""
    hard = HardNegatives(updated(Bank(SAMPLES, DIM, bytes_per_process=1, reference_dim=2), rank, world, reference=2), 4)
    hard.refresh()
    file = io.BytesIO()
    torch.save(hard.state_dict(), file)
    if rank:
        return file.getvalue(), None, None
    return file.getvalue(), hard.table, hard.bank.age


def resumed(rank, world, file, bytes_per_process, in_use):
    """Load a checkpoint, into a bank that is sharded already where it is in use, and continue."""
    hard = HardNegatives(Bank(SAMPLES, DIM, bytes_per_process=bytes_per_process, reference_dim=2), 4)
    if in_use:
        updated(hard, rank, world, reference=2)
    hard.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    restored = hard.bank.at(hard.bank.known)
    updated(hard, rank, world, reference=2)
    hard.refresh()
    return hard.table, fields(restored), fields(hard.bank.at(torch.arange(SAMPLES)))


def test_a_checkpoint_of_a_sharded_bank_contains_all_of_it(processes):
    files = processes.run(saved)
    file, table, age = files[0]
    one = HardNegatives(Bank(SAMPLES, DIM, reference_dim=2), 4)
    one.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    complete = updated(Bank(SAMPLES, DIM, reference_dim=2), None, processes.world, reference=2)
    assert_same(fields(one.bank.candidates(anchor())), fields(complete.candidates(anchor())))
    assert torch.equal(one.table, table)
    assert torch.equal(one.bank.age, age)
    expected = resumed(None, processes.world, file, 2**30, False)
    for bytes_per_process, in_use in itertools.product((1, 2**30), (False, True)):
        for its_table, *its_rows in processes.run(resumed, file, bytes_per_process, in_use):
            assert torch.equal(its_table, expected[0])
            for rows, right in zip(its_rows, expected[1:], strict=True):
                assert_same(rows, right)
    with pytest.raises(ValueError, match="was not written by process 0; load process 0's, which contains all of it"):
        one.load_state_dict(torch.load(io.BytesIO(files[1][0]), weights_only=True))


def refusals(rank, world):
    """Return the errors for what a sharded bank cannot do."""
    bank = updated(Bank(SAMPLES, DIM, bytes_per_process=1), rank, world)
    messages = []

    def collect(call):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))

    collect(lambda: bank.candidates(anchor([1])))
    with contrast.local():
        collect(lambda: bank.search(anchor([1]), 1))
    collect(lambda: bank.update(rows_of([rank // 2], 0)))
    return messages


def test_what_a_sharded_bank_cannot_do_raises_an_error(processes):
    for candidates, inside_local, repeated in processes.run(refusals):
        assert (
            f"sharded over {processes.world} processes, since its vectors need more than bytes_per_process=1"
            in candidates
        )
        assert "not inside contrast.local()" in inside_local
        assert "sample 0 occurs twice in this update of all processes" in repeated


class EncoderWithMemories(nn.Module):
    """An encoder and its memories in one module."""

    def __init__(self, *memories):
        super().__init__()
        self.encoder, self.memories = nn.Linear(DIM, DIM), nn.ModuleList(memories)

    def forward(self, x):
        return self.encoder(x)


def wrapped(rank, world):
    """True if training in DistributedDataParallel, which broadcasts buffers, does not change the memories."""
    torch.manual_seed(0)
    bank, queue = Bank(SAMPLES, DIM, bytes_per_process=1), Queue(7, DIM)
    model = EncoderWithMemories(updated(bank, rank, world), updated(queue, rank, world))
    before = [bank.tensors["z"].clone(), queue.tensors["z"].clone()]
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel(torch.ones(2, DIM)).sum().backward()
    return all(torch.equal(one, other.tensors["z"]) for one, other in zip(before, (bank, queue), strict=True))


def test_distributed_data_parallel_does_not_touch_them(processes):
    assert all(processes.run(wrapped))
