"""How the report is drawn and written: its pictures, its page as Markdown and as HTML."""

import base64
import collections
import hashlib
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import evidence
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import verdicts
from run_folders import (
    CURVES,
    FULL,
    NOT_LEARNED,
    Run,
    group,
    point,
    settings_of,
)

from dgl_jax.plots import STYLE
from dgl_jax.tables import markdown

# ---- Pictures.


def draw(runs: Sequence[Run]) -> dict[str, list[tuple[str, bytes]]]:
    """By an item's name: (file name, SVG) of each setting of which there are runs."""
    matplotlib.use("Agg")
    pictures = collections.defaultdict(list)
    for item in (item for item in evidence.ITEMS if item.name in _PLOTS):
        rows = [row for row in item.rows if row.epoch is None and row.unit not in evidence.COUNTED]
        groups = {row: group(row, runs) for row in rows}
        for setting in sorted({setting for found in groups.values() for setting in found}):
            members = {row: found[setting] for row, found in groups.items() if setting in found}
            members = {row: found for row, found in members.items() if point(row, found)}
            if not members:
                continue
            title = item.name if setting == FULL else f"{item.name}, reduced: {setting}"
            about = settings_of(members).get(setting)
            with plt.rc_context(STYLE | {"svg.hashsalt": title, "svg.fonttype": "none"}):
                figure = plt.figure(figsize=(7, 4))
                _PLOTS[item.name](figure, members, setting == FULL)
                figure.suptitle(f"{title} \N{EN DASH} {about}" if about else title, fontsize=10)
                file, metadata = io.BytesIO(), {"Date": None, "Creator": None}
                metadata["Description"] = _digest(figure)
                figure.savefig(file, format="svg", metadata=metadata)
                plt.close(figure)
            name = re.sub(r"\W+", "_", title).lower() + ".svg"
            pictures[item.name].append((name, file.getvalue()))
    return pictures


def _digest(figure: Any) -> str:
    """Of the numbers that are drawn, whatever fonts and version drew them."""
    lines = [line.get_xydata() for axes in figure.axes for line in axes.lines]
    bars = [patch.get_bbox().get_points() for axes in figure.axes for patch in axes.patches]
    numbers = [np.round(np.asarray(found, float), 6).tolist() for found in lines + bars]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _plot_curves(figure: Any, members: Mapping[evidence.Row, Any], is_full: bool) -> None:
    """One line a run: a style for each method; a colour for each block, or else each method.

    Accuracy; and, where rows have it, the training loss beside it.
    """
    del is_full
    styles = _styles(members)
    members = {row: found for row, found in members.items() if row.share is None}
    quantities = list(dict.fromkeys(row.quantity for row in members))
    figure.set_size_inches(7 if len(quantities) == 1 else 9, 4)
    panels = np.ravel(figure.subplots(1, len(quantities), gridspec_kw={"wspace": 0.3}))
    for axes, quantity in zip(panels, quantities, strict=True):
        curves = [(row, found) for row, found in members.items() if row.quantity == quantity]
        for place, (row, found) in enumerate(curves):
            color = f"C{row.block if row.block >= 0 else place}"
            for same in found.values():
                curve = np.reshape(CURVES[quantity](same[0], row.block), (-1, 2))  # Or empty.
                axes.plot(*curve.T, styles[row.config], color=color, lw=1.2)
            axes.plot([], [], styles[row.config], color=color, label=row.label)
        is_loss = quantity == "train_loss"
        axes.set(xlabel="epochs of the block's own updates")
        axes.set(ylabel="training loss" if is_loss else "test accuracy, %")
        axes.set_yscale("log" if is_loss else "linear")
        axes.legend(frameon=False, fontsize="small")


