"""The report: which runs are of which row, its numbers, its verdicts; nothing that was not run."""

import base64
import collections
import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from dgl_jax.config import to_dict
from dgl_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(_ROOT / "experiments"))
import evidence
import report
import run_folders
import verdicts

_NORMAL = stats.norm.isf(0.025)  # Where every deviation is assumed.
_ROWS = [(item, row) for item in evidence.ITEMS for row in item.rows]
_REST, _CONTROL, _SUM, *_OTHERS = evidence.CLAIMS
_DNI, _LOSS, _CLOSE, _BETTER, _HEADS, _COST, _ALL_COST, _BLOCK_COST, *_OTHERS = _OTHERS
_EARLY, _AHEAD, _DEPTH, _TABLE2, _TINY_HEAD, *_OTHERS = _OTHERS
_TABLE3, _DELAY, _BUFFER, *_GROUPINGS, _BY_K, _TWO_HEADS, _TINY, _IMAGENET, _TRANSFER = _OTHERS


def _write_run(folder, configuration, *, seed=0, metrics=(), fields=None, **summary):
    """A finished run as training leaves it; `fields`: changed in the configuration, dotted."""
    config = to_dict(dataclasses.replace(evidence.load(configuration), seed=seed))
    for name, value in (fields or {}).items():
        section, _, field = name.rpartition(".")
        (config[section] if section else config)[field] = value
    folder.mkdir(parents=True)
    resolved = {"cuts": [], "num_steps": 1000, "steps_per_epoch": 20}
    (folder / "config.json").write_text(json.dumps(config | {"resolved": resolved}))
    epochs = config["train"]["num_epochs"] or config["train"]["num_steps"] / 20
    summary = {
        "finished": True,
        "seed": seed,
        "steps": round(20 * epochs),
        "updates_per_block": round(20 * epochs),
        "epochs": epochs,
        "classifiers": list(range(len(summary.get("test_top1", [0.5])))),
        "test_top1": [0.5],
        "test_top5": [0.9] * len(summary.get("test_top1", [0.5])),
        "ensemble_last_top1": 0.6,
        "aux_flops_ratio": [0.03, 0.104, 0.02, 0.0],
        "block_flops": [2e6, 4e6, 3e6, 1e6],
        "head_flops": [1e5, 4e5, 2e5, 0.0],
        "device_kind": "cpu",
    } | summary
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def _rows(content, name):
    (item,) = [item for item in content["items"] if item["name"] == name]
    return {row["label"]: row for row in item["rows"]}


def _claim(content, claim):
    (found,) = [found for found in content["claims"] if found["sentence"] == claim.sentence]
    return found


def _report(tmp_path):
    return report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))


# ---- The evidence.


def test_every_row_loads_and_no_two_are_the_same():
    names = [item.name for item in evidence.ITEMS]
    assert len(set(names)) == len(names) and {item.paper for item in evidence.ITEMS} == {
        "DGL", "SEDONA"
    }  # fmt: skip
    for item in evidence.ITEMS:
        measured = [
            (
                run_folders.learned(evidence.load(name)),
                row.quantity,
                row.unit,
                row.block,
                row.epoch,
                row.share,
            )
            for row in item.rows
            for name in evidence.configurations(row)
        ]
        assert len(set(measured)) == len(measured), item.name
        assert len({row.label for row in item.rows}) == len(item.rows)
    for _, row in _ROWS:
        for short in row.short:
            full, reduced = (
                {
                    run_folders.learned(evidence.load(name))
                    for name in evidence.configurations(row, word)
                }
                for word in ("", short)
            )
            assert not full & reduced


def test_published_figures_are_those_on_top_of_the_configurations():
    for item, row in _ROWS:
        file = row.config.partition(":")[0]
        text = (_ROOT / "experiments" / "configs" / file).read_text().split('"""')[1]
        numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}
        assert row.published is None or row.published in numbers, (item.name, row)
    spread = [(item.name, row.label, row.spread) for item, row in _ROWS if row.spread is not None]
    rounded = [row.unit in evidence.COUNTED for _, row in _ROWS if row.spread]
    assert [one for one, is_count in zip(spread, rounded, strict=True) if not is_count] == [
        ("Table 2", "DGL", 0.1)
    ]
    assert sum(rounded) == 3 + 6


def test_the_settings_wanted():
    rows = {(item.name, row.label): (item, row) for item, row in _ROWS}
    item, row = rows["Figure 5", "S = 1.2"]
    names = evidence.configurations(row)
    assert item.seeds * len(names) == 18  # "thus 18 experiments per data point"
    replays = [evidence.load(name).replay for name in names]
    assert [(r.slow_block, r.slowdown, r.buffer_size) for r in replays] == [
        (block, 1.2, 50) for block in range(6)
    ]
    found = {
        label: evidence.load(row.config).partition.num_blocks
        for (name, label), (_, row) in rows.items()
        if name == "ResNet-101 by K" and "SEDONA" in label
    }
    assert list(found.values()) == [2, 4, 8, 16]
    assert evidence.configurations(rows["Table 1", "CNN-aux"][1], "short") == (
        "table1.py:cnn,short",
    )


# ---- Which runs are whose, and their numbers.


def test_mean_deviation_seeds_and_difference(tmp_path):
    for seed, top1 in enumerate((0.930, 0.934, 0.938)):
        _write_run(tmp_path / "runs" / "deep" / f"seed_{seed}", "table2.py:dgl", seed=seed,
                   test_top1=[0.8, top1], device_kind="NVIDIA H200")  # fmt: skip
    _write_run(tmp_path / "runs" / "backprop", "table2.py:backprop", test_top1=[0.92])
    content = _report(tmp_path)
    rows = _rows(content, "Table 2")
    dgl = rows["DGL"]["measured"]
    assert dgl["mean"] == pytest.approx(93.4)
    assert dgl["deviation"] == pytest.approx(np.std([93.0, 93.4, 93.8], ddof=1))
    assert [run["seed"] for run in dgl["runs"]] == [0, 1, 2]
    assert [run["folder"] for run in dgl["runs"]] == [f"deep/seed_{seed}" for seed in range(3)]
    assert (dgl["epochs"], dgl["devices"]) == (300, ["NVIDIA H200"])
    assert rows["DGL"]["difference"] == pytest.approx(-0.1)
    # The published spread counts as the error of the published mean.
    freedom = (0.4**2 / 3 + 0.1**2) ** 2 / ((0.4**2 / 3) ** 2 / 2)
    quantile = stats.t.isf(0.025, freedom)
    assert rows["DGL"]["error"] == pytest.approx(quantile * np.sqrt(0.4**2 / 3 + 0.1**2))
    assert rows["DGL"]["verdict"] == "agrees" and rows["DGL"]["colour"] == "green"
    # One run: no deviation, and half a per cent is assumed of ours and of the published one.
    backprop = rows["backprop"]
    assert backprop["measured"]["deviation"] is None
    assert backprop["difference"] == pytest.approx(-1.53)
    assert backprop["error"] == pytest.approx(_NORMAL * np.sqrt(0.5))
    assert backprop["verdict"] == "near, below" and backprop["colour"] == "amber"
    assert rows["DDG"]["measured"] is None and rows["DDG"]["verdict"] == "not run"
    text = (tmp_path / "out" / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| DGL ") and "table2" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["DGL", "table2.py:dgl", "93.5", "93.40 ± 0.40", "3 of 3", "300",
                     "NVIDIA H200", f"-0.10 ± {rows['DGL']['error']:.2f}", "agrees", "-"]  # fmt: skip
    assert f"3 of {len(_ROWS)} figures" in text  # And the FLOPs of DGL's head.


