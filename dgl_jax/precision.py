"""The precision of float32 matrix products and convolutions, said instead of left to the device."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[str]:
    """Sets the precision of all programs traced within, in every thread.

    Args:
      name: ``default`` leaves JAX's setting alone, which is the platform's fast one unless
        ``JAX_DEFAULT_MATMUL_PRECISION`` says otherwise: TF32 on an NVIDIA GPU, bfloat16 on a TPU,
        float32 on a CPU. ``high`` and ``highest`` as of `jax.default_matmul_precision`: of
        ``highest`` products are float32 everywhere.

    Yields:
      The setting in force.
    """
    before = jax.config.jax_default_matmul_precision
    if name != "default":
        # Of all threads, those of asynchronous workers too: jax.default_matmul_precision is of one.
        jax.config.update("jax_default_matmul_precision", name)
    try:
        yield jax.config.jax_default_matmul_precision or "default"
    finally:
        jax.config.update("jax_default_matmul_precision", before)
