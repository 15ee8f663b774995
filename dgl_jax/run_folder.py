"""A run's folder: whether it can be gone on with, and its summary."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from dgl_jax.config import Config, SearchConfig, check_same_run
from dgl_jax.errors import UserError
from dgl_jax.metrics import write_atomically


def previous_run(config: Config | SearchConfig, workdir: str) -> dict[str, Any] | None:
    """Makes the folder, or finds what an earlier run has left in it.

    Args:
      config: the present configuration.
      workdir: the folder.

    Returns:
      None for a new run; else ``{"config": ..., "summary": ...}``, the files as loaded.

    Raises:
      UserError: the folder can't be made, its files can't be read, or its run is another.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workdir={workdir} cannot be made ({error.strerror}); choose another --workdir"
        ) from error
    previous = read_json(workdir, "config")
    if previous is None:
        return None
    is_search = isinstance(config, SearchConfig)
    if ("search" in previous) != is_search:
        raise UserError(
            f"workdir={workdir} holds a {'run of training' if is_search else 'search'}; "
            "choose another --workdir"
        )
    check_same_run(config, previous, workdir)
    # A run killed at its very start has no summary yet.
    return {"config": previous, "summary": read_json(workdir, "summary") or {}}


def check_writable(workdir: str) -> None:
    """Checks that a run may write into its folder.

    Raises:
      UserError: it may not.
    """
    if not os.access(workdir, os.W_OK):
        raise UserError(f"workdir={workdir} cannot be written; choose another --workdir")


def read_json(workdir: str, name: str) -> dict[str, Any] | None:
    """``config`` or ``summary``, as a run has written it; None where there is none.

    Raises:
      UserError: it can't be read.
    """
    path = os.path.join(workdir, f"{name}.json")
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); put back what the run wrote, or choose "
            "another --workdir"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must be one JSON object; put back what the run wrote, or choose another "
            "--workdir"
        )
    return content


def write_summary(workdir: str, summary: dict[str, Any]) -> None:
    """Writes summary.json in one step."""
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomically(os.path.join(workdir, "summary.json"), text)


def extra(name: str, make: Callable[[], Any]) -> Any:
    """What a finished run can do without: ``make()``.

    Returns:
      What ``make`` returns; where it fails, {}, and a line on stderr says so.
    """
    try:
        return make()
    except Exception as error:  # noqa: BLE001 the run is finished, whatever it is
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: {name} failed; the run is finished without it ({reason})", file=sys.stderr)
        return {}
