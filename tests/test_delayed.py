"""DDG and Features Replay against written-out loops that keep the whole history of weights."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax import checkpoint, cost
from dgl_jax.config import (
    Config,
    LossConfig,
    MethodConfig,
    OptimizerConfig,
    PartitionConfig,
    PlacementConfig,
    TrainConfig,
)
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS, ddg, features_replay
from dgl_jax.metrics import compile_seconds, read_metrics
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.schedule import BACKWARD, FORWARD, UPDATE
from dgl_jax.types import Batch, TrainState

_LEARNING_RATE, _MOMENTUM, _DECAY = 0.05, 0.9, 1e-2
_OPTIMIZER = OptimizerConfig(
    learning_rate=_LEARNING_RATE, momentum=_MOMENTUM, weight_decay=_DECAY, schedule="constant"
)
_FUSED = PlacementConfig(kind="fused")
_RULES = ("stale", "current", "features_replay")


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
def network(small_network) -> Network:
    layers = [DropoutLayer(3, 0), RematLayer(4, 0.3), DropoutLayer(4, 0.3), DropoutLayer(5, 0)]
    return Network("dropout", layers, small_network.head)


def _method(rule):
    return METHODS["ddg" if rule in ("stale", "current") else rule]


def _config(rule, placement=_FUSED, **train):
    name, weights = ("ddg", rule) if rule in ("stale", "current") else (rule, "stale")
    return Config(
        method=MethodConfig(name=name, weights=weights),
        placement=placement,
        train=TrainConfig(**train),
    )


@functools.cache
def _initial_states(blocks, dtype):
    """As numpy arrays; made once, since making them costs more than all else."""
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(_FUSED, len(blocks))
    states = init_states(blocks, optimizer, jax.random.key(0), (6, 6, 2), placements)
    cast = lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float32 else leaf
    return jax.tree.map(cast, jax.device_get(states))


_LOSS_FN = make_loss_fn(LossConfig())


def _start(rule, network, cuts, images, placement=_FUSED, **train):
    """A fresh state with its memory, and what runs it; of the images' dtype."""
    method, config = _method(rule), _config(rule, placement, **train)
    blocks = method.make_blocks(network, cuts, None, _LOSS_FN)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(placement, len(blocks))
    states = tuple(
        jax.device_put(state, place.state)
        for state, place in zip(_initial_states(blocks, images.dtype), placements)
    )
    runner = method.make_runner(config, blocks, optimizer, jax.random.key(0), placements)
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)
    state = TrainState(states, runner.init_memory(states, images))
    schedule = method.make_schedule(config, len(blocks), 20, 5)
    return state, runner, schedule, placements


