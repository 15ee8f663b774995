"""`benchmark.py parallel`: how much faster blocks on K devices are, beside what one would do instead;
and `benchmark.py dispatch`: the host's part of a step.

A device is one process, pinned to one core: within a process XLA runs the programs of a CPU device
on the threads of others too. All variants are alive at once; in each round each of them in turn
runs some steps while the others sleep, so that what slows the machine down slows all of them.
Images are random.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import setting
from dgl_jax import distributed
from dgl_jax.block import make_block_feed
from dgl_jax.config import (
    ONE_BLOCK_METHODS,
    Config,
    LossConfig,
    OptimizerConfig,
    PlacementConfig,
    default_config,
    from_dict,
)
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts, configured_blocks, configured_network
from dgl_jax.losses import make_loss_fns
from dgl_jax.methods import METHODS
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements, request_cpu_devices
from dgl_jax.schedule import synchronous
from dgl_jax.simulator import simulate
from dgl_jax.tables import markdown, parallel_table, spread
from dgl_jax.task_lists import BlockLoad, Scenario
from dgl_jax.transfer import place
from dgl_jax.types import Batch, TrainState

_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 2, "parallel: K, and so many cores.", 2)
_PARALLEL = ["dgl", "ddg", "pipeline_backprop:gpipe", "pipeline_backprop:1f1b", "data_parallel"]
_METHODS = flags.DEFINE_list(
    "methods",
    _PARALLEL,
    "parallel: what runs on K devices; a word after : is the pipeline's schedule.",
)
_NUM_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 4, "parallel: of the pipelines.", 1)
_HEAD = flags.DEFINE_string("head", "mlp_sr", "parallel: the auxiliary head.")
_WORKER = flags.DEFINE_string("worker", None, "For its own use.")

_DISPATCH_BLOCKS = (1, 2, 4, 8)
_DISPATCH_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is measured.

    Attributes:
      method: of `METHODS`, with the pipeline's schedule after a colon; or "blocks:" and a method:
        the work of each of its blocks alone.
      num_devices: devices, each with a core; 0: one device with the threads of K cores.
      num_processes: in which they are; one, or one a device.
    """

    method: str
    num_devices: int = 1
    num_processes: int = 1


def parallel(folder: pathlib.Path) -> list[str]:
    """Measures all variants; returns what failed: nothing, or it raises."""
    if _WORKER.value:
        given = json.loads(_WORKER.value)
        _work(Variant(**given["variant"]), given["cuts"], given["coordinator"], given["process_id"])
        return []
    num_cores, num_blocks = len(os.sched_getaffinity(0)), _NUM_BLOCKS.value
    if num_blocks > num_cores:
        raise UserError(f"--num_blocks={num_blocks} must not exceed the {num_cores} cores at hand")
    for method in _METHODS.value:
        if method not in _PARALLEL:
            raise UserError(f"--methods={method} is unknown; choose from {', '.join(_PARALLEL)}")

    # Blocks of equal time on one core; the first process decides, all take its cuts.
    alone = Variant("blocks:dgl")
    workers = {alone: _start(folder, alone, None)}
    chosen = _ask(workers[alone])
    cuts = chosen["cuts"]
    variants = [Variant("blocks:ddg"), Variant("backprop"), Variant("dgl"), Variant("backprop", 0)]
    # Of several devices in one process: transfers and collectives stay inside it.
    variants += [Variant("dgl", num_blocks), Variant("data_parallel", num_blocks)]
    variants += [
        Variant(method, num_blocks, num_blocks) for method in dict.fromkeys(_METHODS.value)
    ]
    workers |= {variant: _start(folder, variant, cuts) for variant in variants}
    for variant in variants:
        _ask(workers[variant])  # Ready: compiled and warm.
    rows = [
        dataclasses.asdict(variant) | {"step_seconds": [], "block_seconds": []}
        for variant in workers
    ]
    for _ in range(setting.ROUNDS.value):
        for processes, row in zip(workers.values(), rows, strict=True):
            for name, value in _ask(processes, "go").items():
                row[name].append(value)
    for processes in workers.values():
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait()
    content = {
        "network": setting.NETWORK.value,
        "width_factor": setting.WIDTH_FACTOR.value,
        "batch_size": setting.BATCH_SIZE.value,
        "image_size": setting.IMAGE_SIZE.value,
        "head": _HEAD.value,
        "num_blocks": num_blocks,
        **chosen,
        "num_microbatches": _NUM_MICROBATCHES.value,
        "rows": rows,
    }
    _write(folder, content | {"simulated_seconds": _simulated_seconds(content)})
    return []


