"""The inner step: the weights learn from a blend of local gradients and gradients from above."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dgl_jax.block import apply_gradients
from dgl_jax.models.equal_layers import Runs, equal_layers, scan_layers, stack, unstack
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
    runs = layer_runs(network, params, batch.images)
    layers = layer_inputs(network, params, batch_stats, decisions, key)

    def forward(place, h, layer):
        run_layer, local_loss = layer_functions(network, place, layer, batch.labels)
        h, pullback, layer_stats = jax.vjp(run_layer, layer.params, h, has_aux=True)
        (loss, head_stats), (head_gradient, local_delta) = jax.value_and_grad(
            local_loss, argnums=(0, 1), has_aux=True
        )(layer.head_params, h)
        return h, (pullback, local_delta, head_gradient, layer_stats, head_stats, loss)

    def backward(place, from_above, inputs):
        (pullback, local_delta, *_), layer = inputs
        local, above = layer.signal.astype(local_delta.dtype)
        delta = local * local_delta + above * from_above
        gradient, from_above = pullback(delta)
        return from_above, gradient

    h, outputs = scan_layers(runs, forward, batch.images, stack(runs, layers))
    _, gradients = scan_layers(
        runs,
        backward,
        jnp.zeros_like(h),
        list(zip(outputs, stack(runs, layers))),
        reverse=True,
    )
    _, _, head_gradients, layer_stats, head_stats, losses = zip(*unstack(runs, outputs))
    return (
        with_head_parts(unstack(runs, gradients), head_gradients),
        with_head_parts(layer_stats, head_stats),
        jnp.stack(losses),
    )


@flax.struct.dataclass
class LayerInputs:
    """What the inner step needs at one layer.

    Attributes:
      params, batch_stats: the layer's.
      head_params, head_batch_stats: those of the heads on it, its `head_part`.
      signal: float [2], the weights of (local, from above); (1, 0) for the last layer.
      head_weights: float [M], those of the candidates; None for the last layer.
      key: random key of dropout.
    """

    params: Params
    batch_stats: Params
    head_params: Params
    head_batch_stats: Params
    signal: jax.Array
    head_weights: jax.Array | None
    key: jax.Array


def layer_inputs(
    network: RelaxedNetwork,
    params: Params,
    batch_stats: Params,
    decisions: Decisions,
    key: jax.Array,
) -> list[LayerInputs]:
    """One `LayerInputs` a layer, from what `blended_gradient` is given."""
    last = len(network.layers) - 1
    return [
        LayerInputs(
            params["layers"][place],
            batch_stats["layers"][place],
            head_part(params, place),
            head_part(batch_stats, place),
            decisions.signal[place] if place < last else jnp.array([1.0, 0.0]),
            decisions.head[place] if place < last else None,
            jax.random.fold_in(key, place),
        )
        for place in range(last + 1)
    ]


def layer_functions(
    network: RelaxedNetwork, place: int, layer: LayerInputs, labels: jax.Array
) -> tuple[Callable, Callable]:
    """What layer ``place`` and the heads on it compute, in training mode.

    Returns:
      ``run_layer(params, h) -> (h, batch_stats)`` and ``local_loss(head_params, h) -> (loss,
      batch_stats)``.
    """
    layer_key, head_key = jax.random.split(layer.key)

    def run_layer(params, h):
        module = network.layers[place]
        return apply_module(module, params, layer.batch_stats, h, train=True, key=layer_key)

    def local_loss(head_params, h):
        logits, stats = head_logits(
            network, place, head_params, layer.head_batch_stats, layer.head_weights, h, head_key
        )
        return network.loss_fn(logits, labels), stats

    return run_layer, local_loss


def layer_runs(network: RelaxedNetwork, params: Params, x: jax.Array) -> Runs:
    """`equal_layers`, whose heads are equal too. The last layer, whose head is another, is alone."""
    last = len(network.layers) - 1
    heads = [head_part(params, place) for place in range(last)]
    return [*equal_layers(network.layers[:last], x, heads), (last, last + 1)]


def mixed_loss(losses: jax.Array, decisions: Decisions) -> jax.Array:
    """The released code's scalar loss: ``loss = above_i * loss + local_i * loss_i`` from the top.

    Args:
      losses: float [L], the local losses.
      decisions: their weights.

    Example:
      Three layers, each signal half: (4 + 2) / 2 = 3, and (3 + 1) / 2 = 2.

      >>> decisions = Decisions(signal=jnp.full((2, 2), 0.5), head=jnp.ones((2, 1)))
      >>> float(mixed_loss(jnp.array([1.0, 2.0, 4.0]), decisions))
      2.0
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
