"""The encoder: inputs, backbone and head, with the predictor and the momentum twin of the methods that want them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError
from contrast.models.backbones import Kind, Part, build_backbone, feature_width, output_of_zeros
from contrast.models.heads import HEADS
from contrast.models.inputs import ImageInputs, SeriesInputs

__all__ = ["Encoder", "ImageInputs", "Projections", "SeriesInputs", "build_encoder"]


class Projections(NamedTuple):
    """What a loss gets of V views.

    Args:
        z: V times (N, D), or (H, N, D) for H heads: the anchors.
        targets: V times the same without gradient, momentum keys or stopped projections; None where there are none.
        features: V times (N, F), before the head.
    """

    z: list[Tensor]
    targets: list[Tensor] | None
    features: list[Tensor]


class Encoder(nn.Module):
    """A backbone and its head, from raw data to features and to what a loss compares.

    - neither predictor nor momentum: z = head(features), no targets (SimCLR, SupCon, CACR).
    - predictor: z = predictor(p) with p = head(features), and targets = p without gradient (SimSiam).
    - momentum: targets come from a twin, a slowly following copy of backbone and head (MoCo). It stays in training
      mode with the rest, so that its BatchNorm normalises by the batch, as in MoCo v3; its parameters follow by an
      exponential moving average, its buffers are copied. It belongs to the state dict, not to the optimiser.

    Views of equal shape go through as one batch, which is faster and lets BatchNorm see them together, as SimCLR does;
    `joint=False` sends each on its own, as SimSiam and MoCo do.

    Args:
        backbone: (N, C, H, W), or (N, C, L) and where it takes one a `mask` (N, L), to (N, F).
        head: (N, F) to (N, D) or (H, N, D).
        inputs: prepares raw data, and turns views into what the backbone reads.
        predictor: (N, D) to (N, D).
        momentum: in [0, 1], the share of itself that the twin keeps in a step; None: no twin.
        momentum_end: what the momentum has become at the end of training, by a cosine.
        joint: views of equal shape in one pass.
        width: F; found by `build_encoder`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        inputs: ImageInputs | SeriesInputs,
        predictor: nn.Module | None = None,
        momentum: float | None = None,
        momentum_end: float = 1.0,
        joint: bool = True,
        width: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("momentum", momentum), ("momentum_end", momentum_end)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"encoder.{name} is the share that the twin keeps in a step, in [0, 1]; got {value}.")
        self.inputs = inputs
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
        self.twin: nn.ModuleDict | None = None
        if momentum is not None:
            online = nn.ModuleDict({"backbone": backbone, "head": head})
            self.twin = copy.deepcopy(online).requires_grad_(False)
        self.momentum, self.momentum_end, self.joint = momentum, momentum_end, joint
        self._takes_mask = "mask" in inspect.signature(backbone.forward).parameters
        self._width = width

    @property
    def width(self) -> int:
        """The width F of the features."""
        if self._width is None:
            raise InputError("this encoder was made without saying `width`; hand it over, or use build_encoder.")
        return self._width

    def prepare(self, raw: Tensor) -> Tensor:
        """Give what views expect: float32, images in [0, 1], series standardised with NaN where unobserved."""
        return self.inputs.prepare(raw)

    def features(self, x: Tensor) -> Tensor:
        """Give the features (N, F) of prepared data, without the head."""
        return self._features(self.backbone, x)

    def encode(self, raw: Tensor) -> Tensor:
        """Give the features (N, F) of raw data."""
        return self.features(self.prepare(raw))

    def forward(self, views: Sequence[Tensor]) -> Projections:
        """Give anchors, targets and features of each view, a prepared batch (N, ...)."""
        passed = self._each(views, self._online)
        targets = None
        if self.twin is not None:
            with torch.no_grad():
                targets = [target for (target,) in self._each(views, self._target)]
        elif self.predictor is not None:
            targets = [projection.detach() for _, projection, _ in passed]
        return Projections([z for _, _, z in passed], targets, [features for features, _, _ in passed])

    @torch.no_grad()
    def update_twin(self, progress: float) -> None:
        """Let the twin follow; called after each optimiser step, nothing without a twin.

        Args:
            progress: share of training done, in [0, 1]; the momentum rises along a cosine from `momentum` to
                `momentum_end`.
        """
        if self.twin is None or self.momentum is None:
            return
        kept = self.momentum_end - (self.momentum_end - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for name, online in (("backbone", self.backbone), ("head", self.head)):
            twin = self.twin[name]
            followers = [follower.detach() for follower in twin.parameters()]
            leaders = [leader.detach() for leader in online.parameters()]
            if followers:
                torch._foreach_lerp_(followers, leaders, 1 - kept)
            for follower, leader in zip(twin.buffers(), online.buffers(), strict=True):
                follower.copy_(leader)

    def _features(self, backbone: nn.Module, x: Tensor) -> Tensor:
        x, mask = self.inputs(x)
        features: Tensor = backbone(x, mask) if self._takes_mask else backbone(x)
        return features

    def _online(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self._features(self.backbone, x)
        projection = self.head(features)
        return features, projection, projection if self.predictor is None else self.predictor(projection)

    def _target(self, x: Tensor) -> tuple[Tensor]:
        assert self.twin is not None
        return (self.twin["head"](self._features(self.twin["backbone"], x)),)

    def _each(self, views: Sequence[Tensor], run: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Any]:
        """Give run(view) for every view, views of equal shape in one pass where `joint` says so."""
        if not self.joint:
            return [run(view) for view in views]
        alike: dict[torch.Size, list[int]] = {}
        for index, view in enumerate(views):
            alike.setdefault(view.shape[1:], []).append(index)
        results: list[Any] = [None] * len(views)
        for indices in alike.values():
            sizes = [len(views[index]) for index in indices]
            # (N, F) and (H, N, D) alike have the batch as the last axis but one.
            together = run(torch.cat([views[index] for index in indices]))
            split = [torch.split(output, sizes, dim=-2) for output in together]
            for index, outputs in zip(indices, zip(*split, strict=True), strict=True):
                results[index] = outputs
        return results


def build_encoder(
    backbone: Part | nn.Module,
    head: Part = "mlp",
    *,
    shape: Sequence[int],
    kind: Kind,
    inputs: ImageInputs | SeriesInputs,
    predictor: Part | None = None,
    momentum: float | None = None,
    momentum_end: float = 1.0,
    joint: bool = True,
) -> Encoder:
    """Give the encoder of these parts, each as wide as the one before it gives.

    Args:
        backbone: a part as `build_backbone` takes it, or a network.
        head: a part of HEADS.
        shape: (C, H, W) of images, (C, L) of series.
        kind: image or series.
        inputs: as for `Encoder`.
        predictor: a part of HEADS; it gives as many dimensions as the head, also where it does not say `out`.
        momentum: as for `Encoder`.
        momentum_end: as for `Encoder`.
        joint: as for `Encoder`.
    """
    network = build_backbone(backbone, shape, kind)
    width = feature_width(network, shape)
    projection = HEADS.build(head, where="encoder.head", width=width)
    embedding = output_of_zeros(projection, (2, width), "encoder.head").shape
    predict = None
    if predictor is not None:
        if len(embedding) != 2:
            raise InputError("encoder.predictor: a predictor follows one head; take it away, or the multi_head.")
        dimensions = embedding[-1]
        predict = HEADS.build(predictor, where="encoder.predictor", width=dimensions, out=dimensions)
        predicted = output_of_zeros(predict, (2, dimensions), "encoder.predictor").shape
        if predicted != embedding:
            raise InputError(
                f"encoder.predictor must give as many dimensions as the head, {dimensions}; got {predicted[-1]}."
            )
    return Encoder(
        network,
        projection,
        inputs=inputs,
        predictor=predict,
        momentum=momentum,
        momentum_end=momentum_end,
        joint=joint,
        width=width,
    )
