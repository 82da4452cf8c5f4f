"""CACR with a Gaussian cost, against loops of the authors' variant, over processes, and where it meets CACR."""

import itertools

import pytest
import torch

from contrast.losses import CACR
from contrast.losses.cacr_rbf import CACRRBF
from contrast.losses.pair_loss import PairLoss
from tests.losses.reference import assert_same, distance, random, unit


def by_loops(views, attraction_scale, repulsion_scale, alpha, beta, t, *, group=None, extra=(), targets=None):
    """Give the variant, one pair at a time; with targets (one a view, maybe None) every view meets those of others."""
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
def test_it_is_the_authors_variant(views, group, extras):
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
def test_targets_are_met_from_every_other_view(given):
    tensors, keys = random(3, 4, 3), random(3, 4, 3, seed=1)
    targets = [key if there else None for key, there in zip(keys, given, strict=True)]
    found = CACRRBF(1.7, 0.9)(*tensors, targets=targets)
    assert_same(found, by_loops(tensors, 1.7, 0.9, 1.0, 1.0, 2.0, targets=targets), tensors, keys)


def test_heads_are_averaged():
    tensors, queue = random(3, 2, 4, 3), random(5, 3, seed=2)
    heads = [CACRRBF()(*tensors[:, head], extra=queue) for head in range(2)]
    assert_same(CACRRBF()(*tensors, extra=queue), sum(heads) / 2, tensors, queue)


def test_a_small_cost_scale_gives_the_repulsion_of_cacr():
    """log mean sum w e^{-t d} = -t mean sum w d + O(t^2)."""
    a, b = random(4, 3), random(4, 3, seed=1)
    t = 1e-6
    found = CACRRBF(repulsion_scale=1.4, attraction_weight=0, cost_scale=t)(a, b) / t
    torch.testing.assert_close(found, CACR(repulsion_scale=1.4, attraction_weight=0)(a, b), rtol=1e-5, atol=0)


def test_uniform_weights_leave_the_logarithm_of_a_mean_of_gaussians():
    a, b = random(4, 3), random(4, 3, seed=1)
    u, v = unit(a), unit(b)
    costs = torch.stack([(-2 * distance(u[i], v[j])).exp() for i in range(4) for j in range(4) if i != j])
    assert_same(CACRRBF(repulsion_scale=0, attraction_weight=0)(a, b), costs.mean().log(), a, b)


def test_the_logarithm_stands_outside_the_mean_over_the_batch():
    """Rows of unequal costs tell log of mean from mean of log: two anchors, at d = 0 and d = 4."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    # Anchor a_0 meets b_1 (d = 0, cost 1), a_1 meets b_0 (d = 4, cost e^-8).
    expected = ((1 + torch.tensor(-8.0, dtype=torch.float64).exp()) / 2).log()
    torch.testing.assert_close(CACRRBF(attraction_weight=0)(a, b), expected, rtol=1e-12, atol=0)


def test_a_batch_is_more_than_its_parts():
    a, b = random(6, 3), random(6, 3, seed=1)
    queue = random(4, 3, seed=2)
    halves = [CACRRBF()(a[part], b[part], extra=queue) for part in (slice(0, 3), slice(3, 6))]
    assert abs(CACRRBF()(a, b, extra=queue) - sum(halves) / 2) > 1e-3


def test_its_gradient_is_the_derivative():
    tensors = random(3, 3, 3)
    assert torch.autograd.gradcheck(lambda z: CACRRBF(1.7, 0.9)(*z), tensors)


@pytest.mark.parametrize("scales", [(0.0, 0.0, 0.0), (1e4, 1e4, 1e4), (1.0, 1.0, 500.0), (1.0, 1e4, 2.0)])
@pytest.mark.parametrize("samples", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extremes_stay_finite(scales, samples, dtype):
    tensors = torch.randn(3, samples, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    value = CACRRBF(scales[0], scales[1], cost_scale=scales[2])(*tensors)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, tensors)[0]).all()


def test_rows_are_refused_in_a_sentence():
    loss, z = CACRRBF(), random(4, 3)
    words = "CACRRBF has no rows: its logarithm is outside the mean over the batch"
    with pytest.raises(ValueError, match=words):
        loss(z, z, reduction="none")
    (pairs,) = loss.pairs(z, z)
    for asked in (loss.rows, loss.per_anchor):
        with pytest.raises(ValueError, match=words):
            asked(pairs)


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
def test_a_negative_number_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a number of 0 or more; got -1"):
        CACRRBF(**{name: -1})
