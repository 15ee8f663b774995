"""Sets too large for memory: read, decoded and cropped by grain on the host, step by step."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Sharding

from dgl_jax.data import decode, shardings
from dgl_jax.data.augment import normalize
from dgl_jax.data.dataset import (
    Dataset,
    EvalBatch,
    check_eval_split,
    check_step,
    split_validation,
)
from dgl_jax.data.statistics import Statistics
from dgl_jax.types import Batch

# Any sequence of (encoded image, label) that can be pickled.
EncodedSource = Sequence[tuple[bytes, int]]

_MAX_THREADS = 16
_BATCHES_AHEAD_PER_WORKER = 2


class Subset:
    """The examples of a source at some indices."""

    def __init__(self, source: EncodedSource, index: np.ndarray):
        self._source = source
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> tuple[bytes, int]:
        return self._source[int(self._index[position])]

    def __repr__(self) -> str:
        return f"Subset({self._source!r}, {len(self)} examples)"


class Labels:
    """A source without its images: of each example, which is read once, the label is kept."""

    def __init__(self, source: EncodedSource):
        self._source = source
        self._labels = np.full(len(source), -1, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> tuple[bytes, int]:
        if self._labels[position] < 0:
            self._labels[position] = self._source[position][1]
        return b"", int(self._labels[position])

    def __repr__(self) -> str:
        return f"Labels({self._source!r})"


class Padded:
    """A source with its last example repeated up to a whole number of batches, and a mask."""

    def __init__(self, source: EncodedSource, batch_size: int):
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[bytes, int, float]:
        data, label = self._source[min(position, len(self._source) - 1)]
        return data, label, float(position < len(self._source))

    def __repr__(self) -> str:
        return f"Padded({self._source!r}, {len(self)} examples)"


class LocalRows:
    """Of every batch of a stream of examples, the rows [start, stop)."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, start: int, stop: int):
        self._examples = examples
        self._batch_size = batch_size
        self._start = start
        self._num_rows = stop - start

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * self._num_rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        step, row = divmod(position, self._num_rows)
        return self._examples[step * self._batch_size + self._start + row]

    def __repr__(self) -> str:
        return f"LocalRows({self._start}, {self._num_rows} of {self._batch_size})"


def train_batches(
    source: EncodedSource,
    *,
    batch_size: int,
    rows: tuple[int, int],
    seed: int,
    image_size: int,
    channels: int,
    augment: bool,
    flip: bool,
) -> grain.MapDataset:
    """Training batches by step, without end.

    Args:
      source: the training examples.
      batch_size: examples a batch, over all processes.
      rows: [start, stop), the rows of a batch that this process makes.
      seed: of order and augmentation, in [0, 2**32).
      image_size: S, pixels a side; 0 for labels alone, for which no image is decoded.
      channels: 1 or 3.
      augment: random resized crops; otherwise the centre.
      flip: whether augmentation mirrors half of the images.

    Returns:
      step -> {"images": uint8 [rows, S, S, C], "labels": int32 [rows]}, a function of
      (seed, step) only.
    """
    per_epoch = len(source) // batch_size * batch_size
    # The slice takes an epoch's remainder away; without it batches would straddle two epochs.
    examples = grain.MapDataset.source(source).seed(seed).shuffle().slice(slice(per_epoch)).repeat()
    if image_size == 0:
        examples = examples.map(functools.partial(_label_only, channels=channels))
    elif augment:
        examples = examples.random_map(
            functools.partial(_train_example, image_size=image_size, channels=channels, flip=flip)
        )
    else:
        examples = examples.map(
            functools.partial(_center_example, image_size=image_size, channels=channels)
        )
    return _batches(examples, batch_size, rows)


def eval_batches(
    source: EncodedSource,
    *,
    batch_size: int,
    rows: tuple[int, int],
    image_size: int,
    channels: int,
) -> grain.MapDataset:
    """Evaluation batches in stored order, the last one padded.

    Args:
      source: the examples.
      batch_size, rows, image_size, channels: as in `train_batches`.

    Returns:
      As `train_batches`, with "mask" float32 [rows].
    """
    if image_size == 0:
        example = functools.partial(_label_only, channels=channels)
    else:
        example = functools.partial(_eval_example, image_size=image_size, channels=channels)
    examples = grain.MapDataset.source(Padded(source, batch_size)).map(example)
    return _batches(examples, batch_size, rows)


