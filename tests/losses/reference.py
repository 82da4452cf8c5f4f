"""Reference losses in plain PyTorch, and the functions that the tests of the losses share.

Tests and `benchmarks/` compare the package's losses with these, so nothing here imports `contrast`. A reference loss
computes the full similarity matrix and leaves the gradient to autograd. Views z, a and b are (N, D), for AMCL (H, N, D)
with H heads, in any floating type; parameters have the names of the package's parameters.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------- what the tests share


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers in float64 that take a gradient."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def unit(z: Tensor) -> Tensor:
    """Return the rows of `z` at unit length."""
    return z / z.norm(dim=-1, keepdim=True)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Euclidean distance of two vectors."""
    return ((a - b) ** 2).sum()


def assert_same(found: Tensor, expected: Tensor, *leaves: Tensor, rtol: float = 1e-11) -> None:
    """Check that two values and their gradients are equal, and that no expected gradient is zero.

    Args:
        found: a scalar.
        expected: a scalar.
        leaves: what both are differentiated by.
        rtol: relative tolerance of the value; that of the gradients is 1e-9 where `rtol` is smaller.
    """
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)
    ours, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=max(rtol, 1e-9), atol=1e-13)


Anchor = tuple[Tensor, list[Tensor], list[Tensor]]


def anchors(
    views: Sequence[Tensor],
    group: Sequence[int],
    *,
    targets: Sequence[Tensor | None] | None = None,
    extra: Sequence[Tensor] = (),
    across: bool = False,
) -> Iterator[Anchor]:
    """Yield each embedding (D,) at unit length, its positives and its negatives, view after view, for plain loops.

    Args:
        views: (N, D) each.
        group: the N numbers of the groups.
        targets: one (N, D) per view, or None where a view has no twin; they replace the views as candidates.
        extra: more negatives, (D,) each, at unit length.
        across: leaves out candidates of the anchor's own view, as `targets` always does.
    """
    across = across or targets is not None
    candidates = [
        (view, i, u)
        for view, z in enumerate(views if targets is None else targets)
        if z is not None
        for i, u in enumerate(unit(z))
    ]
    for view, z in enumerate(views):
        for i, anchor in enumerate(unit(z)):
            positives: list[Tensor] = []
            negatives: list[Tensor] = []
            for other, j, u in candidates:
                if other != view or not (across or i == j):
                    (positives if group[i] == group[j] else negatives).append(u)
            yield anchor, positives, [*negatives, *extra]


def pair_temperature(network: Any, anchor: Tensor, candidate: Tensor, lowest: float, highest: float) -> Tensor:
    """Return AMCL's temperature of one pair of vectors (D,) from the weights of the package's network."""
    if network.network == "constant":
        return torch.tensor(network.temperature, dtype=torch.float64)
    if network.network == "mlp":
        first = torch.cat([network.anchor_weight, network.candidate_weight], dim=1)
        hidden = torch.relu(first @ torch.cat([anchor, candidate]) + network.hidden_bias)
        f = network.out_weight @ hidden + network.bias
    else:
        a, b = network.anchor_weight @ anchor, network.candidate_weight @ candidate
        f = a @ b / math.sqrt(len(a)) + network.bias
    return lowest + (highest - lowest) / (1 + torch.exp(-f))


def regulariser(tau: Tensor, dims: int) -> Tensor:
    """Return AMCL's term for the temperatures, d / 2 log tau + 1 / tau."""
    return dims / 2 * torch.log(tau) + 1 / tau


# ----------------------------------------------------------------------------------------------------------- the losses


