"""Images with segmentation maps, loaded with `datasets`: ADE20K, any folder, the Hub, or the generated default set."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torchvision.io import decode_jpeg, decode_png
from transformers.utils import logging

from ..image_processing_pil_twins import IGNORE_INDEX, reduce_labels, segmentation_map_to_array, to_eight_bit
from .ade20k import download_ade20k
from .scenes import SCENE_CLASSES, load_scenes

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_FOLDERS = ("annotations", "masks", "labels")
SPLIT_FOLDERS = {"train": ("training", "train"), "validation": ("validation", "val")}
CLASS_FILE = "objectInfo150.txt"  # of ADE20K
ROWS_FOR_SEVERAL_PROCESSES = 2000
PNG_BIT_DEPTH = 24  # where a file says it
PNG_CHUNKS_PIL_MINDS = (b"eXIf", b"iTXt", b"tRNS")  # orientation and transparency


@dataclasses.dataclass
class SegmentationData:
    """
    A dataset's splits and the meaning of its labels.

    Attributes:
        name: What the dataset is called in reports.
        splits: `train` and `validation`, each with the columns `image` and `label` (and maybe `file_name`); a streamed
            training split is an `IterableDataset`.
        id2label: Name of each class id, 0 to the number of classes less one.
        do_reduce_labels: Whether the stored masks hold 0 for "unlabelled" and class ids from 1.
    """

    name: str
    splits: dict[str, Dataset | IterableDataset]
    id2label: dict[int, str]
    do_reduce_labels: bool


class SegmentationExample(NamedTuple):
    """One image, its labels (H, W), int64, class ids or 255, and the name to speak of it by."""

    image: PIL.Image.Image
    labels: np.ndarray
    name: str


class TrainingExample(NamedTuple):
    """RGB pixels (3, H, W), uint8; labels (H, W), integers, class ids or 255; the name to speak of them by."""

    pixels: np.ndarray
    labels: np.ndarray
    name: str


def load_segmentation_data(
    name: str = "scenes",
    config_name: str | None = None,
    image_column_name: str = "image",
    label_column_name: str = "label",
    train_split_name: str = "train",
    validation_split_name: str = "validation",
    train_val_split: float = 0.15,
    id2label: str | None = None,
    do_reduce_labels: bool | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> SegmentationData:
    """
    Loads a dataset by name.

    Args:
        name: `"scenes"`, the generated set; `"ade20k"`, the benchmark's archive, which is downloaded into the cache of
            `datasets`; a folder with `images/` and `annotations/` (or `masks/`, `labels/`), each
            split into `training/` and `validation/` or not, and either ADE20K's `objectInfo150.txt` or an
            `id2label.json`; a folder of parquet files or one written by `Dataset.save_to_disk`; or a Hub dataset id.
        config_name: Configuration of a Hub dataset.
        image_column_name, label_column_name, train_split_name, validation_split_name: Where a Hub or parquet dataset
            keeps images, masks and splits.
        train_val_split: Share of the training split that serves for validation where there is no such split.
        id2label: JSON file of class names by id, in place of the dataset's own.
        do_reduce_labels: Whether masks hold 0 for "unlabelled" and class ids from 1. By default true for ADE20K's
            layout and the generated set only.
        seed: Of the generated set, and of the split above.
        streaming: Whether the training split of a Hub or parquet dataset is an `IterableDataset` that is read as it is
            needed. The validation split is stored.

    Raises:
        `ValueError`: naming the file, folder, column or split that is missing or does not fit.
        `ConnectionError`: if ADE20K is to be downloaded and cannot be.
    """
    if name == "scenes" and not streaming:
        splits, names = load_scenes(seed=seed), dict(enumerate(SCENE_CLASSES))
        return SegmentationData(name, splits, names, do_reduce_labels=True)

    folder, is_ade20k = Path(name), False
    if streaming:
        splits = load_streamed_tables(name, config_name, validation_split_name)
    elif name == "ade20k" or (folder / "images").is_dir():
        folder = download_ade20k() if name == "ade20k" else folder
        splits = load_image_folder(folder)
        is_ade20k = (folder / CLASS_FILE).is_file() and not (folder / "id2label.json").is_file()
    elif folder.is_dir() or not is_hub_id(name):
        splits = load_local_tables(folder)
    else:
        splits = load_dataset(name, config_name)

    if is_ade20k and id2label is None:
        names = read_ade20k_classes(folder / CLASS_FILE)
    else:
        names = read_id2label(id2label or find_id2label(name))
    columns = {image_column_name: "image", label_column_name: "label"}
    splits = {
        split: choose_columns(splits, stored_name, columns, name)
        for split, stored_name in (("train", train_split_name), ("validation", validation_split_name))
        if stored_name in splits or stored_name != "validation"
    }
    if "validation" not in splits:
        logger.warning(f"{name} has no validation split: {train_val_split:.0%} of its training split serves for it.")
        parts = splits["train"].train_test_split(test_size=train_val_split, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    return SegmentationData(name, splits, names, is_ade20k if do_reduce_labels is None else do_reduce_labels)


def is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def load_local_tables(folder: Path) -> DatasetDict:
    """A folder of parquet files, or one that `save_to_disk` wrote."""
    if not folder.is_dir():
        raise ValueError(f"dataset_name={str(folder)!r}: there is no such folder.")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        splits = load_from_disk(str(folder))
        return splits if isinstance(splits, DatasetDict) else DatasetDict(train=splits)
    if not any(folder.rglob("*.parquet")):
        raise ValueError(f"dataset_name={str(folder)!r}: the folder has neither images/ nor parquet files.")
    return load_dataset(str(folder))


def load_streamed_tables(name: str, config_name: str | None, validation_split_name: str) -> dict:
    """Splits of a Hub dataset or a folder of parquet files, to be read as needed; the one for validation is stored."""
    is_folder = Path(name).is_dir()
    if name in ("scenes", "ade20k") or not (any(Path(name).rglob("*.parquet")) if is_folder else is_hub_id(name)):
        raise ValueError(f"dataset_name={name!r} cannot be streamed: it must be a Hub dataset or a folder of parquet.")
    builder = load_dataset_builder(name, config_name)
    splits = dict(builder.as_streaming_dataset())
    if validation_split_name not in splits:
        raise ValueError(
            f"{name} has no split {validation_split_name!r} but {', '.join(splits)}: a streamed dataset needs a "
            "validation split of its own."
        )
    files = {validation_split_name: list(builder.config.data_files[validation_split_name])}
    features = splits[validation_split_name].features
    splits[validation_split_name] = load_dataset(
        builder.name, data_files=files, split=validation_split_name, features=features
    )
    return splits


def load_image_folder(folder: Path) -> DatasetDict:
    """Pairs every file of `images/` with the mask of the same name under `annotations/`, `masks/` or `labels/`."""
    mask_folder = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), None)
    if mask_folder is None:
        raise ValueError(f"{folder}: there is no folder of masks; it should be called {' or '.join(MASK_FOLDERS)}.")
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        sub_folder = next((name for name in names if (folder / "images" / name).is_dir()), None)
        if sub_folder is not None:
            splits[split] = pair_files(folder / "images" / sub_folder, mask_folder / sub_folder)
    if not splits:
        splits["train"] = pair_files(folder / "images", mask_folder)
    return DatasetDict(splits)


def pair_files(image_folder: Path, mask_folder: Path) -> Dataset:
    images = sorted(path for path in image_folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{image_folder}: there are no images ({', '.join(IMAGE_SUFFIXES)}).")
    masks = {
        path.relative_to(mask_folder).with_suffix(""): path
        for path in sorted(mask_folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    missing = [path for path in images if path.relative_to(image_folder).with_suffix("") not in masks]
    if missing:
        raise ValueError(
            f"{missing[0]}: there is no mask of that name in {mask_folder} "
            f"({len(missing)} of {len(images)} images have none)."
        )
    pairs = [(path, masks[path.relative_to(image_folder).with_suffix("")]) for path in images]
    # Size and time of change take part in the cache key: a replaced file is checked again.
    stamps = [(stat.st_size, stat.st_mtime_ns) for pair in pairs for stat in (pair[0].stat(), pair[1].stat())]
    return Dataset.from_generator(
        generate_pairs,
        gen_kwargs={"pairs": tuple((str(image), str(mask)) for image, mask in pairs), "stamps": tuple(stamps)},
        features=Features({"image": Image(), "label": Image()}),
    )


def generate_pairs(pairs, stamps):
    for image, mask in pairs:
        yield {"image": image, "label": mask}


def find_id2label(name: str) -> str:
    """Path of a dataset's `id2label.json`, fetched from the Hub where `name` is no folder."""
    if Path(name).is_dir():
        path = Path(name) / "id2label.json"
        if not path.is_file():
            raise ValueError(f"{name}: class names are missing: it has no id2label.json (nor {CLASS_FILE}).")
        return str(path)
    try:
        return hf_hub_download(name, "id2label.json", repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name} has no id2label.json on the Hub: give a file of class names as id2label.") from error


