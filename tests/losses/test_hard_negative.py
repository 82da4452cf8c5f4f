"""HCL and the debiased loss against loops, against the published dense form, and their special cases."""

import math

import pytest
import torch

from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp
from contrast.losses.hard_negative import HardNegative
from contrast.losses.info_nce import InfoNCE
from tests.losses.reference import anchors, assert_same, random, unit


def by_loops(views, group, temperature, hardness, prior, *, targets=None, extra=()):
    """Return the mean over the valid anchors by the formula, and how many of them the maximum clamped."""
    rows, clamped = [], 0
    for z, positives, negatives in anchors(views, group, targets=targets, extra=extra):
        if not positives or not negatives:
            continue
        attract, repel = ([(z @ u / temperature).exp() for u in part] for part in (positives, negatives))
        importance = [e**hardness for e in repel]
        hard = sum(w * e for w, e in zip(importance, repel, strict=True)) / (sum(importance) / len(repel))
        corrected = (hard - prior * len(repel) * sum(attract) / len(attract)) / (1 - prior)
        least = len(repel) * math.exp(-1 / temperature)
        if corrected < least:
            corrected, clamped = least, clamped + 1
        rows.append(-sum((p / (p + corrected)).log() for p in attract) / len(attract))
    return sum(rows) / len(rows), clamped


FORMS = [(0.0, 0.0), (0.0, 0.1), (1.0, 0.0), (1.0, 0.1), (2.5, 0.4)]


@pytest.mark.parametrize(("hardness", "prior"), FORMS)
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops(hardness, prior, views, labels, extras):
    tensors, queue = [random(4, 3, seed=seed) for seed in range(views)], random(5, 3, seed=9)
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    found = HardNegative(0.4, hardness, prior)(
        *tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else []
    )
    expected, _ = by_loops(tensors, group, 0.4, hardness, prior, extra=list(unit(queue)) if extras else [])
    assert_same(found, expected, *tensors, *([queue] if extras else []))


@pytest.mark.parametrize(("hardness", "prior"), FORMS)
def test_targets_replace_the_candidates(hardness, prior):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    for targets in (tuple(keys), (None, keys[1])):
        found = HardNegative(0.4, hardness, prior)(*views, targets=targets)
        assert_same(found, by_loops(views, range(4), 0.4, hardness, prior, targets=targets)[0], views[0], keys[1])


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_it_is_the_published_dense_form_of_two_views(hardness):
    """N = 2 n - 2 negatives, R = sum(imp * neg) / mean(imp), the clamp at N e^(-1/t); beta = 0: Chuang et al."""
    a, b = random(6, 4), random(6, 4, seed=1)
    z = unit(torch.cat([a, b]))
    is_negative = ~(torch.eye(12, dtype=torch.bool) | torch.eye(12, dtype=torch.bool).roll(6, 0))
    negative = (z @ z.T / 0.5).exp()[is_negative].view(12, 10)
    positive = ((z[:6] * z[6:]).sum(dim=1) / 0.5).exp().repeat(2)
    importance = negative**hardness
    hard = (importance * negative).sum(dim=1) / importance.mean(dim=1)
    left = ((hard - 0.1 * 10 * positive) / 0.9).clamp(min=10 * math.exp(-1 / 0.5))
    expected = -(positive / (positive + left)).log().mean()
    assert_same(HardNegative(hardness=hardness)(a, b), expected, a, b)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1])])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_without_hardness_and_prior_it_is_nt_xent(labels, temperature):
    views = [random(5, 3, seed=seed) for seed in range(3)]
    found = HardNegative(temperature, 0.0, 0.0)(*views, group=labels)
    expected = InfoNCE(temperature, positives="alone")(*views, group=labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, views) for value in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("hardness", "sums"), [(0.0, 1), (1.0, 2)])
def test_all_sums_over_negatives_take_one_pass(monkeypatch, hardness, sums):
    passes, reduce = [], Pairs.reduce
    monkeypatch.setattr(Pairs, "reduce", lambda pairs, *given: passes.append(given) or reduce(pairs, *given))
    HardNegative(0.5, hardness, 0.1)(random(5, 3), random(5, 3, seed=1))
    of_negatives = [sum(isinstance(each, LogSumExp) and each.over == "negative" for each in given) for given in passes]
    assert [count for count in of_negatives if count] == [sums]


