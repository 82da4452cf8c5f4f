"""Backbones, heads and the encoder that joins them; independent of losses.

- backbones.py: the registry BACKBONES and `build_backbone`. To add a network, write a class in image_networks.py or
  series_networks.py (constructor arguments = its options; `kinds` = the data it reads) and register it in
  backbones.py; a user's own is `backbone: "module:function"` or `@BACKBONES.register(name)` in a plugin.
- libraries.py: networks of timm and torchvision by name.
- heads.py: the registry HEADS. To add a head or predictor, write `@HEADS.register(name)` there.
- encoder.py: inputs, backbone, head, predictor and momentum twin in one module; inputs.py: scaling and masks.
- weights.py, checkpoints.py: saving and loading; batch_norm.py: masked and synchronised batch normalisation.

Example:
    >>> sorted(BACKBONES)
    ['dilated', 'resnet1d', 'small_conv', 'transformer1d']
    >>> HEADS.build({"name": "linear", "out": 32}, width=64)
    Linear(in_features=64, out_features=32, bias=True)
"""

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
