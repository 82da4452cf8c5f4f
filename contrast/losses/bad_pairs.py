"""Dynamic bad pair mining: positive pairs whose loss was always too small or too large count for less."""

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
"""The memory counts in whole numbers of 1 / UNIT: their sums do not depend on the order, so every process holds the
same, and a cast of the module to half precision does not reach them."""
LARGEST = 2.0**20
"""A loss beyond this is remembered as this."""

SHOWN = 6
"""Noisy and faulty samples among the findings, each."""

NORMAL, NOISY, FAULTY = 0, 1, 2


@LOSSES.register("bad_pairs", aliases=("dbpm", "dynamic_bad_pair_mining"))
class BadPairs(LossWrapper):
    r"""Any loss over pairs, with the samples that were always too easy or too hard weighed down.

    .. math::
        w_i = \begin{cases} \mathcal{N}(L_i; \mu, \sigma) & m_i < \mu - \beta_{np} \sigma \text{ (noisy), or }
            m_i > \mu + \beta_{fp} \sigma \text{ (faulty)} \\ 1 & \text{otherwise} \end{cases}, \qquad
        \mathcal{N}(L; \mu, \sigma) = \frac{e^{-(L - \mu)^2 / 2 \sigma^2}}{\sigma \sqrt{2 \pi}}

    L_i is the loss of sample i in this batch, the mean of its rows (its views, both directions), and is multiplied by
    the constant w_i; m_i is the mean of its losses in the epochs before this one, mu and sigma are mean and standard
    deviation of m over the samples that have a history. sigma = 0 flags nobody. The mean over the batch is not divided
    by the weights.

    The memory holds every loss as it was before weighing, of all processes, also from the warm-up; a sample that stands
    twice in a batch is remembered twice. A call in training remembers, one in `eval()`, under `no_grad` or in
    `contrast.local()` does not. A call's own losses enter the memory with the next call in training, with `update()`,
    which belongs after the optimiser's step where checkpoints are made within an epoch, or with `end_epoch()`, which
    also finds the bad pairs of the next epoch: within an epoch the weights depend on the epochs before it alone. The
    memory is part of the state dict, so a checkpoint has all of it.

        criterion = BadPairs(InfoNCE(0.2), samples=len(dataset))
        loss = criterion(z_a, z_b, sample=index)    # in every step
        criterion.end_epoch()                       # after every epoch

    Args:
        loss: the loss to weigh, any with rows.
        samples: how many the data set has; sample indices are below it. On CUDA, where looking would wait for the
            device, a sample with another index is left as it is and not remembered.
        warmup_epochs: epochs without weights, in which the memory fills; the authors train 50 of 80 so.
        noisy_width: beta_np > 0, in standard deviations below the mean; inf for none.
        faulty_width: beta_fp > 0, in standard deviations above the mean; inf for none.
        statistics: "paper": as above. "published_code": m weighs the loss of epoch e = 0, 1, ... by (e + 1) / `epochs`,
            which makes m, mu and sigma smaller than the loss L that the density then sees; <= and >= decide.
        weight: "density": as above, published, above 1 where sigma is below 0.4 and L near mu; "peak_one":
            exp(-(L - mu)^2 / (2 sigma^2)), at most 1.
        epochs: how long the training is, in epochs, for "published_code".

    Attributes:
        epoch: how many epochs have ended.

    Raises:
        ValueError: for a loss without rows, impossible numbers, and a call without `sample` or with indices outside
            [0, samples).

    Source: Lan et al. 2024, Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach,
    ICLR 2024, arXiv:2302.03357; the authors' repository lanxiang1017/DynamicBadPairMining_ICLR24.
    """

    does = "weighs the rows of a PairLoss"

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
            raise ValueError(f"statistics='published_code' needs epochs, how long the training is; got {epochs}.")
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
        """Pair as the inner loss does; every row must say which sample it is."""
        if sample is None:
            raise ValueError(
                "BadPairs remembers losses by sample: call loss(z_a, z_b, sample=index) with indices in the data set."
            )
        prepared = super().pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)
        sample = sample.to(views[0].device, torch.int64)
        if sample.device.type == "cpu" and len(sample) and not (sample.min() >= 0 and sample.max() < self.samples):
            raise ValueError(
                f"sample indices must lie in [0, {self.samples}), as samples={self.samples} says; "
                f"got {int(sample.min())} to {int(sample.max())}."
            )
        return prepared

    def combine(self, rows: Sequence[Tensor], prepared: Sequence[Pairs]) -> Sequence[Tensor]:
        """Multiply every row by its sample's weight, and keep the losses for the memory."""
        rows = super().combine(rows, prepared)
        sample = prepared[0].anchor_parts[0].sample
        remembers = self.training and torch.is_grad_enabled() and not distributed.is_local()
        with torch.no_grad():
            losses, known = _by_sample(rows, [self._valid(pairs) for pairs in prepared], len(sample))
            known &= (sample >= 0) & (sample < self.samples)
            weight = self._weights(sample, losses, known)
            if remembers:
                self._keep(sample, losses, known)
        return [row * weight.repeat(len(row) // max(len(sample), 1)) for row in rows]

    def update(self) -> None:
        """Write the last call's losses into the memory; the next call in training and `end_epoch` do it too."""
        super().update()
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        sample, losses, known = pending.to(self.sums.device).unbind(dim=1)
        self.epoch_sums.index_add_(0, sample, losses)
        self.epoch_counts.index_add_(0, sample, known)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Close the epoch: its losses become history, and history says who is noisy or faulty in the next."""
        self.update()
        age = self.epoch + 1 if self.statistics == "published_code" else 1
        self.sums += self.epoch_sums * age
        self.counts += self.epoch_counts
        self.epoch_sums.zero_()
        self.epoch_counts.zero_()
        self.epoch += 1
        self._judge()
        known = (self.counts > 0).sum().clamp(min=1).double()
        shares = torch.stack([self.noisy.sum() / known, self.faulty.sum() / known, self.epoch >= self.warmup_epochs])
        self._shares = torch.cat([self._shares.to(shares.device), shares[None]])
        super().end_epoch()

    @property
    def history(self) -> Tensor:
        """(samples,) m, each sample's mean loss of the epochs that have ended; NaN where it has none."""
        m = self.sums.to(torch.float32) / UNIT / self.counts
        return m / self.epochs if self.statistics == "published_code" and self.epochs else m

    @property
    def noisy(self) -> Tensor:
        """(samples,) bool, whose losses were too small, by the epochs that have ended; also during the warm-up."""
        return self.kind == NOISY

    @property
    def faulty(self) -> Tensor:
        """(samples,) bool, whose losses were too large, by the epochs that have ended; also during the warm-up."""
        return self.kind == FAULTY

    def findings(self, names: Sequence[str]) -> dict[str, list[Row]]:
        """Return the shares of flagged samples after each epoch, and the samples furthest from the mean, at most SHOWN.

        "weights applied" is 1 where they weigh less in the epoch after.
        """
        epochs: list[Row] = [
            {"epoch": epoch, "noisy": noisy, "faulty": faulty, "weights applied": int(applied)}
            for epoch, (noisy, faulty, applied) in enumerate(self._shares.tolist(), start=1)
        ]
        history = self.history
        found = {**super().findings(names), "Samples flagged by epoch": epochs}
        for title, flagged, descending in (
            ("Noisy pairs: mean loss far below the others'", self.noisy, False),
            ("Faulty pairs: mean loss far above the others'", self.faulty, True),
        ):
            samples = flagged.nonzero().flatten()
            furthest = samples[history[samples].argsort(descending=descending, stable=True)][:SHOWN]
            found[title] = [
                {"sample": sample, "name": names[sample], "mean loss": float(history[sample])}
                for sample in furthest.tolist()
            ]
        return {title: rows for title, rows in found.items() if rows}

    def get_extra_state(self) -> Tensor:
        """Return the shares of noisy and faulty samples and whether weights applied, (epochs, 3)."""
        return self._shares

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        self._shares = state

    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return what the inner loss measures, the shares of noisy and faulty samples in the last batch and its weight.

        During the warm-up nobody counts as noisy or faulty, and weights are 1.
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
        mass = known.sum().clamp(min=1)
        self._measured = {
            "noisy": (kind == NOISY).sum() / mass,
            "faulty": (kind == FAULTY).sum() / mass,
            "weight": torch.where(known, weight, 0).sum() / mass,
        }
        return weight

    def _keep(self, sample: Tensor, losses: Tensor, known: Tensor) -> None:
        self.update()
        known = known & torch.isfinite(losses)
        whole = (losses.clamp(-LARGEST, LARGEST) * UNIT).round().where(known, 0).to(torch.int64)
        own = torch.stack([sample.clamp(0, self.samples - 1), whole, known.to(torch.int64)], dim=1)
        self._pending = distributed.gather_rows(own)

    def _judge(self) -> None:
        m, some = self.history, self.counts > 0
        # Measured from the smallest, so that equal histories are exactly 0 apart.
        lowest = torch.where(some, m, torch.inf).amin()
        beyond = torch.where(some, m - lowest, 0)
        mass = some.sum().clamp(min=1)
        mean = beyond.sum() / mass
        spread = torch.where(some, (beyond - mean).square(), 0).sum().div(mass).sqrt()
        # A spread that rounding alone can make is none.
        apart = some & (spread > 8 * torch.finfo(m.dtype).eps * m.abs().where(some, 0).amax())
        below, above = mean - self.noisy_width * spread, mean + self.faulty_width * spread
        if self.statistics == "published_code":
            noisy, faulty = beyond <= below, beyond >= above
        else:
            noisy, faulty = beyond < below, beyond > above
        kind = torch.where(apart & noisy, NOISY, torch.where(apart & faulty, FAULTY, NORMAL))
        self.kind.copy_(kind)
        self.center.copy_(torch.where(some.any(), lowest + mean, 0))
        self.spread.copy_(spread)


def _by_sample(rows: Sequence[Tensor], valid: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each sample's valid rows, (count,), and whether it has any."""
    if any(len(row) % max(count, 1) for row in rows):
        raise ValueError(
            f"BadPairs needs the rows of whole views, {count} each; its loss gave {[len(row) for row in rows]}."
        )
    row, counts = torch.cat(list(rows)), torch.cat(list(valid))
    shape = (len(row) // max(count, 1), count)
    row, counts = row.view(shape), counts.view(shape)
    found = counts.sum(dim=0)
    return torch.where(counts, row, 0).sum(dim=0) / found.clamp(min=1), found > 0