@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_hardness_zero_is_the_limit_of_small_hardness(prior):
    a, b = random(5, 3), random(5, 3, seed=1)
    assert_same(HardNegative(0.5, 1e-11, prior)(a, b), HardNegative(0.5, 0.0, prior)(a, b), a, b, rtol=1e-8)


def test_large_hardness_repeats_the_hardest_negative():
    a, b = random(5, 3), random(5, 3, seed=1)
    z = unit(torch.cat([a, b]))
    excluded = torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).roll(5, 0)
    hardest = (z @ z.T).masked_fill(excluded, -torch.inf).amax(dim=1)
    positive = (z[:5] * z[5:]).sum(dim=1).repeat(2)
    expected = torch.nn.functional.softplus(math.log(8) + (hardest - positive) / 0.5).mean()
    torch.testing.assert_close(HardNegative(0.5, 1e6, 0.0)(a, b), expected, rtol=1e-6, atol=0)


def test_clamped_rows_have_no_gradient_of_negatives():
    # Positives at 1 and negatives at -1 or a little above: R - tau+ N e^2 is below 0.
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    queue = torch.tensor([[-1.0, 0.1], [-1.0, -0.3]], dtype=torch.float64, requires_grad=True)
    value = HardNegative(0.5, 1.0, 0.1)(query, query, extra=queue)
    assert value.item() == pytest.approx(math.log(math.exp(2) + 2 * math.exp(-2)) - 2, rel=1e-12)
    assert not torch.autograd.grad(value, queue)[0].any()
    free = HardNegative(0.5, 1.0, 0.0)(query, query, extra=queue)
    assert torch.autograd.grad(free, queue)[0].any()


def test_partly_clamped_rows_equal_loops():
    a = random(6, 3)
    b = (a + 0.8 * random(6, 3, seed=5)).detach().requires_grad_()
    expected, clamped = by_loops([a, b], range(6), 0.5, 1.0, 0.45)
    assert 0 < clamped < 12
    assert_same(HardNegative(0.5, 1.0, 0.45)(a, b), expected, a, b)


def test_a_corrected_mass_of_zero_gives_finite_values():
    # The mass of the negative is tau+ times that of the positive: R - tau+ N pos = 0.
    s = 0.5 + 0.5 * math.log(0.5)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64, requires_grad=True)
    queue = torch.tensor([[s, math.sqrt(1 - s * s)]], dtype=torch.float64, requires_grad=True)
    value = HardNegative(0.5, 1.0, 0.5)(query, targets=(None, key), extra=queue)
    assert torch.isfinite(value)
    assert all(torch.isfinite(back).all() for back in torch.autograd.grad(value, [query, key, queue]))


def test_float32_equals_float64_at_a_low_temperature():
    views = [random(8, 4, seed=seed) for seed in range(2)]
    narrow = [view.detach().float() for view in views]
    expected = HardNegative(0.01, 2.0)(*[view.double() for view in narrow])
    assert float(HardNegative(0.01, 2.0)(*narrow)) == pytest.approx(float(expected), rel=1e-5)


def test_an_anchor_without_negatives_is_invalid():
    z = random(4, 3)
    value = HardNegative()(z, z, group=torch.zeros(4, dtype=torch.int64))
    assert value == 0
    assert not torch.autograd.grad(value, z)[0].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"temperature": float("inf")}, "temperature must be a positive number; got inf"),
        ({"hardness": -1}, "hardness must be a number of 0 or more; got -1"),
        ({"hardness": float("nan")}, "hardness must be a number of 0 or more; got nan"),
        ({"positive_prior": 1.0}, r"positive_prior is a share of the negatives, in \[0, 1\); got 1.0"),
        ({"positive_prior": -0.1}, r"positive_prior is a share of the negatives, in \[0, 1\); got -0.1"),
    ],
)
def test_impossible_values_raise(given, message):
    with pytest.raises(ValueError, match=message):
        HardNegative(**given)
