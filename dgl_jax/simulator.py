"""How long a step of each method takes, from the costs of its blocks. Plain Python.

`run` is the one engine that times any list of tasks. Devices and links serve what they are given
in the order of dispatch, as accelerators' queues do, so one pass over the list is exact.

Not simulated: reading data and labels, evaluation, and other programs on the same links.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from dgl_jax.errors import UserError
from dgl_jax.schedule import ALL_REDUCE, BACKWARD, FORWARD, LOSS, SEND, UPDATE, Span
from dgl_jax.task_lists import METHODS, Scenario, Task, backprop_seconds, compute_seconds


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a simulation; rates are those of the steady state.

    Attributes:
      seconds_per_step: until every block has made one more update.
      block_seconds: the same of each block alone; they differ where blocks run freely.
      busy_fractions: of each device's time, computing.
      images_per_second: that every block has learned from.
      bytes_per_step: sent between devices.
      kept_bytes: the most that a device keeps for backward passes.
      speed_up: over `backprop` on one device; ideal_speed_up: see there.
    """

    seconds_per_step: float
    block_seconds: list[float]
    busy_fractions: list[float]
    images_per_second: float
    bytes_per_step: float
    kept_bytes: float
    speed_up: float
    ideal_speed_up: float


def simulate(method: str, scenario: Scenario) -> Result:
    """Times a method's schedule over enough steps to become steady; the later half is measured.

    Args:
      method: a key of `METHODS`.
      scenario: blocks and devices.

    Raises:
      UserError: for an unknown method, or numbers out of range.

    Example:
      Four equal blocks of 3 s. DGL is as fast as one block; backprop in four microbatches fills
      and drains the pipeline in every step: 12 s of work take 3 / 4 x (4 - 1 + 4) s.

      >>> from dgl_jax.task_lists import BlockLoad
      >>> blocks = (BlockLoad(forward_seconds=1.0, backward_seconds=2.0),) * 4
      >>> scenario = Scenario(blocks, num_microbatches=4)
      >>> [simulate(method, scenario).seconds_per_step for method in ("backprop", "dgl")]
      [12.0, 3.0]
      >>> simulate("pipeline_backprop_1f1b", scenario).seconds_per_step
      5.25
    """
    _check(method, scenario)
    bound = unfinished_steps(method, scenario)
    # Steps of backprop don't overlap; all others fill a pipeline first.
    num_steps = 8 if "backprop" in method else 8 * (len(scenario.blocks) + bound)
    tasks = bound_in_flight(METHODS[method](scenario, num_steps), bound)
    times = run(tasks, scenario.cluster.dispatch_seconds)

    by_block, num_devices = collections.defaultdict(dict), 0
    for task, (_, end) in zip(tasks, times, strict=True):
        num_devices = max(num_devices, 1 + max(task.devices, default=0))
        if task.operation != SEND:
            by_block[task.block][task.step] = max(end, by_block[task.block].get(task.step, 0.0))
    block_seconds = [steady_seconds(list(by_block[block].values())) for block in sorted(by_block)]
    seconds = max(block_seconds)

    first = num_steps // 2
    busy, num_bytes = [0.0] * num_devices, 0.0
    for task in tasks:
        if task.step >= first:
            num_bytes += task.num_bytes / (num_steps - first)
            if task.operation not in (SEND, ALL_REDUCE):
                for device in task.devices:
                    share = task.seconds / (num_steps - first)
                    busy[device] += share / block_seconds[task.block] if share else 0.0
    return Result(
        seconds_per_step=seconds,
        block_seconds=block_seconds,
        busy_fractions=busy,
        images_per_second=scenario.batch_size / seconds if seconds else math.inf,
        bytes_per_step=num_bytes,
        kept_bytes=_most_kept(tasks, times),
        speed_up=sum(backprop_seconds(scenario)) / seconds if seconds else math.inf,
        ideal_speed_up=ideal_speed_up(method, scenario),
    )


def unfinished_steps(method: str, scenario: Scenario) -> int:
    """How many steps a host has dispatched, at most, before the first of them has ended.

    ``max_steps_in_flight`` and, as steps spread over the blocks, K - 1 more. A free-running
    worker has a block of its own and counts its own turns.
    """
    depth = 1 if method == "async_dgl" else len(scenario.blocks)
    return scenario.max_steps_in_flight + depth - 1


