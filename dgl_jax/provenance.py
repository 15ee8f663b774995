"""What made a run: the commit, the versions, the device and the threads."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance() -> dict[str, Any]:
    """Returns what decides a run's numbers and speed beside its configuration.

    Returns:
      ``commit`` of the checkout that the package lies in (``+changes`` if files differ from it;
      None outside a checkout), ``versions`` of Python and the packages, ``platform`` (cpu, gpu or
      tpu), ``device_kind``, ``num_devices`` of all processes, the ``precision`` of matrix products,
      and ``num_threads``: the CPU cores that this process may use.
    """
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "precision": jax.config.jax_default_matmul_precision or "default",
        "num_threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def _commit() -> str | None:
    package = pathlib.Path(__file__).resolve().parent

    def git(*arguments):
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", __file__):  # Installed inside another project's checkout.
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
