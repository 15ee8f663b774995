"""The benchmark: its table, and one variant measured from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dgl_jax.tables import search_step_table

_ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_of_search_steps():
    measured = {"compile_seconds": 61.25, "xla_temp_bytes": 3 * 2**20}
    measured |= {"memory_before_bytes": 2**20, "peak_memory_bytes": 2**22}
    measured |= {"step_seconds": [3.0, 1.0, 2.0], "inner_step_seconds": [0.25]}
    measured |= {"backprop_step_seconds": [0.1, 0.1]}
    compiled = {"compile_seconds": 5.0, "xla_temp_bytes": 2**30, "memory_before_bytes": 2**20}
    rows = [
        {"estimator": "unrolled", "remat": True, "failure": None} | measured,
        {"estimator": "unrolled", "remat": False, "failure": "out of memory"} | compiled,
        {"estimator": "first_order", "remat": False, "failure": "ran past 1 s"},
    ]
    _, _, *lines = search_step_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["unrolled", "on", "61.2", "2 (1 to 3)"]
    assert cells[0][4:] == ["0.25", "0.1", "8.0", "20.0", "3", "1", "4", ""]
    assert cells[1] == [
        "unrolled", "off", "5.0", *["-"] * 5, "1024", "1", "-", "out of memory"
    ]  # fmt: skip
    assert cells[2] == ["first_order", "off", *["-"] * 9, "ran past 1 s"]


def _benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "experiments/benchmark.py", *arguments],
        check=False, capture_output=True, text=True, timeout=300, cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_one_variant_of_the_search_step(tmp_path):
    small = ("--network=cnn4", "--width_factor=0.125", "--batch_size=8", "--inner_steps=2")
    small += ("--image_size=16", "--validation_batch_size=16", "--candidates=pred")
    small += ("--estimators=first_order", "--remat=off", "--repeats=2", f"--out={tmp_path}")
    result = _benchmark("search_step", *small)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "search_step.json").read_text())["rows"]
    assert (row["estimator"], row["remat"], row["failure"]) == ("first_order", False, None)
    for name in ("step_seconds", "inner_step_seconds", "backprop_step_seconds"):
        assert len(row[name]) == 2 and min(row[name]) > 0
    assert row["compile_seconds"] > max(row["step_seconds"])
    assert 0 < row["xla_temp_bytes"] < row["memory_before_bytes"] <= row["peak_memory_bytes"]
    assert not list(tmp_path.glob("search_step/*.cache"))
    text = (tmp_path / "search_step.md").read_text()
    assert search_step_table([row]) in text and "T = 2, batches of 8 and 16" in text

    # A variant that takes too long is a result too.
    result = _benchmark("search_step", *small, "--timeout_s=0.5")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "search_step.json").read_text())["rows"]
    assert row == {"estimator": "first_order", "remat": False, "failure": "ran past 0.5 s"}


@pytest.mark.slow
def test_mistakes(tmp_path):
    for arguments, message in (
        (("nothing_known",), "give one of search_step"),
        (("search_step",), "--out is missing"),
        (("search_step", f"--out={tmp_path}", "--estimators=x"), "--estimators=x is unknown"),
    ):
        result = _benchmark(*arguments)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
