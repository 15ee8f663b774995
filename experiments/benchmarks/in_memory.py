"""The part of `benchmark.py data` that is about sets in memory: their batches, and who uses them."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from benchmarks import setting
from dgl_jax.auxiliary import head_for_loss
from dgl_jax.config import default_config, from_dict
from dgl_jax.data import Dataset, in_memory, shardings
from dgl_jax.data.sources import Arrays
from dgl_jax.grouping import choose_cuts, configured_network, make_classifiers
from dgl_jax.losses import make_loss_fns
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.types import TrainState

_CONSUMER = flags.DEFINE_string("consumer", "cnn6", "data: the network beside a set in memory.")

_SHAPE = (50_000, 32, 32, 3)


def images_per_second() -> dict[str, list[float]]:
    """Images a second, of a set in memory and of training on one batch of it again and again."""
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

    turns = {"input": read_an_epoch, "training": _training(dataset)}
    seconds = setting.interleaved_seconds(turns, setting.ROUNDS.value, num_steps=1)
    num_steps = {"input": dataset.steps_per_epoch, "training": setting.STEPS.value}
    return {
        name: [num_steps[name] * batch_size / second for second in seconds[name]] for name in turns
    }


def _training(dataset: Dataset) -> Callable[[int], None]:
    """Some steps of DGL, each layer a block, all in one program."""
    given = default_config()
    given.network.name = _CONSUMER.value
    given.network.width_factor = setting.WIDTH_FACTOR.value
    given.optimizer.schedule = "constant"
    config, num_classes = from_dict(given.to_dict()), setting.NUM_CLASSES
    network = configured_network(config, num_classes)
    cuts = choose_cuts(config, network, num_classes, dataset.image_shape)
    heads = make_classifiers(config, (config.auxiliary.name,) * len(cuts), num_classes)
    heads = tuple(head_for_loss(config.loss.name, head, None) for head in heads)
    loss_fns = make_loss_fns(config.loss, len(cuts) + 1, num_classes)
    method, key = METHODS["dgl"], jax.random.key(0)
    blocks = method.make_blocks(network, cuts, heads, loss_fns)
    placements = make_placements(config.placement, len(blocks))
    optimizer = make_optimizer(config.optimizer, 10**6, 10**6)
    state = TrainState(init_states(blocks, optimizer, key, dataset.image_shape, placements))
    runner = method.make_runner(config, blocks, optimizer, key, placements)
    tasks = method.make_schedule(config, len(blocks), 10**6, 10**6).tasks(0)
    batch = dataset.batch_at(0)

    def run(_):
        nonlocal state
        for _ in range(setting.STEPS.value):
            state, _ = runner.step(state, next(tasks), lambda step: batch)
        jax.block_until_ready(state)

    return run


def table_and_notes(rates: dict[str, list[float]]) -> tuple[str, str]:
    """What `images_per_second` has measured, in Markdown."""
    pairs = zip(rates["training"], rates["input"], strict=True)
    share = setting.spread([100 * used / arrived for used, arrived in pairs], ".1f")
    consumer = f"{_CONSUMER.value} x {setting.WIDTH_FACTOR.value:g}"
    table = [
        "| a set in memory | images/s |",
        "|---|---|",
        f"| `batch_at`: gather, crop, flip, normalise | {setting.spread(rates['input'], '.0f')} |",
        f"| used by training {consumer} with DGL | {setting.spread(rates['training'], '.0f')} |",
        f"| a batch's input, % of a training step | {share} |",
    ]
    notes = (
        f"{_SHAPE[0]:,} images of {_SHAPE[1]}x{_SHAPE[2]} on the device, batches of "
        f"{setting.BATCH_SIZE.value}: an epoch of input a turn, its new order included; "
        f"{setting.STEPS.value} training steps on one batch, each layer a block, in one program."
    )
    return "\n".join(table), notes
