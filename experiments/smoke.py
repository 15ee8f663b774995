r"""Checks on whatever devices there are that the project works: `make smoke`.

python experiments/smoke.py [--size=tiny] [--out=DIR]

One table, a line a check; exit code 1 if one failed. Under five minutes on one GPU. ``--size=tiny``
is for two CPU cores: smaller networks, the same checks.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import plain_flags
from absl import flags, logging

_SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "How large the networks are.")
_OUT = flags.DEFINE_string("out", None, "A folder for smoke.md and smoke.json; none by default.")

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NUM_STEPS = 20
# Those of these checks whose blocks have programs and devices of their own.
_PIPELINED = ("ddg", "features_replay", "pipeline_backprop", "async_dgl_parallel")


def main(arguments: list[str]) -> None:
    del arguments
    # Two processes share the device in the first check, and its memory is looked at in another.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from dgl_jax.methods import METHODS

    jax.config.update("jax_num_cpu_devices", 2)  # Where there is nothing better.
    logging.set_verbosity(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "programs"))
        checks: dict[str, Callable[[pathlib.Path], str]] = {
            "memory of a step, beside the compiler's plan": _memory,
            "a run killed and resumed": _kill_and_resume,
            "time of a step, DGL over backprop": _step_time,
            "fused = pipelined": _fused_is_pipelined,
            "bfloat16": lambda workdir: _train(workdir, "dgl", **{"network.dtype": "bfloat16"}),
            "search": _search,
        }
        for method in METHODS:
            checks[f"20 updates of {method}"] = lambda workdir, method=method: _train(
                workdir, method
            )
        rows = []
        for index, (name, check) in enumerate(checks.items()):
            start = time.perf_counter()
            try:
                # What a run prints is not the check's to show.
                with contextlib.redirect_stderr(io.StringIO()):
                    result, passed = check(workdir / str(index)), True
            except Exception as error:  # noqa: BLE001 it is a line of the table
                result, passed = " ".join(f"{type(error).__name__}: {error}".split())[:300], False
            seconds = time.perf_counter() - start
            rows.append({"check": name, "passed": passed, "result": result, "seconds": seconds})
            mark = "ok    " if passed else "FAILED"
            print(f"[{index + 1}/{len(checks)}] {mark} {name}: {result} ({seconds:.0f} s)")
            sys.stdout.flush()
    _write(rows)
    if not all(row["passed"] for row in rows):
        sys.exit(1)


def _write(rows: list[dict]) -> None:
    from dgl_jax.metrics import write_atomically
    from dgl_jax.provenance import provenance
    from dgl_jax.tables import markdown

    about = provenance()
    table = markdown(
        ["check", "", "result", "seconds"],
        [
            [
                row["check"],
                "ok" if row["passed"] else "FAILED",
                row["result"],
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
    )
    text = (
        f"{about['num_devices']} x {about['device_kind']} ({about['platform']}), jax "
        f"{about['versions']['jax']}, Python {about['versions']['python']}, size {_SIZE.value}\n\n"
        f"{table}\n"
    )
    print("\n" + text)
    if _OUT.value:
        folder = pathlib.Path(_OUT.value).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        content = {"made_by": about, "size": _SIZE.value, "checks": rows}
        write_atomically(str(folder / "smoke.json"), json.dumps(content, indent=2) + "\n")
        write_atomically(str(folder / "smoke.md"), "# Smoke test\n\n" + text)


def _fields(method: str, **fields) -> dict:
    """A run of 20 updates a block in two blocks, or in one where the method has but one."""
    import jax

    from dgl_jax.config import ONE_BLOCK_METHODS

    tiny = _SIZE.value == "tiny"
    common = {
        "method.name": method,
        "network.name": "cnn4",
        "network.width_factor": 1 / 16 if tiny else 1.0,
        "auxiliary.name": "pred" if tiny else "mlp_sr",
        "data.name": "embedded",
        "data.crop_padding": 0,
        "train.batch_size": 32 if tiny else 128,
        "train.num_steps": _NUM_STEPS,
        "train.num_epochs": 0.0,
        "train.log_every_steps": 5,
        "optimizer.learning_rate": 0.02,
        "optimizer.schedule": "constant",
    }
    if method not in ONE_BLOCK_METHODS:
        common |= {"partition.strategy": "uniform", "partition.num_blocks": 2}
    if method in _PIPELINED:
        num_devices = min(2, len(jax.devices()))
        common |= {"placement.kind": "pipelined", "placement.num_devices": num_devices}
    if method.startswith("async_dgl"):
        common["replay.buffer_size"] = 4
    if method in ("dni", "cdni"):  # With the others' rate synthetic gradients diverge.
        common |= {"optimizer.name": "adam", "optimizer.learning_rate": 1e-3}
    return common | fields


def _config(config_class, fields: dict):
    from dgl_jax.config import default_config, from_dict

    config = default_config(config_class)
    config.update_from_flattened_dict(fields)
    return from_dict(config.to_dict(), config_class)


def _run(workdir: pathlib.Path, method: str, **fields) -> dict:
    from dgl_jax.config import Config
    from dgl_jax.train import train_and_evaluate

    return train_and_evaluate(_config(Config, _fields(method, **fields)), str(workdir))


def _losses(workdir: pathlib.Path, block: int) -> list[float]:
    from dgl_jax.metrics import read_metrics

    name = f"train/block_{block}/loss"
    return [line[name] for line in read_metrics(str(workdir / "metrics.jsonl")) if name in line]


def _train(workdir: pathlib.Path, method: str, **fields) -> str:
    """A run whose last block's loss is finite, which the run itself checks, and falls."""
    summary = _run(workdir, method, **fields)
    losses = _losses(workdir, summary["num_blocks"] - 1)
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    return (
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, test {100 * summary['test_top1'][-1]:.0f} %, "
        f"{summary['updates_per_block']} updates on {summary['num_devices']} device(s)"
    )


