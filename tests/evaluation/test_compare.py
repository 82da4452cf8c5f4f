from dataclasses import replace

import pytest

from contrast.core.registry import InputError
from contrast.evaluation.compare import comparable, paired_difference
from tests.evaluation.rows import result


def test_a_difference_is_the_mean_over_common_draws():
    found = paired_difference(result("pretrained", [0.9, 0.8, 0.7]), result("raw", [0.8, 0.8, 0.5]))
    # Differences 0.1, 0, 0.2: mean 0.1, standard deviation 0.1.
    assert found.mean == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0.1 / 3**0.5)
    assert found.n == 3 and not found.clear
    assert str(found) == "+0.100 ± 0.058 (standard error over 3 draws): not more than twice its standard error"


def test_a_clear_difference_exceeds_twice_its_standard_error_in_either_direction():
    raw = result("raw", [0.5, 0.6, 0.7, 0.8])
    better = result("pretrained", [0.61, 0.69, 0.81, 0.89])
    # Differences 0.11, 0.09, 0.11, 0.09: mean 0.1, standard deviation 0.0115, standard error 0.0058.
    assert str(paired_difference(better, raw)).endswith(
        "0.006 (standard error over 4 draws): more than twice its standard error"
    )
    assert paired_difference(better, raw).clear and paired_difference(raw, better).clear
    assert not paired_difference(raw, raw).clear


@pytest.mark.parametrize(
    "other",
    [{"protocol_hash": "1"}, {"seeds": [7, 8]}, {"metric": "auroc"}, {"protocol": "linear"}, {"split": "validation"}],
)
def test_only_results_of_the_same_protocol_and_draws_are_compared(other):
    ours, theirs = result("pretrained", [0.9, 0.8]), result("raw", [0.1, 0.2])
    assert comparable(ours, theirs)
    assert not comparable(ours, replace(theirs, **other))
    with pytest.raises(InputError, match="same protocol and draws"):
        paired_difference(ours, replace(theirs, **other))


def test_one_number_has_no_standard_error():
    with pytest.raises(InputError, match="at least two draws"):
        paired_difference(result("pretrained", [0.9]), result("raw", [0.8]))