def read_id2label(path: str) -> dict[int, str]:
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {int(class_id): str(label) for class_id, label in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f'{path}: class names must be JSON such as {{"0": "sky", "1": "road"}} ({error}).') from error
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise ValueError(f"{path}: class ids must run from 0 without a gap, at least two; they are {sorted(names)}.")
    return {class_id: names[class_id] for class_id in sorted(names)}


def read_ade20k_classes(path: Path) -> dict[int, str]:
    """Names of ADE20K's 150 classes: tab-separated lines of index from 1, ratio, counts, name."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    names = {int(row[0]) - 1: row[-1].strip() for row in rows}
    if sorted(names) != list(range(150)):
        raise ValueError(f"{path}: 150 classes are expected, one a line, but there are {len(names)}.")
    return names


def choose_columns(splits: dict, split: str, columns: dict[str, str], name: str) -> Dataset | IterableDataset:
    """The split's image and label columns under these names, undecoded."""
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    dataset = splits[split]
    for column, new_name in columns.items():
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(dataset.column_names)}.")
        if column != new_name:
            dataset = dataset.rename_column(column, new_name)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name}: split {split!r} is empty.")
    return dataset.select_columns(["image", "label"])


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows hold files' paths and bytes, for [`read_example`] to decode, so that errors can name the file."""
    return dataset.cast_column("image", Image(decode=False)).cast_column("label", Image(decode=False))


