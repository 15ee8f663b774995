"""DNI and cDNI against their rule written out, in float64; and whole runs."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.auxiliary import Synthesizer, make_auxiliary
from dgl_jax.block import init_block_state, make_block_feed
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig, TrainConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.metrics import read_metrics
from dgl_jax.models.cnn import Flatten
from dgl_jax.models.network import Network, apply_module, init_module
from dgl_jax.optim import make_optimizer
from dgl_jax.placement import make_placements
from dgl_jax.types import BlockState, TrainState

_LEARNING_RATE, _MOMENTUM, _DECAY, _CLASSES = 0.003, 0.9, 5e-4, 4
_CUTS = (0, 2)  # Three blocks, of one, two and one layers.


def _make_blocks(name, network, head):
    return METHODS[name].make_blocks(network, _CUTS, head, make_loss_fn(LossConfig()))


def _draw_state(blocks, optimizer, dtype):
    """A first state, drawn by numpy: compiling the initialisers takes seconds.

    As after an initialisation, the synthesizers' last convolutions are zero.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        *_, module, name = [entry.key for entry in path if hasattr(entry, "key")]
        noise = rng.standard_normal(leaf.shape).astype(dtype)
        if module == "Conv_2":
            return 0 * noise
        if name == "kernel":
            return noise / np.sqrt(leaf.size / leaf.shape[-1]).astype(dtype)
        return np.abs(noise) + 1 if name in ("scale", "var") else noise / 4

    states, x = [], jax.ShapeDtypeStruct((2, 6, 6, 2), jnp.float32)
    for block in blocks:
        shapes = jax.eval_shape(
            lambda x, block=block: init_block_state(block, optimizer, jax.random.key(0), x), x
        )
        x = jax.eval_shape(make_block_feed(block), shapes, x)
        params, stats = jax.tree.map_with_path(draw, (shapes.params, shapes.batch_stats))
        step = np.zeros((), np.int32)
        states.append(BlockState(step, params, stats, jax.device_get(optimizer.init(params))))
    return TrainState(tuple(states))


def _setup(name, network, head, *, data_parallel=1, log_norm=False, decay=_DECAY, dtype=np.float64):
    """A runner, the first state on the host, and where it goes."""
    fields = {"learning_rate": _LEARNING_RATE, "momentum": _MOMENTUM, "weight_decay": decay}
    optimizer = make_optimizer(OptimizerConfig(**fields, schedule="constant"), 20, 5)
    config = Config(
        placement=PlacementConfig(data_parallel=data_parallel),
        train=TrainConfig(log_gradient_norm=log_norm),
    )
    blocks = _make_blocks(name, network, head)
    placements = make_placements(config.placement, len(blocks))
    runner = METHODS[name].make_runner(config, blocks, optimizer, jax.random.key(0), placements)
    return runner, _draw_state(blocks, optimizer, dtype), placements[0]


def _tasks(steps, first_step=0):
    schedule = METHODS["dni"].make_schedule(Config(), 3, steps, 5)
    return enumerate(schedule.tasks(first_step), start=first_step)


# ---- The rule written out: it shares nothing with the implementation but the layers' forward
# pass. Gradients are those of scalars, by jax.grad.


def _layers(modules, params, stats, x):
    after = []
    for module, p, s in zip(modules, params, stats, strict=True):
        x, updated = module.apply({"params": p, "batch_stats": s}, x, True, mutable=["batch_stats"])
        after.append(updated["batch_stats"])
    return x, tuple(after)


