"""Asynchronous DGL with replay, really parallel (Belilovsky et al., ICML 2020, Algorithm 4).

A worker a block: it reads its predecessor's buffer by the policy, updates, writes its own
buffer, and never waits for another. Which batch a block sees depends on how fast the devices
are, so no two runs are the same; `async_dgl` simulates the same algorithm reproducibly.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax.block import Block, block_key, make_block_feed, make_block_step
from dgl_jax.config import Config
from dgl_jax.errors import UserError
from dgl_jax.methods import async_dgl
from dgl_jax.pipeline import BatchAt, Runner, activation_shapes, make_logits
from dgl_jax.placement import BlockPlacement
from dgl_jax.replay_buffer import check_memory, decode, encode
from dgl_jax.schedule import Schedule
from dgl_jax.types import TrainState
from dgl_jax.workers import Buffer, Slot, Work, Workers


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> Schedule:
    """A step is one update of whichever block is next to finish one; it has no tasks.

    Example:
      >>> schedule = make_schedule(Config(), num_blocks=3, num_updates=10, steps_per_epoch=5)
      >>> schedule.num_steps, schedule.num_updates, next(schedule.tasks(0))
      (30, 10, ())

    Raises:
      UserError: if there is no block to be slowed.

    Source: DGL, Algorithm 4.
    Deviation: every block makes the same number of updates; one that has made its own feeds
      those above.
    """
    del steps_per_epoch
    slow_block = config.replay.slow_block
    if slow_block >= num_blocks:
        raise UserError(
            f"config.replay.slow_block={slow_block} must be one of the {num_blocks} blocks; "
            f"use 0 to {num_blocks - 1}"
        )
    num_steps = num_blocks * num_updates

    def tasks(first_step: int) -> Iterator[tuple[()]]:
        return (() for _ in range(first_step, num_steps))

    return Schedule(num_steps, num_updates, tasks)


def make_works(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> list[Work]:
    """What each block's worker dispatches; arguments as in `make_runner`.

    What flows between them are mini-batches ``{"activations": encoded, "labels": int32 [B]}``,
    see `replay_buffer.encode`; they cross devices as they are stored, and the block that reads
    them decodes them in its own program.
    """
    return [
        _make_work(config, block, optimizer, key, placement, has_buffer=block is not blocks[-1])
        for block, placement in zip(blocks, placements, strict=True)
    ]


def _make_work(config, block, optimizer, key, placement, *, has_buffer: bool) -> Work:
    step = make_block_step(block, optimizer, log_gradient_norm=config.train.log_gradient_norm)
    feed = make_block_feed(block)
    dtype = config.replay.buffer_dtype
    key = jax.device_put(block_key(key, block), placement.state)

    def encode_outputs(activations):
        return encode(activations, dtype) if has_buffer else {}

    def decode_inputs(inputs):
        x = decode(inputs["activations"])
        # As if it had come from the layer below; images stay float32.
        return x.astype(config.network.dtype) if block.index else x

    def update_program(state, inputs, key):
        output = step(state, decode_inputs(inputs), inputs["labels"], key)
        return output.state, encode_outputs(output.activations), output.metrics

    def feed_program(state, inputs):
        return encode_outputs(feed(state, decode_inputs(inputs)))

    names = ("x", "scale") if dtype == "int8" else ("x",)
    outputs = _shardings(placement, names) if has_buffer else {}
    update_program = jax.jit(
        jax.named_call(update_program, name=f"block_{block.index}"),
        out_shardings=(placement.state, outputs, placement.state),
    )
    feed_program = jax.jit(feed_program, out_shardings=outputs)

    def move(inputs):
        shardings = _shardings(placement, inputs["activations"])
        return jax.device_put(inputs, {"activations": shardings, "labels": placement.batch})

    def dispatch_update(state, inputs):
        inputs = move(inputs)
        state, activations, metrics = update_program(state, inputs, key)
        return state, {"activations": activations, "labels": inputs["labels"]}, metrics

    def dispatch_feed(state, inputs):
        inputs = move(inputs)
        return {"activations": feed_program(state, inputs), "labels": inputs["labels"]}

    return Work(dispatch_update, dispatch_feed)


def _shardings(placement: BlockPlacement, names) -> dict[str, jax.sharding.Sharding]:
    """Of an encoded mini-batch; an int8 one's scales have no batch axis."""
    return {name: placement.batch if name == "x" else placement.state for name in names}


