"""Prints finished runs side by side.

python experiments/compare.py runs/quickstart runs/quickstart_backprop
"""

import json
import os

import plain_flags

from dgl_jax.errors import UserError
from dgl_jax.tables import accuracy_table


def main(workdirs: list[str]) -> None:
    summaries = []
    for workdir in workdirs:
        path = os.path.join(workdir, "summary.json")
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist; finish that run first")
        with open(path) as file:
            summaries.append(json.load(file))
    if not summaries:
        raise UserError("no run folder is given; try runs/quickstart")
    print(accuracy_table(summaries))


if __name__ == "__main__":
    plain_flags.run(main, takes_arguments=True)
