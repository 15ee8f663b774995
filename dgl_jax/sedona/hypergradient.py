"""The gradient of the validation loss with respect to the decision variables.

The weights after T inner steps depend on the decision variables, and so does the validation
loss at these weights. An `Estimator` says what of this dependence is kept.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dgl_jax.models.equal_layers import scan_layers, stack, unstack
from dgl_jax.sedona.inner import (
    InnerGradient,
    blended_gradient,
    layer_functions,
    layer_inputs,
    layer_runs,
    make_inner_step,
    mixed_loss,
)
from dgl_jax.sedona.relaxation import (
    Decisions,
    DecisionVariables,
    RelaxedNetwork,
    eval_logits,
    head_part,
    relax,
    with_head_parts,
)
from dgl_jax.types import Batch, BlockState, Metrics, Params

# (network, state after T steps, losses [T, L], decisions, validation batch) -> scalar.
Objective = Callable[..., jax.Array]
# (variables, state, T batches, validation batch, key) -> (gradient, metrics).
Hypergradient = Callable[..., tuple[DecisionVariables, Metrics]]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A way to take the outer gradient.

    Attributes:
      inner_gradient: `blended_gradient`, or a function of the same value that is differentiated
        otherwise.
      objective: what the decision variables descend.
    """

    inner_gradient: InnerGradient
    objective: Objective


def make_hypergradient(
    estimator: Estimator,
    network: RelaxedNetwork,
    optimizer: optax.GradientTransformation,
    *,
    remat: bool = True,
) -> Hypergradient:
    """Returns ``hypergradient(variables, state, batches, validation, key)``, a pure function.

    Its arguments: the decision variables; the state of the weights, which is not changed; the T
    training batches, a sequence; a validation batch; the run's random key. It returns the
    gradient, a tree like the variables, and metrics: ``validation_loss``, ``validation_top1``
    after the T steps, and ``loss``, the mean over the T steps of the last layer's.

    Args:
      estimator: one of `ESTIMATORS`, or a user's own.
      network: the relaxed network.
      optimizer: the inner optimizer; any optax transformation that can be differentiated.
      remat: whether each inner step is computed again on the way back. Without, all T steps'
        activations are held at once.

    Example:
      Two layers, one place for a cut, one candidate head; the shapes alone, by `jax.eval_shape`.

      >>> import flax.linen as nn
      >>> from dgl_jax.config import LossConfig
      >>> from dgl_jax.losses import make_loss_fn
      >>> from dgl_jax.sedona.relaxation import init_state, init_variables
      >>> layers, heads = (nn.Dense(4), nn.Dense(4)), (nn.Dense(4),)
      >>> network = RelaxedNetwork(layers, heads, nn.Dense(4), make_loss_fn(LossConfig()))
      >>> optimizer, key = optax.sgd(0.1), jax.random.key(0)
      >>> hypergradient = make_hypergradient(ESTIMATORS["unrolled"], network, optimizer)
      >>> batch, variables = Batch(jnp.ones((2, 4)), jnp.array([0, 2])), init_variables(2, 1)
      >>> state = init_state(network, optimizer, key, batch.images)
      >>> arguments = (variables, state, [batch, batch], batch, key)
      >>> gradient, metrics = jax.eval_shape(hypergradient, *arguments)
      >>> gradient.alpha.shape, gradient.beta.shape, sorted(metrics)
      ((1, 2), (1, 1), ['loss', 'validation_loss', 'validation_top1'])

    Source: SEDONA: T steps of SGD with momentum, then the gradient of the validation loss.
    Deviation: none for `unrolled`.
    """
    inner_step = make_inner_step(network, optimizer, estimator.inner_gradient)

    def hypergradient(variables, state, batches, validation, key):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

        def objective(variables):
            decisions = relax(variables)

            def one_step(state, batch):
                return inner_step(state, decisions, batch, key)

            if remat:
                # In a scan nothing can be merged across the boundary anyway.
                one_step = jax.checkpoint(one_step, prevent_cse=False)
            final, losses = jax.lax.scan(one_step, state, stacked)
            value, metrics = validate(network, final, validation)
            if estimator.objective is not validation_loss:
                value = estimator.objective(network, final, losses, decisions, validation)
            return value, metrics | {"loss": jnp.mean(losses[:, -1])}

        return jax.grad(objective, has_aux=True)(variables)

    return hypergradient


def validate(
    network: RelaxedNetwork, state: BlockState, validation: Batch
) -> tuple[jax.Array, Metrics]:
    """The loss of the network's own head on a batch, in evaluation mode; and metrics."""
    logits = eval_logits(network, state.params, state.batch_stats, validation.images)
    loss = network.loss_fn(logits, validation.labels)
    top1 = jnp.mean(jnp.argmax(logits, axis=-1) == validation.labels)
    return loss, {"validation_loss": loss, "validation_top1": top1}


def validation_loss(network, state, losses, decisions, validation) -> jax.Array:
    """The objective of the paper."""
    del losses, decisions
    return validate(network, state, validation)[0]


def last_training_loss(network, state, losses, decisions, validation) -> jax.Array:
    """The released code's objective: the mixed training loss of the last inner step."""
    del network, state, validation
    return mixed_loss(losses[-1], decisions)


