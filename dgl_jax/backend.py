"""What to say where jax can't have the devices that it was told to use."""

import jax

from dgl_jax import distributed


def failure(error: Exception) -> str | None:
    """The user's mistake behind an error, in a line, if it is that a backend did not start.

    Devices are not tried beforehand: a script that only starts others would take them away.

    Args:
      error: what a program failed with.

    Returns:
      What failed, what is at hand and the remedy; None for an error of any other kind.
    """
    platforms = jax.config.jax_platforms
    if "Unable to initialize backend" in str(error):
        reason = str(error).partition(" (")[0].rstrip(".")  # What follows is jax's own remedy.
    elif isinstance(error, AssertionError) and not _starts():
        reason = "no NVIDIA GPU is visible"  # jax passes over CUDA then, and asserts the rest.
    else:
        return None
    if not platforms:
        return f"JAX_PLATFORMS is not set, and {reason}; try JAX_PLATFORMS=cpu"
    at_hand = ""
    if distributed.num_processes() == 1:  # Backends of several processes wait for one another.
        jax.config.update("jax_platforms", "")
        if _starts():
            at_hand = f"this host has {len(jax.devices())} {jax.devices()[0].platform} device(s); "
    return (
        f"JAX_PLATFORMS={platforms} can't be used: {reason}; {at_hand}unset JAX_PLATFORMS, or "
        "install jax for that platform (requirements-cuda.txt, requirements-tpu.txt)"
    )


def _starts() -> bool:
    try:
        return bool(jax.devices())
    except (AssertionError, RuntimeError):
        return False