def _simulated_seconds(content: dict[str, Any]) -> dict[str, float]:
    """What the simulator makes, by method, of the times of blocks alone."""
    alone = {
        row["method"]: [statistics.median(times) for times in zip(*row["block_seconds"])]
        for row in content["rows"]
        if row["block_seconds"]
    }
    blocks = []
    for with_head, without in zip(alone["blocks:dgl"], alone["blocks:ddg"], strict=True):
        head = max(0.0, with_head - without)
        blocks.append(BlockLoad(without / 3, 2 * without / 3, head / 3, 2 * head / 3))
    scenario = Scenario(
        tuple(blocks),
        batch_size=content["batch_size"],
        num_microbatches=content["num_microbatches"],
        max_steps_in_flight=PlacementConfig.max_steps_in_flight,
    )
    return {
        row["method"]: simulate(row["method"].replace(":", "_"), scenario).seconds_per_step
        for row in content["rows"]
        if row["num_devices"] > 1
    }


def _write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    content |= setting.machine()
    title = (
        f"{content['network']} x {content['width_factor']:g}, K = {content['num_blocks']}, cuts "
        f"{tuple(content['cuts'])}, batches of {content['batch_size']}, {content['image_size']} "
        f"pixels, head {content['head']}"
    )
    notes = (
        f"{setting.on_what(content)}; every process pinned to the cores it is given. Medians of "
        f"{setting.ROUNDS.value} interleaved rounds of {setting.STEPS.value} steps, and their "
        "range. Ideal: backprop's time on one core over that of the method's slowest block alone "
        "on one core; cuts are those of equal time with DGL's heads. Pipelines: "
        f"{_NUM_MICROBATCHES.value} microbatches. Data parallel: BatchNorm over the whole batch. "
        "Simulated: what dgl_jax/simulator.py makes of the times of the blocks alone; there "
        "nothing is sent, and a microbatch takes its share of a batch's time."
    )
    table = parallel_table(content)
    setting.write(folder, "parallel", content, title, [table, notes])
    print(table)


