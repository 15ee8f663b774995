"""Other ways to compute the same steps: loops over equal layers, layers computed again, many steps
as one program, one program for equal blocks. They change no number."""

import dataclasses
import itertools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import to_float64

from dgl_jax import pipeline
from dgl_jax.block import block_key, init_block_state
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig, ReplayConfig
from dgl_jax.data import load_dataset
from dgl_jax.losses import make_loss_fns
from dgl_jax.methods import METHODS
from dgl_jax.models.equal_layers import equal_layers
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states, make_fused_step
from dgl_jax.placement import make_placements
from dgl_jax.schedule import UPDATE, calls
from dgl_jax.types import Batch, TrainState

_OPTIMIZER = make_optimizer(OptimizerConfig(schedule="constant"), 10, 10)


class Layer(nn.Module):
    """Conv 3x3, BatchNorm, ReLU, dropout."""

    features: int
    rate: float = 0.2

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dropout(self.rate, deterministic=not train)(x)


def _blocks(small_head, widths, cuts):
    network = Network("equal", [Layer(width) for width in widths], small_head)
    return METHODS["dgl"].make_blocks(
        network, cuts, small_head, make_loss_fns(LossConfig(), len(cuts) + 1, 4)
    )


def _train(blocks, batches, key):
    """States and losses after a step on each batch, in float64, and the step's program."""
    with jax.enable_x64(True):
        states, x = [], batches[0].images
        for block in blocks:
            states.append(to_float64(init_block_state(block, _OPTIMIZER, key, x)))
            x = jnp.zeros((*x.shape[:-1], block.layers[-1].features))
        step = make_fused_step(blocks, _OPTIMIZER, [(block.index, UPDATE) for block in blocks])
        keys = [block_key(key, block) for block in blocks]
        jaxpr = str(jax.make_jaxpr(step)(tuple(states), batches[0], keys))
        step, states, losses = jax.jit(step), tuple(states), []
        for batch in batches:
            states, metrics = step(states, batch.replace(images=np.float64(batch.images)), keys)
            losses.append([metrics[block.index]["loss"] for block in blocks])
        return jax.device_get((states, losses)), jaxpr


def _stacked(state):
    """A state as of a block with all its layers in one loop."""
    has_layers = lambda node: isinstance(node, dict) and "layers" in node

    def in_one_run(node):
        if not has_layers(node):
            return node
        return node | {"layers": (jax.tree.map(lambda *a: np.stack(a), *node["layers"]),)}

    return jax.tree.map(in_one_run, state, is_leaf=has_layers)


@pytest.mark.parametrize(
    "how", [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}]
)
def test_loops_and_remat_change_no_number(small_head, small_batches, how):
    blocks = _blocks(small_head, (3, 4, 4, 4, 4, 4), (2,))
    batches, key = small_batches[:3], jax.random.key(1)
    expected, plain = _train(blocks, batches, key)
    found, changed = _train([dataclasses.replace(block, **how) for block in blocks], batches, key)
    if "scan_layers" in how:  # The upper block is one run; the lower one's layers all differ.
        (lower, upper), losses = expected
        expected = (lower, _stacked(upper)), losses
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected
    )
    assert "scan[" in changed and ("remat" in changed) == ("remat" in how)
    assert "scan[" not in plain and "remat" not in plain


def test_equal_layers(small_head, small_batches):
    (block,) = _blocks(small_head, (2, 2, 4, 4, 4, 3), ())
    images = small_batches[0].images
    # The third maps 2 channels to 4.
    assert equal_layers(block.layers, images) == [(0, 2), (2, 3), (3, 5), (5, 6)]
    # Equal modules but for an option; equal layers with something else that is not.
    others = [np.zeros(1), np.zeros(2), *[None] * 4]
    assert equal_layers(block.layers, images, others)[:2] == [(0, 1), (1, 2)]
    layers_of_two_kinds = (*block.layers[:3], Layer(4, rate=0.5), *block.layers[4:])
    assert equal_layers(layers_of_two_kinds, images)[1:] == [(2, 3), (3, 4), (4, 5), (5, 6)]


