"""Features Replay (Huo et al., NeurIPS 2018): delayed gradients that keep a block's input only.

When the gradient of an earlier batch comes, the block runs that batch's forward pass again, on
the input it had then and with the weights it has now, and backpropagates through that. Blocks,
schedule and delays are DDG's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from dgl_jax import delayed
from dgl_jax.block import Block, forward_layers
from dgl_jax.config import Config
from dgl_jax.delayed import DelayedRule
from dgl_jax.methods import ddg
from dgl_jax.pipeline import Runner
from dgl_jax.types import BlockState, Params


def play(
    block: Block, params: Params, batch_stats: Params, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params, Any]:
    """The forward pass, in training mode; keeps the input. The running statistics stand still."""
    activations, _ = forward_layers(
        block, params["layers"], batch_stats["layers"], x, train=True, key=key
    )
    return activations, batch_stats, x


def replay(
    block: Block, state: BlockState, x: jax.Array, gradient: jax.Array, key: jax.Array
) -> tuple[Params, jax.Array, Params]:
    """The same pass again with the present weights and the same dropout masks, and its gradient.

    Example:
      One linear layer, two examples: the bias's gradient is the sum of those at the outputs.

      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from dgl_jax.block import init_block_state
      >>> block = Block(0, 0, layers=(nn.Dense(3),), head=None, loss_fn=None)
      >>> key, x = jax.random.key(0), jnp.ones((2, 4))
      >>> state = init_block_state(block, optax.sgd(0.1), key, x)
      >>> activations, _, kept = play(block, state.params, state.batch_stats, x, key)
      >>> gradients, input_gradient, _ = replay(block, state, kept, jnp.ones((2, 3)), key)
      >>> print(activations.shape, input_gradient.shape, gradients["layers"][0]["bias"])
      (2, 3) (2, 4) [2. 2. 2.]

    Source: Features Replay, Algorithm 1.
    Deviation: none from the paper. The public code moves BatchNorm's running statistics twice
      a batch; here the replay alone does. It also trains the first block with twice the
      learning rate, which the paper does not say; left out here.
    """

    def layers(params, x):
        return forward_layers(
            block, params["layers"], state.batch_stats["layers"], x, train=True, key=key
        )

    _, pullback, layer_stats = jax.vjp(layers, state.params, x, has_aux=True)
    gradients, input_gradient = pullback(gradient)
    return gradients, input_gradient, state.batch_stats | {"layers": layer_stats}


RULE = DelayedRule(play, replay)


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[Any],
) -> Runner:
    """The runner of delayed gradients with this method's rule."""
    return delayed.make_runner(config, blocks, optimizer, key, placements, RULE)


def make_block_work(
    config: Config, block: Block, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """A forward pass, its replay and the backward pass."""
    del config
    return delayed.make_block_work(block, optimizer, RULE)


METHOD = dataclasses.replace(ddg.METHOD, make_runner=make_runner, make_block_work=make_block_work)
