r"""Trains every method of a configuration file with several seeds, and writes one table.

    python experiments/compare_methods.py --config=experiments/configs/methods.py \
        --variant=short --seeds=3 --workdir=runs/methods --out=runs/methods.md \
        [--methods=dgl,ddg] [--config.FIELD=VALUE ...]

The rows are the words of the file's first group (``WORDS``), so it makes the other tables too.
Each run is a process of its own, one after the other, in WORKDIR/METHOD/seed_S; the same command
goes on where it was stopped. Beside the table OUT.md stand OUT.json and OUT.png. A run that fails
is in the table as failed, and makes the exit code 1.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import runpy
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags
from tqdm import auto as tqdm

from dgl_jax import cli
from dgl_jax.config import Config, from_dict
from dgl_jax.errors import UserError
from dgl_jax.metrics import write_atomically
from dgl_jax.processes import finished_summary, train_in_process
from dgl_jax.tables import comparison_row, comparison_table

_VARIANT = flags.DEFINE_string("variant", "", "The other words of the file's variant.")
_METHODS = flags.DEFINE_list("methods", None, "Which rows; all by default.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds, from 0.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "The table's path, NAME.md.")


def main(config: Config, workdir: str) -> None:
    del config  # That of the file's default row.
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    if ":" in path:
        raise UserError(f"--config={path}: give its words as --variant={path.partition(':')[2]}")
    if not (_OUT.value or "").endswith(".md"):
        raise UserError(f"--out={_OUT.value} must be the path of a table, NAME.md")
    if "seed" in overrides:
        raise UserError(f"--config.seed={overrides['seed']}: give the number of seeds as --seeds")
    file = runpy.run_path(path)
    if "WORDS" not in file:
        raise UserError(f"--config={path} has no WORDS, whose first group would be the rows")

    # ---- Every mistake is found before the first run.
    runs, known = {}, file["WORDS"][0]
    for method in dict.fromkeys(_METHODS.value or known):
        if method not in known:
            raise UserError(f"--methods: {method!r} is unknown; choose from {', '.join(known)}")
        variant = ",".join(filter(None, (method, _VARIANT.value)))
        for seed in range(_SEEDS.value):
            mapping = file["get_config"](variant)
            mapping.update_from_flattened_dict(overrides | {"seed": seed})
            folder = os.path.join(workdir, method, f"seed_{seed}")
            summary = finished_summary(from_dict(mapping.to_dict()), folder)
            runs[method, seed] = (f"{path}:{variant}", folder, summary)

    # ---- One process a run.
    summaries, failures = {}, {}
    bar = tqdm.tqdm(total=len(runs), unit="run", disable=None)
    for (method, seed), (config_path, folder, summary) in runs.items():
        bar.set_description(f"{method}, seed {seed}")
        if summary is None:
            script = pathlib.Path(__file__).with_name("train.py")
            summary, reason = train_in_process(
                script, config_path, folder, overrides | {"seed": seed}
            )
            result = reason if summary is None else f"{100 * summary['test_top1'][-1]:.2f} %"
            bar.write(f"{method}, seed {seed}: {result}", file=sys.stderr)
        if summary is None:
            failures[method, seed] = reason
        else:
            summaries[method, seed] = summary
        bar.update()
    bar.close()

    # ---- What came of it.
    rows = []
    for method in dict.fromkeys(method for method, _ in runs):
        finished = [summary for (name, _), summary in summaries.items() if name == method]
        failed = {seed: reason for (name, seed), reason in failures.items() if name == method}
        rows.append(comparison_row(method, finished, failed))
    about = _about(list(summaries.values()))
    stem = _OUT.value.removesuffix(".md")
    os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
    count = f"{_SEEDS.value} seed{'s' if _SEEDS.value > 1 else ''}"
    title = f"{about['networks']} on {about['data_sets']}, {count}"
    table = comparison_table(rows)
    write_atomically(f"{stem}.json", json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    from dgl_jax.plots import plot_comparison  # Imports matplotlib, which takes a second.

    plot_comparison(f"{stem}.png", rows, title)
    write_atomically(
        f"{stem}.md",
        f"# {title}\n\n{table}\n\n{_about_text(about)}\n\n"
        f"![Accuracy by method]({os.path.basename(stem)}.png)\n",
    )
    print(table)
    if failures:
        sys.exit(1)


def _about(summaries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """How the numbers were made."""

    def all_of(name):
        return ", ".join(sorted({str(summary[name]) for summary in summaries})) or "nothing"

    return {
        "command": shlex.join(["python", *sys.argv]),
        "networks": all_of("network"),
        "data_sets": all_of("dataset"),
        "seeds": list(range(_SEEDS.value)),
        "device_kind": all_of("device_kind"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }


def _about_text(about: Mapping[str, Any]) -> str:
    return (
        "Test top-1 accuracy at the end, mean ± standard deviation (of a sample) over seeds "
        f"{', '.join(map(str, about['seeds']))}. Python {about['python']}, jax {about['jax']}, "
        f"flax {about['flax']}, optax {about['optax']}; device: {about['device_kind']}, "
        f"{about['cores']} cores; {about['date']}.\n\n"
        "Parameters are the network's without the auxiliary heads, whose own are in the next "
        "column. Kept is what a method keeps between steps: replay buffers, delayed gradients. "
        "Memory is the process's peak on a CPU, the device's elsewhere. A step by block "
        "is each block's work alone on one batch. Dashes: does not apply.\n\n"
        f"    {about['command']}"
    )


if __name__ == "__main__":
    cli.run(main)
