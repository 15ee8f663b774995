"""Pictures of time: what each device did when, simulated or measured; speed-ups by K."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from dgl_jax import distributed
from dgl_jax.metrics import write_atomically
from dgl_jax.plots import STYLE
from dgl_jax.schedule import ALL_REDUCE, APPLY, BACKWARD, FEED, FORWARD, LOSS, UPDATE, Span

# By operation: its name, and how light or hatched a step's colour is.
_LOOKS = {
    FORWARD: ("forward", {"alpha": 0.45}),
    FEED: ("forward, in evaluation mode", {"alpha": 0.25}),
    BACKWARD: ("backward", {"alpha": 1.0}),
    UPDATE: ("forward and backward, one program", {"alpha": 1.0, "hatch": "///"}),
    LOSS: ("forward and backward", {"alpha": 1.0, "hatch": "///"}),
    APPLY: ("update", {"alpha": 0.7, "hatch": "|||"}),
    ALL_REDUCE: ("all-reduce", {"alpha": 0.2, "hatch": "xxxx"}),
}
_COLORS = [plt.get_cmap("Set2")(place) for place in range(8)]
_DRAWN_STEPS = 8  # Of a trace.
_TIMELINE_STYLE = {"axes.grid.axis": "x", "axes.spines.left": False, "hatch.linewidth": 0.3}


def plot_timeline(
    spans: Sequence[Span], path: str, title: str, device_names: Sequence[str] | None = None
) -> None:
    """One row a device, one colour a step; white is idle. The number in a span is its step.

    Args:
      spans: in any order; those of one device do not overlap.
      path: of the PNG.
      title: of the picture.
      device_names: of all rows, from device 0; by default the blocks that ran on each.

    Source: DGL, Figure 7.
    """
    matplotlib.use("Agg")
    devices = sorted({span.device for span in spans})
    origin = min(span.start for span in spans)
    length = max(span.end for span in spans) - origin
    unit, name = (1, "s") if length >= 1 else (1e-3, "ms") if length >= 1e-3 else (1e-6, "µs")
    with plt.rc_context(STYLE | _TIMELINE_STYLE):
        figure, axes = plt.subplots(figsize=(8, 1.5 + 0.42 * len(devices)), layout="constrained")
        bars = collections.defaultdict(list)  # By what they look like.
        for span in spans:
            start, width = (span.start - origin) / unit, (span.end - span.start) / unit
            place = devices.index(span.device)
            bars[place, span.step % len(_COLORS), span.operation].append((start, width))
            # Where it fits: some 60 digits with their margins are as wide as the axes.
            if span.end - span.start > len(str(span.step)) * length / 60:
                middle = (start + width / 2, place)
                axes.text(*middle, str(span.step), ha="center", va="center", fontsize=7)
        for (place, color, operation), ranges in bars.items():
            look = _LOOKS[operation][1]
            rows = (place - 0.38, 0.76)
            axes.broken_barh(ranges, rows, zorder=2, **_patch(_COLORS[color], look))
        names = device_names or [_row_name(device, spans) for device in devices]
        axes.set_yticks(range(len(devices)), [str(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(devices) - 0.4, -0.6)
        axes.set_xlim(0, 1.003 * length / unit)  # The last edge is not cut off.
        axes.set_xlabel(f"time, {name}")
        axes.set_title(title, fontsize=10, loc="left")
        used = {span.operation for span in spans}
        handles = [
            Patch(label=label, **_patch((0.5, 0.5, 0.5), look))
            for operation, (label, look) in _LOOKS.items()
            if operation in used
        ]
        where = "outside lower center"
        figure.legend(handles=handles, loc=where, ncols=len(used), frameon=False, fontsize=8)
        figure.savefig(path)
        plt.close(figure)


def plot_speed_ups(
    path: str,
    title: str,
    speed_ups: Mapping[str, Mapping[int, float]],
    ideal: Mapping[int, float],
) -> None:
    """Speed-up over backprop on one device against the number of blocks, one line a method.

    Args:
      path: of the PNG.
      title: of the picture.
      speed_ups: by the method's name, by K.
      ideal: that of dgl, by K: the grey line.
    """
    matplotlib.use("Agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4))
        grey = {"color": "0.6", "lw": 4, "alpha": 0.6}
        axes.plot(list(ideal), list(ideal.values()), **grey, label="the ideal of dgl")
        for place, (method, points) in enumerate(speed_ups.items()):
            axes.plot(
                list(points),
                list(points.values()),
                marker="osD^v<>p"[place % 8],
                ms=5,
                color=f"C{place}",
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(list(ideal), [str(num_blocks) for num_blocks in ideal], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="K, blocks and devices", ylabel="speed-up over one device")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path)
        plt.close(figure)


def _patch(color: Sequence[float], look: Mapping[str, Any]) -> dict[str, Any]:
    """How a bar is drawn; only its inside is light, so that its edge and hatch stay visible."""
    return {
        "facecolor": (*color[:3], look["alpha"]),
        "edgecolor": "0.35",
        "linewidth": 0.5,
        "hatch": look.get("hatch"),
    }


def _row_name(device: int, spans: Sequence[Span]) -> str:
    blocks = sorted({span.block for span in spans if span.device == device})
    word = "block" if len(blocks) == 1 else "blocks"
    return f"device {device}\n{word} {', '.join(map(str, blocks))}"


def write_trace(
    workdir: str, spans: Sequence[Span], num_blocks: int, title: str
) -> list[float] | None:
    """Writes trace.json and timeline.png from what all processes have recorded.

    Args:
      workdir: the run's folder.
      spans: of this process.
      num_blocks: K.
      title: of the picture.

    Returns:
      The busy fraction of each block over the recorded steps, from its first program's start to
      its last one's end; None in all processes but the first, or where nothing was recorded.
    """
    rows = [
        [span.device, span.block, span.step, span.operation, span.start, span.end] for span in spans
    ]
    rows = [row for part in distributed.collect(rows) for row in part]
    if not distributed.is_main() or not rows:
        return None
    spans = sorted((Span(*row) for row in rows), key=lambda span: span.start)
    origin = spans[0].start
    content = {
        "columns": ["device", "block", "step", "operation", "start_seconds", "end_seconds"],
        "spans": [
            [s.device, s.block, s.step, s.operation, s.start - origin, s.end - origin]
            for s in spans
        ],
    }
    write_atomically(os.path.join(workdir, "trace.json"), json.dumps(content) + "\n")
    # Drawn is a part in which all devices are at work.
    devices = {span.device for span in spans}
    begin = max(min(s.start for s in spans if s.device == device) for device in devices)
    steps = {span.step for span in spans}
    end = begin + _DRAWN_STEPS * (max(span.end for span in spans) - spans[0].start) / len(steps)
    drawn = [span for span in spans if span.end > begin and span.start < end]
    plot_timeline(drawn, os.path.join(workdir, "timeline.png"), title)
    fractions = []
    for block in range(num_blocks):
        own = [span for span in spans if span.block == block]
        if not own:  # In a fused run all is one program.
            return None
        busy = sum(span.end - span.start for span in own)
        fractions.append(busy / (max(s.end for s in own) - min(s.start for s in own)))
    return fractions
