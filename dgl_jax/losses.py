"""Local losses: what a block minimises, a function of its head's output and the labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgl_jax.config import LossConfig

# What a head returns: logits, or a dictionary with "logits" (where it has any) and more.
HeadOutput = jax.Array | dict[str, jax.Array]
LossFn = Callable[[HeadOutput, jax.Array], jax.Array]


def logits_of(output: HeadOutput) -> jax.Array:
    """The logits in a head's output."""
    return output["logits"] if isinstance(output, dict) else output


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example, computed in float32 or wider.

    Args:
      logits: float [B, num_classes].
      labels: int32 [B].
      label_smoothing: the share of the target that is spread over all classes.

    Returns:
      float [B].

    Source: DGL, Problem (P_j); SEDONA for the smoothing.
    Deviation: SEDONA's code spreads the share over the other classes only.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probabilities = jax.nn.log_softmax(logits)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    return -jnp.sum(targets * log_probabilities, axis=-1)


def make_loss_fn(config: LossConfig) -> LossFn:
    """Returns ``loss_fn(head_output, labels) -> scalar``, the mean over the batch."""

    def loss_fn(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(cross_entropy(logits, labels, config.label_smoothing))

    return loss_fn
