"""Sets what was measured beside what the papers report; says what holds and what was not run.

    python experiments/report.py --runs=experiments/results/runs --out=experiments/results/report

Reads run folders (config.json, summary.json, metrics.jsonl) at any depth below --runs; trains
nothing. What the papers say is in `evidence.py`. A run counts for a row if its configuration is
the row's but for what `learned` leaves out. Writes report.md, report.html (one file, pictures
inside), report.json (every figure with its runs' folders), and the pictures, NAME.svg.
"""

import base64
import collections
import dataclasses
import html
import io
import json
import math
import os
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import evidence
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from dgl_jax.config import ONE_BLOCK_METHODS, Config, from_dict
from dgl_jax.data.statistics import PUBLISHED
from dgl_jax.errors import UserError
from dgl_jax.metrics import read_metrics, write_atomically
from dgl_jax.plots import STYLE
from dgl_jax.tables import markdown

_RUNS = flags.DEFINE_string("runs", None, "The folder below which run folders lie.")
_OUT = flags.DEFINE_string("out", None, "The folder of the report.")

FULL = "full"
_COLOURS = {
    evidence.HOLDS: "green",
    evidence.UNDECIDED: "amber",
    evidence.FAILS: "red",
    evidence.NOT_RUN: "grey",
}
# Per cent by which a figure may miss the published one beyond its error and still be near.
_NEAR = 1.0
# Sections and fields that change nothing that is learned, or rounding at most.
_NOT_LEARNED = (
    "seed", "trace", "profile", "placement", "checkpoint",
    "eval.every_epochs", "eval.batch_size", "eval.log_drift", "eval.time_blocks",
    "train.log_every_steps", "train.log_gradient_norm", "train.steps_per_call",
    "train.remat_blocks", "network.scan_layers", "data.data_dir", "data.num_workers",
)  # fmt: skip
# In a shorter run of the same setting these differ.
_LENGTH = ("train.num_epochs", "train.num_steps", "optimizer.drop_epochs")

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


# ---- What was run.


def learned(config: Config) -> Settings:
    """The fields that decide what is learned, seed apart: a row's runs all have the row's.

    Without `_NOT_LEARNED`. A set's own mean and deviation are written out. Images of `arrays` are
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
        if section not in _NOT_LEARNED
        for field, value in fields.items()
        if f"{section}.{field}" not in _NOT_LEARNED
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
    for name in (*fractions, "aux_flops_ratio", "epochs", "steps"):
        value, most = summary.get(name), 1 if name in fractions else math.inf
        is_list = name.startswith(("test", "aux"))
        numbers = value if is_list else [value or None]  # Not 0: one divides by epochs.
        if not (isinstance(numbers, list) and numbers) or not all(
            type(x) in (int, float) and 0 <= x <= most for x in numbers
        ):
            rule = "numbers from 0" if is_list else "a number above 0"
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


def learning_curve(run: Run, block: int) -> list[tuple[float, float]]:
    """(Epochs of its own updates, test accuracy in %) of a block, -1 for the last.

    Of runs in which all blocks learn together, or (sequential) one after the other.
    """
    block = run.classifiers[block] if block < 0 else block
    first = block * run.updates if run.config.method.name == "sequential" else 0
    steps_per_epoch, key = run.updates / run.summary["epochs"], f"test/block_{block}/top1"
    lines = [line for line in read_metrics(str(run.path / "metrics.jsonl")) if key in line]
    lines = [line for line in lines if first < line["step"] <= first + run.updates]
    return [((line["step"] - first) / steps_per_epoch, 100 * line[key]) for line in lines]


def value_of(row: evidence.Row, run: Run) -> float | None:
    """A row's number in one run, per cent; None if it was not evaluated within half an epoch."""
    if row.epoch is not None:
        near = [xy for xy in learning_curve(run, row.block) if abs(xy[0] - row.epoch) < 0.5]
        return near[-1][1] if near else None
    value = run.summary[row.quantity]
    if row.unit == evidence.FLOPS:
        value = max(value)
    elif isinstance(value, list):
        value = value[list(run.classifiers).index(row.block) if row.block >= 0 else -1]
    return 100 - 100 * value if row.unit == evidence.ERROR else 100 * value


