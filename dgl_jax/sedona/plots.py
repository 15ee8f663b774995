"""Pictures of a search: what became of the decision variables, and the groupings they give."""

import os
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from dgl_jax.metrics import read_metrics
from dgl_jax.plots import STYLE
from dgl_jax.sedona.discretise import NEAR_TIE

_BLOCK_COLORS = ("#a6c8e4", "#f3c99b")


def plot_search(workdir: str, summary: dict) -> None:
    """Draws a search's alpha.png, beta.png, validation_loss.png and groupings.png.

    What there are no numbers for is left out: beta.png where there is one candidate only, alpha
    and beta of a search that was stopped before its first outer step.

    Args:
      workdir: the search's folder, with its metrics.jsonl; gets the pictures.
      summary: the search's; of its keys the pictures take ``network``, ``dataset``,
        ``num_layers``, ``candidates``, ``pretraining_steps``, ``groupings`` and ``layer_flops``.
    """
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    search = [line for line in lines if "search/layer_0/local" in line]
    pretraining = [line for line in lines if "pretrain/layer_0/loss" in line]
    matplotlib.use("Agg")
    with plt.rc_context(STYLE):
        if search:
            _plot_alpha(workdir, summary, search)
        if search and len(summary["candidates"]) > 1:
            _plot_beta(workdir, summary, search)
        if search or pretraining:
            _plot_losses(workdir, summary, pretraining, search)
        if summary.get("groupings"):
            _plot_groupings(workdir, summary)


def _plot_alpha(workdir: str, summary: dict, lines: list[dict]) -> None:
    """P(local) of every place over the outer steps; the last ones, and the cuts they give."""
    places = summary["num_layers"] - 1
    groupings = sorted((int(k), grouping) for k, grouping in summary.get("groupings", {}).items())
    figure, (map_axes, bar_axes, cut_axes) = plt.subplots(
        1,
        3,
        sharey=True,
        figsize=(10, _height(places)),
        width_ratios=(6, 1.3, 0.1 + 0.22 * max(1, len(groupings))),
        layout="constrained",
    )
    values = np.array([[line[f"search/layer_{j}/local"] for line in lines] for j in range(places)])
    colors = {"cmap": "RdBu_r", "vmin": 0, "vmax": 1}
    mesh = _heat_map(map_axes, summary, lines, values, **colors)
    map_axes.set_ylabel("layer")
    figure.colorbar(mesh, ax=map_axes, location="left", pad=0.02, label="P(local)", aspect=30)

    last = values[:, -1]
    bar_axes.barh(range(places), last, color=mesh.cmap(last), edgecolor="0.4", linewidth=0.5)
    bar_axes.axvline(0.5, color="0.2", linewidth=0.8, linestyle=":", zorder=3)
    bar_axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="P(local)\nat the end")
    bar_axes.set_xticklabels(("0", "0.5", "1"))
    for x, (_, grouping) in enumerate(groupings):
        cut_axes.plot([x] * len(grouping["cuts"]), grouping["cuts"], "s", color="0.2", ms=5)
    cut_axes.set(xlim=(-0.6, max(1, len(groupings)) - 0.4), xlabel="cuts\nfor K =")
    cut_axes.set_xticks(range(len(groupings)), [str(k) for k, _ in groupings])
    for axes in (bar_axes, cut_axes):
        axes.tick_params(axis="y", length=0)
    figure.suptitle(f"Weight of the local signal: {_title(summary)}", fontsize=12)
    _save(figure, workdir, "alpha.png")


