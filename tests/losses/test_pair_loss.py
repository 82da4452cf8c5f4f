"""The contract of every registered loss, and the behaviour of PairLoss."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings, concatenate, normalise, unknown_samples
from contrast.core.pairs import Pairs
from contrast.losses import CACR, LOSSES, InfoNCE, NegativeCosine, PairLoss
from contrast.losses import pair_loss as module
from tests.losses.cases import CASES, DIMS, Case

every_loss = pytest.mark.parametrize("case", CASES, ids=str)
every_loss_over_pairs = pytest.mark.parametrize("case", [case for case in CASES if case.pairs], ids=str)
every_loss_of_rows = pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=str)
every_loss_of_plain_extras = pytest.mark.parametrize("case", [case for case in CASES if case.plain_extra], ids=str)


def value_and_gradients(loss, views, **given):
    value = loss(*views, **given)
    leaves = [*views, *loss.parameters()]
    return value, torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def prepared(case, loss, **options):
    """Return the Pairs that a call of the loss makes."""
    views, given = case.inputs(**options)
    return loss.pairs(*views, **given)


def assert_same_bits(first, second):
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_every_registered_loss_has_a_case():
    assert {case.name for case in CASES} == set(LOSSES)


@every_loss
def test_the_same_input_gives_the_same_bits(case):
    loss = case.make()
    views, given = case.inputs()
    assert_same_bits(value_and_gradients(loss, views, **given), value_and_gradients(loss, views, **given))


@every_loss
def test_a_call_writes_no_parameter_or_buffer(case):
    loss = case.make()
    before = copy.deepcopy(loss.state_dict())
    views, given = case.inputs()
    loss(*views, **given).backward()
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@every_loss_of_rows
@pytest.mark.parametrize("heads", [None, 2])
def test_permuted_anchors_have_permuted_rows(case, heads):
    loss = case.make()
    for pairs in prepared(case, loss, views=3, heads=heads):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
        rules = tuple((rule, tuple(values[order] for values in rows)) for rule, rows in pairs.rules)
        permuted = loss.rows(replace(pairs, anchor=pairs.anchor[order], rules=rules))
        torch.testing.assert_close(permuted, loss.rows(pairs)[order], rtol=1e-12, atol=1e-12)


@every_loss_of_rows
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_blocks_of_anchors_equal_one_block(case, heads, size):
    loss = case.make()
    for pairs in prepared(case, loss, views=3, heads=heads):
        expected = loss.rows(pairs)
        blocks = [loss.rows(pairs.block(slice(start, start + size))) for start in range(0, len(pairs), size)]
        torch.testing.assert_close(torch.cat(blocks), expected, rtol=1e-12, atol=1e-12)
        assert expected.shape == (len(pairs),)


@every_loss
def test_permuted_samples_change_nothing(case):
    loss = case.make()
    views, given = case.inputs(samples=6, views=3, group=torch.tensor([0, 1, 0, 2, 1, 3]))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = dict(given, group=given["group"][order])
    if case.targets:
        permuted["targets"] = [target[order] for target in given["targets"]]
    torch.testing.assert_close(
        loss(*[view[order] for view in views], **permuted), loss(*views, **given), rtol=1e-12, atol=1e-12
    )


@every_loss_of_rows
@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("labels", [False, True])
def test_the_mean_of_the_rows_is_the_mean(case, views, labels):
    loss = case.make()
    given = {"group": torch.tensor([4, 4, 7, 7, 9])} if labels else {}
    tensors, given = case.inputs(views=views, **given)
    rows = loss(*tensors, **given, reduction="none")
    assert rows.shape == (rows.numel(),)
    assert rows.numel() % (len(tensors) * 5) == 0
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(rows.mean(), loss(*tensors, **given), rtol=1e-12, atol=1e-12)


@every_loss_of_rows
def test_anchors_without_positives_are_zero_without_gradient_and_not_in_the_mean(case):
    # The only target is view 1's, which is no candidate of the anchors of view 1: these have no positives.
    loss = case.make()
    views, given = case.inputs()
    given["targets"] = (None, torch.randn(5, DIMS, dtype=torch.float64))
    rows = loss(*views, **given, reduction="none")
    assert not rows[5:].any()
    value, (first, second, *_) = value_and_gradients(loss, views, **given)
    torch.testing.assert_close(value, rows[:5].sum() / 5)
    assert first.any()
    assert not second.any()


class Padded(PairLoss):
    """A loss that appends rows of PADDING to the anchors and candidates of another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def pairs(self, *views, **given):
        return [
            replace(
                pairs,
                anchor=self.padded(pairs.anchor),
                candidates=[self.padded(part) for part in pairs.candidates],
                rules=tuple((rule, tuple(F.pad(values, (0, 2)) for values in rows)) for rule, rows in pairs.rules),
            )
            for pairs in self.inner.pairs(*views, **given)
        ]

    def padded(self, part):
        z = torch.full((*part.z.shape[:-2], 2, DIMS), 3.0, dtype=part.z.dtype)
        index = part.sample[:1].expand(2)
        reference = None if part.reference is None else part.reference[:1].expand(2, -1)
        return concatenate([part, Embeddings(z, index, index, torch.full_like(index, PADDING), reference)])

    def per_anchor(self, pairs):
        return self.inner.per_anchor(pairs)


