"""SigLIP against the published sum over the matrix of pairs, and against loops."""

import itertools
import math

import pytest
import torch

from contrast.losses.siglip import SigLIP
from tests.losses.reference import anchors, assert_same, random, siglip, unit


def by_loops(views, group, scale, bias, *, targets=None, extra=()):
    """Return the mean over the anchors with positives of their sums of -log sigmoid, one pair at a time."""
    rows = []
    for z, positives, negatives in anchors(views, group, targets=targets, extra=extra, across=True):
        if positives:
            attract = sum(torch.sigmoid(scale * (z @ u) + bias).log() for u in positives)
            rows.append(-attract - sum(torch.sigmoid(-(scale * (z @ u) + bias)).log() for u in negatives))
    return sum(rows) / len(rows)


def test_two_views_give_the_published_loss_and_gradient():
    image, text = random(5, 4), random(5, 4, seed=1)
    loss = SigLIP().double()
    assert_same(loss(image, text), siglip(image, text, loss.log_scale, loss.bias), image, text, *loss.parameters())


def test_scale_and_bias_start_at_ten_and_minus_ten():
    loss = SigLIP()
    assert loss.log_scale.exp().item() == pytest.approx(10, rel=1e-6)
    assert loss.bias.item() == -10
    assert {name for name, _ in loss.named_parameters()} == {"log_scale", "bias"}
    zero = torch.zeros(4, 3)
    # Every similarity is 0: one positive costs log(1 + e^10), each of the 3 negatives log(1 + e^-10).
    assert loss(zero, zero).item() == pytest.approx(math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10)), rel=1e-6)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops(learn, views, labels, extras):
    tensors, queue = [random(4, 3, seed=seed) for seed in range(views)], random(5, 3, seed=9)
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    loss = SigLIP(4.0, -1.5, learn=learn).double()
    found = loss(*tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else [])
    scale, bias = (loss.log_scale.exp(), loss.bias) if learn else (4.0, -1.5)
    expected = by_loops(tensors, group, scale, bias, extra=list(unit(queue)) if extras else [])
    assert_same(found, expected, *tensors, *([queue] if extras else []), *loss.parameters())


@pytest.mark.parametrize("both", [True, False])
def test_targets_replace_the_candidates(both):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    targets = tuple(keys) if both else (None, keys[1])
    loss = SigLIP(4.0, -1.5).double()
    expected = by_loops(views, range(4), loss.log_scale.exp(), loss.bias, targets=targets)
    assert_same(loss(*views, targets=targets), expected, views[0], keys[1], *loss.parameters())


def test_more_views_are_the_mean_over_view_pairs_times_the_number_of_other_views():
    views = [random(4, 3, seed=seed) for seed in range(4)]
    loss = SigLIP(5.0, -2.0, learn=False)
    pairs = [
        siglip(a, b, torch.tensor(5.0, dtype=torch.float64).log(), -2.0) for a, b in itertools.combinations(views, 2)
    ]
    assert_same(loss(*views), 3 * sum(pairs) / 6, *views)


def test_without_learning_there_are_no_parameters_and_the_same_value():
    a, b = random(5, 4), random(5, 4, seed=1)
    fixed, learned = SigLIP(7.0, -3.0, learn=False), SigLIP(7.0, -3.0)
    assert not list(fixed.parameters())
    torch.testing.assert_close(fixed(a, b), learned.double()(a, b), rtol=1e-6, atol=0)
    assert "scale" not in fixed.metrics


def test_metrics_contain_scale_and_bias():
    loss = SigLIP(7.0, -3.0)
    loss(torch.eye(3), torch.eye(3))
    assert loss.metrics["scale"].item() == pytest.approx(7, rel=1e-6)
    assert loss.metrics["bias"].item() == -3


def test_parameters_of_higher_precision_do_not_change_the_type_of_the_loss():
    assert SigLIP().double()(torch.eye(3), torch.eye(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 0}, "scale must be a positive number; got 0"),
        ({"scale": float("inf")}, "scale must be a positive number; got inf"),
        ({"bias": float("nan")}, "bias must be a finite number; got nan"),
    ],
)
def test_impossible_values_raise(given, message):
    with pytest.raises(ValueError, match=message):
        SigLIP(**given)
