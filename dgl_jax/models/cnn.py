"""DGL's own small networks: every layer is one convolution, BatchNorm and ReLU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgl_jax.models.layers import ConvBNReLU, PooledMLP, torch_default_init
from dgl_jax.models.network import Network


def cnn6(num_classes: int, dtype=None, width: int = 128) -> Network:
    """Six layers: on 32x32 images 128@32, 256@16, 256@16, 512@8, 512@8, 512@8.

    Example:
      >>> network = cnn6(num_classes=10)
      >>> [(layer.features, layer.pool) for layer in network.layers[:3]]
      [(128, False), (256, True), (256, False)]

    Source: DGL Table 1 (the comparison of auxiliary heads).
    Deviation: none but `torch_default_init`'s zero biases, here and below.
    """
    return _pooling_network(
        "cnn6", num_classes, width, num_layers=6, pooled_layers=(1, 3), dtype=dtype
    )


def cnn4(num_classes: int, dtype=None, width: int = 64) -> Network:
    """Four layers: on 32x32 images 64@32, 128@16, 128@16, 256@8.

    Source: DGL Figures 3 and 4, as the shipped code and logs have it (the text says six
    layers).
    """
    return _pooling_network(
        "cnn4", num_classes, width, num_layers=4, pooled_layers=(1, 3), dtype=dtype
    )


def cnn6_async(num_classes: int, dtype=None, width: int = 128) -> Network:
    """Six layers: on 32x32 images 128@32 twice, 256@16 twice, 512@8 twice.

    No convolution bias, and three hidden layers in the head, as the MLP auxiliary head.

    Source: DGL Figures 5 and 6 (asynchronous training with replay).
    """
    return _pooling_network(
        "cnn6_async",
        num_classes,
        width,
        num_layers=6,
        pooled_layers=(2, 4),
        use_bias=False,
        num_hidden=3,
        dtype=dtype,
    )


def _pooling_network(
    name: str,
    num_classes: int,
    width: int,
    *,
    num_layers: int,
    pooled_layers: tuple[int, ...],
    use_bias: bool = True,
    num_hidden: int = 2,
    dtype=None,
) -> Network:
    """``pooled_layers`` begin with a 2x2 max pool, and the width doubles there."""
    layers = []
    for layer_index in range(num_layers):
        pool = layer_index in pooled_layers
        width *= 2 if pool else 1
        layers.append(ConvBNReLU(width, use_bias=use_bias, pool=pool, dtype=dtype))
    return Network(name, layers, PooledMLP(num_classes, num_hidden, dtype=dtype))


def dni_cnn(num_classes: int, dtype=None, width: int = 128) -> Network:
    """Three 5x5 layers, each closed by a pool of 3: on 32x32 images 128@10, 128@3, 128@1.

    The pools are max, average, average; they close the layer, because the synthetic
    gradients of the comparison are made for what comes after them. The fourth layer only
    flattens: a cut before it leaves a block of the linear head alone, as DNI has it there.
    DGL's blocks there are three: ``partition.cuts=(0, 1)``.

    Source: DGL Figure 2 (the comparison with decoupled neural interfaces).
    """
    layers = [DNILayer(width, pool, dtype) for pool in ("max", "average", "average")]
    head = nn.Dense(num_classes, kernel_init=torch_default_init, dtype=dtype)
    return Network("dni_cnn", [*layers, Flatten()], head)


class DNILayer(nn.Module):
    """Convolution 5x5, BatchNorm, ReLU, pool 3x3 of stride 3."""

    features: int
    pool: str
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = ConvBNReLU(self.features, kernel=5, dtype=self.dtype)(x, train)
        pool = {"max": nn.max_pool, "average": nn.avg_pool}[self.pool]
        return pool(x, (3, 3), (3, 3))


class Flatten(nn.Module):
    """[B, H, W, C] to [B, H * W * C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)
