"""Predicts a step's time by each method of running K blocks on K devices, before any is run.

    python experiments/simulate.py --out=DIR [--network=resnet152 --num_blocks=2,4,8,16 \
        --batch_size=256 --device_flops=989e12 --fraction_reached=0.2 \
        --inside_host_bandwidth=400e9 --between_hosts_bandwidth=50e9 --devices_per_host=8]
    python experiments/simulate.py --out=DIR --summary=RUN/summary.json

Plan: FLOPs of a network by name, cut into balanced blocks. With --summary: the blocks of a finished
run, with the times and bytes that it measured (config.eval.time_blocks); the links are the flags'.

Writes DIR/simulate.md with all that is assumed, simulate.json, timelines and, of a plan,
speed_ups.png. The simulation is `dgl_jax/simulator.py`.
"""

import collections
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import plain_flags
from absl import flags, logging

from dgl_jax import cost
from dgl_jax.auxiliary import make_heads
from dgl_jax.config import LossConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS as TRAINING_METHODS
from dgl_jax.metrics import write_atomically
from dgl_jax.models import check_image_shape, make_network
from dgl_jax.models.network import apply_module, init_module
from dgl_jax.partition import balanced_cuts, block_ranges, per_layer_cuts
from dgl_jax.simulator import (
    Result,
    bound_in_flight,
    ideal_speed_up,
    run,
    simulate,
    spans_of,
    unfinished_steps,
)
from dgl_jax.tables import markdown
from dgl_jax.task_lists import METHODS, BlockLoad, Cluster, Link, Scenario
from dgl_jax.timeline import plot_speed_ups, plot_timeline

_OUT = flags.DEFINE_string("out", None, "The folder of the results.")
_SUMMARY = flags.DEFINE_string("summary", None, "Of a finished run, instead of --network.")
_NETWORK = flags.DEFINE_string("network", "resnet152", "The network.")
_FORM = flags.DEFINE_string("form", "imagenet", "Of the network: cifar, tiny_imagenet, imagenet.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels a side.", lower_bound=1)
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Of the data set.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images of a mini-batch.", lower_bound=1)
_HEAD = flags.DEFINE_string("head", "mlp_sr", "The auxiliary head of every block but the last.")
_NUM_BLOCKS = flags.DEFINE_list("num_blocks", ["2", "4", "8", "16"], "K, one or several.")
_DEVICES_PER_BLOCK = flags.DEFINE_integer("devices_per_block", 1, "Data-parallel.", lower_bound=1)
_MICROBATCHES = flags.DEFINE_list("num_microbatches", ["1", "8", "32"], "M of the pipelines.")
_DEVICE_FLOPS = flags.DEFINE_float("device_flops", 989e12, "A device's peak, a second.")
_FRACTION = flags.DEFINE_float("fraction_reached", 0.2, "Of this peak.")
_INSIDE = flags.DEFINE_float("inside_host_bandwidth", 400e9, "Bytes a second, a pair of devices.")
_BETWEEN = flags.DEFINE_float("between_hosts_bandwidth", 50e9, "Likewise.")
_INSIDE_LATENCY = flags.DEFINE_float("inside_host_latency", 5e-6, "Seconds.")
_BETWEEN_LATENCY = flags.DEFINE_float("between_hosts_latency", 20e-6, "Seconds.")
_PER_HOST = flags.DEFINE_integer("devices_per_host", 8, "Consecutive ones.", lower_bound=1)
_DISPATCH = flags.DEFINE_float("dispatch_seconds", 50e-6, "A host's, a program or transfer.")
_IN_FLIGHT = flags.DEFINE_integer("max_steps_in_flight", 4, "As in config.placement.")
_SLOWDOWN = flags.DEFINE_float("slowdown", 2.0, "Of one block, in a table of its own.")

