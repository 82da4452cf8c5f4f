"""From a config to the parts of a run: data, views, encoder, loss, memories, sampler, optimiser."""

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
from contrast.data.loader import Neighbours, Order, StepSampler
from contrast.experiment.config import Config
from contrast.experiment.parts import KINDS
from contrast.losses import Loss, as_loss
from contrast.memory import Bank, HardNegatives, Memory, NearestPositives, NeighbourTables
from contrast.models import Encoder, ImageInputs, SeriesInputs, build_encoder
from contrast.models.backbones import output_of_zeros
from contrast.train.budget import Budget
from contrast.train.optimizers import Optimizer
from contrast.train.step import Step
from contrast.views.views import Views, build_views

SMALL_IMAGE = 40
"""Images up to this height and width, in pixels, get the small network."""
SMALL_IMAGE_CPU = 96
"""The same without an accelerator; larger ones are then read at 64 pixels, where size and backbone are "auto"."""
AUTO_SAMPLES = 400_000
"""Samples, at most, that a run of budget "auto" trains on, where time allows."""
AUTO_MINUTES = 5
"""How long a run of budget "auto" takes at most without an accelerator."""


@dataclass(frozen=True)
class Experiment:
    """All parts of a run, built and checked.

    Args:
        config: the settings, with every "auto" resolved.
        data: all splits.
        views: makes the views of a batch.
        encoder: backbone and head.
        loss: one of LOSSES; a module that is no `Loss` is called through `ModuleLoss`.
        optimizer: with its schedule.
        memory: where further candidates or positives come from.
        order: of the items in an epoch.
        sampler_memory: memories that give no candidates but find the neighbours for `order`.
        reference: raw batch -> (N, R), a frozen network's features, where the config names one.
        chosen: dotted key -> what "auto" became.
    """

    config: Config
    data: Data
    views: Views
    encoder: Encoder
    loss: Loss
    optimizer: Optimizer
    memory: list[Memory]
    order: Order
    sampler_memory: list[Memory]
    reference: Callable[[Tensor], Tensor] | None
    chosen: Mapping[str, Any]

    def sampler(self, start: int = 0) -> StepSampler:
        """Return the batches of the training set from step `start` on."""
        return _sampler(self.config, self.data, start, self.order)

    def step(self) -> Step:
        """Return what a training step consists of."""
        return Step(self.encoder, self.loss, self.views, self.memory, self.sampler_memory, self.reference)

    def labels(self) -> Tensor | None:
        """Return the training items' classes by sample index, (samples,) int64, -1 for none; None without labels."""
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
    """Build every part of an experiment for this data; "auto" becomes what suits the data.

    Args:
        config: the settings.
        data: all splits.
        reference: raw batch -> (N, R), the network that `encoder.reference` names.

    Raises:
        InputError: naming the key, for parts that do not fit the data or each other.
    """
    config, chosen = resolve_auto(config, data)
    views = build_views(config.views, data.shape, data.kind)
    encoder = build_encoder_for(config, data, views)
    facts = _facts(config, data, encoder, reference)
    optimizer = KINDS["optimizer"].build(config.optimizer, **facts)
    loss = _loss(config, facts)
    memory = _memories(config, loss, facts)
    order, sampler_memory = _order(config, data, memory, facts)
    return Experiment(config, data, views, encoder, loss, optimizer, memory, order, sampler_memory, reference, chosen)


def _facts(
    config: Config, data: Data, encoder: Encoder, reference: Callable[[Tensor], Tensor] | None
) -> dict[str, Any]:
    """Return the facts of the run that constructors may use, by name; what is not known is left out."""
    *heads, _, dim = output_of_zeros(encoder.head, (2, encoder.width), "encoder.head").shape
    facts = {
        "samples": int(data.train.sample.max()) + 1,  # indices count the items of every split
        "dim": dim,
        "heads": heads[0] if heads else None,
        "seed": config.seed,
    }
    if data.classes:
        facts["classes"] = len(data.classes)
    steps_per_epoch = _sampler(config, data).steps_per_epoch
    if config.budget != "auto" and (steps := Budget.parse(config.budget, steps_per_epoch=steps_per_epoch).steps):
        facts["epochs"] = math.ceil(steps / steps_per_epoch)
    if reference is not None:
        facts["reference_dim"] = reference(data.train.x(np.zeros(1, dtype=np.int64))).shape[-1]
    return facts


def _loss(config: Config, facts: Mapping[str, Any]) -> Loss:
    torch.manual_seed(derived(config.seed, "loss"))
    loss = KINDS["loss"].build(config.loss, **facts)
    try:
        return as_loss(loss)
    except TypeError as error:
        raise InputError(f"loss: {error}") from error


def _memories(config: Config, loss: Loss, facts: Mapping[str, Any]) -> list[Memory]:
    """Build the memories; those that use a bank and name none share one."""
    if config.memory and not loss.takes_extra:
        raise InputError("memory: this loss takes no further candidates; leave memory out.")
    kind = KINDS["memory"]
    built: dict[int, Memory] = {}
    shared: Memory | None = None
    # Banks of the list are built first: the first of them is the one to share.
    checked = [kind.registry.check(part, where=f"memory[{number}]") for number, part in enumerate(config.memory)]
    for number, (name, arguments) in sorted(enumerate(checked), key=lambda one: one[1][0] != "bank"):
        where, part = f"memory[{number}]", {"name": name, **arguments}
        missing = {"bank", "store"} & schema(kind.registry[name]).keys() - arguments.keys()
        if missing and shared is None:
            shared = kind.build("bank", where=where, **facts)
        built[number] = kind.build(part, where=where, **facts, **dict.fromkeys(missing, shared))
        if isinstance(built[number], Bank) and shared is None:
            shared = built[number]
    if sum(isinstance(memory, NearestPositives) for memory in built.values()) > 1:
        raise InputError("memory: only one memory can give the positives; leave one nearest_positives out.")
    return [built[number] for number in range(len(config.memory))]


