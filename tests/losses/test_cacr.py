"""CACR against loops of the authors' small-scale form, and the identities that follow from it."""

import itertools
import math

import pytest
import torch

from contrast.core.pairs import Pairs
from contrast.core.reductions import Count
from contrast.losses import CACR
from tests.losses.reference import assert_same, distance, random, unit


def weighted(distances, scale, detach=False):
    """Return sum_j w_j d_j with w = softmax(scale * d)."""
    masses = [(scale * d.detach() if detach else scale * d).exp() for d in distances]
    return sum(mass * d for mass, d in zip(masses, distances, strict=True)) / sum(masses)


def attraction(views, scale, detach=False):
    z, count = [unit(view) for view in views], len(views[0])
    rows = [
        weighted([distance(z[x][i], z[k][i]) for k in range(len(z)) if k != x], scale, detach)
        for x in range(len(z))
        for i in range(count)
    ]
    return sum(rows) / len(rows)


def repulsion(views, scale, detach=False, extra=()):
    z, count = [unit(view) for view in views], len(views[0])
    pairs = []
    for x, y in itertools.combinations(range(len(z)), 2):
        rows = [
            weighted(
                [distance(z[x][i], z[y][j]) for j in range(count) if j != i] + [distance(z[x][i], u) for u in extra],
                -scale,
                detach,
            )
            for i in range(count)
        ]
        pairs.append(sum(rows) / count)
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("views", [2, 3, 4, 5])
@pytest.mark.parametrize("detach", [False, True])
def test_it_equals_loops_of_the_authors_form(views, detach):
    tensors = [random(4, 3, seed=seed) for seed in range(views)]
    found = CACR(1.7, 0.9, attraction_weight=0.8, repulsion_weight=1.3, detach_weights=detach)(*tensors)
    expected = 0.8 * attraction(tensors, 1.7, detach) - 1.3 * repulsion(tensors, 0.9, detach)
    assert_same(found, expected, *tensors)


def test_the_defaults_are_the_published_ones():
    a, b, c = random(3, 4, 3).unbind()
    assert_same(CACR()(a, b, c), attraction([a, b, c], 1.0) - repulsion([a, b, c], 1.0), a, b, c)


def test_extras_join_the_repulsion_of_every_view_pair():
    tensors, queue = [random(4, 3, seed=seed) for seed in range(3)], random(6, 3, seed=9)
    found = CACR(1.0, 2.0)(*tensors, extra=queue)
    assert_same(found, attraction(tensors, 1.0) - repulsion(tensors, 2.0, extra=unit(queue)), *tensors, queue)


def test_a_single_sample_is_attracted_and_repelled_by_the_extras():
    tensors, queue = [random(1, 3, seed=seed) for seed in range(2)], random(6, 3, seed=9)
    assert_same(CACR()(*tensors), attraction(tensors, 1.0), *tensors)
    assert_same(
        CACR()(*tensors, extra=queue), attraction(tensors, 1.0) - repulsion(tensors, 1.0, extra=unit(queue)), queue
    )


def test_with_targets_every_view_is_compared_with_the_targets_of_all_others():
    queries, keys = random(3, 4, 3), random(3, 4, 3, seed=1)
    q, k, rows = unit(queries), unit(keys), []
    for x in range(3):
        for i in range(4):
            others = [y for y in range(3) if y != x]
            pull = weighted([distance(q[x][i], k[y][i]) for y in others], 1.5)
            push = [weighted([distance(q[x][i], k[y][j]) for j in range(4) if j != i], -2.0) for y in others]
            rows.append(pull - sum(push) / 2)
    found = CACR(1.5, 2.0)(*queries, targets=tuple(keys))
    assert_same(found, sum(rows) / len(rows), queries, keys)


def test_a_target_of_one_view_excludes_that_view():
    (query,), (key,) = random(1, 4, 3), random(1, 4, 3, seed=1)
    q, k = unit(query), unit(key)
    rows = [distance(q[i], k[i]) - weighted([distance(q[i], k[j]) for j in range(4) if j != i], -1.0) for i in range(4)]
    assert_same(CACR()(query, targets=(None, key)), sum(rows) / 4, query, key)


def test_repulsion_over_all_is_one_softmax_over_the_negatives_of_every_view():
    tensors = [random(4, 3, seed=seed) for seed in range(3)]
    z = [unit(view) for view in tensors]
    rows = [
        weighted([distance(z[x][i], z[y][j]) for y in range(3) for j in range(4) if j != i], -2.0)
        for x in range(3)
        for i in range(4)
    ]
    found = CACR(1.0, 2.0, repulsion="all")(*tensors)
    assert_same(found, attraction(tensors, 1.0) - sum(rows) / len(rows), *tensors)


