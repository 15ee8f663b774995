"""A schedule is data: which block does what, in which order. Plain Python, no devices.

The fused runner traces the tasks of one step into one program, the pipelined runner
dispatches them to the blocks' devices; both run the same list.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Task:
    """Block ``block`` makes its update of step ``step``, on what the block below handed on
    in that step (on the batch of that step for block 0)."""

    block: int
    step: int


def synchronous(num_blocks: int, first_step: int, num_steps: int) -> Iterator[Task]:
    """Every block once a step, from the first to the last.

    A block needs only the activations of the one below, never anything from above, so blocks
    on separate devices work on different steps at once.

    Source: DGL, Algorithm 1; Algorithm 3 is the same schedule seen from the workers.
    """
    for step in range(first_step, first_step + num_steps):
        for block in range(num_blocks):
            yield Task(block, step)
