"""What flows through the project: a batch, a block's state, a block step's output, a run's state.

All but `DeviceStream` are frozen pytrees that hold arrays only: no functions, no stored random keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax

Params = Any  # A pytree of arrays.
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
    """One mini-batch.

    Attributes:
      images: float32 [B, H, W, C], normalised and augmented.
      labels: int32 [B].

    Example:
      >>> batch = Batch(images=jax.numpy.zeros((2, 28, 28, 1)), labels=jax.numpy.array([3, 1]))
      >>> jax.tree.map(jax.numpy.shape, batch)
      Batch(images=(2, 28, 28, 1), labels=(2,))
    """

    images: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class DeviceStream:
    """Training batches that a program makes itself, many in a loop, from data on the device.

    Attributes:
      source_at: ``source_at(step)``: the arrays that the batches of that step's epoch are made of.
      batch: ``batch(source, step) -> Batch``, with an int32 scalar; pure, the numbers of
        `data.Dataset.batch_at`.
    """

    source_at: Callable[[int], Any]
    batch: Callable[[Any, jax.Array], Batch]


@flax.struct.dataclass
class BlockState:
    """Everything that one block's training changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: {"layers": (one tree a layer, ...), "head": tree}; of a block with loops over equal
        layers, one tree a loop.
      batch_stats: the same structure, BatchNorm's running statistics.
      opt_state: the state of the block's own optax transformation.
    """

    step: jax.Array
    params: Params
    batch_stats: Params
    opt_state: Any


@flax.struct.dataclass
class TrainState:
    """All that a training run changes, and so all that its checkpoint holds.

    Attributes:
      blocks: one state a block.
      memory: what the method keeps from one step to the next besides: replay buffers, delayed
        gradients; () where there is none.
    """

    blocks: tuple[BlockState, ...]
    memory: Any = ()


@flax.struct.dataclass
class StepOutput:
    """What one block step returns.

    Attributes:
      state: the block's next state.
      activations: float [B, ...], the input of the next block, computed with the
        parameters *before* the update (Algorithm 1, line 4). No gradient flows through.
      metrics: scalars: ``loss``, ``top1`` ...
    """

    state: BlockState
    activations: jax.Array
    metrics: Metrics
