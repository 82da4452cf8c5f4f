"""CACR with keys and a queue, against loops of the authors' form, and the identities that follow from it."""

import pytest
import torch

from contrast.core.embeddings import REMEMBERED, Embeddings
from contrast.losses.cacr_queue import CACRQueue
from tests.losses.reference import assert_same, distance, random, unit


def weighted(distances, logits):
    masses = [logit.exp() for logit in logits]
    return sum(mass * d for mass, d in zip(masses, distances, strict=True)) / sum(masses)


def by_loops(queries, keys, queue, attraction_scale, repulsion_scale, alpha, beta, constant, group=None):
    """Return the published form, one sample and one view at a time; keys may be None."""
    q = [unit(view) for view in queries]
    k = [None if key is None else unit(key) for key in keys]
    memory, rows, count = list(unit(queue)) if len(queue) else [], [], len(q[0])
    group = list(range(count)) if group is None else group
    for x in range(len(q)):
        for i in range(count):
            mates = [j for j in range(count) if group[j] == group[i]]
            pull = [distance(q[x][i], k[y][j]) for y in range(len(k)) if y != x and k[y] is not None for j in mates]
            if not pull:
                continue
            weights = [attraction_scale * (d if constant == "none" else d.detach()) for d in pull]
            row = alpha * weighted(pull, weights)
            remembered = [distance(q[x][i], u) for u in memory]
            batch = [distance(q[x][i], q[x][j]) for j in range(count) if j not in mates]
            logits = [-repulsion_scale * (d if constant == "none" else d.detach()) for d in remembered]
            logits += [-repulsion_scale * (d.detach() if constant == "all" else d) for d in batch]
            if logits:
                row = row - beta * weighted(remembered + batch, logits)
            rows.append(row)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("constant", ["published", "all", "none"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("remembered", [0, 6])
def test_it_equals_loops_of_the_authors_form(constant, views, labels, remembered):
    queries = [random(4, 3, seed=seed) for seed in range(views)]
    keys = [random(4, 3, seed=10 + seed) for seed in range(views)]
    queue, group = random(remembered, 3, seed=20), [0, 1, 0, 2] if labels else None
    loss = CACRQueue(1.7, 0.9, 0.8, 1.3, constant)
    found = loss(*queries, targets=keys, group=torch.tensor(group) if labels else None, extra=[queue])
    expected = by_loops(queries, keys, queue, 1.7, 0.9, 0.8, 1.3, constant, group)
    assert_same(found, expected, *queries, *keys, *([queue] if remembered else []))


def test_the_defaults_are_the_published_ones():
    queries, keys, queue = random(3, 4, 3), random(3, 4, 3, seed=1), random(5, 3, seed=2)
    found = CACRQueue()(*queries, targets=tuple(keys), extra=queue)
    expected = by_loops(queries, keys, queue, 1.0, 2.0, 1.0, 1.0, "published")
    assert_same(found, expected, queries, keys, queue)


def test_a_key_of_one_view_excludes_that_view():
    queries, (key,), queue = random(2, 4, 3), random(1, 4, 3, seed=1), random(5, 3, seed=2)
    found = CACRQueue()(*queries, targets=(None, key), extra=queue)
    expected = by_loops(queries, [None, key], queue, 1.0, 2.0, 1.0, 1.0, "published")
    assert_same(found, expected, queries, key, queue)
    assert not torch.autograd.grad(found, queries)[0][1].any()
    single = CACRQueue()(queries[0], targets=(None, key), extra=queue)
    torch.testing.assert_close(single, expected, rtol=1e-12, atol=0)


def test_a_view_is_compared_with_keys_of_its_own_samples_only():
    queries, keys = random(2, 4, 3), random(2, 4, 3, seed=1)
    rows = CACRQueue()(*queries, targets=tuple(keys), reduction="none")
    # Row 0 is view 0 of sample 0: its candidates are the queries of its view and the key of view 1 of sample 0.
    to_queries, to_keys = torch.autograd.grad(rows[0], (queries, keys))
    assert to_queries[0].abs().sum(dim=1).all()
    assert not to_queries[1].any()
    assert to_keys[1, 0].any()
    assert not to_keys[0].any()
    assert not to_keys[1, 1:].any()


@pytest.mark.parametrize("constant", ["published", "all", "none"])
def test_the_constant_weights_change_the_gradient_and_not_the_value(constant):
    queries, keys, queue = random(2, 4, 3), random(2, 4, 3, seed=1), random(5, 3, seed=2)
    values, gradients = [], []
    for which in (constant, "none"):
        value = CACRQueue(constant_weights=which)(*queries, targets=tuple(keys), extra=queue)
        values.append(value)
        gradients.append(torch.autograd.grad(value, queries)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-13, atol=0)
    assert torch.allclose(gradients[0], gradients[1]) == (constant == "none")


def test_with_no_batch_the_published_form_has_the_gradient_of_decoupled_info_nce():
    """Constant weights over the queue and t- = 1 / (2 T): 2 T grad (-s+ / T + log of the sum over Q of e^{s / T})."""
    (query,), (key,), queue, temperature = random(1, 1, 3), random(1, 1, 3, seed=1), random(5, 3, seed=2), 0.4
    q, k = unit(query), unit(key)
    expected = -(q * k).sum() / temperature + (q @ unit(queue).T / temperature).logsumexp(dim=1).sum()
    found = CACRQueue(1.0, 1 / (2 * temperature))(query, targets=(None, key), extra=queue)
    ours = torch.autograd.grad(found, (query, key, queue))
    theirs = torch.autograd.grad(2 * temperature * expected, (query, key, queue))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_a_large_scale_selects_the_nearest_of_queue_and_batch():
    queries, keys, queue = random(2, 4, 3), random(2, 4, 3, seed=1), random(5, 3, seed=2)
    q, u, rows = unit(queries), unit(queue), []
    for x in range(2):
        for i in range(4):
            others = [distance(q[x][i], z) for z in u] + [distance(q[x][i], q[x][j]) for j in range(4) if j != i]
            rows.append(-min(others))
    found = CACRQueue(repulsion_scale=1e6, attraction_weight=0)(*queries, targets=tuple(keys), extra=queue)
    torch.testing.assert_close(found, sum(rows) / 8, rtol=1e-9, atol=0)


def test_an_anchors_own_remembered_sample_does_not_repel():
    queries, keys, index = random(2, 4, 3), random(2, 4, 3, seed=1), torch.arange(4)
    z = unit(random(6, 3, seed=2)).detach()
    sample = torch.tensor([0, 1, 2, 3, 8, 9])
    queue = Embeddings(z, sample, sample, torch.full_like(sample, REMEMBERED))
    loss = CACRQueue(attraction_weight=0)
    found = loss(*queries, targets=tuple(keys), sample=index, extra=queue, reduction="none")
    for i in range(4):
        others = [j for j in range(6) if j != i]
        without = loss(*queries, targets=tuple(keys), sample=index, extra=queue[torch.tensor(others)], reduction="none")
        torch.testing.assert_close(found[i], without[i], rtol=1e-12, atol=0)


def test_a_single_sample_without_a_queue_is_attracted_only():
    queries, keys = random(2, 1, 3), random(2, 1, 3, seed=1)
    q, k = unit(queries), unit(keys)
    expected = (distance(q[0, 0], k[1, 0]) + distance(q[1, 0], k[0, 0])) / 2
    for constant in ("published", "all", "none"):
        assert_same(CACRQueue(constant_weights=constant)(*queries, targets=tuple(keys)), expected, queries, keys)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="repulsion_scale must be a number of 0 or more; got -1"):
        CACRQueue(repulsion_scale=-1)
    with pytest.raises(ValueError, match="constant_weights is 'published', 'all' or 'none'; got 'some'"):
        CACRQueue(constant_weights="some")
    with pytest.raises(ValueError, match=r"CACRQueue attracts momentum keys: pass targets=\(k_a, k_b\)"):
        CACRQueue()(torch.ones(2, 2), torch.ones(2, 2))
