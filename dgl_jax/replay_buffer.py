"""What a replay buffer holds: mini-batches of activations, whole or compressed.

The journal version of DGL (2106.06401) compresses buffers, since they are what asynchronous
training costs in memory. Here: float32, bfloat16, or int8 with a scale a channel.
"""

import jax
import jax.numpy as jnp

from dgl_jax.config import ReplayConfig

# A compressed mini-batch: "x", and for int8 "scale".
Encoded = dict[str, jax.Array]


def encode(activations: jax.Array, buffer_dtype: str) -> Encoded:
    """Compresses a mini-batch.

    Args:
      activations: float [B, ..., C].
      buffer_dtype: float32, bfloat16 or int8, see `ReplayConfig`.

    Returns:
      ``x`` in that dtype; for int8 also ``scale``, float32 [C]: the largest absolute value of
      the channel over the mini-batch, divided by 127. The error is at most half a scale.

    Source: ours; the journal version learns a codebook (vector quantization) instead.
    """
    if buffer_dtype != "int8":
        return {"x": activations.astype(buffer_dtype)}
    activations = activations.astype(jnp.float32)
    axes = tuple(range(activations.ndim - 1))
    scale = jnp.max(jnp.abs(activations), axis=axes) / 127
    step = jnp.where(scale > 0, scale, 1).reshape((1,) * len(axes) + (-1,))
    return {"x": jnp.round(activations / step).astype(jnp.int8), "scale": scale}


def decode(encoded: Encoded) -> jax.Array:
    """The mini-batch as float32 [B, ..., C]."""
    x = encoded["x"].astype(jnp.float32)
    if "scale" in encoded:
        x = x * encoded["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
    return x


def slot_shapes(activations: jax.ShapeDtypeStruct, config: ReplayConfig) -> Encoded:
    """The shapes and dtypes of one slot."""
    return jax.eval_shape(lambda x: encode(x, config.buffer_dtype), activations)


def buffer_bytes(activations: jax.ShapeDtypeStruct, config: ReplayConfig) -> int:
    """The memory of one buffer of ``config.buffer_size`` mini-batches, labels included."""
    leaves = jax.tree.leaves(slot_shapes(activations, config))
    labels = 4 * activations.shape[0]
    return config.buffer_size * (labels + sum(x.size * x.dtype.itemsize for x in leaves))