def _kill_and_resume(workdir: pathlib.Path) -> str:
    """kill -9 after the first checkpoint, the same command again, and a run that was let alone."""
    import jax

    fields = {"train.num_steps": 60, "checkpoint.every_steps": 10}
    command = [
        *(sys.executable, str(_ROOT / "experiments" / "train.py")),
        f"--config={_ROOT / 'experiments' / 'configs' / 'quickstart.py'}",
        f"--workdir={workdir / 'killed'}",
        *(f"--config.{name}={value}" for name, value in _fields("dgl", **fields).items()),
    ]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **quiet)
    checkpoints = workdir / "killed" / "checkpoints"
    while process.poll() is None:
        if checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir()):
            process.kill()
        time.sleep(0.01)
    output = process.communicate()[0]
    assert process.returncode == -9, f"it ended before it could be killed: {output[-300:]}"
    result = subprocess.run(command, check=False, **quiet)
    assert result.returncode == 0, result.stdout[-300:]
    resumed = json.loads((workdir / "killed" / "summary.json").read_text())
    whole = _run(workdir / "whole", "dgl", **fields)
    if resumed["params_sha256"] == whole["params_sha256"]:
        return "bitwise the parameters of a run that was let alone"
    # A GPU's compiler measures which of its programs are the fastest, and may choose others.
    pairs = list(zip(resumed["test_loss"], whole["test_loss"], strict=True))
    assert jax.default_backend() == "gpu", f"other parameters; losses {pairs}"
    assert all(abs(a - b) < 0.02 * b for a, b in pairs), f"losses {pairs}"
    return f"losses of a run that was let alone within 2 %, not bitwise: {pairs}"


def _fused_is_pipelined(workdir: pathlib.Path) -> str:
    import jax
    import numpy as np

    num_devices = min(2, len(jax.devices()))
    pipelined = {"placement.kind": "pipelined", "placement.num_devices": num_devices}
    for name, fields in (("fused", {}), ("pipelined", pipelined)):
        _run(workdir / name, "dgl", precision="highest", **fields)
    losses = [
        np.stack([_losses(workdir / name, block) for block in (0, 1)])
        for name in ("fused", "pipelined")
    ]
    difference = float(np.max(np.abs(losses[1] / losses[0] - 1)))
    assert difference < 1e-3, f"losses differ by {difference:.1e}"
    return f"losses of 20 steps within {difference:.1e} on {num_devices} device(s)"


