import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contrast.core.registry import InputError
from contrast.data.splitting import check_no_leak, hold_out

labels = st.lists(st.integers(-1, 4), min_size=1, max_size=60)
shares = st.floats(0, 0.9)


def generator(seed=0):
    return np.random.default_rng(seed)


@given(labels, shares, st.integers(0, 5))
def test_no_class_is_held_out_completely_and_unlabelled_items_never_are(target, share, seed):
    target = np.array(target)
    held_out = hold_out(target, None, share, generator(seed))
    assert not held_out[target < 0].any()
    for label in set(target) - {-1}:
        assert (~held_out[target == label]).any()


@given(labels, shares, st.integers(0, 5))
def test_the_held_out_share_of_each_class_is_exact_to_one_item(target, share, seed):
    target = np.array(target)
    held_out = hold_out(target, None, share, generator(seed))
    for label in set(target) - {-1}:
        size = (target == label).sum()
        expected = min(share * size, size - 1)
        assert abs(held_out[target == label].sum() - expected) < 1


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 9)), min_size=1, max_size=60), shares, st.integers(0, 5))
def test_no_group_is_held_out_in_part(rows, share, seed):
    target, group = np.array(rows).T
    held_out = hold_out(target, group, share, generator(seed))
    assert not (set(group[held_out]) & set(group[~held_out])) - {-1}
    for label in set(target) - {-1}:
        assert (~held_out[target == label]).any()


def test_groups_of_equal_size_have_the_exact_share_in_every_class():
    target = np.repeat([0, 1, 2], 40)
    group = np.arange(120) // 4
    held_out = hold_out(target, group, 0.2, generator())
    assert [held_out[target == label].sum() for label in range(3)] == [8, 8, 8]


def test_two_groups_suffice_for_a_split():
    held_out = hold_out(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), 0.2, generator())
    assert held_out.sum() == 2


def test_one_group_cannot_be_split():
    assert not hold_out(np.array([0, 1, 0, 1]), np.zeros(4, dtype=int), 0.2, generator()).any()


def test_the_held_out_items_are_a_function_of_the_seed():
    target = np.repeat([0, 1], 50)
    one, again, other = (hold_out(target, None, 0.2, generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_member_in_both_splits_is_an_error_with_its_name():
    group, second = np.array([0, 1, 1, -1, -1]), np.array([False, False, True, True, False])
    with pytest.raises(InputError, match=r"split_by=patient .* has 1 in both \(train and test\), the first 'b'"):
        check_no_leak(group, ["a", "b"], second, column="patient", splits="train and test", source="x.npz")
