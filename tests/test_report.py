"""The report: each of its figures comes from a run's file, and only runs at published settings enter."""

import base64
import collections
import json
import os
import pathlib
import re
import runpy
import sys

import pytest

from dgl_jax.config import from_dict, to_dict
from dgl_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[1]
_EXPERIMENTS = _ROOT / "experiments"
sys.path.insert(0, str(_EXPERIMENTS))
import report

_STEPS = 30  # An epoch's: a line after 20 of them, and one after the other 10.


def _write_run(folder, configuration, *, num_epochs, done, train=None, test=None, seed=0, **fields):
    """A run's folder by hand.

    Args:
      folder: is made.
      configuration: ``FILE.py:WORDS``.
      num_epochs: how long the whole run is.
      done: how many epochs are in metrics.jsonl.
      train: by name, such as "block_0/top1", its value in an epoch: a function of the epoch. The
        first line of an epoch has 0.03 less, the second, of half as many steps, 0.06 more.
      test: likewise.
      seed: the run's.
      **fields: dotted names in the configuration, with "_of_" for the dot: changed.
    """
    name, _, words = configuration.partition(":")
    get_config = runpy.run_path(str(_EXPERIMENTS / "configs" / name))["get_config"]
    config = to_dict(from_dict(get_config(words).to_dict())) | {"seed": seed}
    config["data"]["data_dir"] = "elsewhere"
    for field, value in fields.items():
        field, section = field.split("_of_")
        config[section][field] = value
    num_blocks = 4 if config["method"]["name"] in ("dgl", "sequential", "dni") else 1
    config["resolved"] = {"cuts": list(range(num_blocks - 1)), "steps_per_epoch": _STEPS}
    config["resolved"]["num_updates"] = num_epochs * _STEPS
    lines = []
    for epoch in range(1, done + 1):
        for step, shift in ((epoch * _STEPS - 10, -0.03), (epoch * _STEPS, 0.06)):
            lines.append({"step": step})
            lines[-1] |= {f"train/{key}": value(epoch) + shift for key, value in train.items()}
        lines.append({"step": epoch * _STEPS})
        lines[-1] |= {f"test/{key}": value(epoch) for key, value in test.items()}
    commit = "123456789abcdef" + "+changes" * (seed == 1)
    made_by = {"commit": commit, "device_kind": "cpu", "num_threads": 2}
    summary = {"finished": done == num_epochs, "made_by": made_by}
    if summary["finished"]:
        summary["aux_flops_ratio"] = [0.0, 0.0, 0.05]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rows(text):
    """Each table's rows without its first cell, by it."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def _of_blocks(name, value):
    return {f"block_{k}/{name}": lambda epoch, k=k: value(epoch) + 0.01 * k for k in range(4)}


def test_published_figures_are_those_of_the_authors_curves():
    figures = report.read_figures()
    counts = collections.Counter(figure.item for figure in figures)
    assert counts["DGL, Table 1"] == 6 and counts["DGL, Figures 3 and 4"] == 48
    assert counts["DGL, Table 3"] == 16 and counts["SEDONA, CIFAR-10"] == 20
    for figure in figures:
        curves = report.read_curves(figure.item)
        if curves:
            method = figure.configuration.partition(":")[2]
            epochs = report.epochs(figure) or [50]
            curve = curves[method, figure.quantity, figure.block]
            mean = sum(curve[epoch] for epoch in epochs) / len(epochs)
            assert figure.published == pytest.approx(mean, abs=0.006), figure
    by_row = {(f.item, f.label, f.quantity, f.block, f.epoch): f.published for f in figures}
    assert by_row["DGL, Figures 3 and 4", "DGL", "test accuracy", 4, ""] == 89.86
    assert by_row["DGL, Figure 2", "backprop", "training loss", None, "25"] == 0.831
    assert by_row["SEDONA, CIFAR-10", "VGG-19, SEDONA", "test error", None, ""] == 11.58
    assert by_row["PredSim, MNIST", "MLP, predsim", "test error", None, ""] == 0.62


def test_every_configuration_is_there_but_for_those_of_files_to_come():
    names = {figure.configuration for figure in report.read_figures()}
    missing = {name for name in names if name and report.published_settings(name) is None}
    assert {name.partition(":")[0] for name in missing} <= {"predsim_mlp.py"}
    known = report._METRICS.keys() | report._COUNTS.keys()
    without = {f.quantity for f in report.read_figures() if f.quantity not in known}
    assert without == {"training speed over backprop's"}


def test_numbers_are_those_of_the_runs_files(tmp_path):
    for seed, done in ((0, 50), (1, 20)):
        train = _of_blocks("top1", lambda epoch, seed=seed: 0.4 + 0.01 * epoch - 0.02 * seed)
        test = _of_blocks("top1", lambda epoch, seed=seed: 0.3 + 0.01 * epoch + 0.02 * seed)
        folder = tmp_path / "runs" / f"seed_{seed}"
        about = {"num_epochs": 50, "done": done, "train": train, "test": test, "seed": seed}
        _write_run(folder, "figure34.py:dgl", **about)
    text = report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    assert text == (tmp_path / "out" / "report.md").read_text()
    rows = _rows(text)
    # Both seeds: accuracies of 0.46 and 0.48; their deviation is 0.02 / sqrt 2.
    assert rows["DGL, block 2, test accuracy, epoch 15, %"] == [
        "65.83", "47.00 ± 1.41", "-18.83", "0, 1", "50, 20 of 50", "1234567, 1234567+"
    ]  # fmt: skip
    # Mean over epochs 16 to 20; a training accuracy is weighted by steps: -0.03 x 20 + 0.06 x 10.
    assert rows["DGL, block 1, training accuracy, epochs 16-20, %"][1] == "57.00 ± 1.41"
    assert rows["DGL, block 4, training accuracy, at the end, %"] == [
        "97.26", "93.00", "-4.26", "0", "50 of 50", "1234567"
    ]  # fmt: skip
    assert rows["DGL, block 4, test accuracy, at the end, %"][1] == "83.00"
    assert "Measured: 24 of 180 figures." in text
    assert rows["seed_1, figure34.py:dgl"] == ["1", "20 of 50", "1234567+", "cpu", "2"]
    (missing,) = re.findall("^Not run: .*$", text, re.MULTILINE)
    assert "DGL, Table 1; " in missing and "DGL, Figures 3 and 4 (sequential)" in missing
    page = (tmp_path / "out" / "report.html").read_text()
    assert "47.00 ± 1.41" in page and 'src="data:image/svg+xml;base64,' in page
    drawn = [base64.b64decode(data) for data in re.findall('base64,([^"]*)', page)]
    assert len(drawn) == 2 and all(b"block 4" in svg for svg in drawn)


def test_errors_losses_and_counts_of_the_last_block(tmp_path):
    top1 = {"block_0/top1": lambda epoch: 0.5, "block_3/top1": lambda epoch: 0.9}
    about = {"num_epochs": 10, "done": 10, "train": {}}
    test = top1 | {"ensemble_last_top1": lambda epoch: 0.92}
    _write_run(tmp_path / "runs" / "a", "sedona_cifar10.py:sedona,vgg19", **about, test=test)
    _write_run(tmp_path / "runs" / "b", "table1.py:mlp_sr", **about, test=top1)
    about["done"] = 9  # What is counted comes with the end.
    _write_run(tmp_path / "runs" / "d", "table1.py:cnn", **about, test=top1)
    loss = {"block_3/loss": lambda epoch: 2 - 0.01 * epoch}
    about = {"num_epochs": 1500, "done": 27, "test": top1, "train": loss}
    _write_run(tmp_path / "runs" / "c", "figure2.py:dni", **about)
    rows = _rows(report.make_report(str(tmp_path / "runs"), str(tmp_path / "out")))
    assert rows["VGG-19, SEDONA, test error, %"][:3] == ["11.58", "10.00", "-1.58"]
    together = rows["VGG-19, SEDONA, test error of the last two heads together, %"]
    assert together[:3] == ["", "8.00", ""]
    assert rows["MLP-SR-aux, test accuracy, %"][:2] == ["91.20", "90.00"]
    assert not any(name.startswith("CNN-aux") for name in rows)
    assert rows["MLP-SR-aux, block 3, head's FLOPs by the largest block's, %"][:2] == [
        "4.00",
        "5.00",
    ]
    assert rows["DNI, training loss, epoch 25"][:3] == ["1.668", "1.750", "+0.082"]
    # What the run has reached stands beside the authors' curve.
    assert rows["DNI, training loss, epochs 23-27"][1] == "1.750"
    assert rows["DNI, test accuracy, epochs 23-27, %"][1] == "90.00"


def test_a_block_of_sequential_training_has_epochs_of_its_own(tmp_path):
    """Block 1 of four is at its epoch 20 of 50 after 70 epochs; the last has not begun."""
    train = test = _of_blocks("top1", lambda epoch: 0.01 * epoch)
    about = {"num_epochs": 50, "done": 70, "train": train, "test": test}
    _write_run(tmp_path / "runs" / "a", "figure34.py:sequential", **about)
    rows = _rows(report.make_report(str(tmp_path / "runs"), str(tmp_path / "out")))
    assert rows["sequential, block 1, test accuracy, at the end, %"][1] == "50.00"
    row = rows["sequential, block 2, training accuracy, epochs 16-20, %"]
    assert (row[1], row[4]) == ("69.00", "20 of 50")
    assert not any(name.startswith("sequential, block 4") for name in rows)
    assert rows["a, figure34.py:sequential"][1] == "0 of 50"
    (run,) = report.read_runs(tmp_path / "runs")
    for block, done in ((1, 50), (2, 20), (4, 0)):
        curve = report.curve(run, "test accuracy", block)
        assert list(curve) == list(range(1, done + 1)), block


def test_what_enters(tmp_path):
    train = test = _of_blocks("top1", lambda epoch: 0.5)
    about = {"num_epochs": 50, "train": train, "test": test}
    _write_run(tmp_path / "runs" / "other", "figure34.py:dgl", **about, done=50,
               learning_rate_of_optimizer=0.05)  # fmt: skip
    text = report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    assert "Measured: 0 of 180 figures." in text and "run: other." in text and "50.00" not in text

    # What may change on resume does not count, nor do fields that the run is older than.
    folder = tmp_path / "runs" / "same"
    _write_run(folder, "figure34.py:dgl", **about, done=12, kind_of_placement="pipelined",
               every_epochs_of_eval=2.0)  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    del config["replay"], config["network"]["scan_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    # The last lines of an epoch that is not whole are not an epoch.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 12 * _STEPS + 20, "train/block_0/top1": 0.9}) + "\n")
    text = report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    rows = _rows(text)
    assert rows["DGL, block 1, training accuracy, epochs 8-12, %"][1:2] == ["50.00"]
    assert rows["DGL, block 1, training accuracy, epochs 8-12, %"][4] == "12 of 50"
    assert "Measured: 0 of 180 figures." in text

    # Of one seed's two runs the longer one enters.
    _write_run(tmp_path / "runs" / "again", "figure34.py:dgl", **about, done=15)
    text = report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    assert "Measured: 8 of 180 figures." in text and "run: other, same." in text


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="must be a folder of runs; try experiments/results/runs"):
        report.make_report(str(tmp_path / "none"), str(tmp_path / "out"))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        report.make_report(str(tmp_path / "runs"), str(tmp_path / "out"))


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path):
    results = _EXPERIMENTS / "results"
    report.make_report(str(results / "runs"), str(tmp_path))
    pictures = re.compile('base64,[^"]*')  # Another version of matplotlib draws other ones.
    for name in ("report.md", "report.html"):
        made, committed = ((folder / name).read_text() for folder in (tmp_path, results / "report"))
        assert pictures.sub("", made) == pictures.sub("", committed), name
    assert sorted(os.listdir(results / "report")) == ["report.html", "report.md"]
