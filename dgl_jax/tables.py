"""Runs' summaries as a table that people read."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dgl_jax.sedona.discretise import NEAR_TIE

_MIB = 2**20


def accuracy_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy by block, one row a run.

    Args:
      summaries: of train_and_evaluate, or loaded from summary.json.

    Returns:
      A Markdown table.
    """
    num_blocks = max(summary["num_blocks"] for summary in summaries)
    header = ["run", "epochs", *(f"block {block}" for block in range(num_blocks))]
    header += ["ensemble", "images/s", "seconds"]
    rows = []
    for summary in summaries:
        # Backprop's one head is on the last layer: its place is the last column.
        shift = num_blocks - 1 if summary["num_blocks"] == 1 else 0
        accuracies = ["-"] * num_blocks
        for block, top1 in zip(summary["classifiers"], summary["test_top1"]):
            accuracies[block + shift] = f"{100 * top1:.2f} %"
        speed = summary["train_examples_per_second"]
        rows.append(
            [
                f"{summary['method']}, {summary['network']}, K = {summary['num_blocks']}",
                f"{summary['epochs']:.3g}",
                *accuracies,
                f"{100 * summary['ensemble_top1']:.2f} %",
                "-" if speed is None else f"{speed:.0f}",
                f"{summary['wall_seconds']:.0f}",
            ]
        )
    return "Test top-1 accuracy by block\n\n" + markdown(header, rows)