def _run(state, runner, schedule, batches, first=0):
    """Runs the steps from ``first``: the last block's losses and the state.

    In every step nothing crosses between host and devices unasked and shardings stay; nothing
    compiles once every program has run.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    losses, num_blocks = [], len(state.blocks)
    for step, tasks in zip(range(first, len(batches)), schedule.tasks(first)):
        if step == first + num_blocks:
            compiled = compile_seconds()
        with jax.transfer_guard("disallow"):
            state, metrics = runner.step(state, tasks, lambda step: batches[step])
        losses.append(metrics[num_blocks - 1]["loss"])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert compile_seconds() == compiled
    return losses, state


def _train(rule, network, cuts, batches, placement=_FUSED):
    state, runner, schedule, placements = _start(rule, network, cuts, batches[0].images, placement)
    batches = jax.device_put(batches, placements[0].batch)
    losses, state = _run(state, runner, schedule, batches)
    return np.array(jax.device_get(losses)), jax.device_get(state)


# ---- The mathematics, in float64, with momentum, L2 terms, BatchNorm and dropout.


class Oracle:
    """The network as one list of modules; every block's weights at the start of every step.

    A step is: forward everywhere, then one update of each block whose gradient has come, w
    <- w - learning_rate * m, where m <- momentum * m + gradient + decay * w.
    """

    def __init__(self, network, cuts, states):
        self.layers, self.head = network.layers, network.head
        bounds = [0, *(cut + 1 for cut in cuts), len(self.layers)]
        self.ranges = [range(a, b) for a, b in itertools.pairwise(bounds)]
        self.last = len(cuts)
        self.params = [state.params for state in states]
        self.stats = [state.batch_stats for state in states]
        self.momenta = jax.tree.map(jnp.zeros_like, self.params)
        self.key = jax.random.key(0)

    def delay(self, block):
        return self.last - block

    def layer(self, block, offset, params, x, batch):
        """One layer in training mode: (its output, the batch's part in running statistics)."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, block), batch)
        zeros = jax.tree.map(jnp.zeros_like, self.stats[block]["layers"][offset])
        y, moved = self.layers[self.ranges[block][offset]].apply(
            {"params": params, "batch_stats": zeros},
            x,
            True,
            rngs={"dropout": jax.random.fold_in(key, offset)},
            mutable=["batch_stats"],
        )
        return y, moved["batch_stats"]

    def block(self, block, params, x, batch):
        parts = []
        for offset in range(len(self.ranges[block])):
            x, part = self.layer(block, offset, params["layers"][offset], x, batch)
            parts.append(part)
        return x, tuple(parts)

    def loss(self, head_params, x, labels):
        logits = self.head.apply({"params": head_params}, x)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked)

    def network_loss(self, all_params, x, labels, batch):
        all_parts = []
        for block, params in enumerate(all_params):
            x, parts = self.block(block, params, x, batch)
            all_parts.append(parts)
        return self.loss(all_params[-1]["head"], x, labels), all_parts

    def last_loss(self, params, x, labels, batch):
        x, parts = self.block(self.last, params, x, batch)
        return self.loss(params["head"], x, labels), parts

    def move_statistics(self, block, parts):
        moved = jax.tree.map(lambda s, part: 0.9 * s + part, self.stats[block]["layers"], parts)
        self.stats[block] = self.stats[block] | {"layers": moved}

    def update(self, block, gradients):
        self.momenta[block] = jax.tree.map(
            lambda m, g, w: _MOMENTUM * m + g + _DECAY * w,
            self.momenta[block],
            gradients,
            self.params[block],
        )
        self.params[block] = jax.tree.map(
            lambda w, m: w - _LEARNING_RATE * m, self.params[block], self.momenta[block]
        )

    def stale(self, batches):
        """Backprop's gradient of the whole network at the weights of step s, used late."""
        history = []
        gradient_fn = jax.jit(jax.value_and_grad(self.network_loss, has_aux=True))
        losses = []
        for step, (x, labels) in enumerate(batches):
            (loss, parts), gradients = gradient_fn(list(self.params), x, labels, step)
            history.append(gradients)
            losses.append(loss)
            for block in range(self.last + 1):
                self.move_statistics(block, parts[block])
                if step >= self.delay(block):
                    self.update(block, history[step - self.delay(block)][block])
        return losses

    def current(self, batches):
        """Every layer's input of step s, with the weights of step t; layer by layer."""
        inputs = {}  # By (block, offset, batch).
        gradient_at = {}  # By (block, batch): the gradient at the block's output.
        layer_fn = jax.jit(self.layer, static_argnums=(0, 1))

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def layer_vjp(block, offset, params, x, gradient, batch):
            run = lambda params, x: self.layer(block, offset, params, x, batch)[0]
            return jax.vjp(run, params, x)[1](gradient)

        losses = []
        for step, (x, labels) in enumerate(batches):
            for block, places in enumerate(self.ranges):
                parts = []
                for offset in range(len(places)):
                    inputs[block, offset, step] = x
                    x, part = layer_fn(block, offset, self.params[block]["layers"][offset], x, step)
                    parts.append(part)
                self.move_statistics(block, tuple(parts))
            loss_fn = jax.value_and_grad(self.loss, argnums=(0, 1))
            loss, (head_gradients, top) = loss_fn(self.params[-1]["head"], x, labels)
            losses.append(loss)
            gradient_at[self.last, step] = top
            for block in range(self.last + 1):
                s = step - self.delay(block)
                if s < 0:
                    continue
                gradient, layers = gradient_at[block, s], []
                for offset in reversed(range(len(self.ranges[block]))):
                    layer_params = self.params[block]["layers"][offset]
                    own, gradient = layer_vjp(
                        block, offset, layer_params, inputs[block, offset, s], gradient, s
                    )
                    layers.insert(0, own)
                gradient_at[block - 1, s] = gradient
                head = head_gradients if block == self.last else {}
                self.update(block, {"layers": tuple(layers), "head": head})
        return losses

    def features_replay(self, batches):
        """A block's input of step s, run again with the weights of step t."""
        inputs, gradient_at = {}, {}

        @functools.partial(jax.jit, static_argnums=0)
        def block_vjp(block, params, x, gradient, batch):
            run = lambda params, x: self.block(block, params, x, batch)
            _, pullback, parts = jax.vjp(run, params, x, has_aux=True)
            return pullback(gradient), parts

        block_fn = jax.jit(self.block, static_argnums=0)
        last_fn = jax.jit(jax.value_and_grad(self.last_loss, argnums=(0, 1), has_aux=True))
        losses = []
        for step, (x, labels) in enumerate(batches):
            for block in range(self.last):
                inputs[block, step] = x
                x, _ = block_fn(block, self.params[block], x, step)
            (loss, parts), (gradients, down) = last_fn(self.params[-1], x, labels, step)
            losses.append(loss)
            gradient_at[self.last - 1, step] = down
            self.move_statistics(self.last, parts)
            self.update(self.last, gradients)
            for block in range(self.last):
                s = step - self.delay(block)
                if s >= 0:
                    (gradients, down), parts = block_vjp(
                        block, self.params[block], inputs[block, s], gradient_at[block, s], s
                    )
                    gradient_at[block - 1, s] = down
                    self.move_statistics(block, parts)
                    self.update(block, gradients)
        return losses


