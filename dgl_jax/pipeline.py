"""How blocks run on devices: fused in one program, or pipelined, one program a block.

Both runners offer the same functions and compute the same numbers. They know no loss and no
method: they run a method's schedule over its blocks.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from dgl_jax.block import init_block_state, make_block_eval, make_block_step
from dgl_jax.config import PlacementConfig
from dgl_jax.methods.method import Method
from dgl_jax.placement import BlockPlacement
from dgl_jax.types import Batch, BlockState, Metrics, StepOutput

States = tuple[BlockState, ...]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs a method's blocks on their devices. Every function returns without waiting.

    Attributes:
      step: ``step(states, batch) -> (states, metrics)``, one step of every block; the states
        passed in are donated. Metrics are one dict of scalars a block.
      logits: ``logits(states, images) -> tuple``, each head's logits in evaluation mode, all
        on the last block's devices.
    """

    step: Callable[[States, Batch], tuple[States, tuple[Metrics, ...]]]
    logits: Callable[[States, jax.Array], tuple[jax.Array, ...]]


def init_states(
    method: Method,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: Sequence[int],
    placements: Sequence[BlockPlacement],
) -> States:
    """Initialises every block where it lives.

    Args:
      method: the blocks.
      optimizer: the transformation every block has its own state of.
      key: the run's random key.
      image_shape: (H, W, C), or whatever shape one example has.
      placements: one a block.

    Returns:
      One state a block, the same numbers for every placement and every way to cut.
    """
    states = []
    shape = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    for block, placement in zip(method.blocks, placements, strict=True):

        def init(key, block=block, shape=shape):
            return init_block_state(block, optimizer, key, jnp.zeros(shape.shape, shape.dtype))

        init = jax.jit(init, out_shardings=placement.state)
        states.append(init(jax.device_put(key, placement.state)))
        shape, _ = jax.eval_shape(
            make_block_eval(block), states[-1].params, states[-1].batch_stats, shape
        )
    return tuple(states)


def make_fused_runner(
    method: Method,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placement: BlockPlacement,
    max_steps_in_flight: int,
) -> Runner:
    """All blocks in one program on one mesh.

    Each block's backward pass stands right after its forward pass, so its activations can
    die before the next block runs: less memory than backprop.

    Args:
      method: blocks and schedule.
      optimizer: as in `init_states`.
      key: the run's random key.
      placement: the mesh of all blocks.
      max_steps_in_flight: steps dispatched but not finished, at the most.
    """
    updates = [make_block_step(block, optimizer) for block in method.blocks]
    key = jax.device_put(key, placement.state)

    def step(states, batch, key):
        states, metrics = list(states), [{} for _ in states]
        activations = [batch.images] + [None] * len(states)
        for task in method.schedule(len(states), 0, 1):
            with jax.named_scope(f"block_{task.block}"):
                output = updates[task.block](
                    states[task.block], activations[task.block], batch.labels, key
                )
            states[task.block] = output.state
            activations[task.block + 1] = output.activations
            metrics[task.block] = output.metrics
        return tuple(states), tuple(metrics)

    def logits(states, images):
        x, heads = images, []
        for block, state in zip(method.blocks, states, strict=True):
            x, head_logits = make_block_eval(block)(state.params, state.batch_stats, x)
            heads.append(head_logits)
        return tuple(heads)

    # Outputs are pinned to where inputs live: the compiler must not choose anew each step.
    step = jax.jit(step, donate_argnums=0, out_shardings=placement.state)
    return Runner(
        step=_bound_in_flight(lambda states, batch: step(states, batch, key), max_steps_in_flight),
        logits=jax.jit(logits, out_shardings=placement.batch),
    )


def make_pipelined_runner(
    method: Method,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
    max_steps_in_flight: int,
) -> Runner:
    """One program a block, each on its own mesh; activations move by device_put.

    The host only dispatches. A block starts as soon as its input has arrived and its own
    previous update is done, so block 0 works on step t + 1 while block 1 works on step t.

    Args:
      method: blocks and schedule.
      optimizer: as in `init_states`.
      key: the run's random key.
      placements: one a block.
      max_steps_in_flight: steps dispatched but not finished by the last block, at the most;
        without a bound a fast first block would fill the memory with activations.
    """
    num_blocks = len(method.blocks)
    updates = [
        jax.jit(
            jax.named_call(make_block_step(block, optimizer), name=f"block_{block.index}"),
            donate_argnums=0,
            out_shardings=StepOutput(placement.state, placement.batch, placement.state),
        )
        for block, placement in zip(method.blocks, placements, strict=True)
    ]
    evaluates = [jax.jit(make_block_eval(block)) for block in method.blocks]
    keys = [jax.device_put(key, placement.state) for placement in placements]

    def step(states, batch):
        states, metrics = list(states), [{} for _ in states]
        activations = [batch.images] + [None] * num_blocks
        for task in method.schedule(num_blocks, 0, 1):
            block = task.block
            x, labels = jax.device_put((activations[block], batch.labels), placements[block].batch)
            output = updates[block](states[block], x, labels, keys[block])
            states[block] = output.state
            activations[block + 1] = output.activations
            metrics[block] = output.metrics
        return tuple(states), tuple(metrics)

    def logits(states, images):
        x, heads = images, []
        for state, evaluate, placement in zip(states, evaluates, placements):
            x = jax.device_put(x, placement.batch)
            x, head_logits = evaluate(state.params, state.batch_stats, x)
            heads.append(head_logits)
        return tuple(jax.device_put(heads, placements[-1].batch))

    return Runner(step=_bound_in_flight(step, max_steps_in_flight), logits=logits)


def make_runner(
    config: PlacementConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """The runner that ``config.placement`` asks for."""
    if config.kind == "fused":
        return make_fused_runner(method, optimizer, key, placements[0], config.max_steps_in_flight)
    return make_pipelined_runner(method, optimizer, key, placements, config.max_steps_in_flight)


def _bound_in_flight(step: Callable, max_steps_in_flight: int) -> Callable:
    """Lets the host run ahead of the last block by so many steps and no more."""
    in_flight = collections.deque()

    def bounded_step(states, batch):
        if len(in_flight) == max_steps_in_flight:
            jax.block_until_ready(in_flight.popleft())
        states, metrics = step(states, batch)
        in_flight.append(metrics[-1])
        return states, metrics

    return bounded_step
