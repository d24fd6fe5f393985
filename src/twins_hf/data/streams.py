"""
Endless shuffled and augmented streams of training crops, which go on after a stop with the sample that was due.

A sample is a dictionary: `pixel_values` (3, height, width), float32; `labels` (height, width), int64; `name` of the
example; `skipped`, the name of the example whose place this one takes because it cannot be used, empty as a rule.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator

import fsspec
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from .loading import TrainingExample, check_labels, example_name, read_training_example, undecoded
from .transforms import SegmentationTrainTransform


def draw_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of the numbers, each 0 or more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@functools.lru_cache(maxsize=2)
def draw_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def augment(example: TrainingExample, transform: SegmentationTrainTransform, seed: int, skipped: str) -> dict:
    """The sample that `seed` makes of an example; torch's global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pixel_values, labels = transform(example.pixels, example.labels)
    return {"pixel_values": pixel_values, "labels": labels, "name": example.name, "skipped": skipped}


class TrainingStream(torch.utils.data.Dataset):
    """
    The stream of a stored dataset, from position `start` to `stop`. What stands at a position depends on the seed and
    the position alone: not on the number of processes or workers, nor on where a run resumed.

    Args:
        rows: Columns `image` and `label`.
        do_reduce_labels: Whether masks hold 0 for "unlabelled" and class ids from 1.
        transform: What makes a crop of an example.
        seed: Of the order and of the crops.
        start, stop: The first position, and the one after the last.
        skip_corrupt: Whether the next usable example of the epoch takes the place of one that cannot be used.

    Raises:
        `ValueError`: when a position is read, naming its file, if that cannot be used; with `skip_corrupt`, if none
        can.
    """

    def __init__(
        self,
        rows: Dataset,
        do_reduce_labels: bool,
        transform: SegmentationTrainTransform,
        seed: int,
        start: int,
        stop: int,
        skip_corrupt: bool = False,
    ):
        self.rows = undecoded(rows)
        self.do_reduce_labels = do_reduce_labels
        self.transform = transform
        self.seed = seed
        self.start = start
        self.stop = stop
        self.skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return self.stop - self.start

    def draw_epoch_order(self, epoch: int) -> np.ndarray:
        return draw_order(self.seed, epoch, len(self.rows))

    def __getitem__(self, offset: int) -> dict:
        position = self.start + offset
        epoch, place = divmod(position, len(self.rows))
        order, skipped = self.draw_epoch_order(epoch), ""
        for index in map(int, itertools.chain(order[place:], order[:place])):
            row = self.rows[index]
            try:
                example = read_training_example(row, index, self.do_reduce_labels)
            except ValueError:
                if not self.skip_corrupt:
                    raise
                skipped = skipped or example_name(row, index)
            else:
                return augment(example, self.transform, draw_seed(self.seed, position), skipped)
        raise ValueError(f"none of the {len(self.rows)} training examples can be used; the first is {skipped}.")


