"""Asynchronous DGL against Algorithm 2 written out with lists; and how it runs on devices."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import random
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax import checkpoint, replay_buffer, train
from dgl_jax.config import (
    Config,
    LossConfig,
    OptimizerConfig,
    PlacementConfig,
    ReplayConfig,
    default_config,
    from_dict,
)
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS, async_dgl
from dgl_jax.metrics import read_metrics
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.schedule import FEED, UPDATE
from dgl_jax.types import TrainState

_ROOT = pathlib.Path(__file__).parents[1]
_STEPS_PER_EPOCH = 10
_SYNCHRONOUS = ReplayConfig(order="round_robin", buffer_size=1, warm_up="none")


_CONSTANT = OptimizerConfig(learning_rate=0.05, schedule="constant")


def _config(replay=_SYNCHRONOUS, optimizer=_CONSTANT, **fields):
    return Config(replay=replay, optimizer=optimizer, **fields)


def _setup(blocks, config, num_updates, method="async_dgl", cast=lambda state: state):
    """``(schedule, state, runner)`` on 6x6x2 images in mini-batches of eight."""
    method = METHODS[method]
    placements = make_placements(config.placement, len(blocks))
    optimizer = make_optimizer(config.optimizer, num_updates, _STEPS_PER_EPOCH)
    key = jax.random.key(0)
    states = cast(init_states(blocks, optimizer, key, (6, 6, 2), placements))
    runner = method.make_runner(config, blocks, optimizer, key, placements)
    images = jax.ShapeDtypeStruct((8, 6, 6, 2), jnp.float32)
    schedule = method.make_schedule(config, len(blocks), num_updates, _STEPS_PER_EPOCH)
    return schedule, TrainState(states, runner.init_memory(states, images)), runner


def _run(schedule, state, runner, batches, first_step=0, num_steps=None, check=None):
    """Returns the final state and the metrics of each step."""
    placement = runner_sharding(state)
    batches = jax.device_put(list(batches), placement)
    seen, metrics = set(), []
    for step, (event,) in enumerate(schedule.tasks(first_step)):
        if step == num_steps:
            break
        program = event.block, event.operation
        with check() if check and program in seen else contextlib.nullcontext():
            state, of_step = runner.step(
                state, (event,), lambda number: batches[number % len(batches)]
            )
        seen.add(program)
        metrics.append(of_step)
    return state, jax.device_get(metrics)


def runner_sharding(state):
    """The sharding of a mini-batch that belongs to these buffers."""
    sharding = state.memory[0]["labels"].sharding
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))


@pytest.fixture
def blocks(small_network, small_head):
    network = Network("three", small_network.layers[:3], small_network.head)
    return METHODS["async_dgl"].make_blocks(network, (0, 1), small_head, make_loss_fn(LossConfig()))


# ---- Algorithm 2, written out.


class OracleBlock:
    """A layer and its head in float64, with SGD written out."""

    def __init__(self, block, state, optimizer, drop_step):
        (self.layer,), self.head = block.layers, block.head
        self.params = {"layer": state.params["layers"][0], "head": state.params["head"]}
        self.stats = state.batch_stats["layers"][0]
        self.velocity = jax.tree.map(np.zeros_like, self.params)
        self.optimizer, self.drop_step, self.updates = optimizer, drop_step, 0
        self.gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        self.evaluate = jax.jit(lambda variables, x: self.layer.apply(variables, x, False))

    def _loss(self, params, stats, x, labels):
        variables = {"params": params["layer"], "batch_stats": stats}
        h, updated = self.layer.apply(variables, x, True, mutable=["batch_stats"])
        logits = self.head.apply({"params": params["head"]}, h)
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        loss = (jnp.log(jnp.exp(logits).sum(axis=1)) - picked).mean()
        return loss, (h, logits, updated["batch_stats"])

    def update(self, x, labels):
        (loss, (h, logits, stats)), gradient = self.gradient(self.params, self.stats, x, labels)
        learning_rate = self.optimizer.learning_rate
        if self.updates >= self.drop_step:
            learning_rate *= self.optimizer.drop_factor
        if self.updates == self.drop_step and self.optimizer.momentum_at_drop == "reset":
            self.velocity = jax.tree.map(np.zeros_like, self.params)
        momentum, decay = self.optimizer.momentum, self.optimizer.weight_decay
        self.velocity = jax.tree.map(
            lambda v, g, p: momentum * v + (g + decay * p), self.velocity, gradient, self.params
        )
        self.params = jax.tree.map(lambda p, v: p - learning_rate * v, self.params, self.velocity)
        self.stats, self.updates = stats, self.updates + 1
        return np.array(h), float(loss), float((np.argmax(logits, axis=1) == labels).mean())

    def feed(self, x):
        return np.array(
            self.evaluate({"params": self.params["layer"], "batch_stats": self.stats}, x)
        )


def _stored(x, buffer_dtype):
    """What is left of activations after a buffer, in numpy."""
    x = x.astype(np.float32)
    if buffer_dtype == "float32":
        return x
    scale = np.abs(x).max((0, 1, 2)) / np.float32(127)
    integers = np.rint(x / np.where(scale == 0, np.float32(1), scale))
    assert np.abs(integers).max() <= 127
    return integers.astype(np.float32) * scale


def _close(actual, expected, atol):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("buffer_dtype, momentum_at_drop", [("float32", "keep"), ("int8", "reset")])
def test_algorithm_2_written_out(blocks, small_batches, buffer_dtype, momentum_at_drop):
    """A drop at each block's own update 10; S = 2 on block 1; 20 updates of each block."""
    size, num_updates, seed = 3, 20, 5
    # XLA's float32 division may differ from numpy's in the last bit of a scale.
    atol = 1e-10 if buffer_dtype == "float32" else 1e-6
    optimizer = OptimizerConfig(
        learning_rate=0.125,
        momentum=0.9,
        weight_decay=5e-3,
        drop_epochs=(1.0,),
        drop_factor=0.25,
        momentum_at_drop=momentum_at_drop,
    )
    replay = ReplayConfig(slow_block=1, slowdown=2.0, buffer_size=size, buffer_dtype=buffer_dtype)
    with jax.enable_x64(True):
        to_float64 = lambda states: jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, states
        )
        config = _config(replay, optimizer, seed=seed)
        schedule, state, runner = _setup(blocks, config, num_updates, cast=to_float64)
        oracles = [
            OracleBlock(block, block_state, optimizer, drop_step=_STEPS_PER_EPOCH)
            for block, block_state in zip(blocks, jax.device_get(state.blocks))
        ]
        batches = jax.device_put(small_batches)
        events = schedule.tasks(0)

        # A buffer is a list of what was written, oldest first, of which the last M are held.
        buffers, turns, rng = [[], []], [0, 0, 0], random.Random(seed)
        first_blocks = [0, 0, 1, 1, 2, 2]
        num_events = num_feeds = num_old = num_reused = 0
        while min(turns) < num_updates:
            u = rng.random() if not first_blocks else None
            block = first_blocks.pop(0) if u is None else 0 if u < 0.4 else 1 if u < 0.6 else 2
            (event,) = next(events)

            # Read.
            if block == 0:
                number = turns[0]
                x, labels = small_batches[number % 20].images, small_batches[number % 20].labels
            else:
                held = buffers[block - 1][-size:]
                fewest = min(slot["uses"] for slot in held)
                slot = [slot for slot in held if slot["uses"] == fewest][-1]
                slot["uses"] += 1
                x, labels, number = slot["x"], slot["labels"], slot["number"]
                age = len(buffers[block - 1]) - 1 - slot["place"]
                assert event.read_slot == slot["place"] % size
                assert (event.age, event.use_count) == (age, slot["uses"])
                num_old, num_reused = num_old + (age > 0), num_reused + (slot["uses"] > 1)

            # Update, or only feed.
            is_update = turns[block] < num_updates
            if is_update:
                h, loss, top1 = oracles[block].update(x.astype(np.float64), labels)
            else:
                h = oracles[block].feed(x.astype(np.float64))
            expected_event = block, turns[block], number, UPDATE if is_update else FEED
            assert (event.block, event.turn, event.batch, event.operation) == expected_event
            turns[block] += 1

            # Write.
            if block < 2:
                place = len(buffers[block])
                assert event.write_slot == place % size
                x = _stored(h, buffer_dtype)
                buffers[block].append(
                    {"x": x, "labels": labels, "number": number, "uses": 0, "place": place}
                )

            state, metrics = runner.step(state, (event,), lambda number: batches[number % 20])
            num_events, num_feeds = num_events + 1, num_feeds + (not is_update)
            assert metrics.keys() == ({block} if is_update else set())
            if is_update:
                values = jax.device_get(metrics[block])
                np.testing.assert_allclose(values["loss"], loss, atol=atol)
                np.testing.assert_allclose(values["top1"], top1, atol=1e-7)
                reading = {"age": event.age, "use_count": event.use_count} if block else {}
                assert {k: values[k] for k in values.keys() - {"loss", "top1"}} == reading
            for oracle, block_state in zip(oracles, jax.device_get(state.blocks)):
                params = {
                    "layer": block_state.params["layers"][0],
                    "head": block_state.params["head"],
                }
                _close(params, oracle.params, atol=atol)
                _close(block_state.batch_stats["layers"][0], oracle.stats, atol=atol)
                assert block_state.step == oracle.updates
            for buffer, written in zip(state.memory, buffers):
                for slot in written[-size:]:
                    x, labels = replay_buffer.read(buffer, slot["place"] % size)
                    np.testing.assert_array_equal(labels, slot["labels"])
                    np.testing.assert_allclose(x, slot["x"], atol=1e-6)
        assert next(events, None) is None and num_events == schedule.num_steps
        assert num_events > 60 and num_feeds > 3 and num_old > 10 and num_reused > 5


