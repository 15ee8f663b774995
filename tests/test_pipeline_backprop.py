"""Pipelined backprop and data-parallel backprop against backprop, and against a written-out loop."""

import collections
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.config import (
    Config,
    LossConfig,
    MethodConfig,
    OptimizerConfig,
    PlacementConfig,
    from_dict,
    to_dict,
)
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS, pipeline_backprop
from dgl_jax.metrics import compile_seconds
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements, over_all
from dgl_jax.schedule import APPLY, BACKWARD, FORWARD, LOSS, block_order, pipeline
from dgl_jax.transfer import move
from dgl_jax.types import Batch, TrainState

_LEARNING_RATE, _MOMENTUM, _DECAY = 0.05, 0.9, 1e-2
_OPTIMIZER = OptimizerConfig(
    learning_rate=_LEARNING_RATE, momentum=_MOMENTUM, weight_decay=_DECAY, schedule="constant"
)
_LOSS_FN = make_loss_fn(LossConfig())
_CUTS = (0, 1)


class PlainLayer(nn.Module):
    """Conv 3x3, tanh: each example for itself."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(nn.Conv(self.features, (3, 3))(x))


class DropoutLayer(nn.Module):
    """Conv 3x3, BatchNorm, tanh, dropout."""

    features: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dropout(self.rate, deterministic=not train)(x)


class RematLayer(nn.Module):
    """The same, its inside computed again in the backward pass: a random key must be kept."""

    features: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        return nn.remat(DropoutLayer, static_argnums=(2,))(self.features, self.rate)(x, train)


@pytest.fixture
def norm_network(small_network) -> Network:
    return Network("norm", small_network.layers[:3], small_network.head)


@pytest.fixture
def plain_network(small_network) -> Network:
    return Network("plain", [PlainLayer(c) for c in (3, 4, 5)], small_network.head)


@pytest.fixture
def dropout_network(small_network) -> Network:
    """The second of the three blocks has two layers."""
    layers = [DropoutLayer(3, 0.3), RematLayer(4, 0.3), DropoutLayer(4, 0.0), DropoutLayer(5, 0.3)]
    return Network("dropout", layers, small_network.head)


@pytest.fixture
def float64_batches(small_batches):
    with jax.enable_x64(True):
        yield [Batch(b.images.astype(np.float64), b.labels) for b in small_batches[:6]]


@functools.cache
def _initial_states(blocks, dtype):
    """As numpy arrays; made once, since making them costs more than all else."""
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(PlacementConfig(), len(blocks))
    states = init_states(blocks, optimizer, jax.random.key(0), (6, 6, 2), placements)
    cast = lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float32 else leaf
    return jax.tree.map(cast, jax.device_get(states))


def _start(name, network, cuts, images, num_devices=3, data_parallel=1, **method):
    """A fresh state of the images' dtype, what runs it, its schedule and placements."""
    placement = PlacementConfig(
        kind="pipelined", num_devices=num_devices, data_parallel=data_parallel
    )
    if name in ("backprop", "data_parallel"):
        placement = PlacementConfig(num_devices=num_devices)
    if name == "data_parallel":
        placement = over_all(placement)
    config = Config(method=MethodConfig(name=name, **method), placement=placement)
    blocks = METHODS[name].make_blocks(network, cuts, None, _LOSS_FN)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(placement, len(blocks))
    states = tuple(
        jax.device_put(state, place.state)
        for state, place in zip(_initial_states(blocks, images.dtype), placements)
    )
    runner = METHODS[name].make_runner(config, blocks, optimizer, jax.random.key(0), placements)
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)
    state = TrainState(states, runner.init_memory(states, images))
    schedule = METHODS[name].make_schedule(config, len(blocks), 20, 5)
    return state, runner, schedule, placements


def _train(name, network, cuts, batches, **options):
    """The last block's losses, and the state.

    In every step nothing crosses between host and devices unasked and shardings stay; nothing
    compiles after the first.
    """
    state, runner, schedule, placements = _start(name, network, cuts, batches[0].images, **options)
    batches = jax.device_put(batches, placements[0].batch)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    losses, num_blocks = [], len(state.blocks)
    compiled = compile_seconds()
    for step, tasks in zip(range(len(batches)), schedule.tasks(0)):
        if step == 1:
            compiled = compile_seconds()
        with jax.transfer_guard("disallow"):
            state, metrics = runner.step(state, tasks, lambda step: batches[step])
        assert list(metrics) == [num_blocks - 1]
        losses.append(metrics[num_blocks - 1]["loss"])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert compile_seconds() == compiled
    return np.array(jax.device_get(losses)), jax.device_get(state.blocks)


