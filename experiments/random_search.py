r"""Random cuts and heads, each trained from scratch: the baseline of equal cost for a search.

    python experiments/random_search.py --config=experiments/configs/sedona_cifar10.py:vgg19 \
        --workdir=runs/random_search --num_blocks=4 --trials=8 \
        --candidates=sepconv_1,sepconv_2,sepconv_3,sepconv_4 --seed=0 [--config.FIELD=VALUE ...]

Draws different groupings (K - 1 cuts and a head at each, all equally probable), trains each with
the configuration in a process of its own, one after the other, and ranks them by the validation
accuracy of the last block: WORKDIR/random_search.json and random_search.md, best first. Instead of
--trials, --budget_seconds=X starts no new trial once X seconds of training are used up. The same
command goes on where it was stopped. A trial that fails is in the table as failed, and makes the
exit code 1.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import sys
import time

from absl import flags
from ml_collections import config_flags

from dgl_jax import cli
from dgl_jax.auxiliary import OPTIONS, make_heads, options_that_apply
from dgl_jax.config import AuxiliaryConfig, Config, PartitionConfig, from_dict, to_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import configured_network
from dgl_jax.losses import local_losses
from dgl_jax.metrics import write_atomically
from dgl_jax.processes import finished_summary, train_in_process
from dgl_jax.sedona.random_groupings import count_groupings, draw_groupings
from dgl_jax.tables import random_search_table

_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", None, "K, at least 2.")
_TRIALS = flags.DEFINE_integer("trials", None, "How many groupings to train.")
_BUDGET = flags.DEFINE_float("budget_seconds", None, "Instead of --trials.")
_CANDIDATES = flags.DEFINE_list(
    "candidates", ["sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4"], "The heads to draw from."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw; the training's is --config.seed.")


def main(config: Config, workdir: str) -> None:
    # ---- Every mistake is found before the first run.
    num_layers = _check(config)
    config_path = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    groupings = draw_groupings(num_layers, _NUM_BLOCKS.value, _CANDIDATES.value, _SEED.value)
    trials, failures = [], []
    os.makedirs(workdir, exist_ok=True)

    # ---- One process a trial, until there are enough, or the time is used up.
    used_seconds = 0.0
    for trial, (cuts, heads) in enumerate(itertools.islice(groupings, _TRIALS.value)):
        if _BUDGET.value is not None and used_seconds >= _BUDGET.value:
            break
        fields = _fields(config, cuts, heads)
        folder = os.path.join(workdir, f"trial_{trial:03}")
        summary = finished_summary(_with_fields(config, fields), folder)
        start, reason = time.perf_counter(), ""
        if summary is None:
            script = pathlib.Path(__file__).with_name("train.py")
            summary, reason = train_in_process(script, config_path, folder, overrides | fields)
        # A finished run knows its own time, over all processes that it took.
        seconds = summary["wall_seconds"] if summary else time.perf_counter() - start
        used_seconds += seconds
        entry = {"trial": trial, "cuts": cuts, "heads": heads, "wall_seconds": seconds}
        if summary is None:
            failures.append(entry | {"reason": reason})
        else:
            trials.append(
                entry
                | {
                    "validation_top1": summary["validation_top1"][-1],
                    "test_top1": summary["test_top1"][-1],
                    "ensemble_last_top1": summary["ensemble_last_top1"],
                }
            )
        result = reason or f"{100 * trials[-1]['validation_top1']:.2f} % of validation"
        print(f"trial {trial}, cuts {cuts}, {', '.join(heads)}: {result}", file=sys.stderr)

        # ---- What has come of it so far.
        trials.sort(key=lambda trial: -trial["validation_top1"])
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "network": config.network.name,
            "data_set": config.data.name,
            "num_blocks": _NUM_BLOCKS.value,
            "candidates": _CANDIDATES.value,
            "seed": _SEED.value,
            "wall_seconds": used_seconds,
            "trials": trials,
            "failures": failures,
        }
        text = _text(content)
        write_atomically(
            os.path.join(workdir, "random_search.json"), json.dumps(content, indent=2) + "\n"
        )
        write_atomically(os.path.join(workdir, "random_search.md"), text)
    print(text)
    if failures:
        sys.exit(1)


def _check(config: Config) -> int:
    """Returns the network's number of layers."""
    num_blocks, candidates = _NUM_BLOCKS.value, _CANDIDATES.value
    if num_blocks is None or num_blocks < 2:
        raise UserError(f"--num_blocks={num_blocks} must be at least 2; try 4")
    if (_TRIALS.value is None) == (_BUDGET.value is None):
        raise UserError("give one of --trials=N and --budget_seconds=X, and not both")
    for flag in (_TRIALS, _BUDGET):
        if flag.value is not None and not flag.value > 0:
            raise UserError(f"--{flag.name}={flag.value} must be above 0")
    if len(set(candidates)) < len(candidates) or not candidates:
        raise UserError(f"--candidates={','.join(candidates)} must be different heads' names")
    if not config.data.validation_fraction:
        raise UserError(
            "config.data.validation_fraction=0.0 leaves nothing to rank the trials by but the "
            "test set; try 0.1"
        )
    network = configured_network(config, 10)
    num_layers = len(network.layers)
    total = count_groupings(num_layers, num_blocks, len(candidates))
    if _TRIALS.value is not None and _TRIALS.value > total:
        raise UserError(
            f"--trials={_TRIALS.value} is more than the {total} groupings there are; try {total}"
        )
    make_heads(candidates, 10)
    local_losses(config.loss, num_blocks)
    _with_fields(config, _fields(config, tuple(range(num_blocks - 1)), (candidates[0],)))
    return num_layers


def _fields(config: Config, cuts: tuple[int, ...], heads: tuple[str, ...]) -> dict[str, object]:
    """A trial's fields: they take the place of the configuration's own cuts and heads."""
    options = {option: getattr(config.auxiliary, option) for option in OPTIONS}
    sections = {
        "partition": PartitionConfig(strategy="explicit", cuts=cuts),
        "auxiliary": AuxiliaryConfig(per_block=heads, **options_that_apply(heads, options)),
    }
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        for name, value in dataclasses.asdict(fields).items()
    }


def _with_fields(config: Config, fields: dict[str, object]) -> Config:
    mapping = to_dict(config)
    for name, value in fields.items():
        section, _, field = name.partition(".")
        mapping[section][field] = value
    return from_dict(mapping)


def _text(content: dict) -> str:
    title = f"{content['network']} on {content['data_set']}, K = {content['num_blocks']}"
    about = (
        "The validation accuracy of the last block ranks; all accuracies are those at the end. "
        f"{content['wall_seconds']:.0f} seconds of training in all; draw's seed {content['seed']}."
    )
    failures = [
        f"- trial {entry['trial']}, cuts {entry['cuts']}, {', '.join(entry['heads'])}: "
        f"failed: {entry['reason']}"
        for entry in content["failures"]
    ]
    parts = [f"# Random search: {title}", random_search_table(content["trials"]), about]
    parts += ["\n".join(failures)] * bool(failures)
    return "\n\n".join([*parts, f"    {content['command']}\n"])


if __name__ == "__main__":
    cli.run(main)
