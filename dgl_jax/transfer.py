"""How an array goes from one block's devices to another's, within a process or between processes.

A run may have several processes, each with some of the devices. All of them go through the same
steps in the same order; each does what concerns its own devices and has a stand-in, an array
without data, for every array that lives on others.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding


def is_local(sharding: Sharding) -> bool:
    """Whether any of the sharding's devices are this process's."""
    return bool(sharding.addressable_devices)


def stand_in(shape: Sequence[int], dtype: Any, sharding: Sharding) -> jax.Array:
    """An array of which this process has no part: its shape, dtype and devices, and no data."""
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, [], dtype=dtype)


def move(x: jax.Array, sharding: Sharding) -> jax.Array:
    """The same array on the devices of ``sharding``. Returns without waiting for a device.

    All processes must call this, in the same order as their other calls: also those that have
    devices of neither side, as transfers between processes are matched by counting them. The
    first from one process to another waits until both have called it.

    Args:
      x: any array, or the stand-in for one; activations [B, ...] are split over a block's devices
        by the batch. A numpy array is one that every process has.
      sharding: where it goes; its devices may be other ones, and more or fewer.

    Returns:
      The array; its stand-in where no device of ``sharding`` is this process's.
    """
    if not isinstance(x, jax.Array):
        return place(x, sharding)
    is_here = x.sharding.is_fully_addressable and sharding.is_fully_addressable
    if is_here and len(x.sharding.device_set) in (1, len(sharding.device_set)):
        return jax.device_put(x, sharding)
    # From several devices to another number of them device_put goes through the host and waits;
    # between processes it knows only sides that are split alike. So: piece by piece, from one
    # device to one device. The order is the same in every process.
    sources = _rows_by_device(x.sharding, x.shape)
    local_data = {shard.device: shard.data for shard in x.addressable_shards}
    arrived = []
    for device, (start, stop) in _rows_by_device(sharding, x.shape):
        pieces, row = [], start
        while row < stop:
            source, first, end = _holder(sources, row, device.process_index)
            end = min(end, stop)
            shape = (end - row, *x.shape[1:]) if x.shape else ()
            piece = _send(local_data, source, (row - first, end - first), shape, x.dtype, device)
            pieces.append(piece)
            row = end
        if device.process_index == jax.process_index():
            arrived.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces))
    return jax.make_array_from_single_device_arrays(x.shape, sharding, arrived, dtype=x.dtype)


def place(x: jax.Array, sharding: Sharding) -> jax.Array:
    """An array that every process has whole, on those devices of ``sharding`` that are its own.

    Nothing goes from one process to another. As `move` where there is one process.
    """
    if jax.process_count() == 1:
        return move(x, sharding) if isinstance(x, jax.Array) else jax.device_put(x, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        if not is_local(sharding):
            return x  # Nobody uses it; a stand-in can't be a key.
        return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding))
    parts = []
    for device, (start, stop) in _rows_by_device(sharding, x.shape):
        if device.process_index == jax.process_index():
            parts.append(jax.device_put(_slice_rows(x, start, stop), device))
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts, dtype=x.dtype)


def announce(x: jax.Array) -> jax.Array:
    """A scalar, on a device of every process: to wait for, where its own device is another's.

    All processes call it. It returns without waiting for a device.
    """
    if jax.process_count() == 1:
        return x
    first_devices = {device.process_index: device for device in reversed(jax.devices())}
    copies = [move(x, SingleDeviceSharding(first_devices[p])) for p in sorted(first_devices)]
    return copies[jax.process_index()]


def fetch(tree: Any) -> Any:
    """The arrays of a tree as numpy arrays in process 0, which is None in the others.

    All processes call it, with the same tree of arrays and stand-ins; it waits for the arrays.
    Leaves that are not arrays stay as they are.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    first_device = SingleDeviceSharding(jax.devices()[0])
    # Scalars of one block go together: a transfer costs as much for one as for all of them.
    scalars = {}
    for place_in_tree, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and not leaf.shape:
            scalars.setdefault((leaf.sharding, leaf.dtype), []).append(place_in_tree)
    values = list(leaves)
    for (sharding, dtype), places in scalars.items():
        device = min(sharding.device_set, key=lambda device: device.id)
        if device.process_index == jax.process_index():
            packed = _stack([_shard_on(device, leaves[index]) for index in places])
        else:
            packed = stand_in((len(places),), dtype, SingleDeviceSharding(device))
        for index, value in zip(places, _to_first(packed, first_device), strict=True):
            values[index] = np.asarray(value)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and leaf.shape:
            values[index] = _to_first(leaf, first_device)
    return jax.tree.unflatten(structure, values) if jax.process_index() == 0 else None


def _to_first(x: jax.Array, first_device: Sharding) -> Any:
    moved = move(x, first_device)
    # Elsewhere one zero in the array's shape.
    nothing = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return jax.device_get(moved) if is_local(first_device) else nothing


def _shard_on(device: jax.Device, x: jax.Array) -> jax.Array:
    return next(shard.data for shard in x.addressable_shards if shard.device == device)


@jax.jit
def _stack(scalars: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(scalars)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _jitted_slice(x: jax.Array, start: int, stop: int) -> jax.Array:
    return x[start:stop]


def _slice_rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    if isinstance(x, np.ndarray):
        return x[start:stop] if x.shape else x
    return _jitted_slice(x, start, stop) if x.shape and (start, stop) != (0, x.shape[0]) else x


@functools.lru_cache(maxsize=1024)
def _rows_by_device(
    sharding: Sharding, shape: tuple[int, ...]
) -> list[tuple[jax.Device, tuple[int, int]]]:
    """Each device with the rows that it has, in the mesh's order; a scalar counts as a row."""
    rows = []
    for device, index in sharding.devices_indices_map(shape).items():
        rows.append((device, index[0].indices(shape[0])[:2] if index else (0, 1)))
    return rows


def _holder(
    sources: Sequence[tuple[jax.Device, tuple[int, int]]], row: int, process: int
) -> tuple[jax.Device, int, int]:
    """A device that has a row, of that process if one has, and the rows that it has."""
    holders = [(device, first, end) for device, (first, end) in sources if first <= row < end]
    near = [holder for holder in holders if holder[0].process_index == process]
    return (near or holders)[0]


def _send(
    local_data: dict[jax.Device, jax.Array],
    source: jax.Device,
    rows: tuple[int, int],
    shape: tuple[int, ...],
    dtype: Any,
    device: jax.Device,
) -> jax.Array | None:
    """Some rows of what a device has, on another; None within another process.

    Where the devices are of two processes every process calls `device_put`: each numbers the
    transfers that it sees, and sender and receiver must come to the same number.
    """
    if source in local_data:
        piece = _slice_rows(local_data[source], *rows)
    elif source.process_index == device.process_index:
        return None
    else:
        piece = stand_in(shape, dtype, SingleDeviceSharding(source))
    return jax.device_put(piece, SingleDeviceSharding(device))