def _search(workdir: pathlib.Path) -> str:
    from dgl_jax.config import SearchConfig
    from dgl_jax.search import search

    tiny = _SIZE.value == "tiny"
    fields = {
        "network.name": "cnn4",
        "network.width_factor": 1 / 16 if tiny else 0.25,
        "data.name": "embedded",
        "data.crop_padding": 0,
        "data.validation_fraction": 0.4,
        "search.candidates": ("pred", "mlp"),
        "search.num_pretraining_steps": 4,
        "search.num_outer_steps": 4,
        "search.num_inner_steps": 2,
        "search.batch_size": 16 if tiny else 64,
        "search.validation_batch_size": 32 if tiny else 128,
        "search.num_snapshots": 2,
        "search.num_blocks": (2,),
    }
    summary = search(_config(SearchConfig, fields), str(workdir))
    found = summary["groupings"]["2"]
    return f"4 outer steps; for K = 2 a cut after layer {found['cuts'][0]}, {found['heads'][0]}"


def _step(method: str, **fields):
    """``(compiled, state, batch, keys)`` of a fused step."""
    import jax
    import numpy as np
    import optax

    from dgl_jax.block import block_key
    from dgl_jax.config import Config
    from dgl_jax.grouping import (
        choose_cuts_heads_and_devices,
        configured_blocks,
        configured_network,
    )
    from dgl_jax.pipeline import init_states, make_fused_step
    from dgl_jax.placement import make_placements
    from dgl_jax.schedule import UPDATE
    from dgl_jax.types import Batch

    tiny = _SIZE.value == "tiny"
    if not tiny:
        fields = {"network.name": "cnn6", "network.width_factor": 1.0} | fields
    config, image_shape = _config(Config, _fields(method, **fields)), (32, 32, 3)
    network = configured_network(config, 10)
    cuts, heads, _ = choose_cuts_heads_and_devices(config, network, 10, image_shape)
    blocks = configured_blocks(config, network, cuts, heads, 10)
    optimizer, key = optax.sgd(0.02, momentum=0.9), jax.random.key(0)
    states = init_states(
        blocks, optimizer, key, image_shape, make_placements(config.placement, len(blocks))
    )
    keys = [block_key(key, block) for block in blocks]
    rng, size = np.random.default_rng(0), config.train.batch_size
    batch = jax.device_put(
        Batch(
            rng.standard_normal((size, *image_shape), np.float32),
            rng.integers(0, 10, size).astype(np.int32),
        )
    )
    operations = [(block.index, UPDATE) for block in blocks]
    step = make_fused_step(
        blocks, optimizer, operations, one_after_another=config.placement.one_after_another
    )
    return jax.jit(step, donate_argnums=0).lower(states, batch, keys).compile(), states, batch, keys


def _memory(workdir: pathlib.Path) -> str:
    """Of DGL's step at K = 2, in the first check, as a peak is of the process so far."""
    del workdir
    import jax

    step, states, batch, keys = _step("dgl")
    plan = step.memory_analysis()
    planned = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
    for _ in range(3):
        states, _ = step(states, batch, keys)
    jax.block_until_ready(states)
    stats = jax.devices()[0].memory_stats() or {}
    text = f"planned {planned / 2**20:.1f} MiB"
    if "peak_bytes_in_use" not in stats:
        return f"{text}; this device does not say what it used"
    ratio = stats["peak_bytes_in_use"] / planned
    text = f"{text}, peak {stats['peak_bytes_in_use'] / 2**20:.1f} MiB, {ratio:.2f} times as much"
    assert ratio < 1.5, text
    return text


def _step_time(workdir: pathlib.Path) -> str:
    """Medians of seven rounds in which both have turns of ten steps."""
    del workdir
    import statistics

    import jax
    from benchmarks.setting import interleaved_seconds

    def turn(method):
        step, states, batch, keys = _step(method)

        def run(num_steps):
            nonlocal states
            for _ in range(num_steps):
                states, metrics = step(states, batch, keys)
            jax.block_until_ready((states, metrics))

        return run

    seconds = interleaved_seconds({m: turn(m) for m in ("dgl", "backprop")}, 7, 10)
    dgl, backprop = (statistics.median(seconds[method]) for method in ("dgl", "backprop"))
    ratios = sorted(a / b for a, b in zip(seconds["dgl"], seconds["backprop"], strict=True))
    return (
        f"{1e3 * dgl:.2f} ms over {1e3 * backprop:.2f} ms: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    plain_flags.run(main)