def both_views(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unit embeddings (..., M, D), each one's other view, and (M, M) bool: True for the same sample."""
    z = unit(torch.cat([a, b], dim=-2))
    sample = torch.arange(a.shape[-2]).repeat(2)
    return z, z.roll(a.shape[-2], dims=-2), sample[:, None] == sample


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z, _, _ = both_views(a, b)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def clip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    logits, target = log_scale.exp() * unit(a) @ unit(b).T, torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def moco(a: Tensor, b: Tensor, memory: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v2: the anchor's key is the positive, `memory` (K, D) at unit length are the negatives."""
    anchor, key = unit(a), unit(b)
    logits = torch.cat([(anchor * key).sum(dim=1, keepdim=True), anchor @ memory.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64))


def supcon(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """SupCon of one row per embedding; an anchor without a positive is left out of the mean."""
    z, itself = unit(z), torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(dim=1)
    log_share = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(dim=1)
    rows = -torch.where(positive, log_share, 0).sum(dim=1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum()


def decoupled(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z, other, same_sample = both_views(a, b)
    repel = (z @ z.T / temperature).masked_fill(same_sample, -math.inf).logsumexp(dim=1)
    return (repel - (z * other).sum(dim=1) / temperature).mean()


def hard_negative(a: Tensor, b: Tensor, temperature: float = 0.5, hardness: float = 1.0, prior: float = 0.1) -> Tensor:
    z, other, same_sample = both_views(a, b)
    count = len(z) - 2
    logits = (z @ z.T / temperature).masked_fill(same_sample, -math.inf)
    hard = count * ((hardness * logits).softmax(dim=1) * logits.exp()).sum(dim=1)
    positive = ((z * other).sum(dim=1) / temperature).exp()
    negative = ((hard - prior * count * positive) / (1 - prior)).clamp(min=count * math.exp(-1 / temperature))
    return ((positive + negative).log() - positive.log()).mean()


def hard_contrastive(a: Tensor, b: Tensor, temperature: float = 0.3, hardest: float = 0.1) -> Tensor:
    z, other, same_sample = both_views(a, b)
    logits = (z @ z.T / temperature).masked_fill(same_sample, -math.inf)
    hard = logits.topk(max(1, round(hardest * (len(z) - 2))), dim=1, sorted=False).values
    positive = (z * other).sum(dim=1, keepdim=True) / temperature
    return (torch.cat([positive, hard], dim=1).logsumexp(dim=1) - positive.squeeze(1)).mean()


def cacr(a: Tensor, b: Tensor) -> Tensor:
    distance = 2 - 2 * unit(a) @ unit(b).T
    weight = (-distance).masked_fill(torch.eye(len(a), dtype=torch.bool), -math.inf).softmax(dim=1)
    return distance.diagonal().mean() - (weight * distance).sum(dim=1).mean()


def cwcl(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """CWCL, where `a` comes from the frozen network and is its own reference."""
    frozen, z = unit(a), unit(b)
    logits, weight = frozen @ z.T / temperature, (frozen @ frozen.T + 1) / 2
    weighted = -((weight * logits.log_softmax(dim=1)).sum(dim=1) / weight.sum(dim=1)).mean()
    return weighted + F.cross_entropy(logits.T, torch.arange(len(a)))


def siglip(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor | float) -> Tensor:
    logits = log_scale.exp() * unit(a) @ unit(b).T + bias
    return -F.logsigmoid((2 * torch.eye(len(a)) - 1) * logits).sum() / len(a)


def amcl_score(similarity: Tensor, f: Tensor, dims: int) -> Tensor:
    """Return s / tau - beta * the regulariser, at the package's defaults, from the network's output f."""
    tau = 0.05 + (2 - 0.05) * f.sigmoid()
    return similarity / tau - 0.1 * regulariser(tau, dims)


def amcl_logsumexp(z: Tensor, same_sample: Tensor, f: Tensor) -> Tensor:
    """Return AMCL with a log-sum-exp over all negatives, from the network's outputs (H, M, M)."""
    score = amcl_score(z @ z.mT, f, z.shape[-1])
    positive = score.roll(score.shape[2] // 2, dims=2).diagonal(dim1=1, dim2=2)
    return (score.masked_fill(same_sample, -math.inf).logsumexp(dim=2) - positive).mean()


def amcl_inner_product(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, bias: Tensor) -> Tensor:
    z, _, same_sample = both_views(a, b)
    f = (z @ anchor_weight.T) @ (z @ candidate_weight.T).mT / math.sqrt(len(anchor_weight)) + bias
    return amcl_logsumexp(z, same_sample, f)


def amcl_mlp(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, **layers: Tensor) -> Tensor:
    z, _, same_sample = both_views(a, b)
    hidden = (z @ anchor_weight.T + layers["hidden_bias"])[:, :, None] + (z @ candidate_weight.T)[:, None]
    return amcl_logsumexp(z, same_sample, hidden.relu() @ layers["out_weight"] + layers["bias"])


def amcl_max(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, **layers: Tensor) -> Tensor:
    """AMCL with each anchor's most similar negative only, and a perceptron as its network."""
    z, other, same_sample = both_views(a, b)
    of_anchor, of_candidate = z @ anchor_weight.T + layers["hidden_bias"], z @ candidate_weight.T

    def score(similarity: Tensor, of_candidate: Tensor) -> Tensor:
        f = (of_anchor + of_candidate).relu() @ layers["out_weight"] + layers["bias"]
        return amcl_score(similarity, f, z.shape[2])

    nearest, index = (z @ z.mT).masked_fill(same_sample, -math.inf).max(dim=2)
    chosen = of_candidate.gather(1, index[:, :, None].expand_as(of_candidate))
    positive = score((z * other).sum(dim=2), of_candidate.roll(a.shape[1], dims=1))
    return (score(nearest, chosen) - positive).mean()