def _plot_beta(workdir: str, summary: dict, lines: list[dict]) -> None:
    """One heat map a candidate, on one scale of colours."""
    names, places = summary["candidates"], summary["num_layers"] - 1
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2 + 2.6 * columns, 0.3 + rows * (0.2 + 0.8 * _height(places))),
        layout="constrained",
    )
    for index, (name, map_axes) in enumerate(zip(names, axes.flat)):
        values = [[line[f"search/layer_{j}/head_{index}"] for line in lines] for j in range(places)]
        mesh = _heat_map(map_axes, summary, lines, np.array(values), cmap="viridis", vmin=0, vmax=1)
        map_axes.set_title(name, fontsize=10)
    for map_axes in axes.flat[len(names) :]:
        map_axes.set_visible(False)
    for map_axes in axes[:, 0]:
        map_axes.set_ylabel("layer")
    figure.colorbar(mesh, ax=axes, label="weight of the head", aspect=30)
    figure.suptitle(f"Weights of the candidate heads: {_title(summary)}", fontsize=12)
    _save(figure, workdir, "beta.png")


def _plot_losses(workdir: str, summary: dict, pretraining: list[dict], search: list[dict]) -> None:
    panels = bool(pretraining) + 2 * bool(search)
    figure, axes = plt.subplots(
        1, panels, squeeze=False, figsize=(1 + 4.3 * panels, 3.8), layout="constrained"
    )
    axes = list(axes[0])
    if pretraining:
        layer_axes, num_layers = axes.pop(0), summary["num_layers"]
        depths = matplotlib.cm.ScalarMappable(
            plt.Normalize(0, num_layers - 1), plt.get_cmap("viridis")
        )
        steps = [line["step"] for line in pretraining]
        for j in range(num_layers):
            losses = _running_median([line[f"pretrain/layer_{j}/loss"] for line in pretraining])
            layer_axes.plot(steps, losses, color=depths.to_rgba(j), linewidth=1)
        figure.colorbar(
            depths, ax=layer_axes, label="layer", pad=0.02, ticks=MaxNLocator(integer=True)
        )
        layer_axes.set(xlabel="pretraining step", ylabel="local loss (running median)")
        layer_axes.set_title("pretraining", fontsize=10)
    if search:
        loss_axes, accuracy_axes = axes
        losses = {"validation": "C0", "training, in the inner steps": "C1"}
        for (label, color), name in zip(losses.items(), ("validation_loss", "loss")):
            _raw_and_median(loss_axes, summary, search, name, 1, color, label)
        _raw_and_median(accuracy_axes, summary, search, "validation_top1", 100, "C0")
        loss_axes.set(xlabel="outer step", ylabel="loss of the last layer")
        loss_axes.legend(frameon=False, fontsize="small")
        accuracy_axes.set(xlabel="outer step", ylabel="validation top-1 accuracy, %")
        for search_axes in (loss_axes, accuracy_axes):
            search_axes.set_title("search (thick: running median)", fontsize=10)
    figure.suptitle(_title(summary), fontsize=12)
    _save(figure, workdir, "validation_loss.png")


