"""AMCL: several heads, and a temperature per pair and head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.losses.checks import check_not_negative
from contrast.losses.pair_loss import LOSSES, PairLoss
from contrast.losses.temperatures import (
    Network,
    PairTemperature,
    Score,
    log_sum_of_scores,
    mean_score,
    mean_temperatures,
    nearest_score,
)


@LOSSES.register("amcl", aliases=("adaptive_multi_head", "adaptive_multi_head_contrastive"))
class AMCL(PairLoss):
    r"""A learned temperature per pair and head; the regulariser Omega's exact shape is a *reconstruction*.

    .. math::
        \ell_i &= -\frac{s_{ip}}{\tau_{ip}} + \beta \, \Omega(\tau_{ip})
                  + \frac{s_{in^*}}{\tau_{in^*}} - \beta \, \Omega(\tau_{in^*}), \quad n^* = \arg\max_n s_{in}
            && \text{"max", as printed} \\
        \ell_i &= -\frac{s_{ip}}{\tau_{ip}} + \beta \, \Omega(\tau_{ip})
                  + \log \sum_n \exp\Big(\frac{s_{in}}{\tau_{in}} - \beta \, \Omega(\tau_{in})\Big)
            && \text{"logsumexp"}

        \tau_{ij} = \tau_{lo} + (\tau_{hi} - \tau_{lo}) \, \sigma(f(z_i, z_j)), \quad
        \Omega(\tau) = \frac{D}{2} \log \tau + \frac{1}{\tau}

    with the positive p, the negatives n, the cosine similarity s and one network f for all heads. Several
    positives are averaged. The form "logsumexp" is a reconstruction too: a smooth maximum in place of the printed one,
    with the same terms. Omega follows the authors' component code; it is smallest at 2 / D, so it pulls the
    positives' temperatures there and pushes the negatives' away, limited by the bounds. The printed sum
    over H heads is a mean here: H times this is the printed loss.

    SimCLR is `AMCL(dim=128)(z_a, z_b)` with views (H, N, 128); MoCo is the same with `targets` and `extra`.

    Args:
        dim: D, the width of the embeddings, which the network needs.
        form: "max": only the most similar negative; "logsumexp": all negatives.
        network: f, "mlp": a perceptron on z_i and z_j concatenated; "inner_product": <A z_i, B z_j>, for large sizes;
            "constant": every temperature is `temperature`.
        hidden: width of the perceptron's hidden layer, or rank of the inner product.
        lowest_temperature: tau_lo > 0; 1e-5 in the authors' component code, where s / tau leaves float32's digits.
        highest_temperature: tau_hi.
        temperature: approximate initial temperature.
        regulariser_weight: beta >= 0, multiplies Omega.
        positive_in_denominator: positives are among the negatives too, as in the paper's LGP and CAN.
        seed: of the network's initial weights, which are equal on every process.

    Raises:
        ValueError: for temperatures that are not 0 < lowest < temperature < highest, a negative weight, or a network
            without `dim` or with another one than the embeddings'.

    Example:
        >>> z_a, z_b = torch.randn(2, 3, 64, 128)
        >>> value = AMCL(dim=128)(z_a, z_b)

    Source: Wang et al. 2023, Adaptive Multi-head Contrastive Learning, ECCV 2024, arXiv:2310.05615, table 2; the
    authors' repository LeiWangR/cl at 3318352.
    """

    traced = False

    needs_negative = True

    def __init__(
        self,
        dim: int | None = None,
        form: Literal["max", "logsumexp"] = "max",
        network: Network = "mlp",
        hidden: int = 128,
        lowest_temperature: float = 0.05,
        highest_temperature: float = 2.0,
        temperature: float = 0.5,
        regulariser_weight: float = 0.1,
        positive_in_denominator: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if form not in ("max", "logsumexp"):
            raise ValueError(f"form is 'max' or 'logsumexp'; got {form!r}.")
        check_not_negative(regulariser_weight=regulariser_weight)
        self.temperatures = PairTemperature(
            dim, network, hidden, lowest_temperature, highest_temperature, temperature, seed
        )
        self.form = form
        self.regulariser_weight = regulariser_weight
        self.over: Literal["all", "negative"] = "all" if positive_in_denominator else "negative"

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the repulsion of the negatives minus the attraction of the positives."""
        z = pairs.anchor_parts[0].z
        temperatures = self.temperatures.shared(z)
        score = Score(temperatures, self.regulariser_weight, z.shape[-1])
        repulsion = nearest_score if self.form == "max" else log_sum_of_scores
        return repulsion(pairs, self.over, score) - mean_score(pairs, temperatures, self.regulariser_weight)

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute the similarities, and the mean temperature of positives and of negatives."""
        measured = super().measure(pairs)
        return measured | mean_temperatures(pairs, self.temperatures)
