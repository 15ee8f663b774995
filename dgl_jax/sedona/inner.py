"""The inner step: the weights learn from a blend of local gradients and gradients from above."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dgl_jax.block import apply_gradients
from dgl_jax.models.network import apply_module
from dgl_jax.sedona.relaxation import (
    Decisions,
    RelaxedNetwork,
    head_logits,
    head_part,
    with_head_parts,
)
from dgl_jax.types import Batch, BlockState, Params

# (network, params, batch_stats, decisions, batch, key) -> (gradients, batch_stats, losses).
InnerGradient = Callable[..., tuple[Params, Params, jax.Array]]


def blended_gradient(
    network: RelaxedNetwork,
    params: Params,
    batch_stats: Params,
    decisions: Decisions,
    batch: Batch,
    key: jax.Array,
) -> tuple[Params, Params, jax.Array]:
    """The direction in which the weights move, layer by layer.

    With h_j the output of layer j, loss_j the local loss there, and the weights (local_j,
    above_j) of the two signals:

        delta_{L-1} = d loss_{L-1} / d h_{L-1}
        delta_j = local_j * d loss_j / d h_j + above_j * (d h_{j+1} / d h_j)^T delta_{j+1}

    Layer j's parameters get (d h_j / d theta_j)^T delta_j; the heads of a place get the gradient
    of their own local loss, whatever the weights.

    The reverse pass is written out, layer by layer, so that differentiating this function again
    is exact. (Scaling a gradient on its way, by ``a * x + (1 - a) * stop_gradient(x)``, gives the
    same values and wrong second derivatives.)

    Args:
      network: the relaxed network.
      params: as in `relaxation.init_state`.
      batch_stats: likewise.
      decisions: the weights.
      batch: a training batch.
      key: random key of dropout.

    Returns:
      ``(gradients, batch_stats, losses)``: the direction, a tree like ``params``; the running
      statistics after this batch; the local losses, float [L].

    Source: SEDONA, the inner-level update.
    Deviation: the released code takes one gradient of a nested sum of losses and divides each
      layer's by the product of the weights above it, which is the same but where that is 0.
    """
    num_layers = len(network.layers)
    pullbacks, local_deltas, head_gradients, losses = [], [], [], []
    layer_stats, head_stats = [], []
    h = batch.images
    for place in range(num_layers):
        run_layer, local_loss = layer_functions(network, place, batch_stats, decisions, batch, key)
        h, pullback, stats = jax.vjp(run_layer, params["layers"][place], h, has_aux=True)
        pullbacks.append(pullback)
        layer_stats.append(stats)
        (loss, stats), (head_gradient, local_delta) = jax.value_and_grad(
            local_loss, argnums=(0, 1), has_aux=True
        )(head_part(params, place), h)
        losses.append(loss)
        head_stats.append(stats)
        head_gradients.append(head_gradient)
        local_deltas.append(local_delta)

    layer_gradients = [None] * num_layers
    delta = local_deltas[-1]
    for place in reversed(range(num_layers)):
        layer_gradients[place], from_above = pullbacks[place](delta)
        if place > 0:
            local, above = decisions.signal[place - 1].astype(from_above.dtype)
            delta = local * local_deltas[place - 1] + above * from_above
    return (
        with_head_parts(layer_gradients, head_gradients),
        with_head_parts(layer_stats, head_stats),
        jnp.stack(losses),
    )


def layer_functions(
    network: RelaxedNetwork,
    place: int,
    batch_stats: Params,
    decisions: Decisions,
    batch: Batch,
    key: jax.Array,
) -> tuple[Callable, Callable]:
    """What layer ``place`` and the heads on it compute, in training mode.

    Returns:
      ``run_layer(params, h) -> (h, batch_stats)`` and ``local_loss(params, h) -> (loss,
      batch_stats)``, whose parameters are the layer's and its `head_part`.
    """
    layer_key, head_key = jax.random.split(jax.random.fold_in(key, place))
    weights = decisions.head[place] if place < len(network.layers) - 1 else None

    def run_layer(params, h):
        stats = batch_stats["layers"][place]
        return apply_module(network.layers[place], params, stats, h, train=True, key=layer_key)

    def local_loss(params, h):
        stats = head_part(batch_stats, place)
        logits, stats = head_logits(network, place, params, stats, weights, h, head_key)
        return network.loss_fn(logits, batch.labels), stats

    return run_layer, local_loss


def mixed_loss(losses: jax.Array, decisions: Decisions) -> jax.Array:
    """The released code's scalar loss: ``loss = above_i * loss + local_i * loss_i`` from the top.

    Args:
      losses: float [L], the local losses.
      decisions: their weights.
    """
    loss = losses[-1]
    for place in reversed(range(len(losses) - 1)):
        local, above = decisions.signal[place]
        loss = above * loss + local * losses[place]
    return loss


def make_inner_step(
    network: RelaxedNetwork,
    optimizer: optax.GradientTransformation,
    inner_gradient: InnerGradient = blended_gradient,
) -> Callable[[BlockState, Decisions, Batch, jax.Array], tuple[BlockState, jax.Array]]:
    """Returns ``step(state, decisions, batch, key) -> (state, losses [L])``: one inner update."""

    def step(state: BlockState, decisions: Decisions, batch: Batch, key: jax.Array):
        gradients, batch_stats, losses = inner_gradient(
            network,
            state.params,
            state.batch_stats,
            decisions,
            batch,
            jax.random.fold_in(key, state.step),
        )
        return apply_gradients(state, gradients, batch_stats, optimizer), losses

    return step