def _whole(states):
    """The layers of all blocks in one list, and the head: of every cut the same tree."""

    def parts(tree_of):
        trees = [tree_of(state) for state in states]
        return [layer for tree in trees for layer in tree["layers"]], trees[-1]["head"]

    momentum = lambda state: state.opt_state[1].trace
    return parts(lambda s: s.params), parts(lambda s: s.batch_stats), parts(momentum)


# ---- The mathematics.


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_it_is_backprop(norm_network, plain_network, float64_batches, num_microbatches):
    """In one microbatch whatever the layers; in several where each example is for itself."""
    network = norm_network if num_microbatches == 1 else plain_network
    run = functools.partial(_train, network=network, batches=float64_batches)
    losses, states = run("pipeline_backprop", cuts=_CUTS, num_microbatches=num_microbatches)
    expected, expected_states = run("backprop", cuts=(), num_devices=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    close(losses, expected)
    jax.tree.map(close, _whole(states), _whole(expected_states))
    assert [int(state.step) for state in states] == [len(float64_batches)] * 3


def test_microbatches_with_batch_norm_and_dropout_are_a_loop_over_them(
    dropout_network, float64_batches
):
    """BatchNorm's statistics are a microbatch's; masks go by block, step and microbatch."""
    num_microbatches, key, cuts = 4, jax.random.key(0), (0, 2)
    modules = dropout_network.layers
    places = [(0, 0), (1, 0), (1, 1), (2, 0)]  # (block, layer in it).

    def network_loss(params, stats, x, labels, step, microbatch):
        after = []
        for (block, layer), module, p, s in zip(places, modules, params[0], stats, strict=True):
            mask_key = key
            for number in (block, step, microbatch, layer):
                mask_key = jax.random.fold_in(mask_key, number)
            variables = {"params": p, "batch_stats": s}
            x, moved = module.apply(
                variables, x, True, rngs={"dropout": mask_key}, mutable=["batch_stats"]
            )
            after.append(moved["batch_stats"])
        logits = dropout_network.head.apply({"params": params[1]}, x)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked), after

    blocks = METHODS["pipeline_backprop"].make_blocks(dropout_network, cuts, None, _LOSS_FN)
    params, (stats, _), momenta = _whole(_initial_states(blocks, np.dtype(np.float64)))
    gradient_fn = jax.jit(jax.value_and_grad(network_loss, has_aux=True))
    expected = []
    for step, batch in enumerate(float64_batches):
        losses, gradients = [], jax.tree.map(np.zeros_like, params)
        for m in range(num_microbatches):
            here = slice(2 * m, 2 * m + 2)
            (loss, stats), more = gradient_fn(
                params, stats, batch.images[here], batch.labels[here], step, m
            )
            losses.append(loss)
            gradients = jax.tree.map(lambda g, new: g + new / num_microbatches, gradients, more)
        momenta = jax.tree.map(
            lambda m, g, w: _MOMENTUM * m + g + _DECAY * w, momenta, gradients, params
        )
        params = jax.tree.map(lambda w, m: w - _LEARNING_RATE * m, params, momenta)
        expected.append(np.mean(losses))

    losses, states = _train("pipeline_backprop", dropout_network, cuts, float64_batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    found, (found_stats, _), _ = _whole(states)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    jax.tree.map(close, (found, found_stats), (params, stats))


# ---- How it runs.


def test_schedules_and_devices_change_nothing(dropout_network, small_batches):
    """One device a block: to the bit. A block over two devices sums in another order."""
    batches = small_batches[:4]
    run = functools.partial(_train, "pipeline_backprop", dropout_network, (0, 2), batches)
    before = compile_seconds()
    expected = run(num_devices=1, pipeline_schedule="1f1b")
    assert compile_seconds() > before  # So the check in _train would see one.
    other = run(num_devices=3, pipeline_schedule="gpipe")
    jax.tree.map(np.testing.assert_array_equal, other, expected)
    losses, _ = run(num_devices=6, data_parallel=2)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)


