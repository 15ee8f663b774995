"""How far each block's output distribution is from its final one: c_t of the paper's theorem.

A block trains on inputs whose distribution moves as the block below learns. The convergence
theorem asks that the distance to the final distribution be summable.
"""

import json
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.block import Block, make_block_feed
from dgl_jax.metrics import write_atomically
from dgl_jax.pipeline import block_program
from dgl_jax.placement import BlockPlacement
from dgl_jax.transfer import move, place
from dgl_jax.types import BlockState

# A value x falls into a bin of asinh(x): fine near 0, coarse far away, never out of range.
_BIN_WIDTH, _NUM_BINS = 0.25, 48


def channel_histograms(activations: jax.Array, mask: jax.Array) -> jax.Array:
    """Each channel's density over a batch, binned.

    Args:
      activations: float [B, ..., C].
      mask: float32 [B], 1; 0 where an image only fills up the batch.

    Returns:
      float32 [C, 48], each row sums to 1.
    """
    num_channels = activations.shape[-1]
    x = activations.astype(jnp.float32).reshape(-1, num_channels)
    weights = jnp.repeat(mask.astype(jnp.int32), x.shape[0] // len(mask))
    bins = jnp.floor(jnp.arcsinh(x) / _BIN_WIDTH).astype(jnp.int32) + _NUM_BINS // 2
    bins = jnp.clip(bins, 0, _NUM_BINS - 1)
    one_channel = lambda column: jnp.bincount(column, weights, length=_NUM_BINS)
    return jax.vmap(one_channel, in_axes=1)(bins) / jnp.sum(weights)


def density_distance(histograms: np.ndarray, others: np.ndarray) -> float:
    """The L1 distance of two binned densities, the mean over channels: 0 (equal) to 2 (apart).

    Args:
      histograms: float [C, bins], as `channel_histograms` makes them.
      others: the same shape.

    Example:
      Two channels, two bins: the first has moved, the second has not.

      >>> histograms = np.array([[1.0, 0.0], [0.5, 0.5]])
      >>> density_distance(histograms, np.array([[0.0, 1.0], [0.5, 0.5]]))
      1.0

    Source: DGL, section 3, ``c_t = integral |p_t(z) - p*(z)| dz``.
    Deviation: of each channel's marginal density on a probe batch, binned. Each is a lower
      bound of the distance of the joint densities, which no batch could tell.
    """
    return float(np.mean(np.sum(np.abs(histograms - others), axis=-1)))


def make_probe(
    blocks: Sequence[Block], placements: Sequence[BlockPlacement]
) -> Callable[[Sequence[BlockState], jax.Array, jax.Array], list[jax.Array]]:
    """Returns ``probe(block_states, images, mask)``: the histograms of each block's output."""

    def make_program(block, placement):
        feed = make_block_feed(block)

        def program(state, x, mask):
            x = feed(state, x)
            return x, channel_histograms(x, mask)

        return block_program(program, placement, (placement.batch, placement.state))

    programs = [make_program(*pair) for pair in zip(blocks, placements, strict=True)]

    def probe(block_states, images, mask):
        x, histograms = images, []
        for program, state, placement in zip(programs, block_states, placements, strict=True):
            x = move(x, placement.batch)
            x, histogram = program(state, x, place(mask, placement.batch))
            histograms.append(histogram)
        return histograms

    return probe


def save_histograms(workdir: str, step: int, histograms: Sequence[np.ndarray]) -> None:
    """Writes drift/STEP.npz."""
    folder = os.path.join(workdir, "drift")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{step}.npz")
    with open(path + ".tmp", "wb") as file:
        np.savez(file, **{f"block_{k}": h for k, h in enumerate(histograms)})
    os.replace(path + ".tmp", path)


def write_drift(workdir: str) -> list[dict[str, float]]:
    """Compares all of drift/*.npz with the last and writes drift.json.

    Returns:
      What is written: one dict a probe, ``step`` and each block's `density_distance`.
    """
    folder = os.path.join(workdir, "drift")
    steps = sorted(int(name[:-4]) for name in os.listdir(folder) if name.endswith(".npz"))
    probes = [dict(np.load(os.path.join(folder, f"{step}.npz"))) for step in steps]
    rows = [
        {"step": step}
        | {block: density_distance(probe[block], probes[-1][block]) for block in probe}
        for step, probe in zip(steps, probes)
    ]
    write_atomically(os.path.join(workdir, "drift.json"), json.dumps(rows, indent=1) + "\n")
    return rows
