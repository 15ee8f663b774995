"""A schedule is data: which block does what, in which order. Plain Python, no devices.

The fused runner traces the tasks of one step into one program, the pipelined runner
dispatches them to the blocks' devices; both run the same list.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

# What a block may be told to do.
UPDATE = "update"  # A forward and a backward pass on its local loss, and an update.
FEED = "feed"  # A forward pass in evaluation mode, to feed the block above.
FORWARD = "forward"  # A forward pass in training mode; its backward pass comes later.
BACKWARD = "backward"  # A backward pass from a gradient that came from above, and an update.

# With microbatches, a backward pass adds to the block's gradient; the update is a task of its own.
LOSS = "loss"  # Of the last block: a forward pass, and at once the backward pass from its loss.
APPLY = "apply"  # An update by the gradient that has been added up.

# What is done besides. Links send, devices do not.
SEND = "send"
ALL_REDUCE = "all_reduce"


@dataclasses.dataclass(frozen=True)
class Task:
    """One operation of one block.

    Attributes:
      block: the block, 0-based.
      operation: `UPDATE`, `FEED`, `FORWARD` or `BACKWARD`; with microbatches `LOSS`, `APPLY`, too.
      batch: the batch of the stream that it works on, or whose activations it gets.
      turn: the updates that the block has made before.
      microbatch: which part of the batch, where it is cut into parts; else 0.
    """

    block: int
    operation: str
    batch: int
    turn: int
    microbatch: int = dataclasses.field(default=0, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Span:
    """What a device did from one moment to another.

    Attributes:
      device: its number, its row in the picture.
      block: whose program it was.
      step: the mini-batch it worked on; measured, the step of the loop. Its colour.
      operation: of `schedule`, or ALL_REDUCE.
      start: seconds; end: likewise.
    """

    device: int
    block: int
    step: int
    operation: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tasks of a run, in steps of the training loop.

    Attributes:
      num_steps: the steps of the whole run. Metrics, checkpoints and evaluations count these.
      num_updates: the updates that each block makes in them; what a learning rate depends on.
      tasks: ``tasks(first_step)`` yields each step's tasks, from the given step on. Empty where
        the blocks themselves decide (workers that run freely).
      drop_delay_epochs: how much later than asked for a block lowers its learning rate.
    """

    num_steps: int
    num_updates: int
    tasks: Callable[[int], Iterator[tuple[Task, ...]]]
    drop_delay_epochs: float = 0.0


def calls(
    schedule: Schedule, step: int, steps_per_call: int, steps_per_epoch: int
) -> Iterator[list[Sequence[Task]]]:
    """The steps from ``step`` on, in lists: each is what one call of a program does.

    A list has ``steps_per_call`` steps, from a multiple of it on, of the same operations in one
    epoch; where that can't be, it has one. A run that is gone on with has the same lists.
    """
    waiting = []
    for tasks in schedule.tasks(step):
        waiting.append(tasks)
        end = step + len(waiting)
        if end % steps_per_call and end % steps_per_epoch and end != schedule.num_steps:
            continue
        operations = [[(task.block, task.operation) for task in tasks] for tasks in waiting]
        if len(waiting) == steps_per_call and all(other == operations[0] for other in operations):
            yield waiting
        else:
            yield from ([tasks] for tasks in waiting)
        step, waiting = end, []


def synchronous(num_blocks: int, num_updates: int) -> Schedule:
    """In every step each block makes one update, from the first block to the last.

    A block needs only the activations of the one below, never anything from above, so blocks
    on separate devices work on different steps at once.

    Example:
      >>> step = next(synchronous(num_blocks=2, num_updates=10).tasks(first_step=4))
      >>> [(task.block, task.operation, task.batch) for task in step]
      [(0, 'update', 4), (1, 'update', 4)]

    Source: DGL, Algorithm 1; Algorithm 3 is the same schedule seen from the workers.
    """

    def tasks(first_step: int) -> Iterator[tuple[Task, ...]]:
        for step in range(first_step, num_updates):
            yield tuple(Task(block, UPDATE, step, step) for block in range(num_blocks))

    return Schedule(num_updates, num_updates, tasks)


