"""Accuracy of every block's head, and of ensembles of heads, exact over a whole split."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.losses import cross_entropy
from dgl_jax.pipeline import block_program
from dgl_jax.placement import BlockPlacement
from dgl_jax.transfer import announce, fetch, place

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
    logits_fn: Callable[..., Logits], placement: BlockPlacement, ensemble_last: int
) -> Callable[..., dict[str, list[float] | float] | None]:
    """Returns ``evaluate(states, batches) -> means``: one pass over a split for all heads.

    Args:
      logits_fn: ``logits_fn(states, images)``, the heads' logits (`Runner.logits`).
      placement: of the last block: where labels go to meet the logits.
      ensemble_last: as in `count_batch`.

    Returns:
      A function of the states and of an iterable of (images, labels, mask). It returns
      ``loss``, ``top1``, ``top5``: lists of one float a head; ``ensemble_top1``,
      ``ensemble_last_top1``: floats. Accuracies are fractions in [0, 1]. In a run of several
      processes all must call it, and those but the first get None.

    Example:
      Two blocks whose heads return the images and their negatives; the last of three images only
      fills the batch.

      >>> from dgl_jax.config import PlacementConfig
      >>> from dgl_jax.placement import make_placements
      >>> (placement,) = make_placements(PlacementConfig(), num_blocks=1)
      >>> logits_fn = lambda states, images: {0: images, 1: -images}
      >>> evaluate = make_evaluate(logits_fn, placement, ensemble_last=1)
      >>> images = jnp.array([[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]])
      >>> labels, mask = jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.0])
      >>> evaluate((), [(images, labels, mask)])["top1"]
      [1.0, 0.0]
    """
    count = block_program(
        functools.partial(count_batch, ensemble_last=ensemble_last), placement, placement.state
    )

    def evaluate(states, batches: Iterable) -> dict[str, list[float] | float] | None:
        sums, done = [], []
        for images, labels, mask in batches:
            heads = logits_fn(states, images)
            sums.append(count(heads, *(place(x, placement.batch) for x in (labels, mask))))
            done.append(announce(sums[-1]["examples"]))
            if len(done) >= 4:  # Back-pressure: a few batches in flight, no more.
                jax.block_until_ready(done[-4])
        sums = fetch(sums)
        if sums is None:
            return None
        totals = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *sums)
        examples = totals.pop("examples")
        return {name: (total / examples).tolist() for name, total in totals.items()}

    return evaluate