@pytest.mark.parametrize(
    "rule, cuts",
    [("stale", (0, 2)), ("current", (0, 2)), ("features_replay", (0, 2)), ("stale", (0, 1, 2))],
)
def test_matches_the_written_out_loop(network, small_batches, rule, cuts):
    with jax.enable_x64(True):
        batches = [Batch(b.images.astype(np.float64), b.labels) for b in small_batches[:12]]
        states = _initial_states(
            _method(rule).make_blocks(network, cuts, None, _LOSS_FN), "float64"
        )
        oracle = Oracle(network, cuts, states)
        expected = getattr(oracle, rule)([(b.images, b.labels) for b in batches])
        losses, state = _train(rule, network, cuts, batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for block, after in enumerate(state.blocks):
        jax.tree.map(close, after.params, oracle.params[block])
        jax.tree.map(close, after.batch_stats, oracle.stats[block])
        assert after.step == 12 - oracle.delay(block)


@pytest.mark.parametrize("rule", ["stale", "features_replay"])
def test_one_block_is_backprop(small_network, small_batches, rule):
    losses, state = _train(rule, small_network, (), small_batches[:8])
    expected, expected_state = _train("backprop", small_network, (), small_batches[:8])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, state.blocks, expected_state.blocks)


# ---- How it runs.


@pytest.mark.parametrize("rule", _RULES)
def test_pipelined_is_bitwise_fused(small_network, small_batches, rule):
    pipelined = PlacementConfig(kind="pipelined", num_devices=3)
    before = compile_seconds()
    runs = [_train(rule, small_network, (0, 2), small_batches[:8], p) for p in (_FUSED, pipelined)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert compile_seconds() > before  # So the check in _run would see one.


@pytest.mark.parametrize(
    "rule, kind, num_devices", [("stale", "pipelined", 6), ("features_replay", "fused", 0)]
)
def test_data_parallel_equals_one_device(small_network, small_batches, rule, kind, num_devices):
    placement = PlacementConfig(kind=kind, num_devices=num_devices, data_parallel=2)
    losses, state = _train(rule, small_network, (0, 2), small_batches[:10], placement)
    expected, expected_state = _train(rule, small_network, (0, 2), small_batches[:10])
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, state.blocks, expected_state.blocks)


