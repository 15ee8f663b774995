"""What all benchmarks share: their flags, how they take turns, and what stands beside a figure."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from dgl_jax.errors import UserError
from dgl_jax.metrics import write_atomically

NETWORK = flags.DEFINE_string("network", "resnet50", "The network.")
WIDTH_FACTOR = flags.DEFINE_float("width_factor", 0.25, "Of the network's channels.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Training images.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "In each, everything measured has a turn.", 1)
STEPS = flags.DEFINE_integer("steps", 20, "Timed steps of a turn.", lower_bound=1)

NUM_CLASSES = 10


def interleaved_seconds(
    turns: Mapping[str, Callable[[int], None]], num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Seconds a step, of each in turn, round by round: what slows the machine down slows all.

    Args:
      turns: ``run(number)`` runs so many steps and waits for their end.
      num_rounds: how often each has its turn, after one step each to warm up.
      num_steps: of a turn.
    """
    for run in turns.values():
        run(1)
    seconds = {name: [] for name in turns}
    for _ in range(num_rounds):
        for name, run in turns.items():
            start = time.perf_counter()
            run(num_steps)
            seconds[name].append((time.perf_counter() - start) / num_steps)
    return seconds


def whole_numbers(flag: flags.FlagHolder, least: int) -> list[int]:
    """The numbers of a list flag, each once.

    Raises:
      UserError: on what is no whole number, or below ``least``.
    """
    words = flag.value
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise UserError(
            f"--{flag.name}={','.join(words)} must be whole numbers of at least {least}; "
            f"try {','.join(flag.default)}"
        )
    return [int(word) for word in dict.fromkeys(words)]


def machine() -> dict[str, Any]:
    """What stands beside every figure: the command, and what it ran on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "num_cpus": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def on_what(content: Mapping[str, Any]) -> str:
    """`machine` in words."""
    xla_flags = f", XLA_FLAGS={content['xla_flags']}" if content["xla_flags"] else ""
    return (
        f"{content['num_cpus']} CPUs, jax {content['jax']}, Python {content['python']}{xla_flags}"
    )


def write(
    folder: pathlib.Path, name: str, content: Mapping[str, Any], title: str, parts: Sequence[str]
) -> None:
    """Writes FOLDER/NAME.json, and NAME.md: title, parts (tables, notes) and the command."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(os.path.join(folder, f"{name}.json"), text)
    text = "\n\n".join([f"# {title}", *parts, f"    {content['command']}\n"])
    write_atomically(os.path.join(folder, f"{name}.md"), text)