@every_loss_of_rows
def test_padding_changes_nothing(case):
    loss = case.make()
    views, given = case.inputs(views=3)
    plain, padded = value_and_gradients(loss, views, **given), value_and_gradients(Padded(loss), views, **given)
    torch.testing.assert_close(padded[0], plain[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(padded[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_padded_anchor_is_invalid_also_for_a_loss_without_needs():
    class Pushed(PairLoss):
        needs_positive = False

        def per_anchor(self, pairs):
            return pairs.logsumexp(1.0, "negative") + 100

    views, _ = Case("info_nce").inputs()
    loss, padded = Pushed(), Padded(Pushed())
    padded.needs_positive = False
    torch.testing.assert_close(padded(*views), loss(*views), rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("zeros", ["one row", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_vectors_have_zero_gradient_and_a_finite_loss(case, zeros, dtype):
    loss = case.make()
    views, given = case.inputs(views=3, dtype=dtype)
    blank = torch.zeros(5, 1, dtype=dtype) if zeros == "all" else torch.tensor([[1], [0], [1], [1], [1]], dtype=dtype)
    views = [(view.detach() * blank).requires_grad_() for view in views]
    if case.targets:
        given["targets"] = [target * blank for target in given["targets"]]
    value, gradients = value_and_gradients(loss, views, **given)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    for view, gradient in zip(views, gradients, strict=False):
        assert not case.pairs or not gradient[(view == 0).all(dim=1)].any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype):
    loss = case.make()
    views, given = case.inputs(dtype=dtype)
    value, gradients = value_and_gradients(loss, views, **given)
    wide = [view.detach().float().requires_grad_() for view in views]
    if case.targets:
        given["targets"] = [target.float() for target in given["targets"]]
    if case.extra:
        given["extra"] = [extra.float() for extra in given["extra"]]
    expected, wide_gradients = value_and_gradients(loss, wide, **given)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for half, full in zip(gradients, wide_gradients, strict=True):
        assert torch.isfinite(half).all()
        assert torch.equal(half, full.to(half.dtype))


@every_loss
def test_autocast_changes_nothing_forward_or_backward(case):
    loss = case.make()
    views, given = case.inputs(samples=9, views=3, dtype=torch.float32)
    outside = value_and_gradients(loss, views, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_gradients(loss, views, **given)
    assert_same_bits(inside, outside)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.derivative], ids=str)
def test_the_gradient_is_the_derivative(case, labels):
    loss = case.make().double()
    names = [name for name, _ in loss.named_parameters()]
    group = torch.tensor([0, 1, 0]) if labels else None
    views, given = case.inputs(samples=3, views=3, group=group)

    def function(*leaves):
        parameters = dict(zip(names, leaves, strict=False))
        return torch.func.functional_call(loss, parameters, leaves[len(names) :], given)

    parameters = [parameter.detach().clone().requires_grad_() for parameter in loss.parameters()]
    # Along random directions, which is ten times faster than entry by entry.
    assert torch.autograd.gradcheck(function, (*parameters, *views), fast_mode=True)


@every_loss
def test_a_copy_by_state_deepcopy_or_pickle_after_a_call_gives_the_same(case):
    loss = case.make()
    for parameter in loss.parameters():
        nn.init.constant_(parameter, 0.3)
    views, given = case.inputs()
    value = loss(*views, **given)
    loaded = case.make()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for copied in (loaded, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(copied(*views, **given), value)
        assert copied.metrics.keys() == loss.metrics.keys()


@every_loss
@pytest.mark.parametrize(
    "options",
    [
        {"samples": 1},
        {"samples": 1, "views": 5},
        {"samples": 0},
        {"group": torch.zeros(5, dtype=torch.int64)},
        {"group": torch.arange(5)},
        {"sample": torch.tensor([3, 3, 3, 3, 3])},
        {"sample": torch.tensor([0, 1, 0, 2, 1])},
        {"heads": 3},
    ],
    ids=[
        "one sample",
        "five views",
        "no sample",
        "one class",
        "all distinct",
        "copies",
        "repeats",
        "heads",
    ],
)
def test_unusual_batches_give_finite_values_and_gradients(case, options):
    loss = case.make()
    views, given = case.inputs(**options)
    value, gradients = value_and_gradients(loss, views, **given)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(torch.isfinite(metric) for metric in loss.metrics.values())
    if options.get("samples") == 0:
        assert value == 0


@every_loss
def test_explicit_default_identities_change_nothing(case):
    loss = case.make()
    views, given = case.inputs()
    index = torch.arange(5)
    plain = loss(*views, **given)
    torch.testing.assert_close(loss(*views, **{**given, "sample": index}), plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss(*views, group=index, **given), plain, rtol=1e-13, atol=0)
    renamed = {**given, "sample": index + 7, "group": index * 3}
    torch.testing.assert_close(loss(*views, **renamed), plain, rtol=1e-13, atol=0)


@every_loss
def test_heads_are_averaged(case):
    """Each head is a batch of its own, with thresholds, weights and means of its own."""
    loss = case.make().double()
    views, given = case.inputs(views=3, heads=3)
    if case.name == "cwcl":  # its default weights are the mean over heads
        given["reference"] = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, gradients = value_and_gradients(loss, views, **given)

    def of_head(head):
        own = {**given, "targets": [target[head] for target in given["targets"]]} if case.targets else given
        return value_and_gradients(loss, [view[head] for view in views], **own)

    values, of_heads = zip(*(of_head(head) for head in range(3)), strict=True)
    torch.testing.assert_close(value, sum(values) / 3, rtol=1e-12, atol=0)
    parameters = [sum(each) / 3 for each in zip(*of_heads, strict=True)][len(views) :]
    torch.testing.assert_close(list(gradients[len(views) :]), parameters, rtol=1e-9, atol=1e-12)
    for view in range(len(views)):
        expected = torch.stack([of_head[view] for of_head in of_heads]) / 3
        torch.testing.assert_close(gradients[view], expected, rtol=1e-9, atol=1e-12)


@every_loss_over_pairs
def test_a_copy_of_a_row_is_itself_and_no_negative(case):
    """A sampler may pad the last batch with copies of samples, which must not repel each other."""
    loss = case.make()
    views, given = case.inputs(sample=torch.tensor([0, 1, 2, 3, 3]))
    for pairs in loss.pairs(*views, **given):
        assert not (
            pairs.negative & (pairs.anchor.sample[:, None] == torch.cat([p.sample for p in pairs.candidates]))
        ).any()


@every_loss_of_plain_extras
def test_extras_may_be_a_tensor_a_list_embeddings_or_a_memory(case):
    loss = case.make()
    views, given = case.inputs()
    given.pop("extra", None)
    plain = torch.randn(6, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    unknown = unknown_samples(6, plain.device)
    part = Embeddings(normalise(plain), unknown, unknown, torch.full_like(unknown, REMEMBERED))

    class Memory(nn.Module):
        def candidates(self, anchor):
            assert len(anchor) == 10
            return part

    expected = loss(*views, **given, extra=[plain])
    for extra in (plain, (plain,), [plain[:2], plain[2:]], part, [part], Memory(), [Memory()], plain * 3):
        torch.testing.assert_close(loss(*views, **given, extra=extra), expected, rtol=1e-12, atol=0)
    if case.name not in ("negative_cosine", "amcl_cosine") and not case.extra:
        assert abs(expected - loss(*views, **given)) > 1e-6


@every_loss_of_plain_extras
def test_a_remembered_entry_of_the_own_sample_is_ignored(case):
    loss = case.make()
    views, given = case.inputs(sample=torch.arange(5))
    given.pop("extra", None)
    z = torch.randn(7, DIMS, dtype=torch.float64)
    sample = torch.tensor([0, 1, 2, 3, 4, 11, 12])
    queue = Embeddings(normalise(z), sample, sample, torch.full_like(sample, REMEMBERED))
    for ruled in loss.pairs(*views, **given, extra=[queue]):
        pairs = replace(ruled, rules=())
        own = pairs.anchor.sample[:, None] == sample
        assert not (pairs.relation("all")[:, -7:] & own).any()
        assert torch.equal(pairs.relation("remembered")[:, -7:], ~own)


@every_loss_of_plain_extras
def test_extras_of_half_precision_work_with_views_of_any(case):
    views, given = case.inputs()
    index = torch.arange(50, 54)
    z = normalise(torch.randn(4, DIMS))
    given["extra"] = [Embeddings(z.half(), index, index, torch.full_like(index, REMEMBERED)), z.bfloat16()]
    assert torch.isfinite(case.make()(*views, **given))


@every_loss
def test_inputs_that_are_not_finite_raise(case):
    loss = case.make()
    for index_of_view in range(2):
        views, given = case.inputs()
        views[index_of_view].data[1, 0] = float("nan")
        with pytest.raises(ValueError, match=rf"\w+: view {index_of_view} contains values that are not finite"):
            loss(*views, **given)
    if not case.pairs:
        return
    views, given = case.inputs()
    given["targets"] = (torch.full((5, DIMS), torch.inf), torch.ones(5, DIMS))
    with pytest.raises(ValueError, match="target 0 contains values that are not finite"):
        loss(*views, **given)
    views, given = case.inputs()
    given["extra"] = torch.full((5, DIMS), torch.nan)
    with pytest.raises(ValueError, match="extra candidates contain values that are not finite"):
        loss(*views, **given)


@every_loss
def test_metrics_are_detached_numbers_of_the_last_call(case):
    loss = case.make()
    assert loss.metrics == {}
    views, given = case.inputs()
    loss(*views, **given).backward()
    metrics = loss.metrics
    assert metrics
    if case.pairs:
        assert metrics["anchors"] > 0
        assert -1 <= metrics["positive_similarity"] <= 1
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert loss.end_epoch() is None


def test_functional_gradients_are_the_gradients():
    (a, b), _ = Case("info_nce").inputs()
    found = torch.func.grad(lambda z: InfoNCE()(z, b))(a)
    torch.testing.assert_close(found, torch.autograd.grad(InfoNCE()(a, b), a)[0], rtol=1e-12, atol=1e-15)


def test_metrics_measure_the_similarities():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    loss = InfoNCE(temperature=0.25, learn_temperature=True)
    loss(a, b)
    metrics = {name: float(value) for name, value in loss.metrics.items()}
    # positives: a0b0 .6, a1b1 .6; negatives a0: a1 0, b1 .8; a1: a0 0, b0 .8; b0: a1 .8, b1 .96; b1: a0 .8, b0 .96.
    expected = {"anchors": 4, "positive_similarity": 0.6, "positives": 1, "negative_similarity": 0.64, "negatives": 2}
    assert metrics == pytest.approx({**expected, "temperature": 0.25}, abs=1e-6)


class Plain(PairLoss):
    """NT-Xent from the similarity matrix, as in a user's own loss."""

    reads_similarity = True

    def per_anchor(self, pairs):
        s = pairs.similarity / 0.1
        all_candidates = s.masked_fill(~(pairs.positive | pairs.negative), -torch.inf).logsumexp(dim=-1)
        return all_candidates - s.masked_fill(~pairs.positive, 0).sum(dim=-1) / pairs.positive.sum(dim=-1)


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize("heads", [None, 2])
def test_a_loss_that_reads_similarities_has_the_same_gradient_in_blocks(monkeypatch, block, heads):
    monkeypatch.setattr(module, "BLOCK", block)
    views, given = Case("info_nce").inputs(views=3, heads=heads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(Plain(), views, **given)
    expected = value_and_gradients(InfoNCE(), views, **given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_loss_without_per_anchor_raises():
    class Empty(PairLoss):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define the loss per anchor"):
        Empty()(torch.ones(2, 2), torch.ones(2, 2))


def test_rows_with_several_values_per_anchor_are_averaged():
    class Two(PairLoss):
        def per_anchor(self, pairs):
            return torch.stack([pairs.mean("positive"), 3 * pairs.mean("positive")], dim=1)

    a, b = torch.randn(2, 4, 3)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(Two()(a, b, reduction="none"), 2 * torch.cat([cosine, cosine]))


def test_a_loss_may_need_negatives():
    class Pushed(PairLoss):
        needs_negative = True

        def per_anchor(self, pairs):
            return pairs.logsumexp(1.0, "negative")

    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    one_class = torch.zeros(3, dtype=torch.int64)
    value, gradients = value_and_gradients(Pushed(), [z, z], group=one_class)
    assert value == 0
    assert not gradients[0].any()


def test_a_loss_may_take_raw_embeddings():
    class Raw(PairLoss):
        normalise = False

        def per_anchor(self, pairs):
            return pairs.mean("positive")

    a = torch.tensor([[2.0, 0.0]])
    assert Raw()(a, 3 * a) == 12
    assert Raw()(a.half(), 3 * a.half()).dtype == torch.float32


def test_combine_sees_every_row_once_and_changes_the_mean():
    class Doubled(InfoNCE):
        def combine(self, rows, prepared):
            assert [len(row) for row in rows] == [len(pairs) for pairs in prepared]
            return [2 * row for row in rows]

    views, _ = Case("info_nce").inputs()
    torch.testing.assert_close(Doubled()(*views), 2 * InfoNCE()(*views))


def test_references_reach_the_pairs_at_unit_length():
    class Weighted(PairLoss):
        def per_anchor(self, pairs):
            return pairs.mean("all", weight="reference")

    a, b = torch.randn(2, 3, 2, dtype=torch.float64)
    reference = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    z = [row / row.norm() for row in [*a, *b]]
    expected = []
    for i in range(6):
        weights = {
            j: (float(torch.cosine_similarity(reference[i % 3], reference[j % 3], dim=0)) + 1) / 2 for j in range(6)
        }
        others = [j for j in range(6) if j != i]
        expected.append(sum(weights[j] * float(z[i] @ z[j]) for j in others) / sum(weights[j] for j in others))
    found = Weighted()(a, b, reference=reference, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


Z = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("views", "given", "message"),
    [
        ((), {}, r"takes one tensor per view: loss\(z_a, z_b\)"),
        ((Z,), {}, "got one view and no targets"),
        ((Z,), {"targets": (Z,)}, r"the only view needs the target of another one"),
        ((Z,), {"targets": (None, None)}, r"the only view needs the target of another one"),
        ((Z, Z[:3]), {}, r"view 0 is \(4, 3\) and view 1 is \(3, 3\)"),
        ((Z, Z), {"targets": (Z[:, :2], None)}, r"view 0 is \(4, 3\) and target 0 is \(4, 2\)"),
        ((Z, Z), {"targets": Z}, r"targets is a sequence, one per view"),
        ((Z.long(), Z), {}, r"view 0 must be a floating \(N, D\).*torch.int64"),
        (([[1.0]], Z), {}, r"view 0 must be a floating \(N, D\).*got list"),
        ((Z[0], Z[0]), {}, r"view 0 must be a floating \(N, D\).*shape \(3,\)"),
        ((Z, Z), {"group": torch.ones(4)}, r"group must be a tensor of \(4,\) whole numbers.*torch.float32"),
        ((Z, Z), {"group": [1, 2, 3, 4]}, r"group must be a tensor of \(4,\) whole numbers.*got list"),
        ((Z, Z), {"sample": torch.arange(8)}, r"sample must be a tensor of \(4,\) whole numbers.*\(8,\)"),
        (
            (Z, Z),
            {"reference": Z[:2]},
            r"reference is \(4, R\), or one \(4, R\) for each of the 2 views; got .*\(2, 3\)",
        ),
        ((Z, Z), {"extra": torch.ones(5, 2)}, r"as many dimensions as the views, 3; got 2"),
        ((Z, Z), {"extra": [torch.ones(3)]}, r"a plain extra is a floating \(K, D\) tensor.*\(3,\)"),
        ((Z, Z), {"extra": 3}, r"extra takes \(K, D\) tensors, Embeddings and memories.*got int"),
        ((Z, Z), {"extra": [torch.ones(2, 5, 3)]}, r"as many as the views, which have none; got .*\(2, 5, 3\)"),
        ((Z.expand(3, 4, 3),) * 2, {"extra": [torch.ones(2, 5, 3)]}, r"as many as the views, 3; got .*\(2, 5, 3\)"),
        ((Z, Z), {"reference": Z * torch.nan}, r"reference contains values that are not finite"),
        ((Z, Z), {"extra": ["queue"]}, r"extra takes \(K, D\) tensors, Embeddings and memories.*got str"),
        ((Z, Z), {"reduction": "sum"}, "reduction is 'mean' or 'none'; got 'sum'"),
    ],
)
@pytest.mark.parametrize("loss", [InfoNCE(), CACR()], ids=lambda loss: type(loss).__name__)
def test_wrong_inputs_raise(loss, views, given, message):
    with pytest.raises(ValueError, match=message):
        loss(*views, **given)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("info_nce", {"temperature": 0}, "temperature must be a positive number; got 0"),
        ("info_nce", {"temperature": float("nan")}, "temperature must be a positive number"),
        ("info_nce", {"temperature": float("inf")}, "temperature must be a positive number"),
        ("info_nce", {"temperature": 0.001, "learn_temperature": True}, "starts at 0.01 or above"),
        ("info_nce", {"candidates": "some"}, "loss.candidates must be one of all, across, memory; got 'some'"),
        ("info_nce", {"temprature": 0.1}, "Did you mean 'temperature'"),
        ("cacr", {"attraction_scale": -1}, "attraction_scale must be a number of 0 or more; got -1"),
        ("cacr", {"repulsion_weight": float("nan")}, "repulsion_weight must be a number of 0 or more"),
        ("cacr", {"repulsion": "views"}, "loss.repulsion must be one of view_pairs, all"),
        ("negative_cosine", {"temperature": 0.1}, "It takes no arguments"),
    ],
)
def test_wrong_arguments_raise(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        LOSSES.build({"name": name, **arguments})


def test_none_means_no_extra():
    assert InfoNCE()(Z, Z, extra=None) == InfoNCE()(Z, Z)


def test_wrong_choices_raise_in_the_constructors_too():
    for wrong in ({"candidates": "some"}, {"positives": "some"}):
        with pytest.raises(ValueError, match="got 'some'"):
            InfoNCE(**wrong)
    with pytest.raises(ValueError, match="repulsion is 'view_pairs' or 'all'"):
        CACR(repulsion="some")
    with pytest.raises(ValueError, match=r"temperature must be a positive number; got '0.1'"):
        InfoNCE("0.1")
    with pytest.raises(ValueError, match="attraction_scale must be a number of 0 or more; got None"):
        CACR(None)
    with pytest.raises(ValueError, match="NegativeCosine needs targets"):
        NegativeCosine()(Z, Z)


def test_a_view_is_not_compared_with_its_own_target():
    views, given = Case("info_nce", targets=True).inputs(views=3)
    (pairs,) = InfoNCE().pairs(*views, **given)
    assert isinstance(pairs, Pairs)
    view = torch.cat([part.view for part in pairs.candidates])
    assert not (pairs.relation("all") & (pairs.anchor.view[:, None] == view)).any()
    assert (pairs.relation("all").sum(dim=1) == 10).all()
