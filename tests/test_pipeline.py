"""Fused, pipelined, one device or four: the same numbers. And nothing compiled twice."""

import contextlib
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import SmallHead

from dgl_jax.block import init_block_state, make_block_step
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.distributed import free_port
from dgl_jax.errors import UserError
from dgl_jax.losses import cross_entropy, make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.layers import ConvBNReLU
from dgl_jax.models.network import Network, apply_module
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import bound_in_flight, for_devices, init_states, steps_in_flight
from dgl_jax.placement import make_placements
from dgl_jax.transfer import move
from dgl_jax.types import Batch, TrainState

_OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="constant")


def _train(name, blocks, placement, batches, check=contextlib.nullcontext, **config):
    """Returns the losses [steps, blocks], the final states and each head's logits."""
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    placements = make_placements(placement, len(blocks))
    key = jax.random.key(0)
    config = Config(placement=placement, **config)
    images = jax.ShapeDtypeStruct(batches[0].images.shape, batches[0].images.dtype)
    states = init_states(blocks, optimizer, key, images.shape[1:], placements)
    runner = METHODS[name].make_runner(config, blocks, optimizer, key, placements)
    state = TrainState(states, runner.init_memory(states, images))
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


@pytest.mark.parametrize("kind, num_devices, data_parallel", [("fused", 0, 4), ("pipelined", 8, 2)])
def test_data_parallel_equals_one_device(
    dgl, fused, small_batches, kind, num_devices, data_parallel
):
    placement = PlacementConfig(kind=kind, num_devices=num_devices, data_parallel=data_parallel)
    losses, _, _ = _train("dgl", dgl, placement, small_batches)
    np.testing.assert_allclose(losses, fused[0], rtol=1e-5)


def test_a_split_batch_sums_its_weight_gradients_once():
    """In parts, as one device has them for its cache's sake, each would be summed over devices."""
    network = Network("convolutions", [ConvBNReLU(16), ConvBNReLU(16)], SmallHead())
    blocks = METHODS["dgl"].make_blocks(network, (0,), SmallHead(), make_loss_fn(LossConfig()))
    optimizer = make_optimizer(_OPTIMIZER, num_steps=20, steps_per_epoch=5)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((32, 32, 32, 8), np.float32), np.arange(32) % 4
    batches = [Batch(images, labels.astype(np.int32))]
    states = {}
    for num_devices in (1, 2):
        config = PlacementConfig(data_parallel=num_devices, num_devices=num_devices)
        placement = make_placements(config, len(blocks))[0]
        step = for_devices(make_block_step(blocks[0], optimizer), placement)
        init = lambda key: init_block_state(blocks[0], optimizer, key, images)
        state = jax.eval_shape(init, jax.random.key(0))
        program = jax.make_jaxpr(step)(state, images, batches[0].labels, jax.random.key(0))
        assert ("scan[" in str(program)) == (num_devices == 1)
        _, states[num_devices], _ = _train("dgl", blocks, config, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *states.values()
    )


@pytest.mark.parametrize(
    "name, cuts, devices_per_block",
    [("dgl", (0, 1), (1, 2, 1)), ("dgl", (1,), (2, 1)), ("ddg", (0, 1), (4, 1, 2))],
)
def test_devices_dealt_to_blocks_equal_one_device(
    name, cuts, devices_per_block, small_network, small_head, small_batches, monkeypatch
):
    blocks = METHODS[name].make_blocks(small_network, cuts, small_head, make_loss_fn(LossConfig()))
    runs, waits = [], []
    for placement in (
        PlacementConfig(),
        PlacementConfig(kind="pipelined", devices_per_block=devices_per_block),
    ):
        waited = []
        with monkeypatch.context() as patch:
            patch.setattr(jax, "block_until_ready", waited.append)
            runs.append(_train(name, blocks, placement, small_batches))
        waits.append(len(waited))
    one, dealt = runs
    np.testing.assert_allclose(dealt[0], one[0], rtol=1e-5)
    for block, logits in one[2].items():
        np.testing.assert_allclose(dealt[2][block], logits, atol=1e-4)
    # Of twenty steps four may be unfinished, and as many more as the pipeline is deep.
    assert waits == [16, 16 - len(cuts)]


def test_the_bound_waits_for_the_oldest_step_and_no_other(monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda step: calls.append(f"wait {step}"))

    def step(state, tasks, batch_at):
        calls.append(f"step {state}")
        return state + 1, state

    bounded, state = bound_in_flight(step, 3), 0
    for _ in range(5):
        state, _ = bounded(state, (), None)
    assert calls == ["step 0", "step 1", "step 2", "wait 0", "step 3", "wait 1", "step 4"]


