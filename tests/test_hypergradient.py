"""The four hypergradients against central differences of an inner loop written out anew.

All in float64, smooth but for one test, on four layers with two candidate heads. The lower three
layers are equal: ours run as a loop, the oracle's do not. There is everything that the search
has: BatchNorm, momentum that is not zero at the start, weight decay, a learning rate that changes
each step.
"""

import functools
import logging
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SmallHead, SmallLayer, to_float64
from jax.flatten_util import ravel_pytree

from dgl_jax.auxiliary import make_auxiliary
from dgl_jax.config import LossConfig, OptimizerConfig, SearchSettings
from dgl_jax.losses import make_loss_fn
from dgl_jax.models.layers import Conv, batch_norm
from dgl_jax.optim import make_optimizer
from dgl_jax.sedona.hypergradient import (
    ESTIMATORS,
    Estimator,
    finite_difference_gradient,
    make_hypergradient,
    validation_loss,
)
from dgl_jax.sedona.inner import blended_gradient, layer_runs, make_inner_step
from dgl_jax.sedona.outer import OuterState, make_outer_optimizer, make_outer_step
from dgl_jax.sedona.relaxation import (
    DecisionVariables,
    RelaxedNetwork,
    init_state,
    relax,
)
from dgl_jax.types import Batch

_CLASSES, _STEPS, _FIRST_STEP = 3, 5, 2
_RATE, _MIN_RATE, _DECAY_STEPS, _MOMENTUM, _WEIGHT_DECAY, _SMOOTHING = 0.1, 0.01, 9, 0.9, 0.01, 0.1
_OPTIMIZER = OptimizerConfig(
    learning_rate=_RATE,
    momentum=_MOMENTUM,
    weight_decay=_WEIGHT_DECAY,
    schedule="cosine",
    min_learning_rate=_MIN_RATE,
)


# The programs run once: compiling them is all that takes time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Smooth(nn.Module):
    """Conv 3x3, BatchNorm, softplus; with classes also global average pool and Linear."""

    features: int
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, train):
        x = Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.softplus(batch_norm(train)(x))
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2))) if self.num_classes else x


def _problem(layers, candidates):
    """A relaxed network in the middle of its training, variables, and the batches of T steps."""
    network = RelaxedNetwork(
        tuple(layers),
        tuple(candidates),
        SmallHead(_CLASSES),
        make_loss_fn(LossConfig(label_smoothing=_SMOOTHING)),
    )
    rng = np.random.default_rng(0)

    def batch():
        images = rng.standard_normal((6, 4, 4, 2))
        return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, _CLASSES, 6)))

    batches = [batch() for _ in range(_STEPS)]
    optimizer = make_optimizer(_OPTIMIZER, _DECAY_STEPS, 1)
    init = jax.jit(functools.partial(init_state, network, optimizer))
    state = to_float64(init(jax.random.key(0), batches[0].images))

    def noisy(tree, scale):
        return jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape), tree)

    state = state.replace(
        step=jnp.asarray(_FIRST_STEP, jnp.int32),
        params=noisy(state.params, 0.2),
        opt_state=optax.tree.set(
            state.opt_state,
            trace=noisy(jax.tree.map(jnp.zeros_like, state.params), 0.1),
            count=jnp.asarray(_FIRST_STEP, jnp.int32),
        ),
    )
    places = len(layers) - 1
    variables = DecisionVariables(
        jnp.asarray(rng.standard_normal((places, 2))),
        jnp.asarray(rng.standard_normal((places, len(candidates)))),
    )
    return types.SimpleNamespace(
        network=network,
        optimizer=optimizer,
        state=state,
        variables=variables,
        batches=batches,
        validation=batch(),
        key=jax.random.key(1),
    )


# The oracle: the paper's inner loop, with one explicit scalar loss a layer.


def _apply(module, params, stats, x, train):
    """Output and running statistics."""
    arguments = {} if isinstance(module, SmallHead) else {"train": train}
    y, updated = module.apply(
        {"params": params, "batch_stats": stats}, x, **arguments, mutable=["batch_stats"]
    )
    return y, updated.get("batch_stats", {})


def _cross_entropy(logits, labels):
    log_probabilities = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = log_probabilities[jnp.arange(len(labels)), labels]
    return -jnp.mean((1 - _SMOOTHING) * picked + _SMOOTHING * jnp.mean(log_probabilities, axis=-1))


