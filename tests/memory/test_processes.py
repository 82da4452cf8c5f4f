"""Several processes hold what one holds that was fed with their rows; a sharded bank equals a whole one."""

import io

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import contrast
from contrast.losses import FalseNegatives, InfoNCE
from contrast.memory import Bank, HardNegatives, NearestPositives, Queue, nearest_views
from tests.memory.model import DIM, anchor, push

SAMPLES = 23
SIZES = [(3, 5, 1, 4), (6, 0, 2, 0), (0, 4, 0, 5), (2, 2, 2, 2)]
"""How many rows each of up to four processes has in each step."""


def batches(world, *, heads=None, reference=None):
    """Give each step's samples, the embeddings of all, and the rows of every process."""
    generator = torch.Generator().manual_seed(5)
    for step in range(8):
        sizes = SIZES[step % len(SIZES)][:world]
        sample = torch.randperm(SAMPLES, generator=generator)[: sum(sizes)].tolist()
        starts = [sum(sizes[:rank]) for rank in range(world)]
        rows = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        yield push(sample, step, heads=heads, labels=SAMPLES, reference=reference), rows


def feed(memory, rank, world, **given):
    """Update a memory in every step, with one process's rows or with all."""
    for everyone, rows in batches(world, **given):
        memory.update(everyone if rank is None else everyone[rows[rank]])
    return memory


def held(embeddings):
    return {name: getattr(embeddings, name) for name in ("z", "sample", "group", "view", "reference")}


def assert_same(one, other):
    for name, value in one.items():
        assert (value is None and other[name] is None) or torch.equal(value, other[name]), name


def queue_of(rank, world, size, heads, reference):
    queue = feed(Queue(size, DIM, heads, reference), rank, world, heads=heads, reference=reference)
    return held(queue.candidates(anchor(heads=heads)))


@pytest.mark.parametrize("size", [2, 7, 40])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("reference", [None, 2])
def test_a_queue_is_the_same_everywhere(processes, size, heads, reference):
    expected = queue_of(None, processes.world, size, heads, reference)
    for found in processes.run(queue_of, size, heads, reference):
        assert_same(found, expected)


def bank_of(rank, world, heads, reference):
    bank = Bank(SAMPLES, DIM, heads, reference_dim=reference)
    feed(bank, rank, world, heads=heads, reference=reference)
    return {**held(bank.candidates(anchor(heads=heads))), "age": bank.age}


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("reference", [None, 2])
def test_a_bank_is_the_same_everywhere(processes, heads, reference):
    expected = bank_of(None, processes.world, heads, reference)
    for found in processes.run(bank_of, heads, reference):
        assert_same(found, expected)


