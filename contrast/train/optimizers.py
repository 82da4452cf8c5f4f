"""Optimisers by name, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from contrast.core.registry import Registry

OPTIMIZERS = Registry("optimizer")
"""Optimisers by name."""


@dataclass(frozen=True)
class Optimizer:
    """The settings of every optimiser: a learning rate that warms up and decreases to 0 along a cosine.

    Args:
        lr: the highest learning rate; it is not scaled by the batch size.
        weight_decay: of the weights; biases and the parameters of normalisation layers have none.
        warmup: the share of the budget in which the learning rate increases from 0, in [0, 1).

    Raises:
        ValueError: for a value out of its range.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0; got {self.lr}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup is a share of the budget, in [0, 1); got {self.warmup}. "
                f"For {self.warmup:g} epochs write {self.warmup:g} / the budget's epochs."
            )

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate after this share of the budget, in [0, 1]."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def build(self, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """Return the torch optimiser of the parameters of `modules` that have a gradient."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        return self.of_groups(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        )

    def of_groups(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Return the torch optimiser of these parameter groups."""
        raise NotImplementedError


@OPTIMIZERS.register("adamw", aliases=("adam",))
@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101).

    Args:
        betas: decay of the running mean and of the running square of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def of_groups(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Return torch's AdamW."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Args:
        momentum: share of the last step in the next one, in [0, 1).
        nesterov: use Nesterov's momentum.
    """

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum, nesterov=self.nesterov)

    def of_groups(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Return torch's SGD."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@OPTIMIZERS.register("lars")
@dataclass(frozen=True)
class LARS(Optimizer):
    """Layer-wise adaptive rates for large batches (You et al. 2017, arXiv:1708.03888), timm's implementation.

    Args:
        momentum: share of the last step in the next one, in [0, 1).
        trust: the step of a layer relative to the size of its weights.
    """

    lr: float = 0.3
    weight_decay: float = 1e-6
    momentum: float = 0.9
    trust: float = field(default=0.001)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_momentum(self.momentum)

    def of_groups(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Return timm's Lars, which does not adapt the rates of biases and normalisation layers."""
        from timm.optim.lars import Lars

        optimizer: torch.optim.Optimizer = Lars(groups, lr=self.lr, momentum=self.momentum, trust_coeff=self.trust)
        return optimizer


def _check_momentum(momentum: float, *, nesterov: bool = False) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is a share of the last step, in [0, 1); got {momentum}.")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum, which is 0; set momentum, or leave nesterov out.")