def _start(
    folder: pathlib.Path, variant: Variant, cuts: list[int] | None
) -> list[subprocess.Popen]:
    """Processes that measure a variant whenever they are asked to."""
    threads = "true" if variant.num_devices == 0 else "false"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={threads}",
        "JAX_PLATFORMS": "cpu",
    }
    (folder / "parallel").mkdir(exist_ok=True)
    name = f"{variant.method.replace(':', '_')}_{variant.num_devices}_{variant.num_processes}"
    cores = sorted(os.sched_getaffinity(0))
    num_cores = variant.num_devices // variant.num_processes or _NUM_BLOCKS.value
    coordinator, processes = f"localhost:{distributed.free_port()}", []
    for process_id in range(variant.num_processes):
        given = {
            "variant": dataclasses.asdict(variant),
            "cuts": cuts,
            "coordinator": coordinator,
            "process_id": process_id,
        }
        with open(folder / "parallel" / f"{name}_{process_id}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, *sys.argv, f"--worker={json.dumps(given)}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        first_core = process_id * num_cores
        os.sched_setaffinity(process.pid, cores[first_core : first_core + num_cores])
        processes.append(process)
    return processes


def _ask(processes: list[subprocess.Popen], question: str = "") -> dict[str, Any]:
    """What the last of them answers, the one with the last block; all are asked, if at all.

    Raises:
      UserError: if one has ended instead.
    """
    if question:
        for process in processes:
            with contextlib.suppress(BrokenPipeError):  # It has ended, and its output too.
                process.stdin.write(question + "\n")
                process.stdin.flush()
    for process in processes:
        while line := process.stdout.readline():
            if line.startswith("{"):  # Gloo says a word too.
                break
        if not line:
            raise UserError(f"a process has failed: {process.args[-1]}; its log in --out says why")
    return json.loads(line)


def _config(variant: Variant, cuts: list[int] | None) -> Config:
    method, _, schedule = variant.method.partition(":")
    given = default_config()
    given.method.name = schedule if method == "blocks" else method
    given.network.name = setting.NETWORK.value
    given.network.width_factor = setting.WIDTH_FACTOR.value
    given.auxiliary.name = _HEAD.value
    given.train.batch_size = setting.BATCH_SIZE.value
    given.train.num_epochs = 0.0
    given.train.num_steps = 10**6
    given.optimizer.schedule = "constant"
    if method == "pipeline_backprop":
        given.method.num_microbatches = _NUM_MICROBATCHES.value
        given.method.pipeline_schedule = schedule
    if cuts is None:
        given.partition.strategy = "balanced"
        given.partition.cost = "time"
        given.partition.num_blocks = _NUM_BLOCKS.value
    else:
        given.partition.strategy = "explicit"
        given.partition.cuts = tuple(cuts)
    if method == "data_parallel":
        given.placement.data_parallel = given.placement.num_devices = variant.num_devices
        given.eval.batch_size = given.train.batch_size
    elif variant.num_devices > 1:
        given.placement.kind = "pipelined"
        given.placement.num_devices = variant.num_devices
    return from_dict(given.to_dict())


def _work(variant: Variant, cuts: list[int] | None, coordinator: str, process_id: int) -> None:
    """What a process does: sets up, says what its cuts are, and measures when it is told to."""
    config = _config(variant, cuts)
    if variant.num_processes > 1:
        distributed.initialize(coordinator, variant.num_processes, process_id, 600)
    else:
        request_cpu_devices(config.placement)
    size, batch_size = setting.IMAGE_SIZE.value, config.train.batch_size
    image_shape = (size, size, 3)
    network = configured_network(config, setting.NUM_CLASSES)
    if cuts is None:
        cuts = choose_cuts(config, network, setting.NUM_CLASSES, image_shape)
    own_cuts = () if config.method.name in ONE_BLOCK_METHODS else tuple(cuts)
    heads = (config.auxiliary.name,) * len(own_cuts)
    method = METHODS[config.method.name]
    blocks = configured_blocks(config, network, own_cuts, heads, setting.NUM_CLASSES)
    placements = make_placements(config.placement, len(blocks))
    optimizer = make_optimizer(config.optimizer, 10**6, 10**6)
    key = jax.random.key(0)
    states = init_states(blocks, optimizer, key, image_shape, placements)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, *image_shape), np.float32)
    labels = jax.device_put(rng.integers(0, setting.NUM_CLASSES, batch_size, np.int32))
    images = place(images, placements[0].batch)
    batch = Batch(images, labels)
    tell = lambda **answer: print(json.dumps(answer), flush=True)

    if variant.method.startswith("blocks:"):
        runs, inputs = [], [images]
        for block, state in zip(blocks, states, strict=True):
            runs.append(jax.jit(method.make_block_work(config, block, optimizer)))
            inputs.append(jax.jit(make_block_feed(block))(state, inputs[-1]))

        def seconds_per_run(block, number):
            arguments = (states[block], inputs[block], batch.labels, key)
            jax.block_until_ready(runs[block](*arguments))
            start = time.perf_counter()
            for _ in range(number):
                jax.block_until_ready(runs[block](*arguments))
            return (time.perf_counter() - start) / number

        measure = lambda number: [seconds_per_run(k, number) for k in range(len(blocks))]
        measure(1)
        tell(cuts=list(cuts), bytes_between_blocks=[x.nbytes for x in inputs[1:-1]])
        for _ in sys.stdin:
            tell(block_seconds=measure(setting.STEPS.value))
        return

    runner = method.make_runner(config, blocks, optimizer, key, placements)
    shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    state = TrainState(states, runner.init_memory(states, shape))
    tasks = method.make_schedule(config, len(blocks), 10**6, 10**6).tasks(0)

    def steps(number):
        nonlocal state
        for _ in range(number):
            state, metrics = runner.step(state, next(tasks), lambda step: batch)
        return metrics

    more = 2 * len(blocks) + config.placement.max_steps_in_flight  # Fill the pipeline.

    def seconds_per_step():
        """From the end of one step to that of a later one: the pipeline is full at both."""
        ends = []

        def note_end(metrics):
            jax.block_until_ready(metrics)
            ends.append(time.perf_counter())

        waiting = []
        for number in (more, setting.STEPS.value):
            waiting.append(threading.Thread(target=note_end, args=(steps(number),)))
            waiting[-1].start()
        steps(more)
        for thread in waiting:
            thread.join()
        jax.block_until_ready(state)
        return (max(ends) - min(ends)) / setting.STEPS.value

    jax.block_until_ready(steps(more))
    tell(cuts=list(cuts))
    for _ in sys.stdin:
        tell(step_seconds=seconds_per_step())
    distributed.finish()


