"""InfoNCE in all its forms, against loops of the formulas and against torch's cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrast.losses import InfoNCE
from contrast.losses.info_nce import LARGEST_SCALE
from tests.losses.reference import anchors, assert_same, clip, info_nce, moco, random, supcon, unit


def by_loops(positives, views, group, temperature, *, candidates="all", targets=None, extra=()):
    """Return the mean over all anchors of the row's formula, one exponential at a time."""
    rows, across = [], candidates == "across"
    for z, same_group, others in anchors(views, group, targets=targets, extra=extra, across=across):
        if not same_group:
            continue
        numerators = [(z @ u / temperature).exp() for u in same_group]
        negatives = sum((z @ u / temperature).exp() for u in (extra if candidates == "memory" else others))
        if positives == "outside":
            row = (sum(numerators) + negatives).log() - sum(p.log() for p in numerators) / len(numerators)
        elif positives == "inside":
            row = (sum(numerators) + negatives).log() - sum(numerators).log()
        else:
            row = sum(((p + negatives) / p).log() for p in numerators) / len(numerators)
        rows.append(row)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("positives", ["outside", "inside", "alone"])
@pytest.mark.parametrize(
    ("candidates", "extras"), [("all", False), ("all", True), ("across", False), ("across", True), ("memory", True)]
)
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [False, True])
def test_every_form_equals_loops(positives, candidates, views, labels, extras):
    tensors = [random(4, 3, seed=seed) for seed in range(views)]
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    queue = random(5, 3, seed=9)
    found = InfoNCE(0.3, candidates=candidates, positives=positives)(
        *tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else []
    )
    extra = list(unit(queue)) if extras else []
    expected = by_loops(positives, tensors, group, 0.3, candidates=candidates, extra=extra)
    assert_same(found, expected, *tensors, *([queue] if extras else []))


@pytest.mark.parametrize("targets", [(True, True), (False, True)])
@pytest.mark.parametrize("candidates", ["all", "memory"])
def test_targets_replace_the_candidates(targets, candidates):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    given = tuple(key if present else None for key, present in zip(keys, targets, strict=True))
    queue = random(5, 3, seed=9)
    found = InfoNCE(0.3, candidates=candidates)(*views, targets=given, extra=queue)
    expected = by_loops("outside", views, range(4), 0.3, candidates=candidates, targets=given, extra=unit(queue))
    leaves = [views[0], queue, *(key for key in given if key is not None)]
    assert_same(found, expected, *leaves)


def test_nt_xent_is_a_cross_entropy_over_all_2n_minus_1_others():
    a, b = random(5, 4), random(5, 4, seed=1)
    for positives in ("outside", "inside", "alone"):
        assert_same(InfoNCE(0.5, positives=positives)(a, b), info_nce(a, b, 0.5), a, b)


def test_supcon_is_the_authors_masked_mean_of_log_probabilities():
    """Khosla et al.'s own code: mean over positives outside the logarithm, denominator over all but the anchor."""
    a, b, labels = random(6, 4), random(6, 4, seed=1), torch.tensor([0, 1, 0, 2, 1, 0])
    expected = supcon(torch.cat([a, b]), labels.repeat(2), 0.07)
    assert_same(InfoNCE(0.07)(a, b, group=labels), expected, a, b)


def test_moco_v2_is_a_cross_entropy_of_the_key_against_the_queue():
    query, key, queue = random(5, 4), random(5, 4, seed=1), random(7, 4, seed=2)
    found = InfoNCE(0.2, candidates="memory")(query, targets=(None, key), extra=[queue])
    assert_same(found, moco(query, key, unit(queue), 0.2), query, key, queue)


def test_moco_v3_is_a_cross_entropy_for_each_side():
    (query_a, query_b), (key_a, key_b) = [random(2, 5, 4, seed=seed).unbind() for seed in range(2)]
    sides = [(query_a, key_b), (query_b, key_a)]
    losses = [F.cross_entropy(unit(query) @ unit(key).T / 0.2, torch.arange(5)) for query, key in sides]
    found = InfoNCE(0.2, candidates="across")(query_a, query_b, targets=(key_a, key_b))
    assert_same(found, sum(losses) / 2, query_a, query_b, key_a, key_b)


