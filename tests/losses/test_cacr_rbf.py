"""CACR with a Gaussian cost against loops of the authors' variant, and its limit CACR."""

import itertools

import pytest
import torch

from contrast.losses import CACR
from contrast.losses.cacr_rbf import CACRRBF
from contrast.losses.pair_loss import PairLoss
from tests.losses.reference import assert_same, distance, random, unit


def by_loops(views, attraction_scale, repulsion_scale, alpha, beta, t, *, group=None, extra=(), targets=None):
    """Return the variant, one pair at a time; with targets, None or (N, D) per view, these are the candidates."""
    z, count = [unit(view) for view in views], len(views[0])
    group = list(range(count)) if group is None else group
    k = z if targets is None else [None if target is None else unit(target) for target in targets]
    pull = []
    for x, i in itertools.product(range(len(z)), range(count)):
        mates = [
            (y, j)
            for y in range(len(k))
            if k[y] is not None and (y != x or targets is None)
            for j in range(count)
            if group[j] == group[i] and (y, j) != (x, i)
        ]
        distances = [distance(z[x][i], k[y][j]) for y, j in mates]
        masses = [(attraction_scale * d).exp() for d in distances]
        if masses:
            pull.append(sum(m * d for m, d in zip(masses, distances, strict=True)) / sum(masses))
    push = []
    for x, y in itertools.product(range(len(z)), range(len(k))):
        if k[y] is None or not (x < y if targets is None else x != y):
            continue
        costs = []
        for i in range(count):
            distances = [distance(z[x][i], k[y][j]) for j in range(count) if group[j] != group[i]]
            distances += [distance(z[x][i], u) for u in extra]
            masses = [(-repulsion_scale * d).exp() for d in distances]
            if masses:
                costs.append(sum(m * (-t * d).exp() for m, d in zip(masses, distances, strict=True)) / sum(masses))
        if costs:
            push.append((sum(costs) / len(costs)).log())
    return alpha * sum(pull) / len(pull) + (beta * sum(push) / len(push) if push else 0)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("group", [None, [0, 1, 0, 2], [0, 0, 0, 1]])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops_of_the_authors_variant(views, group, extras):
    tensors, queue = [random(4, 3, seed=seed) for seed in range(views)], random(5, 3, seed=9)
    found = CACRRBF(1.7, 0.9, 0.8, 1.3, 1.5)(
        *tensors, group=None if group is None else torch.tensor(group), extra=queue if extras else ()
    )
    extra = unit(queue) if extras else ()
    expected = by_loops(tensors, 1.7, 0.9, 0.8, 1.3, 1.5, group=group, extra=extra)
    assert_same(found, expected, *tensors, *([queue] if extras else []))


def test_the_defaults_are_the_published_ones():
    tensors = random(3, 4, 3)
    assert_same(CACRRBF()(*tensors), by_loops(tensors, 1.0, 1.0, 1.0, 1.0, 2.0), tensors)


@pytest.mark.parametrize("given", [(True, True, True), (False, True, False)])
def test_targets_are_compared_with_every_other_view(given):
    tensors, keys = random(3, 4, 3), random(3, 4, 3, seed=1)
    targets = [key if present else None for key, present in zip(keys, given, strict=True)]
    found = CACRRBF(1.7, 0.9)(*tensors, targets=targets)
    assert_same(found, by_loops(tensors, 1.7, 0.9, 1.0, 1.0, 2.0, targets=targets), tensors, keys)


def test_a_small_cost_scale_gives_the_repulsion_of_cacr():
    """log mean sum w e^{-t d} = -t mean sum w d + O(t^2)."""
    a, b = random(4, 3), random(4, 3, seed=1)
    t = 1e-6
    found = CACRRBF(repulsion_scale=1.4, attraction_weight=0, cost_scale=t)(a, b) / t
    torch.testing.assert_close(found, CACR(repulsion_scale=1.4, attraction_weight=0)(a, b), rtol=1e-5, atol=0)


def test_uniform_weights_give_the_logarithm_of_a_mean_of_gaussians():
    a, b = random(4, 3), random(4, 3, seed=1)
    u, v = unit(a), unit(b)
    costs = torch.stack([(-2 * distance(u[i], v[j])).exp() for i in range(4) for j in range(4) if i != j])
    assert_same(CACRRBF(repulsion_scale=0, attraction_weight=0)(a, b), costs.mean().log(), a, b)


def test_the_logarithm_is_outside_the_mean_over_the_batch():
    """Anchors at d = 0 and d = 4: the log of the mean differs from the mean of logs."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    # The negative of a_0 is b_1 (d = 0, cost 1), that of a_1 is b_0 (d = 4, cost e^-8).
    expected = ((1 + torch.tensor(-8.0, dtype=torch.float64).exp()) / 2).log()
    torch.testing.assert_close(CACRRBF(attraction_weight=0)(a, b), expected, rtol=1e-12, atol=0)


def test_a_batch_is_not_the_mean_of_its_parts():
    a, b = random(6, 3), random(6, 3, seed=1)
    queue = random(4, 3, seed=2)
    halves = [CACRRBF()(a[part], b[part], extra=queue) for part in (slice(0, 3), slice(3, 6))]
    assert abs(CACRRBF()(a, b, extra=queue) - sum(halves) / 2) > 1e-3


def test_its_gradient_is_the_derivative():
    tensors = random(3, 3, 3)
    assert torch.autograd.gradcheck(lambda z: CACRRBF(1.7, 0.9)(*z), tensors)


def test_it_has_no_value_per_anchor():
    loss, z = CACRRBF(), random(4, 3)
    message = "CACRRBF has no value per anchor: its logarithm is outside the mean over the batch"
    with pytest.raises(ValueError, match=message):
        loss(z, z, reduction="none")
    (pairs,) = loss.pairs(z, z)
    for method in (loss.rows, loss.per_anchor):
        with pytest.raises(ValueError, match=message):
            method(pairs)


def test_metrics_are_those_of_every_loss_over_pairs():
    z = random(2, 4, 3)
    losses = CACRRBF(), CACR()
    for loss in losses:
        assert isinstance(loss, PairLoss)
        loss(*z)
    assert losses[0].metrics == losses[1].metrics
    assert not any(value.requires_grad for value in losses[0].metrics.values())


@pytest.mark.parametrize(
    "name", ["attraction_scale", "repulsion_scale", "attraction_weight", "repulsion_weight", "cost_scale"]
)
def test_a_negative_number_raises(name):
    with pytest.raises(ValueError, match=f"{name} must be a number of 0 or more; got -1"):
        CACRRBF(**{name: -1})
