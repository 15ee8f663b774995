"""Synchronous decoupled greedy learning (Belilovsky et al., ICML 2020, Algorithm 1).

Every block minimises its own local loss through its own auxiliary head, on the activations
that the block below computed in the same step, before its update. Nothing flows back.
"""

from collections.abc import Sequence
from typing import Any

import optax

from dgl_jax import schedule
from dgl_jax.block import Block, BlockStep, make_block_step
from dgl_jax.config import Config
from dgl_jax.losses import LossFn
from dgl_jax.methods.method import Method
from dgl_jax.models.network import Network
from dgl_jax.partition import block_ranges
from dgl_jax.pipeline import make_runner


def make_blocks(
    network: Network,
    cuts: Sequence[int],
    auxiliary_head: Any,
    loss_fn: LossFn | Sequence[LossFn],
) -> tuple[Block, ...]:
    """Cuts a network into blocks that learn greedily.

    Args:
      network: layers and head.
      cuts: the 0-based layers after which to cut; none for a single block.
      auxiliary_head: the module put on every block but the last, which has the network's own
        head. It may be one for all or a sequence of one a cut. A head's attribute
        ``classifies``, where it has one, says whether its output has logits.
      loss_fn: the blocks' local loss, a function of the head's output and the labels; one for
        all or a sequence of one a block.

    Example:
      >>> import flax.linen as nn
      >>> network = Network("mine", [nn.Dense(8), nn.Dense(8), nn.Dense(8)], head=nn.Dense(10))
      >>> blocks = make_blocks(network, (1,), auxiliary_head=nn.Dense(10), loss_fn=None)
      >>> [(block.first_layer, len(block.layers)) for block in blocks]
      [(0, 2), (2, 1)]

    Source: DGL, Algorithm 1.
    Deviation: none.
    """
    ranges = block_ranges(len(network.layers), cuts)
    if not isinstance(auxiliary_head, Sequence):
        auxiliary_head = (auxiliary_head,) * len(cuts)
    if not isinstance(loss_fn, Sequence):
        loss_fn = (loss_fn,) * len(ranges)
    heads = (*auxiliary_head, network.head)
    return tuple(
        Block(
            index,
            first,
            network.layers[first:end],
            head,
            loss,
            classifies=getattr(head, "classifies", True),
        )
        for index, ((first, end), head, loss) in enumerate(zip(ranges, heads, loss_fn, strict=True))
    )


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> schedule.Schedule:
    """Every block once a step."""
    del config, steps_per_epoch
    return schedule.synchronous(num_blocks, num_updates)


def make_block_work(
    config: Config, block: Block, optimizer: optax.GradientTransformation
) -> BlockStep:
    """The block's update."""
    del config
    return make_block_step(block, optimizer)


METHOD = Method(make_blocks, make_schedule, make_runner, make_block_work)
