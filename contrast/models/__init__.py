"""Backbones, heads and the encoder that joins them; nothing here knows a loss."""

from contrast.models.backbones import BACKBONES, build_backbone, feature_width
from contrast.models.batch_norm import synchronise
from contrast.models.encoder import Encoder, Projections, build_encoder
from contrast.models.heads import HEADS
from contrast.models.inputs import ImageInputs, SeriesInputs
from contrast.models.weights import load_backbone, load_weights, save_backbone

__all__ = [
    "BACKBONES",
    "HEADS",
    "Encoder",
    "ImageInputs",
    "Projections",
    "SeriesInputs",
    "build_backbone",
    "build_encoder",
    "feature_width",
    "load_backbone",
    "load_weights",
    "save_backbone",
    "synchronise",
]
