"""Small labelled data: classes are noisy clouds of 4 x 4 grey images."""

from collections.abc import Callable

import numpy as np
import pytest

from contrast.data.dataset import ArrayItems, Data, Samples


def clouds(
    *, classes: int = 3, train: int = 90, test: int = 30, noise: float = 1.0, seed: int = 0, items: type = ArrayItems
) -> Data:
    generator = np.random.default_rng(seed)
    target = np.arange(train + test) % classes
    centres = generator.normal(size=(classes, 1, 4, 4))
    x = (centres[target] + noise * generator.normal(size=(train + test, 1, 4, 4))).astype(np.float32)
    names = tuple(f"class {label}" for label in range(classes))
    store = items(x)

    def split(rows: np.ndarray) -> Samples:
        return Samples(
            store,
            rows,
            target=target[rows].copy(),
            group=rows,
            columns={},
            names=[f"x[{row}]" for row in rows],
            classes=names,
        )

    return Data(
        kind="image",
        source="clouds",
        shape=(1, 4, 4),
        classes=names,
        train=split(np.arange(train)),
        validation=np.arange(train) % 5 == 4,
        test=split(np.arange(train, train + test)),
        value_range=(float(x.min()), float(x.max())),
        mean=np.full(1, x.mean()),
        std=np.full(1, x.std()),
        fingerprint={},
        notes=(),
        split_by=None,
    )


@pytest.fixture
def make_data() -> Callable[..., Data]:
    return clouds