def test_moco_v3_with_three_views_has_a_softmax_for_each_query_and_key_view():
    queries, keys = random(3, 5, 4), random(3, 5, 4, seed=1)
    losses, rows = [], []
    for query in range(3):
        for key in range(3):
            if query != key:
                logits = unit(queries[query]) @ unit(keys[key]).T / 0.2
                rows.append(F.cross_entropy(logits, torch.arange(5), reduction="none"))
                losses.append(rows[-1].mean())
    loss = InfoNCE(0.2, candidates="across")
    assert_same(loss(*queries, targets=tuple(keys)), sum(losses) / 6, queries, keys)
    torch.testing.assert_close(loss(*queries, targets=tuple(keys), reduction="none"), torch.cat(rows))


def test_rows_of_moco_v3_are_in_the_order_of_the_views():
    queries, keys = random(2, 5, 4), random(2, 5, 4, seed=1)
    across, plain = (InfoNCE(0.2, candidates=form) for form in ("across", "all"))
    rows = across(*queries, targets=tuple(keys), reduction="none")
    torch.testing.assert_close(rows, plain(*queries, targets=tuple(keys), reduction="none"))


def test_clip_is_the_mean_of_both_cross_entropies_and_learns_its_temperature():
    image, text = random(5, 4), random(5, 4, seed=1)
    loss = InfoNCE(0.07, candidates="across", learn_temperature=True).double()
    assert_same(loss(image, text), clip(image, text, loss.log_scale), image, text, loss.log_scale)
    assert loss.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_labels_make_clip_supervised_and_never_pair_within_a_view():
    image, text = random(4, 3), random(4, 3, seed=1)
    found = InfoNCE(0.3, candidates="across")(image, text, group=torch.tensor([0, 0, 1, 2]))
    assert_same(found, by_loops("outside", [image, text], [0, 0, 1, 2], 0.3, candidates="across"), image, text)


def test_pytorch_metric_learnings_nt_xent_has_one_positive_per_denominator():
    """Its rows are positive pairs (a, p): -log e^{s_ap / t} / (e^{s_ap / t} + sum over negatives of a)."""
    z, labels = random(6, 3), [0, 0, 1, 1, 2, 2]
    a, b = z[:3], z[3:]
    s = unit(z) @ unit(z).T / 0.3
    groups = [labels[0], labels[2], labels[0]] * 2
    rows = []
    for i in range(6):
        negatives = sum(s[i, k].exp() for k in range(6) if groups[k] != groups[i])
        pairs = [
            -(s[i, p].exp() / (s[i, p].exp() + negatives)).log() for p in range(6) if groups[p] == groups[i] and p != i
        ]
        rows.append(sum(pairs) / len(pairs))
    found = InfoNCE(0.3, positives="alone")(a, b, group=torch.tensor(groups[:3]))
    assert_same(found, sum(rows) / 6, z)


def test_identical_embeddings_give_the_logarithm_of_the_number_of_candidates():
    z = torch.ones(8, 3)
    assert float(InfoNCE()(z, z)) == pytest.approx(math.log(15), rel=1e-6)
    assert float(InfoNCE(candidates="across")(z, z)) == pytest.approx(math.log(8), rel=1e-6)


def test_a_single_sample_has_a_loss_of_zero():
    a, b = random(1, 3), random(1, 3, seed=1)
    value = InfoNCE()(a, b)
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(value, a)[0].abs().max() < 1e-12


def test_a_learned_scale_is_bounded_and_can_decrease_again():
    loss = InfoNCE(0.01, candidates="across", learn_temperature=True)
    loss.log_scale.data += 0.5
    a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    # The wrong pairs are equal: a smaller scale is better, and the bound must not remove its gradient.
    value = loss(a, b)
    assert value.item() == pytest.approx(LARGEST_SCALE, rel=1e-5)
    (back,) = torch.autograd.grad(value, loss.log_scale)
    assert back > 0
    # If a larger scale is better, the gradient at the bound is zero.
    close = torch.tensor([[1.0, 0.0], [math.cos(0.1), math.sin(0.1)]])
    (further,) = torch.autograd.grad(loss(close, close), loss.log_scale)
    assert further == 0
    assert loss.metrics["temperature"] == pytest.approx(0.01)
    loss.log_scale.data -= 1.0
    (further,) = torch.autograd.grad(loss(close, close), loss.log_scale)
    assert further < 0


def test_the_smallest_initial_temperature_can_be_learned():
    loss = InfoNCE(0.01, candidates="across", learn_temperature=True)
    loss(torch.eye(4), torch.eye(4).roll(1, 0)).backward()
    assert loss.log_scale.grad > 0


def test_a_missing_memory_raises():
    with pytest.raises(ValueError, match=r"candidates='memory' uses the negatives of extra=\[queue\]"):
        InfoNCE(candidates="memory")(torch.ones(2, 2), torch.ones(2, 2))
