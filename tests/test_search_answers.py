"""Searches whose answer is known, by a network that is made for it.

The layers are residual, and every head is a fixed read-out: the mean of channel c over the map,
times a strength, is the logit of class c. So the gradient of each head's loss moves the features
in the same direction, as far as the head is strong; and what the layers below a place are to get
is the stronger one of the two signals. All searches start each outer step from the same weights,
where learning faster is always better.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import SmallLayer

from dgl_jax.config import LossConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.models.network import Network
from dgl_jax.sedona.discretise import discretise
from dgl_jax.sedona.hypergradient import ESTIMATORS, make_hypergradient
from dgl_jax.sedona.relaxation import init_state, init_variables, relax, relaxed_network
from dgl_jax.types import Batch

# Compiling takes longer than searching.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_CLASSES, _INNER_STEPS, _OUTER_STEPS, _SEEDS = 3, 2, 20, (0, 1, 2)


class Residual(nn.Module):
    """The input, cut or filled up with zeros to its channels, plus a convolution of it."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        kept = x[..., : self.features]
        missing = self.features - kept.shape[-1]
        return jnp.pad(kept, [(0, 0)] * 3 + [(0, missing)]) + SmallLayer(self.features)(x, train)


class ReadOut(nn.Module):
    """The logit of class c + shift is the mean of channel c.

    Attributes:
      strengths: pairs (number of channels, strength): on maps of so many channels the logits are
        multiplied with it, else with 1.
      shift: 0 is the right answer; another one teaches the labels of other classes.
    """

    strengths: tuple[tuple[int, float], ...] = ()
    shift: int = 0

    @nn.compact
    def __call__(self, x):
        logits = jnp.mean(x[..., :_CLASSES], axis=(1, 2))
        return dict(self.strengths).get(x.shape[-1], 1.0) * jnp.roll(logits, self.shift, axis=-1)


def _batches(rng, patterns, count, size):
    """Each class is a pattern over the map, in noise."""
    labels = rng.integers(0, _CLASSES, (count, size))
    images = patterns[labels] + 0.5 * rng.standard_normal((count, size, 5, 5, 2))
    return [Batch(x.astype(np.float32), y.astype(np.int32)) for x, y in zip(images, labels)]


def _search(features, candidates, head):
    """Yields each seed's decisions after every outer step."""
    layers = [Residual(count) for count in features]
    network = relaxed_network(
        Network("residual", layers, head), candidates, make_loss_fn(LossConfig())
    )
    inner, outer = optax.sgd(0.05, momentum=0.9), optax.adam(0.1, b1=0.5)
    hypergradient = make_hypergradient(ESTIMATORS["unrolled"], network, inner, remat=False)

    @_jit
    def outer_step(variables, outer_state, state, batches, validation):
        gradient, _ = hypergradient(variables, state, batches, validation, jax.random.key(0))
        updates, outer_state = outer.update(gradient, outer_state)
        return optax.apply_updates(variables, updates), outer_state

    @_jit
    def init(key):
        return init_state(network, inner, key, jnp.zeros((24, 5, 5, 2)))

    for seed in _SEEDS:
        rng = np.random.default_rng(seed)
        patterns = rng.standard_normal((_CLASSES, 5, 5, 2))
        state = init(jax.random.key(seed))
        variables = init_variables(len(layers), len(candidates))
        outer_state, curve = outer.init(variables), []
        for _ in range(_OUTER_STEPS):
            *batches, validation = _batches(rng, patterns, _INNER_STEPS + 1, 24)
            variables, outer_state = outer_step(variables, outer_state, state, batches, validation)
            curve.append(relax(variables))
        yield variables, curve


def test_a_useless_head_s_signal_is_not_taken():
    """Four layers of 8, 7, 6 and 5 channels; the head on 7 channels gives no gradient at all.

    There a local signal only takes away from the one from above, which is a good one. On the
    layers around it the local head is stronger than what comes from above, so that the local
    signal is right: on 8 channels 4 against at most 1, on 6 channels 1 against 0.25.
    """
    heads = [ReadOut(strengths=((8, 4.0), (7, 0.0)))]
    for variables, curve in _search((8, 7, 6, 5), heads, ReadOut(strengths=((5, 0.25),))):
        local = np.array([decisions.signal[:, 0] for decisions in curve])
        assert np.all(local[-1, [0, 2]] > 0.75) and local[-1, 1] < 0.1
        assert np.all(np.diff(local[:, 1]) < 0)
        assert discretise(variables.alpha, variables.beta, num_blocks=3).cuts == (0, 2)


def test_the_best_head_is_found_at_every_place():
    """Of three heads one says nothing, one teaches the labels of other classes, one is right."""
    silent = ReadOut(strengths=((6, 0.0), (5, 0.0)))
    for variables, curve in _search((6, 5, 4), [silent, ReadOut(shift=1), ReadOut()], ReadOut()):
        assert np.all(curve[-1].head[:, 2] > 0.75)
        assert discretise(variables.alpha, variables.beta, num_blocks=3).heads == (2, 2)
