"""`benchmark.py step`: one fused step of DGL beside backprop's, and beside PyTorch's.

For each network all variants take turns: backprop, DGL in each number of blocks, and with --torch
the same in PyTorch (torch_peers.py, in processes of their own).
"""

import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from benchmarks import setting
from dgl_jax import cost
from dgl_jax.block import Block, init_block_state, make_block_feed, make_block_step
from dgl_jax.config import Config, default_config, from_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts, configured_blocks, configured_network
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.tables import markdown, spread
from dgl_jax.types import Batch, DeviceStream, TrainState

_NUM_CLASSES = {"cifar": 10, "tiny_imagenet": 200, "imagenet": 1000}

NETWORKS = flags.DEFINE_list(
    "networks",
    ["cnn6", "vgg19:0.25", "resnet110", "resnet50:0.25", "resnet152:0.25"],
    "step, memory: the networks, each with the factor of its width.",
)
BLOCKS = flags.DEFINE_list(
    "blocks", ["2", "4"], "step, memory: numbers of blocks; per_layer: one a layer."
)
_FORM = flags.DEFINE_enum(
    "form", "cifar", list(_NUM_CLASSES), "step, memory, compile: whose stem and head a network has."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "step: of computing.")
_SCAN_LAYERS = flags.DEFINE_bool("scan_layers", False, "step: runs of equal layers are loops.")
_ONE_AFTER_ANOTHER = flags.DEFINE_bool(
    "one_after_another", True, "step: blocks do not overlap (config.placement.one_after_another)."
)
_STEPS_PER_CALL = flags.DEFINE_integer("steps_per_call", 1, "step: of one program.", 1)
_TORCH = flags.DEFINE_bool("torch", False, "step: the same in PyTorch.")
_COMPILE = flags.DEFINE_bool("torch_compile", False, "step: PyTorch by torch.compile.")

_MATRIX_SIZE, _PRODUCTS = 4096, 8


def step(folder: pathlib.Path) -> list[str]:
    """Measures one network after the other."""
    if setting.STEPS.value % _STEPS_PER_CALL.value:
        raise UserError(
            f"--steps={setting.STEPS.value} must be a multiple of "
            f"--steps_per_call={_STEPS_PER_CALL.value}"
        )
    if _TORCH.value and _FORM.value != "cifar":
        raise UserError(f"--form={_FORM.value} must be cifar with --torch; leave out one of them")
    given = networks()  # Mistakes first: what follows takes seconds.
    content = setting.machine() | {
        "batch_size": setting.BATCH_SIZE.value,
        "image_size": setting.IMAGE_SIZE.value,
        "dtype": _DTYPE.value,
        "steps_per_call": _STEPS_PER_CALL.value,
        "scan_layers": _SCAN_LAYERS.value,
        "one_after_another": _ONE_AFTER_ANOTHER.value,
        "device": jax.devices()[0].device_kind,
        "matrix_flops_per_second": _matrix_flops_per_second(),
        "rows": [],
    }
    for network, name, width_factor in given:
        content["rows"] += _measure(network, name, width_factor)
        table = step_table(content)
        _write(folder, content, table)  # After each: the next may take the machine with it.
    print(table)
    return []


def _write(folder: pathlib.Path, content: dict[str, Any], table: str) -> None:
    title = (
        f"A step of DGL beside backprop's: batches of {content['batch_size']}, "
        f"{content['image_size']} pixels, {content['dtype']}"
    )
    rate = content["matrix_flops_per_second"] / 1e9
    notes = (
        f"{content['device']}, {setting.on_what(content)}. Medians of {setting.ROUNDS.value} "
        f"interleaved rounds of {setting.STEPS.value} steps, least to most in brackets; ratios "
        "round by round. MLP-SR-aux heads, uniform cuts. Host: until the call that starts a step's "
        "program returns, over its steps. FLOP/s: those of plain convolutions over the time; "
        f"a product of {_MATRIX_SIZE} x {_MATRIX_SIZE} matrices reached "
        f"{rate:.0f} GFLOP/s in the same dtype."
    )
    if not content["one_after_another"]:
        notes += " DGL's blocks at once, where the compiler likes to."
    setting.write(folder, "step", content, title, [table, notes])


