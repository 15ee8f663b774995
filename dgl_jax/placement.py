"""Which devices a block lives on: meshes and shardings."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgl_jax import distributed
from dgl_jax.config import PlacementConfig
from dgl_jax.errors import UserError
from dgl_jax.transfer import is_local


@dataclasses.dataclass(frozen=True)
class BlockPlacement:
    """Where one block's arrays go.

    Attributes:
      batch: activations, images and labels: split over the mesh along their first axis.
      state: parameters, statistics, optimizer state, random keys: on every device.
    """

    batch: NamedSharding
    state: NamedSharding

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The mesh's, in its order; of every process."""
        return tuple(self.state.mesh.devices.flat)


def make_placements(
    config: PlacementConfig,
    num_blocks: int,
    devices_per_block: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> tuple[BlockPlacement, ...]:
    """Deals devices to blocks.

    Fused: all blocks on one mesh of ``data_parallel`` devices. Pipelined: the devices form
    groups of ``data_parallel``, and consecutive blocks share a group when there are fewer
    groups than blocks. Pipelined with numbers of devices: each block has so many for itself,
    one block's after the other's.

    Args:
      config: what the user asked for.
      num_blocks: K.
      devices_per_block: of each block; empty for the configuration's own, which may be empty too.
      devices: those to choose from; all of the run's, of every process, by default.

    Returns:
      One placement a block.

    Example:
      Three blocks, one program each, on one device.

      >>> config = PlacementConfig(kind="pipelined", num_devices=1)
      >>> placements = make_placements(config, num_blocks=3, devices=jax.devices()[:1])
      >>> [placement.devices == (jax.devices()[0],) for placement in placements]
      [True, True, True]

    Raises:
      UserError: if there are too few devices, or not as many numbers as blocks.
    """
    devices = list(jax.devices() if devices is None else devices)
    devices_per_block = tuple(devices_per_block or config.devices_per_block)
    wanted = config.num_devices or config.data_parallel
    if wanted > len(devices):
        name = "num_devices" if config.num_devices else "data_parallel"
        raise UserError(
            f"config.placement.{name}={wanted} exceeds the {len(devices)} "
            f"{devices[0].platform} device(s) at hand; try {len(devices)}"
        )
    if devices_per_block:
        return _deal(devices_per_block, num_blocks, devices)
    if config.kind == "fused":
        num_groups = 1
    else:
        num_groups = (config.num_devices or len(devices)) // config.data_parallel
    num_groups = min(num_groups, num_blocks)
    groups = [
        devices[group * config.data_parallel : (group + 1) * config.data_parallel]
        for group in range(num_groups)
    ]
    placements = [_place(group) for group in groups]
    return tuple(placements[block * num_groups // num_blocks] for block in range(num_blocks))


def over_all(config: PlacementConfig) -> PlacementConfig:
    """One mesh of all devices asked for: ``num_devices``, or as many as there are where that is 0.

    For method data_parallel, whose user names no ``data_parallel``.

    Example:
      >>> config = over_all(PlacementConfig(num_devices=4))
      >>> config.num_devices, config.data_parallel
      (4, 4)
    """
    num_devices = config.num_devices or len(jax.devices())
    return dataclasses.replace(config, num_devices=num_devices, data_parallel=num_devices)


def request_cpu_devices(config: PlacementConfig) -> None:
    """On a host without accelerators, makes the CPU appear as as many devices as asked for.

    Of several processes each has its share. Must run before anything touches a device; later it
    has no effect.
    """
    wanted = max(config.num_devices, config.data_parallel, sum(config.devices_per_block))
    if wanted > 1:
        try:
            jax.config.update("jax_num_cpu_devices", -(-wanted // distributed.num_processes()))
        except RuntimeError:  # Devices exist already; make_placements checks their number.
            pass


def check_processes(placements: Sequence[BlockPlacement]) -> None:
    """Checks that the processes of a run can work together.

    Raises:
      UserError: if the devices of the blocks leave out a process, or these are CPUs that were not
        prepared to send arrays from one process to another.
    """
    if (
        distributed.num_processes() > 1
        and placements[0].devices[0].platform == "cpu"
        and not distributed.is_for_cpus()
    ):
        raise UserError(
            f"--num_processes={distributed.num_processes()}: the only devices are CPUs, which send "
            "nothing to another process unless that is known from the start; set JAX_PLATFORMS=cpu "
            "in the environment of every process"
        )
    having = {device.process_index for where in placements for device in where.devices}
    idle = sorted(set(range(distributed.num_processes())) - having)
    if idle:
        raise UserError(
            f"--num_processes={distributed.num_processes()}: process {', '.join(map(str, idle))} "
            "has none of the devices that blocks live on; start fewer processes, or raise "
            "config.placement.num_devices"
        )


def check_meshes(placements: Sequence[BlockPlacement]) -> None:
    """Checks that each block's devices can work together, by compiling a sum over them.

    Not every set of devices can: on a TPU that is for its network and its compiler to say.

    Raises:
      UserError: if those of a block can't.
    """
    for where in dict.fromkeys(placements):
        num_devices = len(where.devices)
        if num_devices == 1 or not is_local(where.state):
            continue
        x = jax.ShapeDtypeStruct((num_devices,), jnp.float32, sharding=where.batch)
        try:
            jax.jit(jnp.sum, out_shardings=where.state).lower(x).compile()
        except jax.errors.JaxRuntimeError as error:
            blocks = [k for k, other in enumerate(placements) if other == where]
            raise UserError(
                f"config.placement: the {num_devices} devices of block {blocks[0]}, "
                f"{', '.join(map(str, where.devices))}, can't work together "
                f"({' '.join(str(error).split())[:200]}); choose other numbers of devices, such as "
                "config.placement.data_parallel=1"
            ) from error


def _deal(
    devices_per_block: tuple[int, ...], num_blocks: int, devices: Sequence[jax.Device]
) -> tuple[BlockPlacement, ...]:
    given = f"config.placement.devices_per_block={devices_per_block}"
    if len(devices_per_block) != num_blocks:
        raise UserError(
            f"{given} must have a number for each block; give {num_blocks} for {num_blocks} blocks"
        )
    ends = list(itertools.accumulate(devices_per_block))
    if ends[-1] > len(devices):
        raise UserError(
            f"{given} makes {ends[-1]}, which exceeds the {len(devices)} {devices[0].platform} "
            f"device(s) at hand; give numbers that make {len(devices)} or fewer"
        )
    return tuple(_place(devices[first:end]) for first, end in itertools.pairwise([0, *ends]))


def _place(devices: Sequence[jax.Device]) -> BlockPlacement:
    # Auto axes: the compiler spreads a block's program over its mesh. Not jax.make_mesh, which
    # wants the devices of a TPU to be a box: of four in a square not the second and the third.
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    return BlockPlacement(
        batch=NamedSharding(mesh, PartitionSpec("data")), state=NamedSharding(mesh, PartitionSpec())
    )