@pytest.mark.parametrize(
    "row, measured, verdict, colour",
    [
        (("CNN-aux", 92.2), 92.2 + 1.38, "agrees", "green"),
        (("CNN-aux", 92.2), 92.2 + 1.39, "near, above", "amber"),
        (("CNN-aux", 92.2), 92.2 - 2.38, "near, below", "amber"),
        (("CNN-aux", 92.2), 92.2 - 2.39, "differs, below", "red"),
        (("MLP-SR-aux, FLOPs", 4.0), 4.04, "agrees", "green"),
        (("MLP-SR-aux, FLOPs", 4.0), 4.06, "near, above", "amber"),
        (("MLP-SR-aux, FLOPs", 4.0), 10.4, "differs, above", "red"),
        (("S = 1.0", None), 90.0, "no number published", "plain"),
        (("S = 1.0", None), None, "not run", "grey"),
    ],
)
def test_a_figure_beside_the_published_one(row, measured, verdict, colour):
    is_flops = "FLOPs" in row[0]
    unit, spread = (evidence.FLOPS, 0.05) if is_flops else (evidence.ACCURACY, None)
    row = evidence.Row(row[0], "table1.py:cnn", row[1], spread, unit)
    runs = [{"configuration": row.config, "folder": "one", "seed": 0, "value": measured}]
    found = measured and {"mean": measured, "deviation": None, "seeds": 1, "runs": runs}
    judged = verdicts.judge(row, found)
    assert (judged["verdict"], judged["colour"]) == (verdict, colour)


@pytest.mark.parametrize(
    "configuration, fields",
    [
        ("table1.py:cnn", {"data.data_dir": "/elsewhere", "data.num_workers": 3, "trace": True}),
        ("table1.py:cnn", {"placement.kind": "pipelined", "placement.num_devices": 2}),
        ("table1.py:cnn", {"eval.every_epochs": 5.0, "eval.batch_size": 100, "profile": True}),
        ("table1.py:cnn", {"eval.time_blocks": False, "eval.log_drift": True}),
        ("table1.py:cnn", {"checkpoint.every_steps": 10, "train.log_every_steps": 40}),
        ("table1.py:cnn", {"train.steps_per_call": 10, "train.remat_blocks": [0]}),
        ("table1.py:cnn", {"train.log_gradient_norm": True, "network.scan_layers": True}),
        ("table1.py:cnn", {"data.name": "arrays", "data.data_dir": "/d/cifar10.npz",
                           "data.mean": [0.4914, 0.4822, 0.4465]}),
        ("figure34.py:backprop", {"partition.strategy": "uniform", "partition.num_blocks": 4}),
        ("figure34.py:backprop", {"method.name": "data_parallel", "placement.num_devices": 2}),
        ("figure5.py:S=1.0", {"replay.slow_block": 3}),
        ("sedona_cifar10.py:resnet50,sedona",
         {"partition.from_search": "/there/published/sedona_resnet50.json"}),
    ],
)  # fmt: skip
def test_what_changes_nothing_that_is_learned_is_ignored(tmp_path, configuration, fields):
    _write_run(tmp_path / "runs" / "one", configuration, seed=7, fields=fields)
    content = _report(tmp_path)
    rows = [row for item in content["items"] for row in item["rows"] if row["measured"]]
    assert {run["configuration"] for row in rows for run in row["measured"]["runs"]} == {
        configuration
    }
    assert content["other_runs"] == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer.learning_rate": 0.05},
        {"network.dtype": "bfloat16"},
        {"network.width_factor": 0.5},
        {"train.num_epochs": 60.0},
        {"optimizer.drop_epochs": [20.0, 40.0]},
        {"train.batch_size": 64},
        {"data.std": []},  # The set's own, not those of DGL's code.
        {"data.name": "cifar100"},
        {"data.name": "arrays", "data.data_dir": "mine.npz", "data.mean": [0.5, 0.5, 0.5]},
        {"data.augment": False},
        {"loss.label_smoothing": 0.1},
        {"eval.ensemble_last": 3},
        {"method.name": "ddg"},
    ],
)
def test_what_is_learned_otherwise_matches_no_row(tmp_path, fields):
    _write_run(tmp_path / "runs" / "a" / "one", "table1.py:cnn", fields=fields)
    content = _report(tmp_path)
    assert content["other_runs"] == {"a/one": "matches no row"}
    assert '"value"' not in json.dumps(content)
    assert "a/one" in (tmp_path / "out" / "report.md").read_text().split("## Other runs")[1]


def test_shorter_runs_and_short_words_are_never_mixed_with_full_ones(tmp_path):
    runs, drops = tmp_path / "runs", {"optimizer.drop_epochs": [3.0, 6.0, 9.0]}
    _write_run(runs / "full", "table1.py:cnn", test_top1=[0.9])
    _write_run(runs / "ten", "table1.py:cnn", fields={"train.num_epochs": 10.0} | drops,
               test_top1=[0.8], epochs=10.0)  # fmt: skip
    _write_run(runs / "ten_1", "table1.py:cnn", seed=1, fields={"train.num_epochs": 10.0},
               test_top1=[0.7], epochs=10.0)  # fmt: skip
    _write_run(runs / "short", "table1.py:cnn,short", test_top1=[0.6])
    # Full by its configuration; its summary says otherwise.
    _write_run(runs / "ended", "table1.py:cnn", seed=2, test_top1=[0.5], epochs=49.0)
    _write_run(runs / "mlp", "table1.py:mlp", fields={"train.num_epochs": 49.6}, epochs=49.6)
    _write_run(runs / "whole_steps", "table1.py:mlp_sr", epochs=49.998, test_top1=[0.91])
    _write_run(runs / "sedona", "sedona_cifar10.py:vgg19,SEDONA,short".lower(), test_top1=[0.2])
    _write_run(runs / "steps", "sedona_cifar10.py:vgg19,sedona", test_top1=[0.3],
               fields={"train.num_steps": 6400}, updates_per_block=6400)  # fmt: skip
    content = _report(tmp_path)
    rows = _rows(content, "Table 1")
    cnn = rows["CNN-aux"]
    assert [run["folder"] for run in cnn["measured"]["runs"]] == ["full"]
    assert {setting: (found["mean"], len(found["runs"])) for setting, found in
            cnn["reduced"].items()} == {"10 of 50 epochs": (75.0, 2), "49 of 50 epochs": (50.0, 1),
                                        "short": (60.0, 1)}  # fmt: skip
    assert cnn["difference"] == pytest.approx(90 - 92.2)
    assert rows["MLP-aux"]["measured"] is None and rows["MLP-aux"]["verdict"] == "not run"
    assert list(rows["MLP-aux"]["reduced"]) == ["49.6 of 50 epochs"]
    assert rows["MLP-SR-aux"]["measured"]["mean"] == pytest.approx(91)
    vgg = _rows(content, "CIFAR-10")["VGG-19, SEDONA"]
    assert vgg["measured"] is None
    assert {setting: found["mean"] for setting, found in vgg["reduced"].items()} == {
        "short": 80.0,
        "6400 of 64000 steps": 70.0,
    }
    assert content["other_runs"] == {}
    assert _claim(content, _HEADS)["verdict"] == "not decided"  # MLP-aux is missing.
    names = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert {"table_1.svg", "table_1_reduced_short.svg"} <= names