def step_table(content: dict[str, Any]) -> str:
    """One row a network and variant."""
    by_name = {(row["network"], row["variant"]): row["step_seconds"] for row in content["rows"]}
    header = ["network", "variant", "step, ms", "/ backprop", "/ PyTorch's", "host, ms", "GFLOP/s"]
    rows = []
    for row in content["rows"]:
        network, variant, seconds = row["network"], row["variant"], row["step_seconds"]

        def ratio(name, own=variant, seconds=seconds, network=network):
            other = by_name.get((network, name))
            if other is None or name == own:
                return ""
            return spread([s / o for s, o in zip(seconds, other, strict=True)], ".3f")

        prefix = "torch " if variant.startswith("torch ") else ""
        host = rate = share = ""
        if row["host_seconds"]:
            calls = [s / content["steps_per_call"] for s in row["host_seconds"]]
            host = f"{1000 * statistics.median(calls):.2f}"
        if row["flops"]:
            per_second = row["flops"] / statistics.median(seconds)
            rate = f"{per_second / 1e9:.0f}"
            share = f"{100 * per_second / content['matrix_flops_per_second']:.0f} %"
        rows.append(
            [
                network,
                variant,
                spread([1000 * s for s in seconds], ".1f"),
                ratio(f"{prefix}backprop"),
                "" if prefix else ratio(f"torch {variant}"),
                host,
                rate,
                share,
            ]
        )
    return markdown([*header, "of a matrix product"], rows)


def networks() -> list[tuple[str, str, float]]:
    """--networks: each as given, its name, its width's factor; --blocks is checked too."""
    for word in BLOCKS.value:
        if word != "per_layer" and not (word.isdecimal() and int(word) > 1):
            raise UserError(f"--blocks={word} must be a number above 1, or per_layer; try 2")
    given = []
    for network in NETWORKS.value:
        name, _, width_factor = network.partition(":")
        try:
            given.append((network, name, float(width_factor or 1)))
        except ValueError:
            raise UserError(
                f"--networks={network} must be a name, or NAME:WIDTH_FACTOR; try {name}:0.25"
            ) from None
    return given


def _measure(network: str, name: str, width_factor: float) -> list[dict[str, Any]]:
    turns, hosts, rows, processes = {}, {}, [], []
    for blocks in ("1", *BLOCKS.value):
        config = variant_config(name, width_factor, blocks)
        run, cuts, host_seconds = fused(config)
        variant = "backprop" if blocks == "1" else f"dgl K={len(cuts) + 1}"
        turns[variant], hosts[variant] = run, host_seconds
        rows.append({"network": network, "variant": variant, "cuts": cuts})
        rows[-1]["flops"] = _flops(config)
        if _TORCH.value:
            turns[f"torch {variant}"], process, about = _torch(name, width_factor, cuts)
            processes.append(process)
            rows.append(rows[-1] | {"variant": f"torch {variant}", "flops": None} | about)
    seconds = setting.interleaved_seconds(turns, setting.ROUNDS.value, setting.STEPS.value)
    for process in processes:
        process.communicate()
    for row in rows:
        row["step_seconds"] = seconds[row["variant"]]
        # Of a call; the first one, to warm up, compiles.
        row["host_seconds"] = hosts[row["variant"]][1:] if row["variant"] in hosts else None
    return rows


def variant_config(
    name: str,
    width_factor: float,
    blocks: str,
    remat_blocks: tuple[int, ...] = (),
    **partition: Any,
) -> Config:
    """Backprop for one block, else DGL; more fields of the partition may be given."""
    given = default_config()
    given.method.name = "backprop" if blocks == "1" else "dgl"
    given.network.name, given.network.width_factor = name, width_factor
    given.network.form, given.network.dtype = _FORM.value, _DTYPE.value
    given.network.scan_layers = _SCAN_LAYERS.value
    given.placement.one_after_another = _ONE_AFTER_ANOTHER.value or blocks == "1"
    given.auxiliary.name = "mlp_sr"
    given.train.batch_size = setting.BATCH_SIZE.value
    given.train.steps_per_call = _STEPS_PER_CALL.value
    given.train.log_every_steps = _STEPS_PER_CALL.value
    given.train.remat_blocks = remat_blocks
    given.train.num_epochs, given.train.num_steps = 0.0, 10**6
    given.optimizer.schedule = "constant"
    if blocks == "per_layer":
        given.partition.strategy = "per_layer"
    elif blocks != "1" and "cuts" not in partition:
        given.partition.strategy, given.partition.num_blocks = "uniform", int(blocks)
    for field, value in partition.items():
        given.partition[field] = value
    return from_dict(given.to_dict())


def configured(config: Config) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """The blocks of a configuration, and its cuts."""
    size = setting.IMAGE_SIZE.value
    num_classes = _NUM_CLASSES[config.network.form]
    network = configured_network(config, num_classes)
    cuts = ()
    if config.method.name != "backprop":
        cuts = choose_cuts(config, network, num_classes, (size, size, 3))
    heads = (config.auxiliary.name,) * len(cuts)
    return configured_blocks(config, network, cuts, heads, num_classes), cuts


