import sys

import numpy as np
import pytest
from PIL import Image

from contrast.core.registry import InputError
from contrast.data import open_data


def test_digits_are_small_grey_images_in_zero_to_one():
    data = open_data("digits")
    assert (data.kind, data.shape, data.value_range) == ("image", (1, 8, 8), (0, 1))
    assert len(data.train) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    assert len(set(data.train.sample) | set(data.test.sample)) == 1797


def test_sets_that_ship_with_aeon_are_read_without_network():
    leaf = open_data("aeon:OSULeaf")
    assert (leaf.shape, len(leaf.train), len(leaf.test), len(leaf.classes)) == ((1, 427), 200, 242, 6)
    vowels = open_data("aeon:JapaneseVowels")
    assert (vowels.shape, len(vowels.train), len(vowels.test), len(vowels.classes)) == ((12, 29), 270, 370, 9)
    assert np.isnan(vowels.train.x()[:, :, -1]).any()
    assert "Series are 7 to 29 steps long; the shorter are padded at the end." in vowels.notes


def test_the_error_for_an_unknown_archive_name_suggests_a_similar_one():
    with pytest.raises(InputError, match=r"no set 'OSULeav' .* Did you mean 'OSULeaf'?"):
        open_data("aeon:OSULeav")


def test_a_measured_quantity_is_refused_as_label():
    with pytest.raises(InputError, match="must be classes"):
        open_data("aeon:Covid3Month")


def test_without_aeon_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon", None)
    with pytest.raises(InputError, match=r'pip install "contrast-learning\[series\]"'):
        open_data("aeon:OSULeaf")


def test_a_torchvision_set_with_arrays_is_read_from_disk(tmp_path, monkeypatch):
    from torchvision import datasets

    class Tiny(datasets.VisionDataset):
        classes = ("no", "yes")

        def __init__(self, root, train=True):
            self.data = np.full((6, 5, 5, 3), 10 if train else 20, dtype=np.uint8)
            self.targets = [0, 1] * 3

        def __len__(self):
            return 6

    monkeypatch.setattr(datasets, "CIFAR10", Tiny)
    data = open_data("torchvision:CIFAR10")
    assert (data.shape, len(data.train), len(data.test), data.classes) == ((3, 5, 5), 6, 6, ("no", "yes"))
    assert (data.test.x() == 20).all()


def test_a_torchvision_set_of_files_is_decoded_with_its_labels(tmp_path, monkeypatch):
    from torchvision import datasets

    class Files(datasets.VisionDataset):
        def __init__(self, root, split="train", download=False):
            self._labels = [0, 1, 0, 1]

        def __getitem__(self, row):
            return Image.new("RGB", (10 + row, 12), (row, 0, 0)), self._labels[row]

        def __len__(self):
            return 4

    monkeypatch.setattr(datasets, "DTD", Files)
    data = open_data("torchvision:DTD")
    assert data.shape == (3, 12, 12)
    assert data.train.x()[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.test.target.tolist() == [0, 1, 0, 1]


def test_a_failed_download_of_a_torchvision_set_leaves_no_folder(tmp_path, monkeypatch):
    from torchvision import datasets

    class Unavailable(datasets.VisionDataset):
        def __init__(self, root, train=True, download=False):
            raise OSError("no route to host\nmore") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "MNIST", Unavailable)
    monkeypatch.setenv("CONTRAST_DATA", str(tmp_path / "new" / "folder"))
    with pytest.raises(InputError, match=r"could not be downloaded \(no route to host\)"):
        open_data("torchvision:MNIST")
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_an_unknown_torchvision_name_suggests_a_similar_one():
    with pytest.raises(InputError, match=r"no set 'Cifar10'. Did you mean 'CIFAR10'?"):
        open_data("torchvision:Cifar10")
