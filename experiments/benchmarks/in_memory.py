"""The part of `benchmark.py data` that is about sets in memory: their batches, and who uses them."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from benchmarks import setting, step
from dgl_jax.data import in_memory, shardings
from dgl_jax.data.sources import Arrays
from dgl_jax.tables import markdown, spread

_CONSUMER = flags.DEFINE_string("consumer", "cnn6", "data: the network beside a set in memory.")

_SHAPE = (50_000, 32, 32, 3)


def images_per_second() -> dict[str, list[float]]:
    """Images a second, of a set in memory and of training on one batch again and again."""
    rng, batch_size = np.random.default_rng(0), setting.BATCH_SIZE.value
    images = rng.integers(0, 256, _SHAPE, np.uint8)
    labels = rng.integers(0, setting.NUM_CLASSES, len(images), np.int32)
    dataset = in_memory.make_dataset(
        Arrays("random", setting.NUM_CLASSES, images, labels, images[:1], labels[:1]),
        batch_size=batch_size, eval_batch_size=1, seed=0, validation_fraction=0.0, held_out=False,
        augment=True, crop_padding=4, flip=True, statistics=((0.5,) * 3, (0.25,) * 3),
        sharding=shardings.default_sharding(),
    )  # fmt: skip
    steps = itertools.count()

    def read_an_epoch(_):  # So that each turn has one new order.
        for _ in range(dataset.steps_per_epoch):
            batch = dataset.batch_at(next(steps))
        jax.block_until_ready(batch)

    turns = {"input": read_an_epoch, "training": _training()}
    seconds = setting.interleaved_seconds(turns, setting.ROUNDS.value, num_steps=1)
    num_steps = {"input": dataset.steps_per_epoch, "training": setting.STEPS.value}
    return {
        name: [num_steps[name] * batch_size / second for second in seconds[name]] for name in turns
    }


def _training() -> Callable[[int], None]:
    """Some steps of DGL, each layer a block, all in one program."""
    consumer = (_CONSUMER.value, setting.WIDTH_FACTOR.value)
    run, _, _ = step.fused(step.variant_config(*consumer, "per_layer"))
    return lambda _: run(setting.STEPS.value)


def table_and_notes(rates: dict[str, list[float]]) -> tuple[str, str]:
    """What `images_per_second` has measured, in Markdown."""
    pairs = zip(rates["training"], rates["input"], strict=True)
    share = spread([100 * used / arrived for used, arrived in pairs], ".1f")
    consumer = f"{_CONSUMER.value} x {setting.WIDTH_FACTOR.value:g}"
    rows = [
        ["`batch_at`: gather, crop, flip, normalise", spread(rates["input"], ".0f")],
        [f"used by training {consumer} with DGL", spread(rates["training"], ".0f")],
        ["a batch's input, % of a training step", share],
    ]
    notes = (
        f"{_SHAPE[0]:,} images of {_SHAPE[1]}x{_SHAPE[2]} on the device, batches of "
        f"{setting.BATCH_SIZE.value}: an epoch of input a turn, its new order included; "
        f"{setting.STEPS.value} training steps on one batch, each layer a block, in one program."
    )
    return markdown(["a set in memory", "images/s"], rows), notes