def comparison_row(
    name: str, summaries: Sequence[Mapping[str, Any]], failures: Mapping[int, str]
) -> dict[str, Any]:
    """What one row of a comparison says: numbers over seeds.

    Args:
      name: of the row.
      summaries: of its finished runs, one a seed, all of one configuration.
      failures: one line of reason for each seed whose run failed.

    Returns:
      A mapping for JSON: accuracies are fractions, by block those of the blocks that classify;
      deviations are those of a sample (n - 1), 0 for a single run; the rest are means.
    """
    row = {"name": name, "failures": dict(failures), "seeds": [run["seed"] for run in summaries]}
    if not summaries:
        return row

    def over_runs(value):
        values = [value(run) for run in summaries]
        return None if None in values else statistics.fmean(values)

    def mean_and_deviation(values):
        values = list(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": statistics.fmean(values), "deviation": deviation, "runs": values}

    first = summaries[0]
    step_seconds = [run["block_step_seconds"] for run in summaries]
    return row | {
        "num_blocks": first["num_blocks"],
        "classifiers": first["classifiers"],
        "top1": [mean_and_deviation(block) for block in zip(*(r["test_top1"] for r in summaries))],
        "ensemble_top1": mean_and_deviation(run["ensemble_top1"] for run in summaries),
        "epochs": first["epochs"],
        "train_examples_per_second": over_runs(lambda run: run["train_examples_per_second"]),
        "wall_seconds": over_runs(lambda run: run["wall_seconds"]),
        "network_parameters": sum(first["block_parameters"]) + first["head_parameters"][-1],
        "auxiliary_parameters": sum(first["head_parameters"][:-1]),
        "largest_aux_flops_ratio": max(first["aux_flops_ratio"]),
        "bytes_between_blocks": sum(first["bytes_between_blocks"]),
        "method_memory_bytes": first["method_memory_bytes"],
        "peak_memory_bytes": over_runs(lambda run: run["peak_memory_bytes"]),
        "block_step_seconds": None
        if None in step_seconds
        else [statistics.fmean(block) for block in zip(*step_seconds)],
    }


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods side by side: what they reach, and what they cost.

    Args:
      rows: of `comparison_row`.

    Returns:
      Two Markdown tables, and below them the reason of each run that failed.
    """
    reached = [
        ["method", "K", "last block, %", "each block that classifies, %", "ensemble, %", "epochs"]
    ]
    costs = [
        [
            "method", "images/s", "parameters", "of heads", "largest head / largest block, FLOPs",
            "between blocks, MiB/step", "kept, MiB", "peak memory, MiB", "step by block, ms",
        ]
    ]  # fmt: skip
    for row in rows:
        if not row["seeds"]:
            reached.append([row["name"], "-", "failed", "-", "-", "-"])
            continue
        failed = f" ({len(row['failures'])} failed)" if row["failures"] else ""
        by_block, seconds = [_percent(block) for block in row["top1"]], row["block_step_seconds"]
        kept, speed = row["method_memory_bytes"], row["train_examples_per_second"]
        reached.append(
            [
                row["name"],
                str(row["num_blocks"]),
                by_block[-1] + failed,
                " / ".join(by_block) if len(by_block) > 1 else "-",
                _percent(row["ensemble_top1"]) if len(by_block) > 1 else "-",
                f"{row['epochs']:.3g}",
            ]
        )
        costs.append(
            [
                row["name"],
                "-" if speed is None else f"{speed:.0f}",
                f"{row['network_parameters']:,}",
                f"{row['auxiliary_parameters']:,}",
                f"{100 * row['largest_aux_flops_ratio']:.1f} %",
                f"{row['bytes_between_blocks'] / _MIB:.2f}",
                f"{kept / _MIB:.1f}" if kept else "-",
                f"{row['peak_memory_bytes'] / _MIB:.0f}",
                "-" if seconds is None else " / ".join(f"{1000 * s:.1f}" for s in seconds),
            ]
        )
    failures = [
        f"- {row['name']}, seed {seed}: failed: {reason}"
        for row in rows
        for seed, reason in row["failures"].items()
    ]
    parts = [markdown(table[0], table[1:]) for table in (reached, costs)]
    return "\n\n".join(parts + (["\n".join(failures)] if failures else []))


def random_search_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """The trials of `experiments/random_search.py`, one a row.

    Args:
      trials: best first: ``trial``, ``cuts``, ``heads``, the accuracies as fractions, and
        ``wall_seconds``.

    Returns:
      A Markdown table.
    """
    header = ["trial", "cuts", "heads", "validation, %", "test, %", "test, ensemble, %", "seconds"]
    rows = [
        [
            str(trial["trial"]),
            ", ".join(map(str, trial["cuts"])),
            ", ".join(trial["heads"]),
            *(
                f"{100 * trial[name]:.2f}"
                for name in ("validation_top1", "test_top1", "ensemble_last_top1")
            ),
            f"{trial['wall_seconds']:.0f}",
        ]
        for trial in trials
    ]
    return markdown(header, rows)


def sedona_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The variants of `experiments/benchmark.py sedona`, one a row.

    Args:
      rows: ``estimator``, ``remat``, ``failure`` (a line, or None), and as far as it came:
        ``compile_seconds``, ``xla_temp_bytes``, ``memory_before_bytes``, ``peak_memory_bytes``,
        and ``step_seconds``, ``inner_step_seconds``, ``backprop_step_seconds``, one a repeat.

    Returns:
      A Markdown table.
    """

    def number(row: Mapping[str, Any], name: str, form: str, unit: float = 1) -> str:
        return format(row[name] / unit, form) if row.get(name) is not None else "-"

    header = ["estimator", "remat", "compile, s", "step, s (least to most)"]
    header += ["inner step, s", "backprop step, s", "step / inner", "step / backprop"]
    header += ["XLA's temporaries, MiB", "process before, MiB", "peak, MiB", "failed"]
    cells = []
    for row in rows:
        names = ("step_seconds", "inner_step_seconds", "backprop_step_seconds")
        seconds = [statistics.median(row[name]) if row.get(name) else None for name in names]
        step, *others = [f"{x:.3g}" if x is not None else "-" for x in seconds]
        if row.get("step_seconds"):
            step += f" ({min(row['step_seconds']):.3g} to {max(row['step_seconds']):.3g})"
        ratios = [f"{seconds[0] / x:.1f}" if x is not None else "-" for x in seconds[1:]]
        cells.append(
            [
                row["estimator"],
                "on" if row["remat"] else "off",
                number(row, "compile_seconds", ".1f"),
                step,
                *others,
                *ratios,
                number(row, "xla_temp_bytes", ".0f", _MIB),
                number(row, "memory_before_bytes", ".0f", _MIB),
                number(row, "peak_memory_bytes", ".0f", _MIB),
                row["failure"] or "",
            ]
        )
    return markdown(header, cells)


def parallel_table(content: Mapping[str, Any]) -> str:
    """The variants of `experiments/benchmark.py parallel`, one a row.

    Args:
      content: parallel.json: ``num_blocks`` and ``rows`` of ``method``, ``num_devices`` (0: one
        device with K cores' threads), ``num_processes``, and of each round ``step_seconds``, or
        of the rows "blocks:dgl" and "blocks:ddg" the ``block_seconds`` of each block alone, with
        auxiliary heads and without; ``simulated_seconds`` of a step by method.

    Returns:
      A Markdown table and two lines: speed-ups over backprop on one core, round by round, and the
      share of the ideal: that time over the slowest block's, of blocks as the method has them.
    """
    by_variant = {
        (row["method"], row["num_devices"], row["num_processes"]): row for row in content["rows"]
    }
    baseline = by_variant["backprop", 1, 1]["step_seconds"]
    alone = {name: by_variant[f"blocks:{name}", 1, 1]["block_seconds"] for name in ("dgl", "ddg")}
    slowest = {name: [max(seconds) for seconds in rounds] for name, rounds in alone.items()}

    simulated = content["simulated_seconds"]

    cells = []
    for row in content["rows"]:
        seconds = row["step_seconds"]
        if not seconds:
            continue
        where = "1, all threads" if row["num_devices"] == 0 else f"{row['num_devices']}"
        speed_ups = [b / s for b, s in zip(baseline, seconds, strict=True)]
        is_cut = row["num_devices"] > 1 and row["method"] != "data_parallel"
        blocks = slowest["dgl" if row["method"] == "dgl" else "ddg"]
        shares = [slow / s for slow, s in zip(blocks, seconds, strict=True)]
        cells.append(
            [
                row["method"],
                str(row["num_devices"] or content["num_blocks"]),
                where,
                str(row["num_processes"]),
                spread([1000 * s for s in seconds], ".1f"),
                spread(speed_ups, ".2f"),
                f"{100 * statistics.median(shares):.0f} %" if is_cut else "",
                f"{1000 * simulated[row['method']]:.1f}" if row["num_devices"] > 1 else "",
            ]
        )
    header = ["method", "cores", "devices", "processes", "step, ms (least to most)"]
    header += ["speed-up over backprop on one core", "of its ideal", "simulated, ms"]
    lines = []
    for name, words in (("dgl", "with auxiliary heads"), ("ddg", "without")):
        ideal = statistics.median(b / s for b, s in zip(baseline, slowest[name], strict=True))
        times = [1000 * statistics.median(block) for block in zip(*alone[name], strict=True)]
        times = ", ".join(f"{ms:.1f}" for ms in times)
        lines.append(
            f"Blocks {words}, alone on one core: {times} ms; ideal speed-up over backprop "
            f"{ideal:.2f}."
        )
    return f"{markdown(header, cells)}\n\n" + "\n".join(lines)


def _percent(accuracy: Mapping[str, Any]) -> str:
    """``88.30 ± 0.21``; without a deviation for a single run."""
    text = f"{100 * accuracy['mean']:.2f}"
    return f"{text} ± {100 * accuracy['deviation']:.2f}" if len(accuracy["runs"]) > 1 else text


def search_table(summary: Mapping[str, Any]) -> str:
    """What a search chose for each number of blocks, and what it cost.

    Args:
      summary: of `search.search`, or loaded from summary.json.

    Returns:
      A Markdown table and a line.
    """
    header = ["K", "cut after layers", "heads", "margin of the last cut", "slowest block, FLOPs"]
    rows = []
    bound = f", slowest block within {summary['max_imbalance']:g} x the best"
    groupings = [(num_blocks, found) for num_blocks, found in summary["groupings"].items()]
    groupings += [(k + bound, found) for k, found in summary["balanced_groupings"].items()]
    for num_blocks, found in groupings:
        margin = found["margin"]
        near_tie = " (near-tie)" if margin is not None and 0 <= margin < NEAR_TIE else ""
        rows.append(
            [
                num_blocks,
                ", ".join(map(str, found["cuts"])) or "-",
                ", ".join(found["heads"]) or "-",
                "-" if margin is None else f"{margin:.2g}{near_tie}",
                f"{100 * found['slowest_block']:.0f} %",
            ]
        )
    seconds, cost = (
        summary["pretraining_seconds"] + summary["outer_seconds"],
        summary["cost_in_backprop_trainings"],
    )
    compared = (
        ""
        if cost is None
        else f": {cost:.2g} times a training by backprop of {summary['backprop_steps']:,} steps"
    )
    return (
        f"{summary['network']}, {summary['num_layers']} layers\n\n{markdown(header, rows)}\n\n"
        f"The search took {seconds:.0f} s, {summary['compile_seconds']:.0f} s of them compiling"
        f"{compared}."
    )


def spread(values: Sequence[float], form: str) -> str:
    """The median, and from the least to the most."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return f"{statistics.median(values):{form}} ({low} to {high})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns as wide as what is in them.

    Example:
      >>> print(markdown(["block", "top-1"], [["0", "81.00 %"], ["1", "87.35 %"]]))
      | block | top-1   |
      |-------|---------|
      | 0     | 81.00 % |
      | 1     | 87.35 % |
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
