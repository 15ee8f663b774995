"""How an array goes from one block's devices to another's."""

import jax
from jax.sharding import Sharding


def move(x: jax.Array, sharding: Sharding) -> jax.Array:
    """The same array on the devices of ``sharding``. Returns without waiting for a device.

    Args:
      x: any array; activations [B, ...] that are split over a block's devices by the batch.
      sharding: where it goes; its devices may be other ones, and more or fewer.
    """
    return jax.device_put(x, sharding)
