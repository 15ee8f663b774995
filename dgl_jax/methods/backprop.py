"""End-to-end backpropagation: the baseline, in the same harness.

One block holds every layer and the network's own head, so its local loss is the network's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dgl_jax.block import Block
from dgl_jax.losses import LossFn
from dgl_jax.methods import dgl
from dgl_jax.models.network import Network


def make_blocks(
    network: Network,
    cuts: Sequence[int],
    auxiliary_head: Any,
    loss_fn: LossFn | Sequence[LossFn],
) -> tuple[Block, ...]:
    """One block of all layers; ``cuts`` and ``auxiliary_head`` are not used.

    Example:
      >>> import flax.linen as nn
      >>> network = Network("mine", [nn.Dense(8), nn.Dense(8), nn.Dense(8)], head=nn.Dense(10))
      >>> (block,) = make_blocks(network, (1,), auxiliary_head=None, loss_fn=None)
      >>> len(block.layers), block.head is network.head
      (3, True)
    """
    del cuts, auxiliary_head
    return dgl.make_blocks(
        network, (), (), loss_fn[-1:] if isinstance(loss_fn, Sequence) else loss_fn
    )


METHOD = dataclasses.replace(dgl.METHOD, make_blocks=make_blocks)
