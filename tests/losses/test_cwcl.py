"""CWCL against loops of its formula, and its value for special weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrast.core.embeddings import REMEMBERED, Embeddings
from contrast.core.pairs import two_sided
from contrast.losses import InfoNCE
from contrast.losses.cwcl import CWCL
from tests.losses.reference import assert_same, random, unit


def by_loops(p, q, reference, temperature, *, group=None, extra=(), extra_reference=()):
    """Return L_UV + L_VU, one pair at a time; extras are candidates of both directions."""
    p, q, u, count = unit(p), unit(q), unit(reference.detach()), len(p)
    group = list(range(count)) if group is None else group
    frozen, trained = [], []
    for i in range(count):
        candidates = [(q[j], u[j]) for j in range(count)]
        candidates += [(z, unit(v)) for z, v in zip(extra, extra_reference, strict=True)]
        logits = [p[i] @ z / temperature for z, _ in candidates]
        normaliser = sum(logit.exp() for logit in logits).log()
        weights = [(u[i] @ v + 1) / 2 for _, v in candidates]
        terms = [w * (logit - normaliser) for w, logit in zip(weights, logits, strict=True)]
        frozen.append(-sum(terms) / sum(weights))
        logits = [q[i] @ z / temperature for z in [*p, *extra]]
        normaliser = sum(logit.exp() for logit in logits).log()
        own = [logits[j] - normaliser for j in range(count) if group[j] == group[i]]
        trained.append(-sum(own) / len(own))
    return sum(frozen) / count + sum(trained) / count


def from_logits(logits, reference):
    """Return Pairs with these logits at temperature 1: p is the identity, q the columns of the logits."""
    count, index = len(logits), torch.arange(len(logits))
    z = torch.eye(count, dtype=logits.dtype), logits.T
    return two_sided(*(Embeddings(z[view], index, index, torch.full_like(index, view), reference) for view in (0, 1)))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops(labels, extras):
    p, q, reference = random(5, 3), random(5, 3, seed=1), random(5, 6, seed=2)
    z, u, unknown = random(4, 3, seed=3), random(4, 6, seed=4).detach(), torch.arange(100, 104)
    queue = Embeddings(unit(z), unknown, unknown, torch.full_like(unknown, REMEMBERED), unit(u))
    group = [0, 1, 0, 2, 1] if labels else None
    found = CWCL(0.3)(
        p,
        q,
        reference=reference,
        group=torch.tensor(group) if labels else None,
        extra=queue if extras else (),
    )
    more = {"extra": unit(z), "extra_reference": u} if extras else {}
    assert_same(found, by_loops(p, q, reference, 0.3, group=group, **more), p, q, *([z] if extras else []))


def test_without_a_reference_the_first_view_is_the_frozen_one():
    p, q = random(5, 3), random(5, 3, seed=1)
    assert_same(CWCL()(p, q), by_loops(p, q, p, 0.07), p, q)
    assert abs(CWCL()(q, p) - CWCL()(p, q)) > 1e-3


def test_with_heads_and_no_reference_the_weights_are_the_heads_mean_cosine():
    p, q = random(2, 5, 3), random(2, 5, 3, seed=1)
    reference = torch.cat([unit(p[0]), unit(p[1])], dim=1)
    expected = sum(by_loops(p[head], q[head], reference, 0.3) for head in range(2)) / 2
    assert_same(CWCL(0.3)(p, q), expected, p, q)


def test_identity_weights_give_the_sum_of_both_directions_of_clip():
    # (<u_i, u_j> + 1) / 2 is the identity for two opposite vectors only.
    p, q = random(2, 3), random(2, 3, seed=1)
    reference = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    logits = unit(p) @ unit(q).T / 0.3
    clip = F.cross_entropy(logits, torch.arange(2)) + F.cross_entropy(logits.T, torch.arange(2))
    assert_same(CWCL(0.3)(p, q, reference=reference), clip, p, q)
    torch.testing.assert_close(clip, 2 * InfoNCE(0.3, candidates="across")(p, q), rtol=1e-12, atol=0)


def test_weights_of_equal_labels_give_supcon_between_the_modalities():
    p, q, labels = random(5, 3), random(5, 3, seed=1), torch.tensor([0, 1, 0, 0, 1])
    reference = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)[labels]
    logits = unit(p) @ unit(q).T / 0.3
    same = (labels[:, None] == labels).double()
    supcon = -(same * logits.log_softmax(dim=1)).sum(dim=1) / same.sum(dim=1)
    expected = supcon.mean() + F.cross_entropy(logits.T, torch.arange(5))
    assert_same(CWCL(0.3)(p, q, reference=reference), expected, p, q)
    # With the labels as groups both directions are SupCon, and the sum is twice InfoNCE.
    both = CWCL(0.3)(p, q, reference=reference, group=labels)
    torch.testing.assert_close(both, 2 * InfoNCE(0.3, candidates="across")(p, q, group=labels), rtol=1e-12, atol=0)


def test_equal_weights_make_the_target_uniform():
    p, q = random(5, 3), random(5, 3, seed=1)
    logits = unit(p) @ unit(q).T / 0.3
    expected = -logits.log_softmax(dim=1).mean() + F.cross_entropy(logits.T, torch.arange(5))
    assert_same(CWCL(0.3)(p, q, reference=torch.ones(5, 2, dtype=torch.float64)), expected, p, q)


def test_the_gradient_of_the_logits_is_the_softmax_minus_the_normalised_weights():
    logits, u = random(5, 5), unit(random(5, 3, seed=1)).detach()
    weight = (u @ u.T + 1) / 2
    rows = CWCL(1.0).per_anchor(from_logits(logits, u))[:5] / 2
    found = torch.autograd.grad(rows.mean(), logits)[0]
    expected = (logits.softmax(dim=1) - weight / weight.sum(dim=1, keepdim=True)) / 5
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_minimum_of_the_weighted_direction_is_the_entropy_of_its_weights():
    u = unit(random(5, 3, seed=1)).detach()
    weight = (u @ u.T + 1) / 2
    share = weight / weight.sum(dim=1, keepdim=True)
    entropy, loss = -(share * share.log()).sum(dim=1), CWCL(1.0)
    at_the_minimum = loss.per_anchor(from_logits(share.log(), u))[:5] / 2
    torch.testing.assert_close(at_the_minimum, entropy, rtol=1e-12, atol=0)
    measured = loss.measure(from_logits(share.log(), u))
    torch.testing.assert_close(measured["entropy"], entropy.mean(), rtol=1e-12, atol=0)
    assert abs(measured["excess"]) < 1e-12
    for seed in range(5):
        elsewhere = random(5, 5, seed=seed)
        assert (loss.per_anchor(from_logits(elsewhere, u))[:5] / 2 > entropy).all()
        divergence = (share * (share.log() - elsewhere.log_softmax(dim=1))).sum(dim=1).mean()
        measured = loss.measure(from_logits(elsewhere, u))
        torch.testing.assert_close(measured["excess"], divergence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_entropy_is_the_same_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr("contrast.losses.cwcl.CHUNK", chunk)
    p, q, reference = random(7, 3), random(7, 3, seed=1), random(7, 4, seed=2)
    loss, u = CWCL(0.3, learn_temperature=True).double(), unit(reference)
    loss(p, q, reference=reference)
    weight = (u @ u.T + 1) / 2
    share = weight / weight.sum(dim=1, keepdim=True)
    entropy = -(share * share.log()).sum(dim=1).mean()
    torch.testing.assert_close(loss.metrics["entropy"], entropy, rtol=1e-12, atol=0, check_dtype=False)
    weighted = -(share * (unit(p) @ unit(q).T / 0.3).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss.metrics["excess"], weighted - entropy, rtol=1e-5, atol=0)
    assert loss.metrics["temperature"] == pytest.approx(0.3)


def test_no_gradient_reaches_the_frozen_network_through_the_weights():
    p, q, reference = random(5, 3), random(5, 3, seed=1), random(5, 4, seed=2)
    value = CWCL(0.3)(p, q, reference=reference)
    assert not torch.autograd.grad(value, reference, allow_unused=True, materialize_grads=True, retain_graph=True)[
        0
    ].any()
    # Without a reference, the gradient of p is the same as with p as a constant reference.
    own = torch.autograd.grad(CWCL(0.3)(p, q), p)[0]
    given = torch.autograd.grad(CWCL(0.3)(p, q, reference=p.detach()), p)[0]
    torch.testing.assert_close(own, given, rtol=1e-12, atol=1e-15)


def test_targets_replace_the_candidates():
    p, q, keys = random(5, 3), random(5, 3, seed=1), random(2, 5, 3, seed=2)
    reference = random(5, 4, seed=4)
    u, logits = unit(reference).detach(), [unit(p) @ unit(keys[1]).T / 0.3, unit(q) @ unit(keys[0]).T / 0.3]
    weight = (u @ u.T + 1) / 2
    weighted = -((weight * logits[0].log_softmax(dim=1)).sum(dim=1) / weight.sum(dim=1)).mean()
    plain = F.cross_entropy(logits[1], torch.arange(5))
    found = CWCL(0.3)(p, q, reference=reference, targets=tuple(keys))
    assert_same(found, weighted + plain, p, q, keys)
    one_way = CWCL(0.3)(p, q, reference=reference, targets=(None, keys[1]))
    torch.testing.assert_close(one_way, 2 * weighted, rtol=1e-12, atol=0)


def test_the_temperature_is_learned():
    p, q, loss = random(5, 3), random(5, 3, seed=1), CWCL(learn_temperature=True).double()
    assert 1 / loss.log_scale.exp().item() == pytest.approx(0.07, rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda scale: torch.func.functional_call(loss, {"log_scale": scale}, (p.detach(), q.detach())),
        loss.log_scale.detach().clone().requires_grad_(),
    )


@pytest.mark.parametrize("reference", ["zero", "opposite", "none"])
@pytest.mark.parametrize("temperature", [1e-4, 0.01, 10.0])
def test_unusual_references_give_finite_values(reference, temperature):
    p, q = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    u = {"zero": torch.zeros(4, 2), "opposite": torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]]), "none": None}[reference]
    loss = CWCL(temperature)
    value = loss(p, q, reference=u)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value, (p, q)))
    assert all(math.isfinite(metric) for metric in loss.metrics.values())


@pytest.mark.parametrize("samples", [5, 600])
def test_the_frozen_network_may_be_of_another_float_type(samples):
    p, q, u = (random(samples, 3, seed=seed) for seed in range(3))
    exact = CWCL()(p, q, reference=u)
    torch.testing.assert_close(CWCL()(p, q, reference=u.float()), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(CWCL()(p.float(), q.float(), reference=u), exact.float())


Z = torch.ones(4, 3)
INDEX = torch.arange(4)


@pytest.mark.parametrize(
    ("views", "given", "message"),
    [
        ((Z, Z, Z), {}, r"CWCL takes two views, the frozen network's first: loss\(p, q\); got 3"),
        ((Z,), {"targets": (None, Z)}, r"CWCL takes two views.*got 1"),
        ((Z, Z), {"extra": Z}, r"extras are Embeddings with reference \(K, 3\); got none"),
        ((Z, Z), {"reference": Z[:, :2], "extra": Z}, r"reference \(K, 2\); got none"),
        ((Z, Z), {"extra": Embeddings(Z, INDEX, INDEX, -torch.ones_like(INDEX), Z[:, :2])}, r"got \(K, 2\)"),
        ((Z, Z), {"reference": Z[:2]}, r"reference is \(4, R\), or one"),
    ],
)
def test_wrong_inputs_raise(views, given, message):
    with pytest.raises(ValueError, match=message):
        CWCL()(*views, **given)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="temperature must be a positive number; got 0"):
        CWCL(0)
    with pytest.raises(ValueError, match=r"a learned temperature starts at 0.01 or above; got 0.001"):
        CWCL(0.001, learn_temperature=True)
