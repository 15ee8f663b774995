"""The search as a run: its files, its snapshots, and that a killed one goes on bitwise."""

import collections
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dgl_jax import checkpoint
from dgl_jax import search as search_module
from dgl_jax.config import Config, SearchConfig, SearchSettings, from_dict, to_dict
from dgl_jax.errors import UserError
from dgl_jax.metrics import read_metrics
from dgl_jax.run_folder import previous_run
from dgl_jax.search import RESULT_FILE, search
from dgl_jax.sedona.outer import snapshot_steps
from dgl_jax.sedona.result import load_result
from dgl_jax.train import train_and_evaluate


def _config(arrays_path, **settings):
    config = to_dict(SearchConfig())
    config["network"] |= {"name": "cnn4", "width_factor": 1 / 32}
    config["data"] |= {
        "name": "arrays",
        "data_dir": arrays_path,
        "crop_padding": 1,
        "validation_fraction": 0.4,
    }
    config["optimizer"] |= {"schedule": "cosine"}
    config["search"] |= {
        "candidates": ("pred", "mlp"),
        "num_pretraining_steps": 6,
        "num_outer_steps": 4,
        "num_inner_steps": 2,
        "batch_size": 8,
        "validation_batch_size": 16,
        "num_snapshots": 3,
        "num_blocks": (2, 3),
        "backprop_steps": 100,
        "log_every_steps": 2,
    } | settings
    config["checkpoint"]["every_steps"] = 2
    return from_dict(config, SearchConfig)


