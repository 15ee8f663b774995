"""What every training method must do: learn real images, go on where it stopped, tell its costs."""

import dataclasses
import json

import pytest
from accelerator_arrays import accelerator_arrays

from dgl_jax import checkpoint
from dgl_jax.config import (
    LOCAL_METHODS,
    NOT_TRACED,
    ONE_BLOCK_METHODS,
    AuxiliaryConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MethodConfig,
    NetworkConfig,
    OptimizerConfig,
    PartitionConfig,
    PlacementConfig,
    ReplayConfig,
    TrainConfig,
    default_config,
    from_dict,
)
from dgl_jax.data import load_dataset
from dgl_jax.methods import METHODS
from dgl_jax.metrics import read_metrics
from dgl_jax.train import train_and_evaluate
from dgl_jax.trained import load_trained

_SGD = OptimizerConfig(learning_rate=0.1, schedule="cosine")
_ADAM = OptimizerConfig(name="adam", learning_rate=2e-3, weight_decay=0.0, schedule="cosine")
_PLACEMENTS = {
    "async_dgl_parallel": PlacementConfig(kind="pipelined", num_devices=2),
    "data_parallel": PlacementConfig(num_devices=2),
    "pipeline_backprop": PlacementConfig(kind="pipelined", num_devices=2),
}


def _config(name: str) -> Config:
    return Config(
        method=MethodConfig(name=name),
        replay=ReplayConfig(buffer_size=4) if name.startswith("async") else ReplayConfig(),
        network=NetworkConfig(name="cnn4", width_factor=0.125),
        partition=PartitionConfig(strategy="uniform", num_blocks=2),
        auxiliary=AuxiliaryConfig(name="mlp"),
        optimizer=_ADAM if name in ("dni", "cdni") else _SGD,
        placement=_PLACEMENTS.get(name, PlacementConfig()),
        data=DataConfig(name="embedded", crop_padding=0),
        train=TrainConfig(
            batch_size=100, num_steps=60, num_epochs=0.0, log_every_steps=5, log_gradient_norm=True
        ),
        eval=EvalConfig(every_epochs=0.3, log_drift=True),
        trace=name not in NOT_TRACED,
        checkpoint=CheckpointConfig(every_steps=20),
    )


class _StoppedError(Exception):
    pass


def _accuracies(trained):
    data = load_dataset(
        **dataclasses.asdict(trained.config.data), batch_size=100, eval_batch_size=250, seed=0
    )
    counts = {}
    for images, labels, mask in data.eval_batches("test"):
        for block, logits in trained.logits(trained.states, images).items():
            is_right = (logits.argmax(-1) == labels) * mask  # 0 for padding.
            counts[block] = counts.get(block, 0) + int(is_right.sum())
    return [count / data.num_test for count in counts.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_images_and_goes_on_where_it_stopped(name, tmp_path, monkeypatch):
    config, save, saved_steps = _config(name), checkpoint.save, []

    def save_twice(checkpointer, step, *args, record, **kwargs):
        if len(saved_steps) < 2:  # As if it had taken long so far.
            record = record | {"wall_seconds": 1e6, "compile_seconds": 1e5}
        save(checkpointer, step, *args, record=record, **kwargs)
        saved_steps.append(step)
        if len(saved_steps) == 2:
            raise _StoppedError

    monkeypatch.setattr(checkpoint, "save", save_twice)
    with accelerator_arrays():
        with pytest.raises(_StoppedError):
            train_and_evaluate(config, str(tmp_path))
        summary = train_and_evaluate(config, str(tmp_path))
    assert saved_steps[2] > saved_steps[1]  # It did not begin again.

    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == name and summary["updates_per_block"] == 60
    assert (summary["auxiliary"] is None) == (name not in LOCAL_METHODS)
    assert summary["wall_seconds"] > 1e6 and summary["compile_seconds"] > 1e5  # Both parts'.
    num_blocks = summary["num_blocks"]
    assert num_blocks == (1 if name in ONE_BLOCK_METHODS else 2)
    assert summary["num_devices"] == (2 if name in _PLACEMENTS else 1)
    assert len(summary["test_top1"]) == len(summary["classifiers"])
    assert summary["classifiers"][-1] == num_blocks - 1
    assert min(summary["test_top1"]) > 0.45  # Chance is 0.1.
    trained = load_trained(str(tmp_path))
    assert trained.config.network == config.network and trained.step == summary["steps"]
    assert _accuracies(trained) == pytest.approx(summary["test_top1"])
    lists = ("block_parameters", "head_parameters", "block_flops")
    assert [len(summary[field]) for field in lists] == [num_blocks] * 3
    assert len(summary["bytes_between_blocks"]) == num_blocks - 1
    memory = name in ("async_dgl", "async_dgl_parallel", "ddg", "features_replay")
    assert (summary["method_memory_bytes"] > 0) == memory
    assert summary["train_examples_per_second"] > 0 and summary["peak_memory_bytes"] > 0

    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for block in range(num_blocks):
        key = f"train/block_{block}"
        norms = [line for line in lines if f"{key}/gradient_norm" in line]
        sums = [line[f"{key}/sum_learning_rate_gradient_norm_squared"] for line in norms]
        assert sums == sorted(sums) and sums[0] > 0
    last = [line[f"{key}/loss"] for line in lines if f"{key}/loss" in line]
    assert last[-1] < 0.7 * last[0]
    drift = json.loads((tmp_path / "drift.json").read_text())
    last = f"block_{num_blocks - 1}"  # In sequential training block 0 stands still by then.
    # Workers that run freely may have ended before the first evaluation began.
    assert drift[0][last] > 0 or name == "async_dgl_parallel"
    assert drift[-1][last] == 0
    for picture in ("learning_curves", "accuracy_by_depth", "theorem"):
        assert (tmp_path / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_method_of_the_configuration_is_there():
    for name in METHODS:
        config = default_config()
        config.method.name = name
        config.placement.kind = _PLACEMENTS.get(name, PlacementConfig()).kind
        assert from_dict(config.to_dict()).method.name == name
    config.method.name = "forward_forward"
    with pytest.raises(ValueError) as error:
        from_dict(config.to_dict())
    assert set(str(error.value).partition("one of ")[2].split(", ")) == set(METHODS)
