"""End-to-end backpropagation: the baseline, in the same harness.

One block holds every layer and the network's own head, so its local loss is the network's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dgl_jax.losses import LossFn
from dgl_jax.methods import dgl
from dgl_jax.methods.method import Method
from dgl_jax.models.network import Network


def make_method(
    network: Network, cuts: Sequence[int], auxiliary_head: Any, loss_fn: LossFn
) -> Method:
    """One block of all layers; ``cuts`` and ``auxiliary_head`` are not used."""
    del cuts
    return dataclasses.replace(
        dgl.make_method(network, (), auxiliary_head, loss_fn), name="backprop"
    )
