"""Random groupings: every one equally probable, and the script that trains and ranks them."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dgl_jax.errors import UserError
from dgl_jax.sedona.random_groupings import count_groupings, draw_groupings
from dgl_jax.tables import random_search_table

_ROOT = pathlib.Path(__file__).parents[1]


def test_all_groupings_are_drawn_once_and_the_first_ones_do_not_depend_on_how_many():
    drawn = list(draw_groupings(5, 3, ("a", "b"), seed=0))
    ways = itertools.combinations(range(4), 2)
    every = set(itertools.product(ways, itertools.product("ab", repeat=2)))
    assert len(drawn) == len(every) == count_groupings(5, 3, 2) and set(drawn) == every
    assert list(itertools.islice(draw_groupings(5, 3, ("a", "b"), seed=0), 4)) == drawn[:4]
    assert list(draw_groupings(5, 3, ("a", "b"), seed=1)) != drawn
    assert list(draw_groupings(5, 1, ("a", "b"), seed=0)) == [((), ())]
    with pytest.raises(UserError, match="num_blocks=6 must be between 1 and the network's 5"):
        next(draw_groupings(5, 6, ("a",), seed=0))


def test_each_grouping_is_equally_probable():
    firsts = [next(draw_groupings(4, 3, ("a", "b"), seed)) for seed in range(3000)]
    counts = collections.Counter(firsts)
    # Twelve of them: 250 of each expected, standard deviation 15.
    assert len(counts) == 12 and 180 < min(counts.values()) and max(counts.values()) < 320


def test_the_table():
    trial = {"trial": 3, "cuts": (0, 2), "heads": ("a", "b"), "validation_top1": 0.5,
             "test_top1": 0.25, "ensemble_last_top1": 0.125, "wall_seconds": 9.6}  # fmt: skip
    row = random_search_table([trial]).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["3", "0, 2", "a, b", "50.00", "25.00", "12.50", "10"]


def _search(arrays_path, workdir, *arguments):
    fields = {
        "data.name": "arrays",
        "data.data_dir": arrays_path,
        "data.crop_padding": 1,
        "data.validation_fraction": 0.2,
        "network.width_factor": 0.0625,
        "train.batch_size": 24,
        "train.num_epochs": 1.0,
        "eval.batch_size": 25,
        "eval.time_blocks": False,
    }
    return subprocess.run(
        [sys.executable, "experiments/random_search.py",
         "--config=experiments/configs/quickstart.py", f"--workdir={workdir}",
         *(f"--config.{name}={value}" for name, value in fields.items()), *arguments],
        check=False, capture_output=True, text=True, timeout=900, cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_trials_from_the_command_line(arrays_path, tmp_path):
    candidates = ("pred", "sepconv_1")
    arguments = ("--num_blocks=2", f"--candidates={','.join(candidates)}", "--seed=1")
    result = _search(arrays_path, tmp_path, *arguments, "--trials=2")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "random_search.json").read_text())
    trials = found["trials"]
    expected = list(itertools.islice(draw_groupings(4, 2, candidates, seed=1), 3))
    by_number = sorted(trials, key=lambda trial: trial["trial"])
    assert [(tuple(t["cuts"]), tuple(t["heads"])) for t in by_number] == expected[:2]
    assert trials[0]["validation_top1"] >= trials[1]["validation_top1"]
    assert found["wall_seconds"] == sum(trial["wall_seconds"] for trial in trials)
    for trial in trials:
        folder = tmp_path / f"trial_{trial['trial']:03}"
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["cuts"], summary["heads"]) == (trial["cuts"], trial["heads"])
        assert summary["validation_top1"][-1] == trial["validation_top1"]
        assert summary["test_top1"][-1] == trial["test_top1"]
        assert summary["ensemble_last_top1"] == trial["ensemble_last_top1"]
    text = (tmp_path / "random_search.md").read_text()
    assert text.strip() == result.stdout.strip() and random_search_table(trials) in text

    # What is finished is not run again, and counts for the budget: one more trial fits.
    outputs = [tmp_path / f"trial_00{trial}" / "output.txt" for trial in range(3)]
    before = [path.stat().st_mtime_ns for path in outputs[:2]]
    budget = found["wall_seconds"] + 1e-3
    result = _search(arrays_path, tmp_path, *arguments, f"--budget_seconds={budget}")
    assert result.returncode == 0, result.stderr
    assert [path.stat().st_mtime_ns for path in outputs[:2]] == before and outputs[2].exists()
    found = json.loads((tmp_path / "random_search.json").read_text())
    assert len(found["trials"]) == 3 and found["wall_seconds"] > budget
    result = _search(arrays_path, tmp_path, "--num_blocks=3", "--trials=1")
    assert result.returncode == 2 and "but workdir=" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--trials=2",), "--num_blocks=None must be at least 2"),
        (("--num_blocks=2",), "give one of --trials=N and --budget_seconds=X"),
        (("--num_blocks=2", "--trials=0"), "--trials=0 must be above 0"),
        (("--num_blocks=2", "--trials=13"), "--trials=13 is more than the 12 groupings"),
        (("--num_blocks=2", "--trials=1", "--config.data.validation_fraction=0.0"), "try 0.1"),
        (("--num_blocks=2", "--trials=1", "--candidates=x"), "auxiliary.name=x is unknown"),
        (("--num_blocks=2", "--trials=1", "--config.method.name=ddg"), "ddg have none"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_found_before_the_first_run(arguments, message, arrays_path, tmp_path):
    result = _search(arrays_path, tmp_path / "new", *arguments)
    assert result.returncode == 2 and message in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and not (tmp_path / "new").exists()