def make_dataset(
    *,
    name: str,
    num_classes: int,
    channels: int,
    train_source: EncodedSource,
    test_source: EncodedSource,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    validation_fraction: float,
    held_out: bool,
    augment: bool,
    flip: bool,
    image_size: int,
    num_workers: int,
    statistics: Statistics,
    sharding: Sharding,
) -> Dataset:
    """Streams a set.

    Args:
      name: of the set.
      num_classes: labels are in [0, num_classes).
      channels: 1 or 3.
      train_source, test_source: (encoded image, label) by index; picklable.
      batch_size, eval_batch_size, seed, validation_fraction, held_out, augment, flip,
        num_workers: as in `dgl_jax.data.load_dataset`.
      image_size: S, pixels a side.
      statistics: (mean, std), one number a channel.
      sharding: of the batches; each process decodes the rows of its own devices.

    Returns:
      The data set.

    Raises:
      UserError: if the training examples are too few.
    """
    train_index, validation_index = split_validation(
        len(train_source),
        validation_fraction=validation_fraction,
        held_out=held_out,
        batch_size=batch_size,
        seed=seed,
    )
    if image_size == 0:
        # Kept labels are of this process, and nothing is decoded.
        train_source, test_source, num_workers = Labels(train_source), Labels(test_source), 0
    splits = {
        "train": Subset(train_source, train_index) if len(validation_index) else train_source,
        "validation": Subset(train_source, validation_index),
        "test": test_source,
    }
    whole, labels = shardings.replicated(sharding), shardings.batch_axis_only(sharding)
    mean, std = shardings.put(tuple(np.asarray(value, np.float32) for value in statistics), whole)
    normalize_fn = jax.jit(normalize, out_shardings=sharding)
    image_options = {"image_size": image_size, "channels": channels}
    rows = shardings.local_rows(sharding, batch_size)
    stream = _Stream(
        train_batches(
            splits["train"],
            batch_size=batch_size,
            rows=rows,
            seed=seed,
            augment=augment,
            flip=flip,
            **image_options,
        ),
        num_workers,
    )

    def put(batch: dict[str, np.ndarray], size: int, first_row: int) -> tuple[jax.Array, ...]:
        images = shardings.put_local_rows(batch["images"], sharding, size, first_row)
        others = (batch[key] for key in ("labels", "mask") if key in batch)
        return (
            normalize_fn(images, mean, std),
            *(shardings.put_local_rows(other, labels, size, first_row) for other in others),
        )

    def batch_at(step: int) -> Batch:
        check_step(step)
        return Batch(*put(stream.batch_at(step), batch_size, rows[0]))

    def eval_iterator(source: EncodedSource) -> Iterator[EvalBatch]:
        eval_rows = shardings.local_rows(sharding, eval_batch_size)
        iterator = iter(
            _prefetch(
                eval_batches(source, batch_size=eval_batch_size, rows=eval_rows, **image_options),
                num_workers,
            )
        )
        try:
            for batch in iterator:
                yield put(batch, eval_batch_size, eval_rows[0])
        finally:
            iterator.close()

    def eval_batches_of(split: str) -> Iterator[EvalBatch]:
        check_eval_split(split, len(validation_index))
        return eval_iterator(splits[split])

    return Dataset(
        name=name,
        image_shape=(image_size, image_size, channels),
        num_classes=num_classes,
        num_train=len(train_index),
        num_validation=len(validation_index),
        num_test=len(test_source),
        steps_per_epoch=len(train_index) // batch_size,
        batch_at=batch_at,
        eval_batches=eval_batches_of,
        close=stream.close,
    )


class _Stream:
    """Batches by step, read ahead while the steps are consecutive."""

    def __init__(self, batches: grain.MapDataset, num_workers: int):
        self._batches = batches
        self._num_workers = num_workers
        self._iterator = None
        self._next_step = None

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        if step != self._next_step or self._iterator is None:
            self.close()
            self._iterator = iter(_prefetch(self._batches[step:], self._num_workers))
        self._next_step = step + 1
        return next(self._iterator)

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _prefetch(batches: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """The same batches in the same order, read ahead in threads or in `num_workers` processes."""
    if num_workers == 0:
        # grain's default is to read 500 elements ahead, which are whole batches here.
        num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
        return batches.to_iter_dataset(grain.ReadOptions(num_threads, num_threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which a notebook never parses
    return batches.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers, _BATCHES_AHEAD_PER_WORKER)
    )


def _batches(
    examples: grain.MapDataset, batch_size: int, rows: tuple[int, int]
) -> grain.MapDataset:
    if rows != (0, batch_size):
        examples = grain.MapDataset.source(LocalRows(examples, batch_size, *rows))
    return examples.batch(rows[1] - rows[0], drop_remainder=True)


def _train_example(
    example: tuple[bytes, int],
    rng: np.random.Generator,
    *,
    image_size: int,
    channels: int,
    flip: bool,
) -> dict[str, Any]:
    data, label = example
    image = decode.random_resized_crop(
        data, rng, image_size=image_size, channels=channels, flip=flip
    )
    return {"images": image, "labels": np.int32(label)}


def _label_only(example: tuple[Any, ...], *, channels: int) -> dict[str, Any]:
    _, label, *mask = example
    image = np.zeros((0, 0, channels), np.uint8)
    masks = {"mask": np.float32(mask[0])} if mask else {}
    return {"images": image, "labels": np.int32(label)} | masks


def _center_example(
    example: tuple[bytes, int], *, image_size: int, channels: int
) -> dict[str, Any]:
    data, label = example
    image = decode.center_crop(data, image_size=image_size, channels=channels)
    return {"images": image, "labels": np.int32(label)}


def _eval_example(
    example: tuple[bytes, int, float], *, image_size: int, channels: int
) -> dict[str, Any]:
    data, label, mask = example
    image = decode.center_crop(data, image_size=image_size, channels=channels)
    return {"images": image, "labels": np.int32(label), "mask": np.float32(mask)}
