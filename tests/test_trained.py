"""What a run has learned, loaded from its folder."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from dgl_jax import checkpoint
from dgl_jax.config import Config, DataConfig, EvalConfig, NetworkConfig, TrainConfig
from dgl_jax.errors import UserError
from dgl_jax.train import train_and_evaluate
from dgl_jax.trained import load_trained


@pytest.fixture(scope="module")
def run(arrays_path, tmp_path_factory):
    """Its folder, its summary, and the states of each checkpoint by step."""
    folder, states, save = str(tmp_path_factory.mktemp("run")), {}, checkpoint.save
    config = Config(
        network=NetworkConfig(name="cnn4", width_factor=0.0625),
        data=DataConfig(name="arrays", data_dir=str(arrays_path), crop_padding=0),
        train=TrainConfig(batch_size=24, num_epochs=2.0),
        eval=EvalConfig(every_epochs=1.0, batch_size=16, time_blocks=False),
    )

    def keep(checkpointer, step, state, **kwargs):
        states[step] = jax.tree.map(np.array, jax.device_get(state.blocks))
        # The first one is the best, so that the best is not the latest.
        save(checkpointer, step, state, **kwargs | {"top1": 1 / step})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", keep)
        summary = train_and_evaluate(config, folder)
    return folder, summary, states


@pytest.mark.slow
def test_the_latest_and_the_best(run):
    folder, summary, states = run
    for best in (False, True):
        trained = load_trained(folder, best=best)
        assert trained.step == (summary["best_step"] if best else summary["steps"])
        found = jax.device_get(tuple(trained.states))
        jax.tree.map(np.testing.assert_array_equal, found, tuple(states[trained.step]))
    assert summary["best_step"] < summary["steps"]


@pytest.mark.slow
def test_what_a_living_run_is_writing_is_left_alone(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    half = folder / "checkpoints" / "99.orbax-checkpoint-tmp"
    half.mkdir()
    assert load_trained(str(folder)).step == run[1]["steps"]
    assert half.exists()


@pytest.mark.slow
def test_what_is_not_there(run, tmp_path):
    with pytest.raises(UserError, match="has no config.json; give a run's folder"):
        load_trained(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_trained(str(tmp_path))
    fields = json.loads(pathlib.Path(run[0], "config.json").read_text())
    path.write_text(json.dumps(fields))
    for best, kind in ((False, "checkpoint"), (True, "checkpoint with an evaluation")):
        with pytest.raises(UserError, match=f"has no {kind} yet; wait"):
            load_trained(str(tmp_path), best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    del fields["resolved"]["num_classes"]
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="has no num_classes, as a search's or an older version's"):
        load_trained(str(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    fields = json.loads(path.read_text())
    fields["network"]["width_factor"] = 0.125
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="is of another configuration: .* in the checkpoint"):
        load_trained(str(tmp_path / "run"))
