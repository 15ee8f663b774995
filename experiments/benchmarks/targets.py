"""Devices to compile for that need not be there: a TPU's by its topology, a GPU's by its description.

targets/NAME.txt describes the GPU called NAME: a text-format `xla.GpuTargetConfigProto`, as
``--xla_gpu_target_config_filename`` takes it.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib

import jax

from dgl_jax.errors import UserError

_FOLDER = pathlib.Path(__file__).with_name("targets")
# GPUs of one host.
_NUM_GPUS = 8
_NUM_CPU_DEVICES = 8
# Of a topology like v5e:2x2.
_TPU_KINDS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x")


def devices(target: str) -> list[jax.Device]:
    """The devices of a target, those of a process after one another.

    This process uses no device but the CPU from then on.

    Args:
      target: the name of a file in targets/, a TPU's topology such as ``v5e:2x2``, or ``cpu``.

    Raises:
      UserError: for an unknown target, or one whose compiler is not installed.
    """
    check(target)
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        with contextlib.suppress(RuntimeError):  # There are devices already.
            jax.config.update("jax_num_cpu_devices", _NUM_CPU_DEVICES)
        return jax.devices()
    from jax.experimental import topologies  # Needs a fifth of a second.

    if is_gpu(target):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=(_FOLDER / f"{target}.txt").read_text(),
            topology=f"1x1x{_NUM_GPUS}",  # Slices, hosts of each, GPUs of each host.
        ).devices
    else:
        # So that libtpu looks for no TPU to describe itself.
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("TPU_WORKER_ID", "0"),
        ):
            os.environ.setdefault(name, value)
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"--target={target} is no topology that libtpu knows ({_first_line(error)}); try "
                "v5e:2x2"
            ) from error
    return sorted(found, key=lambda device: (device.process_index, device.id))


def check(target: str) -> None:
    """Raises UserError for an unknown target, or one whose compiler is not installed."""
    names = sorted(path.stem for path in _FOLDER.glob("*.txt"))
    kind, _, shape = target.partition(":")
    if target == "cpu":
        return
    if is_gpu(target):
        needed, kind = "jax_cuda13_plugin", "cuda"
    elif kind in _TPU_KINDS and shape:
        needed, kind = "libtpu", "tpu"
    else:
        raise UserError(
            f"--target={target} is unknown; choose from {', '.join(names)}, cpu, or a TPU's "
            "topology such as v5e:2x2"
        )
    if importlib.util.find_spec(needed) is None:
        raise UserError(
            f"--target={target} needs {needed}, which is not installed; run pip install -r "
            f"requirements-aot-{kind}.txt"
        )


def is_gpu(target: str) -> bool:
    """Whether a file of targets/ describes it."""
    return (_FOLDER / f"{target}.txt").exists()


def versions(target: str) -> dict[str, str]:
    """What decides how a program is compiled for the target."""
    names = ["jax", "jaxlib", "flax"]
    if target != "cpu":
        names += ["jax-cuda13-plugin", "nvidia-cudnn-cu13"] if is_gpu(target) else ["libtpu"]
    return {name: importlib.metadata.version(name) for name in names}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
