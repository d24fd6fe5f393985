import io
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from twins_hf.data import check_examples, load_segmentation_data, read_example
from twins_hf.data.loading import read_training_example, undecoded


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


@pytest.fixture
def ade20k_folder(tmp_path):
    """The layout of ADEChallengeData2016, with one training and one validation image."""
    folder = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        save(np.full((20, 30, 3), 90, np.uint8), folder / "images" / split / f"ADE_{split}_1.jpg")
        save(
            np.tile(np.arange(0, 150, 5, dtype=np.uint8), (20, 1)),
            folder / "annotations" / split / f"ADE_{split}_1.png",
        )
    rows = [f"{i}\t0.1\t1\t1\tthing {i}, object {i} " for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows) + "\n")
    return folder


def examples(data, split):
    rows = undecoded(data.splits[split])
    return [read_example(rows[index], index, data.do_reduce_labels) for index in range(len(rows))]


def test_ade20k_is_known_by_its_layout(ade20k_folder):
    data = load_segmentation_data(str(ade20k_folder))
    assert data.do_reduce_labels
    assert len(data.id2label) == 150 and data.id2label[0] == "thing 1, object 1"
    (example,) = examples(data, "validation")
    assert example.name.endswith("images/validation/ADE_validation_1.jpg")
    assert example.labels[0].tolist() == [255, *range(4, 149, 5)]


def test_a_folder_of_images_and_masks_needs_only_class_names(image_folder):
    data = load_segmentation_data(str(image_folder))
    assert not data.do_reduce_labels
    assert data.id2label == {0: "red", 1: "green", 2: "blue"}
    assert [len(data.splits[split]) for split in ("train", "validation")] == [4, 2]
    for split in data.splits:
        check_examples(data, split)
        for example in examples(data, split):
            assert example.labels.shape == (example.image.height, example.image.width)
            assert set(np.unique(example.labels)) <= {0, 1, 2, 255}


@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_without_split_folders_a_share_is_kept_for_validation(image_folder, tmp_path, masks):
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "images" / "training", flat / "images")
    shutil.copytree(image_folder / "annotations" / "training", flat / masks)
    shutil.copy(image_folder / "id2label.json", flat)
    data = load_segmentation_data(str(flat), train_val_split=0.25)
    assert [len(data.splits[split]) for split in ("train", "validation")] == [3, 1]
    names = {example.name for split in data.splits for example in examples(data, split)}
    assert len(names) == 4


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_tables_with_other_column_and_split_names_hold_the_same_examples(image_folder, tmp_path, form):
    expected = load_segmentation_data(str(image_folder))
    tables = DatasetDict(
        {
            new: Dataset.from_list(
                [{"photo": row["image"], "annotation": row["label"], "extra": 1} for row in expected.splits[split]],
                features=Features({"photo": Image(), "annotation": Image(), "extra": Value("int64")}),
            )
            for split, new in (("train", "train"), ("validation", "test"))
        }
    )
    folder = tmp_path / "tables"
    if form == "parquet":
        for split, table in tables.items():
            (folder / "data").mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    else:
        tables.save_to_disk(folder)
    shutil.copy(image_folder / "id2label.json", folder)
    data = load_segmentation_data(
        str(folder), image_column_name="photo", label_column_name="annotation", validation_split_name="test"
    )
    assert data.id2label == expected.id2label
    for split in ("train", "validation"):
        check_examples(data, split)
        for ours, theirs in zip(examples(data, split), examples(expected, split), strict=True):
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_array_equal(np.asarray(ours.image), np.asarray(theirs.image))

    with pytest.raises(ValueError, match="no column 'image'; it has .*photo"):
        load_segmentation_data(str(folder))
    columns = {"image_column_name": "photo", "label_column_name": "annotation"}
    with pytest.raises(ValueError, match="no split 'val'; it has "):
        load_segmentation_data(str(folder), validation_split_name="val", **columns)
    with pytest.raises(ValueError, match="no split 'dev'; it has "):
        load_segmentation_data(
            str(folder), image_column_name="photo", label_column_name="annotation", train_split_name="dev"
        )


def test_class_names_may_come_from_another_file(image_folder, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"0": "a", "1": "b", "2": "c", "3": "d"}))
    assert load_segmentation_data(str(image_folder), id2label=str(names)).id2label[3] == "d"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "a", "2": "b"}', r"class ids must run from 0 without a gap.*\[0, 2\]"),
        ('["a", "b"]', "class names must be JSON"),
        ("{", "class names must be JSON"),
        ('{"0": "a"}', ".*at least two"),
    ],
)
def test_bad_class_names_are_refused_by_file(image_folder, content, message):
    (image_folder / "id2label.json").write_text(content)
    with pytest.raises(ValueError, match=f"id2label.json: {message}"):
        load_segmentation_data(str(image_folder))


