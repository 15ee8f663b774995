"""Fused, pipelined, one device or four: the same numbers. And nothing compiled twice."""

import contextlib
import logging

import jax
import numpy as np
import optax
import pytest

from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.losses import cross_entropy, make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.network import apply_module
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.types import TrainState

_OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="constant")


def _train(name, blocks, placement, batches, check=contextlib.nullcontext, **config):
    """Returns the losses [steps, blocks], the final states and each head's logits."""
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(placement, len(blocks))
    key = jax.random.key(0)
    config = Config(placement=placement, **config)
    state = TrainState(init_states(blocks, optimizer, key, batches[0].images.shape[1:], placements))
    runner = METHODS[name].make_runner(config, blocks, optimizer, key, placements)
    schedule = METHODS[name].make_schedule(config, len(blocks), len(batches), 5)
    batches = jax.device_put(batches, placements[0].batch)
    losses = []
    for step, tasks in enumerate(schedule.tasks(0)):
        with check() if step else contextlib.nullcontext():
            before = jax.tree.map(lambda leaf: leaf.sharding, state)
            state, metrics = runner.step(state, tasks, lambda step: batches[step % len(batches)])
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
        losses.append([block["loss"] for block in metrics.values()])
    logits = runner.logits(state.blocks, batches[0].images)
    return np.array(jax.device_get(losses)), jax.device_get(state.blocks), jax.device_get(logits)


@pytest.fixture
def dgl(small_network, small_head):
    return METHODS["dgl"].make_blocks(
        small_network, (0, 1, 2), small_head, make_loss_fn(LossConfig())
    )


@pytest.fixture
def fused(dgl, small_batches):
    return _train("dgl", dgl, PlacementConfig(kind="fused"), small_batches)


def test_pipelined_equals_fused(dgl, fused, small_batches):
    pipelined = _train("dgl", dgl, PlacementConfig(kind="pipelined", num_devices=4), small_batches)
    np.testing.assert_allclose(pipelined[0], fused[0], rtol=1e-5)
    for block in range(4):
        np.testing.assert_allclose(pipelined[2][block], fused[2][block], atol=1e-4)


def test_pipelined_on_one_and_on_four_devices_is_bitwise_equal(dgl, small_batches):
    runs = [
        _train(
            "dgl", dgl, PlacementConfig(kind="pipelined", num_devices=num_devices), small_batches
        )
        for num_devices in (1, 4)
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize("kind, num_devices", [("fused", 0), ("pipelined", 8)])
def test_data_parallel_equals_one_device(dgl, fused, small_batches, kind, num_devices):
    placement = PlacementConfig(kind=kind, num_devices=num_devices, data_parallel=2)
    losses, _, _ = _train("dgl", dgl, placement, small_batches)
    np.testing.assert_allclose(losses, fused[0], rtol=1e-5)


def test_blocks_live_where_they_were_placed():
    placements = make_placements(
        PlacementConfig(kind="pipelined", num_devices=6, data_parallel=2), num_blocks=4
    )
    devices = [[device.id for device in placement.devices] for placement in placements]
    assert devices == [[0, 1], [0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("method_name", ["dgl", "backprop"])
def test_one_block_is_backprop_written_out(method_name, small_network, small_head, small_batches):
    """Against a plain training loop that knows nothing of blocks."""
    blocks = METHODS[method_name].make_blocks(
        small_network, (), small_head, make_loss_fn(LossConfig())
    )
    losses, _, _ = _train(method_name, blocks, PlacementConfig(), small_batches)

    placement = make_placements(PlacementConfig(), 1)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    (state,) = init_states(blocks, optimizer, jax.random.key(0), (6, 6, 2), placement)
    modules = [*small_network.layers, small_network.head]

    def network_loss(params, batch_stats, batch):
        x, after = batch.images, []
        for module, p, s in zip(modules, params, batch_stats):
            x, s = apply_module(module, p, s, x, train=True)
            after.append(s)
        return cross_entropy(x, batch.labels).mean(), after

    sgd = optax.chain(
        optax.add_decayed_weights(_OPTIMIZER.weight_decay),
        optax.sgd(_OPTIMIZER.learning_rate, momentum=_OPTIMIZER.momentum),
    )
    params = [*state.params["layers"], state.params["head"]]
    batch_stats = [*state.batch_stats["layers"], state.batch_stats["head"]]
    opt_state = sgd.init(params)
    expected = []
    gradient_fn = jax.jit(jax.value_and_grad(network_loss, has_aux=True))
    for batch in small_batches:
        (loss, batch_stats), gradients = gradient_fn(params, batch_stats, batch)
        updates, opt_state = sgd.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        expected.append([loss])
    np.testing.assert_allclose(losses, np.array(expected), rtol=1e-6)


@pytest.mark.parametrize(
    "placement",
    [
        PlacementConfig(kind="fused"),
        PlacementConfig(kind="fused", data_parallel=2),
        PlacementConfig(kind="pipelined", num_devices=4),
        PlacementConfig(kind="pipelined", num_devices=8, data_parallel=2),
    ],
)
def test_nothing_compiles_or_crosses_unasked_after_the_first_step(
    dgl, small_batches, placement, caplog
):
    @contextlib.contextmanager
    def check():
        caplog.clear()
        with jax.log_compiles(), jax.transfer_guard("disallow"), caplog.at_level(logging.WARNING):
            yield
        compiled = [r.getMessage() for r in caplog.records if "Finished" in r.getMessage()]
        assert not compiled

    _train("dgl", dgl, placement, small_batches[:4], check)


def test_the_compilation_check_would_see_one(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert [r for r in caplog.records if "Finished" in r.getMessage()]


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"num_devices=9 exceeds the 8 cpu device\(s\) at hand"):
        make_placements(PlacementConfig(kind="pipelined", num_devices=9), 2)
