"""VGG networks with BatchNorm: every layer is one convolution, BatchNorm and ReLU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgl_jax.models.layers import ConvBNReLU, he_normal_fan_out, max_pool_2x2, scaled_width
from dgl_jax.models.network import Network

# The number of convolutions of each width, by depth.
_GROUP_SIZES = {13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_GROUP_WIDTHS = (64, 128, 256, 512, 512)


def vgg(
    depth: int,
    num_classes: int,
    form: str,
    width_factor: float = 1.0,
    dropout: float = 0.0,
    dtype=None,
) -> Network:
    """VGG-13, 16 or 19 (10, 13 or 16 layers) with BatchNorm.

    A group's pool opens the next group's first layer; the last group's opens the head.
    SEDONA's CIFAR networks are ``width_factor=0.25``: 16-32-64-128-128, linear layers of
    1024.

    Args:
      depth: 13, 16 or 19.
      num_classes: the output's width.
      form: ``imagenet`` draws linear weights from N(0, 0.01), as DGL; ``cifar`` and
        ``tiny_imagenet`` from He's normal, as SEDONA.
      width_factor: multiplies all channels and the head's hidden width.
      dropout: the rate after each hidden layer of the head.
      dtype: of the computation; None for the promoted dtype of input and parameters.

    Example:
      >>> network = vgg(19, num_classes=10, form="cifar", width_factor=0.25)
      >>> network.name, len(network.layers)
      ('vgg19', 16)

    Source: DGL Table 3 (no dropout); SEDONA's CIFAR-10 and Tiny-ImageNet tables.
    Deviation: SEDONA's code draws convolutions from He's normal by fan-in, here it is fan-out
      unless ``network.kernel_init=he_normal``.
    """
    layers = []
    for group_index, (size, width) in enumerate(
        zip(_GROUP_SIZES[depth], _GROUP_WIDTHS, strict=True)
    ):
        for index_in_group in range(size):
            layers.append(
                ConvBNReLU(
                    scaled_width(width, width_factor),
                    pool=group_index > 0 and index_in_group == 0,
                    kernel_init=he_normal_fan_out,
                    dtype=dtype,
                )
            )
    head = VGGHead(
        num_classes,
        hidden=scaled_width(4096, width_factor),
        dropout=dropout,
        imagenet_init=form == "imagenet",
        dtype=dtype,
    )
    return Network(f"vgg{depth}", layers, head)


class VGGHead(nn.Module):
    """MaxPool 2x2, flatten, twice (Linear, ReLU, dropout), Linear."""

    num_classes: int
    hidden: int
    dropout: float = 0.0
    imagenet_init: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        init = nn.initializers.normal(0.01) if self.imagenet_init else he_normal
        x = max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden, kernel_init=init, dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype)(x)