def _plot_theorem(figure: Any, members: Mapping[evidence.Row, Any], is_full: bool) -> None:
    """A block's inputs' distance from their final density; its weighted sum of gradient norms.

    The sums are parts of the whole, beside what the learning rates alone would make of them.
    """
    del is_full
    figure.set_size_inches(9, 4)
    (drift_axes, sum_axes), styles = figure.subplots(1, 2), _styles(members)
    lines = {(row.quantity, row.config, row.block): found for row, found in members.items()}
    for (quantity, config, block), found in lines.items():
        axes = drift_axes if quantity == "input_drift" else sum_axes
        method = config.partition(":")[2]
        color, label = f"C{block}", f"{method}, block {block}"
        if quantity == "rate_sum":
            color, label = "black", f"{method}, rates alone"
        for same in found.values():
            curve = np.reshape(CURVES[quantity](same[0], block), (-1, 2))
            if axes is sum_axes and len(curve):
                curve = curve * [1, 100 / curve[-1, 1]]
            axes.plot(*curve.T, styles[config], color=color, lw=1.2)
        axes.plot([], [], styles[config], color=color, label=label)
    drift_axes.set_title("distance of a block's inputs from the final ones", fontsize=9)
    sum_axes.set_title("sum of learning rate x squared gradient norm, % of its end", fontsize=9)
    for axes in (drift_axes, sum_axes):
        axes.set(xlabel="epochs of the block's own updates")
        if axes.lines:
            axes.legend(frameon=False, fontsize="x-small")


def _styles(members: Mapping[evidence.Row, Any]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(row.config for row in members), ("-", "--", ":", "-.")))


def _plot_values(figure: Any, members: Mapping[evidence.Row, Any], is_full: bool) -> None:
    """Means and deviations in the item's order; bars beside published figures, else points.

    A point is hollow where a seed lacks runs; errors are dashed where the deviation is assumed.
    """
    axes = figure.subplots()
    points = [
        verdicts.with_deviation(row, point(row, found), is_reduced=not is_full)
        for row, found in members.items()
    ]
    means, places = [found.mean for found in points], range(len(points))
    has_bars = all(row.published is not None for row in members)
    for place, found in enumerate(points):
        look = {"color": "black" if has_bars else "C0", "mfc": "C0" if found.is_whole else "white"}
        look |= {"fmt": "" if has_bars else "o", "capsize": 3}
        drawn = axes.errorbar(place, found.mean, found.deviation, **look)
        if found.seeds == 1:
            drawn.lines[2][0].set_linestyle("--")
    axes.set_title(
        "mean and deviation over seeds (dashed: of one seed, assumed; hollow: runs missing)",
        fontsize=8,
    )
    if has_bars:
        published = [row.published for row in members] if is_full else []
        axes.bar(places, means, width=0.5, label="measured")
        if published:
            axes.plot(places, published, "kD", label="published")
        axes.set_ylim(min(means + published) - 2, max(means + published) + 2)
        axes.legend(frameon=False, fontsize="small")
    labels = [row.label.replace("synchronous ", "") for row in members]
    is_long = sum(map(len, labels)) > 80
    axes.set_xticks(places, labels, rotation=90 if is_long else 0, fontsize=7 if is_long else None)
    axes.set_ylabel(f"test {next(iter(members)).unit}")


_PLOTS = {
    "Proposition 3.1": _plot_theorem,
    "Figure 2": _plot_curves,
    "Figures 3 and 4": _plot_curves,
    "Table 1": _plot_values,
    "Figure 5": _plot_values,
    "Figure 6": _plot_values,
    "ResNet-101 by K": _plot_values,
    "Ensembles": _plot_values,
}

# ---- The page: parts, (kind, content), of which both Markdown and HTML are made.

