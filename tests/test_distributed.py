"""The functions that communicate, over gloo processes and without any."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from contrast.core import distributed
from contrast.core.embeddings import Embeddings, concatenate, gather_all, unknown_samples
from contrast.core.pairs import all_pairs, cross_pairs


def test_without_processes_everything_is_the_identity():
    x = torch.ones(2, 3, requires_grad=True)
    assert distributed.world_size() == 1
    assert distributed.rank() == 0
    assert distributed.gather(x, [2]) is x
    assert distributed.shared(x) is x
    assert distributed.total(x) is x
    distributed.barrier()


@pytest.mark.parametrize(
    ("environment", "first", "world"),
    [
        ({}, True, 1),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, True, 4),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, False, 4),
        ({"LOCAL_RANK": "1"}, False, 1),
    ],
)
def test_before_the_process_group_exists_rank_and_world_size_come_from_the_environment(
    monkeypatch, environment, first, world
):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_first_process() is first
    assert distributed.expected_world_size() == world


def first_and_announced(rank, world):
    """Return the results for an existing group and an environment that contradicts it."""
    with mock.patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "9"}):
        return distributed.is_first_process(), distributed.expected_world_size()


def test_an_existing_process_group_overrides_the_environment(processes):
    world = processes.world
    assert processes.run(first_and_announced) == [(rank == 0, world) for rank in range(world)]


def test_local_ends_with_its_block_also_after_an_error():
    def fails():
        with distributed.local():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert not distributed._inside_local.get()


def sizes_of(world):
    return (3, 0, 2, 4)[:world]


def gather_rows(rank, world):
    """Gather rows with values that depend on their rank, and differentiate with a factor that depends on the rank."""
    results = {}
    for shape in ((), (2,), (2, 3)):
        for sizes in (sizes_of(world), (0,) * world, (2,) * world):
            own = torch.full((sizes[rank], *shape), float(rank), dtype=torch.float64)
            own += torch.arange(sizes[rank]).view(-1, *[1] * len(shape)) / 10
            x = own.requires_grad_()
            all_rows = distributed.gather(x, sizes)
            factor = torch.arange(1.0, len(all_rows) + 1).view(-1, *[1] * len(shape)).double() * (rank + 1)
            (all_rows * factor).sum().backward()
            results[shape, sizes] = (all_rows.detach(), x.grad)
    return results


def test_gather_concatenates_rows_in_rank_order_and_sums_all_gradients(processes):
    answers = processes.run(gather_rows)
    world = processes.world
    for rank, answer in enumerate(answers):
        for (shape, sizes), (all_rows, gradient) in answer.items():
            rows = [float(other) + row / 10 for other in range(world) for row in range(sizes[other])]
            assert all_rows.shape == (len(rows), *shape)
            assert torch.allclose(
                all_rows.reshape(len(rows), all_rows[:1].numel()).t()[:1].flatten(), torch.tensor(rows).double()
            )
            start, senders = sum(sizes[:rank]), sum(range(1, world + 1))
            expected = torch.arange(start + 1.0, start + sizes[rank] + 1).double() * senders
            assert gradient.shape == (sizes[rank], *shape)
            assert torch.equal(gradient, expected.view(-1, *[1] * len(shape)).expand_as(gradient))


def summed_and_shared(rank, world):
    x = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = distributed.total(x)
    (total * (rank + 1)).sum().backward()
    parameter = torch.tensor(3.0, requires_grad=True)
    (distributed.shared(parameter) * (rank + 1)).backward()
    numbers = distributed.exchange_sizes([rank, 7], torch.device("cpu"))
    distributed.barrier()
    return total.detach(), x.grad, parameter.grad, numbers, distributed.rank(), distributed.world_size()


def test_total_sums_and_shared_averages_the_gradient(processes):
    world = processes.world
    ranks = range(world)
    for rank, (total, gradient, mean, numbers, own, size) in enumerate(processes.run(summed_and_shared)):
        assert total.tolist() == [sum(1.0 + r for r in ranks), 2.0 * world]
        assert gradient.tolist() == [sum(r + 1 for r in ranks)] * 2
        assert mean == sum(r + 1 for r in ranks) / world
        assert numbers == [[r, 7] for r in ranks]
        assert (own, size) == (rank, world)


def identified(rank, world):
    """Gather two views with identities, heads and references, and count what is communicated."""
    size = sizes_of(world)[rank]
    index = torch.arange(size) + 100 * rank
    views = [
        Embeddings(
            torch.randn(2, size, 3),
            index,
            index % 3,
            torch.full_like(index, view),
            torch.full((size, 2), rank + view / 10),
        )
        for view in range(2)
    ]
    calls = []
    original = dist.all_gather
    dist.all_gather = lambda *given: (calls.append(1), original(*given))[1]
    try:
        all_rows = gather_all(views)
    finally:
        dist.all_gather = original
    with distributed.local():
        local = gather_all(views)
    counts = len(all_pairs(*views).candidates[0]), len(cross_pairs(*views).candidates[0])
    return views, all_rows, len(calls), local[0].sample, counts, unknown_samples(4, index.device)


def test_embeddings_are_gathered_with_their_identities_in_one_exchange(processes):
    answers = processes.run(identified)
    total = sum(sizes_of(processes.world))
    for own, all_rows, calls, local, counts, _ in answers:
        for view in range(2):
            full = concatenate([answer[0][view] for answer in answers])
            assert torch.equal(all_rows[view].z, full.z)
            assert torch.equal(all_rows[view].reference, full.reference)
            for name in ("sample", "group", "view"):
                assert torch.equal(getattr(all_rows[view], name), getattr(full, name))
        assert calls == 4  # sizes, identities, z, references
        assert torch.equal(local, own[0].sample)
        assert counts == (total, total)


def test_unknown_samples_differ_between_processes(processes):
    numbers = torch.cat([answer[5] for answer in processes.run(identified)]).tolist()
    assert len(set(numbers)) == 4 * processes.world
    assert max(numbers) < 0