# ---- How it runs.


def test_one_slot_in_turn_is_synchronous_dgl_bitwise(blocks, small_batches):
    """M = 1, round robin, no warm-up: DGL's numbers, in one program or in one a block."""
    schedule, state, runner = _setup(blocks, _config(_SYNCHRONOUS), num_updates=20)
    state, metrics = _run(schedule, state, runner, small_batches)
    assert schedule.num_steps == len(metrics) == 60
    for of_step in metrics:
        for values in of_step.values():
            assert (values.pop("age", 0), values.pop("use_count", 1)) == (0, 1)
    batches = jax.device_put(small_batches)
    for kind in ("pipelined", "fused"):
        config = _config(placement=PlacementConfig(kind=kind, num_devices=1))
        schedule, expected, runner = _setup(blocks, config, num_updates=20, method="dgl")
        expected_metrics = []
        for tasks in schedule.tasks(0):
            expected, of_step = runner.step(expected, tasks, lambda step: batches[step])
            expected_metrics += [{block: of_step[block]} for block in range(3)]
        jax.tree.map(np.testing.assert_array_equal, state.blocks, expected.blocks)
        assert metrics == jax.device_get(expected_metrics)


@pytest.fixture
def two_blocks(small_network, small_head):
    network = Network("two", small_network.layers[:2], small_network.head)
    return METHODS["async_dgl"].make_blocks(network, (0,), small_head, make_loss_fn(LossConfig()))


