"""Sequential greedy training against a loop written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import to_float64

from dgl_jax.config import Config, LossConfig, MethodConfig, OptimizerConfig, PlacementConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.schedule import FEED, UPDATE
from dgl_jax.types import Batch, TrainState

_OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, weight_decay=5e-4, drop_epochs=(1.0,), drop_factor=0.5
)
_UPDATES, _STEPS_PER_EPOCH, _CUTS = 6, 3, (0, 2)


def _written_out(network, head, params, stats, batches, laps):
    """No code of ours but the modules: who learns when, frozen blocks, the optimizer by hand."""
    layers, heads = [(0,), (1, 2), (3,)], [head, head, network.head]
    momentum = jax.tree.map(np.zeros_like, params)
    done, losses, batches = [0] * 3, [], iter(batches)

    def loss_fn(params, stats, block, x, labels):
        after = []
        for place, layer in enumerate(layers[block]):
            variables = {
                "params": params["layers"][place],
                "batch_stats": stats["layers"][place],
            }
            x, updated = network.layers[layer].apply(variables, x, True, mutable=["batch_stats"])
            after.append(updated["batch_stats"])
        logits = heads[block].apply({"params": params["head"]}, x)
        logits = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
        loss = -jnp.mean(logits[jnp.arange(len(labels)), labels])
        return loss, {"layers": tuple(after), "head": stats["head"]}

    for _ in range(laps):
        for block in range(3):
            for _ in range(_UPDATES // laps):
                batch = next(batches)
                x = batch.images.astype(np.float64)
                for below in range(block):
                    for place, layer in enumerate(layers[below]):
                        variables = {
                            "params": params[below]["layers"][place],
                            "batch_stats": stats[below]["layers"][place],
                        }
                        x = network.layers[layer].apply(variables, x, False)
                (loss, stats[block]), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                    params[block], stats[block], block, x, batch.labels
                )
                rate = 0.1 if done[block] < _STEPS_PER_EPOCH else 0.05
                momentum[block] = jax.tree.map(
                    lambda m, g, p: 0.9 * m + g + 5e-4 * p,
                    momentum[block],
                    gradients,
                    params[block],
                )
                params[block] = jax.tree.map(
                    lambda p, m: p - rate * m,  # noqa: B023
                    params[block],
                    momentum[block],
                )
                done[block] += 1
                losses.append(float(loss))
    return params, stats, losses


@pytest.mark.parametrize("laps", [1, 2])
def test_blocks_learn_one_after_the_other(small_network, small_head, small_batches, laps):
    method = METHODS["sequential"]
    config = Config(method=MethodConfig("sequential", laps=laps), optimizer=_OPTIMIZER)
    blocks = method.make_blocks(small_network, _CUTS, small_head, make_loss_fn(LossConfig()))
    schedule = method.make_schedule(config, 3, _UPDATES, _STEPS_PER_EPOCH)
    optimizer = make_optimizer(_OPTIMIZER, _UPDATES, _STEPS_PER_EPOCH)
    placements = make_placements(PlacementConfig(), 3)
    key = jax.random.key(0)
    with jax.enable_x64(True):
        states = init_states(blocks, optimizer, key, (6, 6, 2), placements)
        state = TrainState(jax.device_put(to_float64(states), placements[0].state))
        expected = _written_out(
            small_network,
            small_head,
            [s.params for s in jax.device_get(state.blocks)],
            [s.batch_stats for s in jax.device_get(state.blocks)],
            small_batches,
            laps,
        )
        batches = [Batch(b.images.astype(np.float64), b.labels) for b in small_batches]
        runner = method.make_runner(config, blocks, optimizer, key, placements)
        losses = []
        for tasks in schedule.tasks(0):
            state, metrics = runner.step(state, tasks, lambda step: batches[step])
            losses += [float(scalars["loss"]) for scalars in metrics.values()]
    assert len(losses) == schedule.num_steps == 18
    np.testing.assert_allclose(losses, expected[2], rtol=1e-11)
    for block in range(3):
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11)
        jax.tree.map(close, state.blocks[block].params, expected[0][block])
        jax.tree.map(close, state.blocks[block].batch_stats, expected[1][block])


def test_pipelined_equals_fused(small_network, small_head, small_batches):
    method, results = METHODS["sequential"], []
    for kind, num_devices in (("fused", 0), ("pipelined", 3)):
        config = Config(
            method=MethodConfig("sequential"),
            placement=PlacementConfig(kind=kind, num_devices=num_devices),
        )
        blocks = method.make_blocks(small_network, _CUTS, small_head, make_loss_fn(LossConfig()))
        optimizer = make_optimizer(_OPTIMIZER, _UPDATES, _STEPS_PER_EPOCH)
        placements = make_placements(config.placement, 3)
        key = jax.random.key(0)
        state = TrainState(init_states(blocks, optimizer, key, (6, 6, 2), placements))
        runner = method.make_runner(config, blocks, optimizer, key, placements)
        for tasks in method.make_schedule(config, 3, _UPDATES, _STEPS_PER_EPOCH).tasks(0):
            state, _ = runner.step(state, tasks, lambda step: small_batches[step])
        results.append(jax.device_get([s.params for s in state.blocks]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *results)


def test_the_schedule_says_who_learns_and_can_start_anywhere():
    config = Config(method=MethodConfig("sequential", laps=2))
    schedule = METHODS["sequential"].make_schedule(config, 2, 5, 1)
    steps = list(schedule.tasks(0))
    learners = [(tasks[-1].block, tasks[-1].turn) for tasks in steps]
    assert learners == [(0, 0), (0, 1), (1, 0), (1, 1),
                        (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]  # fmt: skip
    for tasks in steps:
        assert [task.block for task in tasks] == list(range(len(tasks)))
        assert {task.operation for task in tasks[:-1]} <= {FEED}
        assert tasks[-1].operation == UPDATE
    for first in range(10):
        assert list(schedule.tasks(first)) == steps[first:]


def test_more_laps_than_updates():
    config = Config(method=MethodConfig("sequential", laps=9))
    with pytest.raises(UserError, match=r"config.method.laps=9 must not exceed the 5 updates"):
        METHODS["sequential"].make_schedule(config, 2, 5, 1)
