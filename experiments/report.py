"""Sets the papers' published figures beside ours, and our learning curves over the authors' own.

    python experiments/report.py --runs=experiments/results/runs --out=experiments/results/report

Reads the run folders below --runs, finished or not: config.json, summary.json and metrics.jsonl.
What was published is in the CSV files of experiments/published. A run enters where its
configuration is that of a published figure, but for the seed, where the data lies, and what may
change on resume. Writes report.md and report.html (one file, pictures inside).
"""

import base64
import collections
import csv
import functools
import html
import io
import itertools
import math
import os
import pathlib
import runpy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import plain_flags
from absl import flags

from dgl_jax.config import RESUMABLE, Config, from_dict, to_dict
from dgl_jax.errors import UserError
from dgl_jax.metrics import read_metrics, write_atomically
from dgl_jax.plots import STYLE
from dgl_jax.run_folder import read_json
from dgl_jax.tables import markdown

_RUNS = flags.DEFINE_string("runs", None, "The folder below which run folders lie.")
_OUT = flags.DEFINE_string("out", None, "The folder of the report.")

_HERE = pathlib.Path(__file__).resolve().parent
_METRICS = {  # By quantity: its name in metrics.jsonl.
    "test accuracy": "test/block_{}/top1",
    "test error": "test/block_{}/top1",
    "top-5 test accuracy": "test/block_{}/top5",
    "top-5 test error": "test/block_{}/top5",
    "test error of the last two heads together": "test/ensemble_last_top1",
    "training accuracy": "train/block_{}/top1",
    "training loss": "train/block_{}/loss",
}
_COUNTS = {  # By quantity: what it is in a finished run's summary. A multiply-add is two FLOPs.
    "head's FLOPs by the largest block's": lambda s, block: 100 * s["aux_flops_ratio"][block],
    "multiply-adds of the network": lambda s, block: (
        (sum(s["block_flops"]) + s["head_flops"][-1]) / 2e9
    ),
    "multiply-adds of the heads": lambda s, block: sum(s["head_flops"][:-1]) / 2e9,
}
# By item: the authors' learning curves, whose methods are words of its configuration file; the
# quantities that are drawn; whether there is a curve a block, or one of the last block only.
_CURVES = {
    "DGL, Figures 3 and 4": ("dgl_figures_3_4.csv", ("training accuracy", "test accuracy"), True),
    "DGL, Figure 2": ("dgl_figure_2.csv", ("training loss", "test accuracy"), False),
}
_COLUMNS = {
    "training accuracy": "train_top1",
    "training loss": "train_loss",
    "test accuracy": "test_top1",
}


class Figure(NamedTuple):
    """A row of experiments/published/figures.csv, whose README says what the columns are."""

    item: str
    label: str
    configuration: str
    quantity: str
    block: int | None
    epoch: str
    published: float | None
    spread: float | None
    unit: str
    source: str


class Run(NamedTuple):
    """A run: its folder, and what config.json, summary.json and metrics.jsonl hold."""

    folder: str
    config: dict[str, Any]
    summary: dict[str, Any]
    lines: list[dict[str, float]]


# ---- What was published.


def read_figures() -> list[Figure]:
    """All rows of experiments/published/figures.csv."""
    kinds = {"block": int, "published": float, "spread": float}
    return [
        Figure(
            **row | {name: kind(row[name]) if row[name] else None for name, kind in kinds.items()}
        )
        for row in read_csv("figures.csv")
    ]


def read_curves(item: str) -> dict[tuple[str, str, int | None], dict[int, float]]:
    """An item's published curves: by method, quantity and block a value an epoch."""
    file, quantities, is_by_block = _CURVES.get(item, (None, (), False))
    curves = collections.defaultdict(dict)
    for row in read_csv(file) if file else ():
        block = int(row["block"]) if is_by_block else None
        for quantity in quantities:
            curve = curves[row["method"], quantity, block]
            curve[int(row["epoch"])] = float(row[_COLUMNS[quantity]])
    return dict(curves)


