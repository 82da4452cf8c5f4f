"""A temperature per pair from one small network, between two bounds; shared by the forms of AMCL."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from contrast.core import distributed
from contrast.core.autograd import product
from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs
from contrast.core.reductions import LogSumExp, Mean, Reduction, Relation

CACHED_PAIRS = 2**17
"""Pairs per block of a perceptron: as many as fit into a processor's cache."""

Network = Literal["mlp", "inner_product", "constant"]


class PairTemperature(nn.Module):
    r"""The temperature of every pair, strictly between two bounds; a two-sided PairFunction.

    .. math:: \tau_{ij} = \tau_{lo} + (\tau_{hi} - \tau_{lo}) \, \sigma(f(z_i, z_j))

    ============= ===================================================================================================
    mlp           f = w . relu(A z_i + B z_j + b) + c, a perceptron on z_i and z_j concatenated
    inner_product f = <A z_i, B z_j> / sqrt(hidden) + c, a matrix product, for large sizes
    constant      f = c, not learned
    ============= ===================================================================================================

    Args:
        dim: D, of the embeddings; not needed for a constant temperature.
        network: f, see the table.
        hidden: width of the hidden layer, or rank of the product.
        lowest_temperature: every temperature is above it.
        highest_temperature: every temperature is below it.
        temperature: determines the initial c.
        seed: of the initial A, B and w, which are equal on every process.

    Raises:
        ValueError: unless 0 < lowest < temperature < highest; for a size below 1, or a network without `dim`.
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
                "the bounds must be 0 < lowest_temperature < highest_temperature; "
                f"got {lowest_temperature} and {highest_temperature}."
            )
        if not lowest_temperature < temperature < highest_temperature:
            raise ValueError(
                f"temperature must be between its bounds, {lowest_temperature} and {highest_temperature}; "
                f"got {temperature}."
            )
        if network != "constant" and dim is None:
            raise ValueError(f"network={network!r} needs the embeddings' width, for example dim=128.")
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
        """Return this network for one call, in the type of z, with a gradient that is averaged over processes once.

        Raises:
            ValueError: where the embeddings do not have `dim` dimensions.
        """
        if self.dim is not None and z.shape[-1] != self.dim:
            raise ValueError(
                f"the temperature's network is made for embeddings of dim={self.dim}; these have {z.shape[-1]}."
            )
        own = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        if not own:
            return self
        called = copy.copy(self)
        if distributed.world_size() == 1 and all(parameter.dtype == z.dtype for parameter in own.values()):
            # torch.func replaces the module's parameters for a call, and restores them before the backward pass.
            called.__dict__["_parameters"] = own
            return called
        # One vector needs one exchange. The reductions read the parameters() of a PairFunction, so the tensors through
        # which the gradient flows back to the network replace the parameters of the copy.
        flat = distributed.shared(torch.cat([parameter.reshape(-1) for parameter in own.values()]).to(z.dtype))
        parts = torch.split(flat, [parameter.numel() for parameter in own.values()])
        called.__dict__["_parameters"] = {
            name: part.view_as(parameter) for (name, parameter), part in zip(own.items(), parts, strict=True)
        }
        return called

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Return a tile of temperatures, (n, m) or (H, n, m)."""
        heads = max(anchor.z.shape[:-2], candidate.z.shape[:-2], key=len)
        s = anchor.z.new_empty(*heads, len(anchor), len(candidate))
        return self.of_sides(s, self.anchor_side(anchor.z), self.candidate_side(candidate.z))

    def anchor_side(self, z: Tensor) -> Tensor:
        """Return the anchors' side of f, (..., n, hidden): A z + b, or A z / sqrt(hidden)."""
        if self.network == "constant":
            return z[..., :0]
        a = product(z, self.anchor_weight)
        return a + self.hidden_bias if self.network == "mlp" else a / math.sqrt(a.shape[-1])

    def candidate_side(self, z: Tensor) -> Tensor:
        """Return the candidates' side of f, (..., m, hidden): B z."""
        return z[..., :0] if self.network == "constant" else product(z, self.candidate_weight)

    def of_sides(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the temperatures, (..., n, m), of both sides."""
        if self.network == "constant":
            return torch.full_like(s, self.temperature)
        f: Tensor
        if self.network == "inner_product":
            f = product(a, b)
        elif a.shape[-2] == 1:
            # With one anchor, all hidden units together are no larger than the candidates' side.
            f = product((a + b).relu(), self.out_weight.unsqueeze(0)).mT
        else:
            f = _Perceptron.apply(a, b, self.out_weight)
        return self._bounded(f)

    def _bounded(self, f: Tensor) -> Tensor:
        width, margin = self.highest - self.lowest, self._margin(f)
        return self.lowest + width * torch.sigmoid(f + self.bias).clamp(margin, 1 - margin)

    def _margin(self, f: Tensor) -> float:
        """Return the smallest distance of the sigmoid from 0 and 1, so that no temperature rounds to a bound."""
        return min(4 * torch.finfo(f.dtype).eps * self.highest / (self.highest - self.lowest), 0.25)


class FunctionOfTemperature(nn.Module):
    """A function of each pair's temperature; a two-sided PairFunction.

    Args:
        temperature: of each pair.
        function: elementwise, of temperatures.
    """

    def __init__(self, temperature: PairTemperature, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.temperature = temperature
        self.function = function

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Return a tile, (n, m) or (H, n, m)."""
        return self.function(self.temperature(anchor, candidate))

    def anchor_side(self, z: Tensor) -> Tensor:
        """Return that of the temperature."""
        return self.temperature.anchor_side(z)

    def candidate_side(self, z: Tensor) -> Tensor:
        """Return that of the temperature."""
        return self.temperature.candidate_side(z)

    def of_sides(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the values, (..., n, m)."""
        return self.function(self.temperature.of_sides(s, a, b))


class Score(nn.Module):
    """s / tau - beta Omega(tau) of each pair, from one evaluation of the network; a two-sided PairFunction.

    Args:
        temperature: of each pair.
        weight: beta.
        dim: D, of the embeddings.
    """

    def __init__(self, temperature: PairTemperature, weight: float, dim: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight
        self.dim = dim

    def forward(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Return a tile, (n, m) or (H, n, m)."""
        s = product(anchor.z, candidate.z)
        return self.of_sides(s, self.anchor_side(anchor.z), self.candidate_side(candidate.z))

    def anchor_side(self, z: Tensor) -> Tensor:
        """Return that of the temperature."""
        return self.temperature.anchor_side(z)

    def candidate_side(self, z: Tensor) -> Tensor:
        """Return that of the temperature."""
        return self.temperature.candidate_side(z)

    def of_sides(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the scores, (..., n, m)."""
        tau = self.temperature.of_sides(s, a, b)
        return s / tau - self.weight * omega(tau, self.dim) if self.weight else s / tau

    def row_by_row(self, anchor: Tensor, candidate: Tensor) -> Tensor:
        """Return the score of each anchor with the candidate in the same row, (..., N) from (..., N, D) each."""
        # Each row is a tile of its own, (..., N, 1, 1).
        s, a, b = (anchor * candidate).sum(dim=-1), self.anchor_side(anchor), self.candidate_side(candidate)
        return self.of_sides(s[..., None, None], a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0]


def omega(tau: Tensor, dim: int) -> Tensor:
    """Return Omega(tau) = (D / 2) log tau + 1 / tau, the regulariser; it is smallest at tau = 2 / D."""
    return dim / 2 * tau.log() + 1 / tau


def nearest_score(pairs: Pairs, over: Relation, score: Score) -> Tensor:
    """Compute the score of each anchor's most similar candidate, (N,) or (H, N); 0 without any."""
    with torch.no_grad():
        nearest = pairs.topk(1, over=over)[1].squeeze(-1)
    return torch.where(nearest >= 0, score.row_by_row(pairs.anchor.z, candidate_rows(pairs, nearest)), 0)


def log_sum_of_scores(pairs: Pairs, over: Relation, score: Score) -> Tensor:
    """Compute the log-sum-exp of each anchor's scores, (N,) or (H, N); 0 without candidates."""
    return torch.where(pairs.count(over) > 0, pairs.logsumexp(0.0, over, log_weight=score), 0)


def mean_score(pairs: Pairs, temperature: PairTemperature, weight: float) -> Tensor:
    """Compute the mean over the positives p of s_ip / tau_ip - weight Omega(tau_ip), (N,) or (H, N); 0 without any.

    A log-sum-exp with scale 0 is the logarithm of a sum of weights, and
    sum_p s_p / tau_p = (mean of s weighted by 1 / tau) * sum_p 1 / tau_p. As a weight, log tau, which may be negative,
    is log(tau / lowest) + log(lowest).
    """
    lowest, count = temperature.lowest, pairs.count("positive")
    reductions: list[Reduction] = [
        Mean("positive", weight=FunctionOfTemperature(temperature, torch.reciprocal)),
        LogSumExp(0.0, "positive", log_weight=FunctionOfTemperature(temperature, lambda tau: -tau.log())),
    ]
    if weight:
        excess = FunctionOfTemperature(temperature, lambda tau: (tau / lowest).log().log())
        reductions.append(LogSumExp(0.0, "positive", log_weight=excess))
    similarity, *sums = pairs.reduce(*reductions)
    inverse, *logarithm = (_mean_weight(log_sum, count) for log_sum in sums)
    attraction: Tensor = similarity * inverse
    if not weight:
        return attraction
    dim = pairs.anchor_parts[0].z.shape[-1]
    regulariser = dim / 2 * (logarithm[0] + math.log(lowest)) + inverse
    return torch.where(count > 0, attraction - weight * regulariser, 0)


def mean_temperatures(
    pairs: Pairs, temperature: PairTemperature, relations: Sequence[Relation] = ("positive", "negative")
) -> dict[str, Tensor]:
    """Return the mean temperature of each relation's pairs, for `metrics`; 0 without such pairs."""
    temperature = temperature.shared(pairs.anchor_parts[0].z)
    measured = {}
    for over in relations:
        total = pairs.logsumexp(0.0, over, log_weight=FunctionOfTemperature(temperature, torch.log))
        count = pairs.count(over).expand_as(total)
        nonempty = count > 0
        mean = torch.where(nonempty, _mean_weight(total, count), 0).sum() / nonempty.sum().clamp(min=1)
        measured[f"{over}_temperature"] = mean
    return measured


def _mean_weight(log_sum: Tensor, count: Tensor) -> Tensor:
    return (log_sum - count.clamp(min=1).to(log_sum.dtype).log()).exp()


class _Perceptron(torch.autograd.Function):
    """sum_k w_k relu(a_ik + b_jk) of every pair, computed for one hidden unit k at a time.

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
    # relu(a + b) = max(a, -b) + b, and the sum of the last term needs no tile.
    out.copy_((b @ w).unsqueeze(-2))
    a_units, b_units = _hidden_units(a), _hidden_units(-b)
    weights = w.tolist() if w.device.type == "cpu" else w.unbind()
    for rows in _row_blocks(out):
        total = out[..., rows, :]
        unit = torch.empty_like(total)
        for x, y, weight in zip(a_units, b_units, weights, strict=True):
            torch.maximum(x[..., rows, None], y[..., None, :], out=unit)
            total.add_(unit, alpha=weight) if isinstance(weight, float) else total.addcmul_(unit, weight)
    return out


def _perceptron_gradients(gradient: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and w: each needs the sums of `gradient` over the pairs with an active unit k."""
    sums = _sums_by_signs if gradient.device.type == "cpu" else _sums_by_unit
    by_row, by_column = sums(gradient, a, b)
    to_a, to_b = by_row.sum_to_size(a.shape), by_column.sum_to_size(b.shape)
    # An active relu is a + b, so the gradient of w needs no further tile.
    to_w = (a * to_a).flatten(0, -2).sum(dim=0) + (b * to_b).flatten(0, -2).sum(dim=0)
    return w * to_a, w * to_b, to_w


def _sums_by_signs(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums as halves of sums of g (1 + sign(a + b)), which the derivative of an L1 distance computes."""
    heads = gradient.shape[:-2]
    a, b = a.expand(*heads, *a.shape[-2:]).contiguous(), -b.expand(*heads, *b.shape[-2:]).contiguous()
    transposed = gradient.mT.contiguous()
    gradient = gradient.contiguous()
    by_row = torch.ops.aten._cdist_backward(gradient, a, b, 1.0, gradient)
    by_column = torch.ops.aten._cdist_backward(transposed, b, a, 1.0, transposed)
    rows, columns = gradient.sum(dim=-1).unsqueeze(-1), gradient.sum(dim=-2).unsqueeze(-1)
    return (by_row + rows) / 2, (columns - by_column) / 2


def _sums_by_unit(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums, one hidden unit at a time."""
    a_units, b_units = _hidden_units(a), _hidden_units(b)
    by_row = gradient.new_zeros((a.shape[-1], *gradient.shape[:-1]))
    by_column = gradient.new_zeros((a.shape[-1], *gradient.shape[:-2], gradient.shape[-1]))
    for rows in _row_blocks(gradient):
        block = gradient[..., rows, :]
        for k, (x, y) in enumerate(zip(a_units, b_units, strict=True)):
            active = torch.where(x[..., rows, None] > -y[..., None, :], block, 0)
            by_row[k, ..., rows] = active.sum(dim=-1)
            by_column[k] += active.sum(dim=-2)
    return by_row.movedim(0, -1), by_column.movedim(0, -1)


def _hidden_units(x: Tensor) -> tuple[Tensor, ...]:
    return x.movedim(-1, 0).contiguous().unbind()


def _row_blocks(tile: Tensor) -> list[slice]:
    rows = tile.shape[-2]
    step = max(1, CACHED_PAIRS * rows // max(tile.numel(), 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def candidate_rows(pairs: Pairs, positions: Tensor) -> Tensor:
    """Return the vectors of the candidates at `positions`, (N,) or (H, N): (N, D) or (H, N, D); for -1, any row."""
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
