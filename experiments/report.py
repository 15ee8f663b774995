"""Sets what was measured beside what the papers report; says what holds and what was not run.

    python experiments/report.py --runs=experiments/results/runs --out=experiments/results/report

Reads run folders (config.json, summary.json, metrics.jsonl, drift.json) at any depth below --runs; trains
nothing. What the papers say is in `evidence.py`. A run counts for a row if its configuration is
the row's but for what `learned` leaves out. Writes report.md, report.html (one file, pictures
inside), report.json (every figure with its runs' folders), and the pictures, NAME.svg.
"""

import json
import os
import pathlib
from typing import Any

import plain_flags
from absl import flags
from report_page import draw, page, to_html, to_markdown
from run_folders import read_runs
from verdicts import measure

from dgl_jax.errors import UserError
from dgl_jax.metrics import write_atomically

_RUNS = flags.DEFINE_string("runs", None, "The folder below which run folders lie.")
_OUT = flags.DEFINE_string("out", None, "The folder of the report.")


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


def main(arguments: list[str]) -> None:
    del arguments
    for flag in (_RUNS, _OUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; give a folder")
    for claim in make_report(_RUNS.value, _OUT.value)["claims"]:
        print(f"{claim['verdict']}: {claim['sentence']}")


if __name__ == "__main__":
    plain_flags.run(main)