def _losses(network, params, stats, head_weights, batch):
    """All local losses [L], and the running statistics, in training mode."""
    x, losses, layer_stats, candidate_stats = batch.images, [], [], []
    for j, layer in enumerate(network.layers):
        x, after = _apply(layer, params["layers"][j], stats["layers"][j], x, True)
        layer_stats.append(after)
        if j < len(network.layers) - 1:
            pairs = [
                _apply(head, params["candidates"][j][m], stats["candidates"][j][m], x, True)
                for m, head in enumerate(network.candidates)
            ]
            logits = sum(head_weights[j, m] * logits for m, (logits, _) in enumerate(pairs))
            candidate_stats.append(tuple(after for _, after in pairs))
        else:
            logits, head_stats = _apply(network.head, params["head"], stats["head"], x, True)
        losses.append(_cross_entropy(logits, batch.labels))
    stats = {
        "layers": tuple(layer_stats),
        "candidates": tuple(candidate_stats),
        "head": head_stats,
    }
    return jnp.stack(losses), stats


def _nested(losses, signal, first):
    """above * (the loss from above) + local * (the local loss), down to a layer."""
    loss = losses[-1]
    for i in reversed(range(first, len(losses) - 1)):
        loss = signal[i, 1] * loss + signal[i, 0] * losses[i]
    return loss


def _direction(network, params, stats, signal, head_weights, batch):
    """Each layer's gradient of the loss nested down to itself; each head's of its own."""

    def loss(params, first):
        losses, after = _losses(network, params, stats, head_weights, batch)
        value = jnp.sum(losses) if first is None else _nested(losses, signal, first)
        return value, (losses, after)

    heads, (losses, after) = jax.grad(loss, has_aux=True)(params, None)
    layers = tuple(
        jax.grad(loss, has_aux=True)(params, j)[0]["layers"][j] for j in range(len(network.layers))
    )
    return heads | {"layers": layers}, after, losses


def _sgd(params, momentum, direction, step):
    """PyTorch's, with a learning rate that falls as a cosine."""
    rate = (1 + jnp.cos(jnp.pi * (_FIRST_STEP + step) / _DECAY_STEPS)) / 2
    rate = _MIN_RATE + (_RATE - _MIN_RATE) * rate
    momentum = jax.tree.map(
        lambda m, g, p: _MOMENTUM * m + g + _WEIGHT_DECAY * p, momentum, direction, params
    )
    return jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum


def _validation_loss(problem, params, stats):
    x = problem.validation.images
    for j, layer in enumerate(problem.network.layers):
        x, _ = _apply(layer, params["layers"][j], stats["layers"][j], x, False)
    logits, _ = _apply(problem.network.head, params["head"], stats["head"], x, False)
    return _cross_entropy(logits, problem.validation.labels)


def _softmax(x):
    return jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True)


def _run(problem, variables, recorded=None):
    """The inner loop. After each step: validation and mixed loss; before it: the weights.

    With ``recorded`` weights and statistics, the directions are those at the recorded ones.
    """
    signal, head_weights = _softmax(variables.alpha), _softmax(variables.beta)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *problem.batches)

    def step(carry, inputs):
        t, batch, recorded = inputs
        params, stats, momentum = carry
        at = (params, stats) if recorded is None else recorded
        direction, after, losses = _direction(problem.network, *at, signal, head_weights, batch)
        new_params, momentum = _sgd(params, momentum, direction, t)
        values = _validation_loss(problem, new_params, after), _nested(losses, signal, 0)
        return (new_params, after, momentum), (*values, (params, stats))

    state = problem.state
    start = (state.params, state.batch_stats, optax.tree.get(state.opt_state, "trace"))
    steps = jnp.arange(_STEPS)
    return jax.lax.scan(step, start, (steps, batches, recorded))[1]