_COMMAND = (
    "python experiments/train.py --config=experiments/configs/CONFIGURATION --workdir=DIR "
    "--config.data.data_dir=TFDS_DIR --config.seed=SEED"
)
_TWO_RUNS, _TWO_REDUCED_RUNS = (
    verdicts.half_interval(2 * [verdicts.Measured(0.0, spread, 1)])
    for spread in (verdicts.SPREAD, verdicts.REDUCED_SPREAD)
)
_RULES = (
    "A claim's comparison holds, or does not, where the difference clears its bound by more than "
    "half of its 95 % confidence interval (Student's; seed by seed where both figures have seeds "
    "in common, as a seed decides initial weights and the order of images, else by Welch); between, it "
    "is not decided. The test images are taken as given. A figure agrees "
    "with the published one (green) within that of their difference, of what is counted within the "
    f"rounding, is near (amber) up to {verdicts.NEAR:g} % beyond (in other units "
    f"{100 * verdicts.NEAR_PART:g} % of the published one), and differs (red) further on. Where "
    "there is one seed, published or ours, a standard deviation of "
    f"{verdicts.SPREAD:g} % is assumed, of "
    f"{verdicts.EARLY_SPREAD:g} % before the end, of {verdicts.REDUCED_SPREAD:g} % at the end of "
    "reduced settings ("
    + ", ".join(
        f"of {unit.partition(',')[0]} {spread:g}"
        for unit, spread in verdicts.SPREAD_OF_UNIT.items()
        if unit not in evidence.COUNTED
    )
    + f", of {evidence.LOSS} {100 * verdicts.SPREAD_OF_LOSS:g} % of it): of two single runs a "
    f"difference of less than {_TWO_RUNS:.1f} % is not decided, of reduced settings than "
    f"{_TWO_REDUCED_RUNS:.1f} %. Some verdicts are chance: of comparisons at the very bound one in "
    "twenty, and more where seeds were added after a look at the first. Measured: the mean over "
    "seeds ± their standard deviation (of a sample); a seed's value is the mean over its runs. A run "
    f"counts for a row if its configuration is the row's but for {', '.join(NOT_LEARNED)}. "
    "Reduced settings, fewer epochs or a word such as short, are other experiments, most on other "
    "images and with smaller networks, as is said above each table: what they say of a claim stands "
    "apart, and judges nothing."
)
_HEADER = ["configuration", "published", "measured", "runs", "epochs", "device", "difference"]
_HEADER += ["verdict", "reduced settings"]