def test_errors_ensembles_and_heads(tmp_path):
    _write_run(tmp_path / "runs" / "a", "sedona_cifar10.py:resnet50,sedona",
               test_top1=[0.5, 0.925], ensemble_last_top1=0.93)  # fmt: skip
    _write_run(tmp_path / "runs" / "b", "table1.py:mlp_sr", aux_flops_ratio=[0.02, 0.104, 0.06, 0.0],
               block_flops=[1e6, 2e6, 3e6, 3e6], head_flops=[1e5, 2e5, 5e5, 1e6])  # fmt: skip
    _write_run(tmp_path / "runs" / "c", "table3.py:vgg13_K=4", test_top5=[0.1, 0.881],
               test_top1=[0.1, 0.671], block_flops=[9e9, 16e9],
               head_flops=[4.8e8, 1e9])  # fmt: skip
    content = _report(tmp_path)
    assert _rows(content, "CIFAR-10")["ResNet-50, SEDONA"]["measured"]["mean"] == pytest.approx(7.5)
    ensembles = _rows(content, "Ensembles")
    assert ensembles["ResNet-50, SEDONA"]["measured"]["mean"] == pytest.approx(7.5)
    assert ensembles["ResNet-50, SEDONA, two heads"]["measured"]["mean"] == pytest.approx(7.0)
    flops = _rows(content, "Table 1")["MLP-SR-aux, FLOPs"]
    # Of the block of 256 channels; the paper's own.
    assert flops["measured"]["mean"] == pytest.approx(6.0) and flops["verdict"] == "differs, above"
    costliest = _rows(content, "Table 1")["MLP-SR-aux, the costliest head's FLOPs by the network's"]
    assert costliest["measured"]["mean"] == pytest.approx(5.0)  # 0.5 of 9 and the last head's 1.
    by_block = "MLP-SR-aux, the costliest head's FLOPs by the largest block's"
    found = _rows(content, "Table 1")[by_block]["measured"]["mean"]
    assert found == pytest.approx(100 * 5 / 30)
    found = _rows(content, "Table 1")["MLP-SR-aux, all heads' FLOPs by the network's"]
    assert found["measured"]["mean"] == pytest.approx(8.0)
    assert _claim(content, _COST)["verdict"] == "not decided"
    assert _claim(content, _BLOCK_COST)["verdict"] == "does not hold"
    table4 = _rows(content, "Table 4")
    network, heads = (table4[f"VGG-13, K = 4, {part}"] for part in ("network", "heads"))
    assert (network["measured"]["mean"], network["verdict"]) == (13.0, "agrees")
    assert heads["measured"]["mean"] == pytest.approx(0.24)  # 0.05 is as far as rounding goes.
    assert heads["verdict"] == "agrees"
    table3 = _rows(content, "Table 3")
    assert table3["VGG-13, DGL, K = 4, top-1"]["measured"]["mean"] == pytest.approx(67.1)
    assert table3["VGG-13, DGL, K = 4, top-5"]["difference"] == pytest.approx(0.1)


def test_blocks_and_epochs_of_parallel_and_sequential_runs(tmp_path):
    def lines(first_of_block, top1):
        return [
            {"step": step, **{f"test/block_{block}/top1": top1(step - first_of_block(block))
                              for block in range(4)}}
            for step in range(20, 4001 if first_of_block(1) else 1001, 20)
        ]  # fmt: skip

    accuracies = [0.78, 0.85, 0.88, 0.89]
    _write_run(tmp_path / "runs" / "dgl", "figure34.py:dgl", test_top1=accuracies,
               metrics=lines(lambda block: 0, lambda own: own / 2000))  # fmt: skip
    # Block 3 has its first update in step 3001, and its epoch 15 ends with step 3300.
    _write_run(
        tmp_path / "runs" / "sequential",
        "figure34.py:sequential",
        steps=4000,
        test_top1=accuracies,
        metrics=lines(lambda block: 1000 * block, lambda own: np.clip(own, 0, 1000) / 1250),
    )
    content = _report(tmp_path)
    rows = _rows(content, "Figures 3 and 4")
    for block, top1 in enumerate(accuracies):
        assert rows[f"DGL, block {block}"]["measured"]["mean"] == pytest.approx(100 * top1)
    early = "block 3, after three tenths"
    assert rows[f"DGL, {early}"]["measured"]["mean"] == pytest.approx(100 * 300 / 2000)
    assert rows[f"sequential, {early}"]["measured"]["mean"] == pytest.approx(100 * 300 / 1250)
    mean = "block 3, mean over the first three tenths"  # Of epochs 1 to 15, 8 in the middle.
    assert rows[f"DGL, {mean}"]["measured"]["mean"] == pytest.approx(100 * 160 / 2000)
    assert rows[f"sequential, {mean}"]["measured"]["mean"] == pytest.approx(100 * 160 / 1250)
    runs, _ = run_folders.read_runs(tmp_path / "runs")
    curve = run_folders.learning_curve(runs[1], 2)
    assert [epoch for epoch, _ in curve] == list(range(1, 51))
    assert [top1 for _, top1 in curve] == pytest.approx([100 * 20 * e / 1250 for e in range(1, 51)])
    # Not evaluated then, or no metrics: nothing is made up.
    (tmp_path / "runs" / "dgl" / "metrics.jsonl").unlink()
    rows = _rows(_report(tmp_path), "Figures 3 and 4")
    assert rows[f"DGL, {early}"]["measured"] is None and rows["DGL, block 3"]["measured"]


def test_inputs_that_come_to_rest_and_sums_of_gradients(tmp_path):
    """Block 1's inputs are block 0's outputs; a sequential block's own updates come after others'."""
    for method, first in (("dgl", 0), ("sequential", 1000)):
        folder = tmp_path / "runs" / method
        key = "train/block_1/sum_learning_rate_gradient_norm_squared"
        metrics = [
            {"step": first + own, key: 4 - 4 * 2 ** (-own / 250)} for own in range(33, 1001, 33)
        ]
        metrics += [{"step": own, key.replace("1", "0"): 1.0} for own in range(33, 1001, 33)]
        _write_run(folder, f"figure34.py:{method}", metrics=metrics, test_top1=[0.5] * 4,
                   steps=4000 if first else 1000)  # fmt: skip
        drift = [
            {"step": step, "block_0": max(0.0, 1 - step / 1000), "block_1": 7.0}
            for step in range(20, 4001 if first else 1001, 20)
        ]
        (folder / "drift.json").write_text(json.dumps(drift))
    rows = _rows(_report(tmp_path), "Proposition 3.1")
    for words, share in (("a tenth", 0.1), ("a half", 0.5), ("nine tenths", 0.9)):
        found = rows[f"DGL, inputs of block 1, after {words}"]["measured"]
        assert found["mean"] == pytest.approx(1 - share)
    assert rows["sequential, inputs of block 1, after a tenth"]["measured"]["mean"] == 0
    for method in ("DGL", "sequential"):
        found = rows[f"{method}, sum of block 1, after a half"]["measured"]
        assert found["mean"] == pytest.approx(100 * (1 - 2**-1.98) / (1 - 2**-3.96))
    # Up to steps 495 and 990: 300 at 0.1, 300 at a fifth of it, then 300 and the others.
    found = rows["DGL, rates alone, after a half"]["measured"]
    assert found["mean"] == pytest.approx(100 * 339 / (300 + 60 + 12 + 90 / 125))
    assert rows["DGL, sum of block 2, after a half"]["measured"] is None  # Not logged.
    assert (tmp_path / "out" / "proposition_3_1.svg").exists()
    (tmp_path / "runs" / "dgl" / "drift.json").unlink()
    rows = _rows(_report(tmp_path), "Proposition 3.1")
    assert rows["DGL, inputs of block 1, after a half"]["measured"] is None


