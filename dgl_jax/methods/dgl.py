"""Synchronous decoupled greedy learning (Belilovsky et al., ICML 2020, Algorithm 1).

Every block minimises its own local loss through its own auxiliary head, on the activations
that the block below computed in the same step, before its update. Nothing flows back.
"""

from collections.abc import Sequence
from typing import Any

from dgl_jax.block import Block
from dgl_jax.losses import LossFn
from dgl_jax.methods.method import Method
from dgl_jax.models.network import Network
from dgl_jax.partition import block_ranges
from dgl_jax.schedule import synchronous


def make_method(
    network: Network, cuts: Sequence[int], auxiliary_head: Any, loss_fn: LossFn
) -> Method:
    """Cuts a network into blocks that learn greedily.

    Args:
      network: layers and head.
      cuts: the 0-based layers after which to cut; none for a single block.
      auxiliary_head: the module put on every block but the last, which has the network's own
        head. It may be one for all or a sequence of one a cut.
      loss_fn: every block's local loss, a function of its head's output and the labels.

    Source: DGL, Algorithm 1.
    Deviation: none.
    """
    ranges = block_ranges(len(network.layers), cuts)
    if not isinstance(auxiliary_head, Sequence):
        auxiliary_head = (auxiliary_head,) * len(cuts)
    heads = (*auxiliary_head, network.head)
    blocks = tuple(
        Block(index, first, network.layers[first:end], head, loss_fn)
        for index, ((first, end), head) in enumerate(zip(ranges, heads, strict=True))
    )
    return Method("dgl", blocks, synchronous)
