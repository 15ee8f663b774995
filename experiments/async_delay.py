r"""Measures whether a slow block holds up the others in asynchronous DGL.

python experiments/async_delay.py --config=experiments/configs/quickstart.py --workdir=DIR \
    --config.method.name=async_dgl_parallel --config.placement.kind=pipelined \
    --config.placement.num_devices=2 --config.replay.slow_block=1 --config.replay.slowdown=2.0

One run, in which the delay is switched on and off by turns, in two ways. "sleep": the block's
worker sleeps after each turn, as in training with config.replay.slowdown. "work": its device
computes every update S times. Where devices are CPU devices that share cores, a block that
sleeps leaves its core to the others, which then run faster; one that works does not. Prints,
and writes to DIR/async_delay.json, each block's updates a second: medians over phases.
"""

import dataclasses
import json
import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from dgl_jax import cli
from dgl_jax.config import Config
from dgl_jax.grouping import choose_cuts_and_heads, configured_blocks, configured_network
from dgl_jax.methods import METHODS
from dgl_jax.methods.async_dgl_parallel import make_workers, make_works
from dgl_jax.metrics import write_atomically
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements, request_cpu_devices
from dgl_jax.types import Batch, TrainState

# Of the one random batch that block 0 gets again and again, so that no data loader is measured.
_NUM_CLASSES, _IMAGE_SHAPE = 10, (28, 28, 1)
_DELAYS = ("none", "sleep", "work")
_NUM_ROUNDS = 12  # Each has a phase without delay and one of each kind.
_PHASE_SECONDS = 1.0  # The first fifth is not counted.


def measure_delay(config: Config) -> dict[str, Any]:
    """Updates a second of every block, with one block delayed and without.

    Args:
      config: a run of async_dgl_parallel; its replay's slow_block and slowdown, rounded, are
        the delay.

    Returns:
      ``rates``: for ``none``, ``sleep`` and ``work`` a list of a rate a block for every phase;
      ``medians``: of these, one a block; ``ratios``: of the medians to those of ``none``.
    """
    request_cpu_devices(config.placement)
    train = dataclasses.replace(config.train, num_steps=2**30, num_epochs=0.0)
    config = dataclasses.replace(config, train=train)
    network = configured_network(config, _NUM_CLASSES)
    cuts, heads = choose_cuts_and_heads(config, network, _NUM_CLASSES, _IMAGE_SHAPE)
    blocks = configured_blocks(config, network, cuts, heads, _NUM_CLASSES)
    method = METHODS["async_dgl_parallel"]
    placements = make_placements(config.placement, len(blocks))
    method.make_schedule(config, len(blocks), 1, 1)  # Checks which block is slowed.
    optimizer = make_optimizer(config.optimizer, 1000, 1000)
    key = jax.random.key(config.seed)
    states = init_states(blocks, optimizer, key, _IMAGE_SHAPE, placements)
    images = jax.ShapeDtypeStruct((train.batch_size, *_IMAGE_SHAPE), np.float32)
    runner = method.make_runner(config, blocks, optimizer, key, placements)
    state = TrainState(states, runner.init_memory(states, images))
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        Batch(
            rng.standard_normal(images.shape, dtype=np.float32),
            rng.integers(0, _NUM_CLASSES, train.batch_size).astype(np.int32),
        ),
        placements[0].batch,
    )
    works = make_works(config, blocks, optimizer, key, placements)
    slow_block, slowdown = config.replay.slow_block, round(config.replay.slowdown)
    slow_update, num_repeats = works[slow_block].update, 1

    def repeated_update(state, slot):
        for _ in range(num_repeats - 1):
            slow_update(state, slot)
        return slow_update(state, slot)

    works[slow_block] = dataclasses.replace(works[slow_block], update=repeated_update)
    workers = make_workers(config, works, state, lambda turn: batch)

    def phase(delay: str) -> list[float]:
        nonlocal num_repeats
        workers.slowdown = float(slowdown) if delay == "sleep" else 1.0
        num_repeats = slowdown if delay == "work" else 1
        counts, start = [0] * len(blocks), time.perf_counter()
        begin, end = start + _PHASE_SECONDS / 5, start + _PHASE_SECONDS
        while (now := time.perf_counter()) < end:
            block = workers.next_event().block
            counts[block] += now >= begin
        return [count / (end - begin) for count in counts]

    rates = {delay: [] for delay in _DELAYS}
    workers.start()
    try:
        phase("none")
        for number in range(_NUM_ROUNDS):
            for place in range(len(_DELAYS)):  # Each in each place, so that a drift cancels.
                delay = _DELAYS[(number + place) % len(_DELAYS)]
                rates[delay].append(phase(delay))
    finally:
        workers.close()
    medians = {
        delay: [statistics.median(block) for block in zip(*phases)]
        for delay, phases in rates.items()
    }
    ratios = {
        delay: [rate / free for rate, free in zip(medians[delay], medians["none"])]
        for delay in _DELAYS
    }
    return {
        "slow_block": slow_block,
        "slowdown": slowdown,
        "rates": rates,
        "medians": medians,
        "ratios": ratios,
    }


def main(config: Config, workdir: str) -> None:
    os.makedirs(workdir, exist_ok=True)
    summary = measure_delay(config)
    write_atomically(os.path.join(workdir, "async_delay.json"), json.dumps(summary, indent=2))
    print(f"Updates a second; block {summary['slow_block']} delayed {summary['slowdown']} times\n")
    print("| block | none | sleep | work |\n|---|---|---|---|")
    for block in range(len(summary["medians"]["none"])):
        cells = [
            f"{summary['medians'][delay][block]:.1f} ({summary['ratios'][delay][block]:.2f})"
            for delay in _DELAYS
        ]
        print(f"| {block} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cli.run(main)
