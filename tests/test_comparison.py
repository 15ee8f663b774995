"""Methods side by side: the numbers of a row, and the script that trains and writes the table."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dgl_jax.tables import comparison_row, comparison_table

_ROOT = pathlib.Path(__file__).parents[1]


def _summary(seed, top1, **fields):
    return {
        "seed": seed,
        "num_blocks": 2,
        "classifiers": [0, 1],
        "test_top1": [0.5, top1],
        "ensemble_top1": top1,
        "epochs": 3.0,
        "train_examples_per_second": 100.0 * (seed + 1),
        "wall_seconds": 10.0,
        "block_parameters": [100, 200],
        "head_parameters": [1000, 30],
        "aux_flops_ratio": [0.25, 0.0],
        "bytes_between_blocks": [2**20],
        "method_memory_bytes": 0,
        "peak_memory_bytes": 2**21 * (seed + 1),
        "block_step_seconds": [0.001, 0.003 + 0.002 * seed],
    } | fields


def test_a_row_is_the_mean_and_sample_deviation_over_seeds():
    row = comparison_row("m", [_summary(0, 0.80), _summary(1, 0.84)], {})
    assert row["top1"][0]["mean"] == 0.5 and row["top1"][0]["deviation"] == 0
    assert row["top1"][1]["mean"] == pytest.approx(0.82)
    assert row["top1"][1]["deviation"] == pytest.approx(np.std([0.80, 0.84], ddof=1))
    assert row["network_parameters"] == 100 + 200 + 30 and row["auxiliary_parameters"] == 1000
    assert row["largest_aux_flops_ratio"] == 0.25
    assert row["train_examples_per_second"] == 150 and row["peak_memory_bytes"] == 3 * 2**20
    assert row["block_step_seconds"] == pytest.approx([0.001, 0.004])
    assert row["method_memory_bytes"] == 0
    json.dumps(row)


def test_the_table_says_what_failed_and_what_does_not_apply():
    replay = {"method_memory_bytes": 3 * 2**20, "block_step_seconds": None}
    rows = [
        comparison_row("one", [_summary(0, 0.80), _summary(1, 0.84)], {2: "out of memory"}),
        comparison_row("two", [_summary(0, 0.9, **replay)], {}),
        comparison_row("three", [], {0: "diverged"}),
    ]
    *tables, failures = comparison_table(rows).split("\n\n")
    read = {}
    for table in tables:
        header, _, *cells = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        ]
        for row in cells:
            read.setdefault(row[0], {}).update(zip(header, row, strict=True))
    one, two, three = read["one"], read["two"], read["three"]
    assert one["last block, %"] == "82.00 ± 2.83 (1 failed)"
    assert one["each block that classifies, %"] == "50.00 ± 0.00 / 82.00 ± 2.83"
    assert one["kept, MiB"] == "-" and two["kept, MiB"] == "3.0"
    assert one["step by block, ms"] == "1.0 / 4.0" and two["step by block, ms"] == "-"
    assert two["last block, %"] == "90.00" and three["last block, %"] == "failed"
    assert failures == "- one, seed 2: failed: out of memory\n- three, seed 0: failed: diverged"


_CONFIG = """
import runpy

from dgl_jax.variants import choose_words

WORDS = (("good", "bad"), ("full", "short"))

def get_config(variant=""):
    row, budget = choose_words(variant, WORDS)
    config = runpy.run_path({quickstart!r})["get_config"]()
    config.network.width_factor = 0.0625
    config.data.name, config.data.data_dir, config.data.crop_padding = "arrays", {data!r}, 1
    config.train.batch_size = 24
    config.eval.batch_size = 16
    config.eval.time_blocks = False
    config.method.name = "backprop"
    if row == "bad":
        config.optimizer.learning_rate = 1e38
    if budget == "short":
        config.train.num_epochs = 2.0
    return config
"""


def _compare(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "experiments/compare_methods.py", f"--config={tmp_path / 'rows.py'}",
         f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'results' / 'table.md'}", *arguments],
        check=False, capture_output=True, text=True, timeout=900, cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_methods_and_seeds_from_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(72) % 4
    x = (rng.integers(0, 60, (72, 8, 8)) + 40 * y[:, None, None]).astype(np.uint8)
    data = str(tmp_path / "arrays.npz")
    np.savez(data, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    quickstart = str(_ROOT / "experiments" / "configs" / "quickstart.py")
    (tmp_path / "rows.py").write_text(_CONFIG.format(quickstart=quickstart, data=data))

    result = _compare(tmp_path, "--methods=good,short")
    assert result.returncode == 2 and "'short' is unknown; choose from good, bad" in result.stderr
    assert not (tmp_path / "runs").exists()

    arguments = ("--variant=short", "--seeds=1", "--config.train.num_epochs=1.0")
    result = _compare(tmp_path, *arguments)
    assert result.returncode == 1, result.stderr
    results = json.loads((tmp_path / "results" / "table.json").read_text())
    good, bad = results["rows"]
    folder = tmp_path / "runs" / "good" / "seed_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert good["seeds"] == [0] and good["epochs"] == 1.0 and not good["failures"]
    assert good["top1"][-1]["runs"] == summary["test_top1"]
    assert bad["seeds"] == [] and "is not finite" in bad["failures"]["0"]
    text = (tmp_path / "results" / "table.md").read_text()
    assert "--variant=short --seeds=1" in text and "- bad, seed 0: failed: " in text
    assert (tmp_path / "results" / "table.png").read_bytes()[:4] == b"\x89PNG"

    # What is finished is not run again.
    before = (folder / "output.txt").stat().st_mtime_ns
    result = _compare(tmp_path, *arguments, "--methods=good")
    assert result.returncode == 0, result.stderr
    assert (folder / "output.txt").stat().st_mtime_ns == before
    result = _compare(tmp_path, "--variant=short", "--seeds=1")
    assert result.returncode == 2 and "num_epochs=2.0, but workdir=" in result.stderr
