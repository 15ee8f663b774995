"""What is most worth running next, of what the papers' tables and figures still lack."""

import collections
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import evidence
import run_folders
import verdicts

from dgl_jax import cost
from dgl_jax.config import Config
from dgl_jax.data import describe_dataset
from dgl_jax.data.sources import ARRAY_SOURCES
from dgl_jax.data.statistics import PUBLISHED
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts_and_heads, configured_blocks, configured_network


class Candidate(NamedTuple):
    """A run that is not finished yet; `helps`: how many figures and claims; `flops`: of it all."""

    configuration: str
    seed: int
    helps: float
    flops: float
    fields: dict[str, Any]

    @property
    def worth(self) -> float:
        return self.helps / self.flops


def of_the_user(configurations: Sequence[str], seeds: int) -> dict[str, tuple[float, int]]:
    """As `of_the_papers`, of files named on the command line.

    Raises:
      UserError: no such file, or two that would share a folder.
    """
    helps = {}
    for name in configurations:
        path = pathlib.Path(name.partition(":")[0])
        if not (path.is_file() and path.suffix == ".py"):
            raise UserError(
                f"--configuration={name} does not name a Python file; "
                "try --configuration=experiments/configs/quickstart.py"
            )
        helps[str(path.resolve()) + name.removeprefix(str(path))] = 1.0, seeds
    folders = [folder_name(name, 0) for name in helps]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(
                f"--configuration: two of them would have the folder {folder}; rename a file"
            )
    return helps


def of_the_papers(
    runs: Sequence[run_folders.Run], setting: str, items: Sequence[str], seeds: int | None
) -> dict[str, tuple[float, int]]:
    """What a first run of each configuration would help, and how many seeds are wanted.

    Args:
      runs: what is finished.
      setting: full, or a word of `evidence.Row.short`.
      items: names of `evidence.Item`; none for all.
      seeds: None for as many as the item wants.

    Raises:
      UserError: an item or a setting that there is none of.
    """
    known = [item.name for item in evidence.ITEMS]
    for name in items:
        if name not in known:
            raise UserError(f"--items: {name!r} is unknown; choose from {', '.join(known)}")
    short = "" if setting == run_folders.FULL else setting
    claims = verdicts.measure(runs, {})["claims"]
    open_verdicts = (verdicts.NOT_RUN, verdicts.UNDECIDED)
    helps = {}
    for item in evidence.ITEMS:
        if items and item.name not in items:
            continue
        pairs = {  # A comparison and its converse are one.
            (claim["sentence"], frozenset((comparison["a"], comparison["b"])))
            for claim in claims
            if claim["item"] == item.name
            for comparison in _compared(claim, short)
            if comparison["verdict"] in open_verdicts
        }
        undecided = [label for _, pair in pairs for label in pair]
        for row in item.rows:
            if short and short not in row.short:
                continue
            names = evidence.configurations(row, short)
            for name in names:
                before, most = helps.get(name, (0.0, 0))
                value = (1 + undecided.count(row.label)) / len(names)
                if row.unit in evidence.COUNTED:  # It comes with the other figures of the run.
                    value = 0.0
                helps[name] = before + value, seeds or max(most, item.seeds)
    if not helps:
        chosen = [item for item in evidence.ITEMS if not items or item.name in items]
        words = {word for item in chosen for row in item.rows for word in row.short}
        raise UserError(
            f"--setting={short}: no row has it; choose from full, {', '.join(sorted(words))}"
        )
    return helps


def _compared(claim: dict[str, Any], short: str) -> list[dict[str, Any]]:
    """A claim's comparisons at a setting."""
    if not short:
        return claim["comparisons"]
    if short in claim["reduced"]:
        return claim["reduced"][short]["comparisons"]
    return [comparison | {"verdict": verdicts.NOT_RUN} for comparison in claim["comparisons"]]


def rank(
    wanted: dict[str, tuple[float, int]], runs: Sequence[run_folders.Run], data_dir: str
) -> tuple[list[Candidate], dict[str, str]]:
    """What is left to run, the most worth first; and of what can't be run, why.

    Args:
      wanted: by configuration what a first run helps, and the number of seeds.
      runs: what is finished.
      data_dir: as the flag.
    """
    finished = {(run.settings, run.config.seed) for run in runs}
    same = collections.defaultdict(list)  # Several names may stand for one setting.
    for name in wanted:
        same[run_folders.learned(evidence.load(name))].append(name)
    candidates, left_out = [], {}
    for settings, names in same.items():
        name, config = names[0], evidence.load(names[0])
        helps, seeds = (reduce(wanted[n][i] for n in names) for i, reduce in enumerate((sum, max)))
        missing = [seed for seed in range(seeds) if (settings, seed) not in finished]
        if not missing:
            continue
        try:
            fields = _data_fields(config, data_dir)
            flops = training_flops(config, fields)
        except UserError as error:
            left_out[name] = str(error)
            continue
        num_done = seeds - len(missing)
        for place, seed in enumerate(missing, start=1):
            candidates.append(Candidate(name, seed, helps / (num_done + place), flops, fields))
    return sorted(candidates, key=lambda candidate: -candidate.worth), left_out


def _data_fields(config: Config, data_dir: str) -> dict[str, Any]:
    """What of a configuration changes with where the data lies."""
    path, name = pathlib.Path(data_dir), config.data.name
    if name in ARRAY_SOURCES:
        return {}
    if path.suffix != ".npz":
        return {"data.data_dir": data_dir}
    if path.stem != name:
        raise UserError(f"needs {name}, but --data_dir={path} is named after another set")
    mean, std = PUBLISHED.get(name, ((), ()))
    return {
        "data.name": "arrays",
        "data.data_dir": str(path),
        "data.mean": config.data.mean or mean,
        "data.std": config.data.std or std,
    }


_describe = functools.cache(describe_dataset)


def training_flops(config: Config, fields: dict[str, Any]) -> float:
    """Of layers and heads, forward and backward, over all images: an estimate by which to rank.

    Raises:
      UserError: the data set is not there.
    """
    description = _describe(
        name=fields.get("data.name", config.data.name),
        data_dir=fields.get("data.data_dir", config.data.data_dir),
        image_size=config.data.image_size,
    )
    num_classes, image_shape = description.num_classes, description.image_shape
    network = configured_network(config, num_classes)
    cuts, heads = choose_cuts_and_heads(config, network, num_classes, image_shape)
    blocks = configured_blocks(config, network, cuts, heads, num_classes)
    costs = cost.block_costs(blocks, image_shape)
    an_image = 3 * sum(block.layers_flops + block.head_flops for block in costs)
    images = config.train.num_steps * config.train.batch_size
    return an_image * (images or config.train.num_epochs * description.num_examples)


def folder_name(configuration: str, seed: int) -> str:
    """``table1_mlp_short/seed_0``."""
    path, _, words = configuration.partition(":")
    return "_".join([pathlib.Path(path).stem, *filter(None, words.split(","))]) + f"/seed_{seed}"
