"""Every reduction has the same value and gradient by every term and for any candidates."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from contrast.core import reductions
from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings, concatenate, normalise
from contrast.core.reductions import Count, Kth, LogSumExp, Mean, SoftMean, SoftplusSum, layout
from contrast.losses import InfoNCE

DIMS = 3
TILES = (3, 512)


def padded(part):
    """Return the embeddings, then two rows of padding."""
    z = torch.full((*part.z.shape[:-2], 2, DIMS), 3.0, dtype=torch.float64)
    index = torch.zeros(2, dtype=torch.int64)
    reference = None if part.reference is None else torch.ones(2, part.reference.shape[1], dtype=torch.float64)
    return concatenate([part, Embeddings(z, index, index, index + PADDING, reference)])


def above_bound(anchor, candidate, similarity, bound):
    return similarity > bound


class OfPair(nn.Module):
    """A function of a pair, with a slope that is learned."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, anchor, candidate):
        return self.slope * (2 + anchor.z[..., :1] * candidate.z[..., :1].mT)


class OfSides(OfPair):
    """The same function from one number per anchor and one per candidate."""

    def anchor_side(self, z):
        return z[..., :1]

    def candidate_side(self, z):
        return z[..., :1]

    def of_sides(self, s, a, b):
        return self.slope * (2 + a * b.mT) + 0 * s