@pytest.mark.parametrize(
    "placement, num_blocks, steps",
    [
        (PlacementConfig(), 4, 4),
        (PlacementConfig(kind="pipelined", num_devices=1), 4, 4),
        (PlacementConfig(kind="pipelined", num_devices=8), 8, 4 + 7),
        # Four blocks on two groups: a step is under way in two places at a time.
        (PlacementConfig(kind="pipelined", num_devices=4, data_parallel=2), 4, 4 + 1),
        (PlacementConfig(kind="pipelined", devices_per_block=(1, 2), max_steps_in_flight=1), 2, 2),
    ],
)
def test_steps_in_flight_fill_the_pipeline(placement, num_blocks, steps):
    assert steps_in_flight(placement, make_placements(placement, num_blocks)) == steps


@pytest.mark.parametrize(
    "source, target",
    [(1, 3), (2, 1), (2, 3), (2, 4), (2, 6), (3, 2), (3, 4), (4, 3), (6, 1), (6, 2)],
)
def test_arrays_move_between_any_numbers_of_devices(source, target):
    config = PlacementConfig(kind="pipelined", devices_per_block=(source, target))
    below, above = make_placements(config, 2)
    expected = np.arange(24, dtype=np.float32).reshape(12, 2)
    x = jax.device_put(expected, below.batch)
    with jax.transfer_guard("disallow"):
        moved = move(x, above.batch)
    # Had it gone through the host, which waits for the device, the host would have kept it.
    assert x._npy_value is None
    assert moved.sharding == above.batch
    np.testing.assert_array_equal(moved, expected)


def test_blocks_live_where_they_were_placed():
    placements = make_placements(
        PlacementConfig(kind="pipelined", num_devices=6, data_parallel=2), num_blocks=4
    )
    devices = [[device.id for device in placement.devices] for placement in placements]
    assert devices == [[0, 1], [0, 1], [2, 3], [4, 5]]
    dealt = PlacementConfig(kind="pipelined", devices_per_block=(1, 2, 1))
    for given in ((), (2, 1, 3)):
        placements = make_placements(dealt, 3, given)
        devices = [[device.id for device in placement.devices] for placement in placements]
        assert devices == ([[0, 1], [2], [3, 4, 5]] if given else [[0], [1, 2], [3]])


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
        PlacementConfig(kind="pipelined", devices_per_block=(2, 1, 4, 1)),
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


@pytest.mark.parametrize(
    "devices_per_block, message",
    [
        ((1, 2, 1), r"_block=\(1, 2, 1\) must have a number for each block; give 2 for 2 blocks"),
        ((4, 8), r"_block=\(4, 8\) makes 12, which exceeds the 8 cpu device\(s\) at hand; give"),
    ],
)
def test_devices_that_can_not_be_dealt(devices_per_block, message):
    with pytest.raises(UserError, match=message):
        make_placements(PlacementConfig("pipelined", devices_per_block=devices_per_block), 2)


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"num_devices=9 exceeds the 8 cpu device\(s\) at hand"):
        make_placements(PlacementConfig(kind="pipelined", num_devices=9), 2)


def _growths(max_steps_in_flight, num_steps, num_processes):
    """How far memory grew, step by step, of each process of a run of two uneven blocks."""
    script = pathlib.Path(__file__).with_name("uneven_blocks.py")
    arguments = [max_steps_in_flight, num_steps, f"localhost:{free_port()}", num_processes]
    # What is freed goes back to the system, so that the process's size is what it uses.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(script.parents[1]),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",  # The second block stays the slower one.
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments), str(process_id)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for process_id in range(num_processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes)
    return [np.array(json.loads(output.splitlines()[-1])) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_memory_stays_flat_when_the_first_block_is_much_faster(num_processes):
    """As many activations wait as the bound lets, over 500 steps; without it, many more."""
    activation = 64 * 128 * 128 * 4
    # Five steps are under way, each with an activation at both ends of its way; and some noise.
    room = (5 * 2 + 3) * activation
    for growth in _growths(4, 500, num_processes):
        assert growth.max() < room
        # One step may hold an activation more than any before it did; what piles up would do so
        # in most of them.
        assert np.median(growth[250:]) < growth[50:250].max() + activation
    assert max(growth.max() for growth in _growths(400, 200, num_processes)) > 2 * room
