"""Optimizers against their update rules written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgl_jax.config import OptimizerConfig
from dgl_jax.optim import drop_steps, kernel_mask, make_optimizer, make_schedule


def _run(config, gradients, params, num_steps=12, steps_per_epoch=2):
    optimizer = make_optimizer(config, num_steps, steps_per_epoch)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(value, jnp.float64) for name, value in params.items()}
        state = optimizer.init(params)
        trajectory = []
        for gradient in gradients:
            gradient = {name: jnp.asarray(value) for name, value in gradient.items()}
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            trajectory.append({name: np.asarray(value) for name, value in params.items()})
    return trajectory


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (3, 2), "bias": (2,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gradients = [
        {name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(12)
    ]
    return params, gradients


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum_at_drop", ["keep", "reset"])
@pytest.mark.parametrize("weight_decay_on", ["all", "kernels"])
def test_sgd_is_pytorchs(problem, nesterov, momentum_at_drop, weight_decay_on):
    params, gradients = problem
    config = OptimizerConfig(
        learning_rate=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.01,
        weight_decay_on=weight_decay_on,
        schedule="step",
        drop_epochs=(2.0, 4.0),
        drop_factor=0.2,
        momentum_at_drop=momentum_at_drop,
    )
    trajectory = _run(config, gradients, params)
    buffer = {name: 0.0 for name in params}
    for step, gradient in enumerate(gradients):
        learning_rate = 0.1 * 0.2 ** ((step >= 4) + (step >= 8))
        if momentum_at_drop == "reset" and step in (4, 8):
            buffer = {name: 0.0 for name in params}
        for name in params:
            decay = 0.01 if weight_decay_on == "all" or name == "kernel" else 0.0
            g = gradient[name] + decay * params[name]
            buffer[name] = 0.9 * buffer[name] + g
            direction = g + 0.9 * buffer[name] if nesterov else buffer[name]
            params[name] = params[name] - learning_rate * direction
            np.testing.assert_allclose(trajectory[step][name], params[name], rtol=1e-6)


@pytest.mark.parametrize("momentum_at_drop", ["keep", "reset"])
def test_adam(problem, momentum_at_drop):
    params, gradients = problem
    config = OptimizerConfig(
        name="adam",
        learning_rate=0.01,
        b1=0.5,
        b2=0.9,
        weight_decay=0.0,
        schedule="step",
        drop_epochs=(3.0,),
        drop_factor=0.1,
        momentum_at_drop=momentum_at_drop,
    )
    trajectory = _run(config, gradients, params)
    m, v, count = 0.0, 0.0, 0
    for step, gradient in enumerate(gradients):
        g = gradient["kernel"]
        if momentum_at_drop == "reset" and step == 6:
            m, v, count = 0.0, 0.0, 0
        count += 1
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g**2
        direction = m / (1 - 0.5**count) / (np.sqrt(v / (1 - 0.9**count)) + 1e-8)
        params["kernel"] = params["kernel"] - (0.01 if step < 6 else 0.001) * direction
        np.testing.assert_allclose(trajectory[step]["kernel"], params["kernel"], rtol=1e-5)


def test_schedules():
    step = make_schedule(OptimizerConfig(drop_epochs=(15, 30, 45)), 50 * 390, 390)
    rates = [float(step(epoch * 390 + offset)) for epoch in (0, 15, 30, 45) for offset in (-1, 0)]
    # Table 1: 0.1 x 0.2 at epochs 15, 30 and 45 from 0.
    np.testing.assert_allclose(rates[1:], [0.1, 0.1, 0.02, 0.02, 4e-3, 4e-3, 8e-4], rtol=1e-6)
    cosine = OptimizerConfig(schedule="cosine", learning_rate=0.1, min_learning_rate=1e-3)
    cosine = make_schedule(cosine, num_steps=100, steps_per_epoch=10)
    rates = [float(cosine(s)) for s in (0, 50, 100)]
    np.testing.assert_allclose(rates, [0.1, (0.1 + 1e-3) / 2, 1e-3], rtol=1e-5)


def test_drops_are_at_the_nearest_step():
    assert drop_steps(OptimizerConfig(drop_epochs=(0.5, 1.5)), 391) == [196, 586]
    never = OptimizerConfig(drop_epochs=(1.0, 1e9), drop_factor=0.5, learning_rate=1.0)
    assert drop_steps(never, 391) == [391]
    assert float(make_schedule(never, num_steps=500, steps_per_epoch=391)(500)) == 0.5


def test_kernels_are_told_from_biases_and_scales():
    params = {
        "Conv_0": {"kernel": np.zeros((3, 3, 2, 2)), "bias": np.zeros(2)},
        "BatchNorm_0": {"scale": np.zeros(2), "bias": np.zeros(2)},
        "mine": np.zeros((2, 2)),
        "gain": np.zeros(2),
    }
    mask = kernel_mask(params)
    assert mask == {
        "Conv_0": {"kernel": True, "bias": False},
        "BatchNorm_0": {"scale": False, "bias": False},
        "mine": True,
        "gain": False,
    }


def test_drops_that_fall_on_one_step_both_count():
    config = OptimizerConfig(learning_rate=1.0, drop_epochs=(1.0, 1.01, 2.0), drop_factor=0.5)
    schedule = make_schedule(config, num_steps=30, steps_per_epoch=10)
    assert [float(schedule(step)) for step in (9, 10, 20)] == [1.0, 0.25, 0.125]