def shapes(blocks: Sequence[Block], optimizer: optax.GradientTransformation) -> tuple[Any, ...]:
    """Without computing anything: each block's (state, input), the labels, and a random key."""
    size = setting.IMAGE_SIZE.value
    x = jax.ShapeDtypeStruct((setting.BATCH_SIZE.value, size, size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = []
    for block in blocks:
        init = lambda key, x, block=block: init_block_state(block, optimizer, key, x)
        state = jax.eval_shape(init, key, x)
        given.append((state, x))
        x = jax.eval_shape(make_block_feed(block), state, x)
    return given, labels, key


def _flops(config: Config) -> float:
    """Of a step."""
    blocks, _ = configured(config)
    optimizer = make_optimizer(config.optimizer, 10**6, 10**6)
    given, labels, key = shapes(blocks, optimizer)
    return sum(
        cost.flops(make_block_step(block, optimizer), state, x, labels, key)
        for block, (state, x) in zip(blocks, given, strict=True)
    )


def fused(config: Config) -> tuple[Callable[[int], None], Sequence[int], list[float]]:
    """``run(number)`` of fused training on one batch, its cuts, and the host's part.

    That is a list which gets a time, in seconds, for each ``run``: of starting its first program.
    """
    size, batch_size = setting.IMAGE_SIZE.value, config.train.batch_size
    blocks, cuts = configured(config)
    method = METHODS[config.method.name]
    placements = make_placements(config.placement, len(blocks))
    optimizer = make_optimizer(config.optimizer, 10**6, 10**6)
    key = jax.random.key(0)
    states = init_states(blocks, optimizer, key, (size, size, 3), placements)
    images = jax.random.normal(key, (batch_size, size, size, 3))
    labels = jax.random.randint(key, (batch_size,), 0, _NUM_CLASSES[config.network.form])
    batch = jax.device_put(Batch(images, labels), placements[0].batch)

    runner = method.make_runner(config, blocks, optimizer, key, placements)
    state = TrainState(states)
    tasks = method.make_schedule(config, len(blocks), 10**6, 10**6).tasks(0)
    stream = DeviceStream(lambda step: batch, lambda batch, step: batch)
    host_seconds = []

    def run(number):
        nonlocal state
        start = time.perf_counter()
        for call in range(-(-number // config.train.steps_per_call)):
            if config.train.steps_per_call > 1:
                turns = list(itertools.islice(tasks, config.train.steps_per_call))
                state, _ = runner.steps(state, turns, stream)
            else:
                state, _ = runner.step(state, next(tasks), lambda step: batch)
            if call == 0:
                host_seconds.append(time.perf_counter() - start)
        jax.block_until_ready(state)

    return run, cuts, host_seconds


def _torch(
    name: str, width_factor: float, cuts: Sequence[int]
) -> tuple[Callable[[int], None], subprocess.Popen, dict[str, str]]:
    """``run(number)`` in a process that trains in PyTorch, the process, its device and version."""
    command = [
        sys.executable,
        str(pathlib.Path(__file__).with_name("torch_peers.py")),
        f"--network={name}",
        f"--width_factor={width_factor}",
        f"--batch_size={setting.BATCH_SIZE.value}",
        f"--image_size={setting.IMAGE_SIZE.value}",
        f"--cuts={','.join(map(str, cuts))}",
        f"--method={'dgl' if cuts else 'backprop'}",
        f"--dtype={_DTYPE.value}",
        *(["--compile"] if _COMPILE.value else []),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer():
        line = process.stdout.readline()
        if not line:
            raise UserError(f"a process has failed: {' '.join(command)}")
        return json.loads(line)

    about = answer()
    if (about["device"] == "cpu") != (jax.default_backend() == "cpu"):
        raise UserError(
            f"PyTorch runs on {about['device']}, jax on {jax.devices()[0].device_kind}; install "
            "both for the same device, or leave out --torch"
        )

    def run(number):
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        answer()

    return run, process, about


def _matrix_flops_per_second() -> float:
    matrix = jnp.full((_MATRIX_SIZE, _MATRIX_SIZE), 1 / _MATRIX_SIZE, _DTYPE.value)
    powers = jax.jit(lambda x: jax.lax.fori_loop(0, _PRODUCTS, lambda _, y: x @ y, x))
    run = lambda number: jax.block_until_ready([powers(matrix) for _ in range(number)])
    seconds = setting.interleaved_seconds({"matrix": run}, 5, 1)["matrix"]
    return 2 * _MATRIX_SIZE**3 * _PRODUCTS / statistics.median(seconds)