def first_order_gradient(
    network: RelaxedNetwork,
    params: Params,
    batch_stats: Params,
    decisions: Decisions,
    batch: Batch,
    key: jax.Array,
) -> tuple[Params, Params, jax.Array]:
    """`blended_gradient` as if it did not depend on the weights, but on the decisions alone.

    So the effect of an inner step on the gradients of later ones is dropped, and with it all
    second derivatives with respect to weights. For T = 1 nothing is.
    """
    params, batch_stats = jax.lax.stop_gradient((params, batch_stats))
    return blended_gradient(network, params, batch_stats, decisions, batch, key)


def finite_difference_gradient(displacement: float = 0.01) -> InnerGradient:
    """Makes `blended_gradient`, differentiated by a central difference, not a second derivative.

    Going backwards, one needs the gradient of <v, g(theta, decisions)> for a direction v in
    weight space, g being the blended gradient. That inner product is the derivative along v of
    `_displaced_losses`, so its gradient is that of a difference of two losses: first derivatives
    only. On a smooth network the error falls with the square of the displacement. It is
    not reliable on networks with ReLU, where a unit that is switched counts in the difference and
    not in the derivative: on small networks and batches it was off by 13 % to many times the
    gradient, signs included; a smaller displacement helped some and not others.

    Args:
      displacement: how far the weights are moved along v, in the norm of all weights.

    Source: DARTS (Liu, Simonyan, Yang 2019), section 2.3, which has one step and a gradient of
      one loss; the displacement is theirs.
    Deviation: T steps, and a blend of gradients, which is not the gradient of any loss.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def inner_gradient(network, params, batch_stats, decisions, batch, key):
        return blended_gradient(network, params, batch_stats, decisions, batch, key)

    def forward(network, *arguments):
        return blended_gradient(network, *arguments), arguments

    def backward(network, residuals, cotangents):
        params, batch_stats, decisions, batch, key = residuals
        direction, stats_cotangent, losses_cotangent = cotangents
        norm = optax.tree.norm(direction)
        step = displacement / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny ** 0.5)

        def along_direction(params, batch_stats, decisions):
            (plus, minus), stats, losses = _displaced_losses(
                network, params, batch_stats, decisions, batch, key, direction, step
            )
            return (
                (plus - minus) / (2 * step)
                + optax.tree.vdot(stats_cotangent, stats)
                + jnp.vdot(losses_cotangent, losses)
            )

        gradients = jax.grad(along_direction, argnums=(0, 1, 2))(params, batch_stats, decisions)
        return *gradients, None, None

    inner_gradient.defvjp(forward, backward)
    return inner_gradient


def _displaced_losses(
    network, params, batch_stats, decisions, batch, key, direction, displacement
) -> tuple[jax.Array, Params, jax.Array]:
    """Two sums of losses, of weights displaced by plus and minus a step along a direction.

    The blended gradient weighs what goes down from layer to layer; its inner product with a
    direction is found by weighing what goes up: of the change of h_{j-1} only the share above_j-1
    reaches layer j, and of the loss at j only the share local_j counts. Each head's own
    displacement counts whole, on activations that are not displaced.

    Returns:
      The two sums, and as `blended_gradient` the statistics and losses without displacement.
    """
    runs = layer_runs(network, params, batch.images)
    layers = layer_inputs(network, params, batch_stats, decisions, key)
    directions = [
        (direction["layers"][place], head_part(direction, place)) for place in range(len(layers))
    ]

    def forward(place, carry, inputs):
        layer, (direction, head_direction) = inputs
        run_layer, local_loss = layer_functions(network, place, layer, batch.labels)
        h, *displaced = carry
        h, layer_stats = run_layer(layer.params, h)
        loss, head_stats = local_loss(layer.head_params, h)
        local, above = layer.signal
        next_displaced, sums = [], []
        for sign, g in zip((1, -1), displaced):
            step = functools.partial(_displace, displacement=sign * displacement)
            g, _ = run_layer(step(layer.params, direction), g)
            sums.append(
                local * local_loss(layer.head_params, g)[0]
                + local_loss(step(layer.head_params, head_direction), h)[0]
            )
            next_displaced.append(h + above.astype(h.dtype) * (g - h))
        return (h, *next_displaced), (jnp.stack(sums), layer_stats, head_stats, loss)

    x = batch.images
    _, outputs = scan_layers(runs, forward, (x, x, x), stack(runs, list(zip(layers, directions))))
    sums, layer_stats, head_stats, losses = zip(*unstack(runs, outputs))
    return sum(sums), with_head_parts(layer_stats, head_stats), jnp.stack(losses)


def _displace(params: Params, direction: Params, displacement: jax.Array) -> Params:
    return jax.tree.map(lambda p, d: p + (displacement * d).astype(p.dtype), params, direction)


ESTIMATORS = {
    "unrolled": Estimator(blended_gradient, validation_loss),
    "first_order": Estimator(first_order_gradient, validation_loss),
    "finite_difference": Estimator(finite_difference_gradient(), validation_loss),
    "official": Estimator(blended_gradient, last_training_loss),
}
