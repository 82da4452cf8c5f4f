"""Every relation and every row reduction against plain loops over single pairs in float64."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from contrast.core import reductions
from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings
from contrast.core.pairs import Pairs, all_pairs, cross_pairs, two_sided
from contrast.core.reductions import Count, Kth, LogSumExp, Mean, SoftMean, SoftplusSum

EMPTY = torch.finfo(torch.float64).min / 2
OVER = ("positive", "negative", "remembered", "all")
DIMS = 3


@pytest.fixture(params=["dense", "tiled of 1", "tiled of 3", "tiled of 512"], autouse=True)
def a_backend(request):
    """Run every test of this file with every backend."""
    name, _, size = request.param.partition(" of ")
    with reductions.backend(name, tile=int(size or 1)):
        yield


@dataclass(frozen=True)
class RandomPairs:
    """Anchors, two parts of candidates, and the arguments `among` and `above`; H heads, or None."""

    pairs: Pairs
    heads: int | None
    among: torch.Tensor | None
    above: torch.Tensor | None
    generator: torch.Generator

    def random(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).requires_grad_()

    def rows(self):
        """Return every (head, anchor); the head is None without heads."""
        heads = [None] if self.heads is None else range(self.heads)
        return [(head, i) for head in heads for i in range(len(self.pairs))]

    def vectors(self, part, head):
        return (part.z if head is None else part.z[head]).unbind()

    def candidates(self, head):
        """Return (vector, sample, group, view) of every candidate."""
        return [
            candidate
            for part in self.pairs.candidates
            for candidate in zip(
                self.vectors(part, head), part.sample.tolist(), part.group.tolist(), part.view.tolist(), strict=True
            )
        ]

    def labelled(self):
        """Return for each (head, anchor) the similarity to every candidate and the name of their relation."""
        anchor, result = self.pairs.anchor, {}
        samples, groups, views = anchor.sample.tolist(), anchor.group.tolist(), anchor.view.tolist()
        for head, i in self.rows():
            x, rule = self.vectors(anchor, head)[i], self.pairs.rules[0][1][0][i].item() if self.pairs.rules else None
            result[head, i] = []
            for y, sample, group, view in self.candidates(head):
                s = x @ y
                ignored = rule is not None and s.item() > rule and group != 0
                name = relation(self.pairs.across, ignored, (samples[i], groups[i], views[i]), (sample, group, view))
                result[head, i].append((s, name))
        return result

    def counted(self, over, above=True):
        """Return for each (head, anchor) the list of (j, similarity) that count."""
        result = {}
        for (head, i), candidates in self.labelled().items():
            threshold = -math.inf
            if above and self.above is not None:
                threshold = float(self.above[i] if self.above.ndim == 1 else self.above[head, i])
            result[head, i] = [
                (j, s)
                for j, (s, name) in enumerate(candidates)
                if name in NAMES[over] and (self.among is None or self.among[j]) and s.item() >= threshold
            ]
        return result

    def stacked(self, values):
        """Return the numbers of the loops as (N,) or (H, N)."""
        shape = (len(self.pairs),) if self.heads is None else (self.heads, len(self.pairs))
        numbers = [torch.as_tensor(values[row], dtype=torch.float64) for row in self.rows()]
        return torch.stack(numbers).view(shape) if numbers else torch.zeros(shape, dtype=torch.float64)


def random_pairs(seed, sizes=None):
    """Return pairs from one seed; drawn number by number, most of them would be empty.

    Args:
        seed: of all choices.
        sizes: of the anchors, of the first and of the second part of the candidates; None for random sizes.
    """
    choices, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = choices.choice([None, None, 2])
    sizes = sizes or [choices.choice([0, 1, 3, 4, 4, 5, 5, 5]), *choices.choices([0, 1, 5, 6, 7, 7, 8, 8], k=2)]

    def part(count, views):
        def some(options):
            return torch.tensor(choices.choices(options, k=count)).long()

        shape = (count, DIMS) if heads is None else (heads, count, DIMS)
        z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        return Embeddings(z, some(range(6)), some([0, 1, 2]), some(views))

    batch_views = [0, 1, 0, 1, 0, 1, PADDING]
    anchor, first = (part(size, batch_views) for size in sizes[:2])
    second = part(sizes[2], [REMEMBERED, REMEMBERED, REMEMBERED, 0, 2, PADDING])
    pairs = Pairs(anchor, (first, second), across=choices.random() < 0.3)
    if choices.random() < 0.4:
        pairs = pairs.ignoring(is_similar, torch.rand(len(anchor), generator=generator, dtype=torch.float64) - 0.5)
    among = torch.rand(sizes[1] + sizes[2], generator=generator) < 0.8 if choices.random() < 0.4 else None
    rows = (len(anchor),) if heads is None or choices.random() < 0.5 else (heads, len(anchor))
    above = torch.randn(rows, generator=generator, dtype=torch.float64) - 2 if choices.random() < 0.4 else None
    return RandomPairs(pairs, heads, among, above, generator)


def is_similar(anchor, candidate, similarity, threshold):
    """Ignore candidates that are more similar than the anchor's threshold, except those of group 0."""
    return (similarity > threshold) & (candidate.group != 0)


