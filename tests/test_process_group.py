"""Losses and memories in a process group of their own, on a 2 x 2 mesh of four gloo processes.

Processes 0 and 2 are one data-parallel group, 1 and 3 the other. Under tensor parallelism 0 and 1 have the same
samples, and so have 2 and 3; in most tests the two groups have different samples, so that any exchange between groups
changes a result.
"""

import functools
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import contrast
from contrast.core import distributed
from contrast.losses import InfoNCE
from contrast.memory import HardNegatives, Queue, sharding
from tests.gloo import Processes
from tests.losses import split_batches
from tests.losses.cases import DIMS, Case
from tests.losses.split_batches import SplitBatch

CASES = [
    Case("info_nce", {"learn_temperature": True}, extra=True),
    Case("decoupled", {"weighting": "von_mises_fisher"}),
    Case("siglip"),
    Case("bad_pairs", {"loss": {"name": "info_nce"}, "samples": 64}, sample=True),
    Case("amcl", {"dim": DIMS, "hidden": 3}),
    Case("amcl_barlow", {"dim": DIMS, "hidden": 3}, pairs=False),
    Case("cacr_rbf"),
]


@pytest.fixture(scope="module")
def four():
    started = Processes(4)
    yield started
    started.close()


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def data_group():
    """Return this process's data-parallel group, its rank there, and the number of the group, 0 or 1."""
    return mesh().get_group("data"), mesh().get_local_rank("data"), mesh().get_local_rank("tensor")


def outcomes(rank, world, batches):
    """Return the outcome of each batch, with another seed per group; `backward()` is called after the block."""
    group, position, column = data_group()
    return [split_batches.outcome(replace(batch, seed=batch.seed + column), position, group) for batch in batches]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_group_equals_one_process_on_its_own_batch(four, case):
    labelled = frozenset(["labels"] if case.pairs else [])
    batches = [SplitBatch(case, sizes, given=labelled) for sizes in ((3, 3), (5, 2), (4, 0))]
    answers = four.run(outcomes, batches)
    for number, batch in enumerate(batches):
        expected = [split_batches.outcome(replace(batch, seed=batch.seed + column)) for column in range(2)]
        assert not torch.allclose(expected[0][0], expected[1][0], rtol=1e-3)
        for rank, answer in enumerate(answers):
            torch.testing.assert_close(answer[number], expected[rank % 2], rtol=1e-10, atol=1e-12, msg=str(batch))


def replicas(rank, world, batch):
    """Return the outcome if both groups have the same batch, as under tensor parallelism; the group is a mesh."""
    _, position, _ = data_group()
    encoder, loss = split_batches.Linear(), batch.case.make().double()
    views, given = split_batches.local_batch(batch, position)
    with contrast.process_group(mesh()["data"]):
        value = loss(*encoder(views), **given)
    value.backward()
    return value.detach(), encoder.weight.grad


def test_tensor_parallel_ranks_have_the_same_gradient(four):
    batch = SplitBatch(CASES[0], (4, 2))
    answers = four.run(replicas, batch)
    value, gradient, _ = split_batches.outcome(batch)
    for rank in (0, 2):
        torch.testing.assert_close(answers[rank], answers[rank + 1], rtol=0, atol=0)
        torch.testing.assert_close(answers[rank][0], value)
    torch.testing.assert_close((answers[0][1] + answers[2][1]) / 2, gradient)


def primitives(rank, world):
    """Return rank, world size, and the result of each function that communicates; backward is after the block."""
    x = torch.tensor([1.0 + rank], requires_grad=True)
    parameter = torch.tensor(0.0, requires_grad=True)
    with contrast.process_group(data_group()[0]):
        rows, total = distributed.gather_rows(x), distributed.total(x)
        loss = (rows * torch.tensor([1.0, 10.0])).sum() + total.sum() * 100 + distributed.shared(parameter)
        sizes = distributed.exchange_sizes([rank], x.device)
        named = distributed.rank(), distributed.world_size()
        if rank in (0, 2):
            distributed.barrier()  # not called by the other group
    (loss * (rank + 1)).backward()
    return named, rows.tolist(), total.item(), sizes, x.grad.item(), parameter.grad.item()