def test_missing_class_names_are_refused(image_folder):
    (image_folder / "id2label.json").unlink()
    with pytest.raises(ValueError, match="photos: class names are missing: it has no id2label.json"):
        load_segmentation_data(str(image_folder))


def test_a_cut_class_list_of_ade20k_is_refused(ade20k_folder):
    path = ade20k_folder / "objectInfo150.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:100]))
    with pytest.raises(ValueError, match="objectInfo150.txt: 150 classes are expected.*there are 99"):
        load_segmentation_data(str(ade20k_folder))


def test_a_missing_mask_is_named(image_folder):
    (image_folder / "annotations" / "training" / "photo_2.png").unlink()
    with pytest.raises(ValueError, match=r"training/photo_2.png: there is no mask.*1 of 4 images"):
        load_segmentation_data(str(image_folder))


def test_an_empty_folder_is_named(image_folder, tmp_path):
    for path in (image_folder / "images" / "validation").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="images/validation: there are no images"):
        load_segmentation_data(str(image_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty.*neither images/ nor parquet"):
        load_segmentation_data(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="nowhere.*no such folder"):
        load_segmentation_data(str(tmp_path / "nowhere"))


def test_a_folder_without_masks_is_named(image_folder):
    shutil.rmtree(image_folder / "annotations")
    with pytest.raises(ValueError, match="there is no folder of masks"):
        load_segmentation_data(str(image_folder))


def problem_of(folder, split="train"):
    with pytest.raises(ValueError) as caught:
        check_examples(load_segmentation_data(str(folder)), split)
    return str(caught.value)


def test_a_corrupt_image_is_named_and_a_mended_one_is_read_again(image_folder):
    path = image_folder / "images" / "training" / "photo_1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "1 of 4 examples of the train split cannot be used" in problem_of(image_folder)
    assert "photo_1.png: cannot be read as an image" in problem_of(image_folder)
    path.write_bytes(whole)
    check_examples(load_segmentation_data(str(image_folder)), "train")


def test_unusable_training_files_can_be_left_out_and_are_named(image_folder, caplog):
    for kind, name in (("images", "photo_1.png"), ("annotations", "photo_3.png")):
        path = image_folder / kind / "training" / name
        path.write_bytes(path.read_bytes()[:60])
    data = load_segmentation_data(str(image_folder))
    with caplog.at_level("WARNING", "twins_hf"):
        check_examples(data, "train", skip_corrupt=True)
    assert [Path(example.name).name for example in examples(data, "train")] == ["photo_0.png", "photo_2.png"]
    (record,) = caplog.records
    assert record.message.startswith("2 of 4 examples of the train split cannot be used and are left out:")
    assert "images/training/photo_1.png: cannot be" in record.message
    assert "annotations/training/photo_3.png: cannot be" in record.message
    check_examples(data, "train")


def test_a_validation_split_is_never_cut_nor_a_training_split_to_nothing(image_folder):
    for path in (
        *(image_folder / "images").glob("training/*"),
        image_folder / "images" / "validation" / "photo_0.png",
    ):
        path.write_bytes(b"")
    data = load_segmentation_data(str(image_folder))
    with pytest.raises(
        ValueError, match="1 of 2 examples of the validation split cannot be used:\n.*photo_0.png: cann"
    ):
        check_examples(data, "validation", skip_corrupt=True)
    with pytest.raises(ValueError, match="4 of 4 examples of the train split cannot be used:\n"):
        check_examples(data, "train", skip_corrupt=True)


def test_large_splits_are_checked_by_several_processes(image_folder, monkeypatch):
    data, asked = load_segmentation_data(str(image_folder)), []
    true_map = Dataset.map
    monkeypatch.setattr(
        Dataset,
        "map",
        lambda rows, *args, num_proc, **kwargs: asked.append(num_proc) or true_map(rows, *args, **kwargs),
    )
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    check_examples(data, "train")
    monkeypatch.setattr("twins_hf.data.loading.ROWS_FOR_SEVERAL_PROCESSES", 4)
    check_examples(data, "train")
    check_examples(data, "train", num_proc=3)
    check_examples(data, "validation")
    assert asked == [None, 8, 3, None]


def test_a_label_out_of_range_is_named_with_its_file(image_folder):
    save(np.full((40, 70), 200, np.uint8), image_folder / "annotations" / "training" / "photo_0.png")
    problem = problem_of(image_folder)
    assert "annotations/training/photo_0.png: the mask holds the value 200" in problem
    assert "with 3 classes it may hold 0 to 2, and 255" in problem


def test_a_label_beyond_ade20ks_150_points_to_the_full_release(ade20k_folder):
    save(np.full((20, 30), 200, np.uint8), ade20k_folder / "annotations" / "training" / "ADE_training_1.png")
    problem = problem_of(ade20k_folder)
    assert "holds the value 200, but with 150 classes it may hold 1 to 150, and 0 for unlabelled" in problem
    assert "full ADE20K release" in problem and "ADEChallengeData2016" in problem


def test_a_mask_of_another_size_is_named_with_both_sizes(image_folder):
    save(np.zeros((10, 12), np.uint8), image_folder / "annotations" / "validation" / "photo_1.png")
    problem = problem_of(image_folder, "validation")
    assert "images/validation/photo_1.png is 61x48 pixels but its mask" in problem and "is 12x10" in problem


def test_a_coloured_mask_is_named(image_folder):
    save(np.zeros((40, 70, 3), np.uint8), image_folder / "annotations" / "training" / "photo_0.png")
    assert "annotations/training/photo_0.png: a segmentation map must hold one integer" in problem_of(image_folder)


def test_palette_masks_hold_their_indices(image_folder):
    path = image_folder / "annotations" / "training" / "photo_0.png"
    mask = PIL.Image.open(path)
    expected = np.asarray(mask)
    coloured = PIL.Image.fromarray(expected, mode="P")
    coloured.putpalette([10, 20, 30] * 256)
    coloured.save(path)
    np.testing.assert_array_equal(examples(load_segmentation_data(str(image_folder)), "train")[0].labels, expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [None, 6])
def test_training_reads_the_pixels_and_labels_that_evaluation_reads(mode, subsampling, orientation):
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)).convert(mode)
    mask = PIL.Image.fromarray(rng.integers(0, 256, (37, 53) if orientation is None else (53, 37), dtype=np.uint8))
    exif = PIL.Image.Exif()
    if orientation is not None:
        exif[PIL.ExifTags.Base.Orientation] = orientation
    row = {}
    for column, picture, form in (("image", image, "JPEG"), ("label", mask, "PNG")):
        buffer = io.BytesIO()
        more = {"subsampling": subsampling, "exif": exif} if form == "JPEG" else {}
        picture.save(buffer, form, **more)
        row[column] = {"bytes": buffer.getvalue(), "path": None}
    for do_reduce_labels in (False, True):
        found, expected = (read(row, 0, do_reduce_labels) for read in (read_training_example, read_example))
        np.testing.assert_array_equal(found.pixels.transpose(1, 2, 0), np.asarray(expected.image.convert("RGB")))
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert found.name == expected.name == "example 0"


