"""Small files and settings with which a full run takes a second."""

import numpy as np

QUICK = [
    "encoder.backbone={name: small_conv, width: 4, blocks: [1]}",
    "encoder.head={name: mlp, hidden: 8, out: 8}",
    "batch_size=16",
    "evaluate.protocols=[knn, few_labels]",
    "evaluate.labels_per_class=3",
    "logger=none",
]
"""Settings for images."""
QUICK_SERIES = [*QUICK, "encoder.backbone={name: resnet1d, width: 4, blocks: [1]}"]


def images(path, items=60, side=8, classes=3, seed=0, dtype=np.uint8):
    """Write an .npz of grey images whose class is the position of a bright bar."""
    random = np.random.default_rng(seed)
    y = np.arange(items) % classes
    x = random.integers(0, 80, (items, side, side))
    for row, label in enumerate(y):
        x[row, :, label * 2 : label * 2 + 2] += 150
    np.savez(path, x=x.astype(dtype), y=y)
    return path


def series(path, items=60, length=24, classes=3, seed=0):
    """Write a wide CSV whose class is the frequency."""
    random = np.random.default_rng(seed)
    time = np.arange(length)
    lines = ["label," + ",".join(f"t{step}" for step in time)]
    for row in range(items):
        label = row % classes
        wave = np.sin(2 * np.pi * (label + 1) * time / length + random.uniform(0, 6)) + random.normal(0, 0.1, length)
        lines.append(f"class{label}," + ",".join(f"{value:.4f}" for value in wave))
    path.write_text("\n".join(lines) + "\n")
    return path