# Bandwidths of the table that says where each method wins, relative to the flags'.
_FACTORS = (10.0, 1.0, 0.1, 0.01, 0.001)
# What a run's time of a block is that of an update with a head, or without one as in DDG.
_READABLE = ("dgl", "sequential", "async_dgl", "async_dgl_parallel", "ddg")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the tables: a method, or its bound. M is None where it has no microbatches."""

    num_blocks: int
    method: str
    num_microbatches: int | None
    result: Result


def main(arguments: list[str]) -> None:
    del arguments
    logging.set_verbosity(logging.WARNING)

    # ---- What is known, and what is assumed.
    if not _OUT.value:
        raise UserError("--out is missing; give a folder")
    counts, micro = (_integers(flag) for flag in (_NUM_BLOCKS, _MICROBATCHES))
    jax.config.update("jax_platforms", "cpu")  # Shapes only; accelerators are left to others.
    if _SUMMARY.value:
        title, scenarios, assumptions, measured = _from_summary(_SUMMARY.value)
    else:
        title, scenarios, assumptions = _plan(counts)
        measured = None
    cluster = next(iter(scenarios.values())).cluster
    inside, between = (
        f"{link.bandwidth:g} B/s after {link.latency:g} s"
        for link in (cluster.inside_host, cluster.between_hosts)
    )
    assumptions += f"""\