def example_name(row: dict, index: int) -> str:
    return row.get("file_name") or row["image"]["path"] or f"example {index}"


def read_example(row: dict, index: int, do_reduce_labels: bool) -> SegmentationExample:
    """
    Decodes row `index` of an [`undecoded`] dataset.

    Raises:
        `ValueError`: naming the file, if the image or mask cannot be read, the mask has several channels or another
        size than its image.
    """
    name = example_name(row, index)
    image = decode_image(row["image"], name)
    labels = read_labels(row["label"], name, (image.height, image.width), do_reduce_labels)
    return SegmentationExample(image, labels.astype(np.int64), name)


def read_training_example(row: dict, index: int, do_reduce_labels: bool) -> TrainingExample:
    """What [`read_example`] reads and raises, as arrays and in less time, for the training transform."""
    name = example_name(row, index)
    pixels = decode_pixels(row["image"], name)
    return TrainingExample(pixels, read_labels(row["label"], name, pixels.shape[1:], do_reduce_labels), name)


def read_labels(value: dict, name: str, image_size: tuple[int, int], do_reduce_labels: bool) -> np.ndarray:
    """Labels (H, W), of the file's integer type, of the mask of an image of `image_size` (height, width)."""
    plain = decode_plain(value, "PNG", "L")
    if plain is not None:
        labels = plain[0]
    else:
        mask = decode_image(value, name)
        try:
            labels = np.asarray(mask) if mask.mode in ("L", "P") else segmentation_map_to_array(mask)
        except ValueError as error:
            raise ValueError(f"{value['path'] or name}: {error}") from error
    if labels.shape != tuple(image_size):
        raise ValueError(
            f"{name} is {image_size[1]}x{image_size[0]} pixels but its mask {value['path'] or ''} is "
            f"{labels.shape[1]}x{labels.shape[0]}."
        )
    if do_reduce_labels and labels.dtype == np.uint8:
        return labels - (labels != IGNORE_INDEX).view(np.uint8)  # 0 becomes 255 by itself
    return reduce_labels(labels) if do_reduce_labels else labels


def decode_pixels(value: dict, name: str) -> np.ndarray:
    """RGB pixels (3, H, W), uint8, of the upright image that [`decode_image`] decodes."""
    pixels = decode_plain(value, "JPEG", "RGB")
    if pixels is None:
        pixels = np.asarray(to_eight_bit(decode_image(value, name)).convert("RGB")).transpose(2, 0, 1)
    return pixels


