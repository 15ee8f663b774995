"""Sets that lie whole on the device: shuffled, cropped, flipped and normalised there."""

import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from dgl_jax.data import augment as augment_lib
from dgl_jax.data import shardings
from dgl_jax.data.dataset import (
    AUGMENT,
    SHUFFLE,
    Dataset,
    EvalBatch,
    check_eval_split,
    check_step,
    split_validation,
)
from dgl_jax.data.sources import Arrays
from dgl_jax.data.statistics import Statistics
from dgl_jax.types import Batch, DeviceStream


@flax.struct.dataclass
class DeviceArrays:
    """A whole set on the device.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      mean: float32 [C].
      std: float32 [C].
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


def epoch_order(key: jax.Array, train_index: jax.Array, epoch: jax.Array) -> jax.Array:
    """The order in which an epoch visits the training examples.

    Args:
      key: the data set's key.
      train_index: int32 [N], the stored indices of the training examples.
      epoch: int32 scalar.

    Returns:
      int32 [N], a permutation of `train_index`.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, SHUFFLE), epoch)
    return jax.random.permutation(key, train_index)


def batch_from(
    key: jax.Array,
    arrays: DeviceArrays,
    order: jax.Array,
    step: jax.Array,
    *,
    batch_size: int,
    augment: bool,
    crop_padding: int,
    flip: bool,
) -> Batch:
    """One training batch. Pure: it can stand inside a larger jitted program or a scan.

    Args:
      key: the data set's key.
      arrays: the whole set.
      order: int32 [N], `epoch_order` of the epoch that `step` belongs to.
      step: int32 scalar, counted from the start of training.
      batch_size: B.
      augment: whether images are cropped and flipped at random.
      crop_padding: black pixels on each side before a crop.
      flip: whether half of the images are mirrored.

    Returns:
      The batch, a function of (key, step) only.
    """
    start = step % (order.shape[0] // batch_size) * batch_size
    index = jax.lax.dynamic_slice(order, (start,), (batch_size,))
    if augment:
        key = jax.random.fold_in(jax.random.fold_in(key, AUGMENT), step)
        crop_key, flip_key = jax.random.split(key)
        offsets = jax.random.randint(crop_key, (batch_size, 2), 0, 2 * crop_padding + 1)
        flips = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (batch_size,))
        images = augment_lib.gather_crops(
            arrays.images, index, offsets, flips, crop_padding=crop_padding
        )
    else:
        images = arrays.images[index]
    return Batch(
        images=augment_lib.normalize(images, arrays.mean, arrays.std),
        labels=arrays.labels[index],
    )


def eval_batch_from(
    arrays: DeviceArrays, index: jax.Array, start: jax.Array, *, batch_size: int
) -> EvalBatch:
    """One evaluation batch: examples index[start : start + batch_size], the rest masked.

    Args:
      arrays: the whole set.
      index: int32 [M], the stored indices of the split's examples.
      start: int32 scalar.
      batch_size: E.

    Returns:
      images float32 [E, H, W, C], labels int32 [E], mask float32 [E].
    """
    position = start + jnp.arange(batch_size, dtype=jnp.int32)
    examples = index[jnp.minimum(position, index.shape[0] - 1)]
    images = augment_lib.normalize(arrays.images[examples], arrays.mean, arrays.std)
    return (
        images,
        arrays.labels[examples],
        (position < index.shape[0]).astype(jnp.float32),
    )


def make_dataset(
    arrays: Arrays,
    *,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    validation_fraction: float,
    held_out: bool,
    augment: bool,
    crop_padding: int,
    flip: bool,
    statistics: Statistics,
    sharding: Sharding,
) -> Dataset:
    """Puts a set on the device, whole on each, and gives batches of it.

    Args:
      arrays: the set, on the host.
      batch_size, eval_batch_size, seed, validation_fraction, held_out, augment, crop_padding,
        flip: as in `dgl_jax.data.load_dataset`.
      statistics: (mean, std), one number a channel.
      sharding: of the batches.

    Returns:
      The data set.

    Raises:
      UserError: if the training examples are too few.
    """
    train_index, validation_index = split_validation(
        len(arrays.train_images),
        validation_fraction=validation_fraction,
        held_out=held_out,
        batch_size=batch_size,
        seed=seed,
    )
    steps_per_epoch = len(train_index) // batch_size
    whole, labels = shardings.replicated(sharding), shardings.batch_axis_only(sharding)
    batch_shardings = Batch(images=sharding, labels=labels)

    def make_batch(source, step: jax.Array) -> Batch:
        batch = batch_from(
            *source,
            step,
            batch_size=batch_size,
            augment=augment,
            crop_padding=crop_padding,
            flip=flip,
        )
        return jax.lax.with_sharding_constraint(batch, batch_shardings)

    batch_fn = jax.jit(make_batch, out_shardings=batch_shardings)
    eval_fn = jax.jit(
        functools.partial(eval_batch_from, batch_size=eval_batch_size),
        out_shardings=(sharding, labels, labels),
    )
    order_fn = jax.jit(epoch_order, out_shardings=whole)
    # A key made inside a program lies where the program's other arrays lie.
    key = jax.jit(jax.random.key, out_shardings=whole)(shardings.put(np.uint32(seed), whole))

    mean, std = (np.asarray(value, np.float32) for value in statistics)
    train = shardings.put(DeviceArrays(arrays.train_images, arrays.train_labels, mean, std), whole)
    test = shardings.put(DeviceArrays(arrays.test_images, arrays.test_labels, mean, std), whole)
    index_of = {
        "train": (train, shardings.put(train_index, whole)),
        "validation": (train, shardings.put(validation_index, whole)),
        "test": (
            test,
            shardings.put(np.arange(len(arrays.test_images), dtype=np.int32), whole),
        ),
    }
    orders: dict[int, jax.Array] = {}

    def order_of(epoch: int) -> jax.Array:
        if epoch not in orders:
            while len(orders) >= 2:
                del orders[min(orders)]
            orders[epoch] = order_fn(
                key, index_of["train"][1], shardings.put(np.int32(epoch), whole)
            )
        return orders[epoch]

    def source_at(step: int):
        return key, train, order_of(step // steps_per_epoch)

    def batch_at(step: int) -> Batch:
        check_step(step)
        return batch_fn(source_at(step), shardings.put(np.int32(step), whole))

    def eval_batches(split: str) -> Iterator[EvalBatch]:
        check_eval_split(split, len(validation_index))
        split_arrays, index = index_of[split]
        return (
            eval_fn(split_arrays, index, shardings.put(np.int32(start), whole))
            for start in range(0, index.shape[0], eval_batch_size)
        )

    return Dataset(
        name=arrays.name,
        image_shape=arrays.image_shape,
        num_classes=arrays.num_classes,
        num_train=len(train_index),
        num_validation=len(validation_index),
        num_test=len(arrays.test_images),
        steps_per_epoch=steps_per_epoch,
        batch_at=batch_at,
        eval_batches=eval_batches,
        close=lambda: None,
        stream=DeviceStream(source_at, make_batch),
    )