_SLOWED = ReplayConfig(slow_block=1, slowdown=2.0, buffer_size=4)


def test_resumed_is_uninterrupted(two_blocks, small_batches, tmp_path):
    """The parameters, the buffers with their scales and labels, and every metric."""
    config = _config(dataclasses.replace(_SLOWED, buffer_dtype="int8"))
    schedule, state, runner = _setup(two_blocks, config, num_updates=12)
    stop = 13
    state, first = _run(schedule, state, runner, small_batches, num_steps=stop)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.memory))
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        checkpoint.save(checkpointer, stop, state, top1=None, record={})
        state, second = _run(schedule, state, runner, small_batches, first_step=stop)
    assert len(first) + len(second) == schedule.num_steps and {} in second  # A feed.
    schedule, fresh, runner = _setup(two_blocks, config, num_updates=12)
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        step, restored, _ = checkpoint.restore_latest(checkpointer, fresh)
    restored, again = _run(schedule, restored, runner, small_batches, first_step=step)
    assert again == second
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_nothing_compiles_crosses_or_moves_once_the_programs_have_run(
    two_blocks, small_batches, data_parallel, caplog
):
    @contextlib.contextmanager
    def check():
        caplog.clear()
        with jax.log_compiles(), jax.transfer_guard("disallow"), caplog.at_level(logging.WARNING):
            yield
        assert not [r for r in caplog.records if "Finished" in r.getMessage()]

    placement = PlacementConfig(data_parallel=data_parallel)
    config = _config(dataclasses.replace(_SLOWED, buffer_dtype="int8"), placement=placement)
    schedule, state, runner = _setup(two_blocks, config, num_updates=12)
    assert {event.operation for (event,) in schedule.tasks(0)} == {UPDATE, FEED}
    places = lambda state: [
        [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves(state.memory)
    ]
    shardings = lambda state: jax.tree.map(lambda leaf: leaf.sharding, state)
    before = places(state), shardings(state)
    split = jax.sharding.PartitionSpec(None, "data")
    assert [state.memory[0][name].sharding.spec for name in ("x", "labels")] == [split, split]
    state, metrics = _run(schedule, state, runner, small_batches, check=check)
    assert (places(state), shardings(state)) == before
    assert len(metrics) == schedule.num_steps


@pytest.mark.parametrize("buffer_dtype", ["float32", "bfloat16", "int8"])
def test_a_turn_copies_no_buffer(two_blocks, small_batches, buffer_dtype):
    """XLA's own account of the memory that a turn takes."""
    config = _config(ReplayConfig(buffer_size=2000, buffer_dtype=buffer_dtype))
    _, state, _ = _setup(two_blocks, config, num_updates=12)
    optimizer = make_optimizer(config.optimizer, 12, _STEPS_PER_EPOCH)
    (buffer,), slot, key = state.memory, np.int32(0), jax.random.key(0)
    size = replay_buffer.nbytes(buffer)
    batch = small_batches[0]

    def needed_bytes(block, operation, donated, *args):
        turn = async_dgl.make_turn(config, two_blocks[block], optimizer, operation)
        program = jax.jit(turn, donate_argnums=donated).lower(state.blocks[block], *args, key)
        compiled = program.compile()
        if buffer_dtype != "float32":  # All of the buffer is not even widened in passing.
            assert "f32[2000,8,6,6,3]" not in compiled.as_text()
        analysis = compiled.memory_analysis()
        outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + outputs

    for operation in (UPDATE, FEED):
        assert needed_bytes(0, operation, (0, 1), buffer, batch, None, slot) < size / 4
    assert needed_bytes(1, UPDATE, (0, 1), None, buffer, slot, None) < size / 4
    # It would see a copy.
    assert needed_bytes(0, UPDATE, (), buffer, batch, None, slot) >= size


@pytest.mark.parametrize("buffer_dtype", ["float32", "bfloat16", "int8"])
def test_memory_of_a_write_and_of_a_turn_does_not_grow_with_the_buffer(blocks, buffer_dtype):
    """The middle block, which reads from one buffer and writes to another."""
    optimizer, key = make_optimizer(_CONSTANT, 12, _STEPS_PER_EPOCH), jax.random.key(0)
    placements = make_placements(PlacementConfig(), 3)
    state = init_states(blocks, optimizer, key, (6, 6, 2), placements)[1]
    slot, labels = np.int32(0), jax.ShapeDtypeStruct((8,), jnp.int32)
    inputs, x = (jax.ShapeDtypeStruct((8, 6, 6, channels), jnp.float32) for channels in (3, 4))
    write_bytes, turn_bytes = [], []
    for size in (2, 64):
        config = _config(ReplayConfig(buffer_size=size, buffer_dtype=buffer_dtype))
        below, own = (replay_buffer.buffer_shapes(held, config.replay) for held in (inputs, x))
        write = jax.jit(replay_buffer.write, donate_argnums=0).lower(own, slot, x, labels)
        turn = async_dgl.make_turn(config, blocks[1], optimizer, UPDATE)
        turn = jax.jit(turn, donate_argnums=(0, 1)).lower(state, own, below, slot, slot, key)
        size_of_state = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        for program, of_state, needed in (
            (write, 0, write_bytes),
            (turn, size_of_state, turn_bytes),
        ):
            compiled = program.compile()
            if buffer_dtype != "float32":  # All of the buffer is not even widened in passing.
                assert f"f32[{size},8,6,6," not in compiled.as_text()
            memory = compiled.memory_analysis()
            needed.append(memory.temp_size_in_bytes)
            # What was donated is the outputs' memory.
            assert memory.alias_size_in_bytes >= of_state + replay_buffer.nbytes(own)
    mini_batch = replay_buffer.nbytes(own) / 64
    for small, large in (write_bytes, turn_bytes):
        assert abs(large - small) < mini_batch


def test_data_parallel_equals_one_device(two_blocks, small_batches):
    losses, held = [], []
    for data_parallel in (1, 2):
        config = _config(_SLOWED, placement=PlacementConfig(data_parallel=data_parallel))
        schedule, state, runner = _setup(two_blocks, config, num_updates=10)
        state, metrics = _run(schedule, state, runner, small_batches)
        losses.append([block["loss"] for of_step in metrics for block in of_step.values()])
        held.append(jax.device_get(state.memory[0]))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(held[0]["x"], held[1]["x"], atol=1e-4)
    np.testing.assert_array_equal(held[0]["labels"], held[1]["labels"])


# ---- The official accounting, from the configuration to the parameters.


def _arrays(path, num_train):
    """Four classes of 8x8 images: a bright quarter, in noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_train + 16) % 4
    images = rng.integers(0, 160, (len(labels), 8, 8))
    for image, label in zip(images, labels):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 60
    images = images.astype(np.uint8)
    np.savez(
        path,
        x_train=images[:num_train],
        y_train=labels[:num_train],
        x_test=images[num_train:],
        y_test=labels[num_train:],
    )
    return str(path)


def test_official_accounting_lowers_the_rate_at_own_epochs_17_32_47(tmp_path, monkeypatch):
    """A whole run of 50 epochs, two steps each; what the optimizer did is measured."""
    config = default_config()
    config.update(
        {
            "method": {"name": "async_dgl"},
            "replay": {
                "accounting": "official",
                "warm_up": "official",
                "policy": "official",
                "buffer_size": 3,
            },
            "network": {"name": "cnn4", "width_factor": 0.0625},
            "partition": {"strategy": "uniform", "num_blocks": 2},
            "auxiliary": {"name": "mlp"},
            "data": {
                "name": "arrays",
                "data_dir": _arrays(tmp_path / "arrays.npz", 16),
                "augment": False,
            },
            "train": {
                "batch_size": 8,
                "num_epochs": 50.0,
                "log_every_steps": 1,
                "log_gradient_norm": True,
            },
            "eval": {"batch_size": 16, "every_epochs": 100.0, "time_blocks": False},
            "checkpoint": {"every_steps": 100_000},
            # With neither momentum nor an L2 term an update's length is rate x gradient norm.
            "optimizer": {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.1},
        }
    )
    applied = {}

    def recording(*args):
        runner = async_dgl.make_runner(*args)

        def step(state, tasks, batch_at):
            (event,) = tasks
            block = event.block
            before = jax.device_get(state.blocks[block].params)
            state, metrics = runner.step(state, tasks, batch_at)
            after = jax.device_get(state.blocks[block].params)
            moved = jax.tree.map(lambda a, b: np.sum((a.astype(float) - b) ** 2), after, before)
            length = np.sqrt(sum(jax.tree.leaves(moved)))
            if event.operation == UPDATE:
                norm = jax.device_get(metrics[block]["gradient_norm"])
                applied[block, event.turn] = length / norm
            else:
                assert length == 0 and not metrics
            return state, metrics

        return dataclasses.replace(runner, step=step)

    method = dataclasses.replace(async_dgl.METHOD, make_runner=recording)
    monkeypatch.setitem(METHODS, "async_dgl", method)
    summary = train.train_and_evaluate(from_dict(config.to_dict()), str(tmp_path / "run"))
    assert summary["updates_per_block"] == 102 and summary["epochs"] == 51
    assert applied.keys() == {(block, turn) for block in (0, 1) for turn in range(102)}
    expected = np.repeat([0.1, 0.02, 0.004, 0.0008], np.diff([0, 17 * 2, 32 * 2, 47 * 2, 102]))
    logged = {}
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        for block in (0, 1):
            if f"train/block_{block}/learning_rate" in line:
                update = line[f"train/block_{block}/updates"]
                logged[block, update - 1] = line[f"train/block_{block}/learning_rate"]
    for block in (0, 1):
        rates = [applied[block, turn] for turn in range(102)]
        np.testing.assert_allclose(rates, expected, rtol=1e-3)
        turns = [turn for turn in range(102) if (block, turn) in logged]
        assert set(range(2, 102)) <= set(turns)
        np.testing.assert_allclose([logged[block, t] for t in turns], expected[turns], rtol=1e-6)


# ---- The codec.


def test_float32_is_exact_and_bfloat16_rounds():
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 5))
    encoded = replay_buffer.encode(x, "float32")
    np.testing.assert_array_equal(replay_buffer.decode(encoded), x)
    encoded = replay_buffer.encode(x, "bfloat16")
    assert encoded["x"].dtype == jnp.bfloat16
    decoded = replay_buffer.decode(encoded)
    assert decoded.dtype == jnp.float32
    relative = np.abs(decoded - x) / np.abs(x)
    assert 2**-12 < relative.max() <= 2**-8  # Eight significant bits.


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 5)])
def test_int8_error_is_at_most_half_a_scale(shape):
    spread = jnp.array([1e-3, 1.0, 50.0, 1e4, 0.0])
    x = jax.random.normal(jax.random.key(1), shape) * spread.reshape((1,) * (len(shape) - 1) + (5,))
    encoded = replay_buffer.encode(x, "int8")
    axes = tuple(range(len(shape) - 1))
    scale = np.abs(x).max(axes) / 127
    np.testing.assert_allclose(encoded["scale"], scale, rtol=1e-6)
    assert encoded["x"].dtype == jnp.int8 and encoded["scale"].shape == (5,)
    error = np.abs(replay_buffer.decode(encoded) - x).max(axes)
    assert np.all(error <= scale / 2 * (1 + 1e-5)) and np.all(error[:4] > scale[:4] / 8)
    np.testing.assert_array_equal(replay_buffer.decode(encoded)[..., 4], 0)  # Exactly.
    zeros = replay_buffer.decode(replay_buffer.encode(jnp.maximum(x, 0), "int8"))
    np.testing.assert_array_equal(zeros[np.asarray(x) <= 0], 0)


@pytest.mark.parametrize("buffer_dtype, item", [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_nbytes(buffer_dtype, item, capsys):
    activations = jax.ShapeDtypeStruct((8, 6, 6, 3), jnp.float32)
    config = ReplayConfig(buffer_size=7, buffer_dtype=buffer_dtype)
    shapes = replay_buffer.buffer_shapes(activations, config)
    scales = 7 * 3 * 4 if buffer_dtype == "int8" else 0
    assert replay_buffer.nbytes(shapes) == 7 * (8 * 36 * 3 * item + 8 * 4) + scales
    (placement,) = make_placements(PlacementConfig(), 1)
    (buffer,) = replay_buffer.init_buffers([activations], config, placement)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), buffer) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    expected = f"replay buffers: 1 of 7 mini-batches in {buffer_dtype}: "
    assert capsys.readouterr().err.startswith(expected)


# ---- Mistakes, and a whole run.


@pytest.mark.parametrize(
    "replay, message",
    [
        ({"slow_block": 3}, "config.replay.slow_block=3 must be one of the 3 blocks; use 0 to 2"),
        ({"pmf": (0.5, 0.5)}, "config.replay.pmf=.* one probability for each of the 3 blocks"),
        ({"pmf": (1.0, 1.0, 2.0)}, r"config.replay.pmf=.* must sum to 1, not 4; try \(0.25, "),
        ({"max_reuse": 1}, r"config.replay.max_reuse=1 must be at least 2.* or 0 \(no limit\)"),
        (
            {"order": "round_robin", "slowdown": 2.0},
            "slowdown=2.0 is not used with config.replay.order=round_robin; leave one of them out",
        ),
        ({"order": "round_robin", "pmf": (1.0,)}, "pmf=.* is not used with .*order=round_robin"),
        (
            {"pmf": (0.2, 0.2, 0.6), "slow_block": 2},
            "config.replay.slow_block=2 is not used with config.replay.pmf; leave one of them out",
        ),
    ],
)
def test_mistakes(replay, message):
    with pytest.raises(UserError, match=message) as error:
        async_dgl.make_schedule(_config(ReplayConfig(**replay)), 3, 20, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("buffer_size", 0, "config.replay.buffer_size=0 must be at least 1"),
        ("slowdown", 0.5, "config.replay.slowdown=0.5 must be at least 1"),
        ("buffer_dtype", "int4", "config.replay.buffer_dtype='int4' must be one of float32, "),
    ],
)
def test_mistakes_that_need_no_network(field, value, message):
    config = default_config()
    config.method.name = "async_dgl"
    config.replay[field] = value
    with pytest.raises(UserError, match=message):
        from_dict(config.to_dict())


def test_buffers_that_exceed_the_devices_memory_are_refused_before_training():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20}, device_kind="X1")
    placement = types.SimpleNamespace(devices=(device, device))
    activations = [jax.ShapeDtypeStruct((128, 32, 32, 128), jnp.float32)] * 2
    with pytest.raises(
        UserError,
        match=r"config.replay.buffer_size=50 takes 6.25 GiB in float32, more than the 0.00195 GiB "
        r"of 2 X1 device\(s\); try 1, or another config.replay.buffer_dtype",
    ):
        replay_buffer.init_buffers(activations, ReplayConfig(), placement)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    fields = {
        "method.name": "async_dgl",
        "replay.buffer_size": 8,
        "replay.slow_block": 1,
        "replay.slowdown": 2.0,
        "network.width_factor": 0.125,
        "partition.strategy": "uniform",
        "partition.num_blocks": 2,
        "train.num_epochs": 0.6,
        "train.log_every_steps": 10,
        "eval.time_blocks": False,
    }
    script, config = "experiments/train.py", "experiments/configs/quickstart.py"
    result = subprocess.run(
        [sys.executable, _ROOT / script, f"--config={_ROOT / config}", f"--workdir={tmp_path}"]
        + [f"--config.{name}={value}" for name, value in fields.items()],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert "replay buffers: 1 of 8 mini-batches in float32: 0.00935 GiB (0.00935)" in result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "async_dgl" and summary["updates_per_block"] == 60
    assert summary["steps"] > 3 * 60 - 30  # The slowed block's 60, and two turns of the other each.
    assert min(summary["test_top1"]) > 0.4  # Chance is 0.1.
    assert summary["method_memory_bytes"] == 8 * (100 * 14 * 14 * 16 * 4 + 100 * 4)
    assert summary["bytes_between_blocks"] == [100 * 14 * 14 * 16 * 4 + 100 * 4]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert not any("train/block_0/age" in line for line in lines)
    ages = [line["train/block_1/age"] for line in lines if "train/block_1/age" in line]
    assert max(ages) < 8 and max(ages) > 0
    losses = [line["train/block_1/loss"] for line in lines if "train/block_1/loss" in line]
    assert losses[-1] < losses[0] / 1.5
    for name in ("learning_curves.png", "accuracy_by_depth.png"):
        assert (tmp_path / name).exists()
