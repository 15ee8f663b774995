"""Fused, pipelined, one device or four: the same numbers. And nothing compiled twice."""

import contextlib
import logging

import jax
import numpy as np
import optax
import pytest

from dgl_jax.config import LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.losses import cross_entropy, make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.network import apply_module
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states, make_runner
from dgl_jax.placement import make_placements

_OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="constant")


def _train(method, placement, batches, check=contextlib.nullcontext):
    """Returns the losses [steps, blocks] and the final states."""
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(placement, len(method.blocks))
    key = jax.random.key(0)
    states = init_states(method, optimizer, key, batches[0].images.shape[1:], placements)
    runner = make_runner(placement, method, optimizer, key, placements)
    batches = jax.device_put(batches, placements[0].batch)
    losses = []
    for index, batch in enumerate(batches):
        with check() if index else contextlib.nullcontext():
            before = jax.tree.map(lambda leaf: leaf.sharding, states)
            states, metrics = runner.step(states, batch)
            assert jax.tree.map(lambda leaf: leaf.sharding, states) == before
        losses.append([block["loss"] for block in metrics])
    logits = runner.logits(states, batches[0].images)
    return np.array(jax.device_get(losses)), jax.device_get(states), jax.device_get(logits)


@pytest.fixture
def dgl(small_network, small_head):
    return METHODS["dgl"](small_network, (0, 1, 2), small_head, make_loss_fn(LossConfig()))


@pytest.fixture
def fused(dgl, small_batches):
    return _train(dgl, PlacementConfig(kind="fused"), small_batches)


def test_pipelined_equals_fused(dgl, fused, small_batches):
    pipelined = _train(dgl, PlacementConfig(kind="pipelined", num_devices=4), small_batches)
    np.testing.assert_allclose(pipelined[0], fused[0], rtol=1e-5)
    for a, b in zip(pipelined[2], fused[2]):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_pipelined_on_one_and_on_four_devices_is_bitwise_equal(dgl, small_batches):
    runs = [
        _train(dgl, PlacementConfig(kind="pipelined", num_devices=num_devices), small_batches)
        for num_devices in (1, 4)
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize("kind, num_devices", [("fused", 0), ("pipelined", 8)])
def test_data_parallel_equals_one_device(dgl, fused, small_batches, kind, num_devices):
    placement = PlacementConfig(kind=kind, num_devices=num_devices, data_parallel=2)
    losses, _, _ = _train(dgl, placement, small_batches)
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
    method = METHODS[method_name](small_network, (), small_head, make_loss_fn(LossConfig()))
    losses, _, _ = _train(method, PlacementConfig(), small_batches)

    placement = make_placements(PlacementConfig(), 1)
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    (state,) = init_states(method, optimizer, jax.random.key(0), (6, 6, 2), placement)
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

    _train(dgl, placement, small_batches[:4], check)


def test_the_compilation_check_would_see_one(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert [r for r in caplog.records if "Finished" in r.getMessage()]


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"num_devices=9 exceeds the 8 cpu device\(s\) at hand"):
        make_placements(PlacementConfig(kind="pipelined", num_devices=9), 2)
