"""One block: its layers, its head, its local loss; how it starts, learns and is evaluated.

Pure functions that know no device. This is the only file that stops a gradient: what a block
hands on carries none back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgl_jax.losses import LossFn
from dgl_jax.models.network import apply_module, init_module
from dgl_jax.types import BlockState, Params, StepOutput

# The head of a block is keyed apart from its layers. Keys go by the layer's place in the
# network, not by the block, so that every cut of a network starts from the same weights.
_HEAD_KEY = 1 << 20

BlockStep = Callable[[BlockState, jax.Array, jax.Array, jax.Array], StepOutput]


@dataclasses.dataclass(frozen=True)
class Block:
    """The layers between two cuts, the head on top of them and the loss of that head.

    Attributes:
      index: 0-based, from the input.
      first_layer: the place in the network of the first of `layers`.
      layers: flax modules.
      head: the auxiliary head, or for the last block the network's own.
      loss_fn: maps the head's output and the labels to a scalar.
    """

    index: int
    first_layer: int
    layers: tuple[Any, ...]
    head: Any
    loss_fn: LossFn


def init_block_state(
    block: Block, optimizer: optax.GradientTransformation, key: jax.Array, x: jax.Array
) -> BlockState:
    """Initialises a block.

    Args:
      block: the block.
      optimizer: the block's own optax transformation.
      key: the run's random key, the same for all blocks.
      x: an example input, [B, ...]; only its shape and dtype matter.

    Returns:
      The state before the first step.
    """
    layer_params, layer_stats = [], []
    for place, layer in enumerate(block.layers, start=block.first_layer):
        params, stats = init_module(layer, jax.random.fold_in(key, place), x)
        x, _ = apply_module(layer, params, stats, x, train=False)
        layer_params.append(params)
        layer_stats.append(stats)
    last_layer = block.first_layer + len(block.layers) - 1
    head_key = jax.random.fold_in(jax.random.fold_in(key, _HEAD_KEY), last_layer)
    head_params, head_stats = init_module(block.head, head_key, x)
    params = {"layers": tuple(layer_params), "head": head_params}
    return BlockState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats={"layers": tuple(layer_stats), "head": head_stats},
        opt_state=optimizer.init(params),
    )


def forward(
    block: Block,
    params: Params,
    batch_stats: Params,
    x: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Params]:
    """Runs a block's layers and its head.

    Args:
      block: the block.
      params: as in `BlockState`.
      batch_stats: as in `BlockState`.
      x: the block's input, [B, ...].
      train: whether BatchNorm uses the batch's statistics and dropout drops.
      key: random key of dropout, needed in training only.

    Returns:
      ``(activations, logits, batch_stats)``: the last layer's output, the head's, and the
      running statistics after this batch.
    """
    layer_stats = []
    for offset, layer in enumerate(block.layers):
        layer_key = None if key is None else jax.random.fold_in(key, offset)
        x, stats = apply_module(
            layer,
            params["layers"][offset],
            batch_stats["layers"][offset],
            x,
            train=train,
            key=layer_key,
        )
        layer_stats.append(stats)
    head_key = None if key is None else jax.random.fold_in(key, _HEAD_KEY)
    logits, head_stats = apply_module(
        block.head, params["head"], batch_stats["head"], x, train=train, key=head_key
    )
    return x, logits, {"layers": tuple(layer_stats), "head": head_stats}


def make_block_step(block: Block, optimizer: optax.GradientTransformation) -> BlockStep:
    """Returns the update of one block (DGL, Algorithm 1, lines 4 to 6).

    The returned ``step(state, x, labels, key) -> StepOutput`` is pure; jit it with the state
    donated. Layers and head learn jointly from the block's local loss; the activations handed
    on come from the same forward pass, that is from the parameters before the update.

    Args:
      block: the block.
      optimizer: the transformation whose state `init_block_state` made.

    Returns:
      ``step``, whose arguments are the block's state, its input [B, ...], the labels int32
      [B], and the run's random key.

    Source: DGL, Algorithm 1.
    Deviation: none.
    """

    def step(state: BlockState, x: jax.Array, labels: jax.Array, key: jax.Array) -> StepOutput:
        step_key = jax.random.fold_in(jax.random.fold_in(key, block.index), state.step)

        def local_loss(params):
            activations, logits, batch_stats = forward(
                block, params, state.batch_stats, x, train=True, key=step_key
            )
            return block.loss_fn(logits, labels), (activations, logits, batch_stats)

        (loss, (activations, logits, batch_stats)), gradients = jax.value_and_grad(
            local_loss, has_aux=True
        )(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        next_state = BlockState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        top1 = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        metrics = {"loss": loss, "top1": top1}
        return StepOutput(next_state, jax.lax.stop_gradient(activations), metrics)

    return step


def make_block_eval(
    block: Block,
) -> Callable[[Params, Params, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns ``evaluate(params, batch_stats, x) -> (activations, logits)``, in evaluation mode."""

    def evaluate(params: Params, batch_stats: Params, x: jax.Array):
        activations, logits, _ = forward(block, params, batch_stats, x, train=False)
        return activations, logits

    return evaluate