def searched(rank, world, sharded, heads, index):
    """Give what a bank's searches give on this process, or to all its anchors on one."""
    bank = Bank(SAMPLES, DIM, heads, bytes_per_process=1 if sharded else 2**30, reference_dim=2)
    feed(bank, rank, world, heads=heads, reference=2)
    assert bank.sharded == (sharded and rank is not None)
    hard = HardNegatives(bank, 5, index=index)
    hard.find()
    asked = push([1, 5, 9, 2, 20, 7, 7, 3][: 5 if world == 2 else 8], 50, heads=heads)
    ends = [0, 4, 5, 5, 8]
    asked = asked if rank is None else asked[ends[rank] : ends[rank + 1]]
    found = hard.candidates(asked)
    k = SAMPLES - 1
    near = bank.nearest(asked, k)
    positives = [NearestPositives(bank, mutual).positives(asked).z.movedim(-2, 0) for mutual in (0, 4)]
    return hard.table, held(found), near.similarity, near.position, positives


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
    """Train a linear map with a memory for some steps; give every value and gradient."""
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
    given = []
    for everyone, rows in batches(world):
        own = everyone if rank is None else everyone[rows[rank]]
        views = [own.z.double() @ weight, (own.z.double() + 0.3) @ weight]
        near = nearest_views(memory, views, own.sample)
        if near:
            value = criterion(*near, targets=views, sample=own.sample, extra=[memory])
        else:
            value = criterion(*views, sample=own.sample, extra=[memory])
        (gradient,) = torch.autograd.grad(value, weight)
        if rank is not None:
            torch.distributed.all_reduce(gradient)
            gradient /= world
        given.append((value.detach(), gradient))
        memory.update(views[1], sample=own.sample)
        with torch.no_grad():
            weight -= 0.5 * gradient
    return given


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
    # What one process does with the same store: sharding is no part of it.
    expected = train(None, processes.world, kind, sharded)
    for answer in processes.run(train, kind, sharded):
        for (value, gradient), (one, its_gradient) in zip(answer, expected, strict=True):
            torch.testing.assert_close(value, one, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(gradient, its_gradient, rtol=1e-5, atol=1e-7)


def written(rank, world):
    """Give a sharded bank's checkpoint as a file's bytes, and the next steps of this bank and of one that loads it."""
    hard = HardNegatives(feed(Bank(SAMPLES, DIM, bytes_per_process=1, reference_dim=2), rank, world, reference=2), 4)
    hard.find()
    file = io.BytesIO()
    torch.save(hard.state_dict(), file)
    if rank:
        return file.getvalue(), None, None
    return file.getvalue(), hard.table, hard.bank.age


def resumed(rank, world, file, bytes_per_process):
    """Load a checkpoint and go on."""
    hard = HardNegatives(Bank(SAMPLES, DIM, bytes_per_process=bytes_per_process, reference_dim=2), 4)
    hard.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    feed(hard, rank, world, reference=2)
    hard.find()
    return hard.table, held(hard.bank.at(torch.arange(SAMPLES)))


def test_a_sharded_bank_s_checkpoint_holds_all_of_it(processes):
    files = processes.run(written)
    file, table, age = files[0]
    one = HardNegatives(Bank(SAMPLES, DIM, reference_dim=2), 4)
    one.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    whole = feed(Bank(SAMPLES, DIM, reference_dim=2), None, processes.world, reference=2)
    assert_same(held(one.bank.candidates(anchor())), held(whole.candidates(anchor())))
    assert torch.equal(one.table, table)
    assert torch.equal(one.bank.age, age)
    expected = resumed(None, processes.world, file, 2**30)
    for bytes_per_process in (1, 2**30):
        for its_table, its_rows in processes.run(resumed, file, bytes_per_process):
            assert torch.equal(its_table, expected[0])
            assert_same(its_rows, expected[1])
    with pytest.raises(ValueError, match="was written by process 1; load process 0's, which has all of it"):
        one.load_state_dict(torch.load(io.BytesIO(files[1][0]), weights_only=True))


def sentences(rank, world):
    """Give what a sharded bank answers to what it cannot do."""
    bank = feed(Bank(SAMPLES, DIM, bytes_per_process=1), rank, world)
    answers = []

    def ask(call):
        try:
            call()
        except ValueError as error:
            answers.append(str(error))

    ask(lambda: bank.candidates(anchor([1])))
    with contrast.local():
        ask(lambda: bank.nearest(anchor([1]), 1))
    ask(lambda: bank.update(push([rank // 2], 0)))
    return answers


def test_what_a_sharded_bank_cannot_do_it_says(processes):
    for refused, alone, twice in processes.run(sentences):
        assert (
            f"sharded over {processes.world} processes, since its vectors need more than bytes_per_process=1" in refused
        )
        assert "not inside contrast.local()" in alone
        assert "sample 0 stands twice in this update of all processes" in twice


class Both(nn.Module):
    """An encoder and its memories in one module."""

    def __init__(self, *memories):
        super().__init__()
        self.encoder, self.memories = nn.Linear(DIM, DIM), nn.ModuleList(memories)

    def forward(self, x):
        return self.encoder(x)


def wrapped(rank, world):
    """Train inside DistributedDataParallel, which sends buffers around; say whether memories stay as they are."""
    torch.manual_seed(0)
    bank, queue = Bank(SAMPLES, DIM, bytes_per_process=1), Queue(7, DIM)
    model = Both(feed(bank, rank, world), feed(queue, rank, world))
    before = [bank.held["z"].clone(), queue.held["z"].clone()]
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel(torch.ones(2, DIM)).sum().backward()
    return all(torch.equal(one, other.held["z"]) for one, other in zip(before, (bank, queue), strict=True))


def test_distributed_data_parallel_does_not_touch_them(processes):
    assert all(processes.run(wrapped))