def _central_differences(values, variables, step=1e-3):
    """Of ``values(variables) -> tree of [T]``: the gradients, [T, number of variables]."""
    flat, unravel = ravel_pytree(variables)
    stencil = {2: -1 / 12, 1: 8 / 12, -1: -8 / 12, -2: 1 / 12}
    points = np.asarray(flat) + step * np.multiply.outer(list(stencil), np.eye(flat.size))
    results = _jit(lambda points: jax.lax.map(lambda point: values(unravel(point)), points))(
        points.reshape(-1, flat.size)
    )
    weights = np.array(list(stencil.values())) / step

    def differences(y):
        return jnp.einsum("s,snt->tn", weights, y.reshape(len(stencil), flat.size, _STEPS))

    return jax.tree.map(differences, results)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def smooth(float64):
    """The network of most tests, and what the oracle says of it."""
    problem = _problem([Smooth(2)] * 3 + [Smooth(3)], [Smooth(3, _CLASSES), SmallHead(_CLASSES)])
    validation, mixed = _central_differences(lambda v: _run(problem, v)[:2], problem.variables)
    recorded = _jit(lambda: _run(problem, problem.variables)[2])()
    first_order = _central_differences(lambda v: _run(problem, v, recorded)[0], problem.variables)
    problem.expected = {
        "unrolled": validation,
        "finite_difference": validation,
        "first_order": first_order,
        "official": mixed,
    }
    return problem


def _jitted(problem, estimator, **options):
    return _jit(make_hypergradient(estimator, problem.network, problem.optimizer, **options))


def _arguments(problem, num_steps):
    batches = problem.batches[:num_steps]
    return problem.variables, problem.state, batches, problem.validation, problem.key


def _compute(problem, estimator, num_steps, **options):
    """The gradient, flat."""
    gradient, _ = _jitted(problem, estimator, **options)(*_arguments(problem, num_steps))
    return ravel_pytree(gradient)[0]


@pytest.fixture(scope="module")
def compiled(smooth):
    """``compiled(name)``: an estimator on the smooth network, jitted, the same in all tests."""
    return functools.cache(lambda name: _jitted(smooth, ESTIMATORS[name]))


@pytest.fixture(scope="module")
def computed(smooth, compiled):
    """``computed(name, num_steps)``: its gradient, flat."""
    return lambda name, steps: ravel_pytree(compiled(name)(*_arguments(smooth, steps))[0])[0]


def _error(actual, expected):
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        ("unrolled", 1),
        ("unrolled", 2),
        ("unrolled", 5),
        ("first_order", 1),
        pytest.param("first_order", 2, marks=pytest.mark.slow),
        ("first_order", 5),
        pytest.param("official", 1, marks=pytest.mark.slow),
        ("official", 2),
        pytest.param("official", 5, marks=pytest.mark.slow),
    ],
)
def test_equals_central_differences(smooth, computed, name, num_steps):
    assert _error(computed(name, num_steps), smooth.expected[name][num_steps - 1]) < 1e-8


def test_first_order_drops_nothing_of_one_step_and_much_of_two(smooth, computed):
    assert _error(computed("first_order", 1), computed("unrolled", 1)) < 1e-10
    assert _error(smooth.expected["first_order"][1], smooth.expected["unrolled"][1]) > 0.01


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_finite_difference(smooth, computed, num_steps):
    error = _error(
        computed("finite_difference", num_steps), smooth.expected["unrolled"][num_steps - 1]
    )
    assert error < 2e-4


def test_finite_difference_error_falls_with_the_square_of_the_displacement(smooth, computed):
    twice = Estimator(finite_difference_gradient(0.02), validation_loss)
    expected = smooth.expected["unrolled"][1]
    ratio = _error(_compute(smooth, twice, 2), expected) / _error(
        computed("finite_difference", 2), expected
    )
    assert ratio == pytest.approx(4, rel=0.02)


def _scaled_gradient(network, params, batch_stats, decisions, batch, key):
    """The tempting way: one gradient of the sum of losses, scaled on its way down."""
    del key

    def scale(x, factor):
        return factor * x + (1 - factor) * jax.lax.stop_gradient(x)

    def loss(params):
        x, losses, layer_stats, candidate_stats = batch.images, [], [], []
        for j, layer in enumerate(network.layers):
            x, after = _apply(layer, params["layers"][j], batch_stats["layers"][j], x, True)
            layer_stats.append(after)
            if j == len(network.layers) - 1:
                break
            pairs = [
                _apply(
                    head,
                    params["candidates"][j][m],
                    batch_stats["candidates"][j][m],
                    scale(x, decisions.signal[j, 0]),
                    True,
                )
                for m, head in enumerate(network.candidates)
            ]
            logits = sum(decisions.head[j, m] * logits for m, (logits, _) in enumerate(pairs))
            losses.append(network.loss_fn(logits, batch.labels))
            candidate_stats.append(tuple(after for _, after in pairs))
            x = scale(x, decisions.signal[j, 1])
        logits, head_stats = _apply(network.head, params["head"], batch_stats["head"], x, True)
        losses = jnp.stack([*losses, network.loss_fn(logits, batch.labels)])
        stats = {
            "layers": tuple(layer_stats),
            "candidates": tuple(candidate_stats),
            "head": head_stats,
        }
        return jnp.sum(losses), (stats, losses)

    gradients, (stats, losses) = jax.grad(loss, has_aux=True)(params)
    return gradients, stats, losses