def _synthesize(params, stats, h, labels):
    """Convolution [+ labels], BatchNorm, ReLU; convolution, BatchNorm, ReLU; convolution."""
    after = {}
    for i in range(3):
        h = jax.lax.conv_general_dilated(
            h,
            params[f"Conv_{i}"]["kernel"],
            (1, 1),
            [(2, 2), (2, 2)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = h + params[f"Conv_{i}"]["bias"].reshape(1, 1, 1, -1)
        if i == 2:
            return h, after
        if i == 0 and labels is not None:
            row = params["Dense_0"]["kernel"][labels] + params["Dense_0"]["bias"].reshape(1, -1)
            h = h + row.reshape(len(labels), 1, 1, -1)
        mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
        old, weight = stats[f"BatchNorm_{i}"], params[f"BatchNorm_{i}"]
        after[f"BatchNorm_{i}"] = {
            "mean": 0.9 * old["mean"] + 0.1 * mean,
            "var": 0.9 * old["var"] + 0.1 * var,
        }
        mean, var, scale, bias = (
            v.reshape(1, 1, 1, -1) for v in (mean, var, weight["scale"], weight["bias"])
        )
        h = jnp.maximum((h - mean) / jnp.sqrt(var + 1e-5) * scale + bias, 0)


def _network_loss(params, stats, network, x, labels):
    """Of the last block: its layer and the network's head."""
    h, _ = _layers(network.layers[3:], params["layers"], stats["layers"], x)
    logits = network.head.apply({"params": params["head"]}, h)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def _oracle_gradients(network, params, stats, images, labels, conditioned):
    """The gradients of all three blocks, their metrics and their next statistics."""
    modules = (network.layers[:1], network.layers[1:3], network.layers[3:])
    context = labels if conditioned else None
    h, synthetic, next_stats = [images], [], []
    for k in range(3):
        y, layer_stats = _layers(modules[k], params[k]["layers"], stats[k]["layers"], h[-1])
        h.append(y)
        head_stats = {}
        if k < 2:
            g, head_stats = _synthesize(params[k]["head"], stats[k]["head"], y, context)
            synthetic.append(g)
        next_stats.append({"layers": layer_stats, "head": head_stats})

    gradients, true = [None] * 3, [None] * 3  # true[k]: what arrives at block k's output.
    gradients[2] = jax.grad(_network_loss)(params[2], stats[2], network, h[2], labels)
    true[1] = jax.grad(_network_loss, 3)(params[2], stats[2], network, h[2], labels)
    metrics = [{}, {}, {"loss": _network_loss(params[2], stats[2], network, h[2], labels)}]
    for k in (1, 0):

        def dot(layers, x, k=k):
            return jnp.sum(_layers(modules[k], layers, stats[k]["layers"], x)[0] * synthetic[k])

        def squared_error(head, k=k):
            g, _ = _synthesize(head, stats[k]["head"], h[k + 1], context)
            per_example = jnp.sum((g - true[k]) ** 2, axis=(1, 2, 3))
            return jnp.mean(per_example)

        layers, true[k - 1] = jax.grad(dot, (0, 1))(params[k]["layers"], h[k])
        loss, head = jax.value_and_grad(squared_error)(params[k]["head"])
        gradients[k] = {"layers": layers, "head": head}
        norms = jnp.sqrt(jnp.sum(synthetic[k] ** 2) * jnp.sum(true[k] ** 2))
        cosine = jnp.sum(synthetic[k] * true[k]) / jnp.where(norms == 0, 1, norms)
        metrics[k] = {"loss": loss, "gradient_cosine": cosine}
    for k in range(3):
        squares = [jnp.sum(g**2) for g in jax.tree.leaves(gradients[k])]
        metrics[k]["gradient_norm"] = jnp.sqrt(sum(squares))
    return gradients, metrics, next_stats


@pytest.mark.parametrize("conditioned", [False, True])
def test_three_blocks_match_the_rule_written_out(
    conditioned, small_network, small_head, small_batches
):
    name = "cdni" if conditioned else "dni"
    with jax.enable_x64(True):
        runner, state, where = _setup(name, small_network, small_head, log_norm=True)
        params = [block.params for block in state.blocks]
        stats = [block.batch_stats for block in state.blocks]
        state = jax.device_put(state, where.state)
        momentum = jax.tree.map(np.zeros_like, params)
        oracle = jax.jit(
            lambda params, stats, x, y: _oracle_gradients(
                small_network, params, stats, x, y, conditioned
            )
        )
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)
        losses = []
        for step, tasks in _tasks(12):
            batch = small_batches[step].replace(images=np.float64(small_batches[step].images))
            batch = jax.device_put(batch, where.batch)
            gradients, expected, stats = oracle(params, stats, batch.images, batch.labels)
            state, metrics = runner.step(state, tasks, lambda step, batch=batch: batch)
            for k in range(3):
                assert metrics[k].keys() == expected[k].keys() | ({"top1"} if k == 2 else set())
                for quantity, value in expected[k].items():
                    close(metrics[k][quantity], value)
            losses.append([expected[k]["loss"] for k in range(3)])
            momentum = jax.tree.map(
                lambda m, g, p: _MOMENTUM * m + g + _DECAY * p, momentum, gradients, params
            )
            params = jax.tree.map(lambda p, m: p - _LEARNING_RATE * m, params, momentum)
        # Gradients have come all the way down by now, so that this compared something.
        assert losses[0][0] == 0 and min(losses[-1]) > 0
        for k, block in enumerate(state.blocks):
            jax.tree.map(close, block.params, params[k])
            jax.tree.map(close, block.batch_stats, stats[k])
            assert int(block.step) == 12


def test_the_first_step_by_hand(small_network, small_head, small_batches):
    """Synthetic gradients are exactly zero, and the highest target is the true gradient."""
    batch = small_batches[0]
    with jax.enable_x64(True):
        runner, state, where = _setup("dni", small_network, small_head, decay=0.0)
        x, _ = _layers(
            small_network.layers[:3],
            state.blocks[0].params["layers"] + state.blocks[1].params["layers"],
            state.blocks[0].batch_stats["layers"] + state.blocks[1].batch_stats["layers"],
            np.float64(batch.images),
        )
        last = state.blocks[2]
        true = jax.grad(_network_loss, 3)(
            last.params, last.batch_stats, small_network, x, batch.labels
        )
        images = jax.device_put(batch.replace(images=np.float64(batch.images)), where.batch)
        after, metrics = runner.step(
            jax.device_put(state, where.state), next(_tasks(1))[1], lambda step: images
        )
        after = jax.device_get(after)
        for k in (0, 1):  # The layers have learned nothing.
            equal = jax.tree.map(
                np.array_equal, after.blocks[k].params["layers"], state.blocks[k].params["layers"]
            )
            assert all(jax.tree.leaves(equal))
        jax.tree.map(np.testing.assert_array_equal, after.blocks[0].params, state.blocks[0].params)
        assert metrics[0]["loss"] == 0 and metrics[0]["gradient_cosine"] == 0
        # Eight examples: the squares of all features, over eight; the gradient of the last
        # convolution's bias is 2 / 8 of the error's sum over examples and places.
        np.testing.assert_allclose(metrics[1]["loss"], np.sum(np.square(true)) / 8, rtol=1e-12)
        np.testing.assert_allclose(
            after.blocks[1].params["head"]["Conv_2"]["bias"],
            _LEARNING_RATE * 2 / 8 * np.sum(true, (0, 1, 2)),
            rtol=1e-12,
        )
        changed = lambda a, b: not np.array_equal(a, b)
        assert all(jax.tree.leaves(jax.tree.map(changed, after.blocks[2].params, last.params)))


def test_only_the_conditioned_synthesizer_sees_the_labels():
    x, labels = jax.random.normal(jax.random.key(0), (8, 3, 3, 2)), jnp.arange(8) % _CLASSES
    for conditioned in (False, True):
        module = Synthesizer(_CLASSES, conditioned)
        params, stats = init_module(module, jax.random.key(1), x)
        assert ("Dense_0" in params) == conditioned
        zero, _ = apply_module(module, params, stats, x, train=True, labels=labels)
        np.testing.assert_array_equal(zero, jnp.zeros_like(x))
        params["Conv_2"]["kernel"] = jnp.ones_like(params["Conv_2"]["kernel"])
        outputs = [
            apply_module(module, params, stats, x, train=True, labels=seen)[0]
            for seen in (labels, labels[::-1])
        ]
        assert np.array_equal(*outputs) != conditioned


def _train(runner, state, where, batches, caplog, first_step=0):
    """The losses [steps, blocks] and the last state, on the host.

    After the first step nothing is compiled, nothing crosses unasked between host and devices,
    and the state's arrays stay of one kind.
    """
    kinds = lambda state: jax.tree.map(lambda leaf: (leaf.sharding, leaf.dtype, leaf.shape), state)
    state, batches = jax.device_put(state, where.state), jax.device_put(batches, where.batch)
    losses, before = [], kinds(state)
    for step, tasks in _tasks(len(batches), first_step):
        guard = "allow" if step == first_step else "disallow"
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles(), jax.transfer_guard(guard):
            state, metrics = runner.step(state, tasks, lambda step: batches[step])
        compiled = [r for r in caplog.records if "Finished" in r.getMessage()]
        assert step == first_step or not compiled
        assert kinds(state) == before
        losses.append([metrics[k]["loss"] for k in range(3)])
    return np.array(jax.device_get(losses)), jax.device_get(state)


def test_two_devices_equal_one(small_network, small_head, small_batches, caplog):
    """The same sums in another order: in float64, so that they can be compared closely."""
    runs = []
    with jax.enable_x64(True):
        batches = [b.replace(images=np.float64(b.images)) for b in small_batches[:5]]
        for data_parallel in (1, 2):
            runner, state, where = _setup(
                "cdni", small_network, small_head, data_parallel=data_parallel
            )
            assert len(where.devices) == data_parallel
            runs.append(_train(runner, state, where, batches, caplog))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, *runs)