class Scaled(nn.Module):
    """A user's layer with an array, which can't be compared."""

    scale: np.ndarray

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(x) * self.scale


def test_layers_that_can_not_be_compared(small_head, small_batches):
    layers = [Scaled(np.full((1, 1, 1, 2), number)) for number in (1.0, 2.0, 3.0)]
    blocks = METHODS["dgl"].make_blocks(
        Network("arrays", layers, small_head),
        (0, 1),
        small_head,
        make_loss_fns(LossConfig(), 3, 4),
    )
    config = Config(placement=PlacementConfig(kind="pipelined", num_devices=1))
    runner, state, sharding = _runner("dgl", blocks, config, (6, 6, 2), jax.random.key(0))
    schedule = METHODS["dgl"].make_schedule(config, 3, 20, 10)
    batch = jax.device_put(small_batches[0], sharding)
    (block,) = METHODS["dgl"].make_blocks(
        Network("arrays", layers, small_head), (), (), make_loss_fns(LossConfig(), 1, 4)
    )
    runs = equal_layers(block.layers, small_batches[0].images)
    assert runs == [(0, 1), (1, 2), (2, 3)]
    _, metrics = runner.step(state, next(schedule.tasks(0)), lambda step: batch)
    assert len(metrics) == 3


def test_remat_needs_less_memory(small_head):
    (block,) = _blocks(small_head, (8,) * 8, ())
    x = jax.ShapeDtypeStruct((32, 16, 16, 8), jnp.float32)
    labels, key = jax.ShapeDtypeStruct((32,), jnp.int32), jax.random.key(0)
    init = lambda key, x: init_block_state(block, _OPTIMIZER, key, x)
    state = jax.eval_shape(init, key, x)

    def temporaries(**how):
        step = make_fused_step([dataclasses.replace(block, **how)], _OPTIMIZER, [(0, UPDATE)])
        program = jax.jit(step).lower((state,), Batch(x, labels), [key]).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.5 * temporaries()


def test_one_after_another_needs_less_memory(small_head):
    """The numbers are the same, also when a block's update is lost (it is not finite)."""
    blocks = _blocks(small_head, (8,) * 8, (1, 3, 5))
    key = jax.random.key(0)
    x = jax.random.normal(key, (32, 16, 16, 8))
    batch, keys = Batch(x, jnp.arange(32) % 4), [block_key(key, block) for block in blocks]

    def run(learning_rate, **how):
        optimizer = optax.sgd(learning_rate)
        states = tuple(init_block_state(block, optimizer, key, x) for block in blocks)
        step = make_fused_step(
            blocks, optimizer, [(block.index, UPDATE) for block in blocks], **how
        )
        program = jax.jit(step).lower(states, batch, keys).compile()
        temporaries = program.memory_analysis().temp_size_in_bytes
        return temporaries, jax.device_get(program(states, batch, keys))

    (at_once, expected), (in_turn, result) = run(0.1, one_after_another=False), run(0.1)
    assert in_turn < 0.8 * at_once
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, result
    )
    _, (states, metrics) = run(np.nan)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(states[0].params))
    losses = lambda metrics: [metrics[k]["loss"] for k in range(len(blocks))]
    np.testing.assert_allclose(losses(metrics), losses(expected[1]), rtol=1e-5)


def _runner(name, blocks, config, image_shape, key):
    placements = make_placements(config.placement, len(blocks))
    states = init_states(blocks, _OPTIMIZER, key, image_shape, placements)
    runner = METHODS[name].make_runner(config, blocks, _OPTIMIZER, key, placements)
    return runner, TrainState(states), placements[0].batch


