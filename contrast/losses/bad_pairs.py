"""Dynamic bad pair mining: down-weight samples whose loss was always too small or too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.pairs import Pairs
from contrast.losses.loss import Row
from contrast.losses.pair_loss import LOSSES, Extra, PairLoss
from contrast.losses.wrapper import LossWrapper

UNIT = 2.0**24
"""Losses are stored as whole numbers of 1 / UNIT: their sums do not depend on the order, so every process stores the
same, and casting the module to half precision does not change them."""
LARGEST = 2.0**20
"""Losses are clamped to [-LARGEST, LARGEST] where they are stored."""
MAX_REPORTED = 6
"""At most this many noisy and this many faulty samples are reported as findings."""

NORMAL, NOISY, FAULTY = 0, 1, 2


@LOSSES.register("bad_pairs", aliases=("dbpm", "dynamic_bad_pair_mining"))
class BadPairs(LossWrapper):
    r"""Any loss over pairs, with smaller weights for samples that were always too easy or too hard.

    .. math::
        w_i = \begin{cases} \mathcal{N}(L_i; \mu, \sigma) & m_i < \mu - \beta_{np} \sigma \text{ (noisy), or }
            m_i > \mu + \beta_{fp} \sigma \text{ (faulty)} \\ 1 & \text{otherwise} \end{cases}, \qquad
        \mathcal{N}(L; \mu, \sigma) = \frac{e^{-(L - \mu)^2 / 2 \sigma^2}}{\sigma \sqrt{2 \pi}}

    L_i is the loss of sample i in this batch, the mean of its rows (its views, both directions), and is multiplied by
    the constant w_i; m_i is the mean of its losses in the epochs before this one, mu and sigma are mean and standard
    deviation of m over the samples that have a history. sigma = 0 flags no sample. The batch's loss is the plain mean
    of w_i L_i, not divided by the sum of the weights.

    The loss history contains every loss before weighting, of all processes, also during the warm-up; a sample that is
    twice in a batch is stored twice. Calls in training mode are stored, calls in `eval()`, under `no_grad` or in
    `contrast.local()` are not. The losses of a call are stored by `update()`, or else by the next call in training mode
    or `end_epoch()`. Call `update()` after the optimiser's step where checkpoints are written within an epoch.
    `end_epoch()` also finds the bad pairs of the next epoch, so within an epoch the weights depend only on the epochs
    before it. The loss history is part of the state dict.

    Args:
        loss: the inner loss, any with a value per anchor (`reduction="none"`).
        samples: number of sample indices; all indices are below it. On CUDA, where checking would wait for the device,
            a sample with another index has weight 1 and is not stored.
        warmup_epochs: epochs without weights, in which losses are only stored; 50 of 80 in the paper.
        noisy_width: beta_np > 0, in standard deviations below the mean; inf for none.
        faulty_width: beta_fp > 0, in standard deviations above the mean; inf for none.
        statistics: "paper": as above. "published_code": m multiplies the loss of epoch e = 0, 1, ... by
            (e + 1) / `epochs`, which makes m, mu and sigma smaller than the loss L in the density; the comparisons are
            <= and >=.
        weight: "density": as above, published, larger than 1 where sigma < 0.4 and L is close to mu; "peak_one":
            exp(-(L - mu)^2 / (2 sigma^2)), at most 1.
        epochs: the length of the training, for "published_code".

    Attributes:
        epoch: () int64, number of epochs that have ended.
        sums: (samples,) int64, each sample's losses in those epochs in units of 2^-24, added up.
        counts: (samples,) int64, number of losses in `sums`.
        epoch_sums: as `sums`, of the epoch that has not ended.
        epoch_counts: number of losses in `epoch_sums`.
        kind: (samples,) uint8, NORMAL (0), NOISY (1) or FAULTY (2).
        center: (), mu.
        spread: (), sigma.

    Raises:
        ValueError: for a loss that is one number per batch, impossible numbers, and a call without `sample` or with
            indices outside [0, samples).

    Example:
        >>> criterion = BadPairs(InfoNCE(0.2), samples=100, warmup_epochs=1)
        >>> value = criterion(z_a, z_b, sample=torch.tensor([7, 12, 80, 99]))
        >>> criterion.end_epoch()
        >>> flagged = criterion.noisy | criterion.faulty

    Source: Lan et al. 2024, Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach,
    ICLR 2024, arXiv:2302.03357; the authors' repository lanxiang1017/DynamicBadPairMining_ICLR24.
    """

    purpose = "weighs the values per anchor of a PairLoss"

    sums: Tensor
    counts: Tensor
    epoch_sums: Tensor
    epoch_counts: Tensor
    kind: Tensor
    center: Tensor
    spread: Tensor
    epoch: Tensor

    def __init__(
        self,
        loss: PairLoss,
        samples: int,
        warmup_epochs: int = 50,
        noisy_width: float = 2.0,
        faulty_width: float = 3.0,
        statistics: Literal["paper", "published_code"] = "paper",
        weight: Literal["density", "peak_one"] = "density",
        epochs: int | None = None,
    ) -> None:
        super().__init__(loss)
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, the size of the data set; got {samples}.")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be 0 or more; got {warmup_epochs}.")
        for name, width in {"noisy_width": noisy_width, "faulty_width": faulty_width}.items():
            if not width > 0:
                raise ValueError(f"{name} must be a positive number, or inf; got {width}.")
        if statistics not in ("paper", "published_code"):
            raise ValueError(f"statistics is 'paper' or 'published_code'; got {statistics!r}.")
        if weight not in ("density", "peak_one"):
            raise ValueError(f"weight is 'density' or 'peak_one'; got {weight!r}.")
        if statistics == "published_code" and (epochs is None or epochs < 1):
            raise ValueError(f"statistics='published_code' needs epochs, the length of the training; got {epochs}.")
        self.samples = samples
        self.warmup_epochs = warmup_epochs
        self.noisy_width = noisy_width
        self.faulty_width = faulty_width
        self.statistics = statistics
        self.weight = weight
        self.epochs = epochs
        for name in ("sums", "counts", "epoch_sums", "epoch_counts"):
            self.register_buffer(name, torch.zeros(samples, dtype=torch.int64))
        self.register_buffer("kind", torch.zeros(samples, dtype=torch.uint8))
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self._shares = torch.zeros(0, 3, dtype=torch.float64)
        self._pending: Tensor | None = None
        self._measured: dict[str, Tensor] = {}

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs of the inner loss; `sample` is required."""
        if sample is None:
            raise ValueError(
                "BadPairs stores losses by sample: call loss(z_a, z_b, sample=index) with indices in the data set."
            )
        prepared = super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)
        sample = sample.to(views[0].device, torch.int64)
        if sample.device.type == "cpu" and len(sample) and not (sample.min() >= 0 and sample.max() < self.samples):
            raise ValueError(
                f"sample indices must be in [0, {self.samples}), since samples={self.samples}; "
                f"got {int(sample.min())} to {int(sample.max())}."
            )
        return prepared

    def combine(self, rows: Sequence[Tensor], prepared: Sequence[Pairs]) -> Sequence[Tensor]:
        """Return the (n,) rows of each direction times their samples' weights, and store the losses."""
        rows = super().combine(rows, prepared)
        sample = prepared[0].anchor_parts[0].sample
        stored = self.training and torch.is_grad_enabled() and not distributed.is_local()
        with torch.no_grad():
            losses, known = _sample_losses(rows, [self._valid(pairs) for pairs in prepared], len(sample))
            known &= (sample >= 0) & (sample < self.samples)
            weight = self._weights(sample, losses, known)
            if stored:
                self._store(sample, losses, known)
        return [row * weight.repeat(len(row) // max(len(sample), 1)) for row in rows]

    def update(self) -> None:
        """Add the last call's losses to the loss history; the next call in training mode and `end_epoch` do so too."""
        super().update()
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        sample, losses, known = pending.to(self.sums.device).unbind(dim=1)
        self.epoch_sums.index_add_(0, sample, losses)
        self.epoch_counts.index_add_(0, sample, known)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """End the epoch: its losses become history, from which the samples to weigh in the next epoch are found."""
        self.update()
        epoch_factor = self.epoch + 1 if self.statistics == "published_code" else 1
        self.sums += self.epoch_sums * epoch_factor
        self.counts += self.epoch_counts
        self.epoch_sums.zero_()
        self.epoch_counts.zero_()
        self.epoch += 1
        self._flag()
        known = (self.counts > 0).sum().clamp(min=1).double()
        shares = torch.stack([self.noisy.sum() / known, self.faulty.sum() / known, self.epoch >= self.warmup_epochs])
        self._shares = torch.cat([self._shares.to(shares.device), shares[None]])
        super().end_epoch()

    @property
    def history(self) -> Tensor:
        """m, each sample's mean loss over the epochs that have ended, (samples,) float32; NaN without any."""
        m = self.sums.to(torch.float32) / UNIT / self.counts
        return m / self.epochs if self.statistics == "published_code" and self.epochs else m

    @property
    def noisy(self) -> Tensor:
        """(samples,) bool: samples with too small losses in the epochs that have ended; also during the warm-up."""
        return self.kind == NOISY

    @property
    def faulty(self) -> Tensor:
        """(samples,) bool: samples with too large losses in the epochs that have ended; also during the warm-up."""
        return self.kind == FAULTY

    def findings(self, names: Sequence[str]) -> dict[str, list[Row]]:
        """Return the shares of flagged samples after each epoch, and the MAX_REPORTED samples furthest from the mean.

        "weights applied" is 1 once the warm-up is over.
        """
        epochs: list[Row] = [
            {"epoch": epoch, "noisy": noisy, "faulty": faulty, "weights applied": int(applied)}
            for epoch, (noisy, faulty, applied) in enumerate(self._shares.tolist(), start=1)
        ]
        history = self.history
        tables = {**super().findings(names), "Samples flagged by epoch": epochs}
        for title, flagged, descending in (
            ("Noisy pairs: mean loss far below the others'", self.noisy, False),
            ("Faulty pairs: mean loss far above the others'", self.faulty, True),
        ):
            samples = flagged.nonzero().flatten()
            furthest = samples[history[samples].argsort(descending=descending, stable=True)][:MAX_REPORTED]
            tables[title] = [
                {"sample": sample, "name": names[sample], "mean loss": float(history[sample])}
                for sample in furthest.tolist()
            ]
        return {title: rows for title, rows in tables.items() if rows}

    def get_extra_state(self) -> Tensor:
        """Return (epochs, 3) float64: the shares of noisy and faulty samples, and 1 once the warm-up is over."""
        return self._shares

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self._shares = state

    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute the inner loss's metrics, and the last batch's shares of noisy and faulty samples and mean weight.

        During the warm-up the shares are 0 and the weight is 1.
        """
        return super().measure(pairs) | self._measured

    def _weights(self, sample: Tensor, losses: Tensor, known: Tensor) -> Tensor:
        kind = self.kind[sample.clamp(0, self.samples - 1)]
        kind = torch.where(known & (self.epoch >= self.warmup_epochs), kind, NORMAL)
        center, spread = self.center.to(losses.dtype), self.spread.to(losses.dtype)
        weight = torch.exp(-((losses - center) / spread).square() / 2)
        if self.weight == "density":
            weight = weight / (spread * math.sqrt(2 * math.pi))
        weight = torch.where(kind == NORMAL, 1, weight)
        count = known.sum().clamp(min=1)
        self._measured = {
            "noisy": (kind == NOISY).sum() / count,
            "faulty": (kind == FAULTY).sum() / count,
            "weight": torch.where(known, weight, 0).sum() / count,
        }
        return weight

    def _store(self, sample: Tensor, losses: Tensor, known: Tensor) -> None:
        self.update()
        known = known & torch.isfinite(losses)
        units = (losses.clamp(-LARGEST, LARGEST) * UNIT).round().where(known, 0).to(torch.int64)
        own = torch.stack([sample.clamp(0, self.samples - 1), units, known.to(torch.int64)], dim=1)
        self._pending = distributed.gather_rows(own)

    def _flag(self) -> None:
        m, known = self.history, self.counts > 0
        # Relative to the smallest, so that equal histories have a spread of exactly 0.
        lowest = torch.where(known, m, torch.inf).amin()
        excess = torch.where(known, m - lowest, 0)
        count = known.sum().clamp(min=1)
        mean = excess.sum() / count
        spread = torch.where(known, (excess - mean).square(), 0).sum().div(count).sqrt()
        # A spread that rounding can cause counts as 0.
        spread_out = known & (spread > 8 * torch.finfo(m.dtype).eps * m.abs().where(known, 0).amax())
        below, above = mean - self.noisy_width * spread, mean + self.faulty_width * spread
        if self.statistics == "published_code":
            noisy, faulty = excess <= below, excess >= above
        else:
            noisy, faulty = excess < below, excess > above
        kind = torch.where(spread_out & noisy, NOISY, torch.where(spread_out & faulty, FAULTY, NORMAL))
        self.kind.copy_(kind)
        self.center.copy_(torch.where(known.any(), lowest + mean, 0))
        self.spread.copy_(spread)


def _sample_losses(rows: Sequence[Tensor], valid: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each sample's valid rows, (count,), and (count,) bool: the samples that have any."""
    if any(len(row) % max(count, 1) for row in rows):
        raise ValueError(
            f"BadPairs needs the rows of complete views, {count} each; its loss returned {[len(row) for row in rows]}."
        )
    row, has_loss = torch.cat(list(rows)), torch.cat(list(valid))
    shape = (len(row) // max(count, 1), count)
    row, has_loss = row.view(shape), has_loss.view(shape)
    counts = has_loss.sum(dim=0)
    return torch.where(has_loss, row, 0).sum(dim=0) / counts.clamp(min=1), counts > 0