@functools.cache
def read_csv(name: str) -> list[dict[str, str]]:
    """The rows of a file in experiments/published."""
    with open(_HERE / "published" / name, newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def published_settings(configuration: str) -> dict[str, Any] | None:
    """`settings` of ``FILE.py:WORDS``; None where there is no such file.

    Raises:
      UserError: the file has no such word.
    """
    name, _, words = configuration.partition(":")
    path = _HERE / "configs" / name
    if not path.is_file():  # "" is the folder.
        return None
    return settings(to_dict(from_dict(runpy.run_path(str(path))["get_config"](words).to_dict())))


def settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that decide its numbers; those it lacks have their defaults.

    Left out are the seed, where the data lies, and what may change on resume. Of the path of a
    search's result the file's and its folder's name count.
    """
    found = {}
    for section, default in to_dict(Config()).items():
        if isinstance(default, dict):
            given = fields.get(section, {})
            found |= {f"{section}.{name}": given.get(name, default[name]) for name in default}
        else:
            found[section] = fields.get(section, default)
    found["partition.from_search"] = pathlib.Path(found["partition.from_search"]).parts[-2:]
    left_out = {"seed", "data.data_dir", *RESUMABLE}
    return {
        name: value
        for name, value in found.items()
        if not left_out & {name, name.partition(".")[0]}
    }


# ---- What was run.


def read_runs(root: pathlib.Path) -> list[Run]:
    """The runs in the folders below `root`.

    Raises:
      UserError: there is no such folder, or a run's file can't be read.
    """
    if not root.is_dir():
        raise UserError(f"--runs={root} must be a folder of runs; try experiments/results/runs")
    runs = []
    for path in sorted(root.rglob("config.json")):
        config, summary = (read_json(str(path.parent), name) for name in ("config", "summary"))
        if "resolved" in config and "search" not in config:
            lines = read_metrics(str(path.with_name("metrics.jsonl")))
            runs.append(Run(path.parent.relative_to(root).as_posix(), config, summary or {}, lines))
    return runs


def by_configuration(figures: Sequence[Figure], runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Each configuration's runs by seed; of several with one seed the longest."""
    runs = sorted(runs, key=lambda run: (run.config["seed"], last_step(run)))
    settings_of_runs, found = [settings(run.config) for run in runs], {}
    for name in dict.fromkeys(figure.configuration for figure in figures):
        wanted = published_settings(name)
        same = [run for run, one in zip(runs, settings_of_runs) if one == wanted]
        found[name] = {run.config["seed"]: run for run in same}
    return found


def last_step(run: Run) -> int:
    """That a run has come to; 0 before its first line of metrics."""
    return max((line["step"] for line in run.lines), default=0)


def clock(run: Run, block: int | None) -> tuple[int, int, int, int]:
    """A block's index, its first step, its updates in the whole run, and those of an epoch.

    In sequential training a block begins after those below it.
    """
    resolved = run.config["resolved"]
    index = len(resolved["cuts"]) if block is None else block - 1
    num_updates = resolved["num_updates"]
    is_sequential = run.config["method"]["name"] == "sequential"
    return index, index * num_updates * is_sequential, num_updates, resolved["steps_per_epoch"]


def curve(run: Run, quantity: str, block: int | None) -> dict[float, float]:
    """What metrics.jsonl says of a block, by epochs of its own updates.

    Of training metrics the mean over each whole epoch, its lines weighted by their steps.

    Args:
      run: finished or not.
      quantity: a key of `_METRICS`.
      block: from 1; None for the last.

    Returns:
      Accuracies and errors in %, losses as they are.
    """
    index, first, num_updates, steps_per_epoch = clock(run, block)
    key = _METRICS[quantity].format(index)
    lines = [(line["step"] - first, line[key]) for line in run.lines if key in line]
    if key.startswith("train"):
        sums, weights, before = collections.Counter(), collections.Counter(), 0
        for made, value in lines:
            end = math.ceil(made / steps_per_epoch) * steps_per_epoch
            sums[end] += (made - before) * value
            weights[end] += made - before
            before = made
        lines = [(end, sums[end] / weights[end]) for end in sums if end <= before]
    if "loss" not in quantity:
        sign, start = (-1, 100) if "error" in quantity else (1, 0)
        lines = [(made, start + sign * 100 * value) for made, value in lines]
    return {made / steps_per_epoch: value for made, value in lines if 0 < made <= num_updates}


def measure(figure: Figure, run: Run) -> float | None:
    """What a run has for a published figure, in its unit; None if it has not come so far."""
    if figure.quantity in _COUNTS:
        counted = _COUNTS[figure.quantity]
        index, *_ = clock(run, figure.block)
        return counted(run.summary, index) if run.summary.get("finished") else None
    found = curve(run, figure.quantity, figure.block)
    _, _, num_updates, steps_per_epoch = clock(run, figure.block)
    wanted = epochs(figure) or [num_updates / steps_per_epoch]
    return statistics.fmean(found[x] for x in wanted) if found.keys() >= set(wanted) else None


def epochs(figure: Figure) -> Sequence[int]:
    """Those that a figure is a mean over; none for the end."""
    first, _, last = figure.epoch.partition("-")
    return range(int(first), int(last or first) + 1) if first else ()


def so_far(figure: Figure, runs: Mapping[int, Run]) -> Figure:
    """The figure that the authors' curve has where the longest run stands: of five epochs, at most."""
    curves = [curve(run, figure.quantity, figure.block) for run in runs.values()]
    done = math.floor(max(itertools.chain((0,), *curves)))
    if not done:
        return figure
    last = figure._replace(epoch=f"{max(done - 4, 1)}-{done}")
    method = figure.configuration.partition(":")[2]
    authors = read_curves(figure.item)[method, figure.quantity, figure.block]
    return last._replace(published=statistics.fmean(authors[epoch] for epoch in epochs(last)))


# ---- The page: parts, (kind, content), of which both Markdown and HTML are made.

_INTRO = (
    "A run enters at the published setting only, whole or its first epochs: its configuration is "
    "the published figure's in every field that decides a number, but for the seed. Blocks are "
    "counted from 1, as in the authors' logs; epochs are those of a block's own updates. Ours is "
    "the mean over seeds ± the standard deviation of a sample. Training accuracies and losses are "
    "means over an epoch's batches. Where the authors published their curves, the last five epochs "
    "of an unfinished run stand beside the same five of theirs. While the learning rate is high, "
    "test accuracies jump by two or three points from epoch to epoch: compare means of five, or "
    "the training curves."
)
_HEADER = ("figure", "published", "ours", "difference", "seeds", "epochs", "commit")


def page(figures: Sequence[Figure], runs: Sequence[Run]) -> list[tuple[str, Any]]:
    """What is in the report: headings, text, tables (header and rows), pictures."""
    found, parts, num_measured, missing = by_configuration(figures, runs), [], 0, []
    for item, of_item in itertools.groupby(figures, key=lambda figure: figure.item):
        of_item = list(of_item)
        here = [(figure, found[figure.configuration]) for figure in of_item]
        here = [(figure, same) for figure, same in here if same]
        if len(here) < len(of_item):
            names = dict.fromkeys(f.label for f in of_item if not found[f.configuration])
            missing.append(f"{item} ({'; '.join(names)})" if here else item)
        if not here:
            continue
        rows = [row(figure, same) for figure, same in here]
        num_measured += len(rows) - rows.count(None)
        if item in _CURVES:
            rows += [row(so_far(*one), one[1]) for one, cells in zip(here, rows) if not cells]
        rows = {cells[0]: cells for cells in rows if cells}
        sources = dict.fromkeys(figure.source for figure, _ in here)
        parts += [("h2", item), ("p", f"Published: {'; '.join(sources)}.")]
        parts += [("img", picture) for picture in draw(item, here)]
        parts += [("table", (_HEADER, list(rows.values())))] * bool(rows)
    entered = [(name, run) for name, same in found.items() for run in same.values()]
    if entered:
        header = ("run", "seed", "epochs", "commit", "device", "threads")
        parts += [("h2", "Runs"), ("table", (header, [run_row(*one) for one in entered]))]
    others = sorted({run.folder for run in runs} - {run.folder for _, run in entered})
    if others:
        text = f"At no published setting, or a seed's second run: {', '.join(others)}."
        parts.append(("p", text))
    if missing:
        parts.append(("p", f"Not run: {'; '.join(missing)}."))
    count = f"Measured: {num_measured} of {len(figures)} figures."
    return [("h1", "Published figures, and ours"), ("p", _INTRO), ("p", count), *parts]


def row(figure: Figure, runs: Mapping[int, Run]) -> tuple[str, ...] | None:
    """A figure's row of its table, from runs by seed; None if none has come so far."""
    values = {seed: measure(figure, run) for seed, run in runs.items()}
    values = {seed: value for seed, value in values.items() if value is not None}
    if not values:
        return None
    same, digits = [runs[seed] for seed in values], 2 if figure.unit == "%" else 3
    mean, deviation, difference = statistics.fmean(values.values()), None, ""
    if len(values) > 1:
        deviation = statistics.stdev(values.values())
    if figure.published is not None:  # + 0.0: no -0.00.
        difference = f"{round(mean - figure.published, digits) + 0.0:+.{digits}f}"
    block = f"block {figure.block}" if figure.block else ""
    epoch = f"epoch{'s' * ('-' in figure.epoch)} {figure.epoch}" if figure.epoch else ""
    if figure.item in _CURVES and not epoch:
        epoch = "at the end"
    what = (figure.label, block, figure.quantity, epoch, figure.unit)
    return (
        ", ".join(filter(None, what)),
        number(figure.published, figure.spread, digits),
        number(mean, deviation, digits),
        difference,
        ", ".join(map(str, values)),
        done(same, figure.block),
        ", ".join(dict.fromkeys(map(commit, same))),
    )


def number(value: float | None, deviation: float | None, digits: int) -> str:
    """Such as ``93.50 ± 0.10``; "" for None."""
    text = "" if value is None else f"{value:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def run_row(configuration: str, run: Run) -> tuple[str, ...]:
    """A run's row of the table of runs."""
    made_by = run.summary.get("made_by", {})
    about = (str(made_by.get(key, "unknown")) for key in ("device_kind", "num_threads"))
    seed = str(run.config["seed"])
    return (f"{run.folder}, {configuration}", seed, done([run], None), commit(run), *about)


def done(runs: Sequence[Run], block: int | None) -> str:
    """How many epochs of its own updates a block has done in each run: ``50, 20 of 50``."""
    _, first, num_updates, steps_per_epoch = clock(runs[0], block)  # All are of one setting.
    made = [min(max(last_step(run) - first, 0), num_updates) for run in runs]
    total = f"{num_updates / steps_per_epoch:.4g}"
    whole = [total if n == num_updates else str(n // steps_per_epoch) for n in made]
    return f"{', '.join(whole)} of {total}"


def commit(run: Run) -> str:
    """Of the code that made a run, shortened; with + where files differed from it."""
    name = run.summary.get("made_by", {}).get("commit") or "unknown"
    return name[:7] + "+" * name.endswith("+changes")


# ---- Pictures.


def draw(item: str, figures: Sequence[tuple[Figure, Mapping[int, Run]]]) -> list[tuple[str, bytes]]:
    """Title and SVG of each panel of an item's learning curves; none if it has no curves."""
    runs = {
        figure.configuration.partition(":")[2]: (figure.label, same) for figure, same in figures
    }
    panels = collections.defaultdict(list)
    for (method, quantity, block), authors in read_curves(item).items():
        if method in runs:
            label, same = runs[method]
            ours = [curve(run, quantity, block) for run in same.values()]
            title = quantity if "loss" in quantity else f"{quantity}, %"
            if block:
                title, label = f"{label}, {title}", f"block {block}"
            panels[title].append((label, authors, ours))
    return [(title, draw_panel(title, lines)) for title, lines in panels.items()]


def draw_panel(title: str, lines: Sequence[tuple[str, Mapping, Sequence[Mapping]]]) -> bytes:
    """An SVG of lines: each a label, the authors' curve (dashed), and ours of each seed."""
    matplotlib.use("Agg")
    last = max(itertools.chain((1,), *(one for _, _, ours in lines for one in ours)))
    style = {"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9, "savefig.bbox": None}
    with plt.rc_context(STYLE | style):
        figure, axes = plt.subplots(figsize=(5.2, 3.5))
        figure.subplots_adjust(left=0.09, right=0.85, bottom=0.13, top=0.97)
        ends = []
        for place, (label, authors, ours) in enumerate(lines):
            shown = [point for point in authors.items() if point[0] <= 1.15 * last + 1]
            axes.plot(*zip(*shown), "--", color=f"C{place}", alpha=0.6, lw=0.9)
            for one in filter(None, ours):
                axes.plot(*zip(*one.items()), color=f"C{place}", lw=1.3)
            longest = max(ours, key=len) or dict(shown)
            ends.append([list(longest.values())[-1], label, f"C{place}"])
        axes.set(xlabel="epoch", xlim=(0, None))
        gap = 0.06 * (axes.get_ylim()[1] - axes.get_ylim()[0])
        for _ in range(50):  # Labels stand at the ends of their lines, moved apart.
            ends.sort()
            for lower, upper in itertools.pairwise(ends):
                overlap = max(0.0, gap - (upper[0] - lower[0]))
                lower[0], upper[0] = lower[0] - overlap / 2, upper[0] + overlap / 2
        for y, label, color in ends:
            place = {"xy": (1.02, y), "xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(label, color=color, **place)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()


# ---- Files.

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 0 auto;
  padding: 0 16px 40px; }
h2 { font-size: 1.2em; margin-top: 2em; }
p { max-width: 50em; }
table { border-collapse: collapse; font-size: 0.87em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
figure { display: inline-block; margin: 12px 12px 12px 0; width: 100%; max-width: 570px; }
figcaption { font-size: 0.9em; font-weight: 600; }
img { width: 100%; }
@media (max-width: 700px) {
  table { display: grid; grid-template-columns: repeat(6, auto); font-size: 0.8em; }
  tbody, tr { display: contents; }
  th:first-child, td:first-child { grid-column: 1 / -1; border: 0; padding-top: 6px; }
}
"""


def to_markdown(parts: Sequence[tuple[str, Any]]) -> str:
    """The page as Markdown; its pictures are named only."""
    forms = {
        "h1": "# {}".format,
        "h2": "## {}".format,
        "p": str,
        "table": lambda content: markdown(*content),
        "img": lambda content: f"Drawn in [report.html](report.html): {content[0]}.",
    }
    return "\n\n".join(forms[kind](content) for kind, content in parts) + "\n"


def to_html(parts: Sequence[tuple[str, Any]]) -> str:
    """The page as one HTML file."""
    lines = []
    for kind, content in parts:
        if kind == "table":
            header, rows = content
            lines += [
                "<table>",
                cells("th", header),
                *(cells("td", one) for one in rows),
                "</table>",
            ]
        elif kind == "img":
            title, svg = html.escape(content[0]), base64.b64encode(content[1]).decode()
            caption = f"<figcaption>{title} (dashed: the authors')</figcaption>"
            image = f'<img alt="{title}" src="data:image/svg+xml;base64,{svg}">'
            lines.append(f"<figure>{caption}{image}</figure>")
        else:
            lines.append(f"<{kind}>{html.escape(content)}</{kind}>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(parts[0][1])}</title><style>{_STYLE}</style>"
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}</head><body>',
        *lines,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def cells(tag: str, texts: Sequence[str]) -> str:
    """A row of an HTML table."""
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def make_report(runs_folder: str, out: str) -> str:
    """Writes report.md and report.html to the folder `out`; returns the former's text.

    Raises:
      UserError: of `read_runs`, or `out` can't be made.
    """
    parts = page(read_figures(), read_runs(pathlib.Path(runs_folder)))
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} can't be made ({error.strerror}); give a folder") from error
    text = to_markdown(parts)
    write_atomically(os.path.join(out, "report.md"), text)
    write_atomically(os.path.join(out, "report.html"), to_html(parts))
    return text


def main(arguments: list[str]) -> None:
    del arguments
    for flag in (_RUNS, _OUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; give a folder")
    print(make_report(_RUNS.value, _OUT.value))


if __name__ == "__main__":
    plain_flags.run(main)
