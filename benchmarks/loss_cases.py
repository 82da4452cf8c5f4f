"""The losses that benchmarks/core.py measures: their arguments, their inputs, and each as dense code.

Dense code is the loss with the whole similarity matrix and autograd, as one writes it in PyTorch. Views are (N, D), or
(H, N, D) with H heads; parameters have the names of the losses' own parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMS, HEADS, QUEUE = 128, 4, 65536
Step = Callable[[], Sequence[Tensor]]
"""Forward and backward: returns the value, then the gradients."""


@dataclass(frozen=True)
class Case:
    """A loss with its arguments.

    Args:
        make: returns the loss from the module `contrast.losses` of a checkout.
        dense: the same loss as dense code; takes the inputs and the parameters by name.
        matrices: how many float32 matrices of M x M (queue: M x 65,536) the dense code holds at its peak, about.
        call: calls the loss with the inputs by name.
        views: how many views stand along a side of the matrix.
        learned: the inputs that take a gradient.
        heads: 0 where views are (N, D).
        classes: the number of labels; 0: without labels.
        parameters: the loss's parameters, by the last part of their names.
    """

    make: Callable[[ModuleType], nn.Module]
    dense: Callable[..., Tensor]
    matrices: float
    call: Callable[..., Tensor] = lambda loss, a, b: loss(a, b)
    views: int = 2
    learned: Sequence[str] = ("a", "b")
    heads: int = 0
    classes: int = 0
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def pairs(self, size: int) -> int:
        """Return the number of entries of the similarity matrix, of all heads."""
        return max(self.heads, 1) * size * (QUEUE if self.dense is queue else size)

    def inputs(self, size: int) -> dict[str, Tensor]:
        """Return the views, which resemble each other as after some training, with labels or remembered candidates."""
        generator, samples = torch.Generator().manual_seed(0), size // self.views
        shape = (self.heads, samples, DIMS) if self.heads else (samples, DIMS)
        shared = torch.randn(shape, generator=generator)
        made = {name: shared + torch.randn(shape, generator=generator) for name in ("a", "b")}
        if self.classes:
            made["labels"] = torch.arange(samples) % self.classes
        if self.dense is queue:
            made["memory"] = unit(torch.randn(QUEUE, DIMS, generator=generator))
        return {name: tensor.requires_grad_(name in self.learned) for name, tensor in made.items()}

    def step(self, losses: ModuleType | None, size: int) -> tuple[Step, dict[str, Tensor]]:
        """Return forward and backward, as a function that returns value and gradients, and the inputs; None: dense."""
        given = self.inputs(size)
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in self.parameters.items()}
        if losses is None:
            forward = lambda: self.dense(**given, **parameters)  # noqa: E731
        else:
            loss = self.make(losses)
            named = {name.rsplit(".", 1)[-1]: parameter for name, parameter in loss.named_parameters()}
            for name, parameter in named.items():
                parameter.data.copy_(parameters[name])
            parameters = named
            forward = lambda: self.call(loss, **given)  # noqa: E731
        leaves = [*(given[name] for name in self.learned), *(parameters[name] for name in sorted(parameters))]

        def run() -> Sequence[Tensor]:
            value = forward()
            return value.detach(), *torch.autograd.grad(value, leaves)

        return run, given


# ----------------------------------------------------------------------------------------------------------- dense code


def unit(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1)


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


def queue(a: Tensor, b: Tensor, memory: Tensor, temperature: float = 0.2) -> Tensor:
    anchor, key = unit(a), unit(b)
    logits = torch.cat([(anchor * key).sum(dim=1, keepdim=True), anchor @ memory.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64))


def supcon(a: Tensor, b: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    z, _, _ = both_views(a, b)
    itself, group = torch.eye(len(z), dtype=torch.bool), labels.repeat(2)
    positive = (group[:, None] == group) & ~itself
    log_share = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(dim=1)
    return -(torch.where(positive, log_share, 0).sum(dim=1) / positive.sum(dim=1)).mean()


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
    nearest = logits.topk(max(1, round(hardest * (len(z) - 2))), dim=1, sorted=False).values
    positive = (z * other).sum(dim=1, keepdim=True) / temperature
    return (torch.cat([positive, nearest], dim=1).logsumexp(dim=1) - positive.squeeze(1)).mean()


def cacr(a: Tensor, b: Tensor) -> Tensor:
    distance = 2 - 2 * unit(a) @ unit(b).T
    weight = (-distance).masked_fill(torch.eye(len(a), dtype=torch.bool), -math.inf).softmax(dim=1)
    return distance.diagonal().mean() - (weight * distance).sum(dim=1).mean()


def cwcl(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    frozen, z = unit(a), unit(b)
    logits, weight = frozen @ z.T / temperature, (frozen @ frozen.T + 1) / 2
    weighted = -((weight * logits.log_softmax(dim=1)).sum(dim=1) / weight.sum(dim=1)).mean()
    return weighted + F.cross_entropy(logits.T, torch.arange(len(a)))


def siglip(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    logits = log_scale.exp() * unit(a) @ unit(b).T + bias
    return -F.logsigmoid((2 * torch.eye(len(a)) - 1) * logits).sum() / len(a)


def amcl_score(similarity: Tensor, f: Tensor, dims: int) -> Tensor:
    tau = 0.05 + (2 - 0.05) * f.sigmoid()
    return similarity / tau - 0.1 * (dims / 2 * tau.log() + 1 / tau)


def amcl_all(z: Tensor, same_sample: Tensor, f: Tensor) -> Tensor:
    """Return AMCL with a log-sum-exp over all negatives, from the network's outputs (H, M, M)."""
    score = amcl_score(z @ z.mT, f, z.shape[-1])
    positive = score.roll(score.shape[2] // 2, dims=2).diagonal(dim1=1, dim2=2)
    return (score.masked_fill(same_sample, -math.inf).logsumexp(dim=2) - positive).mean()


def amcl(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, bias: Tensor) -> Tensor:
    z, _, same_sample = both_views(a, b)
    f = (z @ anchor_weight.T) @ (z @ candidate_weight.T).mT / math.sqrt(len(anchor_weight)) + bias
    return amcl_all(z, same_sample, f)


def amcl_mlp(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, **layers: Tensor) -> Tensor:
    z, _, same_sample = both_views(a, b)
    hidden = (z @ anchor_weight.T + layers["hidden_bias"])[:, :, None] + (z @ candidate_weight.T)[:, None]
    return amcl_all(z, same_sample, hidden.relu() @ layers["out_weight"] + layers["bias"])


def amcl_max(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, **layers: Tensor) -> Tensor:
    z, other, same_sample = both_views(a, b)
    of_anchor, of_candidate = z @ anchor_weight.T + layers["hidden_bias"], z @ candidate_weight.T

    def score(similarity: Tensor, of_candidate: Tensor) -> Tensor:
        f = (of_anchor + of_candidate).relu() @ layers["out_weight"] + layers["bias"]
        return amcl_score(similarity, f, z.shape[2])

    nearest, index = (z @ z.mT).masked_fill(same_sample, -math.inf).max(dim=2)
    chosen = of_candidate.gather(1, index[:, :, None].expand_as(of_candidate))
    positive = score((z * other).sum(dim=2), of_candidate.roll(a.shape[1], dims=1))
    return (score(nearest, chosen) - positive).mean()


# ------------------------------------------------------------------------------------------------------------ the cases


def network(*names: str) -> dict[str, Tensor]:
    """Return random parameters of AMCL's network for temperatures."""
    shapes = {"anchor_weight": (DIMS, DIMS), "candidate_weight": (DIMS, DIMS), "bias": ()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes.get(name, (DIMS,)), generator=generator) / 16 for name in names}


