"""What a training method is: blocks with their objectives, a schedule, a way to run them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.block import Block
from dgl_jax.config import Config
from dgl_jax.pipeline import Runner
from dgl_jax.schedule import Schedule


def activation_bytes(config: Config, activations: jax.ShapeDtypeStruct) -> int:
    """What a block sends the next in a step, where it is the activations as they are."""
    del config
    return activations.size * activations.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Method:
    """A training algorithm, in functions.

    Attributes:
      make_blocks: ``(network, cuts, auxiliary_head, loss_fn) -> blocks``: what learns, and from
        which loss. The head may be one for all or a sequence of one a cut, the loss one for all
        or a sequence of one a block.
      make_schedule: ``(config, num_blocks, num_updates, steps_per_epoch) -> Schedule``: which
        block does what, in which order.
      make_runner: ``(config, blocks, optimizer, key, placements) -> Runner``: how the tasks run
        on devices.
      make_block_work: ``(config, block, optimizer) -> work(state, x, labels, key)``: what a
        block computes for one update, as a pure function; to measure its time.
      bytes_between: ``(config, activations) -> bytes`` that two neighbours send each other in a
        step, both ways together, of a mini-batch of activations of that shape.
    """

    make_blocks: Callable[..., tuple[Block, ...]]
    make_schedule: Callable[..., Schedule]
    make_runner: Callable[..., Runner]
    make_block_work: Callable[..., Callable[..., Any]]
    bytes_between: Callable[[Config, jax.ShapeDtypeStruct], int] = activation_bytes


def both_ways_bytes(config: Config, activations: jax.ShapeDtypeStruct) -> int:
    """`Method.bytes_between` where a gradient comes down for the activations that go up.

    Example:
      >>> activations = jax.ShapeDtypeStruct((128, 16, 16, 64), "float32")
      >>> activation_bytes(Config(), activations), both_ways_bytes(Config(), activations)
      (8388608, 16777216)
    """
    return 2 * activation_bytes(config, activations)
