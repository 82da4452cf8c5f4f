"""A temperature for each pair, learned by one small network and kept between two bounds: what AMCL shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from contrast.core import distributed, reductions
from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs, product
from contrast.core.reductions import LogSumExp, Mean, Reduction, Relation

LN2 = math.log(2)

PIECE = 2**17
"""Pairs at a time that a perceptron walks: what fits a processor's cache."""

Network = Literal["mlp", "inner_product", "constant"]


class PairTemperature(nn.Module):
    r"""The temperature of every pair, strictly between two bounds: a PairFunction.

    .. math:: \tau_{ij} = \tau_{lo} + (\tau_{hi} - \tau_{lo}) \, \sigma(f(z_i, z_j))

    ============= ===================================================================================================
    mlp           f = w . relu(A z_i + B z_j + b) + c: a perceptron on (z_i, z_j) side by side, its first layer split
    inner_product f = <A z_i, B z_j> / sqrt(hidden) + c: a product of matrices, for large sizes
    constant      f = c, which is not learned
    ============= ===================================================================================================

    Args:
        dim: D, of the embeddings; not needed where the temperature is constant.
        network: f, one of the table.
        hidden: width of the hidden layer, or rank of the product.
        lowest_temperature: no temperature is this low.
        highest_temperature: no temperature is this high.
        temperature: sets c: where temperatures start, about, or stay.
        seed: of the weights that A, B and w start with, so that every process starts alike.

    Raises:
        ValueError: for bounds that are not 0 < lowest < temperature < highest, a size below 1, or a network without
            `dim`.
    """

    def __init__(
        self,
        dim: int | None,
        network: Network,
        hidden: int,
        lowest_temperature: float,
        highest_temperature: float,
        temperature: float,
        seed: int,
    ) -> None:
        super().__init__()
        if network not in ("mlp", "inner_product", "constant"):
            raise ValueError(f"network is 'mlp', 'inner_product' or 'constant'; got {network!r}.")
        if not (0 < lowest_temperature < highest_temperature < math.inf):
            raise ValueError(
                "temperatures lie between 0 < lowest_temperature < highest_temperature; "
                f"got {lowest_temperature} and {highest_temperature}."
            )
        if not lowest_temperature < temperature < highest_temperature:
            raise ValueError(
                f"temperature must lie between its bounds, {lowest_temperature} and {highest_temperature}; "
                f"got {temperature}."
            )
        if network != "constant" and dim is None:
            raise ValueError(f"network={network!r} needs the embeddings' width: dim=128, say.")
        if (dim is not None and dim < 1) or hidden < 1:
            raise ValueError(f"dim and hidden must be 1 or more; got {dim} and {hidden}.")
        self.dim = dim
        self.network = network
        self.lowest = lowest_temperature
        self.highest = highest_temperature
        self.temperature = temperature
        if dim is None or network == "constant":
            return
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs))

        self.anchor_weight = uniform(hidden, dim, inputs=2 * dim)
        self.candidate_weight = uniform(hidden, dim, inputs=2 * dim)
        if network == "mlp":
            self.hidden_bias = uniform(hidden, inputs=2 * dim)
            self.out_weight = uniform(hidden, inputs=hidden)
        share = (temperature - lowest_temperature) / (highest_temperature - lowest_temperature)
        self.bias = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def shared(self, z: Tensor) -> PairTemperature:
        """Give this network for one call on embeddings like z; its gradient is averaged over the processes, once.

        Raises:
            ValueError: where the embeddings do not have `dim` dimensions.
        """
        if self.dim is not None and z.shape[-1] != self.dim:
            raise ValueError(
                f"the temperature's network was made for embeddings of dim={self.dim}; these have {z.shape[-1]}."
            )
        own = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        if not own:
            return self
        called = copy.copy(self)
        called.__dict__["kept"] = {}
        if distributed.world_size() == 1 and all(parameter.dtype == z.dtype for parameter in own.values()):
            # Who calls the network with other parameters (torch.func) may take them away before the backward pass.
            called.__dict__["_parameters"] = own
            return called
        # One vector, one exchange. A PairFunction is asked for parameters(), so the tensors that take the gradient
        # back to the network stand where parameters do.
        flat = distributed.shared(torch.cat([parameter.reshape(-1) for parameter in own.values()]).to(z.dtype))
        pieces = torch.split(flat, [parameter.numel() for parameter in own.values()])
        called.__dict__["_parameters"] = {
            name: piece.view_as(parameter) for (name, parameter), piece in zip(own.items(), pieces, strict=True)
        }
        return called

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give a tile of temperatures, (n, m) or (H, n, m)."""
        if self.network == "constant":
            heads = max(anchor.z.shape[:-2], candidate.z.shape[:-2], key=len)
            return anchor.z.new_full((*heads, len(anchor), len(candidate)), self.temperature)
        a, b = product(anchor.z, self.anchor_weight), product(candidate.z, self.candidate_weight)
        if self.network == "inner_product":
            return self._bounded(product(a, b) / math.sqrt(a.shape[-1]))
        hidden: Tensor = _Perceptron.apply(a + self.hidden_bias, b, self.out_weight)
        return self._bounded(hidden)

    def aligned(self, anchor: Tensor, candidate: Tensor) -> Tensor:
        """Give the temperature of each anchor and the candidate in the same row, (..., N) from (..., N, D) each."""
        if self.network == "constant":
            return torch.full_like(anchor[..., 0], self.temperature)
        a, b = product(anchor, self.anchor_weight), product(candidate, self.candidate_weight)
        if self.network == "inner_product":
            return self._bounded((a * b).sum(dim=-1) / math.sqrt(a.shape[-1]))
        return self._bounded(((a + self.hidden_bias + b).relu() * self.out_weight).sum(dim=-1))

    @property
    def _full(self) -> bool:
        """Whether <A z_i, B z_j> has no lower rank than <z_i, A^T B z_j>, which has one side less to find."""
        return self.network == "inner_product" and self.anchor_weight.shape[0] >= self.anchor_weight.shape[1]

    def _both_weights(self) -> Tensor:
        """Give A^T B / sqrt(hidden); found once a call."""
        kept: dict[str, Tensor] = self.__dict__.get("kept", {})
        if "both" not in kept:
            root = math.sqrt(len(self.anchor_weight))
            kept["both"] = (self.anchor_weight.mT @ self.candidate_weight).div_(root)
        return kept["both"]

    def anchor_side(self, z: Tensor) -> Tensor:
        """Give what f needs of anchors, (..., N, h), without history: A z + b, A z / sqrt(hidden) or B^T A z / ..."""
        if self.network == "mlp":
            return (z @ self.anchor_weight.mT).add_(self.hidden_bias)
        if self._full:
            return z @ self._both_weights()
        return z @ (self.anchor_weight / math.sqrt(len(self.anchor_weight))).mT

    def candidate_side(self, z: Tensor) -> Tensor:
        """Give what f needs of candidates, (..., M, h), without history: B z, or z itself."""
        return z if self._full else z @ self.candidate_weight.mT

    def from_anchor_side(self, to_a: Tensor, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Give dL/dz and the gradients of parameters, from that of the anchors' side."""
        parameters: list[tuple[Tensor, Tensor]]
        if self._full:
            to_both = (z.flatten(0, -2).T @ to_a.flatten(0, -2)).div_(math.sqrt(len(self.anchor_weight)))
            parameters = [
                (self.anchor_weight, self.candidate_weight @ to_both.T),
                (self.candidate_weight, self.anchor_weight @ to_both),
            ]
            return to_a @ self._both_weights().T, parameters
        to_weight = to_a.flatten(0, -2).T @ z.flatten(0, -2)
        if self.network == "mlp":
            parameters = [(self.anchor_weight, to_weight), (self.hidden_bias, to_a.flatten(0, -2).sum(dim=0))]
            return to_a @ self.anchor_weight, parameters
        root = math.sqrt(len(self.anchor_weight))
        return to_a @ (self.anchor_weight / root), [(self.anchor_weight, to_weight.div_(root))]

    def from_candidate_side(self, to_b: Tensor, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Give dL/dz and the gradients of parameters, from that of the candidates' side."""
        if self._full:
            return to_b, []
        to_weight = to_b.flatten(0, -2).T @ z.flatten(0, -2)
        return to_b @ self.candidate_weight, [(self.candidate_weight, to_weight)]

    def shares(self, rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
        """Write sigmoid(f), where tau stands between its bounds, of a tile (H, n, m) into `out`, without history."""
        if self.network == "mlp":
            _perceptron(rows, columns, self.out_weight, out)
        else:
            torch.bmm(rows, columns.mT, out=out)
        margin = self._margin(out)
        return out.add_(self.bias).sigmoid_().clamp_(margin, 1 - margin)

    def tile_gradients(
        self, to_f: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of a tile's sides and of the parameters beyond them, from dL/df."""
        parameters: list[tuple[Tensor, Tensor]] = [(self.bias, to_f.sum())]
        if self.network == "mlp":
            to_rows, to_columns, to_w = _perceptron_gradients(to_f, rows, columns, self.out_weight)
            return to_rows, to_columns, [*parameters, (self.out_weight, to_w)]
        return to_f @ columns, to_f.mT @ rows, parameters

    def shares_at(self, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give sigmoid(f) of pairs in the same row, (n,) from (n, h) each, without history, and the hidden units."""
        hidden = [(a + b).relu_()] if self.network == "mlp" else []
        f = hidden[0] @ self.out_weight if hidden else (a * b).sum(dim=-1)
        margin = self._margin(f)
        return f.add_(self.bias).sigmoid_().clamp_(margin, 1 - margin), hidden

    def gradients_at(
        self, to_f: Tensor, a: Tensor, b: Tensor, hidden: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of the sides and of the parameters beyond them, of pairs in the same row."""
        parameters: list[tuple[Tensor, Tensor]] = [(self.bias, to_f.sum())]
        each = to_f.unsqueeze(-1)
        if hidden:
            to_side = torch.ops.aten.threshold_backward(each * self.out_weight, hidden[0], 0)
            return to_side, to_side, [*parameters, (self.out_weight, to_f.flatten() @ hidden[0].flatten(0, -2))]
        return each * b, each * a, parameters

    def _bounded(self, f: Tensor) -> Tensor:
        width, margin = self.highest - self.lowest, self._margin(f)
        return self.lowest + width * torch.sigmoid(f + self.bias).clamp(margin, 1 - margin)

    def _margin(self, f: Tensor) -> float:
        """Give how far off 0 and 1 a sigmoid is kept."""
        # A sigmoid rounds to 0 and 1; a few digits off, no temperature rounds to a bound.
        return min(4 * torch.finfo(f.dtype).eps * self.highest / (self.highest - self.lowest), 0.25)


class Of(nn.Module):
    """A function of each pair's temperature: a PairFunction.

    Args:
        temperature: of each pair.
        function: of a tile of temperatures.
    """

    def __init__(self, temperature: PairTemperature, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.temperature = temperature
        self.function = function

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give a tile."""
        tile: Tensor = self.function(self.temperature(anchor, candidate))
        return tile

    def row_by_row(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give the value of each anchor and the candidate in the same row, (n,) or (H, n)."""
        values: Tensor = self.function(self.temperature.aligned(anchor.z, candidate.z))
        return values


class Score(nn.Module):
    """s / tau - beta Omega(tau) of each pair, from one evaluation of the network: a PairFunction that is `Closed`.

    Args:
        temperature: of each pair.
        weight: beta.
    """

    def __init__(self, temperature: PairTemperature, weight: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight
        self.slope = weight * (temperature.dim or 0) / 2

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give a tile."""
        tau = self.temperature(anchor, candidate)
        score: Tensor = product(anchor.z, candidate.z) / tau
        return score - self.weight * omega(tau, anchor.z.shape[-1]) if self.weight else score

    def row_by_row(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give the score of each anchor and the candidate in the same row, (n,) or (H, n)."""
        return self.aligned(anchor.z, candidate.z)

    def aligned(self, anchor: Tensor, candidate: Tensor) -> Tensor:
        """Give the same from the vectors, (n, D) or (H, n, D) each, with history."""
        tau = self.temperature.aligned(anchor, candidate)
        score = (anchor * candidate).sum(dim=-1) / tau
        return score - self.weight * omega(tau, anchor.shape[-1]) if self.weight else score

    def reach(self) -> float:
        """Give a bound of the absolute score for unit vectors."""
        if self.temperature.network == "constant":
            return math.inf
        lowest, highest = self.temperature.lowest, self.temperature.highest
        logarithm = max(abs(math.log(lowest)), abs(math.log(highest)))
        return (1.001 + self.weight) / lowest + self.slope * logarithm

    def anchor_side(self, z: Tensor) -> Tensor:
        """Give what the network needs of anchors."""
        return self.temperature.anchor_side(z)

    def candidate_side(self, z: Tensor) -> Tensor:
        """Give what the network needs of candidates."""
        return self.temperature.candidate_side(z)

    def from_anchor_side(self, to_a: Tensor, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of the anchors and of parameters."""
        return self.temperature.from_anchor_side(to_a, z)

    def from_candidate_side(self, to_b: Tensor, z: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of the candidates and of parameters."""
        return self.temperature.from_candidate_side(to_b, z)

    def exponential(self, s: Tensor, rows: Tensor, columns: Tensor, room: list[Tensor], *, graded: bool) -> Tensor:
        """Give the exponential of a tile of (s - beta) / tau - beta D / 2 log tau.

        Kept are 1 / tau, and what dL/ds is multiplied with to give dL/df.
        """
        score, inverse, slope, spare = room
        lowest, width = self.temperature.lowest, self.temperature.highest - self.temperature.lowest
        share = self.temperature.shares(rows, columns, out=slope)
        tau = torch.add(s.new_tensor(lowest), share, alpha=width, out=score)
        torch.reciprocal(tau, out=inverse)
        # In powers of 2, which are had in a third of the time of those of e.
        shifted = torch.add(s.new_tensor(-self.weight / LN2), s, alpha=1 / LN2, out=spare).mul_(inverse)
        if self.weight:
            torch.add(shifted, tau.log2_(), alpha=-self.slope, out=score).exp2_()
        else:
            torch.exp2(shifted, out=score)
        if graded:
            # d score / d tau = -((s - beta) / tau + beta D / 2) / tau, d tau / d f = (hi - lo) p (1 - p)
            torch.add(s.new_tensor(-width * self.slope), shifted, alpha=-width * LN2, out=shifted)
            torch.ops.aten.sigmoid_backward.grad_input(shifted, share, grad_input=slope)
        return score

    def gradients(
        self, to_value: Tensor, rows: Tensor, columns: Tensor, room: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of s, of the sides and of parameters, from that of the score."""
        _, inverse, slope, spare = room
        to_s = to_value.mul_(inverse)
        return to_s, *self.temperature.tile_gradients(torch.mul(slope, to_s, out=spare), rows, columns)

    def at(self, s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the scores of pairs in the same row; kept are the derivatives by s and f."""
        lowest, width = self.temperature.lowest, self.temperature.highest - self.temperature.lowest
        share, hidden = self.temperature.shares_at(a, b)
        tau = share * width + lowest
        inverse = tau.reciprocal()
        shifted = (s - self.weight).mul_(inverse)
        score = torch.sub(shifted, tau.log_(), alpha=self.slope) if self.weight else shifted.clone()
        slope = torch.ops.aten.sigmoid_backward(shifted.add_(self.slope).mul_(inverse).mul_(-width), share)
        return score, [inverse, slope, *hidden]

    def gradients_at(
        self, to_value: Tensor, a: Tensor, b: Tensor, kept: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Give the gradients of s, of the sides and of parameters, of pairs in the same row."""
        inverse, slope, *hidden = kept
        return to_value * inverse, *self.temperature.gradients_at(to_value * slope, a, b, hidden)


def omega(tau: Tensor, dim: int) -> Tensor:
    """Give Omega(tau) = (D / 2) log tau + 1 / tau, the regulariser; it is smallest at tau = 2 / D."""
    return dim / 2 * tau.log() + 1 / tau


def nearest_and_positive(pairs: Pairs, over: Relation, score: Score) -> tuple[Tensor, Tensor]:
    """Give the score of each anchor's nearest candidate, 0 where it has none, and what `attracted` gives."""
    found: tuple[Tensor, ...] | None
    found = None if score.temperature.network == "constant" else reductions.nearest_beside(pairs, score, over)
    if found is not None:
        return found[0], found[1]
    with torch.no_grad():
        nearest = pairs.topk(1, over=over)[1].squeeze(-1)
    single = _single_positives(pairs)
    found = None if single is None else _score_at(pairs, score, nearest, single)
    if found is not None:
        return found[0], found[1]
    (repelled,) = _score_at(pairs, score, nearest) or (
        torch.where(nearest >= 0, score.aligned(pairs.anchor.z, candidate_rows(pairs, nearest)), 0),
    )
    return repelled, attracted(pairs, score.temperature, score.weight)


def every_and_positive(pairs: Pairs, over: Relation, score: Score) -> tuple[Tensor, Tensor]:
    """Give the log-sum-exp of each anchor's scores, 0 where it has no candidate, and what `attracted` gives."""
    found = None if score.temperature.network == "constant" else reductions.beside(pairs, score, over)
    if found is None:
        repelled = pairs.logsumexp(0.0, over, log_weight=score)
        found = repelled, attracted(pairs, score.temperature, score.weight)
    if not torch.compiler.is_compiling() and not pairs.rules and pairs.identity.nobody_lacks(over):
        return found
    return torch.where(pairs.count(over) > 0, found[0], 0), found[1]


def attracted(pairs: Pairs, temperature: PairTemperature, weight: float) -> Tensor:
    """Give the mean over the positives p of s_ip / tau_ip - beta Omega(tau_ip), (N,) or (H, N); 0 without positives."""
    lowest = temperature.lowest
    score, single = Score(temperature, weight), _single_positives(pairs)
    found = None if single is None else _score_at(pairs, score, single)
    if found is not None:
        return found[0]
    count = pairs.count("positive")
    looked = count.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked and bool((count == 1).all()):
        # The mean over one, and the log-sum-exp over one, is that one.
        return pairs.logsumexp(0.0, "positive", log_weight=score)
    asked: list[Reduction] = [
        Mean("positive", weight=Of(temperature, torch.reciprocal)),
        LogSumExp(0.0, "positive", log_weight=Of(temperature, lambda tau: -tau.log())),
    ]
    if weight:
        asked.append(LogSumExp(0.0, "positive", log_weight=Of(temperature, lambda tau: (tau / lowest).log().log())))
    similarity, *sums = pairs.reduce(*asked)
    # A log-sum-exp with scale 0 is the logarithm of a sum of weights. log tau may be negative, log(tau / lowest) not.
    inverse, *logarithm = (_mean_weight(of, count) for of in sums)
    attraction: Tensor = similarity * inverse
    if not weight:
        return attraction
    regulariser = pairs.anchor.z.shape[-1] / 2 * (logarithm[0] + math.log(lowest)) + inverse
    return torch.where(count > 0, attraction - weight * regulariser, 0)


def _single_positives(pairs: Pairs) -> Tensor | None:
    """Give the only positive of each anchor, (N,), where that is seen at once."""
    if pairs.anchor.z.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    positive = pairs.identity.positive
    return positive.columns if positive is not None and positive.one_each(len(pairs)) else None


def _score_at(pairs: Pairs, score: Score, *positions: Tensor) -> tuple[Tensor, ...] | None:
    return None if score.temperature.network == "constant" else reductions.at(pairs, score, positions)


def mean_temperatures(
    pairs: Pairs, temperature: PairTemperature, relations: Sequence[Relation] = ("positive", "negative")
) -> dict[str, Tensor]:
    """Give the mean temperature of each relation's pairs, for `metrics`; 0 where there is no such pair."""
    temperature = temperature.shared(pairs.anchor.z)
    measured = {}
    for over in relations:
        total = pairs.logsumexp(0.0, over, log_weight=Of(temperature, torch.log))
        count = pairs.count(over).expand_as(total)
        some = count > 0
        mean = torch.where(some, _mean_weight(total, count), 0).sum() / some.sum().clamp(min=1)
        measured[f"{over}_temperature"] = mean
    return measured


def _mean_weight(logarithm_of_sum: Tensor, count: Tensor) -> Tensor:
    return (logarithm_of_sum - count.clamp(min=1).to(logarithm_of_sum.dtype).log()).exp()


class _Perceptron(torch.autograd.Function):
    """sum_k w_k relu(a_ik + b_jk) of every pair, one hidden unit k at a time and never all of them.

    a is (..., n, hidden), b is (..., m, hidden), w is (hidden,).
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        heads = (a[..., :1, :1] + b[..., :1, :1]).shape[:-2]
        return _perceptron(a, b, w, a.new_empty((*heads, a.shape[-2], b.shape[-2])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, w = ctx.saved_tensors
        return _perceptron_gradients(gradients[0], a, b, w)


def _perceptron(a: Tensor, b: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Write sum_k w_k relu(a_ik + b_jk) into `out`."""
    # relu(a + b) = max(a, -b) + b, of which the last needs no tile.
    out.copy_((b @ w).unsqueeze(-2))
    of_a, of_b, weights = _units(a), _units(-b), w.tolist() if w.device.type == "cpu" else w.unbind()
    for rows in _pieces(out):
        total = out[..., rows, :]
        one = torch.empty_like(total)
        for x, y, weight in zip(of_a, of_b, weights, strict=True):
            torch.maximum(x[..., rows, None], y[..., None, :], out=one)
            total.add_(one, alpha=weight) if isinstance(weight, float) else total.addcmul_(one, weight)
    return out


def _perceptron_gradients(gradient: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give those of a, b and w: each needs the sums of the gradient over the pairs whose unit k passes."""
    sums = _sums_by_signs if gradient.device.type == "cpu" else _sums_by_unit
    by_row, by_column = sums(gradient, a, b)
    to_a, to_b = by_row.sum_to_size(a.shape), by_column.sum_to_size(b.shape)
    # A relu that passes is a + b, so its sum against the gradient needs no tile of its own.
    to_w = (a * to_a).flatten(0, -2).sum(dim=0) + (b * to_b).flatten(0, -2).sum(dim=0)
    return w * to_a, w * to_b, to_w


def _sums_by_signs(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give the sums as halves of sums of g (1 + sign(a + b)): the derivative of a distance by absolute values."""
    heads = gradient.shape[:-2]
    a, b = a.expand(*heads, *a.shape[-2:]).contiguous(), -b.expand(*heads, *b.shape[-2:]).contiguous()
    turned = gradient.mT.contiguous()
    gradient = gradient.contiguous()
    by_row = torch.ops.aten._cdist_backward(gradient, a, b, 1.0, gradient)
    by_column = torch.ops.aten._cdist_backward(turned, b, a, 1.0, turned)
    rows, columns = gradient.sum(dim=-1).unsqueeze(-1), gradient.sum(dim=-2).unsqueeze(-1)
    return (by_row + rows) / 2, (columns - by_column) / 2


def _sums_by_unit(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give the sums, one hidden unit at a time."""
    of_a, of_b = _units(a), _units(b)
    by_row = gradient.new_zeros((a.shape[-1], *gradient.shape[:-1]))
    by_column = gradient.new_zeros((a.shape[-1], *gradient.shape[:-2], gradient.shape[-1]))
    for rows in _pieces(gradient):
        given = gradient[..., rows, :]
        for k, (x, y) in enumerate(zip(of_a, of_b, strict=True)):
            passed = torch.where(x[..., rows, None] > -y[..., None, :], given, 0)
            by_row[k, ..., rows] = passed.sum(dim=-1)
            by_column[k] += passed.sum(dim=-2)
    return by_row.movedim(0, -1), by_column.movedim(0, -1)


def _units(x: Tensor) -> tuple[Tensor, ...]:
    return x.movedim(-1, 0).contiguous().unbind()


def _pieces(tile: Tensor) -> list[slice]:
    rows = tile.shape[-2]
    step = max(1, PIECE * rows // max(tile.numel(), 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def candidate_rows(pairs: Pairs, positions: Tensor) -> Tensor:
    """Give the vectors of the candidates at `positions`, (N,) or (H, N): (N, D) or (H, N, D); any row for a -1."""
    rows = torch.zeros_like(pairs.anchor.z)
    start = 0
    for part in pairs.candidates:
        if len(part):
            inside = (positions >= start) & (positions < start + len(part))
            index = (positions - start).clamp(0, len(part) - 1)
            if part.z.ndim == 3:
                chosen = part.z.gather(-2, index.unsqueeze(-1).expand(*index.shape, part.z.shape[-1]))
            else:
                chosen = part.z[index]
            rows = torch.where(inside.unsqueeze(-1), chosen, rows)
        start += len(part)
    return rows
