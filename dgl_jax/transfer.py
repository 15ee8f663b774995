"""How an array goes from one block's devices to another's."""

import jax
import jax.numpy as jnp
from jax.sharding import Sharding


def move(x: jax.Array, sharding: Sharding) -> jax.Array:
    """The same array on the devices of ``sharding``. Returns without waiting for a device.

    Args:
      x: any array; activations [B, ...] that are split over a block's devices by the batch.
      sharding: where it goes; its devices may be other ones, and more or fewer.
    """
    # From several devices to another number of them device_put goes through the host and waits.
    if len(x.sharding.device_set) in (1, len(sharding.device_set)):
        return jax.device_put(x, sharding)
    pieces = {shard.index[0].indices(len(x))[:2]: shard.data for shard in x.addressable_shards}
    parts = []
    for device, index in sharding.addressable_devices_indices_map(x.shape).items():
        first, end, _ = index[0].indices(len(x))
        part = [
            jax.device_put(
                jax.lax.slice_in_dim(piece, max(first, start) - start, min(end, stop) - start),
                device,
            )
            for (start, stop), piece in sorted(pieces.items(), key=lambda item: item[0])
            if start < end and first < stop
        ]
        parts.append(part[0] if len(part) == 1 else jnp.concatenate(part))
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)
