"""Whole runs: through the command line, killed and resumed, and stopped by mistakes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from dgl_jax import checkpoint
from dgl_jax.metrics import read_metrics

_ROOT = pathlib.Path(__file__).parents[1]
_QUICKSTART = _ROOT / "experiments" / "configs" / "quickstart.py"


def _command(workdir, arrays_path, **fields):
    fields = {
        "data.name": "arrays",
        "data.data_dir": arrays_path,
        "data.crop_padding": 1,
        "data.flip": False,
        "network.width_factor": 0.0625,
        "train.batch_size": 24,
        "train.num_epochs": 8.0,
        "train.log_every_steps": 5,
        "eval.batch_size": 16,
    } | {name.replace("__", "."): value for name, value in fields.items()}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    script = _ROOT / "experiments" / "train.py"
    return [sys.executable, script, f"--config={_QUICKSTART}", f"--workdir={workdir}", *arguments]


def _run(command, **kwargs):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=900, env=environment, **kwargs
    )


@pytest.fixture(scope="module")
def finished_run(arrays_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    result = _run(_command(workdir, arrays_path))
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_run_learns_and_leaves_all_its_files(finished_run):
    workdir, result = finished_run
    assert "Test top-1 accuracy by block" in result.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 80 and summary["epochs"] == 8.0
    assert summary["num_blocks"] == len(summary["test_top1"]) == len(summary["test_loss"]) == 4
    assert min(summary["test_top1"]) > 0.6  # Chance is 0.25.
    for name in ("method", "dataset", "network", "cuts", "placement", "ensemble_top1",
                 "train_examples_per_second", "wall_seconds", "compile_seconds", "seed",
                 "peak_memory_bytes", "aux_flops_ratio", "parameters", "jax_version",
                 "device_kind", "params_sha256"):  # fmt: skip
        assert summary[name] is not None
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["batch_size"] == 24 and config["resolved"]["cuts"] == [0, 1, 2]
    lines = read_metrics(workdir / "metrics.jsonl")
    training = [line for line in lines if "train/block_3/loss" in line]
    assert [line["step"] for line in training] == list(range(5, 81, 5))
    assert training[-1]["train/block_3/loss"] < training[0]["train/block_3/loss"]
    tests = [line for line in lines if "test/block_3/top1" in line]
    assert [line["step"] for line in tests] == list(range(10, 81, 10))
    assert tests[-1]["test/block_0/top1"] == summary["test_top1"][0]
    for name in ("learning_curves.png", "accuracy_by_depth.png"):
        assert (workdir / name).read_bytes()[:4] == b"\x89PNG"
    assert list((workdir / "tensorboard").iterdir())
    with checkpoint.open_checkpointer(workdir / "checkpoints") as checkpointer:
        steps = {saved.step for saved in checkpointer.checkpoints}
        assert steps == {80, summary["best_step"]} == {80, checkpoint.best_step(checkpointer)}


@pytest.mark.slow
def test_a_run_killed_at_any_instant_ends_with_the_same_parameters(
    finished_run, arrays_path, tmp_path
):
    """kill -9 three times, at whatever the process is doing then."""
    workdir, _ = finished_run
    expected = json.loads((workdir / "summary.json").read_text())
    command = _command(tmp_path / "run", arrays_path, checkpoint__every_steps=7)
    kills = 0
    for wanted_step in (10, 30, 50):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
            if lines and lines[-1]["step"] >= wanted_step:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.wait()
    assert kills
    result = _run(command)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params_sha256"] == expected["params_sha256"]
    assert summary["test_top1"] == expected["test_top1"]
    numbers = []
    for path in (workdir, tmp_path / "run"):
        lines = read_metrics(path / "metrics.jsonl")
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        numbers.append([line for line in lines if "test/block_0/loss" in line])
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_many_steps_a_call_from_the_command_line(finished_run, arrays_path, tmp_path):
    """Calls of five steps, once in one go, once killed, with other pauses: the same parameters."""
    many = {"train__steps_per_call": 5, "network__scan_layers": True, "train__remat_blocks": "(1,)"}
    result = _run(_command(tmp_path / "whole", arrays_path, **many))
    assert result.returncode == 0, result.stderr
    many |= {"checkpoint__every_steps": 7, "eval__every_epochs": 0.7}
    command = _command(tmp_path / "killed", arrays_path, **many)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        lines = read_metrics(tmp_path / "killed" / "metrics.jsonl")
        if lines and lines[-1]["step"] >= 20:
            process.kill()
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    result = _run(command)
    assert result.returncode == 0, result.stderr
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")
    ]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    # Evaluations wait for the end of a call.
    lines = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    tested = [line["step"] for line in lines if "test/block_0/loss" in line]
    assert tested[:4] == [10, 15, 25, 30] and all(step % 5 == 0 for step in tested)
    # As step by step, but for rounding.
    lines = [read_metrics(path / "metrics.jsonl") for path in (finished_run[0], tmp_path / "whole")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for block in range(4):
        name = f"train/block_{block}/loss"
        np.testing.assert_allclose(lines[0][0][name], lines[1][0][name], rtol=1e-4)


def test_pipelined_from_the_command_line(finished_run, arrays_path, tmp_path):
    workdir, _ = finished_run
    result = _run(
        _command(
            tmp_path / "run",
            arrays_path,
            placement__kind="pipelined",
            placement__num_devices=4,
        )
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_devices"] == 4
    losses = [
        [read_metrics(path / "metrics.jsonl")[0][f"train/block_{block}/loss"] for block in range(4)]
        for path in (workdir, tmp_path / "run")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def _fails(command, message, code=2):
    result = _run(command)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0], result.stderr
    return result


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(arrays_path, tmp_path):
    command = _command(
        tmp_path / "run",
        arrays_path,
        optimizer__learning_rate=1e18,
        optimizer__schedule="step",
        optimizer__drop_epochs="(100.0,)",
        checkpoint__every_steps=1,
    )
    _fails(command, "is not finite; the last good checkpoint is kept; try a lower")
    with checkpoint.open_checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        for saved in checkpointer.checkpoints:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Loading to wherever it was saved from.
                states = checkpointer.load(saved.step)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states["states"]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optimizer__learningrate": 0.1}, "config.optimizer.learningrate is not a known field"),
        ({"train__batch_size": "many"}, "batch_size"),
        ({"partition__strategy": "explicit", "partition__cuts": "(9,)"}, "outside the network"),
        ({"partition__strategy": "uniform", "partition__num_blocks": 9}, "num_blocks=9"),
        ({"data__data_dir": "nowhere.npz"}, "data_dir=nowhere.npz"),
        ({"network__name": "cnn5"}, "cnn5"),
        ({"train__num_epochs": 0.001}, "is less than one step"),
        (
            {"train__steps_per_call": 20, "train__log_every_steps": 20},
            "steps_per_call=20 must not exceed the 10 steps of an epoch",
        ),
        ({"train__remat_blocks": "(0, 7)"}, "remat_blocks=(0, 7): 7 must be one of the 4 block(s)"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arrays_path, tmp_path, fields, message):
    _fails(_command(tmp_path / "run", arrays_path, **fields), message)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_update_that_overflows_is_no_success(arrays_path, tmp_path):
    """The loss of the only step is finite; what it leads to is not."""
    _fails(
        _command(
            tmp_path / "run",
            arrays_path,
            optimizer__learning_rate=1e38,
            train__num_epochs=0.0,
            train__num_steps=1,
        ),
        "is not finite; the last good checkpoint is kept",
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"] is False


def test_a_finished_run_is_not_touched_again(finished_run, arrays_path):
    workdir, first = finished_run
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    result = _run(_command(workdir, arrays_path, placement__max_steps_in_flight=2))
    assert result.returncode == 0 and result.stdout == first.stdout
    assert {path: path.read_bytes() for path in workdir.glob("*.json*")} == before


def test_killed_after_its_last_checkpoint(finished_run, arrays_path, tmp_path):
    """What is left to do is done, and no line of metrics.jsonl is written twice."""
    workdir, _ = finished_run
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    (again / "summary.json").write_text('{"finished": false}')
    result = _run(_command(again, arrays_path))
    assert result.returncode == 0, result.stderr
    whole, gone_on = (json.loads((w / "summary.json").read_text()) for w in (workdir, again))
    assert gone_on["finished"] and gone_on["params_sha256"] == whole["params_sha256"]
    assert gone_on["test_top1"] == whole["test_top1"]
    assert (again / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_a_folder_that_cannot_be_used(arrays_path, tmp_path):
    (tmp_path / "file").write_text("")
    _fails(_command(tmp_path / "file", arrays_path), "cannot be made")
    (tmp_path / "config.json").write_text("{")
    _fails(_command(tmp_path, arrays_path), "config.json cannot be read")


def test_another_configuration_in_the_same_folder_is_refused(finished_run, arrays_path):
    workdir, _ = finished_run
    before = (workdir / "summary.json").read_text()
    _fails(_command(workdir, arrays_path, seed=3), "config.seed=3, but workdir=")
    assert (workdir / "summary.json").read_text() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=w"], "--config is missing"),
        ([f"--config={_QUICKSTART}"], "--workdir is missing"),
        (["--config=nowhere.py", "--workdir=w"], "--config=nowhere.py does not name a Python file"),
        ([f"--config={_QUICKSTART}", "--workdir=w", "--nope=1"], "nope"),
        (
            [f"--config={_QUICKSTART.with_name('figure34.py')}:nope", "--workdir=w"],
            "error: variant=nope: 'nope' is unknown; choose from dgl, sequential, backprop",
        ),
        ([f"--config={_QUICKSTART}", "--workdir=w", "--noconfig.data.flop"], "did you mean"),
        ([f"--config={_QUICKSTART}", "--workdir=w", "extra"], "'extra' is not a flag"),
    ],
)
def test_wrong_flags(arguments, message):
    _fails([sys.executable, _ROOT / "experiments" / "train.py", *arguments], message)
