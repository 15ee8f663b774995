"""Runs as processes of their own: for scripts that compare many."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dgl_jax.config import Config, check_same_run
from dgl_jax.run_folder import read_json

GRACE_S = 10  # To end by itself.


def finished_summary(config: Config, folder: str) -> dict[str, Any] | None:
    """The summary of a run that is finished already, or None.

    Raises:
      UserError: the folder holds a run of another configuration, or its files can't be parsed.
    """
    previous, summary = read_json(folder, "config"), read_json(folder, "summary")
    if not previous or not summary:
        return None
    check_same_run(config, previous, folder)
    return summary if summary["finished"] else None


def train_in_process(
    script: str | os.PathLike, config_path: str, folder: str, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """Trains in a process of its own, whose output goes to output.txt in the run's folder.

    Args:
      script: the path of ``experiments/train.py``.
      config_path: for ``--config``.
      folder: for ``--workdir``.
      overrides: dotted fields of the configuration with their values.

    Returns:
      The run's summary; or None and the reason in one line.
    """
    process = start_training(script, config_path, folder, overrides)
    process.wait()
    return result_of(process, folder)


def start_training(
    script: str | os.PathLike, config_path: str, folder: str, overrides: Mapping[str, Any]
) -> subprocess.Popen:
    """The process of `train_in_process`, which nobody waits for."""
    os.makedirs(folder, exist_ok=True)
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, script, f"--config={config_path}", f"--workdir={folder}", *fields]
    with open(os.path.join(folder, "output.txt"), "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def result_of(process: subprocess.Popen, folder: str) -> tuple[dict[str, Any] | None, str]:
    """What `train_in_process` returns, of a process that has ended."""
    code = process.returncode
    if code == 0:
        return json.loads(pathlib.Path(folder, "summary.json").read_text()), ""
    output = pathlib.Path(folder, "output.txt").read_text()
    lines = [line for line in output.splitlines() if line.strip()]
    if code < 0:
        lines.append(f"killed by signal {-code}")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return None, (errors or lines or [f"exit code {code}"])[-1]


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Ends those that still run: asked first, killed after `GRACE_S` seconds."""
    for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in processes:
            if process.poll() is None:
                stop(process)
        for process in processes:
            try:
                process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                pass
