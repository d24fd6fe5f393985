import io
import itertools
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset
from torch.utils.data import DataLoader

from twins_hf.data import (
    SegmentationTrainTransform,
    StreamedTrainingStream,
    TrainingStream,
    check_examples,
    load_segmentation_data,
)

NUM_IMAGES = 12
FEATURES = Features({"image": Image(), "label": Image()})


def png(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def picture(index, is_broken=False, label=1):
    """Image `index`, and a mask of two classes."""
    rng = np.random.default_rng(index)
    image = png(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    mask = np.zeros((24, 20), np.uint8)
    mask[:, 10:] = label
    return {
        "image": {"bytes": image[:40] if is_broken else image, "path": f"photo_{index}.png"},
        "label": {"bytes": png(mask), "path": f"photo_{index}_mask.png"},
    }


@pytest.fixture
def transform():
    return SegmentationTrainTransform((16, 16), {"shortest_edge": 16, "longest_edge": 64})


@pytest.fixture
def write_parquet(tmp_path):
    def write(num_shards=4, **pictures):
        """A folder of so many training files; `pictures` change single ones."""
        folder = tmp_path / f"tables_{num_shards}"
        folder.mkdir()
        rows = [picture(index, **pictures.get(f"photo_{index}", {})) for index in range(NUM_IMAGES)]
        for shard in range(num_shards):
            part = rows[shard * NUM_IMAGES // num_shards : (shard + 1) * NUM_IMAGES // num_shards]
            name = f"train-{shard:05d}-of-{num_shards:05d}.parquet"
            Dataset.from_list(part, features=FEATURES).to_parquet(folder / name)
        Dataset.from_list(rows[:2], features=FEATURES).to_parquet(folder / "validation-00000-of-00001.parquet")
        (folder / "id2label.json").write_text(json.dumps({"0": "left", "1": "right"}))
        return str(folder)

    return write


@pytest.fixture
def stream(write_parquet, transform):
    """A stream of what `write_parquet` writes; written once for each number of shards."""
    rows = {}

    def make(num_shards=4, pictures=None, **changed):
        if num_shards not in rows:
            data = load_segmentation_data(write_parquet(num_shards, **(pictures or {})), streaming=True)
            rows[num_shards] = data.splits["train"]
        settings = {"seed": 0, "start": 0, "batch_size": 2, "shuffle_buffer_size": 4, **changed}
        return StreamedTrainingStream(rows[num_shards], False, 2, transform, **settings)

    return make


def take(stream, count):
    return list(itertools.islice(stream, count))


def take_batches(stream, count, num_workers):
    loader = DataLoader(stream, batch_size=2, num_workers=num_workers, generator=torch.Generator())
    return take(loader, count)


def names_of(samples):
    return [sample["name"] for sample in samples]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a["name"] == b["name"] and a["skipped"] == b["skipped"]
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["labels"], b["labels"])


def test_a_streamed_set_is_read_as_needed_and_its_validation_split_is_stored(write_parquet):
    data = load_segmentation_data(write_parquet(), streaming=True)
    assert isinstance(data.splits["train"], IterableDataset) and data.splits["train"].num_shards == 4
    validation = data.splits["validation"]
    assert isinstance(validation, Dataset) and len(validation) == 2 and validation.cache_files
    assert data.id2label == {0: "left", 1: "right"}
    check_examples(data, "train")
    check_examples(data, "validation")


def test_what_cannot_be_streamed_is_refused(write_parquet, image_folder, tmp_path):
    for name in ("scenes", "ade20k", str(image_folder), str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="cannot be streamed: it must be a Hub dataset or a folder of parquet"):
            load_segmentation_data(name, streaming=True)
    with pytest.raises(ValueError, match="has no split 'dev' but train, validation: a streamed dataset needs a valid"):
        load_segmentation_data(write_parquet(), validation_split_name="dev", streaming=True)


@pytest.mark.parametrize(("num_shards", "num_workers"), [(4, 0), (4, 1), (4, 2), (3, 2), (1, 2)])
def test_a_stream_goes_on_exactly_where_another_stopped(stream, num_shards, num_workers):
    """Also in a later epoch, and with fewer files than workers."""
    whole = take_batches(stream(num_shards), 13, num_workers)
    for taken in (1, 8):
        resumed = take_batches(stream(num_shards, start=2 * taken), 13 - taken, num_workers)
        assert_equal(resumed, whole[taken:])


def test_what_is_passed_over_is_not_decoded(stream, monkeypatch):
    expected = take(stream(), 11)[10]
    monkeypatch.setattr("twins_hf.data.streams.read_training_example", counted := Counted())
    assert_equal(take(stream(start=10), 1), [expected])
    assert counted.calls == 1


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        from twins_hf.data.loading import read_training_example

        self.calls += 1
        return read_training_example(*args)


@pytest.mark.parametrize(
    ("num_shards", "world_size", "num_workers"), [(4, 2, 0), (3, 2, 0), (1, 3, 0), (4, 1, 2), (2, 3, 2), (1, 3, 2)]
)
def test_an_epoch_of_all_processes_holds_every_example_once(stream, num_shards, world_size, num_workers):
    share = NUM_IMAGES // world_size
    parts = []
    for rank in range(world_size):
        part = stream(num_shards, rank=rank, world_size=world_size)
        batches = take_batches(part, share // 2, num_workers)
        parts.append([name for batch in batches for name in batch["name"]])
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(f"photo_{index}.png" for index in range(NUM_IMAGES))


def test_orders_and_crops_differ_between_seeds_epochs_and_processes(stream):
    first = take(stream(), 2 * NUM_IMAGES)
    assert_equal(take(stream(), 5), first[:5])
    epochs = names_of(first[:NUM_IMAGES]), names_of(first[NUM_IMAGES:])
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert names_of(take(stream(seed=1), NUM_IMAGES)) != epochs[0]

    crops = {}
    for sample in (*first, *take(stream(seed=1), NUM_IMAGES), *take(stream(1, rank=1, world_size=2), 6)):
        crops.setdefault(sample["name"], []).append(sample["pixel_values"])
    for same in crops.values():
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(same, 2))


def test_the_shuffle_buffer_mixes_the_files(stream):
    indices = [
        int(name.split("_")[1][:-4]) for name in names_of(take(stream(1, shuffle_buffer_size=1000), NUM_IMAGES))
    ]
    assert sorted(indices) == list(range(NUM_IMAGES)) and np.abs(np.diff(indices)).mean() > 1.5


def test_a_process_without_examples_is_told_so(stream):
    with pytest.raises(ValueError, match="too few training examples for 30 processes of 1 workers: worker 0 of proc"):
        take(stream(rank=29, world_size=30), 1)


def test_only_whole_batches_can_have_been_taken(stream):
    with pytest.raises(ValueError, match="start=3 must be a multiple of batch_size=2"):
        stream(start=3)


def test_a_stream_travels_to_workers_that_are_started_anew(stream):
    assert_equal(take(pickle.loads(pickle.dumps(stream())), 3), take(stream(), 3))


def test_a_streamed_file_that_cannot_be_used_is_named(stream):
    with pytest.raises(ValueError, match="photo_3.png: cannot be read as an image"):
        take(stream(4, {"photo_3": {"is_broken": True}}), NUM_IMAGES)
    with pytest.raises(ValueError, match="photo_5_mask.png: the mask holds the value 7, but with 2 classes"):
        take(stream(2, {"photo_5": {"label": 7}}), NUM_IMAGES)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_usable_example_takes_a_skipped_ones_place_also_after_a_stop(stream, num_workers):
    pictures = {"photo_2": {"is_broken": True}, "photo_6": {"label": 9}, "photo_7": {"is_broken": True}}
    stream(4, pictures)
    whole = take_batches(stream(skip_corrupt=True), 18, num_workers)
    names, skipped = ([name for batch in whole for name in batch[key]] for key in ("name", "skipped"))
    broken = {f"{name}.png" for name in pictures}
    assert set(names) == {f"photo_{index}.png" for index in range(NUM_IMAGES)} - broken
    assert {name: skipped.count(name) for name in broken} == dict.fromkeys(broken, 3)  # once an epoch
    assert skipped.count("") == 3 * (NUM_IMAGES - 3)
    for taken in (3, 9):
        resumed = take_batches(stream(skip_corrupt=True, start=2 * taken), 6, num_workers)
        assert_equal(resumed, whole[taken : taken + 6])
    if num_workers == 0:
        for place, name in enumerate(skipped[:-3]):
            later = next(i for i in itertools.count(place) if not skipped[i])
            assert names[place] == names[later] and (name == "") == (place == later)


def test_a_set_of_which_nothing_can_be_used_is_refused(stream, transform):
    broken = {f"photo_{index}": {"is_broken": True} for index in range(NUM_IMAGES)}
    with pytest.raises(ValueError, match="no example of a whole epoch can be used; the first is photo_"):
        take(stream(4, broken, skip_corrupt=True), 1)
    rows = Dataset.from_list([picture(index, is_broken=True) for index in range(3)], features=FEATURES)
    with pytest.raises(ValueError, match="none of the 3 training examples can be used; the first is photo_"):
        TrainingStream(rows, False, transform, 0, 0, 10, skip_corrupt=True)[4]


@pytest.fixture
def stored(transform):
    """A stored stream from `start` to 20 over five images, of which the second and third may be broken."""

    def make(start=0, is_broken=False, **settings):
        rows = [picture(index, is_broken=is_broken and index in (1, 2)) for index in range(5)]
        rows = Dataset.from_list(rows, features=FEATURES)
        return TrainingStream(rows, False, transform, 0, start, 20, **settings)

    return make


def test_a_position_depends_on_nothing_but_the_seed(stored):
    torch.manual_seed(1)
    whole = [stored()[position] for position in range(20)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    later = stored(start=7)
    assert len(later) == 13
    assert_equal([later[offset] for offset in reversed(range(13))], whole[:6:-1])
    assert torch.equal(torch.get_rng_state(), state)
    for epoch in range(4):
        names = names_of(whole[5 * epoch : 5 * epoch + 5])
        assert sorted(names) == [f"photo_{index}.png" for index in range(5)]
    same = [sample["pixel_values"] for sample in whole if sample["name"] == "photo_0.png"]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(same, 2))
    assert_equal([pickle.loads(pickle.dumps(later))[3]], [whole[10]])


def test_a_stored_file_that_breaks_later_is_named_or_its_place_taken(stored):
    with pytest.raises(ValueError, match="photo_[12].png: cannot be read as an image"):
        [stored(is_broken=True)[position] for position in range(5, 10)]
    sound = [stored()[position] for position in range(20)]
    found = [stored(is_broken=True, skip_corrupt=True)[position] for position in range(20)]
    for position, (ours, theirs) in enumerate(zip(found, sound, strict=True)):
        if theirs["name"] in ("photo_1.png", "photo_2.png"):
            epoch = position // 5 * 5
            later = (sound[epoch + (place - epoch) % 5]["name"] for place in range(position, position + 5))
            assert ours["skipped"] == theirs["name"]
            assert ours["name"] == next(name for name in later if name not in ("photo_1.png", "photo_2.png"))
        else:
            assert_equal([ours], [theirs])
            assert ours["skipped"] == ""
