"""Who is whose positive, and every row reduction, against plain loops over single pairs in float64."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contrast.core import reductions
from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings
from contrast.core.pairs import Pairs, all_pairs, cross_pairs, two_sided
from contrast.core.reductions import Count, Kth, LogSumExp, Mean, SoftMean, SoftplusSum

NOTHING = torch.finfo(torch.float64).min / 2
OVER = ("positive", "negative", "remembered", "all")
DIMS = 3


@pytest.fixture(params=["dense", "tiled of 1", "tiled of 3", "tiled of 512"], autouse=True)
def a_backend(request):
    """Every fact of this file holds for every backend."""
    name, _, size = request.param.partition(" of ")
    with reductions.backend(name, tile=int(size or 1)):
        yield


@dataclass
class Scene:
    """Anchors, two parts of candidates, and numbers for the arguments that reductions take."""

    pairs: Pairs
    heads: int | None
    among: torch.Tensor | None
    above: torch.Tensor | None
    generator: torch.Generator

    def random(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).requires_grad_()


@st.composite
def scenes(draw):
    """Draw a seed alone: a scene drawn number by number is mostly empty."""
    seed = draw(st.integers(0, 10**6))
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = dice.choice([None, None, 2])

    def part(count, views):
        def some(options):
            return torch.tensor(dice.choices(options, k=count)).long()

        shape = (count, DIMS) if heads is None else (heads, count, DIMS)
        z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        return Embeddings(z, some(range(6)), some([0, 1, 2]), some(views))

    anchor = part(dice.choice([0, 1, 3, 4, 4, 5, 5, 5]), [0, 1, 0, 1, 0, 1, PADDING])
    first = part(dice.choice([0, 1, 5, 6, 7, 7, 8, 8]), [0, 1, 0, 1, 0, 1, PADDING])
    second = part(dice.choice([0, 1, 5, 6, 7, 7, 8, 8]), [REMEMBERED, REMEMBERED, REMEMBERED, 0, 2, PADDING])
    pairs = Pairs(anchor, (first, second), across=dice.random() < 0.3)
    if dice.random() < 0.4:
        pairs = pairs.ignoring(near, torch.rand(len(anchor), generator=generator, dtype=torch.float64) - 0.5)
    width = len(first) + len(second)
    among = torch.rand(width, generator=generator) < 0.8 if dice.random() < 0.4 else None
    rows = (len(anchor),) if heads is None or dice.random() < 0.5 else (heads, len(anchor))
    above = torch.randn(rows, generator=generator, dtype=torch.float64) - 2 if dice.random() < 0.4 else None
    return Scene(pairs, heads, among, above, generator)


def near(anchor, candidate, similarity, threshold):
    """Ignore what is more similar than the anchor's threshold, if the candidate's group is not 0."""
    return (similarity > threshold) & (candidate.group != 0)


def single(embeddings, head, row):
    return embeddings.z[row] if head is None else embeddings.z[head, row]


def candidates(pairs):
    return [(part, row) for part in pairs.candidates for row in range(len(part))]


def kind(pairs, i, j, similarity, head=None):
    """Say how candidate j stands to anchor i, by the table of the design, one case after the other."""
    part, row = candidates(pairs)[j]
    sample, group, view = (int(getattr(pairs.anchor, name)[i]) for name in ("sample", "group", "view"))
    its_sample, its_group, its_view = (int(getattr(part, name)[row]) for name in ("sample", "group", "view"))
    if PADDING in (view, its_view):
        return "nothing"
    if sample == its_sample and view == its_view:
        return "itself"
    if sample == its_sample and its_view == REMEMBERED:
        return "ignored"
    if pairs.across and view == its_view:
        return "same view"
    if group == its_group:
        return "positive"
    if pairs.rules and similarity > float(pairs.rules[0][1][0][i]) and its_group != 0:
        return "false negative"
    return "remembered negative" if its_view == REMEMBERED else "negative"


KINDS = {
    "positive": {"positive"},
    "negative": {"negative", "remembered negative"},
    "remembered": {"remembered negative"},
    "all": {"positive", "negative", "remembered negative"},
}


def walk(scene, over, among=True, above=False):
    """Give for each (head, anchor) the list of (j, similarity) that count."""
    pairs = scene.pairs
    others = candidates(pairs)
    rows = {}
    for head in [None] if scene.heads is None else range(scene.heads):
        for i in range(len(pairs)):
            rows[head, i] = []
            for j, (part, row) in enumerate(others):
                similarity = sum(
                    a * b for a, b in zip(single(pairs.anchor, head, i), single(part, head, row), strict=True)
                )
                counts = kind(pairs, i, j, float(similarity.detach())) in KINDS[over]
                if among and scene.among is not None and not scene.among[j]:
                    counts = False
                if above and scene.above is not None:
                    least = scene.above[i] if scene.above.ndim == 1 else scene.above[head, i]
                    counts = counts and bool(similarity >= least)
                if counts:
                    rows[head, i].append((j, similarity))
    return rows


def collected(scene, values):
    """Put the loops' numbers into (N,) or (H, N)."""
    zero = torch.zeros((), dtype=torch.float64)
    count = len(scene.pairs)
    if scene.heads is None:
        return torch.stack([values[None, i] + zero for i in range(count)]) if count else torch.zeros(0).double()
    if not count:
        return torch.zeros(scene.heads, 0).double()
    return torch.stack([torch.stack([values[head, i] + zero for i in range(count)]) for head in range(scene.heads)])


