"""Each training method as a list of tasks: what devices and links have to do, in which order.

Plain Python. A list is in the order in which hosts dispatch its tasks; what a task needs are
earlier tasks. `simulator.run` times any list.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable

from dgl_jax.schedule import (
    ALL_REDUCE,
    APPLY,
    BACKWARD,
    FORWARD,
    LOSS,
    SEND,
    UPDATE,
    delayed,
    pipeline,
    synchronous,
)


@dataclasses.dataclass(frozen=True)
class BlockLoad:
    """What one block has to do for one mini-batch, on one device.

    Attributes:
      forward_seconds: of its layers; backward_seconds likewise.
      head_forward_seconds: of its auxiliary head (of the last block: of the network's own head);
        head_backward_seconds likewise.
      parameter_bytes: of its layers, and of its head if it is the last block.
      head_parameter_bytes: of its auxiliary head.
      activation_bytes: what it hands on to the next block.
      kept_bytes: what its forward pass keeps for its backward pass.
      num_devices: it is data-parallel over so many, each of which takes that share of the batch.
    """

    forward_seconds: float
    backward_seconds: float
    head_forward_seconds: float = 0.0
    head_backward_seconds: float = 0.0
    parameter_bytes: float = 0.0
    head_parameter_bytes: float = 0.0
    activation_bytes: float = 0.0
    kept_bytes: float = 0.0
    num_devices: int = 1


@dataclasses.dataclass(frozen=True)
class Link:
    """From one device to another, one way: bytes a second, and seconds until the first arrives."""

    bandwidth: float = math.inf
    latency: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where blocks run. Consecutive devices fill hosts; every pair of devices has its own link.

    Attributes:
      inside_host: the link of two devices of one host; between_hosts: of different hosts.
      devices_per_host: N.
      dispatch_seconds: of the host, for each program and each transfer.
    """

    inside_host: Link = Link()
    between_hosts: Link = Link()
    devices_per_host: int = 8
    dispatch_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What all methods are compared on.

    Attributes:
      blocks: K of them; consecutive devices.
      cluster: the devices.
      batch_size: images of a mini-batch.
      num_microbatches: M, of the pipelines of backprop. One takes 1/M of a mini-batch's time.
      max_steps_in_flight: see `unfinished_steps`.
      slow_block: the work of this block takes `slowdown` times as long, in every method.
      hide_all_reduce: as much of each all-reduce as fits behind its backward pass costs nothing.
        A bound: sent in buckets while the backward pass runs, an all-reduce comes near it.
    """

    blocks: tuple[BlockLoad, ...]
    cluster: Cluster = Cluster()
    batch_size: int = 1
    num_microbatches: int = 1
    max_steps_in_flight: int = 4
    slow_block: int | None = None
    slowdown: float = 1.0
    hide_all_reduce: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """One program on a block's devices, or one transfer on a link.

    Attributes:
      block: whose it is; of a transfer, the sender.
      operation: of `schedule`, or SEND, ALL_REDUCE.
      step: of the training loop; batch: the mini-batch that it works on.
      devices: that it occupies, of a transfer none; links: likewise, pairs of blocks.
      seconds: how long it occupies them.
      delay: seconds from its end until what it sends has arrived.
      inputs: the tasks, by their place in the list, that must have ended and arrived.
      host: who dispatches it. An all-reduce is a part of the program before it.
      host_waits: the host dispatches it, and what comes after, when these have ended.
      num_bytes: that are sent, by all devices together.
      kept_bytes: that each device keeps, from the start of a forward pass (FORWARD, LOSS, UPDATE)
        to the end of its backward pass (BACKWARD, LOSS, UPDATE).
    """

    block: int
    operation: str
    step: int
    batch: int
    devices: tuple[int, ...]
    links: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0
    delay: float = 0.0
    inputs: tuple[int, ...] = ()
    host: int = 0
    host_waits: tuple[int, ...] = ()
    num_bytes: float = 0.0
    kept_bytes: float = 0.0


def backprop(scenario: Scenario, num_steps: int) -> list[Task]:
    """The whole network on one device, in one program, without auxiliary heads."""
    kept = sum(block.kept_bytes for block in scenario.blocks)
    seconds = sum(backprop_seconds(scenario))
    return [
        Task(0, UPDATE, step, step, (0,), seconds=seconds, kept_bytes=kept)
        for step in range(num_steps)
    ]


def data_parallel(scenario: Scenario, num_steps: int) -> list[Task]:
    """The same, each batch split over all the blocks' devices; then an all-reduce."""
    devices = tuple(range(sum(block.num_devices for block in scenario.blocks)))
    num_bytes = sum(block.parameter_bytes for block in scenario.blocks)
    _, backward = backprop_seconds(scenario)
    tasks = []
    for task in backprop(scenario, num_steps):
        shares = {
            "seconds": task.seconds / len(devices),
            "kept_bytes": task.kept_bytes / len(devices),
        }
        tasks.append(dataclasses.replace(task, devices=devices, **shares))
        _all_reduce(tasks, scenario, num_bytes, backward / len(devices))
    return tasks


def pipeline_backprop(scenario: Scenario, num_steps: int, kind: str) -> list[Task]:
    """The order of `schedule.pipeline`, as the runner of that method dispatches it.

    Deviation: an update takes no time. A block over several devices sums its gradients over them
      once a step, where the runner's programs do so after every microbatch.
    """
    tasks, count = [], scenario.num_microbatches
    for step_tasks in pipeline(kind, len(scenario.blocks), count, num_steps).tasks(0):
        activations, gradients = {}, {}  # By block and microbatch: where they arrive.
        for task in step_tasks:
            block, operation, m = task.block, task.operation, task.microbatch
            # Gradients come from above, activations from below; an update waits for neither.
            arrived = gradients if operation == BACKWARD else activations
            inputs = arrived.pop((block, m), ())
            reduces = operation == APPLY
            _compute(
                tasks, scenario, block, operation, task.batch, inputs, share=count, reduces=reduces
            )
            if operation == FORWARD:
                activations[block + 1, m] = _send(tasks, scenario, block, block + 1, share=count)
            elif operation != APPLY:
                gradients[block - 1, m] = _send(tasks, scenario, block, block - 1, share=count)
    return tasks


def ddg(scenario: Scenario, num_steps: int) -> list[Task]:
    """Delayed gradients: batch t goes up in step t, its gradient comes down one block a step.

    The order of `schedule.delayed`.
    """
    tasks, num_blocks = [], len(scenario.blocks)
    gradients = [()] * num_blocks  # At the output of each block, of the step before.
    for step, step_tasks in enumerate(delayed(num_blocks, num_steps).tasks(0)):
        arrived, sent = (), list(gradients)
        for task in step_tasks:
            block, operation = task.block, task.operation
            inputs = gradients[block] if operation == BACKWARD else arrived
            _compute(tasks, scenario, block, operation, step, inputs, batch=task.batch)
            if operation == FORWARD:
                arrived = _send(tasks, scenario, block, block + 1)
            elif block:
                sent[block - 1] = _send(tasks, scenario, block, block - 1)
        gradients = sent
    return tasks


def dgl(scenario: Scenario, num_steps: int) -> list[Task]:
    """Synchronous DGL: a block's update, one program, waits for that of the block below.

    Source: DGL, Algorithm 1.
    Deviation: activations leave at the end of the update, as from our compiled programs.
    """
    tasks = []
    for step_tasks in synchronous(len(scenario.blocks), num_steps).tasks(0):
        arrived = ()
        for task in step_tasks:
            _compute(tasks, scenario, task.block, UPDATE, task.batch, arrived, heads=True)
            arrived = _send(tasks, scenario, task.block, task.block + 1)
    return tasks


def async_dgl(scenario: Scenario, num_steps: int) -> list[Task]:
    """Free-running workers: a block reads the buffer below, which lies there, and never waits.

    Once there is something in the buffer: hence every turn depends on the first turn below.
    A worker is a host of its own. A step is one turn.

    Source: DGL, Algorithm 4.
    """
    tasks, written = [], {}
    for turn in range(num_steps):
        for block in range(len(scenario.blocks)):
            arrived = ()
            if block:
                source = written[block - 1]
                arrived = _send(tasks, scenario, block - 1, block, source, step=turn, host=block)
            _compute(tasks, scenario, block, UPDATE, turn, arrived, heads=True, host=block)
            written.setdefault(block, len(tasks) - 1)
    return tasks


METHODS: dict[str, Callable[[Scenario, int], list[Task]]] = {
    "backprop": backprop,
    "data_parallel": data_parallel,
    "pipeline_backprop_gpipe": functools.partial(pipeline_backprop, kind="gpipe"),
    "pipeline_backprop_1f1b": functools.partial(pipeline_backprop, kind="1f1b"),
    "ddg": ddg,
    "dgl": dgl,
    "async_dgl": async_dgl,
}


def _compute(
    tasks, scenario, block, operation, step, inputs,
    *, batch=None, heads=False, share=1, reduces=True, host=None,
) -> None:  # fmt: skip
    """Appends a block's program for a share of a mini-batch; its all-reduce if it updates."""
    load, devices = scenario.blocks[block], _devices(scenario, block)
    forward, backward = compute_seconds(scenario, block, heads)
    both = forward + backward
    seconds = {FORWARD: forward, BACKWARD: backward, LOSS: both, UPDATE: both, APPLY: 0.0}
    tasks.append(
        Task(
            block,
            operation,
            step,
            step if batch is None else batch,
            devices,
            seconds=seconds[operation] / share,
            inputs=inputs,
            host=_host(scenario, devices[0]) if host is None else host,
            kept_bytes=load.kept_bytes / len(devices) / share,
        )
    )
    if operation != FORWARD and reduces:
        num_bytes = load.parameter_bytes + (load.head_parameter_bytes if heads else 0.0)
        _all_reduce(tasks, scenario, num_bytes, backward / share)


def _all_reduce(
    tasks: list[Task], scenario: Scenario, num_bytes: float, backward_seconds: float
) -> None:
    """Appends an all-reduce to the last task, if that has several devices: a part of its program.

    A ring of c devices reduces B bytes in 2 (c - 1) rounds, in each of which every device sends
    B / c bytes to the next: ring(c, B) = 2 (c - 1) (B / c / bandwidth + latency).

    On h hosts of n devices it is hierarchical: a reduce-scatter inside each host, all-reduces of
    each device's B / n bytes across the hosts, n rings at once, and an all-gather inside each host.
    Together ring(n, B) on links inside a host and ring(h, B / n) on those between hosts. If the
    hosts have not all as many devices, the most count inside and the fewest between.

    Args:
      tasks: the list.
      scenario: with its links, and whether the backward pass hides an all-reduce.
      num_bytes: B.
      backward_seconds: of the backward pass before.
    """
    task, cluster = tasks[-1], scenario.cluster
    if len(task.devices) < 2:
        return

    def ring(count, num_bytes, link):
        return 2 * (count - 1) * (num_bytes / count / link.bandwidth + link.latency)

    hosts = collections.Counter(_host(scenario, device) for device in task.devices)
    seconds = ring(max(hosts.values()), num_bytes, cluster.inside_host)
    seconds += ring(len(hosts), num_bytes / min(hosts.values()), cluster.between_hosts)
    if scenario.hide_all_reduce:
        seconds = max(0.0, seconds - backward_seconds)
    tasks.append(
        Task(
            task.block,
            ALL_REDUCE,
            task.step,
            task.batch,
            task.devices,
            seconds=seconds,
            inputs=(len(tasks) - 1,),
            host=task.host,
            num_bytes=2 * (len(task.devices) - 1) * num_bytes,
        )
    )


def _send(
    tasks, scenario, block, to, source=None, *, step=None, share=1, host=None
) -> tuple[int, ...]:
    """Appends the transfer of the last task's output to a neighbour, both on all their devices.

    Returns:
      Its place in the list, as an input; nothing where there is no such block.
    """
    if not 0 <= to < len(scenario.blocks):
        return ()
    source = len(tasks) - 1 if source is None else source
    devices, others = _devices(scenario, block), _devices(scenario, to)
    # Each pair sends its part over its own link; the slowest counts.
    pairs = min(len(devices), len(others))
    ends = zip(devices[-pairs:], others[-pairs:])
    links = [_link(scenario.cluster, a, b) for a, b in ends]
    num_bytes = scenario.blocks[min(block, to)].activation_bytes / share
    tasks.append(
        Task(
            block,
            SEND,
            tasks[source].step if step is None else step,
            tasks[source].batch if step is None else step,
            (),
            links=((block, to),),
            seconds=max(num_bytes / pairs / link.bandwidth for link in links),
            delay=max(link.latency for link in links),
            inputs=(source,),
            host=_host(scenario, devices[0]) if host is None else host,
            num_bytes=num_bytes,
        )
    )
    return (len(tasks) - 1,)


def compute_seconds(scenario: Scenario, block: int, heads: bool) -> tuple[float, float]:
    """Forward and backward of a mini-batch on the block's devices; the last has its head always."""
    load = scenario.blocks[block]
    head = heads or block == len(scenario.blocks) - 1
    factor = scenario.slowdown if block == scenario.slow_block else 1.0
    forward = load.forward_seconds + (load.head_forward_seconds if head else 0.0)
    backward = load.backward_seconds + (load.head_backward_seconds if head else 0.0)
    return factor * forward / load.num_devices, factor * backward / load.num_devices


def backprop_seconds(scenario: Scenario) -> tuple[float, float]:
    """Forward and backward of a mini-batch on one device, without auxiliary heads."""
    seconds = [
        [load.num_devices * x for x in compute_seconds(scenario, block, heads=False)]
        for block, load in enumerate(scenario.blocks)
    ]
    forward, backward = map(math.fsum, zip(*seconds, strict=True))
    return forward, backward


def _devices(scenario: Scenario, block: int) -> tuple[int, ...]:
    first = sum(load.num_devices for load in scenario.blocks[:block])
    return tuple(range(first, first + scenario.blocks[block].num_devices))


def _host(scenario: Scenario, device: int) -> int:
    return device // scenario.cluster.devices_per_host


def _link(cluster: Cluster, a: int, b: int) -> Link:
    """Of two devices."""
    same = a // cluster.devices_per_host == b // cluster.devices_per_host
    return cluster.inside_host if same else cluster.between_hosts
