"""Where a batch lies: the shardings of its parts, and how host arrays get there."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dgl_jax.errors import UserError


def default_sharding() -> Sharding:
    """The first device of this process."""
    return SingleDeviceSharding(jax.local_devices()[0])


def replicated(sharding: Sharding) -> Sharding:
    """The same devices, each with the whole array."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def batch_axis_only(sharding: Sharding) -> Sharding:
    """The same devices and first axis, for arrays such as labels that have no other."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return sharding


def check_divisible(key: str, size: int, sharding: Sharding) -> None:
    """Raises UserError unless a batch of `size` can be divided over the sharding's devices."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return
    axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
    parts = int(np.prod([sharding.mesh.shape[axis] for axis in axes if axis is not None]))
    if size % parts:
        raise UserError(
            f"{key}={size} must be divisible by the {parts} devices that share a batch;"
            f" try {max(size // parts, 1) * parts}"
        )


def put(tree: Any, sharding: Sharding) -> Any:
    """Host arrays to the device, explicitly; every process holds the whole of them."""
    return jax.tree.map(lambda x: _put(np.asarray(x), sharding, np.shape(x), 0), tree)


def put_local_rows(
    rows: np.ndarray, sharding: Sharding, batch_size: int, first_row: int
) -> jax.Array:
    """This process's rows of a batch (see `local_rows`) to the device, as an array of the batch."""
    return _put(rows, sharding, (batch_size, *rows.shape[1:]), first_row)


def _put(x: np.ndarray, sharding: Sharding, shape: tuple[int, ...], first_row: int) -> jax.Array:
    """An array of `shape`, of which this process holds the rows from `first_row` on.

    On devices of several processes each process hands its own devices their parts: there
    `jax.device_put` would compare the values in a collective, a round trip a step, and
    `jax.make_array_from_process_local_data` counts as an implicit transfer.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    parts = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if index:
            start, stop, _ = index[0].indices(shape[0])
            index = (slice(start - first_row, stop - first_row), *index[1:])
        parts.append(jax.device_put(x[index], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def local_rows(sharding: Sharding, batch_size: int) -> tuple[int, int]:
    """The rows [start, stop) of a batch that lie on this process's devices.

    Raises:
      UserError: if there are none, or if they are not neighbours.
    """
    parts = batch_axis_only(sharding).addressable_devices_indices_map((batch_size,))
    spans = {index[0].indices(batch_size)[:2] for index in parts.values()}
    if not spans:
        raise UserError("sharding=... must have devices of this process; load data elsewhere")
    start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
    if sum(span[1] - span[0] for span in spans) != stop - start:
        raise UserError(
            "sharding=... must give each process neighbouring rows of a batch; order the mesh's"
            " devices by process"
        )
    return start, stop