def assert_same(scene, found, expected, *parameters):
    """Compare values and gradients to 1e-9."""
    torch.testing.assert_close(found.expand(expected.shape), expected, rtol=1e-9, atol=1e-11)
    leaves = [scene.pairs.anchor.z, *(part.z for part in scene.pairs.candidates), *parameters]
    mix = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    both = []
    for value in (found, expected):
        total = torch.where(value <= NOTHING, 0, value * mix).sum() if value.requires_grad else None
        both.append(
            [torch.zeros_like(leaf) for leaf in leaves]
            if total is None
            else torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
    for ours, theirs in zip(*both, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


class Learned(nn.Module):
    """A PairFunction that knows z and identity: 1 + sum_d w_d a_d b_d + (the candidate's group) / 10."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, anchor, candidate):
        return 1 + (anchor.z * self.weight) @ candidate.z.transpose(-2, -1) + candidate.group.double() / 10


def a_value(scene, form):
    """Give an argument of that form, the same number as a function of (head, i, j), and the leaf it is learned by."""
    count, width = len(scene.pairs), len(candidates(scene.pairs))
    if form == "number":
        return 1.7, lambda h, i, j: 1.7, ()
    if form == "learned number":
        leaf = scene.random()
        return leaf, lambda h, i, j: leaf, (leaf,)
    if form == "per anchor":
        leaf = scene.random(count, 1)
        return leaf, lambda h, i, j: leaf[i, 0], (leaf,)
    if form == "per candidate":
        leaf = scene.random(1, width)
        return leaf, lambda h, i, j: leaf[0, j], (leaf,)
    if form == "per head":
        leaf = scene.random(scene.heads or 1, 1, 1) if scene.heads else scene.random(1, 1)
        return leaf, lambda h, i, j: leaf[h, 0, 0] if scene.heads else leaf[0, 0], (leaf,)
    leaf = scene.random(DIMS)

    def pair(h, i, j):
        part, row = candidates(scene.pairs)[j]
        inner = sum(
            w * a * b for w, a, b in zip(leaf, single(scene.pairs.anchor, h, i), single(part, h, row), strict=True)
        )
        return 1 + inner + int(part.group[row]) / 10

    return Learned(leaf), pair, (leaf,)


every_relation = pytest.mark.parametrize("over", OVER)
FORMS = st.sampled_from(["number", "learned number", "per anchor", "per candidate", "per head", "pair function"])


@given(scene=scenes())
def test_each_candidate_stands_to_an_anchor_as_the_table_says(scene):
    found = {over: scene.pairs.relation(over) for over in OVER}
    for head in [None] if scene.heads is None else range(scene.heads):
        for i in range(len(scene.pairs)):
            for j, (part, row) in enumerate(candidates(scene.pairs)):
                similarity = float((single(scene.pairs.anchor, head, i) @ single(part, head, row)).detach())
                for over in OVER:
                    tile = found[over] if found[over].ndim == 2 else found[over][head]
                    assert bool(tile[i, j]) == (kind(scene.pairs, i, j, similarity) in KINDS[over])


@every_relation
@given(scene=scenes(), scale=FORMS, weight=st.one_of(st.none(), FORMS))
def test_logsumexp_equals_loops(scene, over, scale, weight):
    given_scale, scale_of, first = a_value(scene, scale)
    log_weight, weight_of, second = (None, lambda h, i, j: 0.0, ()) if weight is None else a_value(scene, weight)
    found = scene.pairs.logsumexp(given_scale, over, among=scene.among, log_weight=log_weight, above=scene.above)
    values = {}
    for (h, i), row in walk(scene, over, above=True).items():
        exponents = [scale_of(h, i, j) * s + weight_of(h, i, j) for j, s in row]
        values[h, i] = sum(exponent.exp() for exponent in exponents).log() if row else NOTHING
    assert_same(scene, found, collected(scene, values), *first, *second)


@every_relation
@given(scene=scenes(), weight=st.one_of(st.none(), FORMS))
def test_mean_equals_loops(scene, over, weight):
    given_weight, weight_of, learned = (None, lambda h, i, j: 1.0, ()) if weight is None else a_value(scene, weight)
    found = scene.pairs.mean(over, among=scene.among, weight=given_weight, above=scene.above)
    values = {}
    for (h, i), row in walk(scene, over, above=True).items():
        mass = sum(weight_of(h, i, j) for j, _ in row)
        values[h, i] = sum(weight_of(h, i, j) * s for j, s in row) / mass if row else 0.0
    assert_same(scene, found, collected(scene, values), *learned)


@every_relation
@given(scene=scenes())
def test_mean_weighted_by_references_equals_loops(scene, over):
    def with_reference(embeddings):
        u = torch.randn(len(embeddings), 2, generator=scene.generator, dtype=torch.float64)
        return replace(embeddings, reference=u / u.norm(dim=1, keepdim=True))

    parts = [with_reference(part) for part in scene.pairs.candidates]
    scene.pairs = replace(scene.pairs, anchor=with_reference(scene.pairs.anchor), candidates=parts)
    found = scene.pairs.mean(over, among=scene.among, weight="reference", above=scene.above)
    values = {}
    for (h, i), row in walk(scene, over, above=True).items():
        weights = {}
        for j, _ in row:
            part, place = candidates(scene.pairs)[j]
            inner = sum(
                float(a) * float(b) for a, b in zip(scene.pairs.anchor.reference[i], part.reference[place], strict=True)
            )
            weights[j] = (inner + 1) / 2
        values[h, i] = sum(weights[j] * s for j, s in row) / sum(weights.values()) if row else 0.0
    assert_same(scene, found, collected(scene, values))


@every_relation
@given(scene=scenes(), scale=FORMS)
@pytest.mark.parametrize("detach", [False, True])
def test_soft_mean_equals_loops(scene, over, scale, detach):
    given_scale, scale_of, learned = a_value(scene, scale)
    found = scene.pairs.soft_mean(given_scale, over, among=scene.among, detach=detach, above=scene.above)
    values = {}
    for (h, i), row in walk(scene, over, above=True).items():
        masses = [(scale_of(h, i, j) * s).exp() for j, s in row]
        masses = [mass.detach() for mass in masses] if detach else masses
        values[h, i] = sum(m * s for m, (_, s) in zip(masses, row, strict=True)) / sum(masses) if row else 0.0
    assert_same(scene, found, collected(scene, values), *learned)


@every_relation
@given(scene=scenes(), scale=FORMS, bias=st.sampled_from(["number", "anchor", "head"]))
def test_softplus_sum_equals_loops(scene, over, scale, bias):
    given_scale, scale_of, learned = a_value(scene, scale)
    scene.above = None
    if bias == "number":
        given_bias, bias_of = -0.7, lambda h, i: -0.7
    elif bias == "anchor" or scene.heads is None:
        given_bias = scene.random(len(scene.pairs))
        learned, bias_of = (*learned, given_bias), lambda h, i: given_bias[i]
    else:
        given_bias = scene.random(scene.heads, len(scene.pairs))
        learned, bias_of = (*learned, given_bias), lambda h, i: given_bias[h, i]
    found = scene.pairs.softplus_sum(given_scale, given_bias, over, among=scene.among)
    values = {}
    for (h, i), row in walk(scene, over).items():
        values[h, i] = sum(torch.log1p((scale_of(h, i, j) * s + bias_of(h, i)).exp()) for j, s in row) if row else 0.0
    assert_same(scene, found, collected(scene, values), *learned)


@every_relation
@given(scene=scenes(), k=st.integers(1, 12))
def test_topk_equals_sorted_loops(scene, over, k):
    found, positions = scene.pairs.topk(k, over, among=scene.among)
    walked = walk(scene, over)
    heads = () if scene.heads is None else (scene.heads,)
    assert found.shape == positions.shape == (*heads, len(scene.pairs), k)
    for place in range(k):
        values = {}
        for (h, i), row in walked.items():
            ordered = sorted(row, key=lambda item: -float(item[1].detach()))
            values[h, i] = ordered[place][1] if place < len(row) else 0.0
            where = positions[i, place] if h is None else positions[h, i, place]
            assert int(where) == (ordered[place][0] if place < len(row) else -1)
        assert_same(scene, found[..., place], collected(scene, values))


@every_relation
@given(scene=scenes(), each=st.booleans(), data=st.data())
def test_kth_equals_sorted_loops(scene, over, each, data):
    count = len(scene.pairs)
    ks = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)) if each else [3] * count
    found = scene.pairs.kth(torch.tensor(ks).long() if each else 3, over, among=scene.among)
    values = {}
    for (h, i), row in walk(scene, over).items():
        ordered = sorted((float(s.detach()) for _, s in row), reverse=True)
        values[h, i] = ordered[min(ks[i], len(row)) - 1] if row else 0.0
    assert not found.requires_grad
    torch.testing.assert_close(found, collected(scene, values))


@every_relation
@given(scene=scenes())
def test_count_equals_loops(scene, over):
    found = scene.pairs.count(over, among=scene.among, above=scene.above)
    values = {where: float(len(row)) for where, row in walk(scene, over, above=True).items()}
    assert found.dtype == torch.int64
    expected = collected(scene, values).long()
    assert torch.equal(found.expand(expected.shape), expected)


@given(scene=scenes())
def test_several_reductions_in_one_pass_equal_each_alone(scene):
    pairs, among, above = scene.pairs, scene.among, scene.above
    together = pairs.reduce(
        LogSumExp(2.0, "all", among, above=above),
        Mean("positive"),
        SoftMean(-1.0, "negative", detach=True),
        SoftplusSum(1.0, 0.5, "negative", among),
        Kth(2, "all"),
        Count("negative"),
    )
    alone = (
        pairs.logsumexp(2.0, "all", among=among, above=above),
        pairs.mean("positive"),
        pairs.soft_mean(-1.0, "negative", detach=True),
        pairs.softplus_sum(1.0, 0.5, "negative", among=among),
        pairs.kth(2, "all"),
        pairs.count("negative"),
    )
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(scene=scenes(), start=st.integers(0, 4), length=st.integers(0, 4))
def test_a_block_of_anchors_has_the_rows_of_the_whole(scene, start, length):
    rows = slice(start, start + length)
    block = scene.pairs.block(rows)
    for over in OVER:
        assert torch.equal(block.relation(over), scene.pairs.relation(over)[..., rows, :])
        torch.testing.assert_close(
            block.logsumexp(2.0, over), scene.pairs.logsumexp(2.0, over)[..., rows], rtol=1e-12, atol=1e-12
        )
    assert len(block) == len(scene.pairs.anchor.sample[rows])


@given(scene=scenes())
def test_kth_is_a_threshold_that_above_agrees_with(scene):
    least = scene.pairs.kth(2, "all")
    found = scene.pairs.count("all", above=least)
    expected = scene.pairs.count("all").clamp(max=2)
    assert torch.equal(found, expected.expand(found.shape))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_nothing_a_logsumexp_is_half_the_least_number_and_all_else_zero(over, dtype):
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
def test_gradients_are_derivatives_and_second_ones_are_refused_where_there_is_no_matrix(row, request):
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(3)

    def function(a, b, scale, bias):
        pairs = two_sided(Embeddings(a, index, index, index * 0), Embeddings(b, index, index, index * 0 + 1))
        return row(pairs, scale, bias)

    shapes = [(3, DIMS), (3, DIMS), (6, 1), (6,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, leaves)
    if "dense" in request.node.name:
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


def test_a_broadcast_part_gets_the_sum_of_its_heads_gradients():
    index = torch.arange(3)
    a = torch.randn(2, 3, DIMS, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, DIMS, dtype=torch.float64, requires_grad=True)
    anchor = Embeddings(a, index, index, index * 0)

    def function(part):
        return Pairs(anchor, (Embeddings(part, index, index, index * 0 + 1),)).logsumexp(1.0, "all")

    assert torch.autograd.gradcheck(function, b)
    torch.testing.assert_close(function(b), function(b.expand(2, 3, DIMS)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("anchor_learns", [True, False])
def test_parts_with_and_without_a_gradient_may_stand_side_by_side(anchor_learns):
    a = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    parts = torch.nn.functional.normalize(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    index = torch.arange(5)
    a.requires_grad_(anchor_learns)
    leaves = [part.clone().requires_grad_(k != 1) for k, part in enumerate(parts)]
    candidates = [Embeddings(z, index, index, index * 0 + 1 + k) for k, z in enumerate(leaves)]
    pairs = Pairs(Embeddings(a, index[:4], index[:4], index[:4] * 0), candidates)
    wanted = [tensor for tensor in (a, *leaves) if tensor.requires_grad]
    for asked in ([LogSumExp(5.0, "negative")], [SoftMean(5.0, "negative"), LogSumExp(2.0, "negative")]):
        gradients = torch.autograd.grad(sum(one.sum() for one in pairs.reduce(*asked)), wanted)
        with reductions.backend("dense"):
            expected = sum(one.sum() for one in pairs.reduce(*asked))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted))


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
def test_a_candidate_that_changed_before_the_backward_pass_is_named(name):
    index = torch.arange(4)
    z = torch.randn(4, DIMS, requires_grad=True)
    stored = torch.randn(6, DIMS)
    strangers = torch.arange(6) + 10
    queue = Embeddings(stored[1:], strangers[1:], strangers[1:], torch.full((5,), REMEMBERED))
    with reductions.backend(name, tile=2):
        value = Pairs(Embeddings(z, index, index, index * 0), (queue,)).logsumexp(1.0, "remembered").sum()
    stored[3] = 0
    with pytest.raises(RuntimeError, match=r"candidate changed .* a memory's update\(...\) after loss.backward\(\)"):
        value.backward()


def test_all_pairs_lets_every_view_meet_every_view_and_the_extras():
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


def test_two_sided_and_cross_pairs_leave_out_the_anchors_own_view():
    index = torch.arange(2)
    a, b = (Embeddings(torch.randn(2, DIMS), index, index, index * 0 + view) for view in range(2))
    both = two_sided(a, b)
    assert both.relation("all").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert cross_pairs(a, b).positive.int().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda pairs: pairs.count("friends"), "over is 'positive', 'negative', 'remembered' or 'all'; got 'friends'"),
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
def test_what_cannot_be_asked_is_refused_in_a_sentence(ask, words):
    index = torch.arange(2)
    a, b = (Embeddings(torch.randn(2, DIMS), index, index, index * 0 + view) for view in range(2))
    with pytest.raises(ValueError, match=words):
        ask(cross_pairs(a, b))


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


def test_anchors_in_parts_stay_in_parts_through_rules_and_detaching():
    """Else tiles would no longer serve both directions."""
    index = torch.arange(3)
    a, b = (Embeddings(torch.randn(3, 2), index, index, index * 0 + view) for view in (0, 1))
    pairs = all_pairs(a, b)
    for same in (pairs, pairs.ignoring(lambda *_: torch.zeros(1, 1, dtype=torch.bool)), pairs.detach()):
        assert len(same) == len(same.anchor) == 6
        assert same.layout.anchors_are_candidates
        assert same.without_rules().layout.symmetric
    assert not replace(pairs, anchor=pairs.anchor).layout.anchors_are_candidates


@pytest.mark.parametrize("heads", [(), (2,)])
def test_the_weight_of_all_pairs_alike_has_no_gradient_in_a_mean(heads):
    """Where tiles serve both directions, the gradient of a weight is a sum over both, and not of products of sums."""
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
