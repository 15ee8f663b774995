"""The relaxed network at hard decisions: DGL at one end, backprop at the other. In float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SmallHead, SmallLayer

from dgl_jax.block import Block, forward, init_block_state
from dgl_jax.config import LossConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods.dgl import make_blocks
from dgl_jax.models.network import Network
from dgl_jax.sedona.inner import (
    blended_gradient,
    layer_functions,
    layer_inputs,
    make_inner_step,
    mixed_loss,
)
from dgl_jax.sedona.relaxation import Decisions, init_state, init_variables, relax, relaxed_network
from dgl_jax.types import Batch

# Compiling is all that takes time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_KEY = jax.random.key(3)
_LOSS = make_loss_fn(LossConfig(label_smoothing=0.1))
_NETWORK = Network("small", [SmallLayer(c) for c in (2, 3, 3)], SmallHead(3))


class DeepHead(nn.Module):
    """A convolution with BatchNorm, then `SmallHead`."""

    @nn.compact
    def __call__(self, x, train):
        return SmallHead(3)(SmallLayer(2)(x, train))


_CANDIDATES = (SmallHead(3), DeepHead())


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _init(network, optimizer):
    images = np.zeros((6, 4, 4, 2))
    state = _jit(functools.partial(init_state, network, optimizer))(jax.random.key(0), images)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)


@pytest.fixture(scope="module")
def both(float64):
    """The network with two candidates: its state before the first step, and its gradient."""
    network = relaxed_network(_NETWORK, _CANDIDATES, _LOSS)
    rng = np.random.default_rng(0)
    batch = Batch(rng.standard_normal((6, 4, 4, 2)), rng.integers(0, 3, 6))
    state = _init(network, optax.sgd(0.1))
    gradient = _jit(
        lambda decisions: blended_gradient(
            network, state.params, state.batch_stats, decisions, batch, _KEY
        )
    )
    return state, batch, gradient


@pytest.mark.parametrize("kernel_init", ["own", "he_normal"])
def test_layers_and_head_start_as_those_of_a_block(kernel_init):
    optimizer, key, x = optax.sgd(0.1), jax.random.key(0), jnp.zeros((6, 4, 4, 2))
    relaxed = relaxed_network(_NETWORK, _CANDIDATES, _LOSS)
    params = init_state(relaxed, optimizer, key, x, kernel_init).params
    block = Block(0, 0, _NETWORK.layers, _NETWORK.head, None, kernel_init=kernel_init)
    expected = init_block_state(block, optimizer, key, x).params
    for part in ("layers", "head"):  # But for rounding: there each module is one program.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params[part], expected[part]
        )


def _decisions(signal, head):
    """The same rows at both places."""
    return Decisions(jnp.array([signal] * 2, jnp.float64), jnp.array([head] * 2, jnp.float64))


def _assert_equal(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), actual, expected
    )


@pytest.mark.parametrize("chosen", [0, 1])
def test_all_local_is_dgl_with_one_layer_a_block(both, chosen):
    state, batch, gradient = both
    gradients, stats, losses = gradient(_decisions([1.0, 0.0], np.eye(2)[chosen]))
    blocks = make_blocks(_NETWORK, (0, 1), _CANDIDATES[chosen], _LOSS)

    def part(tree, j):
        head = tree["head"] if j == 2 else tree["candidates"][j][chosen]
        return {"layers": (tree["layers"][j],), "head": head}

    @_jit
    def block_gradients(state, x):
        results = []
        for j, block in enumerate(blocks):
            params, stats = part(state.params, j), part(state.batch_stats, j)

            def local_loss(params, block=block, stats=stats, x=x):
                x, logits, after = forward(block, params, stats, x, train=True)
                return _LOSS(logits, batch.labels), (x, after)

            (loss, (x, after)), gradient = jax.value_and_grad(local_loss, has_aux=True)(params)
            results.append((gradient, after, loss))
        return results

    for j, expected in enumerate(block_gradients(state, batch.images)):
        _assert_equal((part(gradients, j), part(stats, j), losses[j]), expected)
        if j < 2:
            other = gradients["candidates"][j][1 - chosen]
            _assert_equal(other, jax.tree.map(jnp.zeros_like, other))


def test_all_above_is_backprop_and_candidates_still_learn(both):
    state, batch, gradient = both
    weights = [0.3, 0.7]
    gradients, _, losses = gradient(_decisions([0.0, 1.0], weights))
    (whole,) = make_blocks(_NETWORK, (), None, _LOSS)

    def losses_of(params):
        x, logits, _ = forward(whole, params, state.batch_stats, batch.images, train=True)
        return _LOSS(logits, batch.labels), x

    def part(tree):
        return {"layers": tree["layers"], "head": tree["head"]}

    (loss, _), expected = _jit(jax.value_and_grad(losses_of, has_aux=True))(part(state.params))
    _assert_equal((part(gradients), losses[-1]), (expected, loss))
    # The heads' gradients have nothing to do with the signal that the layers get.
    local = gradient(_decisions([1.0, 0.0], weights))[0]
    _assert_equal(gradients["candidates"], local["candidates"])
    for leaf in jax.tree.leaves(gradients["candidates"]):
        assert np.any(leaf != 0)


def test_one_hot_mixture_is_the_network_with_that_head_only(both):
    state, batch, gradient = both
    network = relaxed_network(_NETWORK, _CANDIDATES[1:], _LOSS)

    def part(tree):
        return tree | {"candidates": tuple(row[1:] for row in tree["candidates"])}

    signal = [0.3, 0.7]
    expected = _jit(
        lambda params, stats: blended_gradient(
            network, params, stats, _decisions(signal, [1.0]), batch, _KEY
        )
    )(part(state.params), part(state.batch_stats))
    gradients, stats, losses = gradient(_decisions(signal, [0.0, 1.0]))
    _assert_equal((part(gradients), part(stats), losses), expected)


def test_mixed_loss():
    losses = jnp.array([5.0, 3.0, 2.0])
    signal = jnp.array([[0.25, 0.75], [0.4, 0.6]])
    expected = 0.75 * (0.6 * 2.0 + 0.4 * 3.0) + 0.25 * 5.0
    assert mixed_loss(losses, Decisions(signal, jnp.ones((2, 1)))) == pytest.approx(expected)


def test_finite_where_a_signal_s_weight_is_zero(both):
    """The released code divides by the weights of the signals from above, and of the local ones."""
    for signal in ([1.0, 0.0], [0.0, 1.0]):
        decisions = _decisions(signal, [0.5, 0.5])
        gradients, _, losses = both[2](decisions)
        value, derivative = jax.value_and_grad(
            lambda signal, decisions=decisions, losses=losses: mixed_loss(
                losses, decisions.replace(signal=signal)
            )
        )(decisions.signal)
        assert value == losses[0 if signal[0] else -1]
        leaves = jax.tree.leaves((gradients, losses, derivative))
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_layers_start_from_the_weights_of_every_other_method(both):
    state = both[0]
    blocks = make_blocks(_NETWORK, (1,), SmallHead(3), _LOSS)
    optimizer, key = optax.sgd(0.1), jax.random.key(0)

    @_jit
    def init(x):
        lower = init_block_state(blocks[0], optimizer, key, x)
        return lower.params, init_block_state(
            blocks[1], optimizer, key, jnp.zeros((6, 4, 4, 3), x.dtype)
        ).params

    lower, upper = init(jnp.zeros((6, 4, 4, 2), jnp.float32))
    expected = (lower["layers"] + upper["layers"], upper["head"])
    actual = state.params["layers"], state.params["head"]
    jax.tree.map(np.testing.assert_array_equal, expected, actual)


class Dropped(nn.Module):
    """Its input with dropout."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_dropout():
    """Each layer has masks of its own, in a loop too, and the same ones with the same key."""
    dropping = Network("dropping", [Dropped()] * 4, SmallHead(3))
    network = relaxed_network(dropping, [SmallHead(3)], _LOSS)
    optimizer = optax.sgd(0.0)
    state = _init(network, optimizer)
    batch = Batch(jnp.ones((6, 4, 4, 2)), jnp.arange(6) % 3)
    decisions = relax(init_variables(4, 1))
    step = _jit(make_inner_step(network, optimizer))
    after, losses = step(state, decisions, batch, _KEY)
    np.testing.assert_array_equal(losses, step(state, decisions, batch, _KEY)[1])
    assert np.all(losses != step(state, decisions, batch, jax.random.key(4))[1])
    assert np.all(losses != step(after, decisions, batch, _KEY)[1])
    layers = layer_inputs(
        network, state.params, state.batch_stats, decisions, jax.random.fold_in(_KEY, state.step)
    )

    @_jit
    def masks_and_losses(h):
        masks, losses = [], []
        for j, layer in enumerate(layers):
            run_layer, local_loss = layer_functions(network, j, layer, batch.labels)
            masks.append(run_layer(layer.params, batch.images)[0])
            h, _ = run_layer(layer.params, h)
            losses.append(local_loss(layer.head_params, h)[0])
        return masks, losses

    masks, expected = masks_and_losses(batch.images)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for i in range(4):
        for j in range(i):
            assert np.any(masks[i] != masks[j])