def supervised(classes: int) -> Case:
    """Return SupCon: positives are the embeddings of the same class."""
    call = lambda loss, a, b, labels: loss(a, b, group=labels)  # noqa: E731
    return Case(lambda losses: losses.InfoNCE(0.1), supcon, 3.75, call, classes=classes)


LINEAR = ("anchor_weight", "candidate_weight", "bias")
MLP = (*LINEAR, "hidden_bias", "out_weight")
CASES = {
    "info_nce": Case(lambda losses: losses.InfoNCE(0.1), info_nce, 3.5),
    "clip": Case(
        lambda losses: losses.InfoNCE(0.07, learn_temperature=True, candidates="across"),
        clip,
        4.4,
        views=1,
        parameters={"log_scale": torch.tensor(1 / 0.07).log()},
    ),
    "cacr": Case(lambda losses: losses.CACR(), cacr, 4.4, views=1),
    "cwcl": Case(lambda losses: losses.CWCL(), cwcl, 5.4, views=1, learned=("b",)),
    "siglip": Case(
        lambda losses: losses.SigLIP(),
        siglip,
        5.2,
        views=1,
        parameters={"log_scale": torch.tensor(10.0).log(), "bias": torch.tensor(-10.0)},
    ),
    "supcon_10": supervised(10),
    "supcon_100": supervised(100),
    "decoupled": Case(lambda losses: losses.DecoupledInfoNCE(0.1), decoupled, 4.5),
    "hard_negative": Case(lambda losses: losses.HardNegative(), hard_negative, 5.5),
    "queue": Case(
        lambda losses: losses.InfoNCE(0.2, candidates="memory"),
        queue,
        3,
        lambda loss, a, b, memory: loss(a, targets=(None, b), extra=[memory]),
        views=1,
        learned=("a",),
    ),
    "hard_contrastive": Case(lambda losses: losses.HardContrastive(), hard_contrastive, 2.5),
    "amcl_max": Case(
        lambda losses: losses.AMCL(DIMS, form="max", network="mlp"),
        amcl_max,
        2.5,
        heads=HEADS,
        parameters=network(*MLP),
    ),
    "amcl": Case(
        lambda losses: losses.AMCL(DIMS, form="logsumexp", network="inner_product"),
        amcl,
        10.4,
        heads=HEADS,
        parameters=network(*LINEAR),
    ),
    "amcl_mlp": Case(
        lambda losses: losses.AMCL(DIMS, form="logsumexp", network="mlp"),
        amcl_mlp,
        385,
        heads=HEADS,
        parameters=network(*MLP),
    ),
}
