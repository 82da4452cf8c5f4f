"""Data sets of images and of series: from a path or a name to checked and split samples with their index.

A reader turns one format into a `Collection` (items, names, columns); `assemble` labels, splits and measures it.

- source.py: `open_data` chooses the reader by name or file ending (`_read_source`). To add a format, write a function
  that returns a `Collection`, call it there, and describe it in SOURCES.
- folders.py (image folders), arrays.py (.npz, .npy), series_files.py (.csv, .ts), named.py (digits, aeon,
  torchvision): the readers; images.py (pixels), tables.py (label tables), series.py (padding, gaps): what they share.
- collection.py, assemble.py, splitting.py: from a reader's result to `Data`; dataset.py: `Data`, `Samples`, `Batch`.
- loader.py: the training loader and the registry SAMPLERS. To add a sampler, write a class with `positions` and
  `@SAMPLERS.register(name)` there.

Example:
    >>> SOURCES["digits"]
    "scikit-learn's 1,797 handwritten digits"
"""

from contrast.data.dataset import Batch, Data, Samples, duplicates, leaks
from contrast.data.source import SOURCES, open_data

__all__ = ["SOURCES", "Batch", "Data", "Samples", "duplicates", "leaks", "open_data"]