def test_a_gradient_scaled_on_its_way_has_the_same_value_and_a_wrong_derivative(smooth, computed):
    arguments = (
        smooth.state.params,
        smooth.state.batch_stats,
        relax(smooth.variables),
        smooth.batches[0],
        smooth.key,
    )
    ours, wrong = _jit(
        lambda *arguments: [
            gradient(smooth.network, *arguments)
            for gradient in (blended_gradient, _scaled_gradient)
        ]
    )(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), ours, wrong)
    expected = smooth.expected["unrolled"][1]
    error = _error(_compute(smooth, Estimator(_scaled_gradient, validation_loss), 2), expected)
    assert error > 0.01
    assert _error(computed("unrolled", 2), expected) < 1e-8


def test_equal_layers_are_one_loop_and_remat_changes_nothing(smooth, computed):
    state, x = smooth.state, smooth.batches[0].images
    runs = layer_runs(smooth.network, state.params, x)
    assert runs == [(0, 3), (3, 4)]
    kept = _compute(smooth, ESTIMATORS["unrolled"], 2, remat=False)
    assert _error(kept, computed("unrolled", 2)) < 1e-10


def test_second_call_compiles_nothing_and_the_state_is_not_changed(smooth, compiled, caplog):
    hypergradient = compiled("unrolled")
    before = jax.tree.map(np.array, smooth.state)
    first = hypergradient(*_arguments(smooth, 2))
    variables, state, batches, validation, _ = _arguments(smooth, 2)
    state = jax.tree.map(lambda x: x + 1, state)
    arguments = (variables, state, batches, validation, jax.random.key(5))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        second = hypergradient(*arguments)
    assert not [r for r in caplog.records if "Finished" in r.getMessage()]
    assert second[1]["validation_loss"] != first[1]["validation_loss"]
    jax.tree.map(np.testing.assert_array_equal, before, smooth.state)


def test_an_outer_step_is_adam_on_the_variables_and_one_inner_step_of_the_snapshot(
    smooth, computed
):
    settings = SearchSettings()
    outer_optimizer = make_outer_optimizer(settings)
    step = make_outer_step(
        smooth.network,
        smooth.optimizer,
        outer_optimizer,
        make_hypergradient(ESTIMATORS["unrolled"], smooth.network, smooth.optimizer),
    )
    variables, state, batches, validation, key = _arguments(smooth, 2)
    before = OuterState(variables, outer_optimizer.init(variables))
    batches = [*batches, smooth.batches[-1]]
    outer, snapshot, _ = _jit(step)(before, state, batches, validation, key)
    # Adam's first update, by hand: the step is the rate, but for the term under the root.
    gradient = computed("unrolled", 2) + settings.weight_decay * ravel_pytree(variables)[0]
    moved = -settings.learning_rate * gradient / (jnp.abs(gradient) + 1e-8)
    np.testing.assert_allclose(
        ravel_pytree(outer.variables)[0], ravel_pytree(variables)[0] + moved, rtol=1e-9
    )
    expected, _ = _jit(make_inner_step(smooth.network, smooth.optimizer))(
        state, relax(outer.variables), batches[-1], key
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), snapshot, expected
    )


@pytest.mark.slow
def test_the_search_s_own_modules():
    """ReLU and SEDONA's candidate; the steps of the stencil are short, to cross no kink."""
    heads = make_auxiliary("sepconv_1", _CLASSES, features=4), make_auxiliary("mlp", _CLASSES)
    problem = _problem([SmallLayer(2), SmallLayer(3), SmallLayer(3)], heads)
    expected = _central_differences(lambda v: _run(problem, v)[0], problem.variables, 1e-4)
    error = _error(_compute(problem, ESTIMATORS["unrolled"], 2), expected[1])
    assert error < 1e-6