class RandomCase:
    """Random anchors and candidates, and random reductions of them; the same for the same seed."""

    def __init__(self, seed):
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        choose = self.choose
        self.leaves = []
        samples, views = choose.randint(1, 13), choose.choice([1, 2, 2, 2, 3])
        heads = choose.choice([(), (), (), (1,), (2,)])
        own = [self.leaf(*heads, samples, DIMS) for _ in range(views)]
        given = {}
        across = choose.random() < 0.5
        if views == 1 or choose.random() < 0.3:
            given["targets"] = [None, *(self.leaf(*heads, samples, DIMS) for _ in range(max(views - 1, 1)))]
        given["reference"] = torch.randn(samples, 2, generator=self.generator, dtype=torch.float64)
        if choose.random() < 0.4:
            given["group"] = self.whole_numbers(choose.randint(1, 4), samples)
        if choose.random() < 0.4:
            given["sample"] = torch.arange(samples) if choose.random() < 0.6 else self.whole_numbers(6, samples)
        if choose.random() < 0.4:
            count = choose.randint(1, 8)
            z, sample = self.leaf(count, DIMS), self.whole_numbers(12, count)
            group = self.whole_numbers(4, count) if "group" in given else sample
            reference = normalise(torch.randn(count, 2, generator=self.generator, dtype=torch.float64))
            given["extra"] = z, sample, group, torch.full_like(sample, REMEMBERED), reference
        self.call = InfoNCE(candidates="across" if across else "all").pairs, own, given
        self.padding, self.rule = choose.random() < 0.2, choose.choice([None] * 4 + [0.3, -0.2])
        (first, *_) = self.pairs()
        self.rows, self.heads, self.sizes = len(first), heads, [len(part) for part in first.candidates]
        self.requested = [self.reduction() for _ in range(choose.randint(1, 3))]

    def leaf(self, *shape):
        z = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.choose.random() < 0.8:
            self.leaves.append(z.requires_grad_())
        return z

    def whole_numbers(self, below, count):
        return torch.randint(below, (count,), generator=self.generator)

    def pairs(self):
        pairs, own, given = self.call
        if "extra" in given:
            z, *identities = given["extra"]
            given = {**given, "extra": [Embeddings(normalise(z), *identities)]}
        parts = list(pairs(*own, **given))
        if self.padding:
            parts = [
                replace(part, anchor=padded(part.anchor), candidates=[*map(padded, part.candidates)]) for part in parts
            ]
        if self.rule is not None:
            bounds = [torch.linspace(self.rule, self.rule + 0.5, len(part), dtype=torch.float64) for part in parts]
            parts = [part.ignoring(above_bound, bound) for part, bound in zip(parts, bounds, strict=True)]
        return parts

    def value(self, low=0.2):
        """Return a number, a function, or a tensor that spans at most one of N and M; some have a gradient."""
        rows, columns = self.rows, sum(self.sizes)
        shapes = [(), (rows, 1), (1, columns)]
        if self.heads:
            shapes += [(*self.heads, 1, 1), (*self.heads, rows, 1), (*self.heads, 1, columns)]
        shape = self.choose.choice([None, None, *shapes, "function"])
        if shape == "function":
            function = self.choose.choice([OfPair, OfSides])(self.choose.random() + low)
            self.leaves.append(function.slope)
            return function
        if shape is None:
            return self.choose.choice([1.5, 4.0, -2.0]) if low < 1 else self.choose.random() + low
        tensor = torch.rand(shape, generator=self.generator, dtype=torch.float64) + low
        if self.choose.random() < 0.5:
            self.leaves.append(tensor.requires_grad_())
        return tensor

    def among(self):
        """Return None, the mask of one part, or a random mask."""
        kind, columns = self.choose.choice([None, None, "part", "any"]), sum(self.sizes)
        if kind == "part":
            part = self.choose.randrange(len(self.sizes))
            return torch.repeat_interleave(torch.arange(len(self.sizes)) == part, torch.tensor(self.sizes))
        return kind if kind is None else self.whole_numbers(2, columns).bool()

    def reduction(self):
        choose = self.choose
        over = choose.choice(["positive", "negative", "remembered", "all"])
        given = {"over": over, "among": self.among()}
        rows = choose.choice([None, None, None, self.whole_numbers(2, self.rows).bool()])
        kind = choose.choice([LogSumExp, LogSumExp, Mean, Mean, SoftMean, SoftplusSum, Kth, Count])
        if kind is Kth:
            return Kth(choose.randint(1, 4), **given)
        given["rows"] = rows
        if kind is SoftplusSum:
            bias = choose.choice([0.5, -1.0, torch.rand(self.rows, generator=self.generator, dtype=torch.float64)])
            return SoftplusSum(self.value(), bias, **given)
        if choose.random() < 0.2:
            given["above"] = torch.rand(self.rows, generator=self.generator, dtype=torch.float64) - 0.5
        elif choose.random() < 0.2:
            given["above"] = Kth(choose.randint(1, 4), over, choose.choice([None, given["among"]]))
        if kind is Count:
            return Count(**given)
        if kind is Mean:
            return Mean(weight=choose.choice([None, None, "reference", self.value(low=1.0)]), **given)
        if kind is SoftMean:
            return SoftMean(self.value(), detach=choose.random() < 0.3, **given)
        if "above" in given and choose.random() < 0.5:
            return LogSumExp(choose.choice([1.5, 4.0, -2.0]), over, above=given["above"])
        return LogSumExp(self.value(), log_weight=choose.choice([None, None, self.value()]), **given)

    def outcome(self):
        """Return the reductions of all pairs, and the gradients of the leaves."""
        found = [output for pairs in self.pairs() for output in pairs.reduce(*self.requested)] if self.fits() else []
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for output in found:
            weight = torch.rand(output.shape, generator=generator, dtype=torch.float64)
            counted = output > torch.finfo(torch.float64).min / 4
            total = total + torch.where(counted, weight * output, 0).sum()
        if not total.requires_grad:
            return found, [torch.zeros_like(leaf) for leaf in self.leaves]
        return found, list(torch.autograd.grad(total, self.leaves, allow_unused=True, materialize_grads=True))

    def fits(self):
        """True if all pairs have the shape of the arguments."""
        return all([len(part) for part in pairs.candidates] == self.sizes for pairs in self.pairs())


@pytest.mark.parametrize("longest", [layout.MAX_LISTED, 2], ids=["listed", "too many to list"])
@pytest.mark.parametrize(
    "start", [0, 100, *(pytest.param(start, marks=pytest.mark.long) for start in range(200, 1000, 100))]
)
def test_every_term_computes_the_same_reduction(start, longest, monkeypatch):
    monkeypatch.setattr(layout, "MAX_LISTED", longest)
    for seed in range(start, start + 100):
        case = RandomCase(seed)
        with reductions.backend("dense"):
            expected = case.outcome()
        for tile in TILES:
            with reductions.backend("tiled", tile=tile):
                found = case.outcome()
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-11, msg=lambda text, s=seed, t=tile: f"seed {s}, tile {t}: {text}"
            )
