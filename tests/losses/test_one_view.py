"""One view with labels, unlabelled rows, and labels that are passed in the wrong argument."""

import pytest
import torch

from contrast.core.embeddings import REMEMBERED, Embeddings, normalise
from contrast.losses import CACR, CWCL, LOSSES, AMCLBarlow, BadPairs, FalseNegatives, InfoNCE, SigLIP
from contrast.memory import Queue
from tests.losses.cases import CASES, DIMS
from tests.losses.reference import random, supcon

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 3])
ONE_VIEW = [
    case
    for case in CASES
    if not case.targets and case.rows and case.make().takes_one_view and "memory" not in str(case)
]


def test_one_view_with_labels_is_sup_con():
    z = random(7, DIMS)
    found, expected = InfoNCE(temperature=0.2)(z, group=LABELS), supcon(z, LABELS, 0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (found, expected)))


@pytest.mark.parametrize("case", ONE_VIEW, ids=str)
def test_the_order_of_rows_and_the_numbers_of_labels_do_not_matter(case):
    z, order = random(6, DIMS), torch.tensor([3, 1, 5, 0, 2, 4])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])

    def outcome(z_given, group, sample):
        value = case.make().double()(z_given, group=group, **({"sample": sample} if case.name == "bad_pairs" else {}))
        return value, torch.autograd.grad(value, z)[0]

    value, gradient = outcome(z, labels, torch.arange(6))
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(outcome(z[order], 7 - labels[order], order), (value, gradient))


@pytest.mark.parametrize("name", ["info_nce", "decoupled", "hard_negative"])
def test_one_view_of_pairs_equals_two_views_of_one_sample_each(name):
    """Two rows of one class are paired like two views of one sample."""
    z, pairs = random(8, DIMS), torch.arange(4).repeat(2)
    loss = LOSSES.build(name)
    one, two = loss(z, group=pairs), loss(z[:4], z[4:])
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (one, two)))


def test_an_anchor_without_a_positive_is_left_out_of_the_mean():
    z, loss = random(7, DIMS), InfoNCE()
    rows = loss(z, group=LABELS, reduction="none")
    assert (rows[[3, 6]] == 0).all()
    torch.testing.assert_close(loss(z, group=LABELS), rows.sum() / 5)


def test_cacr_with_one_view_repels_all_negatives_at_once():
    z = random(6, DIMS)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(CACR()(z, group=labels), CACR(repulsion="all")(z, group=labels))


@pytest.mark.parametrize("samples", [None, torch.arange(7), torch.tensor([1, 0, 2, 3, 4, 5, 6])])
def test_a_negative_group_is_a_sample_of_its_own_even_where_its_index_is_a_label(samples):
    """Sample 2 is unlabelled, and others have the label 2: they are not its positives."""
    views = random(2, 7, DIMS).unbind()
    labels = torch.tensor([0, 2, -1, 2, -1, -7, 0])
    separate = torch.tensor([0, 2, 100, 2, 101, 102, 0])
    for given in (views, views[:1]):
        found = InfoNCE()(*given, group=labels, sample=samples, reduction="none")
        torch.testing.assert_close(found, InfoNCE()(*given, group=separate, sample=samples, reduction="none"))


def test_unlabelled_rows_of_two_views_keep_their_views_as_positives():
    a, b = random(2, 4, DIMS).unbind()
    nothing_labelled = InfoNCE()(a, b, group=torch.full((4,), -1))
    torch.testing.assert_close(nothing_labelled, InfoNCE()(a, b))


def test_unlabelled_entries_of_a_queue_are_negatives():
    queue, index = Queue(4, dim=DIMS), torch.arange(4)
    queue.update(random(4, DIMS, seed=1).float(), sample=index + 10, group=torch.tensor([0, -1, -1, 1]))
    z = random(4, DIMS).float()
    (pairs,) = InfoNCE().pairs(z, sample=index, group=torch.tensor([0, -1, 1, 1]), extra=[queue])
    assert pairs.count("positive").tolist() == [1, 0, 2, 2]
    assert pairs.count("remembered").tolist() == [3, 4, 3, 3]


def test_a_negative_group_of_given_embeddings_is_an_ordinary_group():
    """Only the arguments of a loss mark unlabelled rows by a negative group; `Embeddings` do not."""
    group = torch.tensor([-1, -1, 0])
    part = Embeddings(normalise(random(3, DIMS)), torch.arange(3) + 20, group, torch.full((3,), REMEMBERED))
    (pairs,) = InfoNCE().pairs(random(2, DIMS), sample=torch.arange(2), group=torch.tensor([0, 0]), extra=[part])
    assert pairs.count("positive").tolist() == [2, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: InfoNCE()(z), ValueError, "InfoNCE got one view and no targets; pass two views"),
        (lambda z: SigLIP()(z, group=LABELS), ValueError, "SigLIP got one view and no targets"),
        (lambda z: CWCL()(z, group=LABELS), ValueError, "CWCL got one view and no targets"),
        (lambda z: InfoNCE(candidates="across")(z, group=LABELS), ValueError, "got one view and no targets"),
        (
            lambda z: InfoNCE()(z, z, LABELS),
            TypeError,
            r"keyword argument: loss\(z_a, z_b, group=labels\)",
        ),
        (lambda z: InfoNCE()(z, LABELS), TypeError, r"labels are a keyword argument"),
        (lambda z: InfoNCE()(z, z, labels=LABELS), TypeError, r"labels are passed as group: .*; got labels="),
        (lambda z: BadPairs(InfoNCE(), samples=7)(z, z, LABELS), TypeError, "BadPairs .*group=labels"),
        (lambda z: FalseNegatives(InfoNCE(), top=1)(z, z, labels=LABELS), TypeError, "FalseNegatives: labels are"),
        (lambda z: InfoNCE()(z, z, tempreture=1), TypeError, "InfoNCE has no argument tempreture="),
        (lambda z: AMCLBarlow(DIMS)(z, z, labels=LABELS), TypeError, "AMCLBarlow uses no labels"),
        (lambda z: InfoNCE()(z, z, z, targets=(z, z)), ValueError, "got 2 targets for 3 views"),
        (lambda z: InfoNCE()(z, z, targets=(z,)), ValueError, "got 1 targets for 2 views"),
    ],
)
def test_inputs_that_do_not_fit_raise(call, error, message):
    with pytest.raises(error, match=message):
        call(random(7, DIMS))