class StreamedTrainingStream(torch.utils.data.IterableDataset):
    """
    The stream of a dataset that is read as it is needed, for a `DataLoader` of this batch size in each process; it has
    no end. Its shards (parquet files) are dealt out to processes and workers where there are enough of them, otherwise
    their examples are; all are shuffled anew in each epoch, which each worker counts for itself: where shards are
    unequal or do not divide, the examples of a smaller share come up more often.

    With the same seed, batch size and number of processes and workers, a stream that starts where another one stopped
    yields what that would have yielded next. It reads what it passes over, undecoded.

    Args:
        rows: Columns `image` and `label`.
        do_reduce_labels: Whether masks hold 0 for "unlabelled" and class ids from 1.
        num_labels: Number of classes; labels are checked here, since no one has read them before.
        transform: What makes a crop of an example.
        seed: Of the order and of the crops.
        start: Number of samples, whole batches, that this process has already taken.
        batch_size: The `DataLoader`'s.
        rank, world_size: This process, and the number of them.
        shuffle_buffer_size: Number of examples that each worker holds to draw the next one from.
        skip_corrupt: Whether the next usable example takes the place of one that cannot be used.

    Raises:
        `ValueError`: if `start` is not a number of whole batches; and when the stream is read, naming the file, if one
        cannot be used; with `skip_corrupt`, if a whole epoch cannot; if there are too few examples for the workers.
    """

    def __init__(
        self,
        rows: IterableDataset,
        do_reduce_labels: bool,
        num_labels: int,
        transform: SegmentationTrainTransform,
        seed: int,
        start: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer_size: int = 1000,
        skip_corrupt: bool = False,
    ):
        if start % batch_size:
            raise ValueError(f"start={start} must be a multiple of batch_size={batch_size}: batches are taken whole.")
        self.rows = undecoded(rows)
        self.do_reduce_labels = do_reduce_labels
        self.num_labels = num_labels
        self.transform = transform
        self.seed = seed
        self.start = start
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer_size = shuffle_buffer_size
        self.skip_corrupt = skip_corrupt

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        if info is not None:
            fsspec.asyn.reset_lock()  # a lock that was held when the worker was forked would never be released
        # Workers deliver batches in turn. The first of this loader's goes on as the one whose turn it was.
        taken, worker = divmod(self.start // self.batch_size + (0 if info is None else info.id), num_workers)
        node = self.rank * num_workers + worker
        # A slot is the place of one row; `pending` begins with the slot's own row, those after it were looked at to
        # fill a place. Of rows, an unusable one is kept as None.
        rows = self.iterate_rows(worker, num_workers)
        pending = deque()
        for slot in itertools.count():
            epoch, row, name = pending.popleft() if pending else next(rows)
            if slot < taken * self.batch_size:
                continue
            skipped, example, looked_at = "", self.read(row, name), 0
            while example is None:
                skipped = skipped or name
                if looked_at == len(pending):
                    pending.append(next(rows))
                later_epoch, row, later_name = pending[looked_at]
                if later_epoch > epoch + 1:
                    raise ValueError(f"no example of a whole epoch can be used; the first is {skipped}.")
                example = self.read(row, later_name)
                if example is None:
                    pending[looked_at] = (later_epoch, None, later_name)
                looked_at += 1
            yield augment(example, self.transform, draw_seed(self.seed, node, slot), skipped)

    def iterate_rows(self, worker: int, num_workers: int) -> Iterator[tuple[int, dict, str]]:
        """Epoch, row and name of this worker's share, epoch after epoch."""
        for epoch in itertools.count():
            # From one shard at a time: `datasets` 5 ends an interleaved epoch with a sleep of five seconds, and 5.0
            # leaves workers without shards then.
            rows = self.rows.shuffle(
                seed=draw_seed(self.seed, epoch), buffer_size=self.shuffle_buffer_size, max_buffer_input_shards=1
            )
            if rows.num_shards >= num_workers:
                rows = rows.shard(num_workers, worker, contiguous=False)
                rows = split_dataset_by_node(rows, self.rank, self.world_size)
            else:
                node = self.rank * num_workers + worker
                rows = split_dataset_by_node(rows, node, self.world_size * num_workers)
            index = -1
            for index, batch in enumerate(rows.iter(batch_size=1)):
                row = {column: values[0] for column, values in batch.items()}
                yield epoch, row, example_name(row, index)
            if index < 0:
                raise ValueError(
                    f"there are too few training examples for {self.world_size} processes of {num_workers} workers: "
                    f"worker {worker} of process {self.rank} gets none."
                )

    def read(self, row: dict | None, name: str) -> TrainingExample | None:
        """The example of a row; with `skip_corrupt`, None if it cannot be used."""
        if row is None:
            return None
        try:
            example = read_training_example({**row, "file_name": name}, 0, self.do_reduce_labels)
            check_labels(example.labels, self.num_labels, self.do_reduce_labels, row["label"]["path"] or name)
            return example
        except ValueError:
            if not self.skip_corrupt:
                raise
            return None
