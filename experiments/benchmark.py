"""Time and memory of the parts that cost most, measured where it runs.

    python experiments/benchmark.py search_step --out=DIR [--network=resnet50 --width_factor=0.25 \
        --batch_size=128 --inner_steps=5 --image_size=32 --validation_batch_size=1024 \
        --estimators=unrolled,first_order,finite_difference --remat=on,off --repeats=3]

    python experiments/benchmark.py parallel --out=DIR [--num_blocks=2 --network=resnet18 \
        --batch_size=64 --methods=dgl,ddg,data_parallel,pipeline_backprop:gpipe --rounds=7 --steps=20]

The first argument says what is measured; DIR/WHAT.json and DIR/WHAT.md get the result. Images are
random.

search_step: one outer step of SEDONA's search (the hypergradient after T inner steps) for each
estimator, with and without remat, and beside it one inner step and one step of plain backprop of
the same network and batch. Each variant has two processes of its own: one compiles, the other
takes the program from a cache and runs it, so that its peak memory is that of running alone. A
variant that is killed, lacks memory or runs past --timeout_s is in the table as failed.

dispatch: the host's part of a step, with blocks that compute next to nothing.

parallel: K blocks on K cores, and what one would do instead; see parallel_benchmark.py.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import parallel_benchmark
from absl import app, flags, logging

from dgl_jax import cost
from dgl_jax.auxiliary import make_heads
from dgl_jax.block import make_block_step
from dgl_jax.config import LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.metrics import write_atomically
from dgl_jax.models import check_image_shape, make_network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.sedona.hypergradient import ESTIMATORS, make_hypergradient
from dgl_jax.sedona.inner import make_inner_step
from dgl_jax.sedona.relaxation import init_state, init_variables, relax, relaxed_network
from dgl_jax.tables import search_step_table
from dgl_jax.types import Batch

_OUT = flags.DEFINE_string("out", None, "The folder of the results.")
_NETWORK = flags.DEFINE_string("network", "resnet50", "The network.")
_WIDTH_FACTOR = flags.DEFINE_float("width_factor", 0.25, "Of the network's channels.")
_CANDIDATES = flags.DEFINE_list(
    "candidates", ["sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4"], "The candidate heads."
)
_ESTIMATORS = flags.DEFINE_list(
    "estimators", ["unrolled", "first_order", "finite_difference"], "Of the outer gradient."
)
_REMAT = flags.DEFINE_list("remat", ["on", "off"], "on: inner steps are computed again.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 32, "Pixels a side.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Training images.", lower_bound=1)
_VALIDATION_BATCH_SIZE = flags.DEFINE_integer(
    "validation_batch_size", 1024, "Validation images of an outer step.", lower_bound=1
)
_INNER_STEPS = flags.DEFINE_integer("inner_steps", 5, "T.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs, after one to warm up.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout_s", 3600, "Of one variant, its compilation included.")
# What a process of one variant is given: ESTIMATOR,on,compile; "off" for "on", "run" after it.
_VARIANT = flags.DEFINE_list("variant", None, "For its own use.")

_NUM_CLASSES = 10


def search_step(folder: pathlib.Path) -> list[str]:
    """Measures each variant in a process of its own; returns what failed unexpectedly."""
    for flag, known in ((_ESTIMATORS, ESTIMATORS), (_REMAT, ("on", "off"))):
        for word in flag.value:
            if word not in known:
                raise UserError(f"--{flag.name}={word} is unknown; choose from {', '.join(known)}")
    if _VARIANT.value:
        _measure_search_step(folder, *_VARIANT.value)
        return []
    jax.config.update("jax_platforms", "cpu")  # This process leaves accelerators to the others.
    network = make_network(_NETWORK.value, _NUM_CLASSES, width_factor=_WIDTH_FACTOR.value)
    check_image_shape(network, (_IMAGE_SIZE.value, _IMAGE_SIZE.value, 3))
    make_heads(_CANDIDATES.value, _NUM_CLASSES)

    rows, unexpected = [], []
    for estimator in _ESTIMATORS.value:
        for remat in _REMAT.value:
            row, is_expected = _run_variant(folder, estimator, remat)
            rows.append(row)
            if not is_expected:
                unexpected.append(f"{estimator}, remat {remat}: {row['failure']}")
            # After each variant: the next may take the machine with it.
            content = parallel_benchmark.machine() | {"rows": rows}
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(os.path.join(folder, "search_step.json"), text)
            write_atomically(os.path.join(folder, "search_step.md"), _search_step_text(content))
    print(search_step_table(rows))
    return unexpected


def _run_variant(folder: pathlib.Path, estimator: str, remat: str) -> tuple[dict[str, Any], bool]:
    """What one variant's process has measured; and whether it ended in a way that is a result."""
    path = _variant_path(folder, estimator, remat)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    failure, is_expected = None, True
    with open(log, "w") as file:
        try:
            for part in ("compile", "run"):
                command = [sys.executable, *sys.argv, f"--variant={estimator},{remat},{part}"]
                code = subprocess.run(
                    command, check=False, stdout=file, stderr=file, timeout=_TIMEOUT.value
                ).returncode
                if code:
                    break
        except subprocess.TimeoutExpired:
            code, failure = 0, f"ran past {_TIMEOUT.value:g} s"
    shutil.rmtree(_cache(path), ignore_errors=True)  # Another measurement compiles again.
    if code:
        text = log.read_text()
        out_of_memory = ("RESOURCE_EXHAUSTED", "bad_alloc", "out of memory", "Out of memory")
        if any(word in text for word in out_of_memory):
            failure = "out of memory"
        elif code == -9:
            failure = "killed, as for lack of memory"
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            failure, is_expected = (lines or [f"exit code {code}"])[-1], False
    measured = json.loads(path.read_text()) if path.exists() else {}
    row = {"estimator": estimator, "remat": remat == "on", "failure": failure} | measured
    print(f"{estimator}, remat {remat}: {failure or 'measured'}", file=sys.stderr)
    return row, is_expected


