"""Contrastive representation learning for images and time series.

Everything is imported when it is first used: the losses need torch and numpy, the functions that train and evaluate
need the extra `train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrast.api import evaluate, load, pretrain
    from contrast.core.distributed import local, process_group, set_process_group
    from contrast.core.embeddings import Embeddings
    from contrast.core.pairs import Pairs, all_pairs, cross_pairs, two_sided
    from contrast.core.registry import InputError, Registry
    from contrast.losses import LOSSES, PairLoss

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "Embeddings",
    "InputError",
    "PairLoss",
    "Pairs",
    "Registry",
    "all_pairs",
    "cross_pairs",
    "evaluate",
    "load",
    "local",
    "pretrain",
    "process_group",
    "set_process_group",
    "two_sided",
]

_HOMES = {
    "contrast.api": ("evaluate", "load", "pretrain"),
    "contrast.core.distributed": ("local", "process_group", "set_process_group"),
    "contrast.core.embeddings": ("Embeddings",),
    "contrast.losses": ("LOSSES", "PairLoss"),
    "contrast.core.pairs": ("Pairs", "all_pairs", "cross_pairs", "two_sided"),
    "contrast.core.registry": ("InputError", "Registry"),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'contrast' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if home != "contrast.api":
            raise
        raise ImportError(
            f"contrast.{name} needs the package '{error.name}': pip install \"contrast-learning[train]\""
        ) from error