def point(
    row: evidence.Row, members: Mapping[tuple[str, int], Sequence[Run]]
) -> dict[str, Any] | None:
    """The mean over runs, with the standard deviation of a sample (None for one run)."""
    found = [
        {"folder": run.folder, "configuration": name, "seed": seed, "value": round(value, 6)}
        for (name, seed), (run, *_) in sorted(members.items())
        if (value := value_of(row, run)) is not None
    ]
    if not found:
        return None
    values = [run["value"] for run in found]
    summaries = [same[0].summary for same in members.values()]
    return {
        "mean": round(statistics.fmean(values), 6),
        "deviation": round(statistics.stdev(values), 6) if len(values) > 1 else None,
        "epochs": round(statistics.fmean(summary["epochs"] for summary in summaries), 2),
        "devices": sorted({str(summary.get("device_kind")) for summary in summaries}),
        "runs": found,
    }


# ---- What it says.


def judge(row: evidence.Row, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """A figure against the published one, by twice the standard error of their difference."""
    nothing = {"difference": None, "error": None}
    if measured is None:
        return {"verdict": evidence.NOT_RUN, "colour": "grey"} | nothing
    if row.published is None:
        return {"verdict": "no number published", "colour": "plain"} | nothing
    difference = measured["mean"] - row.published
    ours = _measured(row, measured)
    theirs = evidence.assumed_spread(row) if row.spread is None else row.spread
    error = 2 * math.sqrt(ours.deviation**2 / ours.runs + theirs**2)
    side, beyond = "above" if difference > 0 else "below", abs(difference) - error
    colour = "green" if beyond <= 0 else "amber" if beyond <= _NEAR else "red"
    words = {"green": "agrees", "amber": f"near, {side}", "red": f"differs, {side}"}[colour]
    return {"verdict": words, "colour": colour, "difference": difference, "error": error}


def measure(runs: Sequence[Run], others: Mapping[str, str]) -> dict[str, Any]:
    """The whole report as data: report.json."""
    others, used, items, claims = dict(others), set(), [], []
    for item in evidence.ITEMS:
        rows = []
        for row in item.rows:
            groups = group(row, runs)
            for first, *again in (same for found in groups.values() for same in found.values()):
                used.add(first.folder)
                reason = f"same configuration and seed as {first.folder}"
                others |= {run.folder: reason for run in again}
            points = {setting: point(row, found) for setting, found in sorted(groups.items())}
            full, names = points.pop(FULL, None), evidence.configurations(row)
            reduced = {setting: found for setting, found in points.items() if found}
            about = {"label": row.label, "unit": row.unit, "configurations": names}
            about |= {"wanted_runs": item.seeds * len(names), "published": row.published}
            rows.append(about | {"measured": full} | judge(row, full) | {"reduced": reduced})
        items.append(item._asdict() | {"rows": rows})
    for claim in evidence.CLAIMS:
        item = next(item for item in evidence.ITEMS if item.name == claim.item)
        found = zip(item.rows, next(i["rows"] for i in items if i["name"] == claim.item))
        measured = {
            row.label: _measured(row, one["measured"]) for row, one in found if one["measured"]
        }
        verdict, compared = evidence.decide(claim, measured), []
        for comparison in claim.comparisons:
            found = zip(("verdict", "difference", "error"), evidence.compare(comparison, measured))
            compared.append({"rule": str(comparison), **comparison._asdict(), **dict(found)})
        words = {"verdict": verdict, "colour": _COLOURS[verdict], "comparisons": compared}
        claims.append(claim._asdict() | {"paper": item.paper} | words)
    others |= {run.folder: "matches no row" for run in runs if run.folder not in {*used, *others}}
    return {"items": items, "claims": claims, "other_runs": dict(sorted(others.items()))}


def _measured(row: evidence.Row, found: Mapping[str, Any]) -> evidence.Measured:
    deviation = found["deviation"]
    deviation = evidence.assumed_spread(row) if deviation is None else deviation
    has_run = {run["configuration"] for run in found["runs"]}
    is_whole = has_run == set(evidence.configurations(row))
    return evidence.Measured(found["mean"], deviation, len(found["runs"]), is_whole)


# ---- Pictures.


def draw(runs: Sequence[Run]) -> dict[str, list[tuple[str, bytes]]]:
    """By an item's name: (file name, SVG) of each setting of which there are runs."""
    matplotlib.use("Agg")
    pictures = collections.defaultdict(list)
    for item in (item for item in evidence.ITEMS if item.name in _PLOTS):
        rows = [row for row in item.rows if row.epoch is None and row.unit != evidence.FLOPS]
        groups = {row: group(row, runs) for row in rows}
        for setting in sorted({setting for found in groups.values() for setting in found}):
            members = {row: found[setting] for row, found in groups.items() if setting in found}
            title = item.name if setting == FULL else f"{item.name}, reduced: {setting}"
            with plt.rc_context(STYLE | {"svg.hashsalt": title, "svg.fonttype": "none"}):
                figure, axes = plt.subplots(figsize=(7, 4))
                _PLOTS[item.name](axes, members, setting == FULL)
                axes.set_ylabel("test accuracy, %")
                axes.set_title(title, fontsize=11)
                axes.legend(frameon=False, fontsize="small")
                file = io.BytesIO()
                figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
                plt.close(figure)
            name = re.sub(r"\W+", "_", title).lower() + ".svg"
            pictures[item.name].append((name, file.getvalue()))
    return pictures


def _plot_curves(axes: Any, members: Mapping[evidence.Row, Any], is_full: bool) -> None:
    """One line a run: a style for each method; a colour for each block, or else each method."""
    del is_full
    styles = dict(zip(dict.fromkeys(row.config for row in members), ("-", "--", ":", "-.")))
    for place, (row, found) in enumerate(members.items()):
        color = f"C{row.block if row.block >= 0 else place}"
        for same in found.values():
            curve = np.reshape(learning_curve(same[0], row.block), (-1, 2))  # It may be empty.
            axes.plot(*curve.T, styles[row.config], color=color, lw=1.2)
        axes.plot([], [], styles[row.config], color=color, label=row.label)
    axes.set_xlabel("epochs of the block's own updates")


def _plot_values(axes: Any, members: Mapping[evidence.Row, Any], is_full: bool) -> None:
    """Means and deviations in the item's order; bars beside published figures, else points."""
    points = [point(row, found) for row, found in members.items()]
    means, places = [found["mean"] for found in points], range(len(points))
    errors = {"yerr": [found["deviation"] or 0.0 for found in points], "capsize": 3}
    if next(iter(members)).published is None:
        axes.errorbar(places, means, fmt="o", label="measured", **errors)
    else:
        published = [row.published for row in members] if is_full else []
        axes.bar(places, means, width=0.5, label="measured", **errors)
        axes.plot(places[: len(published)], published, "kD", label="published")
        axes.set_ylim(min(means + published) - 2, max(means + published) + 2)
    axes.set_xticks(places, [row.label.replace("synchronous ", "") for row in members])


_PLOTS = {"Figure 2": _plot_curves, "Figures 3 and 4": _plot_curves} | dict.fromkeys(
    ("Table 1", "Figure 5", "Figure 6"), _plot_values
)

# ---- The page: parts, (kind, content), of which both Markdown and HTML are made.

_COMMAND = (
    "python experiments/train.py --config=experiments/configs/CONFIGURATION --workdir=DIR "
    "--config.data.data_dir=TFDS_DIR --config.seed=SEED"
)
_RULES = (
    "A claim's comparison holds, or does not, where the difference clears its bound by more than "
    "twice its standard error; between, it is not decided. A figure agrees with the published one "
    "(green) within twice the standard error of their difference, is near (amber) up to "
    f"{_NEAR:g} % beyond, and differs (red) further on. Where there is one run, published or ours, "
    f"a standard deviation of {evidence.SPREAD:g} % is assumed, of {evidence.EARLY_SPREAD:g} % "
    "before the end. Measured: the mean over runs ± their standard deviation (of a sample). A run "
    f"counts for a row if its configuration is the row's but for {', '.join(_NOT_LEARNED)}. "
    "Reduced settings, fewer epochs or a word such as short, are other experiments and judge "
    "nothing."
)
_HEADER = ["configuration", "published", "measured", "runs", "epochs", "device", "difference"]
_HEADER += ["verdict", "reduced settings"]


def page(content: Mapping[str, Any], pictures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is on the page: text, tables (header, rows, a colour for each), pictures."""
    rows = [row for item in content["items"] for row in item["rows"]]
    count = f"{sum(row['measured'] is not None for row in rows)} of {len(rows)} figures"
    claims = [
        [
            claim["verdict"],
            claim["sentence"],
            f"{claim['paper']}, {claim['item']}",
            _compared(claim["comparisons"]),
        ]
        for claim in content["claims"]
    ]
    header = ["verdict", "claim", "from", "difference ± twice its standard error"]
    parts = [
        ("h1", "What the papers report, and what was measured"),
        ("p", f"{count} were measured at the papers' own settings; the others say: not run."),
        ("h2", "The papers' claims"),
        ("table", (header, claims, [claim["colour"] for claim in content["claims"]])),
        ("p", _RULES),
    ]
    for item in content["items"]:
        colours = [row["colour"] for row in item["rows"]]
        header = [f"test {item['rows'][0]['unit']}", *_HEADER]
        parts += [
            ("h2", f"{item['paper']}, {item['name']}: {item['title']}"),
            ("p", item["note"]),
            ("table", (header, [_cells(row) for row in item["rows"]], colours)),
            ("pre", f"{_COMMAND}  # {item['seeds']} seed(s), from 0"),
            *(("img", picture) for picture in pictures.get(item["name"], ())),
        ]
    parts.append(("h2", "Other runs"))
    others = [[folder, reason] for folder, reason in content["other_runs"].items()]
    if others:
        return [*parts, ("table", (["folder", "why"], others, ["grey"] * len(others)))]
    return [*parts, ("p", "None.")]


def _cells(row: Mapping[str, Any]) -> list[str]:
    names, found, published = row["configurations"], row["measured"], row["published"]
    reduced = [
        f"{setting}: {_value(one)} ({len(one['runs'])} run(s), {', '.join(one['devices'])})"
        for setting, one in row["reduced"].items()
    ]
    return [
        row["label"],
        names[0] + (f" ... {names[-1].rpartition(',')[2]}" if len(names) > 1 else ""),
        "-" if published is None else str(published),
        _value(found) if found else evidence.NOT_RUN,
        f"{len(found['runs']) if found else 0} of {row['wanted_runs']}",
        f"{found['epochs']:.4g}" if found else "-",
        ", ".join(found["devices"]) if found else "-",
        "-" if row["difference"] is None else f"{row['difference']:+.2f} ± {row['error']:.2f}",
        row["verdict"],
        "; ".join(reduced) or "-",
    ]


def _value(found: Mapping[str, Any]) -> str:
    text = f"{found['mean']:.2f}"
    return text if found["deviation"] is None else f"{text} ± {found['deviation']:.2f}"


def _compared(comparisons: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{one['rule']}: "
        + ("" if one["error"] is None else f"{one['difference']:+.2f} ± {one['error']:.2f}, ")
        + one["verdict"]
        for one in comparisons
    )


def to_markdown(parts: Sequence[tuple[str, Any]]) -> str:
    """Pictures are files beside it."""
    marks = {"h1": "# ", "h2": "## ", "p": "", "pre": "    "}
    texts = []
    for kind, content in parts:
        if kind == "table":
            texts.append(markdown(*content[:2]))
        elif kind == "img":
            texts.append(f"![{content[0].removesuffix('.svg')}]({content[0]})")
        else:
            texts.append(marks[kind] + content)
    return "\n\n".join(texts) + "\n"


def to_html(parts: Sequence[tuple[str, Any]]) -> str:
    """One file that needs no other; what is too wide scrolls inside its own box."""
    texts = [_HEAD]
    for kind, content in parts:
        if kind == "table":
            header, rows, colours = content
            texts.append('<div class="box"><table>')
            for cells, colour in zip([header, *rows], ["head", *colours], strict=True):
                tag = "th" if colour == "head" else "td"
                tags = (f"<{tag} class=long>" if len(cell) > 40 else f"<{tag}>" for cell in cells)
                row = "".join(f"{t}{html.escape(cell)}</{tag}>" for t, cell in zip(tags, cells))
                texts.append(f'<tr class="{colour}">{row}</tr>')
            texts.append("</table></div>")
        elif kind == "img":
            alt, data = content[0].removesuffix(".svg"), base64.b64encode(content[1]).decode()
            source = f"data:image/svg+xml;base64,{data}"
            texts.append(f'<div class="box"><img alt="{alt}" src="{source}"></div>')
        else:
            texts.append(f"<{kind}>{html.escape(content)}</{kind}>")
    return "\n".join(texts) + "\n</body></html>\n"


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dgl_jax: the evidence</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 sans-serif; color: #222; max-width: 1240px; margin: auto; padding: 0 16px }
.box { overflow-x: auto } .box, pre { margin: 12px 0 }
pre { background: #f4f4f4; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 13px }
td, th { text-align: left; vertical-align: top; padding: 4px 8px; border-bottom: 1px solid #ddd;
  white-space: nowrap }
.long { white-space: normal; min-width: 20em }
.green td { background: #dcf2e1 } .red td { background: #fbdcd9 }
.amber td { background: #fdf0cd } .grey td { color: #595959 }
img { width: 700px; max-width: none }
</style></head><body>"""


def make_report(runs_folder: str, out: str) -> dict[str, Any]:
    """Writes the report's files to the folder `out`; returns what is in report.json.

    Raises:
      UserError: of `read_runs`, or `out` can't be made.
    """
    runs, others = read_runs(pathlib.Path(runs_folder))
    content, pictures = measure(runs, others), draw(runs)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} can't be made ({error.strerror}); give a folder") from error
    for name, svg in (picture for found in pictures.values() for picture in found):
        pathlib.Path(out, name).write_bytes(svg)
    parts = page(content, pictures)
    texts = {"json": json.dumps(content, indent=1) + "\n"}
    texts |= {"md": to_markdown(parts), "html": to_html(parts)}
    for ending, text in texts.items():
        write_atomically(os.path.join(out, f"report.{ending}"), text)
    return content


def main(argv: list[str]) -> None:
    del argv
    try:
        for flag in (_RUNS, _OUT):
            if not flag.value:
                raise UserError(f"--{flag.name} is missing; give a folder")
        content = make_report(_RUNS.value, _OUT.value)
    except UserError as error:
        _fail(str(error))
    for claim in content["claims"]:
        print(f"{claim['verdict']}: {claim['sentence']}")


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        remaining = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    if len(remaining) > 1:
        _fail(f"argument {remaining[1]!r} is not a flag; try --{remaining[1]}")
    return remaining


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
