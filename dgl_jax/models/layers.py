"""The pieces that networks and auxiliary heads share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.models.convolution import conv_general_dilated

# PyTorch's default for Linear and Conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
# Deviation: PyTorch draws biases from the same range; here they start at zero.
torch_default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)


def batch_norm(train: bool, dtype=None) -> nn.BatchNorm:
    """BatchNorm as PyTorch's default: running averages move by 0.1, epsilon 1e-5.

    Deviation: the running variance is the batch's biased one; PyTorch's is unbiased.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)


def scaled_width(width: int, width_factor: float) -> int:
    """A number of channels times ``width_factor``, at least 1."""
    return max(1, round(width * width_factor))


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Max pool of 2x2 with stride 2: [B, H, W, C] to [B, H // 2, W // 2, C].

    Written as three comparisons: on the CPU, XLA's own max pool has a backward pass nine times
    slower. The gradient goes to the first of equal maxima, as XLA's and PyTorch's does.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(lambda a, b: jnp.where(a < b, b, a), corners)


def adaptive_avg_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average pooling to a given output size.

    Output i averages the inputs from floor(i*in/out) up to ceil((i+1)*in/out), in each
    dimension: neighbouring bins overlap where the sizes do not divide.

    Args:
      x: [B, H, W, C].
      size: the output's height and width.

    Returns:
      [B, h, w, C], ``x``'s dtype.

    Example:
      A 3x3 map to 2x2: neighbouring bins share the middle row and column.

      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> print(adaptive_avg_pool(x, (2, 2))[0, :, :, 0])
      [[2. 3.]
       [5. 6.]]

    Source: PyTorch's adaptive_avg_pool2d.
    Deviation: an output larger than the input is clamped to the input's size: a 1x1 map
      stays 1x1 instead of being repeated.
    """
    batch, height, width, channels = x.shape
    out_height, out_width = min(size[0], height), min(size[1], width)
    if 0 not in x.shape and height % out_height == 0 and width % out_width == 0:
        bins = (batch, out_height, height // out_height, out_width, width // out_width, channels)
        return jnp.mean(x.reshape(bins), axis=(2, 4))
    rows = jnp.asarray(_averaging_matrix(height, out_height), x.dtype)
    columns = jnp.asarray(_averaging_matrix(width, out_width), x.dtype)
    return jnp.einsum("bhwc,ph,qw->bpqc", x, rows, columns)


def _averaging_matrix(size: int, out_size: int) -> np.ndarray:
    """[out_size, size]: each row averages one bin."""
    matrix = np.zeros((out_size, size))
    for i in range(out_size):
        start, stop = i * size // out_size, -(-(i + 1) * size // out_size)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


class ConvBNReLU(nn.Module):
    """[MaxPool 2x2], convolution, BatchNorm, ReLU: [B, H, W, C] to [B, H', W', features].

    The pool opens the layer, so that the auxiliary head of the layer below sees the
    un-pooled map.

    Source: DGL's networks (the pool's place: REFERENCE section 11).

    Attributes:
      features: the output's channels.
      kernel: the kernel's height and width; the convolution keeps the image's size.
      use_bias: whether the convolution has a bias.
      pool: whether the layer begins with a 2x2 max pool.
      kernel_init: the kernel's initialiser.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    features: int
    kernel: int = 3
    use_bias: bool = True
    pool: bool = False
    kernel_init: nn.initializers.Initializer = torch_default_init
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.pool:
            x = max_pool_2x2(x)
        x = Conv(
            self.features,
            (self.kernel, self.kernel),
            padding=self.kernel // 2,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )(x)
        return nn.relu(batch_norm(train, self.dtype)(x))


class PooledMLP(nn.Module):
    """Average pool to 2x2, flatten, hidden layers (Linear, BatchNorm, ReLU), Linear.

    Each hidden layer is as wide as the flattened map, 4*C. The pool is skipped for
    activations [B, F]; for [B, T, F] it is the mean over T; hidden layers then have F.

    Source: the DGL paper's MLP head (Table 1) and the last head of its networks.
    Deviation: maps smaller than 2x2 are not enlarged, so the hidden width is less there.

    Attributes:
      num_classes: the output's width.
      num_hidden: the number of hidden layers.
      max_hidden: a cap on the hidden layers' width; 0 for none.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    num_hidden: int
    max_hidden: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if x.ndim == 4:
            x = adaptive_avg_pool(x, (2, 2))
            x = x.reshape(x.shape[0], -1)
        elif x.ndim > 2:
            x = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        hidden = min(x.shape[-1], self.max_hidden or x.shape[-1])
        for _ in range(self.num_hidden):
            x = nn.Dense(hidden, kernel_init=torch_default_init, dtype=self.dtype)(x)
            x = nn.relu(batch_norm(train, self.dtype)(x))
        return nn.Dense(self.num_classes, kernel_init=torch_default_init, dtype=self.dtype)(x)
