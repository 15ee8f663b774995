"""What a block costs before it runs: FLOPs, parameters, bytes handed on; and memory after.

FLOPs are those of the forward pass, as `flops` counts them, and so are they on every host.
"""

import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.block import Block, make_block_feed
from dgl_jax.flops import flops
from dgl_jax.models.network import Network, apply_module, init_module, output_shape
from dgl_jax.pipeline import block_program, for_devices
from dgl_jax.placement import BlockPlacement
from dgl_jax.transfer import fetch, is_local, move, place, stand_in
from dgl_jax.types import Batch, BlockState


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """The cost of one block, for one example.

    Attributes:
      layers_flops: the forward pass of its layers.
      head_flops: the forward pass of its head.
      layers_parameters: the number of its layers' parameters.
      head_parameters: of its head's.
      activation_bytes: what it hands on to the next block.
    """

    layers_flops: float
    head_flops: float
    layers_parameters: int
    head_parameters: int
    activation_bytes: int


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def block_costs(blocks: Sequence[Block], image_shape: Sequence[int]) -> list[BlockCost]:
    """The cost of every block, without running anything.

    Args:
      blocks: of one network, in order.
      image_shape: the shape of one example.

    Example:
      >>> import flax.linen as nn
      >>> block = Block(0, 0, layers=(nn.Dense(5),), head=nn.Dense(2), loss_fn=None)
      >>> (cost,) = block_costs([block], image_shape=(3,))
      >>> cost.layers_parameters, cost.head_parameters, cost.activation_bytes
      (20, 12, 20)
      >>> cost.layers_flops  # 3 x 5 multiply-adds, and the bias.
      35.0
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    costs = []
    for block in blocks:
        layers_flops, layers_parameters = 0.0, 0
        for layer in block.layers:
            layer_flops, parameters, x = _module_cost(layer, x)
            layers_flops += layer_flops
            layers_parameters += parameters
        head_flops, head_parameters = 0.0, 0
        if block.head is not None:
            head_flops, head_parameters, _ = _module_cost(block.head, x)
        activation_bytes = math.prod(x.shape) * x.dtype.itemsize
        costs.append(
            BlockCost(
                layers_flops, head_flops, layers_parameters, head_parameters, activation_bytes
            )
        )
    return costs


def aux_flops_ratios(costs: Sequence[BlockCost]) -> list[float]:
    """FLOPs of each auxiliary head relative to the largest block's layers.

    The last block has no auxiliary head: 0.

    Source: DGL, Table 1, "flop count of the aux net relative to the largest module".
    """
    largest = max(cost.layers_flops for cost in costs)
    return [cost.head_flops / largest for cost in costs[:-1]] + [0.0]


def layer_and_head_costs(
    network: Network, auxiliary_head: Any, image_shape: Sequence[int], batch_size: int, kind: str
) -> tuple[list[float], list[float]]:
    """What `partition.balanced_cuts` weighs: each layer, and the head that a cut would need.

    Args:
      network: layers and head.
      auxiliary_head: the head of a block that ends before the last layer, None if it has none;
        or a sequence of L - 1, one for each layer where a block may end.
      image_shape: the shape of one example.
      batch_size: of the measurement; has no effect on ``flops``.
      kind: ``flops`` (forward, one example), ``time`` (seconds of a training pass, forward
        and backward of one batch, measured on the first device) or ``memory`` (bytes that a
        training pass keeps for its backward pass, of one example).

    Returns:
      Two lists of L costs.
    """
    if kind == "flops":
        shape = (1, *image_shape)

        def measure(module, x):
            return _module_cost(module, x)[0]
    elif kind == "memory":
        shape, measure = (1, *image_shape), _kept_bytes
    else:
        shape = (batch_size, *image_shape)
        measure = _training_seconds

    if not isinstance(auxiliary_head, Sequence):
        auxiliary_head = (auxiliary_head,) * (len(network.layers) - 1)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    layer_costs, head_costs = [], []
    for layer, head in zip(network.layers, (*auxiliary_head, network.head), strict=True):
        layer_costs.append(measure(layer, x))
        x = output_shape(layer, x)
        head_costs.append(0.0 if head is None else measure(head, x))
    return layer_costs, head_costs


def peak_memory_bytes() -> int:
    """The most memory in use so far: of all local accelerators, or of this process on CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return sum(stat["peak_bytes_in_use"] for stat in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def block_step_seconds(
    blocks: Sequence[Block],
    works: Sequence[Callable[..., Any]],
    states: Sequence[BlockState],
    batch: Batch,
    placements: Sequence[BlockPlacement],
    repeats: int = 5,
) -> list[float] | None:
    """The time of each block's work of one step, alone on its own devices.

    Args:
      blocks: of one network, in order.
      works: ``work(state, x, labels, key)`` of each block, `Method.make_block_work`.
      states: the blocks' states.
      batch: a training batch.
      placements: one a block.
      repeats: how often each is timed, after a first run that compiles.

    Returns:
      The median seconds, one a block; in a run of several processes, which must all call it,
      None in all but the first.
    """
    seconds, x = [], batch.images
    for block, work, state, placement in zip(blocks, works, states, placements, strict=True):
        x, labels = move(x, placement.batch), place(batch.labels, placement.batch)
        key = place(jax.random.key(0), placement.state)
        if is_local(placement.state):
            run = jax.jit(for_devices(work, placement))
            median = _median_seconds(lambda: run(state, x, labels, key), repeats)  # noqa: B023
            # On a device of the block, to be fetched from there.
            seconds.append(place(np.float32(median), placement.state))
        else:
            seconds.append(stand_in((), np.float32, placement.state))
        if block is not blocks[-1]:
            x = block_program(make_block_feed(block), placement, placement.batch)(state, x)
    seconds = fetch(seconds)
    return None if seconds is None else [float(value) for value in seconds]


def _variables(module: Any, x: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    return jax.eval_shape(
        lambda: init_module(module, jax.random.key(0), jnp.zeros(x.shape, x.dtype))
    )


def _module_cost(module: Any, x: jax.ShapeDtypeStruct) -> tuple[float, int, jax.ShapeDtypeStruct]:
    """``(flops, parameters, output shape)`` of a module's forward pass."""
    params, batch_stats = _variables(module, x)

    def run(params, batch_stats, x):
        return apply_module(module, params, batch_stats, x, train=False)[0]

    return (
        flops(run, params, batch_stats, x),
        count_parameters(params),
        jax.eval_shape(run, params, batch_stats, x),
    )


def _kept_bytes(module: Any, x: jax.ShapeDtypeStruct) -> float:
    """What the backward pass of an example needs of its forward pass, as JAX writes it down."""
    params, batch_stats = _variables(module, x)

    def pullback(params, batch_stats, x):
        run = lambda params, x: apply_module(
            module, params, batch_stats, x, train=True, key=jax.random.key(0)
        )
        return jax.vjp(run, params, x, has_aux=True)[1]

    def kept(batch_size):
        batch = jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
        leaves = jax.tree.leaves(jax.eval_shape(pullback, params, batch_stats, batch))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return float(kept(2) - kept(1))  # What does not grow with the batch is not the example's.


def _training_seconds(module: Any, x: jax.ShapeDtypeStruct, repeats: int = 5) -> float:
    """The median time of a forward and a backward pass."""
    key = jax.random.key(0)
    x = jax.random.normal(key, x.shape, x.dtype)
    params, batch_stats = jax.jit(lambda: init_module(module, key, x))()

    @jax.jit
    def run(params, x):
        def output_sum(params, x):
            y, _ = apply_module(module, params, batch_stats, x, train=True, key=key)
            return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(y))

        return jax.grad(output_sum, argnums=(0, 1))(params, x)

    return _median_seconds(lambda: run(params, x), repeats)


def _median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """After a first run that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
