"""Time and memory of what costs most, measured where it runs.

    python experiments/benchmark.py WHAT --out=DIR [--FLAG=VALUE ...]

DIR/WHAT.json and DIR/WHAT.md get the result. Images are random. Everything that is compared takes
turns in one run; figures are medians over --rounds, beside the least and the most. WHAT is

- step: a step of DGL beside backprop's, on one device, and beside PyTorch's;
- memory: what a step of DGL needs beside backprop's, from the compiler;
- compile_for: what all programs need on accelerators, from their compilers; none is needed;
- compile: the time until the first step is done, with and without a cache of programs;
- sedona: one outer step of SEDONA's search;
- parallel: K blocks on K cores, and what one would do instead;
- dispatch: the host's part of a step, with blocks that compute next to nothing;
- data: how fast input arrives, streamed and from memory;
- replay: the buffers of the asynchronous methods: writing, reading, and what is copied.

The files of experiments/benchmarks have the flags of each.
"""

import importlib
import os
import pathlib
import sys
from collections.abc import Callable

import plain_flags
from absl import flags, logging

from dgl_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "The folder of the results.")

# What is measured: the file and its function, which writes the results to a folder and returns what
# failed unexpectedly, a line each. Only that file is imported, with what it needs and its flags.
_SUBCOMMANDS = {
    "step": "step.step",
    "memory": "memory.memory",
    "compile_for": "compile_for.compile_for",
    "compile": "compilation.compilation",
    "sedona": "sedona.sedona",
    "parallel": "parallel.parallel",
    "dispatch": "parallel.dispatch",
    "data": "data.data",
    "replay": "replay.replay",
}


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(arguments) != 1 or arguments[0] not in _SUBCOMMANDS:
        raise UserError(
            f"{' '.join(arguments) or 'nothing'} is not what can be measured; "
            f"give one of {', '.join(_SUBCOMMANDS)}"
        )
    if not _OUT.value:
        raise UserError("--out is missing; give a folder")
    os.makedirs(_OUT.value, exist_ok=True)
    failures = _subcommand(arguments[0])(pathlib.Path(_OUT.value))
    if failures:
        plain_flags.fail(*failures, code=1)


def _subcommand(what: str) -> Callable[[pathlib.Path], list[str]]:
    module, _, function = _SUBCOMMANDS[what].partition(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        if word in _SUBCOMMANDS:
            _subcommand(word)  # Defines its flags.
    plain_flags.run(main, takes_arguments=True)