def test_data_parallel_is_backprop_on_one_device(norm_network, float64_batches):
    """In float64, as rounding in float32 grows from step to step."""
    run = functools.partial(_train, network=norm_network, cuts=(), batches=float64_batches)
    found, expected = run("data_parallel", num_devices=4), run("backprop", num_devices=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    jax.tree.map(close, found, expected)


def test_the_work_of_a_block_is_its_update(plain_network, small_batches):
    """What is timed moves the last block as the runner does."""
    method, batch = METHODS["pipeline_backprop"], small_batches[0]
    blocks = method.make_blocks(plain_network, (1,), None, _LOSS_FN)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    lower, upper = _initial_states(blocks, batch.images.dtype)
    works = [jax.jit(method.make_block_work(Config(), b, optimizer)) for b in blocks]
    after, metrics, (x, _) = works[0](lower, batch.images, batch.labels, jax.random.key(0))
    assert int(after.step) == 1 and metrics == {}
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, lower.params)
    assert all(jax.tree.leaves(changed))
    x = jnp.swapaxes(x, 0, 1).reshape(8, *x.shape[2:])  # Microbatches are taken by turns there.
    after, metrics, _ = works[1](upper, x, batch.labels, jax.random.key(0))
    losses, (_, expected) = _train("pipeline_backprop", plain_network, (1,), [batch])
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, after.params, expected.params)


def test_what_waits_on_a_device_is_what_the_schedule_says_and_no_weights(
    plain_network, small_batches, monkeypatch
):
    """Counted by shape whenever something moves: what is between a block's layers, and a kernel."""
    state, runner, *_ = _start("pipeline_backprop", plain_network, (1,), small_batches[0].images)
    batch, seen = jax.device_put(small_batches[0]), []

    def counting_move(x, sharding):
        seen.append(collections.Counter(leaf.shape for leaf in jax.live_arrays()))
        return move(x, sharding)

    monkeypatch.setattr(pipeline_backprop, "move", counting_move)
    inside, kernel, most = (2, 6, 6, 3), (3, 3, 3, 4), {}
    for kind in ("gpipe", "1f1b"):
        (tasks,) = pipeline(kind, 2, 4, 1).tasks(0)
        seen.clear()
        state, _ = runner.step(state, tasks, lambda step: batch)
        # The first is of the images, before any pass: the kernel, its momentum, its gradient.
        assert {counts[kernel] - seen[0][kernel] for counts in seen} == {0}
        most[kind] = max(counts[inside] - seen[0][inside] for counts in seen)
    assert most["gpipe"] == 2 * most["1f1b"] >= 4


# ---- The schedules.


def _most_alive(order):
    """The most microbatches whose forward pass waits for its backward pass."""
    alive = itertools.accumulate(
        {FORWARD: 1, BACKWARD: -1}.get(operation, 0) for operation, _ in order
    )
    return max(alive)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("num_blocks, num_microbatches", [(1, 3), (3, 1), (3, 2), (4, 4), (4, 9)])
def test_tasks_come_when_what_they_take_is_there(kind, num_blocks, num_microbatches):
    schedule = pipeline(kind, num_blocks, num_microbatches, 5)
    steps = list(schedule.tasks(0))
    assert list(schedule.tasks(3)) == steps[3:] and len(steps) == schedule.num_steps == 5
    tasks = steps[2]
    assert {(task.batch, task.turn) for task in tasks} == {(2, 2)}
    last, done, per_block = num_blocks - 1, set(), collections.defaultdict(list)
    for task in tasks:
        block, m = task.block, task.microbatch
        if task.operation in (FORWARD, LOSS) and block:
            assert (block - 1, FORWARD, m) in done
        if task.operation == BACKWARD:
            above = LOSS if block + 1 == last else BACKWARD
            assert {(block, FORWARD, m), (block + 1, above, m)} <= done
        done.add((block, task.operation, m))
        per_block[block].append((task.operation, m))
    for block, order in per_block.items():
        assert order == block_order(kind, block, num_blocks, num_microbatches)
        assert order[-1] == (APPLY, 0)
        wanted = (LOSS,) if block == last else (FORWARD, BACKWARD)
        for operation in wanted:
            assert [m for name, m in order if name == operation] == list(range(num_microbatches))
        assert len(order) == len(wanted) * num_microbatches + 1
        if block < last:
            most = min(num_blocks - block, num_microbatches)
            assert _most_alive(order) == (num_microbatches if kind == "gpipe" else most)


