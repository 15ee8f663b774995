"""`benchmark.py sedona`: one outer step of SEDONA's search.

The hypergradient after T inner steps, for each estimator, with and without remat, and beside it
one inner step and one step of plain backprop of the same network and batch. Each variant has two
processes of its own: one compiles, the other takes the program from a cache and runs it, so that
its peak memory is that of running alone. A variant that is killed, lacks memory or runs past
--timeout_s is in the table as failed.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from benchmarks import setting
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
from dgl_jax.tables import sedona_table
from dgl_jax.types import Batch

_CANDIDATES = flags.DEFINE_list(
    "candidates", ["sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4"], "The candidate heads."
)
_ESTIMATORS = flags.DEFINE_list(
    "estimators", ["unrolled", "first_order", "finite_difference"], "Of the outer gradient."
)
_REMAT = flags.DEFINE_list("remat", ["on", "off"], "on: inner steps are computed again.")
_VALIDATION_BATCH_SIZE = flags.DEFINE_integer(
    "validation_batch_size", 1024, "Validation images of an outer step.", lower_bound=1
)
_INNER_STEPS = flags.DEFINE_integer("inner_steps", 5, "T.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs, after one to warm up.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout_s", 3600, "Of one variant, its compilation included.")
# What a process of one variant is given: ESTIMATOR,on,compile; "off" for "on", "run" after it.
_VARIANT = flags.DEFINE_list("variant", None, "For its own use.")


def sedona(folder: pathlib.Path) -> list[str]:
    """Measures each variant in a process of its own; returns what failed unexpectedly."""
    for flag, known in ((_ESTIMATORS, ESTIMATORS), (_REMAT, ("on", "off"))):
        for word in flag.value:
            if word not in known:
                raise UserError(f"--{flag.name}={word} is unknown; choose from {', '.join(known)}")
    if _VARIANT.value:
        _measure_outer_step(folder, *_VARIANT.value)
        return []
    jax.config.update("jax_platforms", "cpu")  # This process leaves accelerators to the others.
    network = make_network(
        setting.NETWORK.value, setting.NUM_CLASSES, width_factor=setting.WIDTH_FACTOR.value
    )
    check_image_shape(network, (setting.IMAGE_SIZE.value, setting.IMAGE_SIZE.value, 3))
    make_heads(_CANDIDATES.value, setting.NUM_CLASSES)

    rows, unexpected = [], []
    for estimator in _ESTIMATORS.value:
        for remat in _REMAT.value:
            row, is_expected = _run_variant(folder, estimator, remat)
            rows.append(row)
            if not is_expected:
                unexpected.append(f"{estimator}, remat {remat}: {row['failure']}")
            # After each variant: the next may take the machine with it.
            content = setting.machine() | {"rows": rows}
            parts = [sedona_table(rows), _notes(content)]
            setting.write(folder, "sedona", content, _title(), parts)
    print(sedona_table(rows))
    return unexpected


def _run_variant(folder: pathlib.Path, estimator: str, remat: str) -> tuple[dict[str, Any], bool]:
    """What one variant's process has measured; and whether it ended in a way that is a result."""
    path = _variant_path(folder, estimator, remat)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    shutil.rmtree(_cache(path), ignore_errors=True)  # Of a measurement that was killed.
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


def _measure_outer_step(folder: pathlib.Path, estimator: str, remat: str, part: str) -> None:
    """Measures one variant; writes what it has after each part, as the next may be its end."""
    path = _variant_path(folder, estimator, remat)
    jax.config.update("jax_compilation_cache_dir", str(_cache(path)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    measured = json.loads(path.read_text()) if part == "run" else {}

    def keep(**numbers):
        measured.update(numbers)
        write_atomically(str(path), json.dumps(measured))

    keep(device=jax.devices()[0].device_kind)
    network = make_network(
        setting.NETWORK.value, setting.NUM_CLASSES, width_factor=setting.WIDTH_FACTOR.value
    )
    loss_fn = make_loss_fn(LossConfig())
    relaxed = relaxed_network(network, make_heads(_CANDIDATES.value, setting.NUM_CLASSES), loss_fn)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)
    key = jax.random.key(0)
    batches = [_batch(step, setting.BATCH_SIZE.value) for step in range(_INNER_STEPS.value)]
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
    return folder / "sedona" / f"{estimator}_remat_{remat}.json"


def _cache(variant_path: pathlib.Path) -> pathlib.Path:
    return variant_path.with_suffix(".cache")


def _batch(seed: int, size: int) -> Batch:
    images_key, labels_key = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(
        images_key, (size, setting.IMAGE_SIZE.value, setting.IMAGE_SIZE.value, 3)
    )
    return Batch(images, jax.random.randint(labels_key, (size,), 0, setting.NUM_CLASSES))


def _seconds(run: Callable[[], Any]) -> list[float]:
    """The seconds of each timed run, after one to warm up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def _title() -> str:
    return (
        f"One outer step: {setting.NETWORK.value} x {setting.WIDTH_FACTOR.value:g}, "
        f"T = {_INNER_STEPS.value}, batches of {setting.BATCH_SIZE.value} and "
        f"{_VALIDATION_BATCH_SIZE.value}, {setting.IMAGE_SIZE.value} pixels"
    )


def _notes(content: dict[str, Any]) -> str:
    devices = {row["device"] for row in content["rows"] if "device" in row}
    return (
        f"{', '.join(sorted(devices)) or 'unknown device'}, {setting.on_what(content)}. Seconds "
        f"are the median of {_REPEATS.value}. Peak: of the device, or on a CPU of the whole "
        'process, which has "process before" when it has loaded the compiled step.'
    )