A link carries {inside} inside a host, {between} between hosts; every pair of devices has its own, \
each way; {cluster.devices_per_host} devices a host.
Transfers overlap with computing. Data are always there.
An all-reduce is a ring inside each host and, of each device's part, a ring across hosts, all of \
these at once. It overlaps with nothing; where it is "hidden", as much of it as fits behind the \
backward pass costs nothing, which is a bound: buckets sent during the backward pass come near it.
A host takes {cluster.dispatch_seconds:g} s to dispatch a program or a transfer, and leaves \
{_IN_FLIGHT.value} + K - 1 steps unfinished at most. A microbatch has programs of its own, so many \
microbatches are bounded by the host.
A microbatch takes 1/M of a mini-batch's time, a device of D takes 1/D: small batches lose nothing, \
which favours the pipelines and data_parallel.""".splitlines()

    # ---- Every method for every K.
    rows = []
    for num_blocks, scenario in scenarios.items():
        for method in METHODS:
            for count in micro if "pipeline" in method else (None,):
                with_count = dataclasses.replace(scenario, num_microbatches=count or 1)
                for added, case in _bounds(method, with_count).items():
                    rows.append(Row(num_blocks, method + added, count, simulate(method, case)))
    sweep = [
        (num_blocks, factor, _speed_ups(scenario, micro, factor))
        for num_blocks, scenario in scenarios.items()
        for factor in _FACTORS
    ]
    shown = 4 if 4 in scenarios else min(scenarios)
    slow = dataclasses.replace(scenarios[shown], slow_block=1 % shown, slowdown=_SLOWDOWN.value)
    slowed = {method: simulate(method, slow) for method in ("dgl", "async_dgl", "ddg")}

    # ---- Files.
    os.makedirs(_OUT.value, exist_ok=True)
    _draw(title, scenarios, sweep, shown, micro)
    command = shlex.join(["python", *sys.argv])
    content = {
        "command": command,
        "title": title,
        "assumptions": assumptions,
        "measured_images_per_second": measured,
        "blocks": {k: [dataclasses.asdict(b) for b in s.blocks] for k, s in scenarios.items()},
        "rows": [
            {"num_blocks": row.num_blocks, "method": row.method, "M": row.num_microbatches}
            | _numbers(row.result)
            for row in rows
        ],
        "by_bandwidth": [
            {"num_blocks": k, "factor": factor, "speed_ups": found} for k, factor, found in sweep
        ],
        "slowed": {method: _numbers(result) for method, result in slowed.items()},
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(os.path.join(_OUT.value, "simulate.json"), text)
    parts = [f"# Simulated steps: {title}", f"    {command}"]
    parts.append("Nothing here was measured on the devices it speaks of. Assumed:")
    parts.append("\n".join(f"- {line}" for line in assumptions))
    if measured:
        parts.append(f"The run itself, with its own placement, reached {_rate(measured)} images/s.")
    parts += ["## Methods", _methods_table(rows), "## By bandwidth", _sweep_table(sweep)]
    parts += [f"## Block {slow.slow_block} of {shown} takes {slow.slowdown:g} times as long"]
    parts += [_slowed_table(slowed)]
    text = "\n\n".join(parts) + "\n"
    write_atomically(os.path.join(_OUT.value, "simulate.md"), text)
    print(text)


# ---- The blocks.


def _plan(counts: Sequence[int]) -> tuple[str, dict[int, Scenario], list[str]]:
    """Balanced blocks of a network: ``(title, scenario by K, assumptions)``."""
    network = make_network(_NETWORK.value, _NUM_CLASSES.value, form=_FORM.value, dtype=jnp.bfloat16)
    image_shape = (_IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    check_image_shape(network, image_shape)
    (head,) = make_heads([_HEAD.value], _NUM_CLASSES.value, dtype=jnp.bfloat16, field="--head")
    # As if every layer were a block: from these all cuts can be counted together.
    layers = TRAINING_METHODS["dgl"].make_blocks(
        network, per_layer_cuts(len(network.layers)), head, make_loss_fn(LossConfig())
    )
    costs = cost.block_costs(layers, image_shape)
    kept = _kept_bytes(network, image_shape)
    layer_flops = [layer.layers_flops for layer in costs]
    head_flops = [layer.head_flops for layer in costs]
    batch, speed = _BATCH_SIZE.value, _DEVICE_FLOPS.value * _FRACTION.value
    if not speed > 0:
        raise UserError("--device_flops and --fraction_reached must be above 0")
    scenarios = {}
    for num_blocks in counts:
        blocks = []
        for first, end in block_ranges(
            len(layer_flops), balanced_cuts(layer_flops, head_flops, num_blocks)
        ):
            is_last = end == len(layer_flops)
            flops, of_head = sum(layer_flops[first:end]), head_flops[end - 1]
            parameters = sum(layer.layers_parameters for layer in costs[first:end])
            parameters += costs[-1].head_parameters if is_last else 0
            blocks.append(
                BlockLoad(
                    forward_seconds=batch * flops / speed,
                    backward_seconds=2 * batch * flops / speed,
                    head_forward_seconds=batch * of_head / speed,
                    head_backward_seconds=2 * batch * of_head / speed,
                    parameter_bytes=4 * parameters,
                    head_parameter_bytes=0 if is_last else 4 * costs[end - 1].head_parameters,
                    activation_bytes=batch * costs[end - 1].activation_bytes,
                    kept_bytes=batch * sum(kept[first:end]),
                    num_devices=_DEVICES_PER_BLOCK.value,
                )
            )
        scenarios[num_blocks] = _scenario(blocks, batch)
    title = f"{_NETWORK.value}, {_IMAGE_SIZE.value} pixels, batches of {batch}"
    assumptions = f"""\
A device computes {speed:.3g} FLOP/s: {_FRACTION.value:g} of {_DEVICE_FLOPS.value:.3g}, in every \
layer alike. Backward passes take twice the forward pass's FLOPs.
Blocks are balanced by FLOPs with their heads ({_HEAD.value}); {_DEVICES_PER_BLOCK.value} device(s) \
a block. Activations are bfloat16, gradients of parameters float32.
Kept for backward passes: all that jax.vjp stores of the layers, before XLA fuses or recomputes \
any; nothing of heads, parameters, buffers or batches on their way."""
    return title, scenarios, assumptions.splitlines()


def _from_summary(path: str) -> tuple[str, dict[int, Scenario], list[str], float | None]:
    """The blocks of a finished run; as `_plan`, and the images a second that it reached."""
    if not os.path.isfile(path):
        raise UserError(f"--summary={path} does not exist; give a finished run's summary.json")
    with open(path) as file:
        summary = json.load(file)
    method, num_blocks = summary["method"], summary.get("num_blocks", 1)
    if method not in _READABLE or num_blocks < 2:
        raise UserError(
            f"--summary={path} is of {method} with {num_blocks} block(s); the times of two "
            f"blocks or more are needed, of one of {', '.join(_READABLE)}"
        )
    if not summary.get("block_step_seconds"):
        raise UserError(
            f"--summary={path} has no block_step_seconds; train with config.eval.time_blocks=True"
        )
    devices = summary.get("devices_per_block", [])
    if any(number > 1 for number in devices):
        raise UserError(
            f"--summary={path} has devices_per_block={devices}; the times of blocks on one device "
            "each are needed: train with one device a block"
        )
    both_ways = 2 if method == "ddg" else 1
    blocks = []
    for block, seconds in enumerate(summary["block_step_seconds"]):
        flops, head = summary["block_flops"][block], summary["head_flops"][block]
        of_head = seconds * head / (flops + head)
        last = block == num_blocks - 1
        num_bytes = 0 if last else summary["bytes_between_blocks"][block] / both_ways
        parameters, of_heads = (summary[f"{x}_parameters"][block] for x in ("block", "head"))
        blocks.append(
            BlockLoad(
                (seconds - of_head) / 3, 2 * (seconds - of_head) / 3, of_head / 3, 2 * of_head / 3,
                parameter_bytes=4 * (parameters + (of_heads if last else 0)),
                head_parameter_bytes=0 if last else 4 * of_heads,
                activation_bytes=num_bytes,
            )
        )  # fmt: skip
    title = f"{summary['network']} on {summary['dataset']}, batches of {summary['batch_size']}"
    no_heads = " That method has no heads: nor has dgl here." if method == "ddg" else ""
    assumptions = f"""\
Blocks take the time that a {method} run measured for each alone ({path}, \
{summary["device_kind"]}): a third of it is the forward pass, and the head's share is that of its \
FLOPs.{no_heads}
Bytes handed on are those of that run; one device a block.""".splitlines()
    scenarios = {num_blocks: _scenario(blocks, summary["batch_size"])}
    return title, scenarios, assumptions, summary["train_examples_per_second"]


def _scenario(blocks: Sequence[BlockLoad], batch_size: int) -> Scenario:
    cluster = Cluster(
        Link(_INSIDE.value, _INSIDE_LATENCY.value),
        Link(_BETWEEN.value, _BETWEEN_LATENCY.value),
        _PER_HOST.value,
        _DISPATCH.value,
    )
    return Scenario(tuple(blocks), cluster, batch_size, max_steps_in_flight=_IN_FLIGHT.value)


def _kept_bytes(network: Any, image_shape: Sequence[int]) -> list[float]:
    """What `jax.vjp` stores of each layer's forward pass for an example, without parameters.

    A layer's output counts once, where the next layer stores it as its input: our layers end with
    a ReLU or a pool, which store other things.
    """
    batch, kept = 10_007, []  # A leading axis of so many is a batch's: no weight has it.
    x = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    for layer in network.layers:

        def stored(x, layer=layer):
            params, batch_stats = init_module(layer, jax.random.key(0), x)
            run = lambda params, x: apply_module(
                layer, params, batch_stats, x, train=True, key=jax.random.key(0)
            )[0]
            return jax.vjp(run, params, x)

        x, backward = jax.eval_shape(stored, x)
        leaves = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (batch,)]
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / batch)
    return kept