def page(content: Mapping[str, Any], pictures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is on the page: text, tables (header, rows, a colour for each), pictures."""
    rows = [row for item in content["items"] for row in item["rows"]]
    count = f"{sum(row['measured'] is not None for row in rows)} of {len(rows)} figures"
    claims = [line for claim in content["claims"] for line in _claim_lines(claim)]
    header = ["verdict", "claim, and the differences that decide it, ± half of their 95 % interval"]
    header += ["at the papers' settings", "at reduced settings"]
    parts = [
        ("h1", "What the papers report, and what was measured"),
        ("p", f"{count} were measured at the papers' own settings; the others say: not run."),
        ("h2", "The papers' claims"),
        ("table", (header, [cells for cells, _ in claims], [colour for _, colour in claims])),
        ("p", _RULES),
    ]
    for item in content["items"]:
        colours = [row["colour"] for row in item["rows"]]
        header = [_heading(item["rows"]), *_HEADER]
        parts += [
            ("h2", f"{item['paper']}, {item['name']}: {item['title']}"),
            ("p", item["note"]),
            ("p", _settings_line(item["settings"])),
            ("table", (header, [_cells(row) for row in item["rows"]], colours)),
            ("pre", f"{_COMMAND}  # {item['seeds']} seed(s), from 0{_words(item['settings'])}"),
            *(("img", picture) for picture in pictures.get(item["name"], ())),
        ]
    header = ["where", "what", "here"]
    parts += [
        ("h2", "What no run measures"),
        ("table", (header, evidence.WITHOUT_ROWS, ["plain"] * len(evidence.WITHOUT_ROWS))),
        ("h2", "Other runs"),
    ]
    others = [[folder, reason] for folder, reason in content["other_runs"].items()]
    if others:
        return [*parts, ("table", (["folder", "why"], others, ["grey"] * len(others)))]
    return [*parts, ("p", "None.")]


def _settings_line(settings: Mapping[str, str]) -> str:
    """A sentence for each setting: the data set, the networks times their width, the length."""
    return "; ".join(f"{setting}: {about}" for setting, about in settings.items()) + "."


def _words(settings: Mapping[str, str]) -> str:
    words = [f"CONFIGURATION,{word}" for word in settings if word != FULL]
    return f"; reduced: {' or '.join(words)}" if words else ""


def _heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the figures are: "test accuracy, %"; with others among them, those say it themselves."""
    units = list(dict.fromkeys(row["unit"] for row in rows))
    return (
        f"test {units[0]}" if units[0] in (evidence.ACCURACY, evidence.ERROR) else "; ".join(units)
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    names, found, published = row["configurations"], row["measured"], row["published"]
    reduced = [
        f"{setting}: {_value(one, row['unit'])} ({one['seeds']} seed(s), {len(one['runs'])} of "
        f"{one['wanted_runs']} runs, {one['epochs']:.4g} epochs, {', '.join(one['devices'])})"
        for setting, one in row["reduced"].items()
    ]
    return [
        row["label"],
        names[0] + (f" ... {names[-1].rpartition(',')[2]}" if len(names) > 1 else ""),
        "-" if published is None else str(published),
        _value(found, row["unit"]) if found else verdicts.NOT_RUN,
        f"{len(found['runs']) if found else 0} of {row['wanted_runs']}",
        f"{found['epochs']:.4g}" if found else "-",
        ", ".join(found["devices"]) if found else "-",
        "-" if row["difference"] is None else f"{row['difference']:+.2f} ± {row['error']:.2f}",
        row["verdict"],
        "; ".join(reduced) or "-",
    ]


def _value(found: Mapping[str, Any], unit: str) -> str:
    digits = 3 if unit in (evidence.LOSS, evidence.GIGA) else 2
    text, deviation = f"{found['mean']:.{digits}f}", found["deviation"]
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _claim_lines(claim: Mapping[str, Any]) -> list[tuple[list[str], str]]:
    """Cells and colour: of the claim, and of each of its comparisons."""
    reduced = claim["reduced"]
    words = "; ".join(f"{setting}: {found['verdict']}" for setting, found in reduced.items())
    sentence = f"**{claim['paper']}, {claim['item']}: {claim['sentence']}**"
    colour = _with_reduced(claim["colour"], reduced.values())
    lines = [([claim["verdict"], sentence, "", words or "-"], colour)]
    for place, one in enumerate(claim["comparisons"]):
        others = {setting: found["comparisons"][place] for setting, found in reduced.items()}
        words = "; ".join(
            f"{setting}: {_difference(other)}, {other['verdict']}"
            for setting, other in others.items()
            if other["error"] is not None
        )
        verdict = "" if one["verdict"] == verdicts.NOT_RUN else one["verdict"]
        colour = _with_reduced(
            one["colour"], [o for o in others.values() if o["error"] is not None]
        )
        lines.append(([verdict, f"— {one['rule']}", _difference(one), words or "-"], colour))
    return lines


def _with_reduced(colour: str, reduced: Iterable[Mapping[str, Any]]) -> str:
    """A line's colour, and that of its last cell if the reduced settings agree on one."""
    colours = {one["colour"] for one in reduced} - {"grey"}
    return f"{colour} last-{colours.pop()}" if len(colours) == 1 else colour


def _difference(one: Mapping[str, Any]) -> str:
    if one["error"] is None:
        return "-"
    text = f"{one['difference']:+.2f} ± {one['error']:.2f}"
    return f"{text} (one seed)" if one["seeds"] == 1 else text


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
                tags = (f"<{tag} class=long>" if len(cell) > 60 else f"<{tag}>" for cell in cells)
                row = "".join(f"{t}{_escape(cell)}</{tag}>" for t, cell in zip(tags, cells))
                texts.append(f'<tr class="{colour}">{row}</tr>')
            texts.append("</table></div>")
        elif kind == "img":
            alt, data = content[0].removesuffix(".svg"), base64.b64encode(content[1]).decode()
            source = f"data:image/svg+xml;base64,{data}"
            texts.append(f'<div class="box"><img alt="{alt}" src="{source}"></div>')
        else:
            texts.append(f"<{kind}>{html.escape(content)}</{kind}>")
    return "\n".join(texts) + "\n</body></html>\n"


def _escape(cell: str) -> str:
    bold = re.fullmatch(r"\*\*(.*)\*\*", cell)
    return f"<b>{html.escape(bold[1])}</b>" if bold else html.escape(cell)


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
th, .long { white-space: normal } .long { min-width: 20em }
@media (max-width: 600px) {
  td, th { padding: 4px; white-space: normal } .long, td:last-child { min-width: 11em }
}
.green td { background: #dcf2e1 } .red td { background: #fbdcd9 }
.amber td { background: #fdf0cd } .grey td { color: #595959 }
.last-green td:last-child { background: #dcf2e1 } .last-red td:last-child { background: #fbdcd9 }
.last-amber td:last-child { background: #fdf0cd }
img { width: 700px; max-width: none }
</style></head><body>"""