def test_all_communication_is_within_the_group(four):
    answers = four.run(primitives)
    for rank, answer in enumerate(answers):
        members = (0, 2) if rank % 2 == 0 else (1, 3)
        senders, position = sum(member + 1 for member in members), members.index(rank)
        assert answer == (
            (position, 2),
            [1.0 + member for member in members],
            sum(1.0 + member for member in members),
            [[member] for member in members],
            senders * (10**position + 100),
            senders / 2,
        )


def choices(rank, world):
    """Return (rank, world size) for every choice of a group."""
    named, (data, _, _), found = lambda: (distributed.rank(), distributed.world_size()), data_group(), {}
    found["none"] = named()
    contrast.set_process_group(data)
    try:
        found["set"] = named()
        with contrast.process_group(mesh()["tensor"]):
            found["block"] = named()
            with contrast.process_group(None):
                found["all"] = named()
            with contrast.local():
                found["local inside"] = named()
        with contrast.local(), contrast.process_group(data):
            found["local outside"] = named()
        found["after"] = named()
    finally:
        contrast.set_process_group(None)
    found["unset"] = named()
    return found


def test_a_block_overrides_the_set_group_and_local_overrides_both(four):
    for rank, found in enumerate(four.run(choices)):
        all_processes, data, tensor = (rank, 4), (rank // 2, 2), (rank % 2, 2)
        assert found == {
            "none": all_processes,
            "set": data,
            "block": tensor,
            "all": all_processes,
            "local inside": (0, 1),
            "local outside": (0, 1),
            "after": data,
            "unset": all_processes,
        }


def local_on_one_process(rank, world, case):
    """Call the loss inside `local()` inside a group, on process 0 only."""
    with contrast.process_group(data_group()[0]):
        return split_batches.local_on_one_process(rank, world, case)


def test_local_inside_the_group_communicates_with_no_process(four):
    case = CASES[0]
    value, _ = four.run(local_on_one_process, case)[0]
    views, given = case.inputs(seed=0)
    torch.testing.assert_close(value, case.make()(*views, **given))


def steps_with_memories(rank, world):
    """Return values and gradients of two steps, then the queue's entries; with `rank` None for group number `world`."""
    column = world if rank is None else data_group()[2]
    generator = torch.Generator().manual_seed(column)
    queue, loss, found = Queue(8, DIMS), InfoNCE(), []
    for step in range(2):
        z = torch.randn(2, 5, DIMS, dtype=torch.float64, generator=generator).float()
        sample = torch.arange(5) + 5 * step + 100 * column
        if rank is not None:
            rows = slice(0, 3) if data_group()[1] == 0 else slice(3, 5)
            z, sample = z[:, rows], sample[rows]
        z.requires_grad_()
        value = loss(*z, sample=sample, extra=[queue])
        value.backward()
        queue.update(z[1], sample=sample)
        found.append((value.detach(), z.grad))
    return found, queue.tensors["sample"], queue.tensors["z"]


def steps_in_the_set_group(rank, world):
    contrast.set_process_group(data_group()[0])
    try:
        return steps_with_memories(rank, world)
    finally:
        contrast.set_process_group(None)


def test_a_queue_contains_the_rows_of_its_group_only(four):
    answers = four.run(steps_in_the_set_group)
    for column in range(2):
        expected, sample, z = steps_with_memories(None, column)
        parts = answers[column], answers[column + 2]
        assert sorted(sample.tolist()) == [100 * column + number for number in range(2, 10)]
        for found, its_sample, its_z in parts:
            assert torch.equal(its_sample, sample)
            assert torch.equal(its_z, z)
            torch.testing.assert_close([value for value, _ in found], [value for value, _ in expected])
        for step in range(2):
            gradient = torch.cat([found[step][1] for found, _, _ in parts], dim=1) / 2
            torch.testing.assert_close(gradient, expected[step][1])


def sharded(rank, world):
    """Return the neighbours that a bank finds whose vectors are sharded over the two processes of a group."""
    group, position, column = data_group()
    z = torch.randn(9, DIMS, generator=torch.Generator().manual_seed(column))
    with contrast.process_group(group):
        hard = HardNegatives(contrast.memory.Bank(9, DIMS, bytes_per_process=1), neighbours=3)
        rows = torch.arange(9)[position::2]
        hard.update(z[rows], sample=rows)
        hard.refresh()
    return hard.bank.shard, hard.table, z


def test_a_bank_is_sharded_within_the_group(four):
    for rank, (shard, table, z) in enumerate(four.run(sharded)):
        assert shard == (rank // 2, 2)
        similarity = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(z).T
        assert torch.equal(table, similarity.fill_diagonal_(-2).topk(3).indices)


def check_of_memory(rank, world):
    """Return the error for a bank of 8 bytes, half of them per process, with 3 bytes free."""
    with (
        mock.patch.object(sharding, "free_bytes", return_value=3),
        mock.patch.dict(os.environ, {"WORLD_SIZE": "4"}),
        contrast.process_group(data_group()[0]),
        pytest.raises(ValueError) as refused,
    ):
        sharding.check_free_memory(8, 1, 0)
    return str(refused.value)


def test_the_free_memory_is_compared_with_the_group_s_share(four):
    assert all("on each of 2 processes" in refusal for refusal in four.run(check_of_memory))


def refusals(rank, world):
    """Return the error for every group that cannot be chosen."""
    first = dist.new_group([0, 1])
    first_mesh = DeviceMesh("cpu", [0, 1])
    found = []
    for group in (mesh(), first, first_mesh, "data", 3):
        for choose in (lambda group: contrast.process_group(group).__enter__(), contrast.set_process_group):
            try:
                choose(group)
            except (TypeError, ValueError) as error:
                found.append((type(error), str(error)))
            else:
                found.append(None)
                contrast.set_process_group(None)
    return found, (distributed._group_of_block.get(), distributed._default_group)


def test_wrong_groups_raise_errors(four):
    for rank, (found, left) in enumerate(four.run(refusals)):
        several, _, group, _, of_mesh, _, text, _, number, _ = found
        assert found[::2] == found[1::2]
        assert left == ((), None)
        assert several[0] is ValueError
        assert "this one has 2, named ('data', 'tensor')" in several[1]
        for refused in (group, of_mesh):
            assert refused is None if rank < 2 else refused[0] is ValueError
            assert refused is None or f"process {rank} is not in this process group" in refused[1]
        assert text[0] is number[0] is TypeError
        assert text[1].endswith("got str.")
        assert number[1].endswith("got int.")


def test_a_group_needs_initialised_processes():
    with pytest.raises(ValueError, match=r"needs torch\.distributed\.init_process_group"):
        contrast.set_process_group("data")
    with contrast.process_group(None):
        assert distributed.world_size() == 1


def compiled(rank, world):
    """Return a loss in three groups one after the other, eager and compiled."""
    z = torch.randn(2, 5, DIMS, generator=torch.Generator().manual_seed(rank))
    loss, found = InfoNCE(), []
    step = torch.compile(loss, backend="eager")
    for group in (mesh()["data"], None, mesh()["tensor"]):
        with contrast.process_group(group):
            found.append((loss(*z), step(*z)))
    torch._dynamo.reset()
    return found


@pytest.mark.long
def test_a_compiled_loss_follows_the_group(four):
    for answer in four.run(compiled):
        for eager, value in answer:
            torch.testing.assert_close(value, eager)
