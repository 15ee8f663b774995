"""What a data set gives to the training loop, and how its training examples are split."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dgl_jax.errors import UserError
from dgl_jax.types import Batch, DeviceStream

EVAL_SPLITS = ("test", "validation", "train")

# Constants folded into the one key of a data set, one for each use of randomness.
SPLIT, SHUFFLE, AUGMENT = 0, 1, 2

EvalBatch = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An opened data set.

    Deviation: an epoch's last partial batch is dropped, so that every step has one shape; which
    examples it leaves out changes with each epoch's order. The official code keeps it.

    Attributes:
      name: the name of the set.
      image_shape: (H, W, C) of the images in a batch.
      num_classes: labels are in [0, num_classes).
      num_train: training examples, without the validation split.
      num_validation: examples held out of the training examples.
      num_test: test examples.
      steps_per_epoch: num_train // batch_size.
      batch_at: step -> Batch on the device, a function of (seed, step) only: images float32
        [B, H, W, C], normalised and augmented; labels int32 [B].
      eval_batches: "test", "validation" or "train" -> iterator of (images float32 [E, H, W, C],
        normalised, not augmented; labels int32 [E]; mask float32 [E]). Every batch is of
        eval_batch_size; the last is padded and its padding has mask 0, so sums over the mask
        are exact. Examples come in stored order.
      close: ends the processes and threads that read ahead; calling batch_at starts them anew.
      stream: the training batches for a program of many steps; None where the set does not lie
        on the device.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_validation: int
    num_test: int
    steps_per_epoch: int
    batch_at: Callable[[int], Batch]
    eval_batches: Callable[[str], Iterator[EvalBatch]]
    close: Callable[[], None]
    stream: DeviceStream | None = None


def split_validation(
    num_examples: int, *, validation_fraction: float, batch_size: int, seed: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the training examples at random.

    Args:
      num_examples: the number of stored training examples.
      validation_fraction: the share held out, in [0, 1).
      batch_size: training examples a step.
      seed: of the data set.
      held_out: whether the two sides change places.

    Returns:
      (train, validation): sorted int32 indices, disjoint, together all examples.

    Example:
      >>> options = {"validation_fraction": 0.2, "batch_size": 2, "seed": 0}
      >>> train, validation = split_validation(10, **options, held_out=False)
      >>> len(train), len(validation), sorted([*train.tolist(), *validation.tolist()])
      (8, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])

    Raises:
      UserError: if either side is too small to use.
    """
    num_validation = round(num_examples * validation_fraction)
    if validation_fraction > 0 and num_validation == 0:
        raise UserError(
            f"validation_fraction={validation_fraction} must hold out at least one of"
            f" {num_examples} examples; try {max(0.1, 1 / num_examples):.3g}"
        )
    num_train = num_validation if held_out else num_examples - num_validation
    if batch_size > num_train:
        kind = "held-out" if held_out else "training"
        raise UserError(
            f"batch_size={batch_size} must not exceed the {num_train} {kind} examples;"
            f" try {max(num_train, 1)}"
        )
    if num_validation == 0:
        return np.arange(num_examples, dtype=np.int32), np.zeros(0, np.int32)
    key = jax.random.fold_in(jax.random.key(seed), SPLIT)
    order = jax.device_get(jax.random.permutation(key, num_examples)).astype(np.int32)
    train, validation = np.sort(order[num_validation:]), np.sort(order[:num_validation])
    return (validation, train) if held_out else (train, validation)


def check_eval_split(split: str, num_validation: int) -> None:
    """Raises UserError unless `split` names examples that there are."""
    if split not in EVAL_SPLITS:
        raise UserError(f"split={split} must be one of {', '.join(EVAL_SPLITS)}; use test")
    if split == "validation" and num_validation == 0:
        raise UserError("split=validation needs held-out examples; set validation_fraction=0.1")


def check_step(step: int) -> None:
    """Raises UserError unless `step` fits the int32 counter that the device keeps."""
    if not 0 <= step < 2**31:
        raise UserError(f"step={step} must be in [0, 2**31); count steps from 0")