def relation(across, ignored, anchor, candidate):
    """Return the name of the relation by the table in `Pairs`, one case after the other."""
    (sample, group, view), (other_sample, other_group, other_view) = anchor, candidate
    if PADDING in (view, other_view):
        return "nothing"
    if sample == other_sample and view == other_view:
        return "itself"
    if sample == other_sample and other_view == REMEMBERED:
        return "ignored"
    if across and view == other_view:
        return "same view"
    if group == other_group:
        return "positive"
    if ignored:
        return "false negative"
    return "remembered negative" if other_view == REMEMBERED else "negative"


NAMES = {
    "positive": {"positive"},
    "negative": {"negative", "remembered negative"},
    "remembered": {"remembered negative"},
    "all": {"positive", "negative", "remembered negative"},
}
BOUNDARIES = [(0, 5, 5), (4, 0, 0), (5, 0, 6), (1, 1, 0), (1, 0, 1), (3, 3, 3), (4, 4, 1)]
"""No anchor, no candidate, an empty part, one pair; a tile of 3 that is filled exactly, and exceeded by one."""


def property_of_pairs(**values):
    """Test random pairs with random values of the other arguments; the boundaries first, with each argument's last."""

    def decorate(test):
        last = {name: options[-1] for name, options in values.items()}
        for seed, sizes in enumerate(BOUNDARIES):
            test = example(case=random_pairs(seed, sizes), **last)(test)
        drawn = {name: st.sampled_from(options) for name, options in values.items()}
        return given(case=st.builds(random_pairs, st.integers(0, 10**6)), **drawn)(test)

    return decorate