def make_workers(
    config: Config, works: Sequence[Work], state: TrainState, batch_at: BatchAt
) -> Workers:
    """Workers that go on from a state, not yet started; each program has run once.

    So no block falls behind because its programs take longer to compile.

    Args:
      config: its replay, its placement, and in ``train.num_steps`` the updates of each block.
      works: of `make_works`.
      state: its memory is that of `make_runner`.
      batch_at: the stream of training batches.
    """

    def inputs_at(turn: int) -> Slot:
        batch = batch_at(turn)
        return {"activations": {"x": batch.images}, "labels": batch.labels}

    packed = state.memory["buffers"]
    counts = jax.device_get([(buffer["use_counts"], buffer["num_writes"]) for buffer in packed])
    buffers = [
        Buffer(list(buffer["slots"]), use_counts.tolist(), int(num_writes))
        for buffer, (use_counts, num_writes) in zip(packed, counts)
    ]
    turns = jax.device_get(state.memory["turns"]).tolist()

    first = {turns[0]: inputs_at(turns[0])}  # Kept: a stream may be slow to go back a step.
    inputs = [first[turns[0]], *(buffer.slots[0] for buffer in buffers)]
    for work, block_state, slot in zip(works, state.blocks, inputs):
        jax.block_until_ready((work.update(block_state, slot), work.feed(block_state, slot)))

    # XLA's CPU devices share one pool of threads, which prefers the next of a chain of queued
    # turns to the first of another device: a worker that queues would starve the others.
    (device, *_) = jax.tree.leaves(state.blocks[0].params)[0].devices()
    max_in_flight = 1 if device.platform == "cpu" else config.placement.max_steps_in_flight

    return Workers(
        works,
        lambda turn: first.pop(turn, None) or inputs_at(turn),
        state.blocks,
        buffers,
        turns,
        num_updates=config.train.num_steps,
        replay=config.replay,
        max_in_flight=max_in_flight,
    )


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """A thread a block; `step` waits for the next update of any block.

    The first step compiles and starts the workers from its state; from then on the state is
    theirs, and `snapshot` tells it. A snapshot's memory has the buffers and counters, so a run
    that was killed goes on with its buffers full and every block at its own update.

    Args:
      config: its replay, its placement, what it logs, and in ``train.num_steps`` the updates
        of each block.
      blocks: of one network, in order.
      optimizer: as in `init_states`.
      key: the run's random key.
      placements: one a block.

    Source: DGL, Algorithm 4.
    Deviation: as those of `make_schedule` and `Workers`. ``config.replay.slowdown`` is ours: a
      slowed worker sleeps for S - 1 times each turn's own time.
    """
    replay, num_updates = config.replay, config.train.num_steps
    works = make_works(config, blocks, optimizer, key, placements)
    workers: Workers | None = None
    # Updates that `step` has told, and those that it will never tell: they had ended before the
    # checkpoint that the run goes on from, but the loop had not taken them yet.
    told = untold = 0

    def step(state: TrainState, tasks, batch_at: BatchAt):
        nonlocal workers, told, untold
        if workers is None:
            workers = make_workers(config, works, state, batch_at)
            told = int(jax.device_get(state.memory["told"]))
            turns = jax.device_get(state.memory["turns"])
            untold = int(np.minimum(turns, num_updates).sum()) - told
            workers.start()
        if untold:
            told, untold = told + 1, untold - 1
            return TrainState(()), {}
        event = workers.next_event()
        while event.metrics is None:
            event = workers.next_event()
        told += 1
        staleness = {}
        if event.block > 0:
            staleness = {"age": event.age, "use_count": event.use_count}
            staleness["skipped_turns"] = event.skipped_turns
        return TrainState(()), {
            event.block: event.metrics | staleness | {"updates": event.turn + 1}
        }

    def init_memory(block_states, images):
        *activations, _ = activation_shapes(blocks, block_states, images)
        devices = {device for placement in placements for device in placement.devices}
        check_memory(activations, replay, list(devices))
        buffers = []
        for x, placement in zip(activations, placements):
            shapes = jax.eval_shape(lambda x: encode(x, replay.buffer_dtype), x)
            labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
            slot = jax.device_put(
                jax.tree.map(
                    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
                    {"activations": shapes, "labels": labels},
                ),
                {"activations": _shardings(placement, shapes), "labels": placement.batch},
            )
            size = replay.buffer_size
            buffers.append(Buffer([slot] * size, [0] * size, 0))
        return pack_memory(buffers, [0] * len(blocks), told=0)

    def pack_memory(buffers, turns, told):
        packed = []
        for buffer, placement in zip(buffers, placements):
            counts = {"use_counts": buffer.use_counts, "num_writes": buffer.num_writes}
            packed.append({"slots": tuple(buffer.slots)} | put(counts, placement))
        return {"buffers": tuple(packed)} | put({"turns": turns, "told": told}, placements[0])

    def put(numbers, placement):
        return {
            name: jax.device_put(np.asarray(value, np.int32), placement.state)
            for name, value in numbers.items()
        }

    def snapshot(state):
        if workers is None:
            return state
        states, turns, buffers = workers.cut()
        return TrainState(tuple(states), pack_memory(buffers, turns, told))

    def close():
        if workers is not None:
            workers.close()

    return Runner(step, make_logits(blocks, placements), init_memory, snapshot, close)


METHOD = dataclasses.replace(async_dgl.METHOD, make_schedule=make_schedule, make_runner=make_runner)