def _order(config: Config, data: Data, memory: list[Memory], facts: Mapping[str, Any]) -> tuple[Order, list[Memory]]:
    """Build the order of the items, and the memory that finds neighbours for it, on the memories' bank if any."""
    order: Order = KINDS["sampler"].build(config.sampler, **facts)
    if not isinstance(order, Neighbours):
        return order, []
    kind = KINDS["memory"]
    bank = next((store for one in memory for store in one.stores() if isinstance(store, Bank)), None)
    bank = bank or kind.build("bank", where="sampler", **facts)
    # More than are put together: the nearest items may be in the order already.
    wanted = min(4 * order.neighbours, len(data.train) - 1)
    part = {"name": "hard_negatives", "neighbours": wanted, "refresh": order.refresh, "index": order.index}
    miner = kind.build(part, where="sampler", bank=bank, **facts)
    assert isinstance(miner, HardNegatives)
    tables = NeighbourTables(miner)
    sample = torch.from_numpy(data.train.sample)
    position = torch.full((facts["samples"] + 1,), -1)  # a neighbour of -1, none, indexes the last entry
    position[sample] = torch.arange(len(sample))

    def neighbours_at(epoch: int) -> Tensor | None:
        table = tables.known_before(epoch - 1)
        return None if table is None else position[table.cpu()[sample]]

    order.neighbours_at = neighbours_at
    return order, [tables]


def _sampler(config: Config, data: Data, start: int = 0, order: Order | None = None) -> StepSampler:
    assert isinstance(config.batch_size, int)
    return StepSampler(len(data.train), config.batch_size, seed=config.seed, start=start, order=order)


def build_encoder_for(config: Config, data: Data, views: Views, *, pretrained: bool = True) -> Encoder:
    """Build the encoder as it is before training: the same weights for the same seed.

    Args:
        config: with every "auto" resolved.
        data: gives shape and statistics.
        views: their shape is what the backbone reads.
        pretrained: False ignores `encoder.backbone.pretrained` and starts from random weights.
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
    """Return what prepares raw data of this set for views and backbone."""
    if data.kind == "image":
        return ImageInputs(data.value_range, data.mean, data.std)
    return SeriesInputs(data.mean, data.std)


def resolve_size(config: Config, data: Data) -> tuple[Config, Data]:
    """Read large images at 64 pixels where there is no accelerator and neither size nor backbone was chosen."""
    is_auto = config.data.size is None and config.encoder.backbone == "auto"
    if data.kind == "series" or max(data.shape[1:]) <= SMALL_IMAGE_CPU or torch.cuda.is_available() or not is_auto:
        return config, data
    config = replace(config, data=replace(config.data, size=64))
    return config, read_data(config)


def resolve_auto(config: Config, data: Data) -> tuple[Config, dict[str, Any]]:
    """Return the config with every "auto" but the budget's resolved, and what was chosen by dotted key."""
    chosen: dict[str, Any] = {}
    views = config.views
    if views == "auto" or (isinstance(views, Mapping) and views["name"] == "auto"):
        arguments = {key: value for key, value in views.items() if key != "name"} if isinstance(views, Mapping) else {}
        chosen["views"] = {"name": _auto_recipe(data), **arguments}
    backbone = config.encoder.backbone
    if backbone == "auto":
        chosen["encoder.backbone"] = {"name": _auto_backbone(data)}
    if config.batch_size == "auto":
        if len(data.train) < 4:
            raise InputError(f"{data.source} has {len(data.train)} training items; contrast needs 4 or more.")
        chosen["batch_size"] = 2 ** int(math.log2(min(256, len(data.train) // 2)))
    encoder = replace(config.encoder, backbone=chosen.get("encoder.backbone", backbone))
    config = replace(
        config,
        views=chosen.get("views", views),
        encoder=encoder,
        batch_size=chosen.get("batch_size", config.batch_size),
    )
    return config, chosen


def auto_steps(experiment: Experiment, seconds_per_step: float) -> int:
    """Return the steps of budget "auto": up to 400,000 samples, and five minutes where there is no accelerator."""
    sampler = experiment.sampler()
    steps = max(min(AUTO_SAMPLES // sampler.batch_size, 400 * sampler.steps_per_epoch), 10 * sampler.steps_per_epoch)
    if not torch.cuda.is_available():
        steps = min(steps, int(60 * AUTO_MINUTES / seconds_per_step))
    magnitude: int = 10 ** max(int(math.log10(max(steps, 1))) - 1, 0)
    return int(max(steps // magnitude * magnitude, 20))


def _auto_recipe(data: Data) -> str:
    if data.kind == "series":
        return "series"
    return "small_images" if data.shape[0] == 1 and max(data.shape[1:]) <= SMALL_IMAGE else "simclr"


def _auto_backbone(data: Data) -> str:
    if data.kind == "series":
        return "resnet1d"
    small = SMALL_IMAGE if torch.cuda.is_available() else SMALL_IMAGE_CPU
    return "small_conv" if max(data.shape[1:]) <= small else "timm:resnet18"
