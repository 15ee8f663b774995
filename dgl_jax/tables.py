"""Runs' summaries as a table that people read."""

from collections.abc import Mapping, Sequence
from typing import Any


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
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "Test top-1 accuracy by block\n\n" + "\n".join(lines)