def test_labels_attract_the_class_and_repel_the_others():
    tensors, group = [random(4, 3, seed=seed) for seed in range(2)], [0, 1, 0, 2]
    z = [unit(view) for view in tensors]
    pull = []
    for x, i in itertools.product(range(2), range(4)):
        mates = [(y, j) for y in range(2) for j in range(4) if group[j] == group[i] and (y, j) != (x, i)]
        pull.append(weighted([distance(z[x][i], z[y][j]) for y, j in mates], 1.0))
    push = [weighted([distance(z[0][i], z[1][j]) for j in range(4) if group[j] != group[i]], -1.0) for i in range(4)]
    found = CACR()(*tensors, group=torch.tensor(group))
    assert_same(found, sum(pull) / 8 - sum(push) / 4, *tensors)


def test_with_two_views_the_attraction_scale_has_no_effect():
    a, b = random(4, 3), random(4, 3, seed=1)
    values = [CACR(scale)(a, b).item() for scale in (0.0, 1.0, 50.0)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-13)


def test_scales_of_zero_give_mean_distances():
    tensors = [random(4, 3, seed=seed) for seed in range(3)]
    z = [unit(view) for view in tensors]
    ordered = list(itertools.permutations(range(3), 2))
    near = sum(distance(z[x][i], z[y][i]) for x, y in ordered for i in range(4)) / (4 * 6)
    far = [distance(z[x][i], z[y][j]) for x, y in ordered if x < y for i in range(4) for j in range(4) if i != j]
    found = CACR(0, 0, attraction_weight=2.0, repulsion_weight=0.5)(*tensors)
    assert_same(found, 2 * near - 0.5 * sum(far) / len(far), *tensors)


def test_large_scales_select_the_farthest_positive_and_the_nearest_negative():
    tensors = [random(4, 3, seed=seed) for seed in range(3)]
    z = [unit(view) for view in tensors]
    far = [max(distance(z[x][i], z[y][i]) for y in range(3) if y != x) for x in range(3) for i in range(4)]
    near = [
        min(distance(z[x][i], z[y][j]) for j in range(4) if j != i)
        for x, y in itertools.combinations(range(3), 2)
        for i in range(4)
    ]
    found = CACR(1e6, 1e6)(*tensors)
    torch.testing.assert_close(found, sum(far) / len(far) - sum(near) / len(near), rtol=1e-9, atol=0)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_detached_weights_have_the_gradient_of_decoupled_info_nce(temperature):
    """With two views and t- = 1 / (2 T): grad CACR = 2 T grad (-s+ / T + log of the sum over j != i of e^{s / T})."""
    a, b = random(4, 3), random(4, 3, seed=1)
    s = unit(a) @ unit(b).T / temperature
    rows = [torch.stack([s[i, j] for j in range(4) if j != i]).logsumexp(0) - s[i, i] for i in range(4)]
    expected = torch.autograd.grad(2 * temperature * sum(rows) / 4, (a, b))
    found = torch.autograd.grad(CACR(1.0, 1 / (2 * temperature), detach_weights=True)(a, b), (a, b))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_repulsion_is_a_log_sum_exp_minus_the_entropy_of_its_weights(scale):
    """sum_j w_j (-d_j) = (LSE_j(-t d_j) - H(w)) / t."""
    a, b = random(4, 3), random(4, 3, seed=1)
    u, v, rows = unit(a), unit(b), []
    for i in range(4):
        logits = torch.stack([-scale * distance(u[i], v[j]) for j in range(4) if j != i])
        w = logits.softmax(0)
        rows.append((logits.logsumexp(0) + (w * w.log()).sum()) / scale)
    torch.testing.assert_close(
        CACR(repulsion_scale=scale, attraction_weight=0)(a, b), sum(rows) / 4, rtol=1e-12, atol=0
    )


def test_a_larger_attraction_scale_increases_the_gradient_of_the_farthest_positive():
    angles = [0.0, 0.3, 1.2]
    pulls = []
    for scale in (0.0, 1.0, 4.0):
        views = [torch.tensor([[math.cos(t), math.sin(t)]], dtype=torch.float64, requires_grad=True) for t in angles]
        value = CACR(scale, repulsion_weight=0, detach_weights=True)(*views)
        pulls.append(float(torch.autograd.grad(value, views[2])[0].norm()))
    assert pulls[0] < pulls[1] < pulls[2]


