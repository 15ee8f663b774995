"""What a run has learned, from its folder: for predictions, or for another script to go on with."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from dgl_jax import distributed
from dgl_jax.block import Block
from dgl_jax.config import Config, PlacementConfig, from_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import configured_blocks, configured_network, resolved_cuts_and_heads
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import Logits, init_states, make_logits
from dgl_jax.placement import make_placements
from dgl_jax.run_folder import read_json
from dgl_jax.types import BlockState


class Trained(NamedTuple):
    """A run's blocks and what they have learned.

    Attributes:
      config: the run's.
      blocks: as the run had them, in order.
      states: one a block, on one device: ``params``, ``batch_stats``, ``opt_state``, ``step``.
      step: of the run, at which they were saved.
      logits: ``logits(states, images)`` -> for each block that classifies, by its index, logits
        [B, num_classes]; of images float32 [B, H, W, C], normalised as in training.
    """

    config: Config
    blocks: Sequence[Block]
    states: Sequence[BlockState]
    step: int
    logits: Logits


def load_trained(workdir: str, *, best: bool = False) -> Trained:
    """Loads what a run of ``experiments/train.py`` has learned, finished or not.

    Whatever devices and processes it ran on, the states come to the first device of this one
    process. The data set need not be there.

    Args:
      workdir: the run's folder, of which nothing is changed.
      best: the state with the best accuracy of the last block, as the run evaluated it (see
        ``best_step`` in summary.json), not the latest.

    Example (no doctest: it needs the folder of a run):
      trained = load_trained("runs/mine", best=True)
      heads = trained.logits(trained.states, images)  # By block, [B, num_classes].

    Raises:
      UserError: there are several processes; the folder has no run, or no such checkpoint; or its
        files can't be understood.
    """
    if distributed.num_processes() > 1:
        raise UserError("load_trained is for one process; start this script once")
    fields = read_json(workdir, "config")
    if fields is None:
        raise UserError(f"workdir={workdir} has no config.json; give a run's folder")
    resolved = fields.pop("resolved", {})
    if "num_classes" not in resolved:
        raise UserError(
            f"workdir={workdir}: its config.json has no num_classes, as a search's or an older "
            "version's; train anew"
        )
    config, image_shape = from_dict(fields), tuple(resolved["image_shape"])
    cuts, heads = resolved_cuts_and_heads(config, resolved)
    num_classes = resolved["num_classes"]
    network = configured_network(config, num_classes)
    blocks = configured_blocks(config, network, cuts, heads, num_classes)
    optimizer = make_optimizer(
        config.optimizer, resolved["num_updates"], resolved["steps_per_epoch"]
    )
    placements = make_placements(PlacementConfig(), len(blocks))
    states = init_states(blocks, optimizer, jax.random.key(0), image_shape, placements)
    from dgl_jax import checkpoint  # Imports orbax, which takes a second.

    folder, restored = os.path.join(workdir, "checkpoints"), None
    if os.path.isdir(folder):
        with checkpoint.open_checkpointer(folder, clean=False) as checkpointer:
            restored = checkpoint.restore_blocks(checkpointer, states, best=best)
    if restored is None:
        kind = "checkpoint with an evaluation" if best else "checkpoint"
        raise UserError(f"workdir={workdir} has no {kind} yet; wait for the run's first one")
    step, states = restored
    return Trained(config, blocks, tuple(states), step, make_logits(blocks, placements))
