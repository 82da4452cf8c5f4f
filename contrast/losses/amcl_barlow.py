"""AMCL over Barlow Twins: a temperature per entry of the correlation matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.autograd import full_precision, product
from contrast.core.embeddings import Embeddings
from contrast.losses.checks import check_not_negative
from contrast.losses.inputs import Extra, as_list
from contrast.losses.loss import LOSSES, Loss
from contrast.losses.temperatures import Network, PairTemperature, omega


@LOSSES.register("amcl_barlow", aliases=("amcl_barlow_twins",))
class AMCLBarlow(Loss):
    r"""Barlow Twins with a temperature per entry of C, a *reconstruction*: the network's inputs are our choice.

    .. math:: L = \sum_l \Big(1 - \frac{C_{ll}}{\tau_{ll}}\Big)^2 + \lambda \sum_{l \neq m} \frac{C_{lm}^2}{\tau_{lm}}
              + \beta \sum_l \Omega(\tau_{ll}) - \beta \sum_{l \neq m} \Omega(\tau_{lm}), \quad
              \Omega(\tau) = \frac{D}{2} \log \tau + \frac{1}{\tau}

    with C the (D, D) correlation of the two views over the batch of all processes. AMCL's network reads row l and
    column m of C for the temperature of C_lm: the paper's table does not specify its inputs. Omega's shape is a
    reconstruction too. The printed sum over H heads is a mean here. A dimension that is constant over the batch has
    correlation 0 with every dimension.

    There are no anchors, hence no rows, labels, targets or extra candidates.

    Args:
        dim: D, the width of the embeddings, which the network needs.
        off_diagonal_weight: lambda >= 0, multiplies the off-diagonal entries.
        network: "mlp", "inner_product" or "constant", as in AMCL.
        hidden: width of the perceptron's hidden layer, or rank of the inner product.
        lowest_temperature: tau_lo > 0, below every temperature.
        highest_temperature: tau_hi, above every temperature.
        temperature: approximate initial temperature; 1 is plain Barlow Twins.
        regulariser_weight: beta >= 0, multiplies Omega.
        seed: of the network's initial weights, which are equal on every process.

    Raises:
        ValueError: as AMCL; and for more or fewer than two views, targets or extra candidates.

    Example:
        >>> value = AMCLBarlow(dim=8)(z_a, z_b)

    Source: Wang et al. 2023, Adaptive Multi-head Contrastive Learning, ECCV 2024, arXiv:2310.05615, table 2; Zbontar et
    al. 2021, Barlow Twins, arXiv:2103.03230.
    """

    def __init__(
        self,
        dim: int | None = None,
        off_diagonal_weight: float = 5e-3,
        network: Network = "mlp",
        hidden: int = 128,
        lowest_temperature: float = 0.05,
        highest_temperature: float = 2.0,
        temperature: float = 1.0,
        regulariser_weight: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_not_negative(off_diagonal_weight=off_diagonal_weight, regulariser_weight=regulariser_weight)
        self.temperatures = PairTemperature(
            dim, network, hidden, lowest_temperature, highest_temperature, temperature, seed
        )
        self.off_diagonal_weight = off_diagonal_weight
        self.regulariser_weight = regulariser_weight
        self._last: dict[str, Tensor] = {}

    def forward(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,  # noqa: ARG002
        group: Tensor | None = None,  # noqa: ARG002
        reference: Tensor | Sequence[Tensor] | None = None,
        extra: Extra | Sequence[Extra] | None = (),
        **unknown: Any,
    ) -> Tensor:
        """Return the loss of two views, (N, D) or (H, N, D) each, over the samples of all processes: ().

        Raises:
            TypeError: for unknown arguments.
            ValueError: for other inputs, and (on the CPU) for values that are not finite.
        """
        if unknown:
            raise TypeError(f"AMCLBarlow uses no labels and has no argument {next(iter(unknown))}=.")
        if len(views) != 2 or any(view.ndim not in (2, 3) or view.shape != views[0].shape for view in views):
            raise ValueError(
                "AMCLBarlow takes two views of one shape, (N, D) or (H, N, D); "
                f"got {', '.join(str(tuple(view.shape)) for view in views) or 'none'}."
            )
        if as_list(extra) or reference is not None or any(target is not None for target in targets or ()):
            raise ValueError("AMCLBarlow correlates two views; it takes no targets, reference or extra candidates.")
        for number, view in enumerate(views):
            if view.device.type == "cpu" and not torch.isfinite(view).all():
                raise ValueError(
                    f"AMCLBarlow: view {number} contains values that are not finite (NaN or inf); look at the encoder."
                )
        with full_precision(views[0]):
            count = distributed.total(views[0].new_tensor(float(views[0].shape[-2]), dtype=torch.float32))
            a, b = (_standardise(view.to(torch.promote_types(view.dtype, torch.float32)), count) for view in views)
            correlation = distributed.total(product(a.mT, b.mT)) / count.clamp(min=1)
            return torch.where(count > 0, self._loss_of(correlation), 0)

    def _loss_of(self, correlation: Tensor) -> Tensor:
        dim = correlation.shape[-1]
        tau = self.temperatures.shared(correlation)(_row_embeddings(correlation), _row_embeddings(correlation.mT))
        diagonal = torch.eye(dim, dtype=torch.bool, device=tau.device)
        on = (1 - correlation / tau).square() + self.regulariser_weight * omega(tau, dim)
        off = self.off_diagonal_weight * correlation.square() / tau - self.regulariser_weight * omega(tau, dim)
        self._last = {
            "diagonal_correlation": _mean_where(diagonal, correlation),
            "off_diagonal_correlation": _mean_where(~diagonal, correlation.square()).sqrt(),
            "diagonal_temperature": _mean_where(diagonal, tau),
            "off_diagonal_temperature": _mean_where(~diagonal, tau),
        }
        return torch.where(diagonal, on, off).sum(dim=(-2, -1)).mean()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached measurements of the last call, over all processes; {} before the first."""
        return dict(self._last)


def _standardise(z: Tensor, count: Tensor) -> Tensor:
    """Return z with mean 0 and (biased) variance 1 per dimension over the batch of all processes."""
    size = count.clamp(min=1).to(z.dtype)
    mean = distributed.total(z.sum(dim=-2, keepdim=True)) / size
    centred = z - mean
    variance = distributed.total(centred.square().sum(dim=-2, keepdim=True)) / size
    # A constant minus its mean is only rounding error.
    constant = variance <= (8 * torch.finfo(z.dtype).eps * mean).square()
    return torch.where(constant, 0, centred / torch.where(constant, 1, variance).sqrt())


def _row_embeddings(matrix: Tensor) -> Embeddings:
    """Return the rows as embeddings, whose identities the network does not read."""
    identity = torch.zeros(matrix.shape[-2], dtype=torch.int64, device=matrix.device)
    return Embeddings(matrix, identity, identity, identity)


@torch.no_grad()
def _mean_where(where: Tensor, values: Tensor) -> Tensor:
    heads = math.prod(values.shape[:-2])
    return torch.where(where, values.detach(), 0).sum() / (where.sum() * heads).clamp(min=1)
