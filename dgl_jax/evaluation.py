"""Accuracy of every block's head, and of ensembles of heads, exact over a whole split."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.losses import cross_entropy
from dgl_jax.transfer import move

Logits = dict[int, jax.Array]


def count_batch(
    heads: Logits, labels: jax.Array, mask: jax.Array, ensemble_last: int
) -> dict[str, jax.Array]:
    """Sums over one batch what `evaluate` averages over all.

    Args:
      heads: the logits, float [B, num_classes], of each block that classifies, by its index.
      labels: int32 [B].
      mask: float32 [B], 0 where an example only fills the batch.
      ensemble_last: how many of the last heads the second ensemble sums.

    Returns:
      ``loss``, ``top1``, ``top5``: float32 sums, one a head; ``ensemble_top1`` and
      ``ensemble_last_top1``: scalar sums; ``examples``: the number of real ones.

    Source: the ensembles are those of the official code: softmax outputs weighted 2^i (DGL's
      ImageNet runs), and the sum of the log-softmax of the last n heads (SEDONA).
    """
    logits = jnp.stack([heads[block].astype(jnp.float32) for block in sorted(heads)])
    num_heads, _, num_classes = logits.shape
    correct = jnp.argmax(logits, axis=-1) == labels[None]
    # An example is in the top 5 when fewer than five classes score higher than its own.
    own = jnp.take_along_axis(logits, labels[None, :, None], axis=-1)
    in_top5 = jnp.sum(logits > own, axis=-1) < min(5, num_classes)
    loss = jax.vmap(cross_entropy, in_axes=(0, None))(logits, labels)

    weights = 2.0 ** jnp.arange(num_heads)
    weighted = jnp.tensordot(weights, jax.nn.softmax(logits), axes=1)
    last = jnp.sum(jax.nn.log_softmax(logits[-ensemble_last:]), axis=0)

    def total(per_example):
        return jnp.sum(per_example * jnp.broadcast_to(mask, per_example.shape), axis=-1)

    return {
        "loss": total(loss),
        "top1": total(correct),
        "top5": total(in_top5),
        "ensemble_top1": total(jnp.argmax(weighted, axis=-1) == labels),
        "ensemble_last_top1": total(jnp.argmax(last, axis=-1) == labels),
        "examples": jnp.sum(mask),
    }


def make_evaluate(
    logits_fn: Callable[..., Logits], sharding: jax.sharding.Sharding, ensemble_last: int
) -> Callable[..., dict[str, list[float] | float]]:
    """Returns ``evaluate(states, batches) -> means``: one pass over a split for all heads.

    Args:
      logits_fn: ``logits_fn(states, images)``, the heads' logits (`Runner.logits`).
      sharding: of the logits' batch axis: where labels go to meet them.
      ensemble_last: as in `count_batch`.

    Returns:
      A function of the states and of an iterable of (images, labels, mask). It returns
      ``loss``, ``top1``, ``top5``: lists of one float a head; ``ensemble_top1``,
      ``ensemble_last_top1``: floats. Accuracies are fractions in [0, 1].
    """
    count = jax.jit(count_batch, static_argnames="ensemble_last")

    def evaluate(states, batches: Iterable) -> dict[str, list[float] | float]:
        sums = []
        for images, labels, mask in batches:
            heads = logits_fn(states, images)
            labels, mask = move(labels, sharding), move(mask, sharding)
            sums.append(count(heads, labels, mask, ensemble_last=ensemble_last))
            if len(sums) >= 4:  # Back-pressure: a few batches in flight, no more.
                jax.block_until_ready(sums[-4])
        totals = jax.tree.map(
            lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *jax.device_get(sums)
        )
        examples = totals.pop("examples")
        return {name: (total / examples).tolist() for name, total in totals.items()}

    return evaluate
