"""The outer step: the decision variables descend the validation loss."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
import optax

from dgl_jax.config import SearchSettings
from dgl_jax.sedona.hypergradient import Hypergradient
from dgl_jax.sedona.inner import make_inner_step
from dgl_jax.sedona.relaxation import DecisionVariables, RelaxedNetwork, relax
from dgl_jax.types import Batch, BlockState, Metrics


@flax.struct.dataclass
class OuterState:
    """The decision variables and their optimizer's state."""

    variables: DecisionVariables
    opt_state: Any


def make_outer_optimizer(settings: SearchSettings) -> optax.GradientTransformation:
    """Adam with an L2 term.

    Example:
      The first step is as long as the learning rate, whatever the gradient.

      >>> optimizer = make_outer_optimizer(SearchSettings(learning_rate=0.01, weight_decay=0.0))
      >>> state = optimizer.init(np.zeros(2))
      >>> updates, state = optimizer.update(np.array([-2.0, 5.0]), state, np.zeros(2))
      >>> print(updates.round(3))
      [ 0.01 -0.01]

    Source: SEDONA's released code: learning rate 1e-2, betas (0.5, 0.999), weight decay 1e-6.
    Deviation: none.
    """
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2),
        optax.scale_by_learning_rate(settings.learning_rate),
    )


def make_outer_step(
    network: RelaxedNetwork,
    optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    hypergradient: Hypergradient,
) -> Callable[..., tuple[OuterState, BlockState, Metrics]]:
    """Returns ``step(state, snapshot, batches, validation, key) -> (state, snapshot, metrics)``.

    One update of the decision variables from a snapshot of the weights, and then one ordinary
    inner step of that snapshot with the new variables. Of the T + 1 batches the first T are the
    outer gradient's, the last is that inner step's. A pure function: jit it as one program.

    Args:
      network: the relaxed network.
      optimizer: of the weights.
      outer_optimizer: of the decision variables.
      hypergradient: of `make_hypergradient`.

    Example:
      One step with T = 1, by `jax.eval_shape` for the shapes alone.

      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from dgl_jax.config import LossConfig
      >>> from dgl_jax.losses import make_loss_fn
      >>> from dgl_jax.sedona.hypergradient import ESTIMATORS, make_hypergradient
      >>> from dgl_jax.sedona.relaxation import init_state, init_variables
      >>> layers, heads = (nn.Dense(4), nn.Dense(4)), (nn.Dense(4),)
      >>> network = RelaxedNetwork(layers, heads, nn.Dense(4), make_loss_fn(LossConfig()))
      >>> optimizer = optax.sgd(0.1)
      >>> outer_optimizer = make_outer_optimizer(SearchSettings(learning_rate=0.05))
      >>> hypergradient = make_hypergradient(ESTIMATORS["unrolled"], network, optimizer)
      >>> step = make_outer_step(network, optimizer, outer_optimizer, hypergradient)
      >>> key, variables = jax.random.key(0), init_variables(num_layers=2, num_candidates=1)
      >>> batch = Batch(jnp.ones((2, 4)), jnp.array([0, 2]))
      >>> weights = init_state(network, optimizer, key, batch.images)
      >>> state = OuterState(variables, outer_optimizer.init(variables))
      >>> arguments = (state, weights, [batch, batch], batch, key)
      >>> state, weights, metrics = jax.eval_shape(step, *arguments)
      >>> state.variables.alpha.shape, sorted(metrics)
      ((1, 2), ['loss', 'validation_loss', 'validation_top1'])

    Source: SEDONA's released code.
    Deviation: none.
    """
    inner_step = make_inner_step(network, optimizer)

    def step(
        state: OuterState,
        snapshot: BlockState,
        batches: Sequence[Batch],
        validation: Batch,
        key: jax.Array,
    ):
        gradient, metrics = hypergradient(state.variables, snapshot, batches[:-1], validation, key)
        updates, opt_state = outer_optimizer.update(gradient, state.opt_state, state.variables)
        variables = optax.apply_updates(state.variables, updates)
        snapshot, _ = inner_step(snapshot, relax(variables), batches[-1], key)
        return OuterState(variables, opt_state), snapshot, metrics

    return step


def snapshot_steps(settings: SearchSettings) -> list[int]:
    """After which steps of pretraining the weights are kept, N in increasing order.

    ``spread``: the last step and N - 1 before it, as evenly as can be over the whole.
    ``official``: the last step and N - 1 before it, ``snapshot_interval`` apart.

    Example:
      >>> settings = SearchSettings(num_pretraining_steps=100, num_snapshots=4)
      >>> snapshot_steps(settings)
      [25, 50, 75, 100]

    Source: SEDONA: a memory of weights from all of pretraining.
    Deviation: ``official`` is what the released code does: its memory keeps the last ones, since
      the rule of which to give up is never passed on, so all are of a low learning rate.
    """
    count, num_steps = settings.num_snapshots, settings.num_pretraining_steps
    if settings.snapshots == "spread":
        return [num_steps * (index + 1) // count for index in range(count)]
    interval = settings.snapshot_interval
    return [num_steps - interval * (count - 1 - index) for index in range(count)]


def to_bytes(tree: Any) -> np.ndarray:
    """All leaves' bytes in tree order, uint8 [n], on the host."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    return np.concatenate([np.ravel(leaf).view(np.uint8) for leaf in leaves])


def from_bytes(vector: jax.Array, like: Any) -> Any:
    """The inverse of `to_bytes`, numpy arrays in the structure of the tree ``like``."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.nbytes for leaf in leaves])
    parts = np.split(jax.device_get(vector), ends[:-1])
    return structure.unflatten(
        [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves)]
    )
