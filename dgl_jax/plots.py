"""Pictures: a run's learning curves per block and accuracy by depth; methods side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from dgl_jax.metrics import read_metrics

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 120,
    "savefig.bbox": "tight",
}


def plot_run(workdir: str, summary: dict) -> None:
    """Draws learning_curves.png and accuracy_by_depth.png from a run's metrics and summary."""
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    matplotlib.use("Agg")
    with plt.rc_context(STYLE):
        _plot_learning_curves(workdir, summary, lines)
        _plot_accuracy_by_depth(workdir, summary, lines)
        if os.path.exists(os.path.join(workdir, "drift.json")):
            _plot_theorem(workdir, summary, lines)


def plot_comparison(path: str, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws each method's accuracy: the mean over seeds with its deviation, and each seed.

    Args:
      path: of the PNG.
      rows: of `tables.comparison_row`; those without a finished run are named, without a dot.
      title: of the picture.
    """
    matplotlib.use("Agg")
    with plt.rc_context(STYLE | {"axes.grid.axis": "x", "axes.spines.left": False}):
        figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(rows)))
        for place, row in enumerate(rows):
            text = "failed"
            if row["seeds"]:
                accuracy = row["top1"][-1]
                mean, deviation = 100 * accuracy["mean"], 100 * accuracy["deviation"]
                axes.errorbar(mean, place, xerr=deviation, fmt="o", ms=6, capsize=3, color="C0")
                runs = [100 * value for value in accuracy["runs"]]
                if len(runs) > 1:
                    axes.plot(runs, [place + 0.25] * len(runs), "o", ms=3, color="0.6")
                text = f"{mean:.1f} ± {deviation:.1f}" if len(runs) > 1 else f"{mean:.1f}"
            axes.annotate(
                text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9
            )
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.set_xlabel(
            "test top-1 accuracy of the last block, %\n(mean, standard deviation; grey: each seed)"
        )
        axes.set_title(title, fontsize=11)
        figure.savefig(path)
        plt.close(figure)


def _plot_learning_curves(workdir: str, summary: dict, lines: list[dict]) -> None:
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4))
    steps_per_epoch = summary["steps"] / summary["epochs"]
    for block in range(summary["num_blocks"]):
        color = _color(block, summary["num_blocks"])
        for axes, name, scale in ((loss_axes, "loss", 1), (accuracy_axes, "top1", 100)):
            for split, style in (("train", {"alpha": 0.35}), ("test", {"marker": "o", "ms": 3})):
                key = f"{split}/block_{block}/{name}"
                points = [
                    (line["step"] / steps_per_epoch, scale * line[key])
                    for line in lines
                    if key in line
                ]
                label = f"block {block}" if split == "test" else None
                if points:  # A block without a classifier has no accuracy.
                    axes.plot(*zip(*points), color=color, label=label, **style)
    loss_axes.set(xlabel="epoch", ylabel="local loss (train), cross-entropy (test: dots)")
    accuracy_axes.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    accuracy_axes.legend(frameon=False, fontsize="small", ncols=1 + summary["num_blocks"] // 9)
    figure.suptitle(_title(summary))
    figure.savefig(os.path.join(workdir, "learning_curves.png"))
    plt.close(figure)


def _plot_accuracy_by_depth(workdir: str, summary: dict, lines: list[dict]) -> None:
    """One curve an evaluation, from light (early) to dark (late): Figure 4 of the DGL paper."""
    figure, axes = plt.subplots(figsize=(6, 4))
    blocks = summary["classifiers"]
    evaluations = [line for line in lines if f"test/block_{blocks[0]}/top1" in line]
    shown = evaluations[:: max(1, len(evaluations) // 8)]
    if shown[-1] is not evaluations[-1]:
        shown.append(evaluations[-1])
    steps_per_epoch = summary["steps"] / summary["epochs"]
    for place, line in enumerate(shown):
        accuracies = [100 * line[f"test/block_{block}/top1"] for block in blocks]
        axes.plot(
            blocks,
            accuracies,
            "o-",
            color=plt.get_cmap("viridis_r")((place + 1) / len(shown)),
            label=f"epoch {line['step'] / steps_per_epoch:.3g}",
        )
    axes.set(xlabel="block", ylabel="test top-1 accuracy, %", xticks=blocks)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(_title(summary))
    figure.savefig(os.path.join(workdir, "accuracy_by_depth.png"))
    plt.close(figure)


def _plot_theorem(workdir: str, summary: dict, lines: list[dict]) -> None:
    """The two quantities of the convergence theorem (DGL, Proposition 3.1)."""
    with open(os.path.join(workdir, "drift.json")) as file:
        drift = json.load(file)
    figure, (drift_axes, norm_axes) = plt.subplots(1, 2, figsize=(11, 4))
    steps_per_epoch = summary["steps"] / summary["epochs"]
    for block in range(summary["num_blocks"]):
        color = _color(block, summary["num_blocks"])
        epochs = [row["step"] / steps_per_epoch for row in drift]
        distances = [row[f"block_{block}"] for row in drift]
        drift_axes.plot(epochs, distances, "o-", ms=3, color=color, label=f"block {block}")
        key = f"train/block_{block}/sum_learning_rate_gradient_norm_squared"
        points = [(line["step"] / steps_per_epoch, line[key]) for line in lines if key in line]
        if points:
            norm_axes.plot(*zip(*points), color=color)
    drift_axes.set(xlabel="epoch", ylabel="distance of the output's density from the final one")
    norm_axes.set(xlabel="epoch", ylabel="sum of learning rate x squared gradient norm")
    drift_axes.legend(frameon=False, fontsize="small")
    figure.suptitle(_title(summary))
    figure.savefig(os.path.join(workdir, "theorem.png"))
    plt.close(figure)


def _title(summary: dict) -> str:
    return (
        f"{summary['method']}, {summary['network']} on {summary['dataset']}, "
        f"{summary['num_blocks']} block(s)"
    )


def _color(block: int, num_blocks: int):
    return plt.get_cmap("viridis")(0.9 * block / max(1, num_blocks - 1))
