"""Contrastive representation learning for images and time series."""

from __future__ import annotations

import importlib
from typing import Any

from contrast.distributed import local
from contrast.embeddings import Embeddings
from contrast.losses import LOSSES, PairLoss
from contrast.pairs import Pairs, all_pairs, cross_pairs, two_sided
from contrast.registry import InputError, Registry

__version__ = "0.1.0"

_NEED_TRAIN = {"pretrain": "contrast.api", "load": "contrast.api", "evaluate": "contrast.api"}

__all__ = [
    "LOSSES",
    "Embeddings",
    "InputError",
    "PairLoss",
    "Pairs",
    "Registry",
    "all_pairs",
    "cross_pairs",
    "local",
    "two_sided",
]


def __getattr__(name: str) -> Any:
    """Import what needs an extra when it is first used."""
    if name not in _NEED_TRAIN:
        raise AttributeError(f"module 'contrast' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_NEED_TRAIN[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"contrast.{name} needs the package '{error.name}': pip install \"contrast-learning[train]\""
        ) from error
