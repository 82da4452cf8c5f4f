import functools
import itertools
import operator

import pytest

from contrast.data.loader import StepSampler
from contrast.registry import InputError


def first(sampler, batches):
    return list(itertools.islice(iter(sampler), batches))


def test_every_epoch_is_a_new_order_of_all_items():
    batches = first(StepSampler(12, 4, seed=1), 6)
    epochs = [sorted(functools.reduce(operator.iadd, batches[start : start + 3], [])) for start in (0, 3)]
    assert epochs == [list(range(12))] * 2
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_starting_later_gives_the_same_batches(start):
    assert first(StepSampler(11, 4, seed=5, start=start), 4) == first(StepSampler(11, 4, seed=5), start + 4)[start:]


def test_another_seed_gives_another_order():
    assert first(StepSampler(50, 10, seed=0), 1) != first(StepSampler(50, 10, seed=1), 1)


def test_the_processes_share_each_batch(monkeypatch):
    whole = first(StepSampler(20, 5, seed=2), 4)
    monkeypatch.setattr("contrast.distributed.world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("contrast.distributed.rank", lambda rank=rank: rank)
        shares.append(first(StepSampler(20, 5, seed=2), 4))
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]


def test_fewer_items_than_the_batch_is_one_sentence():
    with pytest.raises(InputError, match="batch_size must lie between 2 and the 3 training items; got 4"):
        StepSampler(3, 4)


def test_a_batch_of_one_has_nobody_to_tell_apart():
    with pytest.raises(InputError, match="batch_size must lie between 2"):
        StepSampler(3, 1)
