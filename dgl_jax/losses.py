"""Local losses: what a block minimises, a function of its head's output and the labels."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgl_jax.config import LossConfig
from dgl_jax.errors import UserError

# What a head returns: logits, or a dictionary with "logits" and "similarity" (what
# `similarity_loss` compares), or with one of them.
HeadOutput = jax.Array | dict[str, jax.Array]
LossFn = Callable[[HeadOutput, jax.Array], jax.Array]

# The losses that compare the examples of a batch.
SIMILARITY_LOSSES = ("sim", "predsim")


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


def similarity_matrix(features: jax.Array) -> jax.Array:
    """How alike the examples of a batch are: the cosine of every two, computed in float32 or wider.

    A map of more than three channels is first reduced to each channel's standard deviation over
    space. Each example is centred: its own mean over features is taken off.

    Where all of an example's features are equal its similarities are 0, and where a channel does
    not vary or an example has no direction its gradient is 0, so that both are always finite.

    Args:
      features: float [B, H, W, C], [B, T, C] or [B, F].

    Returns:
      float [B, B], within [-1, 1].

    Source: PredSim (Nokland and Eidnes, ICML 2019), the adjusted cosine similarity matrix; the
      standard deviation as in their code.
    Deviation: their gradient is not a number where a standard deviation or a norm is exactly 0.
    """
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    batch, *space, channels = x.shape
    if math.prod(space) > 1 and channels > 3:
        x = _safe_sqrt(jnp.var(x.reshape(batch, -1, channels), axis=1, ddof=1))
    x = x.reshape(batch, -1)
    x = x - jnp.mean(x, axis=1, keepdims=True)
    norm = _safe_sqrt(jnp.sum(x**2, axis=1, keepdims=True))
    x = jnp.where(norm > 0, x / (norm + 1e-8), 0)
    return jnp.clip(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), -1, 1)


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 instead of infinity at 0."""
    is_positive = x > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1)), 0)


def similarity_loss(features: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Similarity matching: examples are to be as alike as their labels are.

    The target is the similarity matrix of the one-hot labels, centred like the features: 1 for
    two examples of one class, -1 / (num_classes - 1) for two of different classes.

    It looks at a whole batch at once. Where a block splits its batch over devices, the matrix
    is still that of the whole batch, as on one device (each device's features are gathered).

    Args:
      features: float [B, ...], as in `similarity_matrix`.
      labels: int32 [B].
      num_classes: of the data set.

    Returns:
      The mean over the matrix's entries of the squared difference.

    Source: PredSim, the loss L_sim.
    Deviation: the mean, as in the authors' code, for the squared norm. Their code knows one
      device; wrapped in a data-parallel trainer, each device has the matrix of its own share.
    """
    similarity = similarity_matrix(features)
    is_same = labels[:, None] == labels[None, :]
    targets = jnp.where(is_same, 1.0, -1.0 / max(1, num_classes - 1))
    return jnp.mean((similarity - targets) ** 2)


def make_loss_fn(config: LossConfig, num_classes: int | None = None) -> LossFn:
    """Returns ``loss_fn(head_output, labels) -> scalar``, the loss that ``config.name`` names.

    ``cross_entropy`` and ``pred`` are two names of the mean cross-entropy, ``sim`` is
    `similarity_loss`, ``predsim`` their sum, weighted with ``config.similarity_weight`` (beta):
    (1 - beta) * cross-entropy + beta * similarity.

    Args:
      config: its ``name``, ``similarity_weight`` and ``label_smoothing``.
      num_classes: needed by ``sim`` and ``predsim``, whose heads are `auxiliary.SimilarityHead`.

    Raises:
      UserError: if ``num_classes`` is needed and not given.

    Example:
      >>> loss_fn = make_loss_fn(LossConfig(name="cross_entropy"))
      >>> round(float(loss_fn(jnp.zeros((8, 10)), jnp.arange(8))), 4)  # The logarithm of 10.
      2.3026

    Source: PredSim: pred, sim and predsim, beta = 0.99.
    Deviation: none.
    """
    name, beta = config.name, config.similarity_weight
    if name in SIMILARITY_LOSSES and num_classes is None:
        raise UserError(f"num_classes=None: the {name} loss needs the number of classes; give it")

    def loss_fn(output: HeadOutput, labels: jax.Array) -> jax.Array:
        if name in SIMILARITY_LOSSES:
            if not isinstance(output, dict) or "similarity" not in output:
                raise UserError(
                    f"loss.name={name} needs a head with a similarity map; "
                    "wrap it in auxiliary.SimilarityHead"
                )
            similarity = similarity_loss(output["similarity"], labels, num_classes)
        if name == "sim":
            return similarity
        prediction = jnp.mean(cross_entropy(logits_of(output), labels, config.label_smoothing))
        if name == "predsim":
            return (1 - beta) * prediction + beta * similarity
        return prediction

    return loss_fn


def local_losses(config: LossConfig, num_blocks: int) -> tuple[str, ...]:
    """The names of the losses of all blocks but the last.

    Raises:
      UserError: if ``config.per_block`` is given and has not one name for each.
    """
    names = config.per_block or (config.name,) * (num_blocks - 1)
    if len(names) != num_blocks - 1:
        raise UserError(
            f"config.loss.per_block={config.per_block} must have a loss for each block but the "
            f"last; give {num_blocks - 1} for {num_blocks} blocks"
        )
    return names


def make_loss_fns(config: LossConfig, num_blocks: int, num_classes: int) -> tuple[LossFn, ...]:
    """One loss a block, as in `make_loss_fn`; the last block's is the cross-entropy.

    Args:
      config: ``name`` for all blocks but the last, or ``per_block`` for each of them.
      num_blocks: K.
      num_classes: of the data set.

    Raises:
      UserError: as in `local_losses`.

    Source: PredSim.
    Deviation: with predsim the authors' code weights the last block's cross-entropy with
      1 - beta too. Adam divides a gradient by its own size, so that hardly matters with their
      optimizer; with SGD it would make the last block's learning rate a hundredth of what was
      asked for.
    """
    names = (*local_losses(config, num_blocks), "cross_entropy")
    made = {  # Blocks with the same loss have the same function: they may share a program.
        name: make_loss_fn(dataclasses.replace(config, name=name), num_classes)
        for name in dict.fromkeys(names)
    }
    return tuple(made[name] for name in names)
