"""Asynchronous DGL with replay (Belilovsky et al., ICML 2020, Algorithm 2), simulated.

In every step one block is drawn. It reads a mini-batch from the buffer that the block below
writes (block 0: the next of the stream), updates on its local loss and writes its activations
into its own buffer. The plan (`dgl_jax/replay.py`) knows all this before the run begins; here
it runs on one mesh, with the buffers in device memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dgl_jax import replay_buffer
from dgl_jax.block import Block, block_key, make_block_feed, make_block_step
from dgl_jax.config import Config, ReplayConfig
from dgl_jax.errors import UserError
from dgl_jax.methods import dgl
from dgl_jax.pipeline import (
    Runner,
    activation_shapes,
    bound_in_flight,
    for_devices,
    make_logits,
    one_for_equal_blocks,
)
from dgl_jax.placement import BlockPlacement
from dgl_jax.replay import Event, PlanConfig, plan, slowed_pmf
from dgl_jax.schedule import FEED, UPDATE, Schedule
from dgl_jax.types import Batch, BlockState, Metrics, TrainState

# The official code lowers a block's learning rate two epochs late (see `replay.PlanConfig`).
_OFFICIAL_DROP_DELAY = 2.0

Turn = Callable[..., tuple[BlockState, replay_buffer.Buffer | None, Metrics]]


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> Schedule:
    """One block's turn a step, in the plan's order.

    Args:
      config: its ``replay``, ``optimizer`` (when learning rates drop) and ``seed``.
      num_blocks: K.
      num_updates: the updates of each block; an epoch more with the official accounting.
      steps_per_epoch: the updates of one epoch.

    Example:
      Two blocks by turns, after a warm-up of two turns each. Of the batches that have been read
      least, block 1 reads the newest.

      >>> config = Config(replay=ReplayConfig(order="round_robin"))
      >>> schedule = make_schedule(config, num_blocks=2, num_updates=3, steps_per_epoch=3)
      >>> [(event.block, event.batch) for (event,) in schedule.tasks(0)]
      [(0, 0), (0, 1), (1, 1), (1, 0), (0, 2), (1, 2)]

    Raises:
      UserError: ``config.replay`` does not fit the blocks, or has a field that is not used.

    Source: DGL, Algorithm 2 and section 4.3.
    Deviation: as the options of `replay.PlanConfig` say.
    """
    plan_config = make_plan_config(config, num_blocks, num_updates, steps_per_epoch)

    def tasks(first_step: int) -> Iterator[tuple[Event, ...]]:
        return ((event,) for event in plan(plan_config, first_step))

    return Schedule(
        num_steps=sum(1 for _ in plan(plan_config)),
        num_updates=plan_config.num_updates,
        tasks=tasks,
        drop_delay_epochs=_OFFICIAL_DROP_DELAY if config.replay.accounting == "official" else 0.0,
    )


def make_plan_config(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> PlanConfig:
    """What `make_schedule` plans; the arguments are the same.

    Raises:
      UserError: ``config.replay`` has a field that is not used, or does not fit the blocks.
    """
    replay, optimizer = config.replay, config.optimizer
    if replay.order == "round_robin":
        user, unused = "order=round_robin", ("slow_block", "slowdown", "pmf")
    else:
        user, unused = "pmf", ("slow_block", "slowdown") if replay.pmf else ()
    for name in unused:
        if getattr(replay, name) != getattr(ReplayConfig, name):
            raise UserError(
                f"config.replay.{name}={getattr(replay, name)} is not used with "
                f"config.replay.{user}; leave one of them out"
            )
    if replay.order == "round_robin":
        pmf = None
    else:
        pmf = replay.pmf or slowed_pmf(num_blocks, replay.slow_block, replay.slowdown)
    return PlanConfig(
        num_blocks=num_blocks,
        steps_per_epoch=steps_per_epoch,
        num_epochs=num_updates / steps_per_epoch,
        pmf=pmf,
        drop_epochs=optimizer.drop_epochs if optimizer.schedule == "step" else (),
        buffer_size=replay.buffer_size,
        policy=replay.policy,
        max_reuse=replay.max_reuse,
        warm_up=replay.warm_up,
        accounting=replay.accounting,
        seed=config.seed,
    )


def make_turn(
    config: Config, block: Block, optimizer: optax.GradientTransformation, operation: str
) -> Turn:
    """Returns one turn of one block: it reads, updates or only feeds, and writes.

    The returned ``turn(state, buffer, source, read_slot, write_slot, key) -> (state, buffer,
    metrics)`` is pure; jit it with the block's state and its own buffer donated. The slots are
    int32 scalars, so that one program serves them all. ``source`` is a `Batch` for block 0
    (and ``read_slot`` None), else the buffer of the block below; ``buffer`` and ``write_slot``
    are None for the last block. Labels travel with the activations.

    Args:
      config: the dtype of the network's activations, and what is logged.
      block: the block.
      optimizer: the transformation whose state `init_block_state` made.
      operation: `UPDATE`, or `FEED`: in evaluation mode and without a gradient.

    Source: DGL, Algorithm 2, lines 4 to 12.
    Deviation: none.
    """
    update = make_block_step(block, optimizer, log_gradient_norm=config.train.log_gradient_norm)
    feed = make_block_feed(block)

    def turn(state, buffer, source, read_slot, write_slot, key):
        if isinstance(source, Batch):
            x, labels = source.images, source.labels
        else:
            x, labels = replay_buffer.read(source, read_slot)
            x = x.astype(config.network.dtype)  # As if it had come from the layer below.
        metrics = {}
        if operation == UPDATE:
            output = update(state, x, labels, key)
            state, x, metrics = output.state, output.activations, output.metrics
        else:
            x = feed(state, x)
        if buffer is not None:
            buffer = replay_buffer.write(buffer, write_slot, x, labels)
        return state, buffer, metrics

    return turn


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """One program a block and operation, all on one mesh; the run's memory is the buffers.

    Args:
      config: its replay and placement, and what it logs.
      blocks: of one network, in order.
      optimizer: as in `init_states`.
      key: the run's random key.
      placements: all of one mesh.
    """
    placement, last_block = placements[0], len(blocks) - 1
    buffer_shardings = replay_buffer.buffer_shardings(placement, config.replay)
    keys = [jax.device_put(block_key(key, block), placement.state) for block in blocks]
    slots = jax.device_put(
        list(np.arange(config.replay.buffer_size, dtype=np.int32)), placement.state
    )

    @functools.cache
    def turns(operation: str) -> list[Turn]:
        # The last block, which has no buffer, shares with no other.
        make = lambda block: make_turn(config, block, optimizer, operation)
        parts = (slice(last_block), slice(last_block, None))
        return [
            turn
            for part in parts
            for turn in one_for_equal_blocks(blocks[part], placements[part], make)
        ]

    @functools.cache
    def program(block: int, operation: str) -> Turn:
        return jax.jit(
            for_devices(turns(operation)[block], placements[block]),
            donate_argnums=(0, 1),
            out_shardings=(
                placement.state,
                None if block == last_block else buffer_shardings,
                placement.state,
            ),
        )

    def step(state: TrainState, tasks: Sequence[Event], batch_at):
        (event,) = tasks
        block = event.block
        if event.operation == FEED and block == last_block:
            return state, {}  # It has finished and nobody reads it.
        states, buffers = list(state.blocks), [*state.memory, None]
        states[block], buffers[block], metrics = program(block, event.operation)(
            states[block],
            buffers[block],
            batch_at(event.batch) if block == 0 else buffers[block - 1],
            None if event.read_slot is None else slots[event.read_slot],
            None if event.write_slot is None else slots[event.write_slot],
            keys[block],
        )
        state = TrainState(tuple(states), tuple(buffers[:-1]))
        if event.operation == FEED:
            return state, {}
        if block > 0:
            metrics |= {"age": event.age, "use_count": event.use_count}
        return state, {block: metrics}

    def init_memory(block_states: Sequence[BlockState], images: jax.ShapeDtypeStruct) -> Any:
        shapes = activation_shapes(blocks, block_states, images)
        return replay_buffer.init_buffers(shapes[:-1], config.replay, placement)

    return Runner(
        step=bound_in_flight(step, config.placement.max_steps_in_flight),
        logits=make_logits(blocks, placements),
        init_memory=init_memory,
    )


def bytes_between(config: Config, activations: jax.ShapeDtypeStruct) -> int:
    """A mini-batch as it is stored, with its labels."""
    buffer = replay_buffer.buffer_shapes(activations, config.replay)
    return replay_buffer.nbytes(buffer) // config.replay.buffer_size


METHOD = dataclasses.replace(
    dgl.METHOD, make_schedule=make_schedule, make_runner=make_runner, bytes_between=bytes_between
)