def _measure_search_step(folder: pathlib.Path, estimator: str, remat: str, part: str) -> None:
    """Measures one variant; writes what it has after each part, as the next may be its end."""
    path = _variant_path(folder, estimator, remat)
    jax.config.update("jax_compilation_cache_dir", str(_cache(path)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 10)
    measured = json.loads(path.read_text()) if part == "run" else {}

    def keep(**numbers):
        measured.update(numbers)
        write_atomically(str(path), json.dumps(measured))

    keep(device=jax.devices()[0].device_kind)
    network = make_network(_NETWORK.value, _NUM_CLASSES, width_factor=_WIDTH_FACTOR.value)
    loss_fn = make_loss_fn(LossConfig())
    relaxed = relaxed_network(network, make_heads(_CANDIDATES.value, _NUM_CLASSES), loss_fn)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)
    key = jax.random.key(0)
    batches = [_batch(step, _BATCH_SIZE.value) for step in range(_INNER_STEPS.value)]
    validation = _batch(_INNER_STEPS.value, _VALIDATION_BATCH_SIZE.value)
    variables = init_variables(len(network.layers), len(relaxed.candidates))
    state = init_state(relaxed, optimizer, key, batches[0].images)

    # ---- The outer step comes first: what follows would add to the peak.
    hypergradient = make_hypergradient(
        ESTIMATORS[estimator], relaxed, optimizer, remat=remat == "on"
    )
    arguments = (variables, state, batches, validation, key)
    start = time.perf_counter()
    compiled = jax.jit(hypergradient).lower(*arguments).compile()
    if part == "compile":
        analysis = compiled.memory_analysis()
        keep(
            compile_seconds=time.perf_counter() - start,
            xla_temp_bytes=analysis and analysis.temp_size_in_bytes,
        )
        return
    keep(memory_before_bytes=cost.peak_memory_bytes())
    step_seconds = _seconds(lambda: compiled(*arguments))
    keep(step_seconds=step_seconds, peak_memory_bytes=cost.peak_memory_bytes())

    # ---- What it is compared with.
    inner_step = jax.jit(make_inner_step(relaxed, optimizer))
    decisions = relax(variables)
    keep(inner_step_seconds=_seconds(lambda: inner_step(state, decisions, batches[0], key)))
    blocks = METHODS["backprop"].make_blocks(network, (), (), loss_fn)
    placements = make_placements(PlacementConfig(), num_blocks=1)
    image_shape = batches[0].images.shape[1:]
    (block_state,) = init_states(blocks, optimizer, key, image_shape, placements)
    step = jax.jit(make_block_step(blocks[0], optimizer))
    images, labels = batches[0].images, batches[0].labels
    keep(backprop_step_seconds=_seconds(lambda: step(block_state, images, labels, key)))


def _variant_path(folder: pathlib.Path, estimator: str, remat: str) -> pathlib.Path:
    return folder / "search_step" / f"{estimator}_remat_{remat}.json"


def _cache(variant_path: pathlib.Path) -> pathlib.Path:
    return variant_path.with_suffix(".cache")


def _batch(seed: int, size: int) -> Batch:
    images_key, labels_key = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(images_key, (size, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3))
    return Batch(images, jax.random.randint(labels_key, (size,), 0, _NUM_CLASSES))


def _seconds(run: Callable[[], Any]) -> list[float]:
    """The seconds of each timed run, after one to warm up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def _search_step_text(content: dict[str, Any]) -> str:
    devices = {row["device"] for row in content["rows"] if "device" in row}
    title = (
        f"# One outer step: {_NETWORK.value} x {_WIDTH_FACTOR.value:g}, T = {_INNER_STEPS.value}, "
        f"batches of {_BATCH_SIZE.value} and {_VALIDATION_BATCH_SIZE.value}, "
        f"{_IMAGE_SIZE.value} pixels"
    )
    notes = (
        f"{', '.join(sorted(devices)) or 'unknown device'}, {content['num_cpus']} CPUs, "
        f"jax {content['jax']}. Seconds are the median "
        f"of {_REPEATS.value}. Peak: of the device, or on a CPU of the whole process, which has "
        '"process before" when it has loaded the compiled step.'
    )
    table = search_step_table(content["rows"])
    return "\n\n".join([title, table, notes, f"    {content['command']}\n"])


_SUBCOMMANDS = {
    "search_step": search_step,
    "parallel": parallel_benchmark.parallel,
    "dispatch": parallel_benchmark.dispatch,
}


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) != 2 or argv[1] not in _SUBCOMMANDS:
            raise UserError(
                f"{' '.join(argv[1:]) or 'nothing'} is not what can be measured; "
                f"give one of {', '.join(_SUBCOMMANDS)}"
            )
        if not _OUT.value:
            raise UserError("--out is missing; give a folder")
        os.makedirs(_OUT.value, exist_ok=True)
        failures = _SUBCOMMANDS[argv[1]](pathlib.Path(_OUT.value))
    except UserError as error:
        _fail([str(error)], 2)
    if failures:
        _fail(failures, 1)


def _fail(messages: list[str], code: int) -> None:
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail([" ".join(str(error).split())], 2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
