"""FalseNegatives: every rule against plain loops, with every loss, with bad pairs, on several processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contrast.core import reductions
from contrast.core.embeddings import REMEMBERED, Embeddings, normalise
from contrast.losses import CACRRBF, CWCL, LOSSES, BadPairs, DecoupledInfoNCE, FalseNegatives, HardContrastive, InfoNCE
from contrast.memory import Queue
from tests.losses.cases import CASES
from tests.losses.reference import random

DIMS = 4
RULES = [
    {"above": 0.2},
    {"margin": 0.3},
    {"relative_margin": 0.4},
    {"top": 2},
    {"guide": True},
    {"above": 0.6, "margin": 0.1, "relative_margin": 0.2, "top": 1, "guide": True},
]


def relation(i, j, group):
    """Return the relation of candidate j, (z, sample, view, ...), to anchor i: "positive", "negative" or None."""
    if i[1] == j[1] and j[2] in (i[2], REMEMBERED):
        return None
    return "positive" if group[i[1]] == group[j[1]] else "negative"


def removed(anchors, candidates, group, *, above=None, margin=None, relative_margin=None, top=None, guide=False):
    """Return the pairs (anchor, candidate) that the rules ignore; members are (z, sample, view, u)."""
    out = set()
    for a, i in enumerate(anchors):
        kinds = [relation(i, j, group) for j in candidates]
        s = [float(i[0].detach() @ j[0].detach()) for j in candidates]
        positive = [s[b] for b, kind in enumerate(kinds) if kind == "positive"]
        negative = [b for b, kind in enumerate(kinds) if kind == "negative"]
        at = sum(positive) / len(positive) if positive else math.inf
        if above is not None:
            out |= {(a, b) for b in negative if s[b] > above}
        if margin is not None:
            out |= {(a, b) for b in negative if s[b] > at - margin}
        if relative_margin is not None and positive:
            out |= {(a, b) for b in negative if s[b] > at * (1 - relative_margin)}
        if top is not None:
            out |= {(a, b) for b in sorted(negative, key=lambda b: -s[b])[:top]}
        if guide:
            g = [float(i[3].detach() @ j[3].detach()) for j in candidates]
            positive = [g[b] for b, kind in enumerate(kinds) if kind == "positive"]
            if positive:
                out |= {(a, b) for b in negative if g[b] > sum(positive) / len(positive)}
    return out


class Batch:
    """Two views of six samples, five queue entries with one of these samples, and reference vectors of all."""

    def __init__(self, labels, extra, seed=0):
        self.views = [random(6, DIMS, seed=seed + view).requires_grad_() for view in (0, 1)]
        self.reference = [random(6, 3, seed=seed + 10 + view).detach() for view in (0, 1)]
        index = torch.arange(6)
        self.given = {"sample": index, "reference": self.reference}
        self.group = {k: k % 3 if labels else k for k in range(40)}
        if labels:
            self.given["group"] = index % 3
        if extra:
            sample = torch.tensor([2, 20, 21, 22, 23])
            group = torch.tensor([self.group[k] for k in sample.tolist()])
            z, u = normalise(random(5, DIMS, seed=seed + 20)), normalise(random(5, 3, seed=seed + 21))
            self.given["extra"] = [Embeddings(z, sample, group, torch.full((5,), REMEMBERED), u)]

    def members(self):
        """Return anchors and candidates as (z, sample, view, u)."""
        anchors = [
            (z, row, view, u)
            for view in (0, 1)
            for row, (z, u) in enumerate(zip(normalise(self.views[view]), normalise(self.reference[view]), strict=True))
        ]
        more = [
            (z, int(sample), REMEMBERED, u)
            for part in self.given.get("extra", ())
            for z, sample, u in zip(part.z, part.sample, part.reference, strict=True)
        ]
        return anchors, anchors + more


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_every_rule_equals_plain_loops(rule, labels, extra):
    batch = Batch(labels, extra)
    anchors, candidates = batch.members()
    out = removed(anchors, candidates, batch.group, **rule)
    rows, negatives = [], 0
    for a, i in enumerate(anchors):
        kinds = [relation(i, j, batch.group) for j in candidates]
        s = [i[0] @ j[0] / 0.3 for j in candidates]
        positive = [s[b] for b, kind in enumerate(kinds) if kind == "positive"]
        remaining = [s[b] for b, kind in enumerate(kinds) if kind == "negative" and (a, b) not in out]
        negatives += kinds.count("negative")
        rows.append(torch.stack(positive + remaining).logsumexp(0) - sum(positive) / len(positive))
    expected = sum(rows) / len(rows)
    criterion = FalseNegatives(InfoNCE(0.3), **rule)
    for backend in ("dense", "tiled"):
        with reductions.backend(backend, tile=3):
            found = criterion(*batch.views, **batch.given)
            assert 0 < len(out) < negatives
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            theirs = torch.autograd.grad(expected, batch.views, retain_graph=True)
            for one, other in zip(torch.autograd.grad(found, batch.views), theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
            assert float(criterion.metrics["ignored"]) == pytest.approx(len(out) / negatives)


INSIDE = [case for case in CASES if case.pairs and case.rows and not case.two_views]


@pytest.mark.parametrize("case", [case for case in INSIDE if case.name != "cacr_multi_crop"], ids=str)
@pytest.mark.parametrize("rule", [{"relative_margin": 0.4}, {"top": 1, "above": 0.5}], ids=str)
def test_with_any_loss_it_ignores_the_pairs_that_plain_loops_find(case, rule):
    """The expected value is the loss with a list of pairs, found by loops, instead of the rule."""
    views, kwargs = case.inputs(6)
    kwargs.setdefault("sample", torch.arange(6))
    plain = case.make()
    inside = plain.pairs

    def listed(*args, **named):
        ignoring = []
        for pairs in inside(*args, **named):
            anchors, candidates = (
                [(z.detach(), int(s), int(v)) for z, s, v in zip(part.z, part.sample, part.view, strict=True)]
                for part in (pairs.anchor, concatenated(pairs.candidates))
            )
            eligible = pairs.relation("all") if pairs.rules or pairs.across else None
            out = removed_among(anchors, candidates, eligible, rule)
            ignoring.append(pairs.ignoring(ListedPairs(anchors, candidates, out)))
        return ignoring

    plain.pairs = listed
    expected = plain(*views, **kwargs)
    found = FalseNegatives(case.make(), **rule)(*views, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def concatenated(parts):
    return Embeddings(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("z", "sample", "group", "view"))
    )


def removed_among(anchors, candidates, eligible, rule):
    """Return the pairs that loops find among the `eligible` candidates of each anchor."""
    out = set()
    group = {one[1]: one[1] for one in candidates}
    for a, i in enumerate(anchors):
        some = [b for b in range(len(candidates)) if eligible is None or eligible[a, b]]
        found = removed([i], [candidates[b] for b in some], {**group, i[1]: i[1]}, **rule)
        out |= {(a, some[b]) for _, b in found}
    return out


class ListedPairs:
    """A rule that ignores listed pairs, identified by sample and view."""

    def __init__(self, anchors, candidates, out):
        self.out = {(anchors[a][1:], candidates[b][1:]) for a, b in out}

    def __call__(self, anchor, candidate, similarity):
        rows = list(zip(anchor.sample.tolist(), anchor.view.tolist(), strict=True))
        columns = list(zip(candidate.sample.tolist(), candidate.view.tolist(), strict=True))
        return torch.tensor([[(a, b) in self.out for b in columns] for a in rows]).view(len(rows), len(columns))


@pytest.mark.parametrize("case", INSIDE, ids=str)
def test_a_rule_that_ignores_nothing_gives_the_inner_loss(case):
    views, kwargs = case.inputs(6)
    found = FalseNegatives(case.make(), above=1.5)(*views, **kwargs)
    torch.testing.assert_close(found, case.make()(*views, **kwargs), rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_top_ignores_exactly_that_many_negatives(seed, top, labels):
    batch = Batch(labels, extra=True, seed=seed)
    criterion = FalseNegatives(InfoNCE(), top=top)
    (pairs,) = criterion.pairs(*batch.views, sample=torch.arange(6), extra=batch.given["extra"])
    (every,) = InfoNCE().pairs(*batch.views, sample=torch.arange(6), extra=batch.given["extra"])
    assert torch.equal(pairs.count("negative"), (every.count("negative") - top).clamp(min=0))


def test_top_ignores_no_negative_that_ties_at_its_end():
    z = torch.eye(4)[:1].expand(5, 4)
    criterion = FalseNegatives(InfoNCE(), top=2)
    (pairs,) = criterion.pairs(z, z)
    assert (pairs.count("negative") == 8).all()


def test_an_anchor_without_negatives_is_invalid_for_a_loss_that_needs_them():
    batch = Batch(False, extra=False)
    for criterion in (FalseNegatives(DecoupledInfoNCE(0.3), above=-1.0), FalseNegatives(InfoNCE(0.3), above=-1.0)):
        value = criterion(*batch.views)
        gradients = torch.autograd.grad(value, batch.views)
        assert all(torch.isfinite(one).all() for one in gradients)
        assert criterion.metrics["ignored"] == 1
        rows = criterion.metrics["anchors"]
        assert rows == (0 if criterion.needs_negative else 12)


@pytest.mark.parametrize("around", [False, True])
def test_it_works_inside_and_around_bad_pairs(around):
    batch = Batch(False, extra=True)

    def build():
        settings = {"samples": 6, "warmup_epochs": 0, "noisy_width": 0.5, "faulty_width": 0.5}
        if around:
            return FalseNegatives(BadPairs(InfoNCE(0.3), **settings), relative_margin=0.4, guide=True)
        return BadPairs(FalseNegatives(InfoNCE(0.3), relative_margin=0.4, guide=True), **settings)

    criterion = build()
    bad = criterion.loss if around else criterion
    plain = FalseNegatives(InfoNCE(0.3), relative_margin=0.4, guide=True)
    first = criterion(*batch.views, **batch.given)
    torch.testing.assert_close(first, plain(*batch.views, **batch.given))
    criterion.update()
    criterion.end_epoch()
    rows = plain(*batch.views, **batch.given, reduction="none").view(2, 6).mean(0)
    torch.testing.assert_close(bad.history.double(), rows.detach(), rtol=1e-6, atol=1e-7)
    assert (bad.noisy | bad.faulty).any()
    assert not torch.equal(criterion(*batch.views, **batch.given), first)
    assert {"ignored", "noisy", "weight"} <= set(criterion.metrics)
    assert criterion.reference_of == "view"


def test_around_bad_pairs_an_anchor_that_lost_its_negatives_is_not_remembered():
    batch = Batch(False, extra=False)
    bad = BadPairs(DecoupledInfoNCE(0.3), samples=6, warmup_epochs=0)
    criterion = FalseNegatives(bad, above=-1.0)
    criterion(*batch.views, sample=torch.arange(6))
    criterion.end_epoch()
    assert not bad.counts.any()


def test_weights_and_rules_may_use_one_frozen_network():
    """CWCL's weights and the guide use the same reference vectors."""
    batch = Batch(False, extra=True)
    criterion = FalseNegatives(CWCL(0.3), guide=True)
    found = criterion(*batch.views, **batch.given)
    assert 0 < criterion.metrics["ignored"] < 1
    assert torch.isfinite(found)
    assert not torch.equal(found, CWCL(0.3)(*batch.views, **batch.given))