# ---- What is said of them.


def _speed_ups(scenario: Scenario, micro: Sequence[int], factor: float) -> dict[str, float]:
    """Of each method, links being so many times as fast; of the pipelines, GPipe or 1F1B."""
    inside, between = (
        dataclasses.replace(link, bandwidth=link.bandwidth * factor)
        for link in (scenario.cluster.inside_host, scenario.cluster.between_hosts)
    )
    cluster = dataclasses.replace(scenario.cluster, inside_host=inside, between_hosts=between)
    scenario = dataclasses.replace(scenario, cluster=cluster)
    pipelines = [method for method in METHODS if "pipeline" in method]
    groups = [("data_parallel", ["data_parallel"], 1)]
    groups += [(f"pipeline_backprop, M = {count}", pipelines, count) for count in micro]
    groups += [(method, [method], 1) for method in ("ddg", "dgl")]
    found = {}
    for name, methods, count in groups:
        with_count = dataclasses.replace(scenario, num_microbatches=count)
        for added, case in _bounds(methods[0], with_count).items():
            found[name + added] = max(simulate(method, case).speed_up for method in methods)
    return found


def _bounds(method: str, scenario: Scenario) -> dict[str, Scenario]:
    """By what is added to the method's name: the scenario; with all-reduces hidden if it has any."""
    cases = {"": scenario}
    spread = any(block.num_devices > 1 for block in scenario.blocks)
    if method == "data_parallel" or (spread and method != "backprop"):
        cases[" (all-reduce hidden)"] = dataclasses.replace(scenario, hide_all_reduce=True)
    return cases


def _numbers(result: Result) -> dict[str, Any]:
    return vars(result) | {"fraction_of_ideal": result.speed_up / result.ideal_speed_up}


