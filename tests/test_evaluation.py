"""Accuracies, losses and ensembles against plain numpy, with a partial last batch."""

import jax
import numpy as np

from dgl_jax.config import PlacementConfig
from dgl_jax.evaluation import make_evaluate
from dgl_jax.placement import make_placements


def test_every_head_and_the_ensembles_are_exact_on_a_partial_last_batch():
    rng = np.random.default_rng(0)
    num_blocks, num_examples, num_classes, batch_size = 3, 23, 7, 5
    logits = rng.standard_normal((num_blocks, num_examples, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)

    def batches():
        for start in range(0, num_examples, batch_size):
            index = np.arange(start, start + batch_size)
            mask = (index < num_examples).astype(np.float32)
            index = np.minimum(index, num_examples - 1)
            yield jax.device_put((index, labels[index], mask))

    def logits_fn(states, index):
        heads = [jax.device_put(head[np.asarray(index)] * states) for head in logits]
        return dict(enumerate(heads))

    (placement,) = make_placements(PlacementConfig(), 1)
    means = make_evaluate(logits_fn, placement, ensemble_last=2)(np.float32(1), batches())

    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rank = (logits > np.take_along_axis(logits, labels[None, :, None], -1)).sum(-1)
    np.testing.assert_allclose(means["top1"], (logits.argmax(-1) == labels).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(means["top5"], (rank < 5).mean(-1), rtol=1e-6)
    losses = -log_probabilities[:, np.arange(num_examples), labels].mean(-1)
    np.testing.assert_allclose(means["loss"], losses, rtol=1e-6)
    weighted = np.tensordot([1, 2, 4], np.exp(log_probabilities), 1)
    assert means["ensemble_top1"] == np.mean(weighted.argmax(-1) == labels)
    last_two = log_probabilities[1:].sum(0)
    assert means["ensemble_last_top1"] == np.mean(last_two.argmax(-1) == labels)


def test_fewer_classes_than_five():
    logits = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    (placement,) = make_placements(PlacementConfig(), 1)
    batch = jax.device_put((logits, np.array([1, 1], np.int32), np.ones(2, np.float32)))
    means = make_evaluate(lambda states, x: {0: x}, placement, ensemble_last=1)(None, [batch])
    assert means["top1"] == [0.5] and means["top5"] == [1.0]
