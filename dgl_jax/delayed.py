"""How blocks run whose gradients come late: forward now, backward when the gradient has come.

Blocks k = 0..K-1 have delays D_k = K-1-k. In step t batch t goes up through all blocks, and
block k learns from batch t - D_k: the block above sent the gradient at the end of step t - 1.
Until then the method keeps what the backward pass will need. A `DelayedRule` says what that is
and how the gradient is computed from it; everything else is here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax.block import Block, apply_gradients, block_key, forward
from dgl_jax.config import Config
from dgl_jax.losses import logits_of
from dgl_jax.pipeline import (
    Runner,
    block_program,
    bound_in_flight,
    make_logits,
    steps_in_flight,
)
from dgl_jax.placement import BlockPlacement
from dgl_jax.schedule import BACKWARD, FORWARD, UPDATE
from dgl_jax.transfer import is_local, move, place, stand_in
from dgl_jax.types import BlockState, TrainState


@dataclasses.dataclass(frozen=True)
class DelayedRule:
    """How a block without a loss of its own computes a gradient long after its forward pass.

    Attributes:
      forward: ``forward(block, params, batch_stats, x, key) -> (activations, batch_stats,
        kept)``; ``kept`` is any pytree, all that `backward` gets to see of this pass.
      backward: ``backward(block, state, kept, gradient, key) -> (gradients, input_gradient,
        batch_stats)``: from the gradient at the block's output to those at its parameters and
        its input. The state is the present one, the key that of the forward pass.
    """

    forward: Callable[..., tuple[jax.Array, Any, Any]]
    backward: Callable[..., tuple[Any, jax.Array, Any]]


@flax.struct.dataclass
class DelayedMemory:
    """What waits between two steps, for each block but the last. Checkpoints hold it too.

    Attributes:
      kept: of block k, D_k slots, the oldest first: the leaves of what its rule keeps of one
        forward pass; zeros before the first batches have come.
      gradients: of block k, the gradient at its output that the block above computed in the
        step before.
    """

    kept: tuple[tuple[tuple[jax.Array, ...], ...], ...]
    gradients: tuple[jax.Array, ...]


def make_forward(block: Block, rule: DelayedRule) -> Callable[..., Any]:
    """Returns ``forward(params, batch_stats, x, batch_number, key)``, as `DelayedRule.forward`."""

    def run(params, batch_stats, x, batch_number, key):
        return rule.forward(block, params, batch_stats, x, _batch_key(key, block, batch_number))

    return run


def make_backward(
    block: Block,
    rule: DelayedRule,
    optimizer: optax.GradientTransformation,
    *,
    log_gradient_norm: bool = False,
) -> Callable[..., tuple[BlockState, jax.Array | None, dict[str, jax.Array]]]:
    """Returns ``backward(state, kept, gradient, key) -> (state, input_gradient, metrics)``."""

    def run(state, kept, gradient, key):
        # A block's n-th update is that of batch n.
        key = _batch_key(key, block, state.step)
        gradients, input_gradient, batch_stats = rule.backward(block, state, kept, gradient, key)
        metrics = {"gradient_norm": optax.tree.norm(gradients)} if log_gradient_norm else {}
        state = apply_gradients(state, gradients, batch_stats, optimizer)
        return state, input_gradient if block.index else None, metrics

    return run


def make_last_update(
    block: Block, optimizer: optax.GradientTransformation, *, log_gradient_norm: bool = False
) -> Callable[..., tuple[BlockState, jax.Array | None, dict[str, jax.Array]]]:
    """Returns ``update(state, x, labels, key) -> (state, input_gradient, metrics)``.

    The last block has no delay: it learns from the network's loss as in backprop, and sends
    the gradient at its input down.
    """

    def run(state, x, labels, key):
        key = _batch_key(key, block, state.step)

        def network_loss(params, x):
            _, output, batch_stats = forward(
                block, params, state.batch_stats, x, train=True, key=key
            )
            return block.loss_fn(output, labels), (output, batch_stats)

        (loss, (output, batch_stats)), (gradients, input_gradient) = jax.value_and_grad(
            network_loss, argnums=(0, 1), has_aux=True
        )(state.params, x)
        top1 = jnp.mean(jnp.argmax(logits_of(output), axis=-1) == labels)
        metrics = {"loss": loss, "top1": top1}
        if log_gradient_norm:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        state = apply_gradients(state, gradients, batch_stats, optimizer)
        return state, input_gradient if block.index else None, metrics

    return run


def make_block_work(
    block: Block, optimizer: optax.GradientTransformation, rule: DelayedRule
) -> Callable[..., Any]:
    """Returns ``work(state, x, labels, key)``: the forward and the backward pass of one step."""
    if block.loss_fn is not None:
        return make_last_update(block, optimizer)
    forward, backward = make_forward(block, rule), make_backward(block, rule, optimizer)

    def work(state, x, labels, key):
        del labels
        # Weights change between the two passes. Were they the same here, the compiler would
        # compute once what both passes need, and a replay would seem to cost nothing.
        older = jax.tree.map(lambda weight: weight + 1e-3, state.params)
        activations, batch_stats, kept = forward(older, state.batch_stats, x, state.step, key)
        state = state.replace(batch_stats=batch_stats)
        return backward(state, kept, activations, key)  # A gradient has their shape.

    return work


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
    rule: DelayedRule,
) -> Runner:
    """Runs forward and backward passes as programs of their own, each where its block lives.

    Fused and pipelined runs are the same programs in the same order, on one mesh or several;
    activations move up and gradients down between them. The host only dispatches.

    States are donated to the backward passes. What the forward passes kept is not: hardly any
    output has its shape. It is freed when the queue lets go of it.

    Args:
      config: its placement and what it logs.
      blocks: of one network, in order.
      optimizer: the transformation every block has its own state of.
      key: the run's random key.
      placements: one a block.
      rule: how all blocks but the last compute their gradients.
    """
    log_norm = config.train.log_gradient_norm
    last = len(blocks) - 1
    keys = [place(key, placement.state) for placement in placements]
    # By block; compiled by init_memory, which is the first to know the shapes.
    forwards, updates = {}, {}

    def compile_programs(block, state, x):
        """Compiles one block's programs; returns its activations' and one slot's shapes."""
        placement, key = placements[block.index], keys[block.index]
        outputs = (placement.state, placement.batch, placement.state)
        if block.index == last:
            update = make_last_update(block, optimizer, log_gradient_norm=log_norm)
            labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32, sharding=placement.batch)
            updates[last] = block_program(
                jax.named_call(update, name=f"block_{last}"),
                placement,
                outputs,
                inputs=(state, x, labels, key),
                traced=(last, UPDATE),
                donate_argnums=0,
            )
            return None, None
        forward = make_forward(block, rule)
        backward = make_backward(block, rule, optimizer, log_gradient_norm=log_norm)
        batch_number = place(np.int32(0), placement.state)
        inputs = (state.params, state.batch_stats, x, batch_number, key)
        activations, _, kept = jax.eval_shape(forward, *inputs)

        def array_forward(*inputs):
            activations, batch_stats, kept = forward(*inputs)
            return activations, batch_stats, _to_arrays(kept)

        def array_backward(state, arrays, gradient, key):
            return backward(state, _from_arrays(arrays, kept, key), gradient, key)

        # What is as long as the batch is split as the batch is; the rest is on every device.
        slot = tuple(
            _struct(leaf, placement.batch if leaf.shape[:1] == x.shape[:1] else placement.state)
            for leaf in jax.eval_shape(_to_arrays, kept)
        )
        activations = _struct(activations, placement.batch)
        forwards[block.index] = block_program(
            jax.named_call(array_forward, name=f"block_{block.index}_forward"),
            placement,
            (placement.batch, placement.state, tuple(leaf.sharding for leaf in slot)),
            inputs=inputs,
            traced=(block.index, FORWARD),
        )
        updates[block.index] = block_program(
            jax.named_call(array_backward, name=f"block_{block.index}_backward"),
            placement,
            outputs,
            inputs=(state, slot, activations, key),
            traced=(block.index, BACKWARD),
            donate_argnums=0,
        )
        return activations, slot

    def init_memory(block_states, images):
        x, kept, gradients = images, [], []
        for block, state, placement in zip(blocks, block_states, placements, strict=True):
            x, slot = compile_programs(block, state, _struct(x, placement.batch))
            if block.index < last:
                kept.append((jax.tree.map(_zeros, slot),) * (last - block.index))
                gradients.append(_zeros(x))
        return DelayedMemory(tuple(kept), tuple(gradients))

    def step(state, tasks, batch_at):
        states, metrics = list(state.blocks), {}
        kept = [list(slots) for slots in state.memory.kept]
        gradients = list(state.memory.gradients)
        batch = batch_at(tasks[0].batch)
        x = batch.images
        for task in tasks:
            block, placement = task.block, placements[task.block]
            before, key = states[block], keys[block]
            if task.operation == FORWARD:
                x = move(x, placement.batch)
                batch_number = place(np.int32(task.batch), placement.state)
                x, batch_stats, arrays = forwards[block](
                    before.params, before.batch_stats, x, batch_number, key
                )
                states[block] = before.replace(batch_stats=batch_stats)
                kept[block].append(arrays)
                continue
            if task.operation == BACKWARD:
                inputs = (kept[block][0], gradients[block])
            else:
                inputs = (move(x, placement.batch), place(batch.labels, placement.batch))
            states[block], input_gradient, block_metrics = updates[block](before, *inputs, key)
            if block:
                gradients[block - 1] = move(input_gradient, placements[block - 1].batch)
            if block_metrics:
                metrics[block] = block_metrics
        # The oldest slot has been used, or was one of zeros.
        kept = tuple(tuple(slots[1:]) for slots in kept)
        return TrainState(tuple(states), DelayedMemory(kept, tuple(gradients))), metrics

    return Runner(
        step=bound_in_flight(step, steps_in_flight(config.placement, placements)),
        logits=make_logits(blocks, placements),
        init_memory=init_memory,
    )


def _batch_key(key: jax.Array, block: Block, batch_number: jax.Array) -> jax.Array:
    """The key of a block's dropout on a batch: the same forward, backward and in a replay."""
    return jax.random.fold_in(block_key(key, block), batch_number)


def _struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if not is_local(leaf.sharding):
        return stand_in(leaf.shape, leaf.dtype, leaf.sharding)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(kept: Any) -> tuple[jax.Array, ...]:
    """The leaves of a tree; random keys, which a checkpoint can't hold, as their data."""
    leaves = jax.tree.leaves(kept)
    return tuple(jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves)


def _from_arrays(arrays: Sequence[jax.Array], like: Any, key: jax.Array) -> Any:
    """The inverse: ``like`` has the tree's structure, ``key`` is of the run's kind of keys."""
    leaves, structure = jax.tree.flatten(like)
    impl = jax.random.key_impl(key)
    return jax.tree.unflatten(
        structure,
        [
            jax.random.wrap_key_data(array, impl=impl) if _is_key(leaf) else array
            for array, leaf in zip(arrays, leaves, strict=True)
        ],
    )
