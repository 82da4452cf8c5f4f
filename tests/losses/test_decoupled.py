"""DCL and DCLW against loops, against the form of other libraries, and their relation to NT-Xent."""

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
def test_targets_replace_the_candidates_and_anchors_without_one_are_in_no_mean(given, both):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    targets = tuple(keys) if both else (None, keys[1])
    found = DecoupledInfoNCE(0.3, **given)(*views, targets=targets)
    expected = by_loops(views, range(4), 0.3, given.get("sigma"), targets=targets)
    assert_same(found, expected, views[0], keys[1])


@pytest.mark.parametrize("weighting", ["none", "von_mises_fisher"])
def test_both_views_are_negatives_as_in_other_libraries(weighting):
    """The negatives are off-diagonal in both views; the weights of one direction are a softmax times n."""
    a, b = random(5, 4), random(5, 4, seed=1)

    def one_way(x, y):
        x, y = unit(x), unit(y)
        positive = (x * y).sum(dim=1)
        off = ~torch.eye(5, dtype=torch.bool)
        both = torch.cat([(x @ x.T)[off].view(5, 4), (x @ y.T)[off].view(5, 4)], dim=1)
        weight = 2 - 5 * torch.softmax(positive.detach() / 0.5, dim=0) if weighting != "none" else 1.0
        return ((both / 0.1).logsumexp(dim=1) - weight * positive / 0.1).mean()

    expected = (one_way(a, b) + one_way(b, a)) / 2
    assert_same(DecoupledInfoNCE(weighting=weighting)(a, b), expected, a, b)


def test_nt_xent_is_larger_by_the_softplus_of_the_positive_minus_the_negatives():
    a, b = random(5, 4), random(5, 4, seed=1)
    z = unit(torch.cat([a, b]))
    s = z @ z.T / 0.2
    positive = s.diagonal(5).repeat(2)
    excluded = torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).roll(5, 0)
    repelled = s.masked_fill(excluded, -torch.inf).logsumexp(dim=1)
    given = {"reduction": "none"}
    difference = InfoNCE(0.2)(a, b, **given) - DecoupledInfoNCE(0.2)(a, b, **given)
    torch.testing.assert_close(difference, (positive - repelled).exp().log1p(), rtol=1e-11, atol=1e-13)
    assert (difference > 0).all()


def test_with_equal_positives_the_weighting_changes_nothing():
    a = random(5, 4)
    assert_same(DecoupledInfoNCE(0.2, "von_mises_fisher")(a, a), DecoupledInfoNCE(0.2)(a, a), a)


@pytest.mark.parametrize("weighting", ["none", "von_mises_fisher"])
def test_anchors_without_negatives_are_invalid(weighting):
    a, b = random(4, 3), random(4, 3, seed=1)
    value = DecoupledInfoNCE(0.3, weighting)(a, b, group=torch.zeros(4, dtype=torch.int64))
    assert value == 0
    assert not any(back.any() for back in torch.autograd.grad(value, [a, b]))


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1e3])
def test_a_narrow_weighting_neither_vanishes_nor_overflows(sigma):
    views = [random(6, 3, seed=seed) for seed in (0, 1)]
    narrow = [view.detach().float().requires_grad_() for view in views]
    loss = DecoupledInfoNCE(0.2, "von_mises_fisher", sigma)
    # The anchors of view 1 have no positives, and those of view 0 are at -1: if view 1 counted, its share of the
    # weights would be e^(1 / sigma).
    for given in ({}, {"targets": (None, -narrow[0].detach())}):
        value = loss(*narrow, **given)
        assert torch.isfinite(value)
        assert all(torch.isfinite(back).all() for back in torch.autograd.grad(value, narrow))
    positive = (unit(views[0]) * unit(views[1])).sum(dim=1).detach().repeat(2) / sigma
    weight = 2 - torch.softmax(positive, dim=0) * len(positive)
    plain, expected = loss(*views, reduction="none"), DecoupledInfoNCE(0.2)(*views, reduction="none")
    torch.testing.assert_close(plain, expected + (1 - weight) * positive * sigma / 0.2, rtol=1e-8, atol=1e-10)


def test_a_weighting_over_all_anchors_needs_pairs_of_its_own():
    own, _ = InfoNCE().embed([random(4, 3), random(4, 3, seed=1)])
    plain = Pairs(own[0], own)
    assert DecoupledInfoNCE().rows(plain).shape == (4,)
    with pytest.raises(ValueError, match="weighting compares an anchor with all others"):
        DecoupledInfoNCE(weighting="von_mises_fisher").rows(plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number; got nan"),
        ({"sigma": -1.0}, "sigma must be a positive number; got -1.0"),
        ({"sigma": float("inf")}, "sigma must be a positive number; got inf"),
        ({"weighting": "some"}, "weighting is 'none' or 'von_mises_fisher'; got 'some'"),
    ],
)
def test_impossible_values_raise(given, message):
    with pytest.raises(ValueError, match=message):
        DecoupledInfoNCE(**given)
