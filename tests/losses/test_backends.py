"""Every loss has the same value and gradient with every backend."""

import gc

import pytest
import torch

from contrast.core import reductions
from contrast.core.embeddings import REMEMBERED, Embeddings, normalise
from contrast.core.reductions import LogSumExp, SoftplusSum
from contrast.losses import InfoNCE
from tests.losses.cases import CASES, DIMS

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 0])
INPUTS = {
    "two views": {},
    "four views": {"views": 4},
    "labels": {"views": 3, "group": LABELS},
    "one class": {"group": LABELS * 0},
    "repeated samples": {"sample": torch.tensor([3, 1, 3, 4, 5, 6, 6])},
    "heads": {"views": 3, "heads": 2},
    "queue": {"sample": torch.arange(7), "queue": True},
    "heads and a learned extra": {"heads": 2, "learned": True},
}
COMBINATIONS = [
    pytest.param(case, options, id=f"{case}-{name}")
    for case in CASES
    for name, options in INPUTS.items()
    if case.plain_extra or not {"queue", "learned"} & options.keys()
]


def outcome(case, options):
    options = dict(options)
    generator = torch.Generator().manual_seed(8)
    queue, learned = options.pop("queue", False), options.pop("learned", False)
    views, given = case.inputs(samples=7, **options)
    more = torch.randn(6, DIMS, generator=generator, dtype=torch.float64)
    leaves = [*views]
    if queue and "extra" not in given:
        index = torch.tensor([2, 30, 31, 4, 32, 33])
        given["extra"] = [Embeddings(normalise(more), index, index, torch.full_like(index, REMEMBERED))]
    if learned:
        leaves.append(more.requires_grad_())
        given["extra"] = [more]
    loss = case.make().double()
    leaves += list(loss.parameters())
    value = loss(*views, **given)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value, gradients, loss.metrics


@pytest.mark.parametrize(("case", "options"), COMBINATIONS)
def test_tiles_change_nothing(case, options):
    with reductions.backend("dense"):
        expected = outcome(case, options)
    for size in (3, 512):
        with reductions.backend("tiled", tile=size):
            found = outcome(case, options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_view_without_gradient_changes_nothing_for_the_others(case):
    def outcome():
        views, given = case.inputs(samples=7)
        loss = case.make().double()
        views = [views[0].detach(), *(z.requires_grad_() for z in views[1:])]
        leaves = [*views[1:], *loss.parameters()]
        value = loss(*views, **given)
        if not value.requires_grad:
            return value
        return value, torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)

    with reductions.backend("dense"):
        expected = outcome()
    for size in (3, 512):
        with reductions.backend("tiled", tile=size):
            torch.testing.assert_close(outcome(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_call_in_inference_mode_does_not_affect_training(case):
    """Validation may be the first call: no cached tensor may be an inference tensor."""
    views, given = case.inputs(samples=7)
    loss = case.make().double()
    with torch.inference_mode():
        loss(*views, **given)
    value = loss(*views, **given)
    assert torch.isfinite(torch.autograd.grad(value, views[-1], allow_unused=True, materialize_grads=True)[0]).all()


@pytest.mark.parametrize("case", CASES)
def test_a_loss_leaves_no_cycle_of_references(case):
    """A cycle would keep the activations of a step in memory until the garbage collector runs."""
    views, given = case.inputs(samples=7)
    loss = case.make().double()
    calls = 5
    loss(*views, **given)
    gc.disable()
    gc.freeze()  # older objects are not examined, which would take most of the time
    try:
        for _ in range(calls):
            loss(*views, **given)
        assert gc.collect() < calls
    finally:
        gc.unfreeze()
        gc.enable()


def test_reductions_of_the_same_pairs_have_separate_backward_passes():
    z = torch.randn(2, 5, DIMS, dtype=torch.float64, requires_grad=True)
    requested = LogSumExp(3.0, "negative"), SoftplusSum(2.0, 0.5, "positive")

    def gradient(pairs, one):
        return torch.autograd.grad(pairs.reduce(one)[0].sum(), pairs.anchor_parts[0].z)[0]

    (pairs,) = InfoNCE().pairs(*z)
    found = [gradient(pairs, one) for one in requested]
    with reductions.backend("dense"):
        expected = [gradient(InfoNCE().pairs(*z)[0], one) for one in requested]
    torch.testing.assert_close(found, expected)
