"""Replay buffers in device memory: rings of mini-batches of activations, whole or compressed.

The journal version of DGL (2106.06401) compresses buffers, since they are what asynchronous
training costs in memory. Here: float32, bfloat16, or int8 with a scale a channel.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dgl_jax.config import ReplayConfig
from dgl_jax.errors import UserError
from dgl_jax.placement import BlockPlacement

# A compressed mini-batch: "x", and for int8 "scale".
Encoded = dict[str, jax.Array]
# M compressed mini-batches, stacked along a new first axis, and "labels", int32 [M, B].
Buffer = dict[str, jax.Array]


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


def buffer_shapes(activations: jax.ShapeDtypeStruct, config: ReplayConfig) -> Buffer:
    """The shapes and dtypes of a buffer.

    Args:
      activations: of the mini-batches in it, [B, ..., C].
      config: its ``buffer_size`` (M) and ``buffer_dtype``.
    """
    slot = jax.eval_shape(lambda x: encode(x, config.buffer_dtype), activations)
    slot["labels"] = jax.ShapeDtypeStruct(activations.shape[:1], jnp.int32)
    stack = lambda leaf: jax.ShapeDtypeStruct((config.buffer_size, *leaf.shape), leaf.dtype)
    return jax.tree.map(stack, slot)


def buffer_shardings(placement: BlockPlacement, config: ReplayConfig) -> Buffer:
    """Where a buffer lives: split along its mini-batches' examples, as the mini-batches are."""
    split = NamedSharding(placement.batch.mesh, PartitionSpec(None, *placement.batch.spec))
    shardings = {"x": split, "labels": split}
    return shardings | ({"scale": placement.state} if config.buffer_dtype == "int8" else {})


def check_memory(
    activations: Sequence[jax.ShapeDtypeStruct],
    config: ReplayConfig,
    devices: Sequence[jax.Device],
) -> None:
    """Says in a line what memory the buffers take.

    Args:
      activations: of the mini-batches in each buffer, [B, ..., C].
      config: what the user asked for.
      devices: where the buffers will live.

    Raises:
      UserError: if the devices have less memory than that; unknown on the CPU.
    """
    sizes = [nbytes(buffer_shapes(x, config)) for x in activations]
    each = ", ".join(f"{size / 2**30:.3g}" for size in sizes)
    from tqdm import auto as tqdm

    tqdm.tqdm.write(
        f"replay buffers: {len(sizes)} of {config.buffer_size} mini-batches in "
        f"{config.buffer_dtype}: {sum(sizes) / 2**30:.3g} GiB ({each})",
        file=sys.stderr,
    )
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if all(limits) and sum(sizes) > sum(limits):
        half = max(1, config.buffer_size * sum(limits) // sum(sizes) // 2)
        raise UserError(
            f"config.replay.buffer_size={config.buffer_size} takes {sum(sizes) / 2**30:.3g} GiB "
            f"in {config.buffer_dtype}, more than the {sum(limits) / 2**30:.3g} GiB of "
            f"{len(limits)} {devices[0].device_kind} device(s); try {half}, or another "
            "config.replay.buffer_dtype"
        )


def init_buffers(
    activations: Sequence[jax.ShapeDtypeStruct], config: ReplayConfig, placement: BlockPlacement
) -> tuple[Buffer, ...]:
    """Makes empty buffers on the devices, after `check_memory`.

    Args:
      activations: of the mini-batches in each buffer, [B, ..., C].
      config: what the user asked for.
      placement: of all blocks.
    """
    check_memory(activations, config, placement.devices)
    shapes = [buffer_shapes(x, config) for x in activations]
    zeros = lambda: tuple(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), buffer) for buffer in shapes
    )
    shardings = (buffer_shardings(placement, config),) * len(shapes)
    return jax.jit(zeros, out_shardings=shardings)()


def nbytes(buffer: Buffer) -> int:
    """The memory of a buffer of arrays or shapes, labels included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))


def read(buffer: Buffer, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mini-batch in a slot: activations, float32 [B, ..., C], and labels, int32 [B]."""
    held = {
        name: _from_bits(jax.lax.dynamic_index_in_dim(_bits(leaf), slot, keepdims=False), leaf)
        for name, leaf in buffer.items()
    }
    return decode(held), held["labels"]


def write(buffer: Buffer, slot: jax.Array, activations: jax.Array, labels: jax.Array) -> Buffer:
    """The buffer with a mini-batch in that slot; in place where it is donated.

    Example:
      >>> config = ReplayConfig(buffer_size=3, buffer_dtype="int8")
      >>> shapes = buffer_shapes(jax.ShapeDtypeStruct((2, 1), jnp.float32), config)
      >>> buffer = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      >>> buffer = write(buffer, 1, jnp.array([[1.27], [0.503]]), jnp.array([4, 7]))
      >>> activations, labels = read(buffer, 1)
      >>> print(activations.ravel().round(4), labels)  # In steps of 1.27 / 127.
      [1.27 0.5 ] [4 7]
    """
    held = encode(activations, buffer["x"].dtype.name) | {"labels": labels}
    return {
        name: _from_bits(
            jax.lax.dynamic_update_index_in_dim(_bits(leaf), _bits(held[name]), slot, axis=0), leaf
        )
        for name, leaf in buffer.items()
    }


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16: the CPU compiler would widen a whole buffer to float32 and back."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, like.dtype) if x.dtype != like.dtype else x