def _plot_groupings(workdir: str, summary: dict) -> None:
    """For each K the layers as boxes, as wide as their share of the FLOPs, with the heads."""
    groupings = sorted((int(k), grouping) for k, grouping in summary["groupings"].items())
    flops = np.array(summary["layer_flops"], float)
    num_layers = len(flops)
    inches = max(8.0, 0.23 * num_layers)
    # No box is narrower than 0.6 of the mean one, so that all can be seen and numbered.
    widths = inches * np.maximum(flops / flops.sum(), 0.6 / num_layers)
    widths *= inches / widths.sum()
    gap, text_size = 0.1, 6 if num_layers > 24 else 8

    # Names stand upright where they would run into each other.
    ends = np.cumsum(widths)
    distances = [
        end - start
        for _, grouping in groupings
        for start, end in zip(ends[grouping["cuts"][:-1]], ends[grouping["cuts"][1:]])
    ]
    longest = max((len(name) for _, grouping in groupings for name in grouping["heads"]), default=0)
    upright = min(distances, default=inches) + gap < 0.085 * longest
    row_inches = 0.95 + (0.08 * longest if upright else 0.0)

    right = inches + gap * (max(k for k, _ in groupings) - 1)
    figure, axes = plt.subplots(figsize=(right + 2.2, row_inches * len(groupings)))
    for row, (num_blocks, grouping) in enumerate(groupings):
        top = -row * row_inches
        cuts = grouping["cuts"]
        left, block, block_left, block_first = 0.0, 0, 0.0, 0
        axes.text(-0.15, top, f"K = {num_blocks}", ha="right", va="center", fontsize=11)
        for layer, width in enumerate(widths):
            color = _BLOCK_COLORS[block % 2]
            axes.add_patch(
                plt.Rectangle((left, top - 0.16), width, 0.32, fc=color, ec="white", lw=0.8)
            )
            axes.text(
                left + width / 2, top, str(layer), ha="center", va="center", fontsize=text_size
            )
            left += width
            if layer in cuts or layer == num_layers - 1:
                share = 100 * flops[block_first : layer + 1].sum() / flops.sum()
                axes.text(
                    (block_left + left) / 2,
                    top + 0.2,
                    f"{share:.0f}" if share >= 0.5 else "<1",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color="0.35",
                )
            if layer in cuts:
                axes.plot([left + gap / 2] * 2, [top - 0.24, top + 0.18], color="0.2", lw=1)
                axes.text(
                    left + gap / 2,
                    top - 0.27,
                    grouping["heads"][block],
                    ha="center",
                    va="top",
                    fontsize=8,
                    rotation=90 if upright else 0,
                )
                left, block = left + gap, block + 1
                block_left, block_first = left, layer + 1
        axes.text(
            right + 0.2, top, _margin_text(grouping["margin"]), va="center", fontsize=9,
            linespacing=1.4,
        )  # fmt: skip
    axes.set(xlim=(-0.8, right + 1.4), ylim=(-row_inches * (len(groupings) - 0.4), 0.55))
    axes.axis("off")
    axes.set_title(
        f"{_title(summary)}\nabove each block its share of the forward FLOPs in %; "
        "below each cut its head",
        fontsize=10,
    )
    _save(figure, workdir, "groupings.png")


def _margin_text(margin: float | None) -> str:
    if margin is None:
        return "no other choice"
    return f"margin {margin:.2g}" + ("\nnear-tie" if margin < NEAR_TIE else "")


def _heat_map(axes, summary: dict, lines: list[dict], values: np.ndarray, **colors):
    """Values [places, lines]; each line's column reaches from the step of the line before."""
    # A first line at step 0 needs some width, too.
    steps = _outer_steps(summary, lines)
    edges = [min(0, steps[0] - 1), *steps]
    mesh = axes.pcolormesh(edges, np.arange(len(values) + 1) - 0.5, values, **colors)
    axes.grid(False)
    axes.set(xlabel="outer step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(11, integer=True))
    return mesh


def _raw_and_median(axes, summary, lines, name: str, scale: float, color: str, label=None) -> None:
    steps = _outer_steps(summary, lines)
    values = [scale * line[f"search/{name}"] for line in lines]
    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
    axes.plot(steps, _running_median(values), color=color, linewidth=2, label=label)


def _running_median(values: Sequence[float]) -> np.ndarray:
    """Over about a twentieth of the values; at the ends over what there is of them."""
    half = len(values) // 40
    padded = np.pad(np.asarray(values, float), half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)


def _outer_steps(summary: dict, lines: list[dict]) -> list[int]:
    return [line["step"] - summary["pretraining_steps"] for line in lines]


def _height(places: int) -> float:
    """Of a heat map, in inches."""
    return min(7.0, max(3.2, 0.8 + 0.14 * places))


def _title(summary: dict) -> str:
    return f"search on {summary['network']}, {summary['dataset']}"


def _save(figure, workdir: str, name: str) -> None:
    figure.savefig(os.path.join(workdir, name))
    plt.close(figure)