def decode_plain(value: dict, file_format: str, mode: str) -> np.ndarray | None:
    """
    Channels (C, H, W), uint8, of a file of this format (JPEG or PNG) and PIL mode whose image is upright; None if it
    is another or broken. torchvision's decoders give the bytes of PIL's in less time.
    """
    content = value["bytes"]
    if content is None and Path(value["path"]).is_file():
        content = Path(value["path"]).read_bytes()
    try:
        with PIL.Image.open(io.BytesIO(content or b"")) as header:
            if (header.format, header.mode) != (file_format, mode):
                return None
            if file_format == "JPEG" and header.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
                return None
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if file_format == "JPEG":
            return decode_jpeg(encoded).numpy()
        if content[PNG_BIT_DEPTH] != 8 or any(chunk in content for chunk in PNG_CHUNKS_PIL_MINDS):
            return None
        return decode_png(encoded).numpy()
    except (OSError, SyntaxError, ValueError, RuntimeError, PIL.Image.DecompressionBombError):
        return None  # whatever is wrong with the file, PIL says it better


def decode_image(value: dict, name: str) -> PIL.Image.Image:
    """Upright image of a `datasets` image value; `name` stands in for the path of embedded bytes."""
    try:
        return Image().decode_example(value)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{value['path'] or name}: cannot be read as an image ({error}).") from error


def check_labels(labels: np.ndarray, num_labels: int, do_reduce_labels: bool, path: str) -> None:
    """
    Raises:
        `ValueError`: naming the mask and the value of its file, if a label is neither a class id nor 255.
    """
    is_wrong = labels >= num_labels
    is_wrong &= labels != IGNORE_INDEX
    if labels.dtype != np.uint8:
        is_wrong |= labels < 0
    if not is_wrong.any():
        return
    value = int(labels[is_wrong].max()) + do_reduce_labels
    allowed = f"1 to {num_labels}, and 0 for unlabelled" if do_reduce_labels else f"0 to {num_labels - 1}, and 255"
    problem = f"{path}: the mask holds the value {value}, but with {num_labels} classes it may hold {allowed}."
    if num_labels == 150:
        problem += " Perhaps this is the full ADE20K release: the benchmark's ADEChallengeData2016 is needed."
    raise ValueError(problem)


def check_examples(
    data: SegmentationData, split: str, num_proc: int | None = None, skip_corrupt: bool = False
) -> None:
    """
    Reads a whole stored split once (the result is cached by `datasets`) so that unusable files are known before
    training. A streamed split is left alone: its files are checked when their turn comes.

    Args:
        data: Holds the split.
        split: `train` or `validation`.
        num_proc: Processes that read; by default one for each CPU, at most 8, from 2,000 examples on.
        skip_corrupt: Whether unusable examples are dropped from `data`'s training split, with a warning that names
            them. A validation split with such examples would give scores of another set, and is never cut.

    Raises:
        `ValueError`: naming the first files that cannot be read, whose mask has another size, or that hold a label
        out of range, and how many there are; with `skip_corrupt`, if no example is left.
    """
    if isinstance(data.splits[split], IterableDataset):
        return
    rows = undecoded(data.splits[split])
    if num_proc is None and len(rows) >= ROWS_FOR_SEVERAL_PROCESSES:
        num_proc = min(8, os.cpu_count() or 1)
    problems = rows.map(
        find_problem,
        with_indices=True,
        fn_kwargs={"num_labels": len(data.id2label), "do_reduce_labels": data.do_reduce_labels},
        remove_columns=rows.column_names,
        num_proc=num_proc,
        desc=f"Checking the {split} split",
    )["problem"]
    usable = [index for index, problem in enumerate(problems) if not problem]
    count = len(rows) - len(usable)
    if not count:
        return
    listed = [problem for problem in problems if problem]
    is_cut = skip_corrupt and split == "train" and usable
    lines = "\n".join(listed if is_cut else listed[:5])
    message = f"{count} of {len(rows)} examples of the {split} split cannot be used"
    if not is_cut:
        raise ValueError(f"{message}:\n{lines}")
    logger.warning(f"{message} and are left out:\n{lines}")
    data.splits[split] = data.splits[split].select(usable)


def find_problem(row: dict, index: int, num_labels: int, do_reduce_labels: bool) -> dict[str, str]:
    try:
        example = read_training_example(row, index, do_reduce_labels)
        check_labels(example.labels, num_labels, do_reduce_labels, row["label"]["path"] or example.name)
    except ValueError as error:
        return {"problem": str(error)}
    return {"problem": ""}
