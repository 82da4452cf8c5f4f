"""Multinomial logistic regression: many problems at once, each solved to convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrast.evaluation.threads import threads_for

FINE, LARGE_FINE, ROUGH = 1e-7, 3e-5, 1e-4
"""Gradient tolerances: of a fit, of a large fit, and for comparing strengths (scikit-learn's own default is 1e-4)."""
LARGE = 20_000_000
"""A fit with this many multiplications per pass is large: it runs in float32 first, then in float64."""
STEPS = 1000
HISTORY = 20
FLOOR = 1e-5
"""The smallest uncertainty: near 0, a step in the bias, which has no penalty, would explode."""
ELEMENTS = 30_000_000
"""The most logits, over all items, problems and classes, that are in memory at a time."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Precondition = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """The result of `solve`: weight (B, D, C) and bias (B, C) in float64, converged (B,)."""

    weight: Tensor
    bias: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Design:
    """Items prepared for many solutions.

    Args:
        x: (N, R + 1) float64, the items, R = min(N, D), and a column of ones for the bias.
        basis: (D, R), the directions of x's columns where N < D: the minimum lies in the span of the items, so that
            fewer unknowns give the same answer.
        values, vectors: (R,) and (R, R), eigenvalues and eigenvectors of the items' mean outer product.
    """

    x: Tensor
    basis: Tensor | None
    values: Tensor
    vectors: Tensor


def prepare(x: Tensor) -> Design:
    """Return the design of centred items (N, D); standardised items are solved far faster."""
    x, basis = x.double(), None
    if len(x) < x.shape[1]:
        with threads_for(len(x) ** 2 * x.shape[1] // 10):
            basis, triangle = torch.linalg.qr(x.T)
        x = triangle.T
    # The precision affects only the speed of convergence: float32 and some of the items are enough.
    some = x[torch.linspace(0, len(x) - 1, min(len(x), 20_000)).long()].float()
    with threads_for(x.shape[1] ** 3 // 10):
        values, vectors = torch.linalg.eigh((some.T @ some / len(some)).double())
    return Design(torch.cat([x, torch.ones_like(x[:, :1])], 1), basis, values.clamp(min=0), vectors)


def solve(
    design: Design,
    target: Tensor,
    classes: int,
    strengths: Tensor,
    mask: Tensor | None = None,
    *,
    tolerance: float = FINE,
) -> Solution:
    r"""Minimise B penalised cross-entropies over the same items, by preconditioned L-BFGS.

    .. math:: \min_{W, b} \sum_{i \in \text{mask}} -\log \mathrm{softmax}(x_i W + b)_{y_i} + \frac{\lambda}{2} \|W\|^2

    Each problem has its own strength lambda and its own items; scikit-learn's C is 1 / lambda (but for two classes,
    where it fits one vector instead of two, C is 2 / lambda). Converged means that no entry of the gradient of the
    mean loss exceeds the tolerance, in float64. The same input gives the same numbers: nothing here is random.

    Args:
        design: of the items.
        target: (N,) int64 in [0, C); each class must occur among a problem's items, or its bias has no minimum.
        classes: C.
        strengths: lambda > 0, (B,).
        mask: (B, N) bool, the items of each problem; None for all.
        tolerance: of the gradient; for a large problem at least 3e-5.
    """
    x, strengths = design.x, strengths.double()
    mask = torch.ones(len(strengths), len(x), dtype=torch.bool) if mask is None else mask
    problems = max(1, ELEMENTS // (len(x) * classes))
    with threads_for(x.numel() * min(problems, len(strengths)) * classes):
        parts = [
            _solve_together(design, target, classes, some, some_mask, tolerance)
            for some, some_mask in zip(torch.split(strengths, problems), torch.split(mask, problems), strict=True)
        ]
    theta = torch.cat([part for part, _ in parts], 1).transpose(0, 1)
    weight = theta[:, :-1] if design.basis is None else design.basis @ theta[:, :-1]
    return Solution(weight, theta[:, -1], torch.cat([converged for _, converged in parts]))


def _solve_together(
    design: Design, target: Tensor, classes: int, strengths: Tensor, mask: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return theta (R + 1, B, C), the bias last, and which problems converged."""
    x = design.x
    share = (mask / mask.sum(1, keepdim=True)).T.double()  # (N, B): a mean over each problem's own items
    penalty = strengths / mask.sum(1)
    theta = x.new_zeros(x.shape[1], len(strengths), classes)
    converged = torch.zeros(len(strengths), dtype=torch.bool)
    stages = [(torch.float64, tolerance)]
    if x.numel() * len(strengths) * classes > LARGE:
        tolerance = max(tolerance, LARGE_FINE)
        stages = [(torch.float32, tolerance), (torch.float64, tolerance)]
    for dtype, reach in stages:
        evaluate = _cross_entropy(x.to(dtype), target, share.to(dtype), penalty.to(dtype))
        precondition = _mean_newton(design, penalty, dtype)
        theta, converged = _minimise(evaluate, precondition, theta.to(dtype), reach)
    return theta, converged


