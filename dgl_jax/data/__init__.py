"""Data: ``load_dataset(...)`` gives a `Dataset`, whose ``batch_at(step)`` is a function of (seed, step).

``describe_dataset(...)`` says before that, without a device, what the images will be like.

Small sets lie whole on the device and are augmented there (`in_memory`); large ones are read,
decoded and cropped on the host by grain (`streaming`). Both give the same `Dataset`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dgl_jax.data import (
    in_memory,
    shardings,
    sources,
    statistics,
    tfds_source,
)
from dgl_jax.data.dataset import Dataset, EvalBatch
from dgl_jax.errors import UserError
from dgl_jax.transfer import is_local, stand_in
from dgl_jax.types import Batch

__all__ = [
    "Dataset",
    "Description",
    "describe_dataset",
    "load_dataset",
    "load_dataset_in_parts",
]

_STREAMING_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Description:
    """What a network must fit.

    Attributes:
      image_shape: (H, W, C) of the images in a batch.
      num_classes: labels are in [0, num_classes).
      num_examples: of the training set, those for validation among them.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    num_examples: int


def describe_dataset(*, name: str, data_dir: str = "", image_size: int = 0) -> Description:
    """What `load_dataset` will give for the same arguments; touches no device.

    A TFDS set is known by its metadata; of the others the file is read.

    Raises:
      UserError: as `load_dataset`, on a set that is missing or unfit.

    Example:
      >>> describe_dataset(name="embedded")
      Description(image_shape=(28, 28, 1), num_classes=10, num_examples=10000)
    """
    _check_sizes(image_size=image_size)
    if name in sources.ARRAY_SOURCES:
        arrays = sources.ARRAY_SOURCES[name](data_dir)
        image_shape, num_classes = arrays.image_shape, arrays.num_classes
        num_examples = len(arrays.train_labels)
    else:
        tfds_set = tfds_source.find_set(name, data_dir)
        image_shape, num_classes = tfds_set.image_shape, tfds_set.num_classes
        num_examples = tfds_set.num_examples["train"]
        if not tfds_source.fits_in_memory(tfds_set):
            size = image_size or _STREAMING_IMAGE_SIZE
            return Description((size, size, image_shape[2]), num_classes, num_examples)
    _check_stored_size(name, image_size, image_shape[0])
    return Description(tuple(image_shape), num_classes, num_examples)


def load_dataset(
    *,
    name: str,
    data_dir: str = "",
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    validation_fraction: float = 0.0,
    held_out: bool = False,
    augment: bool = True,
    crop_padding: int = 4,
    flip: bool = True,
    image_size: int = 0,
    num_workers: int = 0,
    streaming: bool | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    labels_only: bool = False,
    sharding: jax.sharding.Sharding | None = None,
) -> Dataset:
    """Opens a data set.

    Args:
      name: "embedded" (a part of Fashion-MNIST that ships with the package), "arrays" (the
        user's own .npz), or a prepared TFDS set: "cifar10", "imagenette/320px-v2" ...
      data_dir: the folder of prepared TFDS sets, or the path of the .npz of "arrays".
      batch_size: training examples a step, over all devices together.
      eval_batch_size: examples an evaluation batch, over all devices together.
      seed: in [0, 2**32); decides the validation split, the order and the augmentation.
      validation_fraction: the share of the training examples held out, in [0, 1).
      held_out: whether ``batch_at`` gives the examples held out, and "validation" names the others.
      augment: whether training images are cropped (and flipped, if ``flip``) at random.
      crop_padding: black pixels added on each side before a random crop; 0 for none. For sets in
        memory; streamed ones are cropped by random resized crops.
      flip: whether augmentation mirrors half of the images left to right.
      image_size: pixels a side, of streamed images; 0 for 224. A set in memory has its own size.
      num_workers: processes that decode streamed images; 0 decodes in threads of this one.
      streaming: True streams, False holds the set in memory, None lets the set's size decide
        (in memory up to 2 GiB, if its images are all of one shape).
      mean: one number a channel, of pixels scaled to [0, 1]; () for the set's own.
      std: as ``mean``; () for the set's own.
      labels_only: gives images of 0x0 pixels, which cost nothing.
      sharding: where the batches go: a NamedSharding whose first axis is the batch's, or a
        SingleDeviceSharding; None for the default device.

    Returns:
      The data set.

    Raises:
      UserError: on a value out of range, and on a set that is missing, half prepared or unfit.
    """
    _check_numbers(batch_size, eval_batch_size, seed, validation_fraction)
    _check_sizes(crop_padding=crop_padding, image_size=image_size, num_workers=num_workers)
    sharding = sharding if sharding is not None else shardings.default_sharding()
    shardings.check_divisible("batch_size", batch_size, sharding)
    shardings.check_divisible("eval_batch_size", eval_batch_size, sharding)
    common = {
        "batch_size": batch_size,
        "eval_batch_size": eval_batch_size,
        "seed": seed,
        "validation_fraction": validation_fraction,
        "held_out": held_out,
        "augment": augment,
        "flip": flip,
        "sharding": sharding,
    }
    if name not in sources.ARRAY_SOURCES:
        tfds_set = tfds_source.find_set(name, data_dir)
        if streaming is None:
            streaming = not tfds_source.fits_in_memory(tfds_set)
        if streaming:
            channels = tfds_set.image_shape[2]
            return _streaming_dataset(
                tfds_set,
                image_size=0 if labels_only else image_size or _STREAMING_IMAGE_SIZE,
                num_workers=num_workers,
                mean_and_std=statistics.choose(tfds_set.name, channels, mean, std, None),
                **common,
            )
        arrays = tfds_source.read_arrays(tfds_set)
    elif streaming:
        raise UserError(
            f"streaming=True needs a TFDS set, not name={name}; leave streaming unset for {name}"
        )
    else:
        arrays = sources.ARRAY_SOURCES[name](data_dir)

    height, width, channels = arrays.image_shape
    _check_stored_size(name, image_size, height)
    if crop_padding >= min(height, width):
        raise UserError(
            f"crop_padding={crop_padding} must be less than the image's side"
            f" {min(height, width)}; try {min(height, width) // 8}"
        )
    mean_and_std = statistics.choose(arrays.name, channels, mean, std, arrays.train_images)
    if labels_only:
        none = np.s_[:, :0, :0]
        arrays = dataclasses.replace(
            arrays, train_images=arrays.train_images[none], test_images=arrays.test_images[none]
        )
        common["augment"] = False
    return in_memory.make_dataset(
        arrays,
        crop_padding=crop_padding,
        statistics=mean_and_std,
        **common,
    )


