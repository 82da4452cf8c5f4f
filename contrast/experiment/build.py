"""From a config to the parts: data, views, encoder, loss, optimiser. The only file that knows them all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrast.core.registry import InputError, schema
from contrast.core.seeding import derived
from contrast.data import Data, open_data
from contrast.data.loader import SAMPLERS, Neighbours, Order, StepSampler
from contrast.experiment.config import Config
from contrast.losses import LOSSES, Loss, as_loss
from contrast.memory import MEMORIES, Bank, HardNegatives, Memory, NearestPositives, NeighbourTables
from contrast.models import Encoder, ImageInputs, SeriesInputs, build_encoder
from contrast.models.backbones import output_of_zeros
from contrast.train.budget import Budget
from contrast.train.optimizers import OPTIMIZERS, Optimizer
from contrast.train.step import Step
from contrast.views.views import Views, build_views

TINY = 40
"""Images up to this height and width, in pixels, get the small network."""
UNAIDED = 96
"""The same without an accelerator; larger ones are then read at 64 pixels, where everything is left to "auto"."""
SEEN = 400_000
"""Samples that a run of budget "auto" sees at most, where time allows."""
MINUTES = 5
"""How long a run of budget "auto" takes at most without an accelerator."""


@dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, built and checked.

    Args:
        config: what was asked for, "auto" filled in.
        data: all splits.
        views: makes the views of a batch.
        encoder: backbone and head.
        loss: one of LOSSES; what is no `Loss` is called through `ModuleLoss`.
        optimizer: how to step.
        memory: where more candidates come from.
        order: of the items in an epoch.
        watching: what finds neighbours for that order.
        reference: raw batch -> (N, R), a frozen network's features, where the config names one.
        picked: dotted key -> what "auto" became.
    """

    config: Config
    data: Data
    views: Views
    encoder: Encoder
    loss: Loss
    optimizer: Optimizer
    memory: list[Memory]
    order: Order
    watching: list[Memory]
    reference: Callable[[Tensor], Tensor] | None
    picked: Mapping[str, Any]

    def sampler(self, start: int = 0) -> StepSampler:
        """Give the batches of the training set from step `start` on."""
        return _sampler(self.config, self.data, start, self.order)

    def step(self) -> Step:
        """Give what a training step is made of."""
        return Step(self.encoder, self.loss, self.views, self.memory, self.watching, self.reference)

    def labels(self) -> Tensor | None:
        """Give the training items' classes by sample index, (samples,) int64, -1 for none; None without labels."""
        if not self.data.classes:
            return None
        labels = torch.full((int(self.data.train.sample.max()) + 1,), -1)
        labels[torch.from_numpy(self.data.train.sample)] = torch.from_numpy(self.data.train.target)
        return labels


def read_data(config: Config) -> Data:
    """Open the data set of a config.

    Raises:
        InputError: where none is named, or it cannot be read.
    """
    settings = dataclasses.asdict(config.data)
    settings.pop("workers")
    if not settings["source"]:
        raise InputError("data.source is missing: name the data, a path or one of `contrast list data`.")
    source = settings.pop("source")
    return open_data(source, **settings, seed=config.seed)


def build(config: Config, data: Data, reference: Callable[[Tensor], Tensor] | None = None) -> Experiment:
    """Make every part of an experiment for this data; "auto" becomes what suits the data.

    Args:
        config: what was asked for.
        data: all splits.
        reference: raw batch -> (N, R), the network that `encoder.reference` names.

    Raises:
        InputError: naming the key, for parts that do not fit the data or each other.
    """
    config, picked = pick(config, data)
    views = build_views(config.views, data.shape, data.kind)
    encoder = build_encoder_for(config, data, views)
    optimizer = OPTIMIZERS.build(config.optimizer, where="optimizer")
    *heads, _, dim = output_of_zeros(encoder.head, (2, encoder.width), "encoder.head").shape
    facts = {
        "samples": int(data.train.sample.max()) + 1,  # indices count the items of every split
        "dim": dim,
        "heads": heads[0] if heads else None,
        "seed": config.seed,
    }
    loss = _loss(config, data, facts)
    if reference is not None:
        facts["reference_dim"] = reference(data.train.x(np.zeros(1, dtype=np.int64))).shape[-1]
    memory = _memories(config, loss, facts)
    order, watching = _order(config, data, memory, facts)
    return Experiment(config, data, views, encoder, loss, optimizer, memory, order, watching, reference, picked)


