"""What a training method is: blocks with their objectives, and a schedule."""

import dataclasses
from collections.abc import Callable, Iterator

from dgl_jax.block import Block
from dgl_jax.schedule import Task


@dataclasses.dataclass(frozen=True)
class Method:
    """A training algorithm.

    Attributes:
      name: as in ``config.method.name``.
      blocks: what learns, each with its own local loss.
      schedule: ``schedule(num_blocks, first_step, num_steps)`` yields tasks.
    """

    name: str
    blocks: tuple[Block, ...]
    schedule: Callable[[int, int, int], Iterator[Task]]
