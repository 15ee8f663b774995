"""Prints finished runs side by side.

python experiments/compare.py runs/quickstart runs/quickstart_backprop
"""

import json
import os
import sys

from absl import app

from dgl_jax.tables import accuracy_table


def main(argv: list[str]) -> None:
    summaries = []
    for workdir in argv[1:]:
        path = os.path.join(workdir, "summary.json")
        if not os.path.exists(path):
            print(f"error: {path} does not exist; finish that run first", file=sys.stderr)
            sys.exit(2)
        with open(path) as file:
            summaries.append(json.load(file))
    if not summaries:
        print("error: no run folder is given; try runs/quickstart", file=sys.stderr)
        sys.exit(2)
    print(accuracy_table(summaries))


if __name__ == "__main__":
    app.run(main)