@pytest.mark.parametrize(
    "name, num_devices, num_programs", [("dgl", 1, 2), ("dgl", 5, 5), ("async_dgl", 1, 3)]
)
def test_equal_blocks_on_the_same_devices_share_a_program(
    small_head, small_batches, caplog, name, num_devices, num_programs
):
    """The first block takes other images; in async_dgl the last one has no buffer to write to."""
    blocks = _blocks(small_head, (4,) * 5, (0, 1, 2, 3))
    config = Config(replay=ReplayConfig(buffer_size=2))
    if name == "dgl":
        placement = PlacementConfig(kind="pipelined", num_devices=num_devices)
        config = dataclasses.replace(config, placement=placement)
    runner, state, sharding = _runner(name, blocks, config, (6, 6, 2), jax.random.key(0))
    images = jax.ShapeDtypeStruct((8, 6, 6, 2), jnp.float32)
    state = state.replace(memory=runner.init_memory(state.blocks, images))
    batches = [jax.device_put(batch, sharding) for batch in small_batches]
    schedule = METHODS[name].make_schedule(config, len(blocks), 20, 10)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _, tasks in zip(range(40), schedule.tasks(0)):
            state, _ = runner.step(state, tasks, lambda step: batches[step % 20])
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    programs = [line for line in compiled if "jit(turn)" in line or "jit(step)" in line]
    assert len(programs) == num_programs


def test_many_steps_as_one_program(small_head, arrays_path, monkeypatch):
    """The same numbers as step by step, batches and all; also after the epoch's order changes, and
    with blocks one after another."""
    waits, after = [], pipeline._after
    monkeypatch.setattr(pipeline, "_after", lambda *args: waits.append(None) or after(*args))
    at_once, in_turn = Config(placement=PlacementConfig(one_after_another=False)), Config()
    blocks = _blocks(small_head, (3, 4, 4), (0, 1))
    with jax.enable_x64(True):
        data = load_dataset(
            name="arrays",
            data_dir=arrays_path,
            batch_size=24,
            eval_batch_size=10,
            seed=0,
            crop_padding=1,
        )
        key = jax.random.key(0)
        schedule = METHODS["dgl"].make_schedule(at_once, len(blocks), 20, data.steps_per_epoch)
        turns = list(schedule.tasks(0))
        results = []
        several = [5, 5, 1, 4, 5]
        for config, calls in ((at_once, [1] * 20), (at_once, several), (in_turn, several)):
            assert not waits
            runner, state, _ = _runner("dgl", blocks, config, data.image_shape, key)
            state, losses, step = state.replace(blocks=to_float64(state.blocks)), [], 0
            for size in calls:
                if size > 1:
                    state, metrics = runner.steps(state, turns[step : step + size], data.stream)
                else:
                    state, metrics = runner.step(state, turns[step], data.batch_at)
                losses.append(np.stack([np.atleast_1d(metrics[k]["loss"]) for k in range(3)]))
                assert losses[-1].shape == (3, size)
                step += size
            results.append((jax.device_get(state.blocks), np.concatenate(losses, axis=1)))
    assert data.steps_per_epoch == 10 and waits
    for result in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), results[0], result
        )


@pytest.mark.parametrize("name, num_blocks", [("dgl", 2), ("sequential", 3)])
@pytest.mark.parametrize("steps_per_call", [1, 4, 5, 10])
def test_steps_of_a_call(name, num_blocks, steps_per_call):
    """Whole epochs apart, and the same lists for a run that is gone on with after any of them."""
    schedule = METHODS[name].make_schedule(Config(), num_blocks, 23, 10)
    whole = list(calls(schedule, 0, steps_per_call, 10))
    if (name, steps_per_call) == ("dgl", 4):
        assert [len(steps) for steps in whole] == [4, 4, 1, 1, 1, 1, 4, 4, 1, 1, 1]
    step = 0
    for done, steps in enumerate(whole):
        assert steps == list(itertools.islice(schedule.tasks(step), len(steps)))
        assert list(calls(schedule, step, steps_per_call, 10)) == whole[done:]
        assert len(steps) in (1, steps_per_call) and step // 10 == (step + len(steps) - 1) // 10
        step += len(steps)
    assert step == schedule.num_steps