class _Killed(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """The searches of this file share their programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(arrays_path, tmp_path_factory):
    folder, to_save = str(tmp_path_factory.mktemp("search")), search_module._to_save

    def spy(outer_state, weights, snapshots):
        counters[:] = [int(snapshot.step) for snapshot in snapshots]
        return to_save(outer_state, weights, snapshots)

    counters = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(search_module, "_to_save", spy)
        return folder, search(_config(arrays_path), folder), counters


def test_what_a_search_leaves(finished):
    folder, summary, _ = finished
    result = load_result(os.path.join(folder, RESULT_FILE), "cnn4", 4)
    assert result.candidates == ("pred", "mlp")
    assert set(summary["groupings"]) == {"2", "3"}
    for num_blocks, found in summary["groupings"].items():
        assert len(found["cuts"]) == len(found["heads"]) == int(num_blocks) - 1
    pictures = {"alpha.png", "beta.png", "validation_loss.png", "groupings.png"}
    assert pictures <= set(os.listdir(folder))
    lines = read_metrics(os.path.join(folder, "metrics.jsonl"))
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert {"pretrain/loss", "pretrain/layer_0/loss", "pretrain/layer_3/loss"} <= set(lines[2])
    last = lines[-1]
    # The file's variables are those whose probabilities are in the last line.
    alpha, beta = np.array(result.alpha), np.array(result.beta)
    local = np.exp(alpha[:, 0]) / np.exp(alpha).sum(1)
    heads = np.exp(beta) / np.exp(beta).sum(1, keepdims=True)
    for place in range(3):
        np.testing.assert_allclose(last[f"search/layer_{place}/local"], local[place], rtol=1e-5)
        np.testing.assert_allclose(last[f"search/layer_{place}/head_1"], heads[place, 1], rtol=1e-5)
    assert np.all(alpha != 0) and np.all(beta != 0)  # Every decision variable has moved.
    assert summary["cost_in_backprop_trainings"] > 0


def test_a_finished_search_is_not_touched(finished, arrays_path, monkeypatch):
    folder, summary, _ = finished
    monkeypatch.setattr(search_module, "load_dataset", None)
    assert search(_config(arrays_path), folder) == json.loads(json.dumps(summary))


# In the middle of pretraining, right after it, and in the middle of the outer steps.
@pytest.mark.parametrize("killed_after", [4, 6, 8])
def test_a_killed_search_goes_on_bitwise(
    finished, arrays_path, tmp_path, monkeypatch, caplog, killed_after
):
    save = checkpoint.save

    def save_and_kill(checkpointer, step, *args, **kwargs):
        save(checkpointer, step, *args, **kwargs)
        if step == killed_after:
            checkpointer.wait()
            raise _Killed

    monkeypatch.setattr(checkpoint, "save", save_and_kill)
    with pytest.raises(_Killed), jax.log_compiles(), caplog.at_level(logging.WARNING):
        search(_config(arrays_path), str(tmp_path))
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    # Several steps of each phase are one program.
    assert sum("jit(step)" in line for line in compiled) == (2 if killed_after == 8 else 1)
    assert not json.loads((tmp_path / "summary.json").read_text())["finished"]
    monkeypatch.setattr(checkpoint, "save", save)
    # Where snapshots lie changes no number, and may change on the way.
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        gone_on = search(_config(arrays_path, snapshot_memory="host"), str(tmp_path))
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    # Of pretraining where it is left, of the search, and of backprop, which is timed.
    assert sum("jit(step)" in line for line in compiled) == (3 if killed_after == 4 else 2)
    folder, uninterrupted, _ = finished
    assert gone_on["variables_sha256"] == uninterrupted["variables_sha256"]
    assert gone_on["snapshot_memory"] == "pinned_host"
    lines, expected = (
        read_metrics(os.path.join(where, "metrics.jsonl")) for where in (tmp_path, folder)
    )
    assert lines == expected
    if killed_after == 8:  # Asked for another K, a finished search searches nothing again.
        with monkeypatch.context() as full_disk:  # And saves nothing.
            usage = collections.namedtuple("usage", "total used free")(10, 10, 0)
            full_disk.setattr(shutil, "disk_usage", lambda path: usage)
            again = search(_config(arrays_path, num_blocks=(4,)), str(tmp_path))
        assert set(again["groupings"]) == set(again["balanced_groupings"]) == {"4"}
        assert again["variables_sha256"] == uninterrupted["variables_sha256"]
        assert again["outer_seconds"] == gone_on["outer_seconds"]
        # Of all three processes.
        assert again["wall_seconds"] > again["pretraining_seconds"] + again["outer_seconds"]


def test_a_search_and_a_run_of_training_do_not_share_a_folder(finished, tmp_path):
    folder, _, _ = finished
    with pytest.raises(UserError, match="holds a search; choose another --workdir"):
        previous_run(Config(), folder)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    with pytest.raises(UserError, match="holds a run of training; choose another --workdir"):
        previous_run(SearchConfig(), str(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for run, config in ((search, SearchConfig()), (train_and_evaluate, Config())):
        with pytest.raises(UserError, match="cannot be written; choose another --workdir"):
            run(config, str(tmp_path))


def test_each_outer_step_draws_a_snapshot_and_stores_it_a_step_further_on(finished):
    _, _, counters = finished
    draws = [search_module._draw(0, outer_step, 3) for outer_step in range(4)]
    assert len(set(draws)) > 1
    assert counters == [2 + draws.count(0), 4 + draws.count(1), 6 + draws.count(2)]


def test_when_snapshots_are_kept():
    settings = SearchSettings(num_pretraining_steps=10, num_snapshots=3, snapshot_interval=2)
    assert snapshot_steps(settings) == [3, 6, 10]
    published = SearchSettings(snapshots="official")
    # The released code's memory: 36,080 to 40,000, where the learning rate is nearly at its end.
    assert snapshot_steps(published) == list(range(36_080, 40_001, 80))
    assert snapshot_steps(SearchSettings())[:2] == [800, 1600]
    assert snapshot_steps(SearchSettings())[-1] == 40_000


def test_the_decision_variables_learn_on_other_images_than_the_weights(
    arrays_path, tmp_path, monkeypatch
):
    load, sides = search_module.load_dataset, []

    def load_two_and_stop(**options):
        sides.append(load(**options))
        if len(sides) == 2:
            raise _Killed
        return sides[-1]

    monkeypatch.setattr(search_module, "load_dataset", load_two_and_stop)
    with pytest.raises(_Killed):
        search(_config(arrays_path), str(tmp_path))
    assert [side.num_train for side in sides] == [144, 96]
    images = [
        {
            image.tobytes()
            for batch, _, mask in side.eval_batches("train")
            for image in np.asarray(batch)[np.asarray(mask) > 0]
        }
        for side in sides
    ]
    assert len(images[0]) == 144 and len(images[1]) == 96 and not images[0] & images[1]
    # And held-out batches come from their own side, as they are.
    batch = np.asarray(sides[1].batch_at(0).images)
    assert {image.tobytes() for image in batch} <= images[1]


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("search", "candidates", (), "config.search.candidates=.*a head or more"),
        ("search", "candidates", ("mlp", "mlp"), "must differ"),
        ("search", "num_snapshots", 100, "config.search.num_snapshots=100 do not fit"),
        ("search", "hypergradient", "darts", "must be one of unrolled, first_order"),
        ("search", "num_inner_steps", 0, "config.search.num_inner_steps=0 must be at least 1"),
        ("data", "validation_fraction", 0.0, "config.data.validation_fraction=0.0 must be above 0"),
        ("network", "dtype", "bfloat16", "set config.network.dtype=float32"),
        ("loss", "name", "predsim", "its losses are cross-entropies"),
        ("auxiliary", "name", "mlp", "a search's heads are config.search.candidates"),
        ("search", "num_inner_step", 1, "did you mean config.search.num_inner_steps"),
    ],
)
def test_mistakes_that_are_found_at_once(arrays_path, section, field, value, message):
    mapping = to_dict(_config(arrays_path))
    mapping[section][field] = value
    with pytest.raises(UserError, match=message):
        from_dict(mapping, SearchConfig)


def test_mistakes_that_need_the_network(arrays_path, tmp_path):
    with pytest.raises(UserError, match="config.search.num_blocks=5 must be between 1 and"):
        search(_config(arrays_path, num_blocks=(5,)), str(tmp_path))
    with pytest.raises(UserError, match="batch_size=97 must not exceed the 96 held-out examples"):
        search(_config(arrays_path, validation_batch_size=97), str(tmp_path))
    with pytest.raises(UserError, match="config.search.candidates=nothing is unknown"):
        search(_config(arrays_path, candidates=("nothing",)), str(tmp_path))
    assert os.listdir(tmp_path) == []
