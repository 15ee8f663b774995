"""Decoupled parallel backprop with delayed gradients, DDG (Huo et al., ICML 2018).

One loss, that of the whole network. Its gradient comes down one block a step, so block k
learns in step t from batch s = t - D_k, where D_k = K-1-k. With stale weights the gradient is
exactly backprop's at the weights of step s; only its use is late:

    w_k(t + 1) = w_k(t) - learning_rate * d f(w(s); batch s) / d w_k
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from dgl_jax import delayed, schedule
from dgl_jax.block import Block, forward_layers
from dgl_jax.config import Config
from dgl_jax.delayed import DelayedRule
from dgl_jax.errors import UserError
from dgl_jax.losses import LossFn
from dgl_jax.methods import dgl
from dgl_jax.methods.method import Method, both_ways_bytes
from dgl_jax.models.network import Network, apply_module
from dgl_jax.pipeline import Runner
from dgl_jax.schedule import Schedule
from dgl_jax.types import BlockState, Params


def forward_stale(
    block: Block, params: Params, batch_stats: Params, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params, Any]:
    """Keeps the pullback: all activations, and the weights they were computed with."""

    def layers(params, x):
        return forward_layers(
            block, params["layers"], batch_stats["layers"], x, train=True, key=key
        )

    activations, pullback, layer_stats = jax.vjp(layers, params, x, has_aux=True)
    return activations, batch_stats | {"layers": layer_stats}, pullback


def backward_stale(
    block: Block, state: BlockState, pullback: Any, gradient: jax.Array, key: jax.Array
) -> tuple[Params, jax.Array, Params]:
    """The gradient at the weights of the forward pass, however the weights are now.

    Source: DDG, Algorithm 1.
    Deviation: none.
    """
    del block, key
    gradients, input_gradient = pullback(gradient)
    return gradients, input_gradient, state.batch_stats


def forward_current(
    block: Block, params: Params, batch_stats: Params, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params, Any]:
    """Keeps the input of each layer, and no weights."""
    inputs, layer_stats = [], []
    for offset in range(len(block.layers)):
        inputs.append(x)
        x, stats = _apply_layer(block, offset, params, batch_stats, x, key)
        layer_stats.append(stats)
    return x, batch_stats | {"layers": tuple(layer_stats)}, tuple(inputs)


def backward_current(
    block: Block,
    state: BlockState,
    inputs: tuple[jax.Array, ...],
    gradient: jax.Array,
    key: jax.Array,
) -> tuple[Params, jax.Array, Params]:
    """From the last layer to the first: old activations with the weights as they are now.

    Source: the public code of DDG, whose modules change their weights in place.
    Deviation: each layer is linearised anew at the input that it had then, so activations
      within a layer (a residual layer's inner ones, BatchNorm's statistics) are of today's
      weights; in the public code they are old ones too. This costs a second forward pass.
    """
    layer_gradients = []
    for offset in reversed(range(len(block.layers))):

        def layer(params, x, offset=offset):
            return _apply_layer(block, offset, params, state.batch_stats, x, key)[0]

        _, pullback = jax.vjp(layer, state.params, inputs[offset])
        gradients, gradient = pullback(gradient)
        layer_gradients.append(gradients["layers"][offset])
    gradients = {"layers": tuple(reversed(layer_gradients)), "head": {}}
    return gradients, gradient, state.batch_stats


STALE = DelayedRule(forward_stale, backward_stale)
CURRENT = DelayedRule(forward_current, backward_current)
RULES = {"stale": STALE, "current": CURRENT}


def make_blocks(
    network: Network,
    cuts: Sequence[int],
    auxiliary_head: Any,
    loss_fn: LossFn | Sequence[LossFn],
) -> tuple[Block, ...]:
    """Blocks without heads but the last, which has the network's; ``auxiliary_head`` is unused.

    Example:
      >>> import flax.linen as nn
      >>> network = Network("mine", [nn.Dense(8), nn.Dense(8), nn.Dense(8)], head=nn.Dense(10))
      >>> blocks = make_blocks(network, (0, 1), auxiliary_head=None, loss_fn=None)
      >>> [(block.head is None, block.classifies) for block in blocks]
      [(True, False), (True, False), (False, True)]
    """
    del auxiliary_head
    *others, last = dgl.make_blocks(network, cuts, None, loss_fn)
    others = [dataclasses.replace(block, loss_fn=None, classifies=False) for block in others]
    return (*others, last)


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> Schedule:
    """Forward of one batch, backward of an earlier one; see `schedule.delayed`.

    Example:
      In step 5, blocks 0 and 1 of three learn from batches 3 and 4.

      >>> schedule = make_schedule(Config(), num_blocks=3, num_updates=10, steps_per_epoch=10)
      >>> step = next(schedule.tasks(5))
      >>> [(task.block, task.batch) for task in step if task.operation == "backward"]
      [(0, 3), (1, 4)]

    Raises:
      UserError: if the run ends before the first block has had a gradient.
    """
    del steps_per_epoch
    if num_blocks - 1 >= num_updates:
        raise UserError(
            f"config.method.name={config.method.name} with {num_blocks} blocks has a delay of "
            f"{num_blocks - 1} steps, a delay longer than the run of {num_updates}; train longer "
            "or cut into fewer blocks"
        )
    return schedule.delayed(num_blocks, num_updates)


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[Any],
) -> Runner:
    """The runner of delayed gradients with the rule that ``config.method.weights`` asks for.

    BatchNorm's running statistics move once a batch, in the forward pass.
    """
    rule = RULES[config.method.weights]
    return delayed.make_runner(config, blocks, optimizer, key, placements, rule)


def _apply_layer(
    block: Block, offset: int, params: Params, batch_stats: Params, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params]:
    return apply_module(
        block.layers[offset],
        params["layers"][offset],
        batch_stats["layers"][offset],
        x,
        train=True,
        key=jax.random.fold_in(key, offset),
    )


def make_block_work(
    config: Config, block: Block, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """A forward and a backward pass, by the rule that ``config.method.weights`` asks for."""
    return delayed.make_block_work(block, optimizer, RULES[config.method.weights])


METHOD = Method(make_blocks, make_schedule, make_runner, make_block_work, both_ways_bytes)