def plain_rates(anchors, candidates, group, labels, out):
    counts = {True: [0, 0], False: [0, 0]}
    for a, i in enumerate(anchors):
        for b, j in enumerate(candidates):
            own, other = (labels.get(one[1], -1) for one in (i, j))
            if relation(i, j, group) == "negative" and own >= 0 and other >= 0:
                counts[own == other][0] += 1
                counts[own == other][1] += (a, b) in out
    (false, false_out), (true, true_out) = counts[True], counts[False]
    return [false / max(false + true, 1), false_out / max(false, 1), true_out / max(true, 1)]


@settings(max_examples=settings().max_examples // 5)  # the loops take 50 ms per example
@given(
    seed=st.integers(0, 10_000),
    labels=st.lists(st.integers(-1, 2), min_size=1, max_size=30),
    extra=st.booleans(),
    grouped=st.booleans(),
)
def test_the_rates_of_false_negatives_equal_plain_loops(seed, labels, extra, grouped):
    batch = Batch(grouped, extra, seed)
    criterion = FalseNegatives(InfoNCE(0.3), relative_margin=0.4)
    assert criterion.false_negative_rates(torch.tensor(labels)) == {}
    criterion(*batch.views, **batch.given)
    anchors, candidates = batch.members()
    out = removed(anchors, candidates, batch.group, relative_margin=0.4)
    expected = plain_rates(anchors, candidates, batch.group, dict(enumerate(labels)), out)
    found = criterion.false_negative_rates(torch.tensor(labels))
    names = ["false_negatives", "false_negatives_removed", "true_negatives_removed"]
    assert [float(found[name]) for name in names] == pytest.approx(expected)
    inside = InfoNCE(0.3)
    inside(*batch.views, **batch.given)
    assert [float(inside.false_negative_rates(torch.tensor(labels))[n]) for n in names] == [*expected[:1], 0, 0]


def test_a_share_of_the_negatives_is_that_of_each_head():
    views = torch.randn(2, 3, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = FalseNegatives(HardContrastive(hardest=0.5), relative_margin=0.5)
    heads = [loss(*views[:, h]) for h in range(3)]
    torch.testing.assert_close(loss(*views), sum(heads) / 3, rtol=1e-9, atol=0)


def test_the_rates_of_heads_are_the_mean_of_the_rates_per_head():
    views, labels = random(2, 3, 8, DIMS), torch.arange(8) % 3
    criterion = FalseNegatives(InfoNCE(0.3), relative_margin=0.4)
    criterion(*views, sample=torch.arange(8))
    found = criterion.false_negative_rates(labels)
    per_head = []
    for head in range(3):
        criterion(*views[:, head], sample=torch.arange(8))
        per_head.append(criterion.false_negative_rates(labels))
    assert len({float(one["true_negatives_removed"]) for one in per_head}) > 1
    for name, value in found.items():
        assert float(value) == pytest.approx(sum(float(one[name]) for one in per_head) / 3)


def test_samples_without_an_index_are_not_counted():
    criterion = InfoNCE()
    criterion(*random(2, 6, DIMS))
    assert not any(criterion.false_negative_rates(torch.zeros(6, dtype=torch.int64)).values())


def test_false_negatives_in_a_queue_are_counted():
    queue, criterion = Queue(4, DIMS), InfoNCE()
    queue.update(random(4, DIMS), sample=torch.tensor([6, 7, 8, 9]))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0, 0])
    criterion(*random(2, 6, DIMS), sample=torch.arange(6), extra=[queue])
    assert float(criterion.false_negative_rates(labels)["false_negatives"]) == pytest.approx(2 * 4 / (12 * 14))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a rule: above, margin, relative_margin, top or guide"),
        ({"above": math.nan}, "above is a similarity; got nan"),
        ({"margin": -0.1}, "margin must be 0 or more; got -0.1"),
        ({"relative_margin": 1.2}, r"relative_margin is a share, in \[0, 1\]; got 1.2"),
        ({"top": 0}, "top must be 1 or more; got 0"),
        ({"loss": nn.Identity(), "top": 1}, "negatives of a PairLoss out; Identity has none"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FalseNegatives(**{"loss": InfoNCE(), **arguments})


@pytest.mark.parametrize(
    ("loss", "kwargs", "message"),
    [
        (FalseNegatives(InfoNCE(), guide=True), {}, r"pass reference=\(u_a, u_b\).*; got none"),
        (FalseNegatives(InfoNCE(), guide=True), {"reference": random(6, 3)}, r"one \(N, R\) per view; got one for all"),
        (InfoNCE(), {"reference": [random(6, 3)]}, r"one \(6, R\) for each of the 2 views; got torch.float64"),
        (InfoNCE(), {"reference": []}, r"for each of the 2 views; got none"),
        (InfoNCE(), {"reference": [random(6, 3), random(5, 3)]}, r"reference is \(6, R\), or one"),
        (InfoNCE(), {"reference": random(5, 3)}, r"reference is \(6, R\), or one \(6, R\) for each"),
        (
            FalseNegatives(InfoNCE(), guide=True),
            {"reference": random(2, 6, 3).unbind(), "extra": [random(3, DIMS)]},
            "extra candidates need reference vectors too",
        ),
        (FalseNegatives(CACRRBF(), top=1), {}, "CACRRBF has no value per anchor"),
    ],
)
def test_wrong_calls_raise(loss, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        loss(*random(2, 6, DIMS), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alias", ["false_negative_control", "gist", "gistembed"])
def test_aliases_name_it(alias):
    with pytest.raises(ValueError, match=f"the loss '{alias}' is called 'false_negatives' here"):
        LOSSES[alias]


def split_call(rank, world, rule, sizes):
    """Return value and gradient on one process's part of a batch, or on the full batch."""
    batch = Batch(False, extra=True)
    rows = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    kwargs = {
        "sample": batch.given["sample"][rows],
        "reference": [one[rows] for one in batch.reference],
        "extra": batch.given["extra"],
    }
    criterion = FalseNegatives(InfoNCE(0.3), **rule)
    value = criterion(*(view[rows] for view in batch.views), **kwargs)
    value.backward()
    gradient = torch.stack([view.grad for view in batch.views])
    if rank is not None:
        torch.distributed.all_reduce(gradient)
        gradient /= world
    return value.detach(), gradient


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_processes_equal_one_process(processes, rule):
    for sizes in ((4, 2, 0, 0), (5, 0, 1, 0) if processes.world > 2 else (6, 0)):
        value, gradient = split_call(None, 1, rule, sizes)
        for found, its_gradient in processes.run(split_call, rule, sizes[: processes.world]):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(its_gradient, gradient, rtol=1e-8, atol=1e-11)
