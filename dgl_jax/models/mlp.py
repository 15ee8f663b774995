"""PredSim's fully connected network: hidden layers of one width, cut after each."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgl_jax.models.layers import batch_norm, torch_default_init
from dgl_jax.models.network import Network


def mlp(
    num_classes: int,
    dtype=None,
    width: int = 1024,
    *,
    dropout: float = 0.0,
    zero_head: bool = False,
) -> Network:
    """Three hidden layers, and a fourth that only drops out: cut before it, the head is a block.

    Each hidden layer is Linear, BatchNorm, LeakyReLU of slope 0.01. What one hands on is dropped
    out by the next, so that its own auxiliary head sees all of it.

    Args:
      num_classes: the logits' width.
      dtype: of the computation; None for the promoted dtype of input and parameters.
      width: of the hidden layers.
      dropout: the rate.
      zero_head: whether the head's kernel starts at zero, as in PredSim's local training.

    Source: PredSim (Nokland and Eidnes, ICML 2019), the networks of its MNIST rows.
    Deviation: none but `torch_default_init`'s zero biases.
    """
    layers = [HiddenLayer(width, dropout if index else 0.0, dtype) for index in range(3)]
    kernel_init = nn.initializers.zeros if zero_head else torch_default_init
    head = nn.Dense(num_classes, kernel_init=kernel_init, dtype=dtype)
    return Network("mlp", [*layers, Dropout(dropout)], head)


class Dropout(nn.Module):
    """Dropout by the ``train`` argument."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not train)(x)


class HiddenLayer(nn.Module):
    """Flatten, dropout, Linear, BatchNorm, LeakyReLU: [B, ...] to [B, features].

    Attributes:
      features: the output's width.
      dropout: the rate at which the input is dropped.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    features: int
    dropout: float
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.features, kernel_init=torch_default_init, dtype=self.dtype)(x)
        return nn.leaky_relu(batch_norm(train, self.dtype)(x), 0.01)
