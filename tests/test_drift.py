"""The distance of output densities, against numpy and against known distances."""

import jax
import numpy as np

from dgl_jax import drift
from dgl_jax.config import LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements


def test_histograms_are_those_of_numpy():
    x = 3 * np.random.default_rng(0).standard_normal((5, 4, 4, 3)).astype(np.float32)
    x[0, 0, 0] = [1e9, -1e9, 0.0]
    edges = np.sinh(0.25 * np.arange(-24, 25))
    edges[[0, -1]] = -np.inf, np.inf
    expected = [np.histogram(x[..., channel], edges)[0] / 80 for channel in range(3)]
    np.testing.assert_allclose(drift.channel_histograms(x, np.ones(5)), expected, atol=1e-6)


def test_what_only_fills_up_a_batch_does_not_count():
    x = np.random.default_rng(0).standard_normal((5, 4, 4, 3)).astype(np.float32)
    filled = np.concatenate([x, np.repeat(x[-1:], 3, axis=0)])
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    np.testing.assert_allclose(
        drift.channel_histograms(filled, mask), drift.channel_histograms(x, np.ones(5)), atol=1e-6
    )


def test_the_distance_is_0_for_equal_and_2_for_separate_densities():
    near, far = np.zeros((2, 10, 1), np.float32), np.full((2, 10, 1), 5.0, np.float32)
    half = np.concatenate([near, far], axis=1)
    near, far, half = (np.array(drift.channel_histograms(x, np.ones(2))) for x in (near, far, half))
    assert drift.density_distance(near, near) == 0.0
    assert drift.density_distance(near, far) == 2.0
    assert drift.density_distance(near, half) == 1.0


def test_a_block_that_changes_drifts_and_those_below_do_not(
    small_network, small_head, small_batches, tmp_path
):
    blocks = METHODS["dgl"].make_blocks(
        small_network, (0, 1, 2), small_head, make_loss_fn(LossConfig())
    )
    optimizer = make_optimizer(OptimizerConfig(), 20, 5)
    placements = make_placements(PlacementConfig(kind="pipelined", num_devices=4), 4)
    states = init_states(blocks, optimizer, jax.random.key(0), (6, 6, 2), placements)
    probe = drift.make_probe(blocks, placements)
    images = jax.device_put(small_batches[0].images, placements[0].batch)
    mask = jax.device_put(np.ones(len(images), np.float32), placements[0].batch)
    changed = states[1].replace(params=jax.tree.map(lambda leaf: 2 * leaf + 1, states[1].params))
    for step, block_1 in ((10, changed), (9, states[1])):
        histograms = probe((states[0], block_1, *states[2:]), images, mask)
        drift.save_histograms(tmp_path, step, jax.device_get(histograms))
    first, last = drift.write_drift(tmp_path)
    assert (first["step"], last["step"]) == (9, 10)
    assert [last[f"block_{block}"] for block in range(4)] == [0.0] * 4
    assert first["block_0"] == 0.0
    assert min(first[f"block_{block}"] for block in (1, 2, 3)) > 0.1