def dispatch(folder: pathlib.Path) -> list[str]:
    """What the host spends on each step and block, with blocks that compute next to nothing.

    A step's time is the host's where devices have less to do than it has: dispatching, moving
    activations and labels, waiting for the oldest step. On CPUs the devices' own threads share
    the host's cores: it is an upper bound.
    """
    jax.config.update("jax_platforms", "cpu")  # As many devices as wanted, on any machine.
    most = max(_DISPATCH_BLOCKS)
    jax.config.update("jax_num_cpu_devices", most)
    rows = []
    for num_blocks in _DISPATCH_BLOCKS:
        config = Config(placement=PlacementConfig(kind="pipelined", num_devices=num_blocks))
        network = Network("empty", (nn.Dense(1),) * num_blocks, nn.Dense(2))
        blocks = METHODS["dgl"].make_blocks(
            network, range(num_blocks - 1), nn.Dense(2), make_loss_fns(LossConfig(), 1, 2)[0]
        )
        placements = make_placements(config.placement, num_blocks)
        optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)
        key = jax.random.key(0)
        states = init_states(blocks, optimizer, key, (1,), placements)
        runner = METHODS["dgl"].make_runner(config, blocks, optimizer, key, placements)
        arrays = (np.zeros((1, 1), np.float32), np.zeros(1, np.int32))
        batch = Batch(*jax.device_put(arrays, placements[0].batch))
        state, tasks = TrainState(states), synchronous(num_blocks, 10**9).tasks(0)
        seconds = []
        for _ in range(setting.ROUNDS.value + 1):
            start = time.perf_counter()
            for _ in range(_DISPATCH_STEPS):
                state, _ = runner.step(state, next(tasks), lambda step: batch)  # noqa: B023
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - start) / _DISPATCH_STEPS)
        rows.append({"num_blocks": num_blocks, "step_seconds": seconds[1:]})  # The first compiles.
    content = setting.machine() | {"rows": rows}
    cells = []
    for row in rows:
        micros = [1e6 * seconds for seconds in row["step_seconds"]]
        per_block = statistics.median(micros) / row["num_blocks"]
        cells.append([str(row["num_blocks"]), spread(micros, ".0f"), f"{per_block:.0f}"])
    notes = (
        f"{setting.on_what(content)}. Blocks of one Dense(1) layer and a head, a batch of one "
        f"number, each on a CPU device of its own; medians of {setting.ROUNDS.value} rounds of "
        f"{_DISPATCH_STEPS} steps."
    )
    table = markdown(["K", "step, µs (least to most)", "per block, µs"], cells)
    setting.write(folder, "dispatch", content, "The host's part of a step", [table, notes])
    print(table)
    return []
