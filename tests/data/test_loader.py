import functools
import itertools
import operator

import pytest
import torch

from contrast.core.registry import InputError
from contrast.data.loader import SAMPLERS, Neighbours, StepSampler


def first(sampler, batches):
    return list(itertools.islice(iter(sampler), batches))


def test_every_epoch_is_a_new_order_of_all_items():
    batches = first(StepSampler(12, 4, seed=1), 6)
    epochs = [sorted(functools.reduce(operator.iadd, batches[start : start + 3], [])) for start in (0, 3)]
    assert epochs == [list(range(12))] * 2
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_a_later_start_gives_the_same_batches(start):
    assert first(StepSampler(11, 4, seed=5, start=start), 4) == first(StepSampler(11, 4, seed=5), start + 4)[start:]


def test_another_seed_gives_another_order():
    assert first(StepSampler(50, 10, seed=0), 1) != first(StepSampler(50, 10, seed=1), 1)


def test_the_parts_of_all_processes_are_the_batch(monkeypatch):
    expected = first(StepSampler(20, 5, seed=2), 4)
    monkeypatch.setattr("contrast.core.distributed.world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("contrast.core.distributed.rank", lambda rank=rank: rank)
        shares.append(first(StepSampler(20, 5, seed=2), 4))
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in expected]


def test_fewer_items_than_the_batch_are_refused():
    with pytest.raises(InputError, match="batch_size must be between 2 and the 3 training items; got 4"):
        StepSampler(3, 4)


def test_a_batch_of_one_is_refused():
    with pytest.raises(InputError, match="batch_size must be between 2"):
        StepSampler(3, 1)


def circular_table(count, reach):
    """Return the neighbours of items on a circle, nearest first."""
    steps = [sign * step for step in range(1, reach + 1) for sign in (1, -1)]
    return torch.tensor([[(item + step) % count for step in steps] for item in range(count)])


def neighbours(count, together=3, from_epoch=0):
    order = Neighbours(together)
    order.neighbours_at = lambda epoch: circular_table(count, 2 * together) if epoch >= from_epoch else None
    return order


def test_an_epoch_of_neighbours_has_every_item_once():
    batches = first(StepSampler(24, 8, order=neighbours(24)), 3)
    assert sorted(functools.reduce(operator.iadd, batches, [])) == list(range(24))


def test_neighbours_are_in_one_batch():
    def close_pairs(order):
        batches = first(StepSampler(240, 8, seed=3, order=order), 30)
        return sum(
            min((a - b) % 240, (b - a) % 240) <= 2 for batch in batches for a, b in itertools.combinations(batch, 2)
        )

    assert close_pairs(neighbours(240)) > 5 * close_pairs(None)


def test_an_item_is_followed_by_as_many_of_its_nearest_as_fit_the_batch():
    (batch, *_) = first(StepSampler(100, 6, seed=1, order=neighbours(100, together=3)), 2)
    one = batch[0]
    assert batch[:4] == [one, (one + 1) % 100, (one - 1) % 100, (one + 2) % 100]
    second = batch[4]
    assert batch[5] in ((second + 1) % 100, (second - 1) % 100), "the batch has space for one neighbour of the second"


def test_without_a_table_the_order_is_the_shuffled_one():
    shuffled, ordered = StepSampler(12, 4, seed=1), StepSampler(12, 4, seed=1, order=neighbours(12, from_epoch=1))
    assert first(ordered, 3) == first(shuffled, 3)
    assert first(ordered, 6)[3:] != first(shuffled, 6)[3:]


def test_missing_neighbours_are_skipped():
    order = Neighbours(2)
    order.neighbours_at = lambda _: torch.full((9, 4), -1)
    assert sorted(functools.reduce(operator.iadd, first(StepSampler(9, 3, order=order), 3), [])) == list(range(9))


def test_zero_neighbours_are_refused():
    with pytest.raises(InputError, match="sampler 'neighbours': neighbours must be 1 or more; got 0"):
        SAMPLERS.build({"name": "neighbours", "neighbours": 0}, where="sampler")
