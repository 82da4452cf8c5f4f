import numpy as np
import pytest
import torch

from contrast.report.samples import LARGEST_IMAGE, MOST_FOUND, page_arrays
from tests.report.fake_runs import split


def arrays_of(train, test, train_features, test_features, **more):
    given = {"kind": "image", "classes": ["a", "b", "c"], "prepare": lambda raw: raw.float() / 255} | more
    return page_arrays(
        train=train, test=test, train_features=train_features, test_features=test_features, **given
    )  # fmt: skip


def images(count, name, seed=0, side=8, channels=1):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    return split(pixels, np.arange(count) % 3, name)


def test_neighbours_are_the_nearest_of_a_plain_loop():
    random = np.random.default_rng(1)
    train_features, test_features = random.normal(size=(40, 5)), random.normal(size=(12, 5))
    found = arrays_of(
        images(40, "train"), images(12, "test", 1), torch.tensor(train_features), torch.tensor(test_features)
    )
    for (query, *near), similarity in zip(found["neighbours"], found["similarity"], strict=True):
        row = int(str(found["x_name"][query]).removeprefix("test[").removesuffix("]"))
        a = test_features[row]
        cosine = [float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for b in train_features]
        order = sorted(range(40), key=lambda i: -cosine[i])[:5]
        assert [str(found["x_name"][i]) for i in near] == [f"train[{i}]" for i in order]
        assert similarity == pytest.approx([cosine[i] for i in order], abs=1e-6)


def test_pictures_labels_and_names_belong_together():
    train, test = images(40, "train"), images(12, "test", 1)
    found = arrays_of(train, test, torch.randn(40, 5), torch.randn(12, 5))
    for x, target, name in zip(found["x"], found["x_target"], found["x_name"], strict=True):
        source, row = str(name).removesuffix("]").split("[")
        samples = {"train": train, "test": test}[source]
        assert (x * 255).round() == pytest.approx(samples.x(np.array([int(row)]))[0].numpy())
        assert target == samples.target[int(row)]


def test_queries_are_spread_over_the_classes():
    test = split(np.zeros((30, 1, 4, 4), dtype=np.uint8), [0] * 20 + [-1] * 6 + [1, 1, 2, 2], "test")
    found = arrays_of(images(9, "train", side=4), test, torch.randn(9, 5), torch.randn(30, 5))
    assert sorted(found["x_target"][found["neighbours"][:, 0]]) == [0, 0, 1, 1, 2, 2]


def test_without_samples_neither_pictures_nor_names_are_stored():
    found = arrays_of(images(9, "train"), images(9, "test"), torch.randn(9, 5), torch.randn(9, 5), samples=False)
    assert set(found) == {"kind", "split", "classes", "features", "target"}


def test_without_a_test_split_neighbours_are_other_train_samples():
    train = images(9, "train")
    found = arrays_of(train, train.subset(np.zeros(0, dtype=int)), torch.randn(9, 5), torch.zeros(0, 5))
    assert found["split"] == "train"
    for query, *near in found["neighbours"]:
        assert found["x_name"][query] not in [found["x_name"][i] for i in near]


def test_large_images_and_long_series_become_small():
    features, sizes = torch.randn(3, 4), {"side": 300, "channels": 5}
    found = arrays_of(images(3, "a", **sizes), images(3, "b", **sizes), features, features)
    assert found["x"].shape[1:] == (3, LARGEST_IMAGE, LARGEST_IMAGE)
    assert found["channels"] == 5
    long, short = np.random.default_rng(0).normal(size=(2, 4, 20, 5000)).astype(np.float32)
    short = short[:, :, :4000]
    found = arrays_of(
        split(long, [0] * 4, "a"), split(short, [0] * 4, "b"), torch.randn(4, 3), torch.randn(4, 3),
        kind="series", prepare=lambda raw: raw,
    )  # fmt: skip
    assert found["x"].shape[1:] == (16, 1000)
    # The shorter split keeps its time axis: a fifth of it is nothing.
    assert np.isnan(found["x"][0, 0, 800:]).all()
    assert np.isfinite(found["x"][0, 0, :800]).all()


def test_the_same_seed_gives_the_same_arrays():
    features = torch.randn(9, 5)
    first, second = (arrays_of(images(9, "train"), images(9, "test"), features, features) for _ in range(2))
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }


def test_items_of_the_findings_are_drawn_up_to_a_limit():
    train, features = images(60, "train"), torch.randn(60, 5)
    given = (train, train.subset(np.arange(9)), features, features[:9])
    found = arrays_of(*given, found=train.subset(np.array([7, 2])))
    assert found["found_sample"].tolist() == [7, 2]
    assert (found["found_x"] * 255).round() == pytest.approx(train.x(np.array([7, 2])).numpy())
    assert len(arrays_of(*given, found=train)["found_x"]) == MOST_FOUND
    assert "found_x" not in arrays_of(*given, found=train, samples=False)
    assert "found_x" not in arrays_of(*given, found=train.subset(np.arange(0)))
