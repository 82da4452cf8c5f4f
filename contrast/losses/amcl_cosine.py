"""AMCL over SimSiam: only positives, each with its own temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.losses.checks import check_not_negative
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss
from contrast.losses.temperatures import Network, PairTemperature, mean_score, mean_temperatures


@LOSSES.register("amcl_cosine", aliases=("amcl_simsiam",))
class AMCLCosine(PairLoss):
    r"""SimSiam's cosine over a learned temperature per pair; the regulariser's exact shape is a *reconstruction*.

    .. math:: \ell_i = -\frac{s_{ip}}{\tau_{ip}} + 2 \beta \, \Omega(\tau_{ip}), \quad
              \Omega(\tau) = \frac{D}{2} \log \tau + \frac{1}{\tau}

    with the targets of the other view as positives p. The mean over both views' anchors is the printed loss of a
    sample, -s / (2 tau) and beta Omega for each direction; the printed sum over H heads is a mean here. The
    temperature is AMCL's, of the prediction and the target.

    Args:
        dim: D, the width of the embeddings, which the network needs.
        network: "mlp", "inner_product" or "constant", as in AMCL.
        hidden: width of the perceptron's hidden layer, or rank of the inner product.
        lowest_temperature: tau_lo > 0, below every temperature.
        highest_temperature: tau_hi, above every temperature.
        temperature: approximate initial temperature.
        regulariser_weight: beta >= 0, multiplies Omega.
        seed: of the network's initial weights, which are equal on every process.

    Raises:
        ValueError: as AMCL, and without targets.

    Example:
        >>> value = AMCLCosine(dim=8)(z_a, z_b, targets=(z_b.detach(), z_a.detach()))

    Source: Wang et al. 2023, Adaptive Multi-head Contrastive Learning, ECCV 2024, arXiv:2310.05615, table 2.
    """

    traced = False

    def __init__(
        self,
        dim: int | None = None,
        network: Network = "mlp",
        hidden: int = 128,
        lowest_temperature: float = 0.05,
        highest_temperature: float = 2.0,
        temperature: float = 0.5,
        regulariser_weight: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_not_negative(regulariser_weight=regulariser_weight)
        self.temperatures = PairTemperature(
            dim, network, hidden, lowest_temperature, highest_temperature, temperature, seed
        )
        self.regulariser_weight = regulariser_weight

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of every view with the targets of the other views."""
        if not targets or all(target is None for target in targets):
            raise ValueError(
                "AMCLCosine needs targets=(z_a, z_b), stop-gradient or momentum projections: "
                "without them all embeddings become equal."
            )
        return super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return minus the attraction of the positives."""
        return -mean_score(pairs, self.temperatures.shared(pairs.anchor_parts[0].z), 2 * self.regulariser_weight)

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute the similarities, and the mean temperature of the positives."""
        return super().measure(pairs) | mean_temperatures(pairs, self.temperatures, ("positive",))