def test_a_state_saved_in_the_middle_is_gone_on_with_bitwise(
    small_network, small_head, small_batches, caplog
):
    runner, state, where = _setup("dni", small_network, small_head, dtype=np.float32)
    batches = small_batches[:6]
    _, whole = _train(runner, state, where, batches, caplog)
    _, half = _train(runner, state, where, batches[:3], caplog)
    _, resumed = _train(runner, half, where, batches, caplog, first_step=3)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_bfloat16_activations_get_bfloat16_gradients(small_batches):
    layers = [nn.Conv(3, (3, 3), dtype=jnp.bfloat16) for _ in range(4)]
    head = nn.Sequential([lambda x: jnp.mean(x, (1, 2)), nn.Dense(_CLASSES, dtype=jnp.bfloat16)])
    blocks = _make_blocks(
        "cdni", Network("low", layers, head), make_auxiliary("mlp", _CLASSES, dtype=jnp.bfloat16)
    )
    optimizer = make_optimizer(OptimizerConfig(), 20, 5)
    states = _draw_state(blocks, optimizer, np.float32).blocks
    key, labels, x = jax.random.key(0), small_batches[0].labels, small_batches[0].images
    for block, state in zip(blocks, states):
        work = METHODS["cdni"].make_block_work(Config(), block, optimizer)
        after, x, _ = jax.eval_shape(work, state, x, labels, key)
        assert x.dtype == jnp.bfloat16
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
        assert all(jax.tree.leaves(same))


