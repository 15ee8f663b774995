"""Saving, restoring, and what is said of a checkpoint that does not fit."""

import collections
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax import checkpoint
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states, make_runner
from dgl_jax.placement import make_placements
from dgl_jax.schedule import synchronous
from dgl_jax.types import TrainState


def _setup(network, head, cuts, num_devices):
    blocks = METHODS["dgl"].make_blocks(network, cuts, head, make_loss_fn(LossConfig()))
    optimizer = make_optimizer(OptimizerConfig(), num_steps=20, steps_per_epoch=5)
    config = Config(placement=PlacementConfig(kind="pipelined", num_devices=num_devices))
    placements = make_placements(config.placement, len(blocks))
    key = jax.random.key(0)
    state = TrainState(init_states(blocks, optimizer, key, (6, 6, 2), placements))
    return state, make_runner(config, blocks, optimizer, key, placements)


def test_saving_is_not_disturbed_by_the_steps_that_follow(
    small_network, small_head, small_batches, tmp_path
):
    """The states are donated to the next step while the checkpoint is being written."""
    states, runner = _setup(small_network, small_head, (0, 2), 3)
    batches = jax.device_put(small_batches)
    tasks = synchronous(num_blocks=3, num_updates=12).tasks(0)
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        assert checkpoint.restore_latest(checkpointer, states) is None
        for step in range(1, 13):
            states, _ = runner.step(states, next(tasks), lambda step: batches[step])
            if step == 6:
                saved = jax.tree.map(np.array, jax.device_get(states))
                checkpoint.save(checkpointer, step, states, top1=0.5, record={"seconds": 1.5})
    fresh, _ = _setup(small_network, small_head, (0, 2), 3)
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        step, restored, record = checkpoint.restore_latest(checkpointer, fresh)
    assert step == 6 and record == {"seconds": 1.5}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (restored, fresh)]
    assert shardings[0] == shardings[1]


def test_the_latest_and_the_best_are_kept(small_network, small_head, tmp_path):
    states, _ = _setup(small_network, small_head, (), 1)
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        for step, top1 in ((1, 0.2), (2, 0.7), (3, None), (4, 0.6), (5, None)):
            checkpoint.save(checkpointer, step, states, top1=top1, record={})
        checkpointer.wait()
        assert checkpoint.best_step(checkpointer) == 2
    kept = sorted(int(path.name) for path in (tmp_path / "c").iterdir() if path.name.isdigit())
    assert kept == [2, 5]


def test_a_checkpoint_of_other_cuts_is_refused_by_a_leafs_name(small_network, small_head, tmp_path):
    states, _ = _setup(small_network, small_head, (0, 2), 1)
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        checkpoint.save(checkpointer, 1, states, top1=None, record={})
    other, _ = _setup(small_network, small_head, (1,), 1)
    cast = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, states
    )
    with checkpoint.open_checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(UserError, match=r"0/params/head/Dense_0/kernel is float32\[3, 4\] in"):
            checkpoint.restore_latest(checkpointer, other)
        with pytest.raises(UserError, match="3/step: the checkpoint lacks it"):
            checkpoint.restore_latest(checkpointer, TrainState((*states.blocks, states.blocks[0])))
        with pytest.raises(UserError, match="2/.*: this run has no such leaf"):
            checkpoint.restore_latest(checkpointer, TrainState(states.blocks[:2]))
        with pytest.raises(UserError, match=r"float32\[4\] in the checkpoint, bfloat16\[4\] in"):
            checkpoint.restore_latest(checkpointer, cast)


def test_a_full_disk_is_told_before_training(small_network, small_head, tmp_path, monkeypatch):
    states, _ = _setup(small_network, small_head, (), 1)
    checkpoint.check_disk_space(tmp_path, states, num_checkpoints=3)
    usage = collections.namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="has 0 MiB free, but checkpoints need .*; free some"):
        checkpoint.check_disk_space(tmp_path, states, num_checkpoints=3)