def test_the_schedules_are_the_papers():
    f, b = (lambda m: (FORWARD, m)), (lambda m: (BACKWARD, m))
    assert block_order("1f1b", 0, 3, 4) == [
        *(f(0), f(1), f(2), b(0), f(3), b(1), b(2), b(3)),
        (APPLY, 0),
    ]
    assert block_order("gpipe", 0, 3, 4) == [*map(f, range(4)), *map(b, range(4)), (APPLY, 0)]
    assert block_order("1f1b", 2, 3, 2) == [(LOSS, 0), (LOSS, 1), (APPLY, 0)]


# ---- What a user may ask for.

_PIPELINE = {"method.name": "pipeline_backprop", "placement.kind": "pipelined"}
_DATA_PARALLEL = {"method.name": "data_parallel"}


def _checked(fields):
    config = to_dict(Config())
    for name, value in fields.items():
        section, field = name.split(".")
        config[section][field] = value
    return from_dict(config)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            _PIPELINE | {"train.batch_size": 130},
            (
                "config.train.batch_size=130 must be divisible by config.method.num_microbatches=4; "
                "try config.train.batch_size=128"
            ),
        ),
        (
            _PIPELINE | {"train.batch_size": 8, "placement.data_parallel": 4},
            (
                "config.train.batch_size=8 makes 4 microbatches of 2, which must be divisible by "
                "the 4 devices that share a block's; try config.train.batch_size=16"
            ),
        ),
        (
            {"method.name": "pipeline_backprop"},
            (
                "config.placement.kind=fused is not for config.method.name=pipeline_backprop; "
                "set config.placement.kind=pipelined"
            ),
        ),
        (
            _PIPELINE | {"method.num_microbatches": 0},
            "config.method.num_microbatches=0 must be at least 1; try 1",
        ),
        (
            _PIPELINE | {"method.pipeline_schedule": "2f2b"},
            "config.method.pipeline_schedule='2f2b' must be one of gpipe, 1f1b",
        ),
        (
            {"method.name": "dgl", "method.num_microbatches": 8},
            (
                "config.method.num_microbatches=8 is used by pipeline_backprop only, not by dgl; "
                "set config.method.num_microbatches=4"
            ),
        ),
        (
            _DATA_PARALLEL | {"train.batch_size": 130, "placement.num_devices": 4},
            (
                "config.train.batch_size=130 must be divisible by config.placement.num_devices=4; "
                "try 128"
            ),
        ),
        (
            _DATA_PARALLEL | {"eval.batch_size": 3, "placement.num_devices": 4},
            "config.eval.batch_size=3 must be divisible by config.placement.num_devices=4; try 4",
        ),
        (
            _DATA_PARALLEL | {"placement.kind": "pipelined"},
            (
                "config.placement.kind=pipelined is not for config.method.name=data_parallel; "
                "set config.placement.kind=fused"
            ),
        ),
        (
            _DATA_PARALLEL | {"placement.data_parallel": 2},
            (
                "config.placement.data_parallel=2 is not used by data_parallel, whose batches are "
                "split over config.placement.num_devices; set that, and leave the other out"
            ),
        ),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError) as error:
        _checked(fields)
    assert str(error.value) == message


def test_data_parallel_needs_no_more_than_a_number_of_devices():
    asked = _checked(_DATA_PARALLEL | {"placement.num_devices": 4}).placement
    placement = over_all(asked)
    assert (placement.num_devices, placement.data_parallel) == (4, 4)
    assert over_all(_checked(_DATA_PARALLEL).placement).data_parallel == 8
    # A run's folder says what it ran on; that can be asked for too.
    again = _DATA_PARALLEL | {"placement.num_devices": 4, "placement.data_parallel": 4}
    assert _checked(again).placement == placement == over_all(placement)
