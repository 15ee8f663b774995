"""The benchmark: its table, and one variant measured from the command line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from dgl_jax.tables import parallel_table, sedona_table

_ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_of_outer_steps():
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
    _, _, *lines = sedona_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["unrolled", "on", "61.2", "2 (1 to 3)"]
    assert cells[0][4:] == ["0.25", "0.1", "8.0", "20.0", "3", "1", "4", ""]
    assert cells[1] == [
        "unrolled", "off", "5.0", *["-"] * 5, "1024", "1", "-", "out of memory"
    ]  # fmt: skip
    assert cells[2] == ["first_order", "off", *["-"] * 9, "ran past 1 s"]


def test_the_table_of_parallel_runs():
    def row(method, num_devices, num_processes, step_seconds=(), block_seconds=()):
        return {
            "method": method, "num_devices": num_devices, "num_processes": num_processes,
            "step_seconds": step_seconds, "block_seconds": block_seconds,
        }  # fmt: skip

    rows = [
        row("blocks:dgl", 1, 1, block_seconds=[[0.05, 0.06], [0.1, 0.03]]),
        row("blocks:ddg", 1, 1, block_seconds=[[0.04, 0.06], [0.06, 0.03]]),
        row("backprop", 1, 1, [0.12, 0.12]),
        row("backprop", 0, 1, [0.08, 0.08]),
        row("dgl", 2, 1, [0.06, 0.1]),
        row("ddg", 2, 2, [0.075, 0.075]),
        row("data_parallel", 2, 2, [0.06, 0.06]),
    ]
    simulated = {"dgl": 0.1, "ddg": 0.0725, "data_parallel": 0.0625}
    content = {"num_blocks": 2, "rows": rows, "simulated_seconds": simulated}
    table, last = parallel_table(content).split("\n\n")
    _, _, *lines = table.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["backprop", "1", "1", "1", "120.0 (120.0 to 120.0)", "1.00 (1.00 to 1.00)", "", ""],
        [
            "backprop",
            "2",
            "1, all threads",
            "1",
            "80.0 (80.0 to 80.0)",
            "1.50 (1.50 to 1.50)",
            "",
            "",
        ],
        # Round by round: each step takes as long as that round's slowest block.
        ["dgl", "2", "2", "1", "80.0 (60.0 to 100.0)", "1.60 (1.20 to 2.00)", "100 %", "100.0"],
        ["ddg", "2", "2", "2", "75.0 (75.0 to 75.0)", "1.60 (1.60 to 1.60)", "80 %", "72.5"],
        ["data_parallel", "2", "2", "2", "60.0 (60.0 to 60.0)", "2.00 (2.00 to 2.00)", "", "62.5"],
    ]
    assert "with auxiliary heads, alone on one core: 75.0, 45.0 ms; ideal" in last
    assert "backprop 1.60." in last and "backprop 2.00." in last


def _benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "experiments/benchmark.py", *arguments],
        check=False, capture_output=True, text=True, timeout=900, cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


def _measured(folder, name, *arguments):
    """NAME.json and the text of NAME.md, of a benchmark that went well."""
    result = _benchmark(name, *arguments, f"--out={folder}")
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / f"{name}.json").read_text())
    return content, (folder / f"{name}.md").read_text()


def _unpadded(table):
    return re.sub(" +", " ", table)


@pytest.mark.slow
def test_one_variant_of_the_outer_step(tmp_path):
    small = ("--network=cnn4", "--width_factor=0.125", "--batch_size=8", "--inner_steps=2")
    small += ("--image_size=16", "--validation_batch_size=16", "--candidates=pred")
    small += ("--estimators=first_order", "--remat=off", "--repeats=2")
    content, text = _measured(tmp_path, "sedona", *small)
    (row,) = content["rows"]
    assert (row["estimator"], row["remat"], row["failure"]) == ("first_order", False, None)
    for name in ("step_seconds", "inner_step_seconds", "backprop_step_seconds"):
        assert len(row[name]) == 2 and min(row[name]) > 0
    assert row["compile_seconds"] > max(row["step_seconds"])
    assert 0 < row["xla_temp_bytes"] < row["memory_before_bytes"] <= row["peak_memory_bytes"]
    assert not list(tmp_path.glob("sedona/*.cache"))
    assert sedona_table([row]) in text and "T = 2, batches of 8 and 16" in text

    # A variant that takes too long is a result too.
    content, _ = _measured(tmp_path, "sedona", *small, "--timeout_s=0.5")
    (row,) = content["rows"]
    assert row == {"estimator": "first_order", "remat": False, "failure": "ran past 0.5 s"}


@pytest.mark.slow
def test_blocks_in_parallel(tmp_path):
    small = ("--network=cnn4", "--width_factor=0.0625", "--batch_size=8", "--image_size=16")
    small += ("--num_blocks=2", "--rounds=2", "--steps=3", "--num_microbatches=2", "--head=pred")
    small += ("--methods=dgl,pipeline_backprop:gpipe,dgl",)
    content, text = _measured(tmp_path, "parallel", *small)
    assert content["num_blocks"] == 2 and len(content["cuts"]) == 1
    blocks, rows = content["rows"][:2], content["rows"][2:]
    for row in blocks:
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["block_seconds"])
    assert [(row["method"], row["num_devices"], row["num_processes"]) for row in rows] == [
        ("backprop", 1, 1), ("dgl", 1, 1), ("backprop", 0, 1), ("dgl", 2, 1),
        ("data_parallel", 2, 1), ("dgl", 2, 2),
        ("pipeline_backprop:gpipe", 2, 2),
    ]  # fmt: skip
    assert all(len(row["step_seconds"]) == 2 and min(row["step_seconds"]) > 0 for row in rows)
    # As slow as the slowest block; the median of two rounds is their mean.
    slowest = np.max([np.mean(row["block_seconds"], axis=0) for row in blocks])
    assert content["simulated_seconds"]["dgl"] == pytest.approx(slowest)
    assert parallel_table(content) in text


@pytest.mark.slow
def test_what_the_host_spends_on_a_step(tmp_path):
    content, text = _measured(tmp_path, "dispatch", "--rounds=2")
    rows = content["rows"]
    assert [row["num_blocks"] for row in rows] == [1, 2, 4, 8]
    assert all(len(row["step_seconds"]) == 2 and min(row["step_seconds"]) > 0 for row in rows)
    assert text.count("\n| ") == 1 + 4


@pytest.mark.slow
def test_how_fast_input_arrives(tmp_path):
    small = ("--num_photos=8", "--batch_size=32", "--crop_size=16", "--num_workers=0,1")
    small += ("--consumer=cnn4", "--width_factor=0.0625", "--rounds=1", "--steps=2")
    content, text = _measured(tmp_path, "data", *small)
    assert content["jpegs"] == "made_up" and 50e3 < content["mean_bytes"] < 120e3
    assert [row["num_workers"] for row in content["streaming"]] == [0, 1]
    measured = [row["images_per_second"] for row in content["streaming"]]
    assert list(content["decoding"]) == ["about 500x400", "about 1000x800"]
    for seconds in content["decoding"].values():
        assert list(seconds) == ["whole", "two_passes", "one_pass"]
        measured += seconds.values()
    measured += [content["in_memory"]["input"], content["in_memory"]["training"]]
    assert all(len(values) == 1 and min(values) > 0 for values in measured)
    assert text.count("\n|---") == 3


@pytest.mark.slow
def test_what_replay_buffers_cost(tmp_path):
    small = ("--buffer_sizes=2,16", "--activations=8,4,4,16", "--rounds=2", "--steps=3")
    content, text = _measured(tmp_path, "replay", *small)
    rows = content["rows"]
    assert [(row["buffer_dtype"], row["buffer_size"]) for row in rows] == [
        (dtype, size) for dtype in ("float32", "bfloat16", "int8") for size in (2, 16)
    ]
    for row in rows:
        bytes_of_a_number = {"float32": 4, "bfloat16": 2, "int8": 1}[row["buffer_dtype"]]
        scales = 16 * 4 if row["buffer_dtype"] == "int8" else 0
        assert row["mini_batch_bytes"] == 8 * 4 * 4 * 16 * bytes_of_a_number + scales + 8 * 4
        assert row["ring_bytes"] == row["buffer_size"] * row["mini_batch_bytes"]
        for name in ("write", "read", "turn"):
            assert len(row[name]["seconds"]) == 2 and min(row[name]["seconds"]) > 0
        assert row["write"]["temp_bytes"] < row["mini_batch_bytes"]
        assert row["write"]["alias_bytes"] >= row["ring_bytes"]
    assert _unpadded(text).count("| yes |") == len(rows)


@pytest.mark.slow
def test_a_step_beside_backprops(tmp_path):
    small = ("--networks=cnn4:0.0625", "--blocks=2,per_layer", "--batch_size=8", "--image_size=16")
    small += ("--rounds=2", "--steps=4", "--steps_per_call=2")
    content, text = _measured(tmp_path, "step", *small)
    rows = content["rows"]
    assert [row["variant"] for row in rows] == ["backprop", "dgl K=2", "dgl K=4"]
    assert [row["cuts"] for row in rows] == [[], [1], [0, 1, 2]]
    for row in rows:
        assert len(row["step_seconds"]) == 2 and min(row["step_seconds"]) > 0
        assert len(row["host_seconds"]) == 2
        assert all(0 < s < 4 * total for s, total in zip(row["host_seconds"], row["step_seconds"]))
        # Blocks have heads of their own, but no gradient of what they are given.
        assert 0.8 < row["flops"] / rows[0]["flops"] < 1.2
    ratios = sorted(b / a for a, b in zip(rows[0]["step_seconds"], rows[1]["step_seconds"]))
    assert f"| {np.mean(ratios):.3f} ({ratios[0]:.3f} to {ratios[1]:.3f}) |" in _unpadded(text)


@pytest.mark.slow
def test_what_memory_a_step_needs(tmp_path):
    small = ("--networks=cnn4:0.25", "--blocks=2", "--batch_size=8", "--image_size=16")
    content, text = _measured(tmp_path, "memory", *small, "--remat_rows", "--cuts=0-1")
    rows = content["rows"]
    assert [row["variant"] for row in rows] == [
        "backprop", "backprop, remat", "uniform, K=2", "balanced, K=2", "cuts (0, 1)",
    ]  # fmt: skip
    assert rows[2]["cuts"] == [1] and rows[4]["cuts"] == [0, 1]
    for row in rows:
        assert len(row["block_temp_bytes"]) == len(row["cuts"]) + 1
        assert row["temp_bytes"] >= max(row["block_temp_bytes"]) > 0 and row["argument_bytes"] > 0
    lines = _unpadded(text).splitlines()
    (line,) = [line for line in lines if "uniform, K=2" in line]
    assert f"| {rows[2]['temp_bytes'] / rows[0]['temp_bytes']:.3f} |" in line


@pytest.mark.slow
def test_how_long_the_first_step_takes(tmp_path):
    small = ("--network=cnn4", "--width_factor=0.0625", "--batch_size=8", "--image_size=16")
    content, _ = _measured(tmp_path, "compile", *small)
    rows = content["rows"]
    assert [(row["scan_layers"], row["cache"]) for row in rows] == [
        (False, "cold"), (False, "warm"), (True, "cold"), (True, "warm"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["init_seconds"] < row["first_step_seconds"]
        assert 0 < row["second_step_seconds"] < row["compile_seconds"]
    assert rows[1]["compile_seconds"] < rows[0]["compile_seconds"]
    assert not (tmp_path / "compile_cache").exists()


@pytest.mark.slow
def test_mistakes(tmp_path):
    for arguments, message in (
        (("nothing_known",), "give one of step"),
        (("sedona",), "--out is missing"),
        (("sedona", f"--out={tmp_path}", "--estimators=x"), "--estimators=x is unknown"),
        (("step", f"--out={tmp_path}", "--networks=cnn4", "--blocks=x"), "--blocks=x must be"),
        (("step", f"--out={tmp_path}", "--networks=cnn4:x"), "--networks=cnn4:x must be"),
        (("step", f"--out={tmp_path}", "--steps_per_call=3"), "--steps=20 must be a multiple"),
        (("parallel", f"--out={tmp_path}", "--methods=x"), "--methods=x is unknown"),
        (("parallel", f"--out={tmp_path}", "--num_blocks=999"), "--num_blocks=999 must not"),
        (("data", f"--out={tmp_path}", "--num_workers=0,x"), "--num_workers=0,x must be whole"),
        (("replay", f"--out={tmp_path}", "--buffer_sizes=0,1"), "--buffer_sizes=0,1 must be"),
        (("replay", f"--out={tmp_path}", "--activations=8,4"), "--activations=8,4 must be four"),
    ):
        result = _benchmark(*arguments)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
