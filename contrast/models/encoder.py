"""The encoder: inputs, backbone and head, optionally with a predictor and a momentum twin."""

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
    """The arguments of a loss for V views, and the features before the head.

    Args:
        z: V times (N, D), or (H, N, D) for H heads: the anchors.
        targets: V times the same without gradient, momentum keys or stop-gradient projections; None if there are none.
        features: V times (N, F), before the head.

    Example:
        >>> projections = Projections(z=list(torch.randn(2, 8, 4)), targets=None, features=list(torch.randn(2, 8, 16)))
        >>> len(projections.z), projections.features[0].shape
        (2, torch.Size([8, 16]))
    """

    z: list[Tensor]
    targets: list[Tensor] | None
    features: list[Tensor]


class Encoder(nn.Module):
    """A backbone and its head, from raw data to features and to the embeddings that a loss compares.

    - neither predictor nor momentum: z = head(features), no targets (SimCLR, SupCon, CACR).
    - predictor: z = predictor(p) with p = head(features), and targets = p without gradient (SimSiam).
    - momentum: targets come from a twin, a momentum copy of backbone and head (MoCo). It is in training mode with the
      rest, so that its BatchNorm normalises by the batch, as in MoCo v3; its parameters are an exponential moving
      average, its buffers are copied. It belongs to the state dict, not to the optimiser.

    Views of equal shape are encoded as one batch, which is faster and gives them common BatchNorm statistics, as in
    SimCLR; with `joint=False` each view is encoded separately, as in SimSiam and MoCo.

    Args:
        backbone: (N, C, H, W), or (N, C, L) with an optional argument `mask` (N, L), to (N, F).
        head: (N, F) to (N, D) or (H, N, D).
        inputs: prepares raw data, and turns views into the backbone's input.
        predictor: (N, D) to (N, D).
        momentum: of the twin's moving average, in [0, 1]; None: no twin.
        momentum_end: the momentum at the end of training, reached along a cosine.
        joint: encode views of equal shape in one pass.
        width: F; found by `build_encoder`.

    Example:
        >>> inputs = ImageInputs((0, 255), mean=[0.5], std=[0.25])
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        >>> encoder = Encoder(backbone, nn.Linear(16, 4), inputs=inputs, width=16)
        >>> encoder(torch.rand(2, 8, 1, 8, 8)).z[0].shape, encoder.encode(torch.zeros(8, 1, 8, 8)).shape
        (torch.Size([8, 4]), torch.Size([8, 16]))
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
                raise InputError(f"encoder.{name} is the momentum of the twin per step, in [0, 1]; got {value}.")
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
            raise InputError("this encoder was constructed without `width`; pass it, or use build_encoder.")
        return self._width

    def prepare(self, raw: Tensor) -> Tensor:
        """Return the input of views: float32, images in [0, 1], series standardised with NaN where unobserved."""
        return self.inputs.prepare(raw)

    def features(self, x: Tensor) -> Tensor:
        """Return the features (N, F) of prepared data, without the head."""
        return self._features(self.backbone, x)

    def encode(self, raw: Tensor) -> Tensor:
        """Return the features (N, F) of raw data."""
        return self.features(self.prepare(raw))

    def forward(self, views: Sequence[Tensor]) -> Projections:
        """Return anchors, targets and features of each view, a prepared batch (N, ...)."""
        encoded = self._map_views(views, self._online)
        targets = None
        if self.twin is not None:
            with torch.no_grad():
                targets = [target for (target,) in self._map_views(views, self._target)]
        elif self.predictor is not None:
            targets = [projection.detach() for _, projection, _ in encoded]
        return Projections([z for _, _, z in encoded], targets, [features for features, _, _ in encoded])

    @torch.no_grad()
    def update_twin(self, progress: float) -> None:
        """Update the twin's moving average, after each optimiser step; does nothing without a twin.

        Args:
            progress: finished share of training, in [0, 1]; the momentum rises along a cosine from `momentum` to
                `momentum_end`.
        """
        if self.twin is None or self.momentum is None:
            return
        momentum = self.momentum_end - (self.momentum_end - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for name, online in (("backbone", self.backbone), ("head", self.head)):
            twin = self.twin[name]
            averages = [average.detach() for average in twin.parameters()]
            parameters = [parameter.detach() for parameter in online.parameters()]
            if averages:
                torch._foreach_lerp_(averages, parameters, 1 - momentum)
            for copied, buffer in zip(twin.buffers(), online.buffers(), strict=True):
                copied.copy_(buffer)

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

    def _map_views(self, views: Sequence[Tensor], run: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Any]:
        """Return run(view) for every view; if `joint`, views of equal shape in one pass."""
        if not self.joint:
            return [run(view) for view in views]
        by_shape: dict[torch.Size, list[int]] = {}
        for index, view in enumerate(views):
            by_shape.setdefault(view.shape[1:], []).append(index)
        results: list[Any] = [None] * len(views)
        for indices in by_shape.values():
            sizes = [len(views[index]) for index in indices]
            joined = run(torch.cat([views[index] for index in indices]))
            # The batch is the last axis but one of both (N, F) and (H, N, D).
            split = [torch.split(output, sizes, dim=-2) for output in joined]
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
    """Return the encoder of these parts, each built for the output width of the one before it.

    Args:
        backbone: as for `build_backbone`.
        head: a part of HEADS.
        shape: (C, H, W) of images, (C, L) of series.
        kind: image or series.
        inputs: as for `Encoder`.
        predictor: a part of HEADS; its `out` is the head's.
        momentum: as for `Encoder`.
        momentum_end: as for `Encoder`.
        joint: as for `Encoder`.

    Example:
        >>> inputs = ImageInputs((0, 255), mean=[0.5], std=[0.25])
        >>> encoder = build_encoder("small_conv", shape=(1, 8, 8), kind="image", inputs=inputs)
        >>> encoder([torch.rand(4, 1, 8, 8)]).z[0].shape
        torch.Size([4, 128])
    """
    network = build_backbone(backbone, shape, kind)
    width = feature_width(network, shape)
    projection = HEADS.build(head, where="encoder.head", width=width)
    embedding = output_of_zeros(projection, (2, width), "encoder.head").shape
    predictor_network = None
    if predictor is not None:
        if len(embedding) != 2:
            raise InputError("encoder.predictor: a predictor follows one head; remove it, or the multi_head.")
        dimensions = embedding[-1]
        predictor_network = HEADS.build(predictor, where="encoder.predictor", width=dimensions, out=dimensions)
        predicted = output_of_zeros(predictor_network, (2, dimensions), "encoder.predictor").shape
        if predicted != embedding:
            raise InputError(
                f"encoder.predictor must have as many output dimensions as the head, {dimensions}; got {predicted[-1]}."
            )
    return Encoder(
        network,
        projection,
        inputs=inputs,
        predictor=predictor_network,
        momentum=momentum,
        momentum_end=momentum_end,
        joint=joint,
        width=width,
    )
