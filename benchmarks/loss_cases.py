"""The losses that benchmarks/core.py measures: their arguments, their inputs, and who computes them.

The dense losses are those of tests/losses/reference.py.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "losses"))
import reference
from reference import unit

DIMS, HEADS, QUEUE = 128, 4, 65536
LIBRARIES = {
    "lightly": "lightly.loss",
    "open_clip": "open_clip.loss",
    "pytorch-metric-learning": "pytorch_metric_learning.losses",
}
"""Other libraries, and the module of their losses."""
Step = Callable[[], Sequence[Tensor]]
"""Forward and backward: returns the value, then the gradients."""


@dataclass(frozen=True)
class Case:
    """A loss with its arguments.

    Args:
        make: returns the loss from the module `contrast.losses` of a checkout.
        dense: the same loss as dense code; takes the inputs and the parameters by name.
        matrices: how many float32 matrices of M x M (queue: M x 65,536) the dense code has at its peak, about.
        call: calls the loss with the inputs by name.
        views: how many views are along a side of the matrix.
        learned: the inputs that take a gradient.
        heads: 0 where views are (N, D).
        classes: the number of labels; 0: without labels.
        remembered: True if the negatives are 65,536 remembered candidates.
        parameters: the loss's parameters, by the last part of their names.
        libraries: the same loss of other libraries; takes the module of their losses, the inputs and the parameters.
    """

    make: Callable[[ModuleType], nn.Module]
    dense: Callable[..., Tensor]
    matrices: float
    call: Callable[..., Tensor] = lambda loss, a, b: loss(a, b)
    views: int = 2
    learned: Sequence[str] = ("a", "b")
    heads: int = 0
    classes: int = 0
    remembered: bool = False
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    libraries: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def pairs(self, size: int) -> int:
        """Return the number of entries of the similarity matrix, of all heads."""
        return max(self.heads, 1) * size * (QUEUE if self.remembered else size)

    def inputs(self, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the views, which resemble each other as after some training, with labels or remembered candidates."""
        generator, samples = torch.Generator().manual_seed(0), size // self.views
        shape = (self.heads, samples, DIMS) if self.heads else (samples, DIMS)
        shared = torch.randn(shape, generator=generator)
        found = {name: shared + torch.randn(shape, generator=generator) for name in ("a", "b")}
        if self.remembered:
            found["memory"] = unit(torch.randn(QUEUE, DIMS, generator=generator))
        found = {name: tensor.to(dtype).requires_grad_(name in self.learned) for name, tensor in found.items()}
        return found | ({"labels": torch.arange(samples) % self.classes} if self.classes else {})

    def step(self, contender: str, size: int, dtype: torch.dtype = torch.float32) -> tuple[Step, dict[str, Tensor]]:
        """Return forward and backward, as a function that returns value and gradients, and the inputs.

        Args:
            contender: "dense", one of `libraries`, or anything else for the `contrast` that this process imports.
            size: M.
            dtype: of inputs and parameters.
        """
        given = self.inputs(size, dtype)
        parameters = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in self.parameters.items()}
        forward: Callable[[], Tensor]
        if contender == "dense":
            forward = lambda: self.dense(**given, **parameters)  # noqa: E731
        elif contender in LIBRARIES:
            module = importlib.import_module(LIBRARIES[contender])
            forward = lambda: self.libraries[contender](module, **given, **parameters)  # noqa: E731
        else:
            loss = self.make(importlib.import_module("contrast.losses")).to(dtype)
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


def with_labels(loss: Any, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    """Call a loss of pytorch-metric-learning."""
    value: Tensor = loss(torch.cat([a, b]), labels.repeat(2))
    return value


def network(*names: str) -> dict[str, Tensor]:
    """Return random parameters of AMCL's network for temperatures."""
    shapes = {"anchor_weight": (DIMS, DIMS), "candidate_weight": (DIMS, DIMS), "bias": ()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes.get(name, (DIMS,)), generator=generator) / 16 for name in names}


def supervised(classes: int) -> Case:
    """Return SupCon: positives are the embeddings of the same class."""
    return Case(
        lambda losses: losses.InfoNCE(0.1),
        lambda a, b, labels: reference.supcon(torch.cat([a, b]), labels.repeat(2)),
        3.75,
        lambda loss, a, b, labels: loss(a, b, group=labels),
        classes=classes,
        libraries={
            "pytorch-metric-learning": lambda losses, a, b, labels: with_labels(losses.SupConLoss(0.1), a, b, labels)
        },
    )


LINEAR = ("anchor_weight", "candidate_weight", "bias")
MLP = (*LINEAR, "hidden_bias", "out_weight")
CASES = {
    "info_nce": Case(
        lambda losses: losses.InfoNCE(0.1),
        reference.info_nce,
        3.5,
        libraries={
            "lightly": lambda losses, a, b: losses.NTXentLoss(0.1)(a, b),
            "pytorch-metric-learning": lambda losses, a, b: with_labels(
                losses.NTXentLoss(0.1), a, b, torch.arange(len(a))
            ),
        },
    ),
    "clip": Case(
        lambda losses: losses.InfoNCE(0.07, learn_temperature=True, candidates="across"),
        reference.clip,
        4.4,
        views=1,
        parameters={"log_scale": torch.tensor(1 / 0.07).log()},
        libraries={
            "open_clip": lambda losses, a, b, log_scale: losses.ClipLoss()(unit(a), unit(b), log_scale.exp()),
        },
    ),
    "cacr": Case(lambda losses: losses.CACR(), reference.cacr, 4.4, views=1),
    "cwcl": Case(lambda losses: losses.CWCL(), reference.cwcl, 5.4, views=1, learned=("b",)),
    "siglip": Case(
        lambda losses: losses.SigLIP(),
        reference.siglip,
        5.2,
        views=1,
        parameters={"log_scale": torch.tensor(10.0).log(), "bias": torch.tensor(-10.0)},
        libraries={
            "open_clip": lambda losses, a, b, log_scale, bias: losses.SigLipLoss()(
                unit(a), unit(b), log_scale.exp(), bias
            ),
        },
    ),
    "supcon_10": supervised(10),
    "supcon_100": supervised(100),
    "decoupled": Case(
        lambda losses: losses.DecoupledInfoNCE(0.1),
        reference.decoupled,
        4.5,
        libraries={"lightly": lambda losses, a, b: losses.DCLLoss(0.1)(a, b)},
    ),
    "hard_negative": Case(lambda losses: losses.HardNegative(), reference.hard_negative, 5.5),
    "queue": Case(
        lambda losses: losses.InfoNCE(0.2, candidates="memory"),
        reference.moco,
        3,
        lambda loss, a, b, memory: loss(a, targets=(None, b), extra=[memory]),
        views=1,
        learned=("a",),
        remembered=True,
    ),
    "hard_contrastive": Case(lambda losses: losses.HardContrastive(), reference.hard_contrastive, 2.5),
    "amcl_max": Case(
        lambda losses: losses.AMCL(DIMS, form="max", network="mlp"),
        reference.amcl_max,
        2.5,
        heads=HEADS,
        parameters=network(*MLP),
    ),
    "amcl": Case(
        lambda losses: losses.AMCL(DIMS, form="logsumexp", network="inner_product"),
        reference.amcl_inner_product,
        10.4,
        heads=HEADS,
        parameters=network(*LINEAR),
    ),
    "amcl_mlp": Case(
        lambda losses: losses.AMCL(DIMS, form="logsumexp", network="mlp"),
        reference.amcl_mlp,
        385,
        heads=HEADS,
        parameters=network(*MLP),
    ),
}
