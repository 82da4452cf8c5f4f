"""Functions that write small data files for the tests."""

import numpy as np
from PIL import Image


def write_image(path, value=0, *, width=8, height=8, mode="L"):
    """Write an image of random pixels with the seed `value`, and return the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(value)
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}
    if mode == "I;16":
        pixels = generator.integers(0, 4000, (height, width), dtype=np.uint16)
    else:
        pixels = generator.integers(0, 256, (height, width, *bands[mode]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_flat(folder, count, **options):
    for index in range(count):
        write_image(folder / f"{index:02}.png", index, **options)


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def waves(count, channels=1, length=12, seed=0):
    return np.random.default_rng(seed).normal(size=(count, channels, length)).astype(np.float32)
