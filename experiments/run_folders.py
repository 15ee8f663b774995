"""What was run: finished run folders, and which figure of `evidence.py` each counts for."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.config import ONE_BLOCK_METHODS, Config, from_dict
from dgl_jax.data.statistics import PUBLISHED
from dgl_jax.errors import UserError
from dgl_jax.metrics import read_metrics
from dgl_jax.optim import make_schedule

FULL = "full"
# Sections and fields that change nothing that is learned, or rounding at most.
NOT_LEARNED = (
    "seed", "trace", "profile", "placement", "checkpoint",
    "eval.every_epochs", "eval.batch_size", "eval.log_drift", "eval.time_blocks",
    "train.log_every_steps", "train.log_gradient_norm", "train.steps_per_call",
    "train.remat_blocks", "network.scan_layers", "data.data_dir", "data.num_workers",
)  # fmt: skip
# In a shorter run of the same setting these differ.
_LENGTH = ("train.num_epochs", "train.num_steps", "optimizer.drop_epochs")

_EMBEDDED = "embedded (a part of Fashion-MNIST)"

Settings = frozenset[tuple[str, Any]]  # (field, value).


class Run(NamedTuple):
    """A finished run; `folder` is below --runs."""

    folder: str
    path: pathlib.Path
    config: Config
    settings: Settings
    summary: Mapping[str, Any]
    updates: int  # Of each block.
    classifiers: Sequence[int]


def learned(config: Config) -> Settings:
    """The fields that decide what is learned, seed apart: a row's runs all have the row's.

    Without `NOT_LEARNED`. A set's own mean and deviation are written out. Images of `arrays` are
    the set that their file is named after, such as cifar10.npz; of a search's file its folder's
    and its own name count. Backprop has no cuts and heads, and data_parallel is backprop. Where no
    block is slowed down, it does not matter which.
    """
    sections = dataclasses.asdict(config)
    data, partition, replay = (sections[name] for name in ("data", "partition", "replay"))
    if data["name"] == "arrays":
        data["name"] = pathlib.PurePath(data["data_dir"]).stem
    own = PUBLISHED.get(data["name"].partition("/")[0], ((), ()))
    data["mean"], data["std"] = data["mean"] or own[0], data["std"] or own[1]
    partition["from_search"] = "/".join(pathlib.PurePath(partition["from_search"]).parts[-2:])
    if replay["slowdown"] == 1:
        replay["slow_block"] = 0
    if config.method.name in ONE_BLOCK_METHODS:
        sections |= {"method": {"name": "backprop"}, "partition": {}, "auxiliary": {}}
    return frozenset(
        (f"{section}.{field}", value)
        for section, fields in sections.items()
        if section not in NOT_LEARNED
        for field, value in fields.items()
        if f"{section}.{field}" not in NOT_LEARNED
    )


def read_runs(root: pathlib.Path) -> tuple[list[Run], dict[str, str]]:
    """All finished runs below a folder by name; and of the other folders, why they are none.

    Raises:
      UserError: there is no such folder, or a run's file can't be understood.
    """
    if not root.is_dir():
        raise UserError(f"--runs={root} must be a folder of runs; try experiments/results/runs")
    paths = {path.parent for name in ("config", "summary") for path in root.rglob(f"{name}.json")}
    runs, others = [], {}
    for path in sorted(paths):
        folder = path.relative_to(root).as_posix()
        fields, summary = _read(path / "config.json"), _read(path / "summary.json")
        if not fields or "search" in fields:
            others[folder] = "a search" if fields else "no config.json"
        elif summary.get("finished") is not True:
            others[folder] = "not finished"
        else:
            fields.pop("resolved", None)
            try:
                config = from_dict(fields)
            except UserError as error:
                raise _broken(path / "config.json", str(error)) from error
            _check_summary(path / "summary.json", summary)
            # Older runs have neither of these: their blocks went together, and all classified.
            updates = summary.get("updates_per_block", summary["steps"])
            classifiers = summary.get("classifiers", range(len(summary["test_top1"])))
            settings = learned(config)
            runs.append(Run(folder, path, config, settings, summary, updates, classifiers))
    return runs, others


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise _broken(path, f"cannot be parsed ({error})") from error
    if not isinstance(content, dict):
        raise _broken(path, "must be one JSON object")
    return content


def _check_summary(path: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """That what is taken from it are numbers, or lists of numbers, one a block."""
    fractions = ("test_top1", "test_top5", "ensemble_last_top1")
    later = [name for name in ("block_flops", "head_flops") if name in summary]
    for name in (*fractions, "aux_flops_ratio", "epochs", "steps", *later):
        value, most = summary.get(name), 1 if name in fractions else math.inf
        is_list = name.startswith(("test", "aux", *later))
        is_length = name in ("epochs", "steps")  # One divides by them.
        numbers = value if is_list else [value]
        if not (isinstance(numbers, list) and numbers) or not all(
            type(x) in (int, float) and 0 <= x <= most and (x or not is_length) for x in numbers
        ):
            rule = f"{'numbers' if is_list else 'a number'} {'above' if is_length else 'from'} 0"
            raise _broken(path, f"{name}={value!r} must be {rule}{' to 1' * (most == 1)}")


def _broken(path: pathlib.Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; run it again, or take its folder out of --runs")


def group(row: evidence.Row, runs: Sequence[Run]) -> dict[str, dict[tuple[str, int], list[Run]]]:
    """A row's runs by setting: FULL, a word of `row.short`, or such as "8 of 50 epochs".

    The last is the full setting but for the length and where the rate drops, or the summary says
    that it ended early. Longer runs are not the row's.

    Returns:
      For each setting the runs by configuration and seed, of which the first counts.
    """
    wanted = {}
    for short in ("", *row.short):
        for name in evidence.configurations(row, short):
            wanted.setdefault(learned(evidence.load(name)), (short or FULL, name))
    full = {_any_length(s): name for s, (setting, name) in wanted.items() if setting == FULL}
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        setting, name = wanted.get(run.settings, (None, full.get(_any_length(run.settings))))
        if name and setting in (None, FULL):
            train, epochs = evidence.load(name).train, run.summary["epochs"]
            if run.updates < (train.num_steps or round(train.num_epochs * run.updates / epochs)):
                setting = f"{epochs:.4g} of {train.num_epochs:g} epochs"
                if train.num_steps:
                    setting = f"{run.updates} of {train.num_steps} steps"
        if setting:
            groups[setting][name, run.config.seed].append(run)
    return groups


def _any_length(settings: Settings) -> Settings:
    return frozenset((field, value) for field, value in settings if field not in _LENGTH)


def settings_of(rows: Iterable[evidence.Row]) -> dict[str, str]:
    """By setting, FULL or a word, what the rows' runs train on what, and how long.

    Example: {"full": "cifar10, cnn4, 50 epochs", "short": "embedded (a part of Fashion-MNIST), ..."}.
    """
    found = collections.defaultdict(list)
    for row in rows:
        for short in ("", *row.short):
            found[short or FULL] += map(evidence.load, evidence.configurations(row, short))
    return {setting: _about(configs) for setting, configs in found.items()}


def _about(configs: Sequence[Config]) -> str:
    lengths = (
        f"{c.train.num_steps:,} steps" if c.train.num_steps else f"{c.train.num_epochs:g} epochs"
        for c in configs
    )
    networks = (
        f"{n.name} x {n.width_factor:g}" if n.width_factor != 1 else n.name
        for n in (c.network for c in configs)
    )
    sets = (_EMBEDDED if c.data.name == "embedded" else c.data.name for c in configs)
    return ", ".join("/".join(dict.fromkeys(part)) for part in (sets, networks, lengths))


def learning_curve(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, test accuracy in %) of a block, -1 for the last.

    Of runs in which all blocks learn together, or (sequential) one after the other.
    """
    block = run.classifiers[block] if block < 0 else block
    curve = _curve(run, block, _metrics(run), f"test/block_{block}/top1")
    return [(epoch, 100 * top1) for epoch, top1 in curve]


