"""What a training method is: blocks with their objectives, a schedule, and a way to run them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dgl_jax.block import Block
from dgl_jax.pipeline import Runner
from dgl_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Method:
    """A training algorithm: four functions.

    Attributes:
      make_blocks: ``(network, cuts, auxiliary_head, loss_fn) -> blocks``: what learns, and from
        which loss. The head may be one for all or a sequence of one a cut, the loss one for all
        or a sequence of one a block.
      make_schedule: ``(config, num_blocks, num_updates, steps_per_epoch) -> Schedule``: which
        block does what, in which order.
      make_runner: ``(config, blocks, optimizer, key, placements) -> Runner``: how the tasks run
        on devices.
      make_block_work: ``(block, optimizer) -> work(state, x, labels, key)``: all that a block
        computes in one step, as a pure function; to measure its time.
      gradients_come_down: whether blocks send each other gradients too.
    """

    make_blocks: Callable[..., tuple[Block, ...]]
    make_schedule: Callable[..., Schedule]
    make_runner: Callable[..., Runner]
    make_block_work: Callable[..., Callable[..., Any]]
    gradients_come_down: bool = False
