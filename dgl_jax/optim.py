"""From an optimizer configuration to one optax chain, the same for every block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made.

    Args:
      config: its ``schedule`` is ``constant``, ``step`` (times ``drop_factor`` at the start of
        each of ``drop_epochs``) or ``cosine`` (to ``min_learning_rate`` at ``num_steps``).
      num_steps: the updates of the whole run.
      steps_per_epoch: the updates of one epoch.

    Returns:
      A function from a step (int32 scalar) to a learning rate (float scalar).

    Example:
      >>> config = OptimizerConfig(learning_rate=0.5, drop_epochs=(1.0, 2.0), drop_factor=0.5)
      >>> learning_rate = make_schedule(config, num_steps=300, steps_per_epoch=100)
      >>> [float(learning_rate(step)) for step in (0, 99, 100, 200)]
      [0.5, 0.5, 0.25, 0.125]
    """
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(
            config.learning_rate,
            max(num_steps, 1),
            alpha=min(config.min_learning_rate / config.learning_rate, 1.0),
        )
    drops = {}
    for step in drop_steps(config, steps_per_epoch):  # In a short run two may coincide.
        drops[step] = drops.get(step, 1.0) * config.drop_factor
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def drop_steps(config: OptimizerConfig, steps_per_epoch: int) -> list[int]:
    """The steps whose update is the first with a lower learning rate; those past int32 never come."""
    steps = [round(epoch * steps_per_epoch) for epoch in config.drop_epochs]
    return [step for step in steps if step < 2**31]


def make_optimizer(
    config: OptimizerConfig, num_steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Returns the optax chain: L2 term, momentum or Adam, learning rate.

    Args:
      config: the optimizer and its schedule.
      num_steps: the updates of the whole run.
      steps_per_epoch: the updates of one epoch.

    Example:
      >>> config = OptimizerConfig(learning_rate=0.5, weight_decay=0.25, schedule="constant")
      >>> optimizer = make_optimizer(config, num_steps=300, steps_per_epoch=100)
      >>> params = jnp.array([4.0])
      >>> updates, _ = optimizer.update(jnp.array([1.0]), optimizer.init(params), params)
      >>> print(updates)  # -0.5 x (1 + 0.25 x 4)
      [-1.]

    Source: DGL's and SEDONA's settings (SGD with momentum as PyTorch defines it: the
      learning rate multiplies the momentum buffer, the L2 term enters before it).
    Deviation: none.
    """
    if config.name == "adam":
        inner = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    else:
        inner = optax.trace(decay=config.momentum, nesterov=config.nesterov)
    if config.schedule == "step" and config.momentum_at_drop == "reset":
        inner = reset_at(drop_steps(config, steps_per_epoch), inner)
    mask = kernel_mask if config.weight_decay_on == "kernels" else None
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        inner,
        optax.scale_by_learning_rate(make_schedule(config, num_steps, steps_per_epoch)),
    )


def kernel_mask(params: Any) -> Any:
    """True for kernels, False for biases and BatchNorm's scales: by name, then by rank."""

    def is_kernel(path, leaf):
        name = getattr(path[-1], "key", None)
        return name == "kernel" or (name not in ("bias", "scale") and np.ndim(leaf) > 1)

    return jax.tree.map_with_path(is_kernel, params)


def reset_at(steps: list[int], inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Zeroes the inner transformation's state before the updates at the given steps.

    Source: the official DGL code for ImageNet, DDG and the asynchronous study makes a new
      optimizer at each learning-rate drop, so that momentum is lost (REFERENCE: momentum
      reset). The study of auxiliary heads keeps it.
    """

    def init_fn(params):
        return {"count": jnp.zeros([], jnp.int32), "inner": inner.init(params)}

    def update_fn(updates, state, params=None):
        is_reset = jnp.any(jnp.asarray(steps, jnp.int32) == state["count"])
        inner_state = jax.tree.map(
            lambda leaf: jnp.where(is_reset, jnp.zeros_like(leaf), leaf), state["inner"]
        )
        updates, inner_state = inner.update(updates, inner_state, params)
        return updates, {"count": state["count"] + 1, "inner": inner_state}

    return optax.GradientTransformation(init_fn, update_fn)
