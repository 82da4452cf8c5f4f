"""Thresholds: the k-th largest similarity of long rows, and reductions over similarities at or above it."""

import pytest
import torch

from contrast.core import reductions
from contrast.core.reductions import Kth, Mean, strips
from contrast.losses import InfoNCE
from contrast.losses.hard_contrastive import HardContrastive


def sorted_kth(rows, k):
    return rows.sort(dim=1, descending=True).values.gather(1, k.unsqueeze(1) - 1).squeeze(1)


def long_rows(kind, count=40, length=3000):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, length, generator=generator)
    if kind == "ties":
        return rows.mul_(3).round_()
    if kind == "one value":
        return torch.ones_like(rows)
    if kind == "blank":
        return rows.masked_fill_(torch.rand(rows.shape, generator=generator) < 0.7, -torch.inf)
    if kind == "misleading":
        # All large numbers are in the sample from which the bound is estimated.
        rows[:, :: strips.SAMPLED] += 100
    return rows


@pytest.mark.parametrize("kind", ["plain", "ties", "one value", "blank", "misleading"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 20, 300, 3000, "various"])
def test_the_kth_largest_of_long_rows_is_that_of_sorted_rows(kind, dtype, k):
    rows = long_rows(kind).to(dtype)
    ranks = torch.arange(1, 41) * 7 if k == "various" else torch.full((40,), k)
    expected = sorted_kth(rows, ranks)
    assert torch.equal(strips.kth_largest(rows, ranks), expected)


def outcome(z, queue):
    a, b = (part.clone().requires_grad_() for part in z)
    rows = HardContrastive()(a, b, extra=queue, reduction="none")
    weight = torch.linspace(0, 1, len(rows), dtype=rows.dtype)
    return rows.detach(), *torch.autograd.grad((rows * weight).sum(), [a, b])


@pytest.mark.parametrize("queued", [0, 90])
def test_pairs_above_thresholds_are_the_same_from_either_side(queued):
    """In symmetric tiles anchors and candidates have thresholds of their own."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 150, 16, generator=generator)
    queue = [torch.randn(queued, 16, generator=generator)] if queued else []
    with reductions.backend("dense"):
        expected = outcome(z, queue)
    with reductions.backend("tiled", tile=64):
        found = outcome(z, queue)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [3.0, 900.0, 20000.0, -4.0, 0.0])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_log_sum_exp_computes_its_own_thresholds(scale, size, labelled):
    """For exponents that are bounded, shifted, out of range, decreasing, or equal."""
    generator = torch.Generator().manual_seed(3)
    own, queue = (torch.randn(*shape, 16, generator=generator).double() for shape in [(2, 75), (40,)])
    group = torch.arange(75) % 30 if labelled else None

    def outcome():
        a, b = (part.clone().requires_grad_() for part in own)
        (pairs,) = HardContrastive().pairs(a, b, group=group, extra=[queue])
        k = torch.arange(1, len(pairs) + 1) % 50 + 1
        rows = pairs.logsumexp(scale, "negative", above=Kth(k, "negative"))
        attract = pairs.logsumexp(scale, "positive", above=Kth(1, "positive"))
        total = (rows * torch.linspace(0, 1, len(rows), dtype=rows.dtype)).sum() + attract.sum()
        return rows.detach(), attract.detach(), *torch.autograd.grad(total, [a, b])

    with reductions.backend("dense"):
        expected = outcome()
    with reductions.backend("tiled", tile=size):
        torch.testing.assert_close(outcome(), expected)


def test_reductions_with_and_without_thresholds_do_not_share_masks():
    """A later reduction must not reuse a mask or threshold of an earlier one."""
    (pairs,) = InfoNCE().pairs(*torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    hard = Mean("positive", above=Kth(1, "negative"))
    with reductions.backend("dense"):
        (expected,) = pairs.reduce(hard)
    pairs.reduce(Mean("positive"), Kth(1, "negative"))
    torch.testing.assert_close(pairs.reduce(hard)[0], expected)


def test_strips_share_one_buffer(monkeypatch):
    """Strips of their own would use as much memory as the matrix."""
    seen, kth = [], strips.kth_largest
    monkeypatch.setattr(strips, "STRIP", 1)
    monkeypatch.setattr(strips, "kth_largest", lambda strip, k: seen.append(strip) or kth(strip, k))
    z = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(0))
    (pairs,) = HardContrastive().pairs(*z, group=torch.arange(70) % 2)
    with reductions.backend("tiled", tile=16):
        pairs.kth(5, "negative")
    assert len(seen) > 4
    assert len({strip.data_ptr() for strip in seen}) == 1


@pytest.mark.parametrize("dims", [5, 17, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_anchor_has_its_hardest_negative(dims, dtype):
    """The last digit of a product depends on the alignment of the vectors in memory."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(4, 140 + 13 * seed, dims, dtype=dtype, generator=generator)
        (pairs,) = HardContrastive(hardest=1).pairs(*z)
        assert bool((pairs.count("negative", above=pairs.kth(1, "negative")) > 0).all())
        above = pairs.logsumexp(10.0, "negative", above=pairs.kth(1, "negative"))
        assert bool((above > -100).all())
