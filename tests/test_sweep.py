"""The sweep: what is most worth running, what is left of it, and that it keeps to its time."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dgl_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(_ROOT / "experiments"))
import evidence
import run_folders
import worth


def _finished(configuration, seed):
    config = evidence.load(configuration)
    settings = run_folders.learned(config)
    config = type("Config", (), {"seed": seed})  # All of it that ranking reads.
    return run_folders.Run("", pathlib.Path(), config, settings, {}, 0, [])


def _ranked(wanted, runs=(), data_dir=""):
    candidates, left_out = worth.rank(wanted, runs, data_dir)
    return [(one.configuration, one.seed) for one in candidates], candidates, left_out


def test_worth_is_help_over_cost_and_halves_with_the_second_seed():
    cheap, dear = "table1.py:mlp,short", "table1.py:cnn,short"
    order, candidates, left_out = _ranked({cheap: (1.0, 3), dear: (1.0, 1)})
    assert not left_out and order[:3] == [(cheap, 0), (cheap, 1), (cheap, 2)]
    of_cheap = [one.worth for one in candidates if one.configuration == cheap]
    np.testing.assert_allclose(np.divide(of_cheap[0], of_cheap), [1, 2, 3])
    # What helps more figures comes first, for the same cost.
    ratio = candidates[-1].flops / candidates[0].flops
    assert ratio > 1
    assert _ranked({cheap: (1.0, 1), dear: (1.1 * ratio, 1)})[0] == [(dear, 0), (cheap, 0)]
    assert _ranked({cheap: (1.0, 1), dear: (0.9 * ratio, 1)})[0] == [(cheap, 0), (dear, 0)]


def test_the_cost_is_of_all_images_forward_and_backward():
    config = evidence.load("table1.py:mlp,short")
    flops = worth.training_flops(config, {})
    # Three epochs of 10,000 images; the layers alone, of 28 pixels at an eighth of the width.
    widths, sides = (1, 16, 32, 32, 64, 64, 64), (28, 14, 14, 7, 7, 7)
    layers = sum(
        2 * 9 * fan_in * fan_out * side**2
        for fan_in, fan_out, side in zip(widths, widths[1:], sides)
    )
    assert 0.7 < flops / (3 * layers * 3 * 10_000) < 2.0


def test_what_is_finished_is_not_run_again():
    name, other = "figure5.py:S=1.0,block=0,short", "figure5.py:S=1.0,block=3,short"
    runs = [_finished(name, 0), _finished(name, 2)]
    order, candidates, _ = _ranked({name: (1.0, 3)}, runs)
    assert order == [(name, 1)] and candidates[0].helps == pytest.approx(1 / 3)
    # Where no block is slowed down, it does not matter which.
    assert _ranked({other: (1.0, 3)}, runs)[0] == [(other, 1)]
    assert _ranked({"figure5.py:S=1.1,block=0,short": (1.0, 1)}, runs)[0] != []


def test_data_that_is_not_there_leaves_a_configuration_out(tmp_path):
    image, label = np.zeros((4, 32, 32, 3), np.uint8), np.arange(4)
    path = str(tmp_path / "cifar10.npz")
    np.savez(path, x_train=image, y_train=label, x_test=image, y_test=label)
    wanted = {"table1.py:mlp": (1.0, 1), "sedona_tiny_imagenet.py:dgl,vgg19": (1.0, 1)}
    order, candidates, left_out = _ranked(wanted, data_dir=path)
    assert order == [("table1.py:mlp", 0)]
    assert "named after another set" in left_out["sedona_tiny_imagenet.py:dgl,vgg19"]
    assert candidates[0].fields == {
        "data.name": "arrays",
        "data.data_dir": path,
        "data.mean": (0.4914, 0.4822, 0.4465),
        "data.std": evidence.load("table1.py:mlp").data.std,
    }
    order, _, left_out = _ranked(wanted, data_dir=str(tmp_path))
    assert not order and "name=cifar10 must be prepared" in left_out["table1.py:mlp"]


def test_what_the_papers_still_lack():
    figure5 = worth.of_the_papers((), "short", ["Figure 5"], None)
    assert len(figure5) == 1 + 1 + 10 * 6 and {seeds for _, seeds in figure5.values()} == {3}
    # A figure, its share of six, and so for each claim that it decides.
    assert figure5["figure5.py:S=1.3,block=2,short"][0] == pytest.approx(1 / 6)
    assert figure5["figure5.py:S=1.2,block=2,short"][0] == pytest.approx(2 / 6)
    assert figure5["figure5.py:dgl,short"][0] == 1 + 4
    full = worth.of_the_papers((), "full", ["Table 2"], 1)
    assert full["table2.py:dgl"] == (1 + 2, 1) and full["table2.py:ddg"] == (1 + 1, 1)
    # What is counted of a network comes with its other figures.
    counted = worth.of_the_papers((), "full", ["Table 4"], None)
    assert set(counted.values()) == {(0.0, 1)} and len(counted) == 3
    with pytest.raises(UserError, match="'Table 9' is unknown; choose from Proposition 3.1, "):
        worth.of_the_papers((), "full", ["Table 9"], None)
    with pytest.raises(UserError, match="setting=tiny: no row has it; choose from full, epochs=8"):
        worth.of_the_papers((), "tiny", [], None)


_CONFIG = """
import runpy

