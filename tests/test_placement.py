"""Devices dealt to blocks, on the topologies of TPUs too, where their compiler is installed."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

from dgl_jax import cost, plots, precision
from dgl_jax.block import Block, block_key, init_block_state, make_block_step
from dgl_jax.config import LossConfig, PlacementConfig, default_config, from_dict
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.placement import check_meshes, make_placements
from dgl_jax.train import train_and_evaluate


def _tpu(name, monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU's compiler is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    # As jax.devices() has them.
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _compile_step(where, small_layer, small_head):
    """The update of a block on its devices, by the compiler that they have."""
    block = Block(0, 0, (small_layer,), small_head, make_loss_fn(LossConfig()))
    optimizer, key = optax.sgd(0.1), jax.random.key(0)
    init = lambda key, x: init_block_state(block, optimizer, key, x)
    x = jax.ShapeDtypeStruct((12, 6, 6, 2), jnp.float32, sharding=where.batch)
    labels = jax.ShapeDtypeStruct((12,), jnp.int32, sharding=where.batch)
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where.state)
    state, key = jax.tree.map(put, (jax.eval_shape(init, key, x), block_key(key, block)))
    step = jax.jit(make_block_step(block, optimizer), donate_argnums=0)
    return step.lower(state, x, labels, key).compile()


@pytest.mark.parametrize(
    "topology, num_devices, devices_per_block",
    [
        ("v5e:2x2", 4, (1, 2, 1)),  # Devices 1 and 2 are no box.
        ("v5e:2x2", 4, (3, 1)),
        ("v5p:2x2x1", 4, (1, 2, 1)),
        ("v6e:2x4", 8, (1, 2, 3, 2)),
        ("v5e:4x4", 16, (6, 1, 3, 6)),  # Over the edges of four processes.
    ],
)
def test_uneven_groups_of_a_tpu(topology, num_devices, devices_per_block, monkeypatch, small_head):
    devices = _tpu(topology, monkeypatch)
    assert len(devices) == num_devices
    config = PlacementConfig(kind="pipelined", devices_per_block=devices_per_block)
    placements = make_placements(config, len(devices_per_block), devices=devices)
    assert [len(where.devices) for where in placements] == list(devices_per_block)
    assert [device for where in placements for device in where.devices] == devices
    check_meshes(placements)


def test_a_block_compiles_on_devices_that_are_no_box(monkeypatch, small_network):
    devices = _tpu("v5e:2x2", monkeypatch)
    config = PlacementConfig(kind="pipelined", devices_per_block=(1, 2, 1))
    where = make_placements(config, 3, devices=devices)[1]
    program = _compile_step(where, small_network.layers[0], small_network.head)
    assert "all-reduce" in program.as_text()


def test_devices_that_cannot_work_together_are_refused(monkeypatch):
    """What the compiler refuses comes as one line, whatever the reason."""
    config = PlacementConfig(kind="pipelined", devices_per_block=(1, 2))
    placements = make_placements(config, 2)
    check_meshes(placements)

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: no path\nbetween the two")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError) as caught:
        check_meshes(placements)
    assert "devices of block 1" in str(caught.value) and "\n" not in str(caught.value)
    assert "INTERNAL: no path between the two" in str(caught.value)


def _config(arrays_path, **fields):
    config = default_config()
    config.network.name, config.network.width_factor = "cnn4", 1 / 32
    config.partition.strategy, config.partition.num_blocks = "uniform", 2
    config.auxiliary.name = "pred"
    config.data.name, config.data.data_dir, config.data.crop_padding = "arrays", arrays_path, 1
    config.train.batch_size, config.train.num_epochs = 48, 1.0
    config.eval.batch_size = 50
    config.update_from_flattened_dict(fields)
    return from_dict(config.to_dict())


def test_nothing_after_training_loses_a_finished_run(arrays_path, tmp_path, monkeypatch, capsys):
    def out_of_memory(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")

    monkeypatch.setattr(cost, "block_step_seconds", out_of_memory)
    monkeypatch.setattr(plots, "plot_run", out_of_memory)
    config = _config(arrays_path, **{"eval.time_blocks": True})
    summary = train_and_evaluate(config, str(tmp_path))
    assert summary["finished"] and summary["block_step_seconds"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning:")]
    assert len(warnings) == 2 and all("RESOURCE_EXHAUSTED: out of memory" in w for w in warnings)
    # The same command draws what is missing.
    monkeypatch.undo()
    assert train_and_evaluate(config, str(tmp_path)) == summary
    assert (tmp_path / "learning_curves.png").exists()


def test_the_precision_asked_for_is_that_of_the_programs_and_recorded(arrays_path, tmp_path):
    def precisions(name):
        with precision.matmul_precision(name) as in_force:
            text = jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2))).as_text()
        return in_force, "HIGHEST" in text

    assert precisions("highest") == ("highest", True)
    assert precisions("default") == ("default", False)
    assert jax.config.jax_default_matmul_precision is None
    config = _config(arrays_path, precision="highest")
    summary = train_and_evaluate(config, str(tmp_path))
    assert summary["made_by"]["precision"] == "highest"
    assert len(summary["made_by"]["commit"] or "+") and summary["made_by"]["num_threads"] >= 1
    assert jax.config.jax_default_matmul_precision is None