def input_drift(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, distance of its inputs' density from the final one), from 1 on.

    Empty unless the run had config.eval.log_drift.
    """
    path = run.path / "drift.json"
    lines = json.loads(path.read_text()) if path.exists() else []
    return _curve(run, block, lines, f"block_{block - 1}")


def gradient_sum(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, sum of learning rate times squared gradient norm) of a block.

    Empty unless the run had config.train.log_gradient_norm.
    """
    key = f"train/block_{block}/sum_learning_rate_gradient_norm_squared"
    return _curve(run, block, _metrics(run), key)


def rate_sum(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of a block's own updates, sum of the learning rates), by the run's configuration.

    Of DGL, whose blocks share it. At the steps of the gradient_sum that one compares it with.
    """
    del block
    steps_per_epoch = round(run.updates / run.summary["epochs"])
    schedule = make_schedule(run.config.optimizer, run.updates, steps_per_epoch)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(run.updates)), np.float64)
    sums = np.cumsum(rates)
    epochs = [epoch for epoch, _ in gradient_sum(run, 0)]
    return [(epoch, float(sums[round(epoch * steps_per_epoch) - 1])) for epoch in epochs]


def train_loss(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, loss on its training batches) of a block, -1 for the last."""
    block = run.classifiers[block] if block < 0 else block
    return _curve(run, block, _metrics(run), f"train/block_{block}/loss")


def mean_top1(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, mean of its test accuracies in % up to there) of a block."""
    curve = learning_curve(run, block)
    sums = itertools.accumulate(top1 for _, top1 in curve)
    return [(epoch, total / n) for n, ((epoch, _), total) in enumerate(zip(curve, sums), start=1)]


CURVES = {
    "input_drift": input_drift, "gradient_sum": gradient_sum, "rate_sum": rate_sum,
    "test_top1": learning_curve, "mean_top1": mean_top1, "train_loss": train_loss,
}  # fmt: skip


def _network_flops(summary: Mapping[str, Any]) -> float:
    """Of a forward pass: of all blocks' layers, and of the last head, which is the network's own."""
    return sum(summary["block_flops"]) + summary["head_flops"][-1]


# What is counted of a run's network, from its summary. A multiply-add is two operations.
COUNTS = {
    "costliest_head_by_block": lambda summary: (
        max(summary["head_flops"][:-1]) / max(summary["block_flops"])
    ),
    "costliest_head": lambda summary: max(summary["head_flops"][:-1]) / _network_flops(summary),
    "all_heads": lambda summary: sum(summary["head_flops"][:-1]) / _network_flops(summary),
    "network_multiply_adds": lambda summary: _network_flops(summary) / 2e9,
    "head_multiply_adds": lambda summary: sum(summary["head_flops"][:-1]) / 2e9,
}


def _metrics(run: Run) -> list[dict[str, Any]]:
    return read_metrics(str(run.path / "metrics.jsonl"))


def _curve(
    run: Run, block: int, lines: Sequence[Mapping[str, Any]], key: str
) -> list[tuple[float, float]]:
    """What the lines of the block's own updates say, over its epochs."""
    first = block * run.updates if run.config.method.name == "sequential" else 0
    steps_per_epoch = run.updates / run.summary["epochs"]
    lines = [line for line in lines if key in line and 0 < line["step"] - first <= run.updates]
    return [((line["step"] - first) / steps_per_epoch, line[key]) for line in lines]


def value_of(row: evidence.Row, run: Run) -> float | None:
    """A row's number in one run; None if the run has none, or not within half an epoch."""
    if row.share is not None:
        curve = CURVES[row.quantity](run, row.block)
        epoch = row.share * run.summary["epochs"]
        if row.unit == evidence.ACCURACY:  # A rate may drop there: not after it.
            curve = [(x, top1) for x, top1 in curve if x <= epoch + 1e-6]
        value = _at(epoch, curve)
        is_part = value is not None and row.unit == evidence.PART
        return 100 * value / curve[-1][1] if is_part else value
    if row.epoch is not None:
        return _at(row.epoch, learning_curve(run, row.block))
    if row.tail is not None:
        begin = (1 - row.tail) * run.summary["epochs"] + 1e-6
        curve = CURVES[row.quantity](run, row.block)
        tail = [value for epoch, value in curve if epoch > begin]
        if tail:
            return statistics.fmean(tail)
    if row.unit in evidence.COUNTED:
        return _counted(row, run.summary)
    if row.quantity not in run.summary:
        return None
    value = run.summary[row.quantity]
    if isinstance(value, list):
        value = value[list(run.classifiers).index(row.block) if row.block >= 0 else -1]
    return 100 - 100 * value if row.unit == evidence.ERROR else 100 * value


def _counted(row: evidence.Row, summary: Mapping[str, Any]) -> float | None:
    """What needs no training; None of a network without heads, and of older summaries."""
    if row.quantity in COUNTS:
        if len(summary.get("head_flops", ())) < 2:
            return None
        value = COUNTS[row.quantity](summary)
        return value if row.unit == evidence.GIGA else 100 * value
    of_blocks = summary[row.quantity]  # Of every block, whether it classifies or not.
    return 100 * of_blocks[row.block] if row.block < len(of_blocks) else None


def _at(epoch: float, curve: Sequence[tuple[float, float]]) -> float | None:
    nearest = min(curve, key=lambda xy: abs(xy[0] - epoch), default=(math.inf, 0.0))
    return nearest[1] if abs(nearest[0] - epoch) < 0.5 else None


def point(
    row: evidence.Row, members: Mapping[tuple[str, int], Sequence[Run]]
) -> dict[str, Any] | None:
    """The mean over seeds, with the standard deviation of a sample (None for one seed).

    A seed's value is the mean over its configurations, such as the blocks that are slowed down,
    which share what the seed decides; a seed of which fewer ran than of another does not count. Of
    a configuration and seed that ran several times the first run counts that has the number.
    """
    by_seed = collections.defaultdict(list)
    for (name, seed), same in sorted(members.items()):
        values = ((run, value_of(row, run)) for run in same)
        known = [(name, run, round(value, 6)) for run, value in values if value is not None]
        by_seed[seed] += known[:1]
    most = max(map(len, by_seed.values()), default=0)
    if not most:
        return None
    by_seed = {seed: found for seed, found in sorted(by_seed.items()) if len(found) == most}
    means = [statistics.fmean(value for _, _, value in found) for found in by_seed.values()]
    found = [(seed, *one) for seed, same in by_seed.items() for one in same]
    return {
        "mean": round(statistics.fmean(means), 6),
        "deviation": round(statistics.stdev(means), 6) if len(means) > 1 else None,
        "seeds": len(means),
        "epochs": round(statistics.fmean(run.summary["epochs"] for _, _, run, _ in found), 2),
        "devices": sorted({str(run.summary.get("device_kind")) for _, _, run, _ in found}),
        "runs": [
            {"folder": run.folder, "configuration": name, "seed": seed, "value": value}
            for seed, name, run, value in found
        ],
    }