a_quarter_of_the_examples = settings(max_examples=settings().max_examples // 4)
"""For tests that compute eight and more reductions per example, which takes 20 to 40 ms."""


def assert_same(case, found, expected, *parameters):
    """Check that values and gradients are equal to 1e-9."""
    torch.testing.assert_close(found.expand(expected.shape), expected, rtol=1e-9, atol=1e-11)
    leaves = [case.pairs.anchor.z, *(part.z for part in case.pairs.candidates), *parameters]
    mix = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    both = []
    for value in (found, expected):
        total = torch.where(value <= EMPTY, 0, value * mix).sum() if value.requires_grad else None
        both.append(
            [torch.zeros_like(leaf) for leaf in leaves]
            if total is None
            else torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
    for gradient, expected_gradient in zip(*both, strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


class Learned(nn.Module):
    """A PairFunction of z and identity: 1 + sum_d w_d a_d b_d + (the candidate's group) / 10."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, anchor, candidate):
        return 1 + (anchor.z * self.weight) @ candidate.z.transpose(-2, -1) + candidate.group.double() / 10


def argument(case, form):
    """Return an argument of that form, the same number as a function of (head, i, j), and the leaf of its gradient."""
    count, width = len(case.pairs), sum(map(len, case.pairs.candidates))
    if form is None:
        return None, None, ()
    if form == "number":
        return 1.7, lambda h, i, j: 1.7, ()
    if form == "learned number":
        leaf = case.random()
        return leaf, lambda h, i, j: leaf, (leaf,)
    if form == "per anchor":
        leaf = case.random(count, 1)
        return leaf, lambda h, i, j: leaf[i, 0], (leaf,)
    if form == "per candidate":
        leaf = case.random(1, width)
        return leaf, lambda h, i, j: leaf[0, j], (leaf,)
    if form == "per head":
        leaf = case.random(case.heads or 1, 1, 1) if case.heads else case.random(1, 1)
        return leaf, lambda h, i, j: leaf[h, 0, 0] if case.heads else leaf[0, 0], (leaf,)
    leaf = case.random(DIMS)
    candidates = {
        head: case.candidates(head) for head in (None, *range(case.heads or 0)) if (head is None) != bool(case.heads)
    }

    def pair(h, i, j):
        y, _, group, _ = candidates[h][j]
        return 1 + (leaf * case.vectors(case.pairs.anchor, h)[i]) @ y + group / 10

    return Learned(leaf), pair, (leaf,)


FORMS = ["number", "learned number", "per anchor", "per candidate", "per head", "pair function"]


@property_of_pairs()
def test_the_relation_of_a_candidate_to_an_anchor_is_that_of_the_table(case):
    masks = {over: case.pairs.relation(over) for over in OVER}
    for (head, i), candidates in case.labelled().items():
        for j, (_, name) in enumerate(candidates):
            for over, mask in masks.items():
                assert bool((mask if mask.ndim == 2 else mask[head])[i, j]) == (name in NAMES[over])


@property_of_pairs(over=OVER, scale=FORMS, weight=[None, *FORMS])
def test_logsumexp_equals_loops(case, over, scale, weight):
    given_scale, scale_of, first = argument(case, scale)
    log_weight, weight_of, second = argument(case, weight)
    found = case.pairs.logsumexp(given_scale, over, among=case.among, log_weight=log_weight, above=case.above)
    values = {}
    for (h, i), row in case.counted(over).items():
        exponents = [scale_of(h, i, j) * s + (weight_of(h, i, j) if weight else 0) for j, s in row]
        values[h, i] = sum(exponent.exp() for exponent in exponents).log() if row else EMPTY
    assert_same(case, found, case.stacked(values), *first, *second)


@property_of_pairs(over=OVER, weight=[None, *FORMS])
def test_mean_equals_loops(case, over, weight):
    given_weight, weight_of, learned = argument(case, weight)
    found = case.pairs.mean(over, among=case.among, weight=given_weight, above=case.above)
    values = {}
    for (h, i), row in case.counted(over).items():
        weights = [weight_of(h, i, j) if weight else 1.0 for j, _ in row]
        values[h, i] = sum(w * s for w, (_, s) in zip(weights, row, strict=True)) / sum(weights) if row else 0.0
    assert_same(case, found, case.stacked(values), *learned)


@property_of_pairs(over=OVER)
def test_mean_weighted_by_references_equals_loops(case, over):
    def with_reference(embeddings):
        u = torch.randn(len(embeddings), 2, generator=case.generator, dtype=torch.float64)
        return replace(embeddings, reference=u / u.norm(dim=1, keepdim=True))

    parts = [with_reference(part) for part in case.pairs.candidates]
    case = replace(case, pairs=replace(case.pairs, anchor=with_reference(case.pairs.anchor), candidates=parts))
    found = case.pairs.mean(over, among=case.among, weight="reference", above=case.above)
    references = torch.cat([part.reference for part in parts])
    values = {}
    for (h, i), row in case.counted(over).items():
        weights = [(float(case.pairs.anchor.reference[i] @ references[j]) + 1) / 2 for j, _ in row]
        values[h, i] = sum(w * s for w, (_, s) in zip(weights, row, strict=True)) / sum(weights) if row else 0.0
    assert_same(case, found, case.stacked(values))


@property_of_pairs(over=OVER, scale=FORMS, detach=[False, True])
def test_soft_mean_equals_loops(case, over, scale, detach):
    given_scale, scale_of, learned = argument(case, scale)
    found = case.pairs.soft_mean(given_scale, over, among=case.among, detach=detach, above=case.above)
    values = {}
    for (h, i), row in case.counted(over).items():
        masses = [(scale_of(h, i, j) * s).exp() for j, s in row]
        masses = [mass.detach() for mass in masses] if detach else masses
        values[h, i] = sum(m * s for m, (_, s) in zip(masses, row, strict=True)) / sum(masses) if row else 0.0
    assert_same(case, found, case.stacked(values), *learned)


@property_of_pairs(over=OVER, scale=FORMS, bias=["number", "anchor", "head"])
def test_softplus_sum_equals_loops(case, over, scale, bias):
    given_scale, scale_of, learned = argument(case, scale)
    if bias == "number":
        given_bias, bias_of = -0.7, lambda h, i: -0.7
    elif bias == "anchor" or case.heads is None:
        given_bias = case.random(len(case.pairs))
        learned, bias_of = (*learned, given_bias), lambda h, i: given_bias[i]
    else:
        given_bias = case.random(case.heads, len(case.pairs))
        learned, bias_of = (*learned, given_bias), lambda h, i: given_bias[h, i]
    found = case.pairs.softplus_sum(given_scale, given_bias, over, among=case.among)
    values = {}
    for (h, i), row in case.counted(over, above=False).items():
        values[h, i] = sum(torch.log1p((scale_of(h, i, j) * s + bias_of(h, i)).exp()) for j, s in row) if row else 0.0
    assert_same(case, found, case.stacked(values), *learned)


@property_of_pairs(over=OVER, k=range(1, 13))
def test_topk_equals_sorted_loops(case, over, k):
    found, indices = case.pairs.topk(k, over, among=case.among)
    rows = case.counted(over, above=False)
    heads = () if case.heads is None else (case.heads,)
    assert found.shape == indices.shape == (*heads, len(case.pairs), k)
    values = [{} for _ in range(k)]
    for (h, i), row in rows.items():
        ordered = sorted(row, key=lambda item: -item[1].item())
        for rank in range(k):
            j, values[rank][h, i] = ordered[rank] if rank < len(row) else (-1, 0.0)
            assert int(indices[i, rank] if h is None else indices[h, i, rank]) == j
    assert_same(case, found, torch.stack([case.stacked(of_rank) for of_rank in values], dim=-1))


@property_of_pairs(over=OVER, per_anchor=[False, True])
def test_kth_equals_sorted_loops(case, over, per_anchor):
    ks = torch.randint(1, 10, (len(case.pairs),), generator=case.generator)
    found = case.pairs.kth(ks if per_anchor else 3, over, among=case.among)
    values = {}
    for (h, i), row in case.counted(over, above=False).items():
        ordered = sorted((s.item() for _, s in row), reverse=True)
        values[h, i] = ordered[min(int(ks[i]) if per_anchor else 3, len(row)) - 1] if row else 0.0
    assert not found.requires_grad
    torch.testing.assert_close(found, case.stacked(values))


@property_of_pairs(over=OVER)
def test_count_equals_loops(case, over):
    found = case.pairs.count(over, among=case.among, above=case.above)
    expected = case.stacked({row: len(counted) for row, counted in case.counted(over).items()}).long()
    assert found.dtype == torch.int64
    assert torch.equal(found.expand(expected.shape), expected)


@a_quarter_of_the_examples
@property_of_pairs()
def test_several_reductions_in_one_pass_equal_each_by_itself(case):
    pairs, among, above = case.pairs, case.among, case.above
    together = pairs.reduce(
        LogSumExp(2.0, "all", among, above=above),
        Mean("positive"),
        SoftMean(-1.0, "negative", detach=True),
        SoftplusSum(1.0, 0.5, "negative", among),
        Kth(2, "all"),
        Count("negative"),
    )
    separate = (
        pairs.logsumexp(2.0, "all", among=among, above=above),
        pairs.mean("positive"),
        pairs.soft_mean(-1.0, "negative", detach=True),
        pairs.softplus_sum(1.0, 0.5, "negative", among=among),
        pairs.kth(2, "all"),
        pairs.count("negative"),
    )
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=1e-12)


@a_quarter_of_the_examples
@property_of_pairs(start=range(5), length=range(5))
def test_a_block_of_anchors_has_the_rows_of_all(case, start, length):
    rows = slice(start, start + length)
    block = case.pairs.block(rows)
    for over in OVER:
        assert torch.equal(block.relation(over), case.pairs.relation(over)[..., rows, :])
        torch.testing.assert_close(
            block.logsumexp(2.0, over), case.pairs.logsumexp(2.0, over)[..., rows], rtol=1e-12, atol=1e-12
        )
    assert len(block) == len(case.pairs.anchor.sample[rows])


@a_quarter_of_the_examples
@property_of_pairs()
def test_kth_is_a_threshold_that_above_includes(case):
    found = case.pairs.count("all", above=case.pairs.kth(2, "all"))
    expected = case.pairs.count("all").clamp(max=2)
    assert torch.equal(found, expected.expand(found.shape))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_no_candidates_a_logsumexp_is_half_the_smallest_number_and_others_are_zero(over, dtype):
    z = torch.randn(2, DIMS, dtype=dtype, requires_grad=True)
    index = torch.tensor([5, 5])
    same = Embeddings(z, index, index, index * 0)
    pairs, scale = Pairs(same, (same,)), torch.tensor(2.0, dtype=dtype, requires_grad=True)
    rows = [
        pairs.logsumexp(scale, over),
        pairs.mean(over),
        pairs.soft_mean(scale, over),
        pairs.softplus_sum(scale, scale, over),
        pairs.topk(2, over)[0],
    ]
    assert rows[0].tolist() == [torch.finfo(dtype).min / 2] * 2
    assert not any(row.any() for row in [*rows[1:], pairs.kth(1, over), pairs.count(over)])
    gradients = torch.autograd.grad(sum(row.sum() for row in rows), [z, scale])
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "row",
    [
        lambda pairs, scale, bias: pairs.logsumexp(scale, "all", log_weight=scale.square()),
        lambda pairs, scale, bias: pairs.soft_mean(scale, "negative"),
        lambda pairs, scale, bias: pairs.softplus_sum(scale, bias, "all"),
        lambda pairs, scale, bias: pairs.mean("all", weight=scale.exp()),
        lambda pairs, scale, bias: pairs.topk(2, "negative")[0],
    ],
    ids=["logsumexp", "soft_mean", "softplus_sum", "mean", "topk"],
)
def test_gradients_are_derivatives_and_second_derivatives_need_the_dense_backend(row, request):
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(3)

    def function(a, b, scale, bias):
        pairs = two_sided(Embeddings(a, index, index, index * 0), Embeddings(b, index, index, index * 0 + 1))
        return row(pairs, scale, bias)

    shapes = [(3, DIMS), (3, DIMS), (6, 1), (6,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, leaves)
    if request.node.callspec.params["a_backend"] == "dense":
        assert torch.autograd.gradgradcheck(function, leaves)
        return
    (first,) = torch.autograd.grad(function(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def test_a_large_logit_keeps_its_digits():
    index = torch.arange(2)
    z = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    pairs = cross_pairs(Embeddings(z, index, index, index * 0), Embeddings(z, index, index, index * 0 + 1))
    expected = 25 + math.log1p(math.exp(-25))
    assert pairs.softplus_sum(25.0, 0.0, "negative").tolist() == pytest.approx([expected] * 2, rel=1e-15, abs=0)
    assert pairs.logsumexp(1e4, "all").tolist() == pytest.approx([1e4 + math.log(2)] * 2, rel=1e-15)


def test_a_part_without_heads_has_the_sum_of_the_gradients_of_all_heads():
    index = torch.arange(3)
    a = torch.randn(2, 3, DIMS, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, DIMS, dtype=torch.float64, requires_grad=True)
    anchor = Embeddings(a, index, index, index * 0)

    def function(part):
        return Pairs(anchor, (Embeddings(part, index, index, index * 0 + 1),)).logsumexp(1.0, "all")

    assert torch.autograd.gradcheck(function, b)
    torch.testing.assert_close(function(b), function(b.expand(2, 3, DIMS)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("anchor_learns", [True, False])
def test_candidates_may_be_parts_with_and_without_gradient(anchor_learns):
    a = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    parts = torch.nn.functional.normalize(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    index = torch.arange(5)
    a.requires_grad_(anchor_learns)
    leaves = [part.clone().requires_grad_(k != 1) for k, part in enumerate(parts)]
    candidates = [Embeddings(z, index, index, index * 0 + 1 + k) for k, z in enumerate(leaves)]
    pairs = Pairs(Embeddings(a, index[:4], index[:4], index[:4] * 0), candidates)
    inputs = [tensor for tensor in (a, *leaves) if tensor.requires_grad]
    for requested in ([LogSumExp(5.0, "negative")], [SoftMean(5.0, "negative"), LogSumExp(2.0, "negative")]):
        gradients = torch.autograd.grad(sum(row.sum() for row in pairs.reduce(*requested)), inputs)
        with reductions.backend("dense"):
            expected = sum(row.sum() for row in pairs.reduce(*requested))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs))


def test_backward_inside_autocast_keeps_full_precision():
    index = torch.arange(4)
    z = torch.randn(2, 4, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    a, b = (Embeddings(z[view], index, index, index * 0 + view) for view in range(2))
    value = all_pairs(a, b).logsumexp(5.0, "all").sum()
    (outside,) = torch.autograd.grad(value, z, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(value, z)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_a_candidate_that_changed_before_the_backward_pass_raises(name):
    index = torch.arange(4)
    z = torch.randn(4, DIMS, requires_grad=True)
    stored = torch.randn(6, DIMS)
    sample = torch.arange(6) + 10
    queue = Embeddings(stored[1:], sample[1:], sample[1:], torch.full((5,), REMEMBERED))
    with reductions.backend(name, tile=2):
        value = Pairs(Embeddings(z, index, index, index * 0), (queue,)).logsumexp(1.0, "remembered").sum()
    stored[3] = 0
    with pytest.raises(RuntimeError, match=r"candidate changed .* a memory's update\(...\) after loss.backward\(\)"):
        value.backward()


def test_all_pairs_pairs_every_view_with_every_view_and_the_extras():
    index = torch.arange(2)
    a, b = (Embeddings(torch.randn(2, DIMS), index, index, index * 0 + view) for view in range(2))
    queue = Embeddings(
        torch.randn(3, DIMS), index.new_tensor([7, 0, 8]), index.new_tensor([7, 0, 1]), torch.full((3,), -1)
    )
    pairs = all_pairs(a, b, extra=[queue])
    assert pairs.views == 2
    #                                a0 a1 b0 b1 q7 q0 q8 (of group 1)
    assert pairs.positive.int().tolist() == [
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1],
    ]
    assert pairs.negative.int().tolist() == [
        [0, 1, 0, 1, 1, 0, 1],
        [1, 0, 1, 0, 1, 1, 0],
        [0, 1, 0, 1, 1, 0, 1],
        [1, 0, 1, 0, 1, 1, 0],
    ]


def test_two_sided_and_cross_pairs_exclude_the_anchors_own_view():
    index = torch.arange(2)
    a, b = (Embeddings(torch.randn(2, DIMS), index, index, index * 0 + view) for view in range(2))
    both = two_sided(a, b)
    assert both.relation("all").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert cross_pairs(a, b).positive.int().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pairs: pairs.count("others"), "over is 'positive', 'negative', 'remembered' or 'all'; got 'others'"),
        (lambda pairs: pairs.mean("all", weight="cosine"), "weight is 'reference', a number.*'cosine'"),
        (lambda pairs: pairs.mean("all", weight="reference"), r"pass reference=\(N, R\) to the loss"),
        (lambda pairs: pairs.logsumexp(torch.ones(2, 2), "all"), r"spans at most one of N and M.*\(2, 2\)"),
        (lambda pairs: pairs.kth(0, "all"), "k is a whole number, 1 or more; got 0"),
        (lambda pairs: pairs.kth(2.5, "all"), "k is a whole number, 1 or more; got 2.5"),
        (lambda pairs: pairs.count("all", above=Kth(torch.tensor([1]), "all")), r"k is a number, or \(2,\) int64; got"),
        (lambda pairs: pairs.count("all", above=0.5), "or a Kth; got 0.5"),
        (lambda pairs: pairs.mean("all", among=torch.ones(3).bool()), r"among is \(2,\) bool; got .* shape \(3,\)"),
        (lambda pairs: pairs.count("all", rows=torch.ones(2)), r"rows is \(2,\) bool; got torch.float32"),
        (lambda pairs: pairs.mean("all", above=torch.zeros(len(pairs), 1)), "thresholds, .* got the shape"),
        (lambda pairs: pairs.mean("all", above=torch.tensor(0.5)), r"or a Kth; got the shape \(\)"),
        (lambda pairs: pairs.topk(-1, "all"), "k is a whole number, 1 or more; got -1"),
        (lambda pairs: pairs.topk(2.5, "all"), "k is a whole number, 1 or more; got 2.5"),
    ],
)
def test_wrong_arguments_raise(call, message):
    index = torch.arange(2)
    a, b = (Embeddings(torch.randn(2, DIMS), index, index, index * 0 + view) for view in range(2))
    with pytest.raises(ValueError, match=message):
        call(cross_pairs(a, b))


def test_anchors_that_were_first_read_without_gradient_have_one_later():
    index = torch.arange(3)
    views = [torch.randn(3, 2, requires_grad=True) for _ in range(2)]
    pairs = all_pairs(*(Embeddings(z, index, index, index * 0 + view) for view, z in enumerate(views)))
    with torch.no_grad():
        assert not pairs.anchor.z.requires_grad
        pairs.mean("positive")
    assert pairs.anchor.z.requires_grad
    gradients = torch.autograd.grad(pairs.mean("positive").sum() + pairs.anchor.z.sum(), views)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_rules_and_detaching_preserve_the_parts_of_the_anchors():
    """Otherwise each similarity would be computed twice."""
    index = torch.arange(3)
    a, b = (Embeddings(torch.randn(3, 2), index, index, index * 0 + view) for view in (0, 1))
    pairs = all_pairs(a, b)
    for same in (pairs, pairs.ignoring(lambda *_: torch.zeros(1, 1, dtype=torch.bool)), pairs.detach()):
        assert len(same) == len(same.anchor) == 6
        assert same.layout.anchors_are_candidates
        assert same.without_rules().layout.symmetric
    assert not replace(pairs, anchor=pairs.anchor).layout.anchors_are_candidates


@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_weight_that_is_one_number_has_no_gradient_in_a_mean(heads):
    """With symmetric tiles the gradient of a weight is a sum over both directions, not a product of sums."""
    index = torch.arange(5)
    z = torch.randn(2, *heads, 5, DIMS, dtype=torch.float64, requires_grad=True)
    weight = torch.full((*heads, 1, 1) if heads else (), 0.7, dtype=torch.float64, requires_grad=True)
    pairs = all_pairs(*(Embeddings(one, index, index, index * 0 + view) for view, one in enumerate(z)))
    mean = pairs.mean("negative", weight=weight)
    torch.testing.assert_close(mean, pairs.mean("negative"))
    mix = torch.linspace(0.5, 2.0, mean.numel(), dtype=torch.float64).view(mean.shape)
    to_weight, to_z = torch.autograd.grad((mean * mix).sum(), [weight, z])
    assert to_weight.abs().max() < 1e-12
    torch.testing.assert_close(to_z, torch.autograd.grad((pairs.mean("negative") * mix).sum(), z)[0])