def test_training_reads_every_kind_of_png_mask_as_evaluation_does():
    values = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    image = io.BytesIO()
    PIL.Image.new("RGB", (30, 20)).save(image, "JPEG")
    masks = {"plain": {}, "transparent": {"transparency": 7}, "of four bits": {"bits": 4}, "turned": {"exif": exif}}
    for kind, more in masks.items():
        mask = PIL.Image.fromarray(values // 16 if kind == "of four bits" else values)
        if kind == "of four bits":
            mask = mask.convert("P")
        if kind == "turned":
            mask = mask.transpose(PIL.Image.Transpose.ROTATE_90)
        buffer = io.BytesIO()
        mask.save(buffer, "PNG", **more)
        row = {"image": {"bytes": image.getvalue(), "path": None}, "label": {"bytes": buffer.getvalue(), "path": None}}
        found, expected = (read(row, 0, True) for read in (read_training_example, read_example))
        np.testing.assert_array_equal(found.labels, expected.labels, err_msg=kind)


def test_training_names_a_cut_image_as_evaluation_does():
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(buffer, "JPEG")
    content = buffer.getvalue()
    for broken in (content[:-200], content[:50], b""):
        row = {"image": {"bytes": broken, "path": "a.jpg"}, "label": {"bytes": b"", "path": "a.png"}}
        for read in (read_training_example, read_example):
            with pytest.raises(ValueError, match="^a.jpg: cannot be read as an image"):
                read(row, 0, False)


def test_the_generated_set_loads_by_name():
    data = load_segmentation_data("scenes")
    assert data.do_reduce_labels and set(data.splits) == {"train", "validation"}
    assert read_example(undecoded(data.splits["train"])[0], 0, True).labels.dtype == np.int64