def block_order(kind: str, block: int, num_blocks: int, num_microbatches: int) -> list[tuple]:
    """What one block does in a step of pipelined backprop: its (operation, microbatch)s in order.

    Args:
      kind: ``gpipe``: all forward passes, then all backward passes. ``1f1b``: as soon as the
        first gradient has come, one backward and one forward pass by turns, so that no more
        than K - k microbatches wait for their gradients, however many there are.
      block: k, 0-based.
      num_blocks: K. The last block needs no gradient from above: it goes back at once.
      num_microbatches: M.

    Example:
      >>> order = block_order("1f1b", block=0, num_blocks=2, num_microbatches=3)
      >>> " ".join(f"{operation}_{microbatch}" for operation, microbatch in order)
      'forward_0 forward_1 backward_0 forward_2 backward_1 backward_2 apply_0'

    Source: GPipe (Huang et al. 2019), Figure 2; PipeDream-flush (Narayanan et al., 2021,
      "Memory-efficient pipeline-parallel DNN training"), Figure 2.
    Deviation: backward passes go from the first microbatch to the last in both, so that both add
      up the same numbers in the same order; GPipe's figure has them from the last to the first,
      which takes as long. The last block, too, goes back at once in both.
    """
    every = range(num_microbatches)
    if block == num_blocks - 1:
        return [*((LOSS, microbatch) for microbatch in every), (APPLY, 0)]
    ahead = num_microbatches if kind == "gpipe" else min(num_blocks - 1 - block, num_microbatches)
    order = [(FORWARD, microbatch) for microbatch in range(ahead)]
    for microbatch in every:
        if ahead + microbatch < num_microbatches:
            order.append((FORWARD, ahead + microbatch))
        order.append((BACKWARD, microbatch))
    return [*order, (APPLY, 0)]


def delayed(num_blocks: int, num_updates: int) -> Schedule:
    """Every batch goes up in one step; its gradient comes down one block a step.

    A block reads the gradient of the step before: hence the backward passes from the first
    block to the last, and the last block's update, which is of this step's batch, at the end.
    On separate devices a forward pass waits for nothing but the block below and a backward
    pass for nothing but the step before of the block above, so all blocks work at once.

    Nothing is drained at the end: block k makes D_k updates fewer than ``num_updates``.

    Args:
      num_blocks: K.
      num_updates: the updates of the last block.

    Example:
      >>> step = next(delayed(num_blocks=3, num_updates=10).tasks(5))
      >>> [(task.block, task.operation, task.batch) for task in step if task.operation != FORWARD]
      [(0, 'backward', 3), (1, 'backward', 4), (2, 'update', 5)]

    Source: DDG, Algorithm 1; Features Replay, Algorithm 1.
    Deviation: in its first D_k steps a block makes no update, where the papers make one with a
      gradient of zero; the two differ in L2 terms, and in when a block's learning rate falls.
    """
    last = num_blocks - 1

    def tasks(first_step: int) -> Iterator[tuple[Task, ...]]:
        for step in range(first_step, num_updates):
            turns = [step - (last - block) for block in range(last)]
            yield (
                *(Task(block, FORWARD, step, max(0, turn)) for block, turn in enumerate(turns)),
                *(Task(block, BACKWARD, n, n) for block, n in enumerate(turns) if n >= 0),
                Task(last, UPDATE, step, step),
            )

    return Schedule(num_updates, num_updates, tasks)


def pipeline(kind: str, num_blocks: int, num_microbatches: int, num_updates: int) -> Schedule:
    """Synchronous backprop over blocks: M microbatches up and down, then one update of each block.

    All blocks are idle at the beginning and the end of a step (the "bubble"): with equal blocks
    K - 1 of the K - 1 + M turns of a step.

    Args:
      kind: the order of each block's tasks, see `block_order`.
      num_blocks: K.
      num_microbatches: M.
      num_updates: of each block; one a step.
    """
    order = _merge(
        [block_order(kind, block, num_blocks, num_microbatches) for block in range(num_blocks)]
    )

    def tasks(first_step: int) -> Iterator[tuple[Task, ...]]:
        for step in range(first_step, num_updates):
            yield tuple(
                Task(block, operation, step, step, microbatch=microbatch)
                for block, operation, microbatch in order
            )

    return Schedule(num_updates, num_updates, tasks)


def _merge(orders: list[list[tuple]]) -> list[tuple[int, str, int]]:
    """One list for the host, which dispatches to all blocks: round by round a task of each.

    A block's task comes when those whose results it takes were in earlier rounds, so that no
    block's queue fills while another has nothing to do.
    """
    last, places, done, merged = len(orders) - 1, [0] * len(orders), set(), []
    while len(merged) < sum(map(len, orders)):
        now = []
        for block, order in enumerate(orders):
            if places[block] == len(order):
                continue
            operation, microbatch = order[places[block]]
            needs = None
            if operation in (FORWARD, LOSS) and block:
                needs = (block - 1, FORWARD, microbatch)
            elif operation == BACKWARD:
                needs = (block + 1, LOSS if block + 1 == last else BACKWARD, microbatch)
            if needs is None or needs in done:
                now.append((block, operation, microbatch))
                places[block] += 1
        done.update(now)
        merged += now
    return merged