def test_the_end_of_figure_2_is_its_last_ten_epochs(tmp_path):
    """As in the official logs; of a short run it is the last evaluation."""
    metrics = [
        {"step": 20 * epoch, "test/block_3/top1": 0.5 + epoch / 10_000} for epoch in range(1, 1501)
    ]
    _write_run(tmp_path / "runs" / "full", "figure2.py:dni", metrics=metrics, test_top1=[0.65] * 4)
    metrics = [{"step": 20 * epoch, "test/block_3/top1": epoch / 10} for epoch in range(1, 4)]
    _write_run(tmp_path / "runs" / "short", "figure2.py:dni,short", metrics=metrics,
               test_top1=[0.3] * 4)  # fmt: skip
    row = _rows(_report(tmp_path), "Figure 2")["DNI"]
    assert row["measured"]["mean"] == pytest.approx(50 + 100 * 0.14955)
    assert row["reduced"]["short"]["mean"] == pytest.approx(30)


def test_a_claim_at_a_reduced_setting_stands_apart(tmp_path):
    for seed in range(3):
        for method, top1 in (("dgl", 0.8), ("cdni", 0.7), ("dni", 0.6)):
            folder = tmp_path / "runs" / f"{method}_{seed}"
            _write_run(folder, f"figure2.py:{method},short", seed=seed,
                       test_top1=[top1 + 0.01 * seed])  # fmt: skip
    content = _report(tmp_path)
    claim = _claim(content, _DNI)
    assert claim["verdict"] == "not run" and claim["reduced"]["short"]["verdict"] == "holds"
    assert "| short: holds " in (tmp_path / "out" / "report.md").read_text()
    page = _Page((tmp_path / "out" / "report.html").read_text())
    (colour,) = [colour for colour, cells in page.rows if claim["sentence"] in cells[1]]
    assert colour == "grey last-green"  # Not run, but what was run of it holds.
    for seed in (1, 2):  # Of one seed 1.1 % is assumed, where the full setting has a half.
        for method in ("dgl", "cdni"):
            shutil.rmtree(tmp_path / "runs" / f"{method}_{seed}")
    to_dni, to_cdni = _claim(_report(tmp_path), _DNI)["reduced"]["short"]["comparisons"]
    freedom = (1.1**2 + 1**2 / 3) ** 2 / ((1**2 / 3) ** 2 / 2)
    quantile = stats.t.isf(0.025, freedom)
    assert to_dni["error"] == pytest.approx(quantile * np.sqrt(1.1**2 + 1**2 / 3))
    assert to_cdni["error"] == pytest.approx(_NORMAL * np.sqrt(2) * 1.1)
    assert (to_dni["seeds"], to_cdni["seeds"]) == (1, 1)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"+10.00 ± {to_cdni['error']:.2f} (one seed), holds" in text


def test_a_seed_counts_once_and_unfinished_runs_do_not(tmp_path):
    runs = tmp_path / "runs"
    _write_run(runs / "a", "table1.py:cnn", test_top1=[0.90])
    _write_run(runs / "b", "table1.py:cnn", test_top1=[0.80], fields={"placement.data_parallel": 2})
    _write_run(runs / "c", "table1.py:cnn", seed=1, finished=False)
    _write_run(runs / "d", "table1.py:cnn", seed=2)
    (runs / "d" / "summary.json").unlink()
    _write_run(runs / "e", "table1.py:cnn", seed=3)
    (runs / "e" / "config.json").unlink()
    _write_run(runs / "f", "table1.py:cnn", fields={"search": {"num_inner_steps": 2}})
    content = _report(tmp_path)
    found = _rows(content, "Table 1")["CNN-aux"]["measured"]
    assert (found["mean"], found["deviation"], len(found["runs"])) == (90.0, None, 1)
    assert content["other_runs"] == {
        "b": "same configuration and seed as a", "c": "not finished", "d": "not finished",
        "e": "no config.json", "f": "a search",
    }  # fmt: skip


# ---- Verdicts.

# For each claim the figures of a case; those of the papers hold, where they give any.
_PAPER = {
    claim: {row.label: row.published for item, row in _ROWS if item.name == claim.item}
    for claim in evidence.CLAIMS
}
_FIGURE5 = {"synchronous DGL": 91.0, "S = 1.0": 91.0, "S = 1.1": 90.9, "S = 1.2": 90.8,
            "S = 2.0": 89.5}  # fmt: skip
_FIGURE6 = {"M = 50": 91.0, "M = 5": 90.8, "M = 2": 90.5, "M = 1": 90.3}
_INPUTS = {
    f"DGL, inputs of block {block}, after {words}": distance
    for block in (1, 2, 3)
    for words, distance in (("a tenth", 0.5), ("a half", 0.3), ("nine tenths", 0.1))
}
_RESTING = {f"sequential, inputs of block {block}, after a tenth": 0.0 for block in (1, 2, 3)}
_SUMS = {f"DGL, sum of block {block}, after a half": 90.0 for block in range(4)}
_SUMS["DGL, rates alone, after a half"] = 80.0
_GOOD = _PAPER | {
    _DELAY: _FIGURE5, _BUFFER: _FIGURE6, _REST: _INPUTS, _CONTROL: _RESTING, _SUM: _SUMS,
    _COST: {"MLP-SR-aux, the costliest head's FLOPs by the network's": 3.0},
    _ALL_COST: {"MLP-SR-aux, all heads' FLOPs by the network's": 4.0},
    _BLOCK_COST: {"MLP-SR-aux, FLOPs": 4.0,
                  "MLP-SR-aux, the costliest head's FLOPs by the largest block's": 4.5},
    _TINY_HEAD: {"DGL, the head's FLOPs by the network's": 0.05},
    _BY_K: {"ResNet-101, SEDONA, K = 2": 6.5, "ResNet-101, SEDONA, K = 16": 6.9,
            "ResNet-101, DGL, K = 16": 9.0},
    _TWO_HEADS: {f"{network}, SEDONA{heads}": error for network in evidence._CIFAR10
                 for heads, error in (("", 7.0), (", two heads", 6.5))},
}  # fmt: skip
# What makes it false, and what leaves it open.
_BAD = {
    _REST: ({"DGL, inputs of block 2, after a half": 0.6},
            {"DGL, inputs of block 3, after nine tenths": 0.3}),
    _CONTROL: ({"sequential, inputs of block 1, after a tenth": 0.1},
               {"sequential, inputs of block 2, after a tenth": 0.05}),
    _SUM: ({"DGL, sum of block 0, after a half": 70.0},
           {"DGL, sum of block 3, after a half": 80.1}),
    _DNI: ({"cDNI": 86.0}, {"cDNI": 85.05}),
    _LOSS: ({"DNI, training loss": 0.03}, {"DNI, training loss": 0.053}),
    _CLOSE: ({"DGL, training loss": 0.1}, {"DGL, training loss": 0.071}),
    _BETTER: ({"backprop": 86.0}, {"backprop": 85.05}),
    _EARLY: ({"sequential, block 3, mean over the first three tenths": 65.0},
             {"DGL, block 3": 88.2}),
    _TINY_HEAD: ({"DGL, the head's FLOPs by the network's": 0.2},
                 {"DGL, the head's FLOPs by the network's": 0.1}),
    _TABLE3: ({"VGG-13, backprop, top-1": 70.0}, {"ResNet-152, DGL, K = 2, top-1": 73.35}),
    _DEPTH: ({"DGL, block 2": 84.0}, {"DGL, block 2": 89.8}),
    _HEADS: ({"MLP-SR-aux": 93.0}, {"MLP-SR-aux": 92.15}),
    _COST: ({"MLP-SR-aux, the costliest head's FLOPs by the network's": 5.1},
            {"MLP-SR-aux, the costliest head's FLOPs by the network's": 5.0}),
    _ALL_COST: ({"MLP-SR-aux, all heads' FLOPs by the network's": 9.0},
                {"MLP-SR-aux, all heads' FLOPs by the network's": 5.0}),
    _BLOCK_COST: ({"MLP-SR-aux, the costliest head's FLOPs by the largest block's": 10.4},
                  {"MLP-SR-aux, FLOPs": 5.0}),
    _AHEAD: ({"sequential, block 3": 90.0}, {"sequential, block 3": 89.8}),
    _DELAY: ({"S = 2.0": 88.5}, {"S = 1.2": 90.45}),
    _BUFFER: ({"M = 1": 89.0}, {"M = 2": 90.05}),
    _TABLE2: ({"DGL": 92.5}, {"DGL": 93.1}),
    _GROUPINGS[0]: ({"ResNet-101, SEDONA": 7.6}, {"VGG-19, SEDONA": 12.2}),
    _GROUPINGS[1]: ({"ResNet-101, SEDONA": 8.6}, {"VGG-19, SEDONA": 13.8}),
    _GROUPINGS[2]: ({"ResNet-101, SEDONA": 8.6}, {"VGG-19, SEDONA": 12.1}),
    _BY_K: ({"ResNet-101, SEDONA, K = 16": 8.0}, {"ResNet-101, SEDONA, K = 2": 5.95}),
    _TWO_HEADS: ({"VGG-19, SEDONA, two heads": 8.0}, {"VGG-19, SEDONA, two heads": 6.95}),
    _TINY: ({"VGG-19, SEDONA": 50.0}, {"ResNet-50, SEDONA": 54.0}),
    _IMAGENET: ({"ResNet-152, SEDONA, K = 2, top-1": 22.0},
                {"ResNet-101, SEDONA, K = 2, top-1": 21.3}),
    _TRANSFER: ({"ResNet-101, SEDONA, K = 4, top-1": 25.0},
                {"ResNet-152, SEDONA, K = 2, top-1": 21.4}),
}  # fmt: skip