def _loss(config: Config, data: Data, facts: Mapping[str, Any]) -> Loss:
    """Make the loss, told what it asks of the run: samples, the embeddings' width, epochs where they are known."""
    steps_per_epoch = _sampler(config, data).steps_per_epoch
    known = {name: facts[name] for name in ("samples", "dim")}
    if config.budget != "auto" and (steps := Budget.parse(config.budget, steps_per_epoch=steps_per_epoch).steps):
        known["epochs"] = math.ceil(steps / steps_per_epoch)
    torch.manual_seed(derived(config.seed, "loss"))
    loss = LOSSES.build(config.loss, where="loss", **known)
    try:
        return as_loss(loss)
    except TypeError as error:
        raise InputError(f"loss: {error}") from error


def _memories(config: Config, loss: Loss, facts: Mapping[str, Any]) -> list[Memory]:
    """Make the memories; those that stand on a bank and name none share one."""
    if config.memory and not loss.takes_extra:
        raise InputError("memory: this loss takes no further candidates; leave memory out.")
    made: dict[int, Memory] = {}
    shared: Memory | None = None
    # Banks that stand in the list come first: they are the one to share.
    checked = [MEMORIES.check(part, where=f"memory[{number}]") for number, part in enumerate(config.memory)]
    for number, (name, arguments) in sorted(enumerate(checked), key=lambda one: one[1][0] != "bank"):
        where, part = f"memory[{number}]", {"name": name, **arguments}
        wanted = {"bank", "store"} & schema(MEMORIES[name]).keys() - arguments.keys()
        if wanted and shared is None:
            shared = MEMORIES.build("bank", where=where, **facts)
        made[number] = MEMORIES.build(part, where=where, **facts, **dict.fromkeys(wanted, shared))
        if isinstance(made[number], Bank) and shared is None:
            shared = made[number]
    if sum(isinstance(memory, NearestPositives) for memory in made.values()) > 1:
        raise InputError("memory: one memory gives the positives; leave one nearest_positives out.")
    return [made[number] for number in range(len(config.memory))]


def _order(config: Config, data: Data, memory: list[Memory], facts: Mapping[str, Any]) -> tuple[Order, list[Memory]]:
    """Make the order of the items, and what finds neighbours for it, on the bank that the memories have already."""
    order: Order = SAMPLERS.build(config.sampler, where="sampler")
    if not isinstance(order, Neighbours):
        return order, []
    bank = next((store for one in memory for store in one.stores() if isinstance(store, Bank)), None)
    bank = bank or MEMORIES.build("bank", where="sampler", **facts)
    # More than are put together: the nearest may have been met already.
    wanted = min(4 * order.neighbours, len(data.train) - 1)
    miner = MEMORIES.build(
        {"name": "hard_negatives", "neighbours": wanted, "refresh": order.refresh, "index": order.index},
        where="sampler",
        bank=bank,
        **facts,
    )
    assert isinstance(miner, HardNegatives)
    tables = NeighbourTables(miner)
    sample = torch.from_numpy(data.train.sample)
    position = torch.full((facts["samples"] + 1,), -1)  # the last one is where -1 points
    position[sample] = torch.arange(len(sample))

    def near(epoch: int) -> Tensor | None:
        table = tables.known_before(epoch - 1)
        return None if table is None else position[table.cpu()[sample]]

    order.table = near
    return order, [tables]


def _sampler(config: Config, data: Data, start: int = 0, order: Order | None = None) -> StepSampler:
    assert isinstance(config.batch_size, int)
    return StepSampler(len(data.train), config.batch_size, seed=config.seed, start=start, order=order)