def get_config(variant=""):
    config = runpy.run_path({quickstart!r})["get_config"]()
    config.network.width_factor = 0.0625
    config.data.name, config.data.data_dir, config.data.crop_padding = "arrays", {data!r}, 1
    config.train.batch_size = 24
    config.train.num_epochs = 20000.0 if variant == "endless" else 2.0
    config.eval.batch_size = 16
    config.eval.time_blocks = False
    config.checkpoint.every_steps = 3
    config.optimizer.learning_rate = 1e38 if variant == "bad" else 0.1
    return config
"""


def _sweep(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "experiments/sweep.py", f"--runs={tmp_path / 'runs'}", *arguments],
        check=False, capture_output=True, text=True, timeout=900, cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


def test_a_list_of_runs_that_only_count_flops():
    """They are worth nothing next to others."""
    code = """
import sweep, worth
print(sweep._table([worth.Candidate("table3.py:vgg13_K=4", 0, 0.0, 1e18, {})]))"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           cwd=_ROOT / "experiments",
                           env=os.environ | {"PYTHONPATH": str(_ROOT)})  # fmt: skip
    cells = [cell.strip() for cell in found.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells == ["1", "table3.py:vgg13_K=4", "0", "0.00", "1e+03", "0"]


@pytest.mark.slow
def test_runs_from_the_command_line(tmp_path, arrays_path):
    quickstart = str(_ROOT / "experiments" / "configs" / "quickstart.py")
    mine = tmp_path / "mine.py"
    mine.write_text(_CONFIG.format(quickstart=quickstart, data=arrays_path))

    good = (f"--configuration={mine}", "--seeds=2")
    result = _sweep(tmp_path, *good, "--dry_run")
    assert result.returncode == 0 and result.stdout.count(f"{mine} ") == 2
    assert not list((tmp_path / "runs").iterdir())

    bad = f"--configuration={mine}:bad"
    result = _sweep(tmp_path, *good, bad, "--at_once=2")
    assert result.returncode == 1
    assert "error: mine_bad/seed_0: " in result.stderr
    runs, others = run_folders.read_runs(tmp_path / "runs")
    assert [run.folder for run in runs] == ["mine/seed_0", "mine/seed_1"]
    assert others == {"mine_bad/seed_0": "not finished", "mine_bad/seed_1": "not finished"}

    result = _sweep(tmp_path, *good)
    assert result.returncode == 0 and "nothing is left to run" in result.stdout

    # The time is over: the run is stopped, and the same command goes on with it.
    endless = (f"--configuration={mine}:endless", "--seeds=1")
    checkpoints = tmp_path / "runs" / "mine_endless" / "seed_0" / "checkpoints"
    last = 0
    for _ in range(2):
        for minutes in (0.6, 2, 8):  # A busy machine needs longer until its first checkpoint.
            result = _sweep(tmp_path, *endless, f"--minutes={minutes}")
            assert result.returncode == 0 and "the time is over: 1 runs are left" in result.stdout
            steps = [int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit()]
            if max(steps, default=0) > last:
                break
        assert max(steps) > last
        last = max(steps)

    result = _sweep(tmp_path, "--items=Table 9")
    assert result.returncode == 2 and result.stderr.startswith("error: --items: 'Table 9' is unkn")