@pytest.mark.parametrize("claim", evidence.CLAIMS, ids=lambda claim: claim.sentence[:30])
def test_every_claim_can_hold_fail_stay_open_and_not_be_run(claim):
    def verdict(figures):
        deviations = {"FLOPs": 0.0, "inputs": 0.001, "loss": 0.001}

        def deviation(label):
            return next((value for word, value in deviations.items() if word in label), 0.05)

        return verdicts.decide(
            claim,
            {
                label: verdicts.Measured(mean, deviation(label), 3)
                for label, mean in figures.items()
                if mean is not None
            },
        )

    bad, open_case = _BAD[claim]
    assert verdict(_GOOD[claim]) == "holds"
    assert verdict(_GOOD[claim] | bad) == "does not hold"
    assert verdict(_GOOD[claim] | open_case) == "not decided"
    assert verdict({}) == "not run"
    labels = [x for comparison in claim.comparisons for x in comparison[:2] if isinstance(x, str)]
    for label in labels:  # Without any one of its rows it does not hold.
        missing = {name: value for name, value in _GOOD[claim].items() if name != label}
        assert verdict(missing) in ("not run", "not decided")


def test_the_rule_is_the_95_percent_interval():
    """Against scipy's own test of Welch, and its test of pairs."""

    def verdict(a, b, by=0.0, seeds=((0, 1, 2), (3, 4, 5)), **fields):
        measured = {
            label: verdicts.Measured(np.mean(x), np.std(x, ddof=1), len(x),
                                     by_seed=dict(zip(own, x, strict=True)), **fields)
            for label, x, own in zip("ab", (a, b), seeds)
        }  # fmt: skip
        return verdicts.compare(evidence.Comparison("a", "b", by), measured)

    a, b = [90.0, 90.5, 91.3], [88.0, 88.7, 88.9]
    pairs = stats.ttest_rel(a, b).confidence_interval()
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    by_order = dict(zip((2, 0, 1), b, strict=True))
    by_seed = stats.ttest_rel(a, [by_order[seed] for seed in range(3)]).confidence_interval()
    cases = {(0, 1, 2): pairs, (2, 0, 1): by_seed, (3, 4, 5): welch, (2, 3, 4): welch}
    for other, interval in cases.items():
        half = (interval.high - interval.low) / 2
        difference = np.mean(a) - np.mean(b)
        for by, expected in (
            (difference - half - 0.01, "holds"), (difference - half + 0.01, "not decided"),
            (difference + half - 0.01, "not decided"), (difference + half + 0.01, "does not hold"),
        ):  # fmt: skip
            found = verdict(a, b, by, ((0, 1, 2), other))
            assert found == (expected, pytest.approx(difference), pytest.approx(half))
    assert pairs.high - pairs.low != pytest.approx(welch.high - welch.low, rel=0.05)
    two = stats.ttest_rel(a[:2], b[:2]).confidence_interval()  # Those in common.
    expected = (pytest.approx(1.9), pytest.approx((two.high - two.low) / 2))
    assert verdict(a, b, seeds=((0, 1, 2), (0, 1, 7)))[1:] == expected
    # One seed's deviation counts as known.
    one = verdicts.Measured(90.0, 0.5, 1)
    assert verdicts.half_interval([one, one]) == pytest.approx(_NORMAL * np.sqrt(0.5))
    assert verdicts.half_interval([verdicts.Measured(1.0, 0.0, 3)]) == 0.0
    # Rows without all their blocks decide nothing.
    assert verdict([99.0, 99.1, 99.2], b, is_whole=False)[0] == "not decided"


@pytest.mark.parametrize(
    "dgl, verdicts",
    [  # Half a per cent is assumed at the end, two before: 1.39 and 5.54 either way.
        ((0.887, 0.70), ["not decided", "holds"]),
        ((0.8955, 0.80), ["holds", "not decided"]),
        ((0.866, 0.91), ["does not hold", "does not hold"]),
    ],
)
def test_of_a_single_run_the_spread_is_assumed(tmp_path, dgl, verdicts):
    for method, (last, early), first in (("dgl", dgl, 0), ("sequential", (0.891, 0.85), 3000)):
        metrics = [{"step": first + 300, "test/block_3/top1": early}]
        _write_run(tmp_path / "runs" / method, f"figure34.py:{method}", metrics=metrics,
                   test_top1=[0.5, 0.5, 0.5, last])  # fmt: skip
    claim = _claim(_report(tmp_path), _EARLY)
    assert [one["verdict"] for one in claim["comparisons"]] == verdicts
    errors = [one["error"] for one in claim["comparisons"]]
    assert errors == pytest.approx([_NORMAL * np.sqrt(x) for x in (0.5, 8)])