@pytest.mark.parametrize("rule", _RULES)
def test_a_run_that_goes_on_from_a_checkpoint_is_bitwise_the_same(
    network, small_network, small_batches, tmp_path, rule
):
    """Saved while the queues fill, and when they are full; among stale residuals is a key."""
    network = network if rule == "stale" else small_network
    placement = PlacementConfig(kind="pipelined", num_devices=2)
    batches = jax.device_put(small_batches[:10])
    state, runner, schedule, _ = _start(rule, network, (0, 2), batches[0].images, placement)
    for step, tasks in zip(range(10), schedule.tasks(0)):
        if step in (1, 5):
            with checkpoint.open_checkpointer(tmp_path / str(step)) as checkpointer:
                checkpoint.save(checkpointer, step, state, top1=None, record={})
                state, _ = runner.step(state, tasks, lambda step: batches[step])
        else:
            state, _ = runner.step(state, tasks, lambda step: batches[step])
    fresh, runner, schedule, _ = _start(rule, network, (0, 2), batches[0].images, placement)
    for saved in (1, 5):
        with checkpoint.open_checkpointer(tmp_path / str(saved)) as checkpointer:
            step, restored, _ = checkpoint.restore_latest(checkpointer, fresh)
        assert step == saved and jax.tree.structure(restored) == jax.tree.structure(fresh)
        _, resumed = _run(restored, runner, schedule, batches, first=saved)
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((resumed, state)))


def test_metrics_are_the_last_blocks_and_gradient_norms_of_all(small_network, small_batches):
    state, runner, schedule, _ = _start(
        "stale", small_network, (0, 2), small_batches[0].images, log_gradient_norm=True
    )
    seen = []
    for tasks, batch in zip(schedule.tasks(0), small_batches[:4]):
        batch = jax.device_put(batch)
        state, metrics = runner.step(state, tasks, lambda step: batch)  # noqa: B023
        seen.append({block: set(scalars) for block, scalars in metrics.items()})
    last = {2: {"loss", "top1", "gradient_norm"}}
    assert seen[0] == last
    assert seen[1] == last | {1: {"gradient_norm"}}
    assert seen[2] == seen[3] == last | {0: {"gradient_norm"}, 1: {"gradient_norm"}}
    assert list(runner.logits(state.blocks, jax.device_put(small_batches[0].images))) == [2]


@pytest.mark.parametrize("method", [ddg.METHOD, features_replay.METHOD])
def test_the_work_of_a_block_is_what_its_two_programs_do(small_network, small_batches, method):
    """Timing must not lose Features Replay's second forward pass to common subexpressions."""
    blocks = method.make_blocks(small_network, (1,), None, _LOSS_FN)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    key, images = jax.random.key(0), small_batches[0].images
    state = _initial_states(blocks, "float32")[0]
    work = jax.jit(method.make_block_work(Config(), blocks[0], optimizer))
    args = (state, images, small_batches[0].labels, key)
    assert int(work(*args)[0].step) == 1
    convolutions = work.lower(*args).compile().as_text().count(" convolution(")
    # Two layers: forward, gradients of two kernels and of one input; and the replay.
    assert convolutions == (7 if method is features_replay.METHOD else 5)


# ---- The schedule.


def test_the_schedule_is_the_papers():
    tasks = list(METHODS["ddg"].make_schedule(_config("stale"), 3, 5, 5).tasks(0))
    assert [(t.block, t.operation, t.batch, t.turn) for t in tasks[0]] == [
        (0, FORWARD, 0, 0),
        (1, FORWARD, 0, 0),
        (2, UPDATE, 0, 0),
    ]
    assert [(t.block, t.operation, t.batch, t.turn) for t in tasks[4]] == [
        (0, FORWARD, 4, 2),
        (1, FORWARD, 4, 3),
        (0, BACKWARD, 2, 2),
        (1, BACKWARD, 3, 3),
        (2, UPDATE, 4, 4),
    ]
    schedule = METHODS["ddg"].make_schedule(_config("stale"), 3, 5, 5)
    assert list(schedule.tasks(3)) == tasks[3:]
    assert schedule.num_steps == schedule.num_updates == 5


