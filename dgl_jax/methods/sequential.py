"""Sequential greedy learning (Belilovsky et al., ICML 2019): one block after the other.

While a block learns, those below are frozen: they only feed it, in evaluation mode, so that
their BatchNorm statistics stand still too. Each block has its own learning-rate schedule from
its beginning, since that is a function of the block's own updates.
"""

import dataclasses
from collections.abc import Iterator

from dgl_jax.config import Config
from dgl_jax.errors import UserError
from dgl_jax.methods import dgl
from dgl_jax.schedule import FEED, UPDATE, Schedule, Task


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> Schedule:
    """Block 0 makes its updates, then block 1, and so on; with several laps, a share of them.

    A step is one update of one block, on a new batch. Nothing is computed but one forward pass
    of the layers below, without their heads; images are augmented anew each epoch, so that
    pass can't be kept from one epoch to the next.

    Args:
      config: its ``method.laps``: how often each block's turn comes; each lap has an equal
        share of the block's updates, and its optimizer goes on where its last turn ended.
      num_blocks: K.
      num_updates: the updates of each block, in all laps together.
      steps_per_epoch: not used.

    Example:
      >>> schedule = make_schedule(Config(), num_blocks=2, num_updates=2, steps_per_epoch=2)
      >>> for step in schedule.tasks(0):
      ...     print(*(f"{task.operation} {task.block}" for task in step), sep=", ")
      update 0
      update 0
      feed 0, update 1
      feed 0, update 1

    Raises:
      UserError: if there are more laps than updates.

    Source: Belilovsky et al. 2019, Algorithm 1, as DGL's Figures 3 and 4 compare it.
    Deviation: the laps are those of multi-lap sequential training (Karkar et al. 2023).
    """
    del steps_per_epoch
    laps = config.method.laps
    if laps > num_updates:
        raise UserError(
            f"config.method.laps={laps} must not exceed the {num_updates} updates of each block"
        )

    def tasks(first_step: int) -> Iterator[tuple[Task, ...]]:
        step = 0
        for lap in range(laps):
            first, end = (num_updates * place // laps for place in (lap, lap + 1))
            for block in range(num_blocks):
                phase = range(step, step + end - first)
                for batch in range(max(step, first_step), phase.stop):
                    turn = first + batch - step
                    feeds = tuple(Task(below, FEED, batch, end) for below in range(block))
                    yield (*feeds, Task(block, UPDATE, batch, turn))
                step = phase.stop

    return Schedule(num_blocks * num_updates, num_updates, tasks)


METHOD = dataclasses.replace(dgl.METHOD, make_schedule=make_schedule)