def ideal_speed_up(method: str, scenario: Scenario) -> float:
    """Over backprop on one device, if nobody ever waited and nothing had to be sent.

    Backprop's cost by that of the slowest block, with its auxiliary head where the method has
    one; in `data_parallel` all devices share alike.
    """
    total = sum(backprop_seconds(scenario))
    if method == "backprop":
        return 1.0
    if method == "data_parallel":
        return float(sum(block.num_devices for block in scenario.blocks))
    heads = method in ("dgl", "async_dgl")
    slowest = max(sum(compute_seconds(scenario, k, heads)) for k in range(len(scenario.blocks)))
    return total / slowest if slowest else math.inf


# ---- The engine.


def run(tasks: Sequence[Task], dispatch_seconds: float = 0.0) -> list[tuple[float, float]]:
    """The (start, end) seconds of every task.

    A task starts when its host has dispatched it, its inputs have arrived, and its devices and
    links have done what they were given before.

    Args:
      tasks: in the order of dispatch; inputs are earlier tasks.
      dispatch_seconds: a host's, for each task.
    """
    free, hosts = collections.defaultdict(float), collections.defaultdict(float)
    times = []
    for task in tasks:
        ready = max((times[i][1] + tasks[i].delay for i in task.inputs), default=0.0)
        if task.operation != ALL_REDUCE:
            waited = max((times[i][1] for i in task.host_waits), default=0.0)
            hosts[task.host] = max(hosts[task.host], waited) + dispatch_seconds
            ready = max(ready, hosts[task.host])
        resources = (*task.devices, *task.links)
        start = max([ready, *(free[resource] for resource in resources)])
        times.append((start, start + task.seconds))
        for resource in resources:
            free[resource] = start + task.seconds
    return times


def bound_in_flight(tasks: Sequence[Task], max_unfinished_steps: int) -> list[Task]:
    """Back-pressure: a host begins a step when its programs of so many steps before have ended.

    As the runners have it: ``max_unfinished_steps`` = 1 dispatches a step when the one before
    has ended.
    """
    programs, first = collections.defaultdict(list), {}
    for place, task in enumerate(tasks):
        first.setdefault((task.host, task.step), place)
        if task.operation != SEND:
            programs[task.host, task.step].append(place)
    bounded = list(tasks)
    for (host, step), place in first.items():
        waits = tuple(programs.get((host, step - max_unfinished_steps), ()))
        bounded[place] = dataclasses.replace(tasks[place], host_waits=waits)
    return bounded


def spans_of(tasks: Sequence[Task], times: Sequence[tuple[float, float]]) -> list[Span]:
    """One span for each device that a task occupied for some time; transfers occupy none."""
    return [
        Span(device, task.block, task.batch, task.operation, start, end)
        for task, (start, end) in zip(tasks, times, strict=True)
        for device in task.devices
        if end > start
    ]


def steady_seconds(ends: Sequence[float]) -> float:
    """Seconds a step in the later half, over whole periods where it has any.

    The steps of a pipeline that waits for the host, say, come in bursts.

    Args:
      ends: of all steps, one or more, in seconds from the start of the first.
    """
    late = [0.0, *ends][len(ends) // 2 :]
    gaps = [after - before for before, after in itertools.pairwise(late)]
    for period in range(1, len(gaps) // 2 + 1):
        shifted = zip(gaps, gaps[period:])
        if all(abs(before - after) <= 1e-12 * ends[-1] for before, after in shifted):
            return (late[-1] - late[-1 - period]) / period
    return (late[-1] - late[0]) / len(gaps)


def _most_kept(tasks: Sequence[Task], times: Sequence[tuple[float, float]]) -> float:
    """The most bytes that any device keeps for backward passes."""
    changes = collections.defaultdict(list)
    for task, (start, end) in zip(tasks, times, strict=True):
        for device in task.devices:
            if task.operation in (FORWARD, LOSS, UPDATE):
                changes[device].append((start, 1, task.kept_bytes))
            if task.operation in (BACKWARD, LOSS, UPDATE):
                changes[device].append((end, 0, -task.kept_bytes))
    # At the same instant what ends makes room first.
    peaks = [max(itertools.accumulate(c[2] for c in sorted(each))) for each in changes.values()]
    return max(peaks, default=0.0)


def _check(method: str, scenario: Scenario) -> None:
    if method not in METHODS:
        raise UserError(f"method={method} is unknown; choose one of {', '.join(METHODS)}")
    if not scenario.blocks:
        raise UserError("blocks=() must have one block or more")
    for name in ("num_microbatches", "max_steps_in_flight", "batch_size"):
        if getattr(scenario, name) < 1:
            raise UserError(f"{name}={getattr(scenario, name)} must be at least 1")
    for name in ("inside_host", "between_hosts"):
        link = getattr(scenario.cluster, name)
        if not (link.bandwidth > 0 and link.latency >= 0):
            raise UserError(f"{name}={link} must have a bandwidth above 0 and a latency of 0 up")