def test_equal_positives_have_an_attraction_of_zero():
    z = random(4, 3)
    assert abs(CACR(repulsion_weight=0)(z, z, z).item()) < 1e-14


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_weight_of_zero_removes_its_term(weights):
    a, b = random(4, 3), random(4, 3, seed=1)
    found = CACR(1.0, 1.0, *weights)(a, b)
    expected = weights[0] * attraction([a, b], 1.0) - weights[1] * repulsion([a, b], 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("repulsion_over", ["view_pairs", "all"])
@pytest.mark.parametrize("labels", [False, True])
def test_the_positive_prior_subtracts_the_positives_from_the_repulsion(views, repulsion_over, labels):
    tensors, group, prior = [random(4, 3, seed=seed) for seed in range(views)], [0, 1, 2, 3], 0.2
    if labels:
        group = [0, 1, 0, 2]
    z, rows = [unit(view) for view in tensors], []
    for x, i in itertools.product(range(views), range(4)):
        others = range(x + 1, views) if repulsion_over == "view_pairs" else [range(views)]
        for part in others:
            part = [part] if isinstance(part, int) else part
            near = [distance(z[x][i], z[y][j]) for y in part for j in range(4) if group[j] != group[i]]
            mates = [
                distance(z[x][i], z[y][j]) for y in part for j in range(4) if group[j] == group[i] and (y, j) != (x, i)
            ]
            rows.append((weighted(near, -1.4) - prior * sum(mates) / len(mates)) / (1 - prior))
    found = CACR(1.0, 1.4, attraction_weight=0, repulsion_weight=1.3, repulsion=repulsion_over, positive_prior=prior)(
        *tensors, group=torch.tensor(group)
    )
    assert_same(found, -1.3 * sum(rows) / len(rows), *tensors)


@pytest.mark.parametrize("scale", [0.0, 1.4])
def test_the_positive_prior_gives_the_repulsion_of_the_true_negatives(scale):
    """Some negatives of anchor 0 are copies of its positive; the prior is their share of the weights."""
    anchor, positive, true = random(1, 3), random(1, 3, seed=1), random(4, 3, seed=2)
    hidden = positive.expand(2, 3)
    d = ((unit(anchor) - unit(torch.cat([hidden, true]))) ** 2).sum(dim=1)
    prior = (-scale * d).softmax(dim=0)[:2].sum().item()
    found = CACR(1.0, scale, positive_prior=prior)(anchor, positive, extra=[hidden, true], reduction="none")
    pure = CACR(1.0, scale)(anchor, positive, extra=true, reduction="none")
    torch.testing.assert_close(found[0], pure[0], rtol=1e-11, atol=0)
    naive = CACR(1.0, scale)(anchor, positive, extra=[hidden, true], reduction="none")
    assert abs(naive[0] - pure[0]) > 1e-3


def test_the_positive_prior_has_the_derived_sign_and_beta():
    a = torch.eye(3, dtype=torch.float64)
    # Each d+ is 4 and each negative's d is 2: the repulsion is (2 - 4 prior) / (1 - prior).
    for prior in (0.0, 0.1, 0.5):
        loss = CACR(attraction_weight=0, repulsion_weight=3, positive_prior=prior)
        assert loss(a, -a).item() == pytest.approx(-3 * (2 - 4 * prior) / (1 - prior), rel=1e-13)


def test_the_positive_prior_does_not_change_an_anchor_without_negatives():
    a, b = random(1, 3), random(1, 3, seed=1)
    assert_same(CACR(positive_prior=0.3)(a, b), attraction([a, b], 1.0), a, b)


@pytest.mark.parametrize("prior", [-0.1, 1.0, float("nan")])
def test_a_prior_that_is_no_share_raises(prior):
    with pytest.raises(ValueError, match="positive_prior is a share, 0 or more and below 1"):
        CACR(positive_prior=prior)


@pytest.mark.parametrize("views", [2, 4])
def test_all_view_pairs_repel_in_one_pass_over_these_pairs_only(monkeypatch, views):
    tensors, passes = [random(4, 3, seed=seed) for seed in range(views)], []
    (pairs,) = CACR().pairs(*tensors)
    reduce = Pairs.reduce
    monkeypatch.setattr(Pairs, "reduce", lambda pairs, *given: passes.append(given) or reduce(pairs, *given))
    CACR().rows(pairs)
    negative = [[each for each in given if each.over != "positive" and not isinstance(each, Count)] for given in passes]
    (repulsion,) = filter(None, negative)
    compared = {
        (int(x), int(y))
        for each in repulsion
        for x in pairs.anchor.view[each.rows].unique()
        for y in torch.cat([part.view for part in pairs.candidates])[each.among].unique()
    }
    assert compared == set(itertools.combinations(range(views), 2))
