"""Decoded sets kept on disk, so that a second run need not decode them again."""

import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging


def cache_dir() -> pathlib.Path:
    """$DGL_JAX_CACHE, else ~/.cache/dgl_jax. The data's own folder may be read-only."""
    return pathlib.Path(os.environ.get("DGL_JAX_CACHE") or "~/.cache/dgl_jax").expanduser()


def load_or_build(key: str, build_fn: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Reads arrays from the cache, or builds them and tries to store them.

    A file that cannot be read is rebuilt; a folder that cannot be written to is not an error.

    Args:
      key: the file's name without ending; whatever changes the arrays must change it.
      build_fn: makes the arrays.

    Returns:
      The arrays by name.
    """
    path = cache_dir() / f"{key}.npz"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return dict(archive)  # reading a member checks its CRC
        except Exception as error:  # noqa: BLE001  a damaged zip raises many kinds
            logging.warning("The cached %s cannot be read (%s): reading the set anew.", path, error)
    arrays = build_fn()
    try:
        _write(path, arrays)
    except OSError as error:
        logging.warning("%s cannot be written (%s): the next run decodes anew.", path, error)
    return arrays


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the file whole or not at all, also when several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}.", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
