"""Data sets of images and of series: from a path or a name to checked, split samples that know their index."""

from contrast.data.dataset import Batch, Data, Samples, duplicates, leaks
from contrast.data.source import SOURCES, open_data

__all__ = ["SOURCES", "Batch", "Data", "Samples", "duplicates", "leaks", "open_data"]
