import numpy as np
import pytest
from PIL import Image

from contrast.core.registry import InputError
from contrast.data import open_data
from tests.data.writing import write_flat, write_image, write_lines


def class_folders(root, per_class=5, classes=("cat", "dog"), start=0):
    for number, name in enumerate(classes):
        for index in range(per_class):
            write_image(root / name / f"{index}.png", start + number * per_class + index)


def all_targets(data):
    return {
        name: (samples.classes[target] if target >= 0 else None)
        for samples in (data.train, data.test)
        for name, target in zip(samples.names, samples.target, strict=True)
    }


def test_class_folders_name_the_classes_and_the_pixels_are_the_files(tmp_path):
    class_folders(tmp_path)
    data = open_data(str(tmp_path))
    assert (data.kind, data.shape, data.classes, data.value_range) == ("image", (1, 8, 8), ("cat", "dog"), (0, 255))
    assert (len(data.train), len(data.test)) == (8, 2)
    assert all(name.startswith(label) for name, label in all_targets(data).items())
    for samples in (data.train, data.test):
        for name, pixels in zip(samples.names, samples.x(), strict=True):
            assert np.array_equal(pixels[0], np.asarray(Image.open(tmp_path / name)))


def test_a_label_table_may_list_a_part_of_the_images_and_has_further_columns(tmp_path):
    write_flat(tmp_path, 12)
    rows = [f"{index:02},{'ab'[index % 2]},s{index // 4}" for index in range(8)]
    write_lines(tmp_path / "labels.csv", "item,target,slide", *rows)
    data = open_data(str(tmp_path), splits={"test": 0.25}, positives="slide")
    targets = all_targets(data)
    assert targets["03.png"] == "b"
    assert targets["11.png"] is None
    assert len(data.test) == 2
    slide, group = data.train.columns["slide"], data.train.group
    assert len(set(group[slide == "s0"])) == 1
    assert len(set(group[slide == ""])) == 4
    assert any("does not list 4 of 12 files" in note for note in data.notes)


def test_a_flat_folder_without_a_table_has_no_labels(tmp_path):
    write_flat(tmp_path, 4)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test), data.classes) == (4, 0, ())
    assert set(data.train.target) == {-1}
    assert not data.validation.any()
    assert "There are no labels." in data.notes


def test_train_val_and_test_folders_are_the_split(tmp_path):
    for start, split in enumerate(("train", "val", "test")):
        class_folders(tmp_path / split, per_class=2, start=10 * start)
    data = open_data(str(tmp_path))
    assert sorted(data.test.names) == ["test/cat/0.png", "test/cat/1.png", "test/dog/0.png", "test/dog/1.png"]
    held_out = [name for name, held in zip(data.train.names, data.validation, strict=True) if held]
    assert all(name.startswith("val/") for name in held_out)
    assert len(held_out) == 4
    assert data.classes == ("cat", "dog")


def test_unlabelled_images_next_to_class_folders_are_in_train(tmp_path):
    class_folders(tmp_path)
    write_flat(tmp_path / "unlabelled", 3)
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert (data.train.target == -1).sum() == 3
    assert (data.test.target >= 0).all()


def test_a_table_labels_nested_folders_and_folders_are_a_column(tmp_path):
    for slide in range(6):
        write_flat(tmp_path / f"slide{slide}", 4)
    rows = [f"slide{slide}/{index:02}.png\t{index % 2}" for slide in range(6) for index in range(4)]
    write_lines(tmp_path / "labels.tsv", "file\tdiagnosis", *rows)
    data = open_data(str(tmp_path), split_by="folder")
    assert data.classes == ("0", "1")
    splits = [set(part.columns["folder"]) for part in (data.train.subset(~data.validation), data.test)]
    splits.append(set(data.train.subset(data.validation).columns["folder"]))
    assert all(splits)
    assert sum(map(len, splits)) == 6


def test_a_table_that_lists_images_is_a_source_too(tmp_path):
    write_flat(tmp_path, 10)
    table = write_lines(tmp_path / "mine.csv", "path,y", *(f"{index:02}.png,{index % 2}" for index in range(10)))
    assert open_data(str(table)).classes == ("0", "1")
    assert open_data(str(tmp_path), labels="mine.csv").fingerprint == open_data(str(table)).fingerprint


def test_with_a_table_of_other_columns_the_class_folders_are_the_labels(tmp_path):
    class_folders(tmp_path)
    rows = [f"{name}/{index}.png,p{index}" for name in ("cat", "dog") for index in range(5)]
    write_lines(tmp_path / "labels.csv", "item,patient", *rows)
    data = open_data(str(tmp_path), split_by="patient")
    assert data.classes == ("cat", "dog")
    assert not set(data.train.columns["patient"]) & set(data.test.columns["patient"])


def test_target_none_reads_without_labels(tmp_path):
    class_folders(tmp_path)
    assert open_data(str(tmp_path), target="none").classes == ()


def test_broken_images_are_counted_and_the_first_is_named(tmp_path):
    class_folders(tmp_path)
    content = (tmp_path / "dog" / "1.png").read_bytes()
    (tmp_path / "dog" / "1.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "dog" / "3.png").write_bytes(b"no image")
    message = r"expected 10 complete images; 2 files are broken, the first 'dog/1.png' \(.+\). Replace or remove"
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path))


def test_a_truncated_image_among_good_ones_is_named(tmp_path):
    write_flat(tmp_path, 3, width=32, height=32)
    content = (tmp_path / "01.png").read_bytes()
    (tmp_path / "01.png").write_bytes(content[: len(content) - 400])
    with pytest.raises(InputError, match=r"1 file is broken, '01.png'"):
        open_data(str(tmp_path))


def one_class(root):
    write_flat(root / "cat", 3)


def several_columns(root):
    write_flat(root, 3)
    write_lines(root / "labels.csv", "item,age,sex", "00,1,f")


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda root: None, {}, "expected image files .* the folder contains nothing"),
        (lambda root: (root / "a.pdf").write_text(""), {}, "the folder contains 1 other files, the first 'a.pdf'"),
        (one_class, {}, "expected two or more class folders; all 3 images are in the one folder 'cat'"),
        (several_columns, {}, "expected a column 'target' for the labels; got age, sex"),
        (several_columns, {"target": "ages"}, "data.target: .* has no column 'ages'. Did you mean 'age'?"),
        (several_columns, {"labels": "label.csv"}, "there is no 'label.csv'. Did you mean 'labels.csv'?"),
        (class_folders, {"split_by": "patient"}, "data.split_by: .* has no column 'patient'. It has: folder"),
        (class_folders, {"positives": "slide"}, "data.positives: .* has no column 'slide'"),
        (class_folders, {"size": 0}, "data.size must be a whole number of 1 or more; got 0"),
        (class_folders, {"channels": 7}, "data.channels: images of .* have 1 channels; got 7"),
        (class_folders, {"splits": {"tset": 0.2}}, "data.splits.tset: .* Did you mean 'test'?"),
        (class_folders, {"splits": {"test": 20}}, "data.splits.test must be a share .*; got 20"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(tmp_path, write, options, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path), **options)
