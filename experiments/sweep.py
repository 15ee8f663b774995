"""Trains what the papers' tables and figures still lack; what is most worth running comes first.

    python experiments/sweep.py --runs=experiments/results/runs --data_dir=TFDS_DIR --minutes=60 \
        [--setting=short] [--items="Table 1,Figure 5"] [--seeds=3] [--at_once=2] [--dry_run]
    python experiments/sweep.py --runs=DIR --configuration=experiments/configs/table1.py:mlp,short \
        --configuration=... --seeds=3

Each run is a process of experiments/train.py, in a folder below --runs. What is finished, anywhere
below --runs, is not run again; what was cut off goes on. A run's worth is the figures and the
claims not decided yet that it helps, over the FLOPs of its training: the first seed of a figure
counts one, the next a half, then a third; of a figure that is a mean over several configurations,
each counts its share. --dry_run only prints the list.

--at_once=N runs N at a time, each with its share of the CPU's cores and of an accelerator's memory:
small networks leave most of either idle. When --minutes are over, what still runs is stopped: the
same command goes on with it from its last checkpoint. A run that fails makes the exit code 1.
"""

import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

import jax
import plain_flags
import run_folders
from absl import flags
from tqdm import auto as tqdm
from worth import Candidate, folder_name, of_the_papers, of_the_user, rank

from dgl_jax.errors import UserError
from dgl_jax.processes import end, result_of, start_training
from dgl_jax.tables import markdown

_RUNS = flags.DEFINE_string(
    "runs", None, "The folder below which run folders lie, and new ones go."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "The folder of prepared TFDS sets; or the .npz of one set, named after it."
)
_SETTING = flags.DEFINE_string("setting", run_folders.FULL, "full, or a reduced one such as short.")
_ITEMS = flags.DEFINE_list("items", [], "Which tables and figures of the report; all by default.")
_CONFIGURATIONS = flags.DEFINE_multi_string(
    "configuration", [], "FILE.py:WORDS, as often as wanted: these instead of the papers'."
)
_SEEDS = flags.DEFINE_integer(
    "seeds", None, "How many, from 0; by default as many as the item wants, else 3.", lower_bound=1
)
_MINUTES = flags.DEFINE_float("minutes", None, "Stops after so many.", lower_bound=0.0)
_AT_ONCE = flags.DEFINE_integer("at_once", 1, "How many runs at a time.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Whether to print the list and run nothing.")

_CONFIGS = pathlib.Path(__file__).resolve().parent / "configs"
_TRAIN = pathlib.Path(__file__).with_name("train.py")
_POLL_S = 0.2


def main(arguments: list[str]) -> None:
    del arguments
    if not _RUNS.value:
        raise UserError("--runs is missing; give a folder")
    root = pathlib.Path(_RUNS.value)
    root.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # Shapes only; accelerators are left to the runs.
    runs, _ = run_folders.read_runs(root)
    if _CONFIGURATIONS.value:
        helps = of_the_user(_CONFIGURATIONS.value, _SEEDS.value or 3)
    else:
        helps = of_the_papers(runs, _SETTING.value, _ITEMS.value, _SEEDS.value)
    candidates, left_out = rank(helps, runs, _DATA_DIR.value)
    print(_table(candidates))
    for configuration, reason in left_out.items():
        print(f"left out: {configuration}: {reason}")
    if not _DRY_RUN.value:
        failures = run_all(root, candidates)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        sys.exit(1 if failures else 0)


def run_all(root: pathlib.Path, candidates: Sequence[Candidate]) -> list[str]:
    """Trains them in their order until the time is over; returns what failed, a line each."""
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(128 + signal.SIGTERM))
    if _AT_ONCE.value > 1:
        fraction = f"{0.9 / _AT_ONCE.value:.3f}"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    cores = sorted(os.sched_getaffinity(0)) if _AT_ONCE.value > 1 else []
    cores_of = [cores[place :: _AT_ONCE.value] or cores for place in range(_AT_ONCE.value)]
    deadline = time.monotonic() + (
        60 * _MINUTES.value if _MINUTES.value is not None else float("inf")
    )
    waiting, running, failures = list(reversed(candidates)), {}, []
    bar = tqdm.tqdm(total=len(candidates), unit="run", disable=None)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for place, own in enumerate(cores_of):
                if place in running or not waiting:
                    continue
                candidate = waiting.pop()
                folder = root / folder_name(candidate.configuration, candidate.seed)
                process = start_training(
                    _TRAIN,
                    str(_CONFIGS / candidate.configuration),
                    str(folder),
                    candidate.fields | {"seed": candidate.seed},
                )
                running[place] = process, folder
                if own:
                    os.sched_setaffinity(process.pid, own)
                bar.set_description(folder.relative_to(root).as_posix())
            time.sleep(_POLL_S)
            for place, (process, folder) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                summary, reason = result_of(process, str(folder))
                result = reason if summary is None else f"{100 * summary['test_top1'][-1]:.2f} %"
                line = f"{folder.relative_to(root).as_posix()}: {result}"
                bar.write(line, file=sys.stderr)
                bar.update()
                if summary is None:
                    failures.append(line)
    finally:
        end([process for process, _ in running.values()])
        bar.close()
    if waiting or running:
        print(f"the time is over: {len(waiting) + len(running)} runs are left")
    return failures


def _table(candidates: Sequence[Candidate]) -> str:
    # What only counts FLOPs is worth 0.
    most = max((candidate.worth for candidate in candidates), default=0.0) or 1.0
    header = ["", "configuration", "seed", "helps", "PFLOP", "worth"]
    rows = [
        [
            str(place),
            candidate.configuration,
            str(candidate.seed),
            f"{candidate.helps:.2f}",
            f"{candidate.flops / 1e15:.3g}",
            f"{candidate.worth / most:.3g}",
        ]
        for place, candidate in enumerate(candidates, start=1)
    ]
    return markdown(header, rows) if rows else "nothing is left to run"


if __name__ == "__main__":
    plain_flags.run(main)
