"""Checkpoints of all blocks: the latest and the best, saved in the background by orbax.

A checkpoint appears under its final name only when it is whole, so a run that is killed at any
instant leaves the one before it untouched.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dgl_jax import distributed
from dgl_jax.errors import UserError
from dgl_jax.transfer import fetch, is_local
from dgl_jax.types import BlockState


def open_checkpointer(directory: str, *, clean: bool = True) -> ocp.training.Checkpointer:
    """Opens (or makes) a directory of checkpoints; use the result as a context manager.

    Args:
      directory: of the checkpoints.
      clean: whether what a killed run left half written is removed. Not by a reader: it may be
        what a living run is writing.
    """
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        os.path.abspath(directory),
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["top1"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        cleanup_tmp_directories=clean,
    )


def check_disk_space(directory: str, states: Any, num_checkpoints: int) -> None:
    """Checks that so many more checkpoints fit on the disk.

    Orbax's own answer to a full disk is a page of tracebacks from its threads.

    Raises:
      UserError: if they do not.
    """
    size = num_checkpoints * sum(leaf.nbytes for leaf in jax.tree.leaves(states)) + 2**20
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"workdir: {directory} has {free / 2**20:.0f} MiB free, but checkpoints need "
            f"{size / 2**20:.0f} MiB; free some space and run the same command again, or choose "
            "another --workdir"
        )


def check_room(
    checkpointer: ocp.training.Checkpointer, states: Any, *, num_checkpoints: int, last_step: int
) -> None:
    """Checks that what a run is still to save fits on the disk.

    Args:
      checkpointer: from `open_checkpointer`.
      states: what is saved.
      num_checkpoints: how many lie there at once, at the most; those that do already count.
      last_step: with a checkpoint of this step nothing is saved any more.

    Raises:
      UserError: if it does not.
    """
    if checkpointer.latest is None or checkpointer.latest.step < last_step:
        num_missing = max(0, num_checkpoints - len(checkpointer.checkpoints))
        check_disk_space(str(checkpointer.directory), states, num_missing)


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    states: Any,
    *,
    top1: float | None,
    record: dict[str, Any],
) -> None:
    """Starts saving; the states may be donated as soon as this returns.

    In a run of several processes all must call it, and it returns when process 0 has what it
    writes. Orbax does not take an array that only some of them have, so all come to process 0.

    Args:
      checkpointer: from `open_checkpointer`.
      step: the number of steps done.
      states: the run's state: a tree of arrays.
      top1: the last block's accuracy at this step, if it was evaluated; ranks checkpoints.
      record: what else the run needs to go on, as JSON.

    Raises:
      UserError: if the disk is full; the checkpoint before this one stays.
    """
    if jax.process_count() > 1:
        # Orbax looks at the shapes in every process, and writes what the first one has.
        shapes = jax.tree.map(lambda leaf: np.broadcast_to(leaf.dtype.type(0), leaf.shape), states)
        fetched = fetch(states)
        # Orbax's barriers run on all devices: what they would wait for must be done.
        jax.block_until_ready(states)
        distributed.collect("fetched")
        states = fetched or shapes
    check_disk_space(str(checkpointer.directory), states, num_checkpoints=1)
    checkpointer.save_async(
        step,
        {"states": states},
        force=True,
        metrics=None if top1 is None else {"top1": top1},
        custom_metadata=record,
    )


def best_step(checkpointer: ocp.training.Checkpointer) -> int | None:
    """The step of the checkpoint with the best accuracy, if one has been saved."""
    ranked = [c for c in checkpointer.checkpoints if c.metrics is not None]
    return max(ranked, key=lambda c: c.metrics["top1"]).step if ranked else None


def restore_latest(
    checkpointer: ocp.training.Checkpointer, states: Any
) -> tuple[int, Any, dict[str, Any]] | None:
    """Restores the latest checkpoint to where the given states live.

    Args:
      checkpointer: from `open_checkpointer`.
      states: a fresh one: its structure, shapes, dtypes and shardings.

    Returns:
      ``(step, states, record)``, or None where there is no checkpoint.

    Raises:
      UserError: if the checkpoint is of another configuration; the message names a leaf.
    """
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    latest = distributed.agree(max(steps, default=None))
    if latest is None:
        return None
    if latest not in steps:
        raise UserError(
            f"workdir: process {jax.process_index()} finds no checkpoint of step {latest} in "
            f"{checkpointer.directory}, where process 0 does; give a folder that all share"
        )
    jax.block_until_ready(states)
    distributed.collect("ready")
    metadata = checkpointer.metadata(latest)
    _check_tree(metadata.metadata["states"], states, str(metadata.path))
    # A stand-in, for what another process has, stays as it is.
    abstract = jax.tree.map(
        lambda leaf: _abstract(leaf) if is_local(leaf.sharding) else ocp.PLACEHOLDER, states
    )
    restored = checkpointer.load(latest, {"states": abstract})["states"]
    restored = jax.tree.map(
        lambda leaf, wanted: wanted if leaf is ocp.PLACEHOLDER else leaf, restored, states
    )
    return latest, restored, dict(metadata.custom_metadata)


def restore_blocks(
    checkpointer: ocp.training.Checkpointer, blocks: Sequence[BlockState], *, best: bool
) -> tuple[int, tuple[BlockState, ...]] | None:
    """Restores the blocks' states alone, without what the method keeps besides.

    Args:
      checkpointer: from `open_checkpointer`.
      blocks: fresh ones: their structure, shapes, dtypes and shardings.
      best: of the checkpoint with the best accuracy, not of the latest.

    Returns:
      ``(step, blocks)``, or None where there is no such checkpoint.

    Raises:
      UserError: as `restore_latest`.
    """
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    step = best_step(checkpointer) if best else max(steps, default=None)
    if step is None:
        return None
    metadata = checkpointer.metadata(step)
    saved = metadata.metadata["states"]
    _check_tree(saved["blocks"], blocks, str(metadata.path))
    abstract = {
        "blocks": jax.tree.map(_abstract, blocks),
        "memory": jax.tree.map(lambda leaf: ocp.PLACEHOLDER, saved["memory"]),
    }
    return step, checkpointer.load(step, {"states": abstract})["states"]["blocks"]


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_tree(saved: Any, wanted: Any, path: str) -> None:
    """Orbax says little of a tree that differs and casts a dtype silently: look first."""
    saved, wanted = _leaves(saved), _leaves(wanted)
    for name in [*wanted, *saved]:
        if name not in saved or name not in wanted:
            where = "the checkpoint lacks it" if name not in saved else "this run has no such leaf"
            problem = f"{name}: {where}"
        elif saved[name] != wanted[name]:
            problem = f"{name} is {saved[name]} in the checkpoint, {wanted[name]} in this run"
        else:
            continue
        raise UserError(
            f"checkpoint={path} is of another configuration: {problem}; "
            "use the configuration it was made with, or another --workdir"
        )


def _leaves(tree: Any) -> dict[str, str]:
    return {
        "/".join(_key_name(key) for key in path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _key_name(key: Any) -> str:
    """Attributes, dict keys and indices alike: orbax turns a dataclass into a dict."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