def test_a_delayed_block_counts_with_the_other_five(tmp_path):
    for seed in range(2):
        _write_run(tmp_path / "runs" / f"dgl_{seed}", "figure5.py:dgl", seed=seed,
                   test_top1=[0.910 + 0.0006 * seed])  # fmt: skip
        for s in ("1.0", "1.1", "1.2", "2.0"):
            for block in range(1 if s == "1.0" else 6):
                folder = tmp_path / "runs" / f"S{s}_{block}_{seed}"
                _write_run(folder, f"figure5.py:S={s},block={block}", seed=seed,
                           test_top1=[0.905 + 0.001 * block + 0.0005 * seed])  # fmt: skip
    content = _report(tmp_path)
    row = _rows(content, "Figure 5")["S = 1.2"]
    # The blocks of a seed share its parameters and batches: a seed is one value, not six.
    values = [90.5 + 0.25 + 0.05 * seed for seed in range(2)]
    assert row["measured"]["mean"] == pytest.approx(statistics.fmean(values))
    assert row["measured"]["deviation"] == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert row["measured"]["seeds"] == 2
    assert len(row["measured"]["runs"]) == 12 and row["wanted_runs"] == 18
    # At M = 50 it is a point of Figure 6 too.
    assert _rows(content, "Figure 6")["M = 50"]["measured"]["mean"] == row["measured"]["mean"]
    claim = _claim(content, _DELAY)
    # S = 1.0 is 0.5 % behind: not decided.
    assert [one["verdict"] for one in claim["comparisons"]] == ["not decided"] + ["holds"] * 3
    error = stats.t.isf(0.025, 1) * 0.01 / 2  # DGL gains 0.01 % more with the second seed.
    assert claim["comparisons"][1]["error"] == pytest.approx(error, abs=1e-5)
    assert (tmp_path / "out" / "figure_5.svg").exists()
    for seed in range(2):
        shutil.rmtree(tmp_path / "runs" / f"S2.0_4_{seed}")
    claim = _claim(_report(tmp_path), _DELAY)
    assert claim["comparisons"][3]["verdict"] == "not decided"
    assert claim["comparisons"][3]["difference"] is not None
    shutil.rmtree(tmp_path / "runs" / "S1.2_4_1")  # A seed of five blocks does not count.
    measured = _rows(_report(tmp_path), "Figure 5")["S = 1.2"]["measured"]
    assert measured["mean"] == pytest.approx(values[0])
    assert (measured["seeds"], len(measured["runs"]), measured["deviation"]) == (1, 6, None)
    for block in range(6):  # Three blocks of one seed and three of another are no whole.
        shutil.rmtree(tmp_path / "runs" / f"S1.1_{block}_{block // 3}")
    content = _report(tmp_path)
    assert _rows(content, "Figure 5")["S = 1.1"]["measured"]["seeds"] == 2
    assert _claim(content, _DELAY)["comparisons"][1]["verdict"] == "not decided"


# ---- Nothing that no run backs.


def _measured_in(content):
    """(label's row, point) of every measured figure in report.json, wherever it is."""
    for item in content["items"]:
        for row in item["rows"]:
            rows = {(i.name, r.label): r for i, r in _ROWS}
            for found in (row["measured"], *row["reduced"].values()):
                if found is not None:
                    yield rows[item["name"], row["label"]], found


