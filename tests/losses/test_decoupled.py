"""DCL and DCLW against loops from the formula, against the form of other libraries, and what ties them to NT-Xent."""

import pytest
import torch

from contrast.core.pairs import Pairs
from contrast.losses.decoupled import DecoupledInfoNCE
from contrast.losses.info_nce import InfoNCE
from tests.losses.reference import anchors, assert_same, random, unit


def by_loops(views, group, temperature, sigma=None, *, targets=None, extra=()):
    """Return the mean over the valid anchors, one exponential at a time."""
    repel, attract = [], []
    for z, positives, negatives in anchors(views, group, targets=targets, extra=extra):
        if positives and negatives:
            repel.append(sum((z @ u / temperature).exp() for u in negatives).log())
            attract.append(sum(z @ u for u in positives) / len(positives))
    weights = [1.0] * len(attract)
    if sigma is not None:
        masses = [(s.detach() / sigma).exp() for s in attract]
        weights = [2 - mass / (sum(masses) / len(masses)) for mass in masses]
    rows = [r - w * s / temperature for r, w, s in zip(repel, weights, attract, strict=True)]
    return sum(rows) / len(rows)


WEIGHTINGS = [{}, {"weighting": "von_mises_fisher", "sigma": 0.4}]


@pytest.mark.parametrize("given", WEIGHTINGS)
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops(given, views, labels, extras):
    tensors, queue = [random(4, 3, seed=seed) for seed in range(views)], random(5, 3, seed=9)
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    found = DecoupledInfoNCE(0.3, **given)(
        *tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else []
    )
    expected = by_loops(tensors, group, 0.3, given.get("sigma"), extra=list(unit(queue)) if extras else [])
    assert_same(found, expected, *tensors, *([queue] if extras else []))


@pytest.mark.parametrize("given", WEIGHTINGS)
@pytest.mark.parametrize("both", [True, False])
def test_targets_take_the_candidates_place_and_anchors_without_one_leave_every_mean(given, both):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    targets = tuple(keys) if both else (None, keys[1])
    found = DecoupledInfoNCE(0.3, **given)(*views, targets=targets)
    expected = by_loops(views, range(4), 0.3, given.get("sigma"), targets=targets)
    assert_same(found, expected, views[0], keys[1])


def test_each_head_is_weighted_by_its_own_mean():
    heads = [random(3, 4, 3, seed=seed) for seed in (0, 1)]
    found = DecoupledInfoNCE(0.3, "von_mises_fisher", sigma=0.4)(*heads)
    expected = sum(by_loops([z[h] for z in heads], range(4), 0.3, 0.4) for h in range(3)) / 3
    assert_same(found, expected, *heads)


@pytest.mark.parametrize("weighting", ["none", "von_mises_fisher"])
def test_the_negatives_are_joint_as_in_other_libraries(weighting):
    """Off-diagonals of the same view and of the other view; weights of one direction by a softmax times n."""
    a, b = random(5, 4), random(5, 4, seed=1)

    def one_way(x, y):
        x, y = unit(x), unit(y)
        near = (x * y).sum(dim=1)
        off = ~torch.eye(5, dtype=torch.bool)
        both = torch.cat([(x @ x.T)[off].view(5, 4), (x @ y.T)[off].view(5, 4)], dim=1)
        weight = 2 - 5 * torch.softmax(near.detach() / 0.5, dim=0) if weighting != "none" else 1.0
        return ((both / 0.1).logsumexp(dim=1) - weight * near / 0.1).mean()

    expected = (one_way(a, b) + one_way(b, a)) / 2
    assert_same(DecoupledInfoNCE(weighting=weighting)(a, b), expected, a, b)


def test_nt_xent_is_larger_by_the_softplus_of_the_positive_over_the_negatives():
    a, b = random(5, 4), random(5, 4, seed=1)
    z = unit(torch.cat([a, b]))
    s = z @ z.T / 0.2
    near = s.diagonal(5).repeat(2)
    left_out = torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).roll(5, 0)
    repelled = s.masked_fill(left_out, -torch.inf).logsumexp(dim=1)
    given = {"reduction": "none"}
    difference = InfoNCE(0.2)(a, b, **given) - DecoupledInfoNCE(0.2)(a, b, **given)
    torch.testing.assert_close(difference, (near - repelled).exp().log1p(), rtol=1e-11, atol=1e-13)
    assert (difference > 0).all()


def test_where_all_positives_are_alike_the_weighting_changes_nothing():
    a = random(5, 4)
    assert_same(DecoupledInfoNCE(0.2, "von_mises_fisher")(a, a), DecoupledInfoNCE(0.2)(a, a), a)


@pytest.mark.parametrize("weighting", ["none", "von_mises_fisher"])
def test_anchors_without_negatives_are_left_out(weighting):
    a, b = random(4, 3), random(4, 3, seed=1)
    value = DecoupledInfoNCE(0.3, weighting)(a, b, group=torch.zeros(4, dtype=torch.int64))
    assert value == 0
    assert not any(back.any() for back in torch.autograd.grad(value, [a, b]))


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1e3])
def test_a_narrow_weighting_neither_vanishes_nor_overflows(sigma):
    views = [random(6, 3, seed=seed) for seed in (0, 1)]
    narrow = [view.detach().float().requires_grad_() for view in views]
    loss = DecoupledInfoNCE(0.2, "von_mises_fisher", sigma)
    # The anchors of view 1 have no positives; with those of view 0 all at -1, their share would be e^(1 / sigma).
    for given in ({}, {"targets": (None, -narrow[0].detach())}):
        value = loss(*narrow, **given)
        assert torch.isfinite(value)
        assert all(torch.isfinite(back).all() for back in torch.autograd.grad(value, narrow))
    near = (unit(views[0]) * unit(views[1])).sum(dim=1).detach().repeat(2) / sigma
    weight = 2 - torch.softmax(near, dim=0) * len(near)
    plain, expected = loss(*views, reduction="none"), DecoupledInfoNCE(0.2)(*views, reduction="none")
    torch.testing.assert_close(plain, expected + (1 - weight) * near * sigma / 0.2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 10.0, 1e4])
@pytest.mark.parametrize("weighting", ["none", "von_mises_fisher"])
def test_any_temperature_is_finite(temperature, weighting):
    views = [random(5, 3, seed=seed).detach().float().requires_grad_() for seed in range(3)]
    value = DecoupledInfoNCE(temperature, weighting)(*views)
    assert torch.isfinite(value)
    assert all(torch.isfinite(back).all() for back in torch.autograd.grad(value, views))


def test_pairs_of_somebody_else_are_refused_where_all_anchors_are_compared():
    own, _ = InfoNCE().embed([random(4, 3), random(4, 3, seed=1)])
    plain = Pairs(own[0], own)
    assert DecoupledInfoNCE().rows(plain).shape == (4,)
    with pytest.raises(ValueError, match="weighting compares an anchor with all others"):
        DecoupledInfoNCE(weighting="von_mises_fisher").rows(plain)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number; got nan"),
        ({"sigma": -1.0}, "sigma must be a positive number; got -1.0"),
        ({"sigma": float("inf")}, "sigma must be a positive number; got inf"),
        ({"weighting": "some"}, "weighting is 'none' or 'von_mises_fisher'; got 'some'"),
    ],
)
def test_impossible_values_are_answered_in_a_sentence(given, words):
    with pytest.raises(ValueError, match=words):
        DecoupledInfoNCE(**given)