def build_encoder_for(config: Config, data: Data, views: Views, *, pretrained: bool = True) -> Encoder:
    """Make the encoder as it is before training: the same weights for the same seed.

    Args:
        config: with everything picked.
        data: gives shape and statistics.
        views: their shape is what the backbone reads.
        pretrained: whether `encoder.backbone.pretrained` counts; False starts from random weights all the same.
    """
    settings = config.encoder
    backbone: dict[str, Any] = (
        dict(settings.backbone) if isinstance(settings.backbone, Mapping) else {"name": settings.backbone}
    )
    if not pretrained:
        backbone["pretrained"] = False
    shape = views.output_shapes(data.shape)[0]
    torch.manual_seed(derived(config.seed, "weights"))
    return build_encoder(
        backbone,
        settings.head,
        shape=shape,
        kind=data.kind,
        inputs=inputs_of(data),
        predictor=settings.predictor,
        momentum=settings.momentum,
        joint=settings.joint,
    )


def inputs_of(data: Data) -> ImageInputs | SeriesInputs:
    """Give what prepares raw data of this set for views and backbone."""
    if data.kind == "image":
        return ImageInputs(data.value_range, data.mean, data.std)
    return SeriesInputs(data.mean, data.std)


def pick_size(config: Config, data: Data) -> tuple[Config, Data]:
    """Read large images at 64 pixels where there is no accelerator, and neither size nor backbone was chosen."""
    left_to_us = config.data.size is None and config.encoder.backbone == "auto"
    if data.kind == "series" or max(data.shape[1:]) <= UNAIDED or torch.cuda.is_available() or not left_to_us:
        return config, data
    config = replace(config, data=replace(config.data, size=64))
    return config, read_data(config)


def pick(config: Config, data: Data) -> tuple[Config, dict[str, Any]]:
    """Give the config with every "auto" but the budget's filled in, and what was filled in."""
    picked: dict[str, Any] = {}
    views = config.views
    if views == "auto" or (isinstance(views, Mapping) and views["name"] == "auto"):
        given = {key: value for key, value in views.items() if key != "name"} if isinstance(views, Mapping) else {}
        picked["views"] = {"name": _recipe(data), **given}
    backbone = config.encoder.backbone
    if backbone == "auto":
        picked["encoder.backbone"] = {"name": _backbone(data)}
    if config.batch_size == "auto":
        if len(data.train) < 4:
            raise InputError(f"{data.source} has {len(data.train)} training items; contrast needs 4 or more.")
        picked["batch_size"] = 2 ** int(math.log2(min(256, len(data.train) // 2)))
    encoder = replace(config.encoder, backbone=picked.get("encoder.backbone", backbone))
    config = replace(
        config,
        views=picked.get("views", views),
        encoder=encoder,
        batch_size=picked.get("batch_size", config.batch_size),
    )
    return config, picked


def pick_steps(experiment: Experiment, seconds_per_step: float) -> int:
    """Give the steps of budget "auto": up to 400,000 samples, and five minutes where there is no accelerator."""
    sampler = experiment.sampler()
    steps = max(min(SEEN // sampler.batch_size, 400 * sampler.steps_per_epoch), 10 * sampler.steps_per_epoch)
    if not torch.cuda.is_available():
        steps = min(steps, int(60 * MINUTES / seconds_per_step))
    magnitude: int = 10 ** max(int(math.log10(max(steps, 1))) - 1, 0)
    return int(max(steps // magnitude * magnitude, 20))


def _recipe(data: Data) -> str:
    if data.kind == "series":
        return "series"
    return "small_images" if data.shape[0] == 1 and max(data.shape[1:]) <= TINY else "simclr"


def _backbone(data: Data) -> str:
    if data.kind == "series":
        return "resnet1d"
    small = TINY if torch.cuda.is_available() else UNAIDED
    return "small_conv" if max(data.shape[1:]) <= small else "timm:resnet18"