def test_a_block_whose_output_is_no_map(small_head):
    flat = Network("flat", [nn.Dense(3), Flatten(), nn.Dense(3), nn.Dense(3)], nn.Dense(4))
    blocks = _make_blocks("cdni", flat, small_head)
    optimizer = make_optimizer(OptimizerConfig(), 20, 5)
    message = (
        r"method.name=cdni needs blocks that output maps \[B, H, W, C\] .* but one outputs "
        r"\[2, 3\]; choose other partition.cuts, or method.name=dgl"
    )
    with pytest.raises(UserError, match=message) as error:
        init_block_state(blocks[1], optimizer, jax.random.key(0), jnp.zeros((2, 6, 6, 3)))
    assert "\n" not in str(error.value)


# ---- From the command line, on images.

_ROOT = pathlib.Path(__file__).parents[1]


def _run(workdir, **fields):
    fields = {
        "network.name": "dni_cnn",
        "network.width_factor": 0.125,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant",
        "eval.time_blocks": False,
    } | {name.replace("__", "."): value for name, value in fields.items()}
    return subprocess.run(
        [
            sys.executable,
            _ROOT / "experiments" / "train.py",
            f"--config={_ROOT / 'experiments' / 'configs' / 'quickstart.py'}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_learns_images_from_the_command_line(tmp_path):
    name = "cdni"
    result = _run(tmp_path, method__name=name, train__num_epochs=1.0)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_blocks"] == 4 and summary["classifiers"] == [3]
    assert summary["test_top1"][0] > 0.3  # Chance is 0.1.
    assert f"| {name}, dni_cnn, K = 4" in result.stdout
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "train/block_0/loss" in x]
    assert lines[-1]["train/block_3/loss"] < lines[0]["train/block_3/loss"]
    assert lines[-1]["train/block_0/loss"] > 0
    assert lines[-1]["train/block_2/gradient_cosine"] > 0.1
    for picture in ("learning_curves.png", "accuracy_by_depth.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