def test_a_delay_longer_than_the_run_is_an_error():
    METHODS["ddg"].make_schedule(_config("stale"), 4, 4, 5)
    for rule in ("stale", "features_replay"):
        with pytest.raises(UserError, match=r"4 blocks has a delay of 3 steps, a delay longer"):
            _method(rule).make_schedule(_config(rule), 4, 3, 5)


def _seconds_a_step(num_blocks, num_devices, is_one_program):
    """Each device works off its tasks in the order of dispatch; F takes 1 second, B 2.

    ``is_one_program``: as if a block's two passes of a step were one program, which can't
    start before the inputs of both are there.
    """
    devices = [block * num_devices // num_blocks for block in range(num_blocks)]
    is_free, done, ends = [0] * num_devices, {}, []
    schedule = METHODS["ddg"].make_schedule(_config("stale"), num_blocks, 60, 5)
    for tasks in schedule.tasks(0):
        if is_one_program:
            backward = {t.block: t for t in tasks if t.operation == BACKWARD}
            programs = [[t, backward.pop(t.block, t)] for t in tasks if t.operation != BACKWARD]
            programs = [p if p[0] is not p[1] else p[:1] for p in programs]
        else:
            programs = [[t] for t in tasks]
        for program in programs:
            device, seconds, needs, gives = devices[program[0].block], 0, [0], []
            for task in program:
                goes_up = task.operation in (FORWARD, UPDATE)
                goes_down = task.operation in (BACKWARD, UPDATE)
                seconds += goes_up + 2 * goes_down
                if goes_up and task.block > 0:
                    needs.append(done[task.block - 1, "up", task.batch])
                if task.operation == BACKWARD:
                    needs.append(done[task.block + 1, "down", task.batch])
                gives += [(task.block, "up", task.batch)] * goes_up
                gives += [(task.block, "down", task.batch)] * goes_down
            is_free[device] = max(is_free[device], *needs) + seconds
            done |= dict.fromkeys(gives, is_free[device])
        ends.append(max(is_free))
    return (ends[50] - ends[20]) / 30


@pytest.mark.parametrize(
    "num_blocks, num_devices, expected", [(4, 4, 3), (4, 1, 12), (4, 2, 6), (2, 2, 3), (8, 8, 3)]
)
def test_all_devices_work_all_the_time(num_blocks, num_devices, expected):
    assert _seconds_a_step(num_blocks, num_devices, is_one_program=False) == expected


def test_they_would_not_if_forward_and_backward_were_one_program():
    assert _seconds_a_step(4, 4, is_one_program=True) > 5


def test_balanced_cuts_count_no_auxiliary_heads(small_network, monkeypatch):
    def costs(network, heads, *args):
        return [1.0] * 4, [0.0] * 4 if heads == [None] * 3 else [0.0, 9.0, 9.0, 0.0]

    monkeypatch.setattr(cost, "layer_and_head_costs", costs)
    partition = PartitionConfig(strategy="balanced", num_blocks=2)
    for name, cuts in (("dgl", (0,)), ("ddg", (1,)), ("features_replay", (1,))):
        config = Config(method=MethodConfig(name=name), partition=partition)
        assert choose_cuts(config, small_network, 4, (6, 6, 2)) == cuts


# ---- From the command line.

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_it_learns_from_the_command_line(tmp_path):
    fields = {
        "method.name": "ddg",
        "method.weights": "current",
        "placement.kind": "pipelined",
        "placement.num_devices": 4,
        "optimizer.learning_rate": 0.05,
        "train.num_epochs": 1.0,
        "train.log_every_steps": 10,
    }
    script, config = (
        _ROOT / "experiments" / name for name in ("train.py", "configs/quickstart.py")
    )
    command = [sys.executable, script, f"--config={config}", f"--workdir={tmp_path}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=900,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["classifiers"] == [3] and len(summary["test_top1"]) == 1
    assert summary["test_top1"][0] > 0.6  # Chance is 0.1.
    assert summary["aux_flops_ratio"] == [0.0] * 4
    losses = [
        line["train/block_3/loss"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if "train/block_3/loss" in line
    ]
    assert losses[-1] < 0.6 * losses[0]
    for name in ("learning_curves.png", "accuracy_by_depth.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