def _draw(title, scenarios, sweep, shown, micro) -> None:
    """The timelines of one K, and speed-ups where there are several K."""
    count = micro[len(micro) // 2]
    for method in METHODS:
        scenario = dataclasses.replace(scenarios[shown], num_microbatches=count)
        # Until the pipeline is full and a few steps more; backprop's steps are all alike.
        num_steps = 2 if "backprop" in method or method == "data_parallel" else shown + 4
        bound = unfinished_steps(method, scenario)
        tasks = bound_in_flight(METHODS[method](scenario, num_steps), bound)
        spans = spans_of(tasks, run(tasks, scenario.cluster.dispatch_seconds))
        name = f"{method}, M = {count}" if "pipeline" in method else method
        whole = method in ("backprop", "data_parallel")
        devices = sorted({span.device for span in spans})
        plot_timeline(
            spans,
            os.path.join(_OUT.value, f"timeline_{method}.png"),
            f"{name}: {title}" + ("" if method == "backprop" else f", {len(devices)} devices"),
            [f"device {device}\nall blocks" for device in devices] if whole else None,
        )
    if len(scenarios) > 1:
        lines = collections.defaultdict(dict)
        for num_blocks, factor, found in sweep:
            for name, speed_up in found.items():
                if factor == 1:
                    lines[name][num_blocks] = speed_up
        ideal = {k: ideal_speed_up("dgl", scenario) for k, scenario in scenarios.items()}
        plot_speed_ups(os.path.join(_OUT.value, "speed_ups.png"), title, lines, ideal)


def _methods_table(rows: Sequence[Row]) -> str:
    header = ["K", "method", "M", "step, ms", "images/s", "speed-up", "of its ideal, %"]
    header += ["devices busy, %", "sent, MB/step", "kept, GiB/device"]
    fastest, cells = collections.defaultdict(float), []
    for row in rows:
        fastest[row.num_blocks] = max(fastest[row.num_blocks], row.result.speed_up)
    for row in rows:
        result, speed_up = row.result, f"{row.result.speed_up:.2f}"
        if result.speed_up >= fastest[row.num_blocks] * (1 - 1e-9):
            speed_up = f"**{speed_up}**"
        cells.append(
            [
                str(row.num_blocks),
                row.method,
                "-" if row.num_microbatches is None else str(row.num_microbatches),
                f"{1000 * result.seconds_per_step:.2f}",
                _rate(result.images_per_second),
                speed_up,
                f"{100 * result.speed_up / result.ideal_speed_up:.0f}",
                f"{100 * sum(result.busy_fractions) / len(result.busy_fractions):.0f}",
                f"{result.bytes_per_step / 1e6:.0f}",
                f"{result.kept_bytes / 2**30:.1f}" if result.kept_bytes else "-",
            ]
        )
    return markdown(header, cells) + (
        "\n\nSpeed-up: over backprop on one device. Ideal: its cost by that of the slowest block, "
        "with its auxiliary head in dgl and async_dgl. All-reduce hidden: a bound, not a method. "
        "Bold: the fastest for that K, bounds too."
    )


def _sweep_table(sweep: Sequence[tuple[int, float, Mapping[str, float]]]) -> str:
    names = list(sweep[0][2])
    cells = []
    for num_blocks, factor, found in sweep:
        best = max(found.values())
        speeds = [f"**{x:.2f}**" if x >= best * 0.995 else f"{x:.2f}" for x in found.values()]
        bandwidths = f"{factor * _INSIDE.value / 1e9:g} / {factor * _BETWEEN.value / 1e9:g}"
        winners = ", ".join(name for name, x in found.items() if x >= best * 0.995)
        cells.append([str(num_blocks), bandwidths, *speeds, winners])
    header = ["K", "inside / between hosts, GB/s", *names, "fastest (within 0.5 %)"]
    return markdown(header, cells) + (
        "\n\nSpeed-ups over one device; of the pipelines the better of GPipe and 1F1B. "
        "async_dgl is as dgl here. All-reduce hidden: a bound, not a method."
    )


def _slowed_table(slowed: Mapping[str, Result]) -> str:
    cells = [
        [method, " / ".join(f"{1000 * x:.2f}" for x in result.block_seconds)]
        for method, result in slowed.items()
    ]
    return markdown(["method", "step by block, ms"], cells)


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _integers(flag: Any) -> list[int]:
    if not flag.value or not all(word.isdigit() and int(word) > 0 for word in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be numbers above 0; try 2,4")
    return sorted({int(word) for word in flag.value})


if __name__ == "__main__":
    plain_flags.run(main)