def _cross_entropy(x: Tensor, target: Tensor, share: Tensor, penalty: Tensor) -> Evaluate:
    """Return the function theta (R + 1, B', C), problems (B',) -> loss (B',), gradient like theta, uncertainty (B',).

    The uncertainty is the mean of 1 - sum_c p_c^2 over C - 1: 1 / C where all classes are equally likely, near 0 where
    every prediction is certain.
    """
    chosen = target.view(-1, 1, 1)

    def evaluate(theta: Tensor, problems: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, strength = share[:, problems], penalty[problems].view(1, -1, 1)
        index = chosen.expand(-1, len(problems), 1)
        log_probability = (x @ theta.flatten(1)).view(len(x), *theta.shape[1:]).log_softmax(-1)
        cross_entropy = -log_probability.gather(-1, index).squeeze(-1)
        loss = (cross_entropy * weight).sum(0) + (strength * theta[:-1].square()).sum((0, 2)) / 2
        probability = log_probability.exp_()
        uncertainty = ((1 - probability.square().sum(-1)) * weight).sum(0) / max(1, theta.shape[-1] - 1)
        residual = probability.scatter_add_(-1, index, -torch.ones_like(index, dtype=theta.dtype))
        gradient = (x.T @ residual.mul_(weight[..., None]).flatten(1)).view_as(theta)
        gradient[:-1] += strength * theta[:-1]
        return loss, gradient, uncertainty

    return evaluate


def _mean_newton(design: Design, penalty: Tensor, dtype: torch.dtype) -> Precondition:
    """Return the function gradient (R + 1, B', C), problems and uncertainty (B',) -> step: an averaged inverse Hessian.

    At theta = 0 the Hessian is exactly the items' mean outer product / C plus the penalty. Later each item has its own
    factor; the uncertainty is their mean. With it, correlated features do not slow L-BFGS down.
    """
    values, vectors, penalty = (each.to(dtype) for each in (design.values, design.vectors, penalty))

    def precondition(gradient: Tensor, problems: Tensor, uncertainty: Tensor) -> Tensor:
        uncertainty = uncertainty.clamp(min=FLOOR)
        turned = (vectors.T @ gradient[:-1].flatten(1)).view_as(gradient[:-1])
        turned = turned / (values[:, None] * uncertainty + penalty[problems])[..., None]
        weight = (vectors @ turned.flatten(1)).view_as(turned)
        return torch.cat([weight, gradient[-1:] / uncertainty.view(1, -1, 1)])

    return precondition


def _minimise(evaluate: Evaluate, precondition: Precondition, start: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the minima (D, B, C) and which problems reached the tolerance; a finished problem costs nothing more."""
    minimum, converged = start.clone(), torch.zeros(start.shape[1], dtype=torch.bool)
    active = torch.arange(start.shape[1])
    point, history = start, list[tuple[Tensor, Tensor, Tensor]]()
    loss, gradient, uncertainty = evaluate(point, active)
    slack = torch.finfo(start.dtype).eps
    for _ in range(STEPS):
        direction = -_two_loops(gradient, history, lambda g: precondition(g, active, uncertainty))  # noqa: B023 (used at once)
        slope = _dot(gradient, direction)
        size = torch.ones_like(loss)
        for _ in range(30):
            trial = point + size.view(1, -1, 1) * direction
            trial_loss, trial_gradient, trial_uncertainty = evaluate(trial, active)
            # Close to the minimum, differences of the loss are rounding errors: allow them.
            short = trial_loss > loss + 1e-4 * size * slope + slack * loss.abs()
            if not short.any():
                break
            size = torch.where(short, size / 2, size)
        change, bend = trial - point, trial_gradient - gradient
        product = _dot(change, bend)
        history = [*history[1 - HISTORY :], (change, bend, torch.where(product > 0, 1 / product, 0.0))]
        point, loss, gradient, uncertainty = trial, trial_loss, trial_gradient, trial_uncertainty
        reached = gradient.abs().amax((0, 2)) <= tolerance
        done = reached | short  # `short`: no step improves the loss at this precision
        if done.any():
            minimum[:, active[done]] = point[:, done]
            converged[active[reached]] = True
            active, point, loss = active[~done], point[:, ~done], loss[~done]
            gradient, uncertainty = gradient[:, ~done], uncertainty[~done]
            history = [(change[:, ~done], bend[:, ~done], inverse[~done]) for change, bend, inverse in history]
        if len(active) == 0:
            break
    minimum[:, active] = point
    return minimum, converged


def _two_loops(
    gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the inverse Hessian of L-BFGS times the gradient (Nocedal and Wright 2006, algorithm 7.4)."""
    steps = []
    for change, bend, inverse in reversed(history):
        step = inverse * _dot(change, gradient)
        gradient = gradient - step.view(1, -1, 1) * bend
        steps.append(step)
    result = precondition(gradient)
    if history:
        change, bend, inverse = history[-1]
        stretch = _dot(change, bend) / _dot(bend, precondition(bend))
        result = result * torch.where(inverse > 0, stretch, 1.0).view(1, -1, 1)
    for (change, bend, inverse), step in zip(history, reversed(steps), strict=True):
        result = result + (step - inverse * _dot(bend, result)).view(1, -1, 1) * change
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 2))
