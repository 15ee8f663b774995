"""`benchmark.py compile`: how long it takes until the first step is done.

Unrolled layers and runs of equal layers as loops (config.network.scan_layers), each in processes of
their own: the first with an empty cache of programs, the second with what the first left there.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
from absl import flags

from benchmarks import setting, step
from dgl_jax import metrics
from dgl_jax.errors import UserError
from dgl_jax.tables import markdown

_NUM_BLOCKS = flags.DEFINE_string("compile_blocks", "2", "compile: K; 1: backprop.")
_WORKER = flags.DEFINE_string("compile_worker", None, "For its own use: the cache.")


def compilation(folder: pathlib.Path) -> list[str]:
    """Measures each variant; returns what failed."""
    if _WORKER.value:
        _first_step(_WORKER.value)
        return []
    rows = []
    for scan_layers in (False, True):
        cache = folder / "compile_cache"
        shutil.rmtree(cache, ignore_errors=True)
        for state in ("cold", "warm"):
            command = [sys.executable, *sys.argv, f"--compile_worker={cache}"]
            command.append(f"--scan_layers={scan_layers}")
            result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if result.returncode:
                raise UserError(f"a process has failed: {' '.join(command)}")
            measured = json.loads(result.stdout.splitlines()[-1])
            rows.append({"scan_layers": scan_layers, "cache": state} | measured)
        shutil.rmtree(cache)
    content = setting.machine() | {"rows": rows, "device": jax.devices()[0].device_kind}
    table = compile_table(rows)
    title = (
        f"Until the first step: {setting.NETWORK.value} x {setting.WIDTH_FACTOR.value:g}, "
        f"K = {_NUM_BLOCKS.value}, batches of {setting.BATCH_SIZE.value}"
    )
    notes = (
        f"{content['device']}, {setting.on_what(content)}. Seconds from when all modules are "
        "imported; initialising, and then one fused step. MLP-SR-aux heads, uniform cuts. One run "
        "each."
    )
    setting.write(folder, "compile", content, title, [table, notes])
    print(table)
    return []


def compile_table(rows: list[dict[str, Any]]) -> str:
    """One row a variant."""
    header = ["equal layers", "cache", "until the states are there, s"]
    header += ["until the first step is done, s", "of it tracing, lowering, compiling, s"]
    names = ("init_seconds", "first_step_seconds", "compile_seconds", "second_step_seconds")
    cells = [
        [
            "a loop" if row["scan_layers"] else "unrolled",
            row["cache"],
            *(f"{row[name]:.1f}" for name in names),
        ]
        for row in rows
    ]
    return markdown([*header, "second step, s"], cells)


def _first_step(cache: str) -> None:
    """What a process measures."""
    jax.config.update("jax_compilation_cache_dir", cache)
    config = step.variant_config(
        setting.NETWORK.value, setting.WIDTH_FACTOR.value, _NUM_BLOCKS.value
    )
    start = time.perf_counter()
    run, _, _ = step.fused(config)
    init_seconds = time.perf_counter() - start
    run(1)
    first_step_seconds = time.perf_counter() - start
    compile_seconds = metrics.compile_seconds()
    start = time.perf_counter()
    run(1)
    print(
        json.dumps(
            {
                "init_seconds": init_seconds,
                "first_step_seconds": first_step_seconds,
                "compile_seconds": compile_seconds,
                "second_step_seconds": time.perf_counter() - start,
            }
        )
    )
