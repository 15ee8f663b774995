"""A schedule is data: which block does what, in which order. Plain Python, no devices.

The fused runner traces the tasks of one step into one program, the pipelined runner
dispatches them to the blocks' devices; both run the same list.
"""

import dataclasses
from collections.abc import Callable, Iterator

# What a block may be told to do.
UPDATE = "update"  # A forward and a backward pass on its local loss, and an update.
FEED = "feed"  # A forward pass in evaluation mode, to feed the block above.
FORWARD = "forward"  # A forward pass in training mode; its backward pass comes later.
BACKWARD = "backward"  # A backward pass from a gradient that came from above, and an update.


@dataclasses.dataclass(frozen=True)
class Task:
    """One operation of one block.

    Attributes:
      block: the block, 0-based.
      operation: `UPDATE`, `FEED`, `FORWARD` or `BACKWARD`.
      batch: the batch of the stream that it works on, or whose activations it gets.
      turn: the updates that the block has made before.
    """

    block: int
    operation: str
    batch: int
    turn: int


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


def synchronous(num_blocks: int, num_updates: int) -> Schedule:
    """In every step each block makes one update, from the first block to the last.

    A block needs only the activations of the one below, never anything from above, so blocks
    on separate devices work on different steps at once.

    Source: DGL, Algorithm 1; Algorithm 3 is the same schedule seen from the workers.
    """

    def tasks(first_step: int) -> Iterator[tuple[Task, ...]]:
        for step in range(first_step, num_updates):
            yield tuple(Task(block, UPDATE, step, step) for block in range(num_blocks))

    return Schedule(num_updates, num_updates, tasks)