def load_dataset_in_parts(*, sharding: jax.sharding.Sharding, **options: Any) -> Dataset:
    """As `load_dataset`, for a run of several processes: each loads what it needs.

    Args:
      sharding: of the images. A process makes those rows of a batch that are for its own devices;
        where it has none of these devices, it reads no images and gives their stand-ins.
      options: as of `load_dataset`.

    Returns:
      The data set. Labels and masks are whole, on each process's first device: every process
      makes them itself, so that they need not be sent. Of a set that is streamed it reads each
      example once for its label, which it keeps.
    """
    own_device = shardings.default_sharding()
    labels = load_dataset(**options, labels_only=True, sharding=own_device)
    images = load_dataset(**options, sharding=sharding) if is_local(sharding) else None
    described = describe_dataset(
        name=options["name"],
        data_dir=options.get("data_dir", ""),
        image_size=options.get("image_size", 0),
    )

    def absent(batch_size: int) -> jax.Array:
        return stand_in((batch_size, *described.image_shape), np.float32, sharding)

    def batch_at(step: int) -> Batch:
        size = options["batch_size"]
        own = images.batch_at(step).images if images else absent(size)
        return Batch(own, labels.batch_at(step).labels)

    def eval_batches(split: str) -> Iterator[EvalBatch]:
        sources = [labels.eval_batches(split)] + ([images.eval_batches(split)] if images else [])
        for (_, *labels_and_mask), *own in zip(*sources, strict=True):
            yield own[0][0] if own else absent(options["eval_batch_size"]), *labels_and_mask

    def close() -> None:
        labels.close()
        if images:
            images.close()

    return dataclasses.replace(
        labels,
        image_shape=described.image_shape,
        batch_at=batch_at,
        eval_batches=eval_batches,
        close=close,
    )


def _streaming_dataset(tfds_set, *, mean_and_std, **kwargs) -> Dataset:
    from dgl_jax.data import streaming  # Imports grain.

    return streaming.make_dataset(
        name=tfds_set.name,
        num_classes=tfds_set.num_classes,
        channels=tfds_set.image_shape[2],
        train_source=tfds_source.EncodedImages(str(tfds_set.directory), "train"),
        test_source=tfds_source.EncodedImages(str(tfds_set.directory), tfds_set.test_split),
        statistics=mean_and_std,
        **kwargs,
    )


def _check_numbers(
    batch_size: int, eval_batch_size: int, seed: int, validation_fraction: float
) -> None:
    for key, value in (
        ("batch_size", batch_size),
        ("eval_batch_size", eval_batch_size),
    ):
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1; try 128")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be in [0, 2**32); try 0")
    if not 0.0 <= validation_fraction < 1.0:
        raise UserError(
            f"validation_fraction={validation_fraction} must be in [0, 1); try 0.1, or 0 for none"
        )


def _check_stored_size(name: str, image_size: int, height: int) -> None:
    if image_size not in (0, height):
        raise UserError(
            f"image_size={image_size} must be 0 or {height}, the stored size, for name={name} held"
            f" in memory; leave image_size at 0"
        )


def _check_sizes(**sizes: int) -> None:
    advice = {
        "crop_padding": "try 4, or 0 for none",
        "image_size": "try 224, or 0 for the default",
        "num_workers": "try 0 for none",
    }
    for key, value in sizes.items():
        if value < 0:
            raise UserError(f"{key}={value} must not be negative; {advice[key]}")
