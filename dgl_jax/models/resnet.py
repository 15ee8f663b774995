"""Residual networks: every layer is one residual block; the stem is part of the first."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgl_jax.models.layers import (
    Conv,
    batch_norm,
    he_normal_fan_out,
    scaled_width,
    torch_default_init,
)
from dgl_jax.models.network import Network

_STAGE_SIZES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(
    depth: int, num_classes: int, form: str, width_factor: float = 1.0, dtype=None
) -> Network:
    """ResNet-18, 50, 101 or 152 (8, 16, 33 or 50 layers), widths 64-128-256-512.

    ResNet-18 has basic blocks, the others bottlenecks with the stride on the 3x3 (v1.5);
    where a block changes the shape, its shortcut is a 1x1 convolution and BatchNorm.

    Args:
      depth: 18, 50, 101 or 152.
      num_classes: the output's width.
      form: the stem: ``cifar`` 3x3; ``tiny_imagenet`` 7x7 of stride 2; ``imagenet`` 7x7 of
        stride 2 and a max pool 3x3 of stride 2.
      width_factor: multiplies all channels. SEDONA's CIFAR networks are 0.25.
      dtype: of the computation; None for the promoted dtype of input and parameters.

    Example:
      >>> network = resnet(18, num_classes=10, form="cifar", width_factor=0.25)
      >>> network.name, len(network.layers)
      ('resnet18', 8)

    Source: DGL Table 3; SEDONA's tables.
    Deviation: SEDONA's code draws all weights from He's normal by fan-in; here, unless
      ``network.kernel_init=he_normal``, convolutions go by fan-out and the linear layer starts as
      torch's does.
    """
    block = BasicBlock if depth == 18 else BottleneckBlock
    return _staged_network(
        f"resnet{depth}",
        num_classes,
        [scaled_width(width, width_factor) for width in (64, 128, 256, 512)],
        _STAGE_SIZES[depth],
        lambda width, stride: block(width, stride, dtype=dtype),
        form,
        dtype,
    )


def resnet110(num_classes: int, dtype=None) -> Network:
    """CIFAR's ResNet-110: three stages of 18 basic blocks, widths 16-32-64; 54 layers.

    Its shortcuts have no parameters ("option A").

    Source: DGL Table 2 (the comparison with DDG).
    Deviation: none.
    """
    return _staged_network(
        "resnet110",
        num_classes,
        (16, 32, 64),
        (18, 18, 18),
        lambda width, stride: BasicBlock(width, stride, projection=False, dtype=dtype),
        "cifar",
        dtype,
    )


def _staged_network(name, num_classes, widths, stage_sizes, make_block, form, dtype) -> Network:
    """The first block of every stage but the first has stride 2."""
    layers = []
    for stage_index, (width, size) in enumerate(zip(widths, stage_sizes, strict=True)):
        for index_in_stage in range(size):
            stride = 2 if stage_index > 0 and index_in_stage == 0 else 1
            layers.append(make_block(width, stride))
    layers[0] = StemAndBlock(Stem(widths[0], form, dtype), layers[0])
    return Network(name, layers, AveragePoolHead(num_classes, dtype))


def _convolution(features: int, kernel: int, stride: int = 1, dtype=None) -> nn.Conv:
    return Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=he_normal_fan_out,
        dtype=dtype,
    )


class Stem(nn.Module):
    """Convolution, BatchNorm, ReLU [, MaxPool 3x3 of stride 2]."""

    features: int
    form: str
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel, stride = (3, 1) if self.form == "cifar" else (7, 2)
        x = _convolution(self.features, kernel, stride, self.dtype)(x)
        x = nn.relu(batch_norm(train, self.dtype)(x))
        if self.form == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return x


class StemAndBlock(nn.Module):
    """The first layer: the stem, then the first residual block.

    Source: SEDONA counts layers so; DGL counts the stem as one more.
    """

    stem: nn.Module
    block: nn.Module

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.block(self.stem(x, train), train)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, H, W, C] to [B, H/stride, W/stride, features].

    Attributes:
      features: the output's channels.
      stride: of the first convolution.
      projection: whether a shortcut that changes the shape is a 1x1 convolution; if not, it
        takes every second pixel and appends channels of zeros.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    features: int
    stride: int = 1
    projection: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = _convolution(self.features, 3, self.stride, self.dtype)(x)
        y = nn.relu(batch_norm(train, self.dtype)(y))
        y = _convolution(self.features, 3, dtype=self.dtype)(y)
        y = batch_norm(train, self.dtype)(y)
        if x.shape != y.shape and self.projection:
            x = _convolution(self.features, 1, self.stride, self.dtype)(x)
            x = batch_norm(train, self.dtype)(x)
        elif x.shape != y.shape:
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the output has 4 * features channels.

    Attributes:
      features: the channels of the 3x3 convolution.
      stride: of the 3x3 convolution.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = _convolution(self.features, 1, dtype=self.dtype)(x)
        y = nn.relu(batch_norm(train, self.dtype)(y))
        y = _convolution(self.features, 3, self.stride, self.dtype)(y)
        y = nn.relu(batch_norm(train, self.dtype)(y))
        y = _convolution(4 * self.features, 1, dtype=self.dtype)(y)
        y = batch_norm(train, self.dtype)(y)
        if x.shape != y.shape:
            x = _convolution(4 * self.features, 1, self.stride, self.dtype)(x)
            x = batch_norm(train, self.dtype)(x)
        return nn.relu(x + y)


class AveragePoolHead(nn.Module):
    """Global average pool, Linear."""

    num_classes: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=torch_default_init, dtype=self.dtype)(x)