def _check_against_files(content, runs):
    """Every measured figure once more, from the files of the runs that it names."""
    count = 0
    for row, found in _measured_in(content):
        values, summaries = collections.defaultdict(list), []
        for run in found["runs"]:
            summary = json.loads((runs / run["folder"] / "summary.json").read_text())
            if row.epoch is not None:
                # Steps of 20 an epoch, as `_write_run` says.
                lines = (runs / run["folder"] / "metrics.jsonl").read_text().splitlines()
                (line,) = [x for x in map(json.loads, lines) if x["step"] == 20 * row.epoch]
                value = 100 * line[f"test/block_{range(4)[row.block]}/top1"]
            elif row.tail is not None and _tail(row, runs / run["folder"], summary):
                value = np.mean(_tail(row, runs / run["folder"], summary))
                value *= 1 if row.unit == evidence.LOSS else 100
            elif row.share is not None:
                value = _after_a_share(row, runs / run["folder"], summary)
            elif row.quantity == "aux_flops_ratio":
                value = 100 * summary["aux_flops_ratio"][2]
            elif row.unit in evidence.COUNTED:
                *heads, last = summary["head_flops"]
                network = sum(summary["block_flops"]) + last
                value = {"costliest_head_by_block": 100 * max(heads) / max(summary["block_flops"]),
                         "costliest_head": 100 * max(heads) / network,
                         "all_heads": 100 * sum(heads) / network,
                         "head_multiply_adds": sum(heads) / 2e9,
                         "network_multiply_adds": network / 2e9}[row.quantity]  # fmt: skip
            else:
                value = summary[row.quantity]
                value = 100 * (value if isinstance(value, float) else value[row.block])
                value = 100 - value if "error" in row.unit else value
            assert run["value"] == pytest.approx(value, abs=1e-6)  # Six digits are kept.
            values[run["seed"]].append(value)
            summaries.append(summary)
        assert found["seeds"] == len(values)
        assert found["devices"] == sorted({summary["device_kind"] for summary in summaries})
        epochs = np.mean([summary["epochs"] for summary in summaries])
        assert found["epochs"] == pytest.approx(epochs, abs=0.01)
        values = [np.mean(of_seed) for of_seed in values.values()]
        assert found["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        if len(values) > 1:
            assert found["deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        else:
            assert found["deviation"] is None
        count += 1
    return count


def _tail(row, folder, summary):
    """Of the last block, in the last part of a run: accuracies, or losses of training."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    what = ("train", "loss") if row.unit == evidence.LOSS else ("test", "top1")
    key = f"{what[0]}/block_{summary['classifiers'][-1]}/{what[1]}"
    steps = summary["steps"]
    return [line[key] for line in lines if key in line and line["step"] > steps * (1 - row.tail)]


def _after_a_share(row, folder, summary):
    """Of the step next to a share of the block's own updates."""
    updates = summary.get("updates_per_block", summary["steps"])
    if row.quantity == "rate_sum":
        optimizer = json.loads((folder / "config.json").read_text())["optimizer"]
        rates = [optimizer["drop_factor"] ** sum(
            step >= round(epoch * updates / summary["epochs"]) for epoch in optimizer["drop_epochs"]
        ) for step in range(updates)]  # fmt: skip
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        key = "train/block_0/sum_learning_rate_gradient_norm_squared"
        logged = [line["step"] for line in lines if key in line and line["step"] <= updates]
        nearest = min(logged, key=lambda step: abs(step - row.share * updates))
        return 100 * sum(rates[:nearest]) / sum(rates[: max(logged)])
    first = row.block * updates if "sequential" in row.config else 0
    if row.quantity == "input_drift":
        lines, key = json.loads((folder / "drift.json").read_text()), f"block_{row.block - 1}"
    else:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        key = f"train/block_{row.block}/sum_learning_rate_gradient_norm_squared"
        if row.quantity.endswith("top1"):
            key, updates = f"test/block_{row.block}/top1", row.share * updates
    values = {line["step"] - first: line[key] for line in lines if key in line}
    values = {own: value for own, value in values.items() if 0 < own <= updates + 1e-6}
    if row.quantity == "mean_top1":
        return 100 * np.mean(list(values.values()))
    if row.quantity == "test_top1":
        return 100 * values[max(values)]
    value = values[min(values, key=lambda own: abs(own - row.share * updates))]
    return value if row.quantity == "input_drift" else 100 * value / values[max(values)]


def _check_comparisons(content):
    """Every difference, interval and verdict once more, at every setting, by scipy's own tests."""
    count = 0
    for claim in content["claims"]:
        rows = _rows(content, claim["item"])
        for setting, found in {None: claim, **claim["reduced"]}.items():
            for one in found["comparisons"]:
                points, is_whole = [], True
                for label in (one["a"], one["b"]):
                    point, row = label, rows.get(label)
                    if row:
                        point = row["reduced"].get(setting) if setting else row["measured"]
                    if row and point:
                        wanted = point["seeds"] * len(row["configurations"])
                        is_whole = is_whole and len(point["runs"]) == wanted
                    points.append(point)
                count += _check_comparison(one, is_whole, *points)
    return count


def _check_comparison(one, is_whole, *points):
    if None in points:
        assert (one["difference"], one["error"], one["verdict"]) == (None, None, "not run")
        return 0
    a, b = (x if isinstance(x, float) else x["mean"] for x in points)
    samples = [([], [x, x, x]) if isinstance(x, float) else _by_seed(x) for x in points]
    (seeds, values), (other_seeds, other_values) = samples
    common = set(seeds) & set(other_seeds)
    if len(common) > 1:
        values = [value for seed, value in zip(seeds, values) if seed in common]
        other_values = [value for seed, value in zip(other_seeds, other_values) if seed in common]
        a, b = np.mean(values), np.mean(other_values)
    assert one["difference"] == pytest.approx(a - b)
    half, single = one["error"], min(len(values), len(other_values)) == 1
    if not single and np.ptp(values) + np.ptp(other_values) == 0:
        half = 0.0
    elif len(common) > 1:
        half = _half(stats.ttest_rel(values, other_values))
    elif not single and 0 in (np.ptp(values), np.ptp(other_values)):  # A number.
        known, of = (a, other_values) if np.ptp(values) == 0 else (b, values)
        half = _half(stats.ttest_1samp(of, known))
    elif not single:
        half = _half(stats.ttest_ind(values, other_values, equal_var=False))
    assert one["error"] == pytest.approx(half, rel=1e-3, abs=1e-6)
    beyond = a - b - one["by"]
    decided = "holds" if beyond > 0 else "does not hold"
    assert one["verdict"] == (decided if is_whole and abs(beyond) > one["error"] else "not decided")
    return not single


def _half(test):
    interval = test.confidence_interval()
    return (interval.high - interval.low) / 2


def _by_seed(point):
    """The seeds of a point, and the value of each."""
    by_seed = collections.defaultdict(list)
    for run in point["runs"]:
        by_seed[run["seed"]].append(run["value"])
    return list(by_seed), [np.mean(same) for same in by_seed.values()]


def _check_markdown(content, text):
    """Every figure in the tables is one of report.json's; every row is there."""
    section = text.split("\n## The papers' claims\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    for claim in content["claims"]:
        found, lines = (
            lines[: len(claim["comparisons"]) + 1],
            lines[len(claim["comparisons"]) + 1 :],
        )
        assert claim["sentence"] in found[0]
        for place, (one, line) in enumerate(zip(claim["comparisons"], found[1:], strict=True)):
            reduced = [setting["comparisons"][place] for setting in claim["reduced"].values()]
            expected = [
                (x["difference"], x["error"]) for x in (one, *reduced) if x["error"] is not None
            ]
            numbers = re.findall(r"([+-]\d+\.\d\d ± \d+\.\d\d)", line.split(one["rule"])[1])
            assert numbers == [f"{x:+.2f} ± {error:.2f}" for x, error in expected]
    assert not lines
    for item in content["items"]:
        section = text.split(f"\n## {item['paper']}, {item['name']}: ")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        header, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        assert len(cells) == len(item["rows"])
        for row, line in zip(item["rows"], cells, strict=True):
            assert line[0] == row["label"]
            line = dict(zip(header, line, strict=True))
            found = row["measured"]
            if found is None:
                assert line["measured"] == line["verdict"] == "not run"
                assert line["difference"] == line["epochs"] == line["device"] == "-"
                assert line["runs"] == f"0 of {row['wanted_runs']}"
            else:
                assert float(line["measured"].split(" ± ")[0]) == pytest.approx(
                    found["mean"], abs=0.006
                )
            numbers = re.findall(r": (-?\d+\.\d\d)", line["reduced settings"])
            assert numbers == [f"{found['mean']:.2f}" for found in row["reduced"].values()]


def test_every_figure_comes_from_a_run(tmp_path):
    rng, runs = np.random.default_rng(0), tmp_path / "runs"
    names = ["figure2.py:dni", "figure34.py:dgl", "table1.py:mlp_sr", "figure5.py:S=1.3,block=2",
             "figure6.py:M=2,block=1,short", "table2.py:ddg", "sedona_imagenet.py:resnet152,sedona",
             "sedona_tiny_imagenet.py:vgg19,dgl", "sedona_cifar10.py:resnet101,sedona,K=16",
             "figure34.py:dgl,epochs=8", "sedona_cifar10.py:vgg19,dgl"]  # fmt: skip
    for number, name in enumerate(names):
        for seed in range(1 + number % 3):
            top1 = rng.uniform(0.5, 1, 4).tolist()
            metrics = [
                {"step": 20 * epoch}
                | {f"test/block_{block}/top1": rng.uniform() for block in range(4)}
                | {f"train/block_{block}/loss": rng.uniform() for block in range(4)}
                for epoch in (15, 50, 200, 1495, 1500)
            ]
            _write_run(runs / f"{number}" / f"seed_{seed}", name, seed=seed, test_top1=top1,
                       metrics=metrics, aux_flops_ratio=rng.uniform(0, 2, 4).tolist())  # fmt: skip
    content = _report(tmp_path)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        json.dumps(content)
    )
    assert _check_against_files(content, runs) == 27
    _check_comparisons(content)
    _check_markdown(content, (tmp_path / "out" / "report.md").read_text())
    assert content["other_runs"] == {}


def test_with_no_runs_nothing_is_measured(tmp_path):
    (tmp_path / "runs").mkdir()
    content = _report(tmp_path)
    assert all(row["verdict"] == "not run" and row["measured"] is None and not row["reduced"]
               for item in content["items"] for row in item["rows"])  # fmt: skip
    assert {claim["verdict"] for claim in content["claims"]} == {"not run"}
    text = (tmp_path / "out" / "report.md").read_text()
    _check_markdown(content, text)
    assert f"0 of {len(_ROWS)} figures were measured" in text
    assert text.endswith("## Other runs\n\nNone.\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html", "report.json", "report.md"
    ]  # fmt: skip
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


# ---- The files.


class _Page(html.parser.HTMLParser):
    """Tags are closed in order; what is referred to, and whether tables are in a box."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.sources, self.tables, self.rows = [], [], 0, []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "table":
            self.tables += 1
            assert self.stack[-1] == ("div", "box")
        if tag == "tr":
            self.rows.append((attrs["class"], []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in ("meta", "img"):
            self.stack.append((tag, attrs.get("class")))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] in ("td", "th", "b"):
            self.rows[-1][1][-1] += data


def test_the_page_needs_no_other_file_and_says_verdicts_in_words(tmp_path):
    runs = tmp_path / "runs"
    for seed in range(3):
        for method, top1 in (("dgl", 0.935), ("ddg", 0.9341), ("backprop", 0.9353)):
            _write_run(runs / "<b>" / f"{method}_{seed}", f"table2.py:{method}", seed=seed,
                       test_top1=[top1 + 0.0001 * seed], device_kind="A & B")  # fmt: skip
        _write_run(runs / f"cnn_{seed}", "table1.py:cnn", seed=seed, test_top1=[0.88])
    _write_run(runs / "<i>other", "table1.py:cnn", fields={"train.batch_size": 64})
    content = _report(tmp_path)
    text = (tmp_path / "out" / "report.html").read_text()
    page = _Page(text)
    assert page.tables == 3 + len(content["items"])
    assert page.rows[-1] == ("grey", ["<i>other", "matches no row"])
    assert page.sources and all(source.startswith("data:image/svg+xml;") for source in page.sources)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text) and "@import" not in text
    assert '<meta name="viewport" content="width=device-width' in text
    assert ".box { overflow-x: auto }" in text and "overflow-wrap: anywhere" in text
    words = {colour: set() for colour in ("green", "amber", "red", "grey", "plain", "head")}
    for colour, cells in page.rows:
        words[colour.partition(" ")[0]].add(
            cells[8] if len(cells) == 10 else cells[len(cells) == 2]
        )
    assert words["green"] == {"agrees", "holds"}
    assert words["red"] == {"differs, below", "does not hold"}  # The head's FLOPs.
    assert words["grey"] == {"not run", "", "matches no row"}
    assert any(cells[6] == "A & B" for _, cells in page.rows if len(cells) == 10)
    assert _claim(content, _TABLE2)["verdict"] == "holds"


def test_the_page_says_what_each_setting_is(tmp_path):
    (tmp_path / "runs").mkdir()
    content = _report(tmp_path)
    settings = {item["name"]: item["settings"] for item in content["items"]}
    assert settings["Figures 3 and 4"] == {
        "full": "cifar10, cnn4, 50 epochs",
        "epochs=8": "cifar10, cnn4, 8 epochs",
        "longer": "embedded (a part of Fashion-MNIST), cnn4 x 0.25, 9 epochs",
        "short": "embedded (a part of Fashion-MNIST), cnn4 x 0.25, 3 epochs",
    }
    assert settings["Table 3"]["full"] == "imagenet2012, vgg13/vgg19/resnet152, 50 epochs"
    assert "resnet18 x 0.25" in settings["Table 2"]["short"]
    assert "100 steps" in settings["CIFAR-10"]["short"]
    text = (tmp_path / "out" / "report.md").read_text()
    for item in content["items"]:
        section = text.split(f"\n## {item['paper']}, {item['name']}: ")[1].split("\n## ")[0]
        assert all(f"{name}: {about}" in section for name, about in item["settings"].items())


def test_the_same_runs_give_the_same_bytes(tmp_path):
    lines = [{"step": 20, "test/block_3/top1": 0.5}]
    _write_run(tmp_path / "runs" / "a", "figure34.py:dgl", test_top1=[0.5] * 4, metrics=lines)
    found = []
    for name in ("one", "two"):
        report.make_report(str(tmp_path / "runs"), str(tmp_path / name))
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1] and "figures_3_and_4.svg" in found[0]
    for content in found[0].values():
        assert str(tmp_path).encode() not in content


def test_a_picture_says_what_it_draws(tmp_path):
    digests = []
    for top1 in (0.5, 0.5, 0.6):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        _write_run(tmp_path / "runs" / "one", "table1.py:cnn", test_top1=[top1])
        _report(tmp_path)
        digests.append(_digest((tmp_path / "out" / "table_1.svg").read_text()))
    assert digests[0] == digests[1] != digests[2]


_COMMITTED = _ROOT / "experiments" / "results"


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path):
    """python experiments/report.py --runs=experiments/results/runs \\
    --out=experiments/results/report"""
    content = report.make_report(str(_COMMITTED / "runs"), str(tmp_path))
    assert _check_against_files(content, _COMMITTED / "runs")
    assert _check_comparisons(content) > 30
    for name in ("report.json", "report.md", "report.html"):
        found, expected = (
            re.sub(r'src="data:[^"]*"', "", (folder / name).read_text())  # Fonts differ.
            for folder in (tmp_path, _COMMITTED / "report")
        )
        assert found == expected, name
    pictures = [
        {p.name: _digest(p.read_text()) for p in folder.glob("*.svg")}
        for folder in (tmp_path, _COMMITTED / "report")
    ]
    assert pictures[0] == pictures[1] and len(set(pictures[0].values())) == len(pictures[0])
    inside = re.findall(
        r'src="data:[^,]*,([^"]*)"', (_COMMITTED / "report/report.html").read_text()
    )
    inside = [_digest(base64.b64decode(picture).decode()) for picture in inside]
    assert sorted(inside) == sorted(pictures[0].values())


def _digest(svg):
    """Of the numbers that are drawn; how they look depends on matplotlib's version and on fonts."""
    return re.search("<dc:description>([0-9a-f]{64})</dc:description>", svg)[1]


# ---- Mistakes.


def test_what_a_network_or_an_older_run_does_not_have_is_not_made_up(tmp_path):
    for number, changes in enumerate(({}, {"head_flops": [1.0], "aux_flops_ratio": [0.0]})):
        folder = tmp_path / "runs" / f"{number}"
        _write_run(folder, "table1.py:mlp_sr", seed=number, **changes)
        if not changes:
            summary = json.loads((folder / "summary.json").read_text())
            del summary["head_flops"], summary["block_flops"]
            (folder / "summary.json").write_text(json.dumps(summary))
    rows = _rows(_report(tmp_path), "Table 1")
    assert rows["MLP-SR-aux, all heads' FLOPs by the network's"]["measured"] is None
    assert rows["MLP-SR-aux, FLOPs"]["measured"]["seeds"] == 1
    assert rows["MLP-SR-aux"]["measured"]["seeds"] == 2


def test_a_picture_of_figures_of_which_some_are_published(tmp_path):
    for words in ("backprop", "sedona,K=16", "sedona"):
        _write_run(tmp_path / "runs" / words, f"sedona_cifar10.py:resnet101,{words}")
    _report(tmp_path)
    assert (tmp_path / "out" / "resnet_101_by_k.svg").exists()


def test_an_accuracy_of_zero_is_no_mistake(tmp_path):
    _write_run(tmp_path / "runs" / "one", "table1.py:cnn", test_top1=[0.0], ensemble_last_top1=0.0)
    row = _rows(_report(tmp_path), "Table 1")["CNN-aux"]
    assert row["measured"]["mean"] == 0.0


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("summary.json", "{", r"one/summary.json: cannot be parsed .*; run it again, or take"),
        ("summary.json", "[1]", "one/summary.json: must be one JSON object; run it again"),
        ("summary.json", {"test_top1": None}, "test_top1=None must be numbers from 0 to 1; run"),
        ("summary.json", {"test_top1": []}, r"test_top1=\[\] must be numbers from 0 to 1; run it"),
        ("summary.json", {"test_top1": [92.2]}, r"test_top1=\[92.2\] must be numbers from 0 to 1"),
        ("summary.json", {"test_top1": [float("nan")]}, r"test_top1=\[nan\] must be numbers"),
        (
            "summary.json",
            {"ensemble_last_top1": "0.9"},
            "ensemble_last_top1='0.9' must be a number",
        ),
        ("summary.json", {"head_flops": None}, "head_flops=None must be numbers from 0; run it"),
        ("summary.json", {"block_flops": ["1"]}, r"block_flops=\['1'\] must be numbers from 0"),
        ("summary.json", {"epochs": 0}, "epochs=0 must be a number above 0; run it again"),
        ("config.json", "nothing", "one/config.json: cannot be parsed"),
        (
            "config.json",
            {"optimiser": {}},
            "one/config.json: config.optimiser is not a known field",
        ),
    ],
)
def test_a_broken_run_is_one_line(tmp_path, file, text, message):
    _write_run(tmp_path / "runs" / "one", "table1.py:cnn")
    path = tmp_path / "runs" / "one" / file
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        _report(tmp_path)
    assert not (tmp_path / "out").exists()


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "experiments/report.py", *arguments], check=False, capture_output=True,
        text=True, cwd=_ROOT, env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


def test_the_command(tmp_path):
    (tmp_path / "runs").mkdir()
    result = _command(f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"not run: {_REST.sentence}"
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs=nowhere", "--out=here"], "--runs=nowhere must be a folder of runs; try"),
        (["--out=here"], "--runs is missing; give a folder"),
        (["--runs=tests", "--out=README.md/here"], "--out=README.md/here can't be made"),
        (["--runs=tests", "there"], "argument 'there' is not a flag; try --there"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = _command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
