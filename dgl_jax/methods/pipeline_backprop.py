"""Synchronous pipeline-parallel backprop (GPipe; PipeDream-flush, "1F1B"): backprop over devices.

The network is cut into blocks without auxiliary heads, each on its own devices. A batch is cut
into M microbatches; activations go up and gradients come down a microbatch at a time, each block
adds up its gradients, and then makes one update. The gradient is the mean over the batch:
exactly backprop's, where no layer looks at more than one example.

BatchNorm does: its statistics are those of each microbatch, and the running ones move once a
microbatch, M times a step. So with BatchNorm a run's numbers depend on M.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax import schedule
from dgl_jax.block import Block, apply_gradients, block_key, forward
from dgl_jax.config import Config
from dgl_jax.losses import logits_of
from dgl_jax.methods import ddg
from dgl_jax.methods.method import Method, both_ways_bytes
from dgl_jax.pipeline import (
    Runner,
    block_program,
    bound_in_flight,
    make_logits,
    steps_in_flight,
)
from dgl_jax.placement import BlockPlacement
from dgl_jax.schedule import APPLY, BACKWARD, FORWARD, LOSS
from dgl_jax.transfer import move, place
from dgl_jax.types import BlockState, Params, TrainState


@flax.struct.dataclass
class _Input:
    """Stands for a residual that is an input of the forward pass itself: a weight, or its x."""

    place: int = flax.struct.field(pytree_node=False)


def make_schedule(
    config: Config, num_blocks: int, num_updates: int, steps_per_epoch: int
) -> schedule.Schedule:
    """The order that ``config.method.pipeline_schedule`` asks for; see `schedule.pipeline`.

    Example:
      What each of two blocks does with two microbatches, in order.

      >>> from dgl_jax.config import MethodConfig
      >>> config = Config(method=MethodConfig(name="pipeline_backprop", num_microbatches=2))
      >>> schedule = make_schedule(config, num_blocks=2, num_updates=10, steps_per_epoch=10)
      >>> step = next(schedule.tasks(0))
      >>> [task.operation for task in step if task.block == 0]
      ['forward', 'forward', 'backward', 'backward', 'apply']
      >>> [task.operation for task in step if task.block == 1]
      ['loss', 'loss', 'apply']
    """
    del steps_per_epoch
    method = config.method
    return schedule.pipeline(
        method.pipeline_schedule, num_blocks, method.num_microbatches, num_updates
    )


def make_forward(block: Block) -> Callable[..., tuple[jax.Array, Params, Any]]:
    """Returns ``forward(params, batch_stats, step, x, microbatch, key)``.

    It returns ``(activations, batch_stats, pullback)`` for one microbatch x [B / M, ...].
    """

    def run(params, batch_stats, step, x, microbatch, key):
        key = _dropout_key(key, block, step, microbatch)
        return ddg.forward_stale(block, params, batch_stats, x, key)

    return run


def make_loss_pass(block: Block, num_microbatches: int) -> Callable[..., tuple]:
    """Returns the last block's forward and backward pass of one microbatch.

    ``loss_pass(totals, params, batch_stats, step, x, labels, microbatch, key) -> (totals,
    batch_stats, input_gradient)``, where totals are the sums over microbatches of ``(gradients,
    metrics)``, each a share of the mean over the batch.
    """

    def run(totals, params, batch_stats, step, x, labels, microbatch, key):
        key = _dropout_key(key, block, step, microbatch)

        def share_of_loss(params, x):
            _, output, after = forward(block, params, batch_stats, x, train=True, key=key)
            return block.loss_fn(output, labels) / num_microbatches, (output, after)

        (loss, (output, after)), (gradients, input_gradient) = jax.value_and_grad(
            share_of_loss, argnums=(0, 1), has_aux=True
        )(params, x)
        top1 = jnp.mean(jnp.argmax(logits_of(output), axis=-1) == labels) / num_microbatches
        totals = jax.tree.map(jnp.add, totals, (gradients, {"loss": loss, "top1": top1}))
        return totals, after, input_gradient if block.index else None

    return run


def make_update(
    optimizer: optax.GradientTransformation, *, log_gradient_norm: bool = False
) -> Callable[..., tuple[BlockState, dict[str, jax.Array]]]:
    """Returns ``update(state, totals) -> (state, metrics)``, by the gradient of all microbatches."""

    def run(state, totals):
        gradients, metrics = totals
        if log_gradient_norm:
            metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}
        return apply_gradients(state, gradients, state.batch_stats, optimizer), metrics

    return run


def make_block_work(
    config: Config, block: Block, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns ``work(state, x, labels, key)``: all microbatches up and down, and the update."""
    num_microbatches = config.method.num_microbatches
    forward, loss_pass = make_forward(block), make_loss_pass(block, num_microbatches)
    update = make_update(optimizer)

    def microbatches(x):
        # Which examples they have makes no difference to the time; so each device's part of
        # the batch can stay where it is.
        return jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)

    def work(state, x, labels, key):
        def one(carry, inputs):
            (gradients, metrics), batch_stats = carry
            number, x, labels = inputs
            arguments = (state.params, batch_stats, state.step, x)
            if block.loss_fn is not None:
                totals, *rest = loss_pass((gradients, metrics), *arguments, labels, number, key)
                return (totals, rest[0]), rest[1]
            activations, batch_stats, pullback = forward(*arguments, number, key)
            more, input_gradient = pullback(activations)  # A gradient has their shape.
            gradients = jax.tree.map(jnp.add, gradients, more)
            return ((gradients, metrics), batch_stats), (activations, input_gradient)

        inputs = (jnp.arange(num_microbatches), microbatches(x), microbatches(labels))
        start = (_zero_totals(block, state.params), state.batch_stats)
        (totals, batch_stats), passed_on = jax.lax.scan(one, start, inputs)
        return *update(state.replace(batch_stats=batch_stats), totals), passed_on

    return work


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """Each block's forward pass, backward pass and update as programs of their own.

    The host only dispatches, in the schedule's order; a device works off what it is given in
    that order. What a forward pass leaves for its backward pass (`jax.vjp`'s residuals) stays on
    the block's devices until then, but for the weights: they are the same for all microbatches.

    Donated are states and sums of gradients, and a microbatch's input to the gradient at it.
    Other residuals are not, as hardly any output has their shape; they are freed when the
    backward pass has run.

    Args:
      config: its method, its placement and what it logs.
      blocks: of one network, in order.
      optimizer: the transformation every block has its own state of.
      key: the run's random key.
      placements: one a block.

    Source: GPipe (Huang et al. 2019); PipeDream-flush (Narayanan et al., 2021).
    Deviation: GPipe computes a forward pass again in the backward pass, to keep less; here its
      residuals are kept.
    """
    log_norm, num_microbatches = config.train.log_gradient_norm, config.method.num_microbatches
    last = len(blocks) - 1
    keys = [place(key, placement.state) for placement in placements]
    numbers = [
        [place(np.int32(m), placement.state) for m in range(num_microbatches)]
        for placement in placements
    ]
    # By block, but for the splits; compiled by init_memory, which is the first to know the shapes.
    zeros, forwards, backwards, updates, splits = {}, {}, {}, {}, {}

    def compile_programs(block, state, x):
        """Compiles one block's programs for a microbatch x; returns its activations' shape."""
        k, name = block.index, f"block_{block.index}"
        whole, split = placements[k].state, placements[k].batch
        shapes = jax.eval_shape(lambda params: params, state.params)
        zero = functools.partial(_zero_totals, block, shapes)
        totals = jax.tree.map(lambda leaf: _struct(leaf, whole), jax.eval_shape(zero))
        zeros[k] = block_program(
            jax.named_call(zero, name=f"{name}_zeros"), placements[k], whole, inputs=()
        )
        update = make_update(optimizer, log_gradient_norm=log_norm)
        updates[k] = block_program(
            jax.named_call(update, name=f"{name}_update"),
            placements[k],
            whole,
            inputs=(state, totals),
            traced=(k, APPLY),
            donate_argnums=0,
        )
        inputs = (state.params, state.batch_stats, state.step, x)
        constants = (numbers[k][0], keys[k])
        if k == last:
            labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32, sharding=split)
            forwards[k] = block_program(
                jax.named_call(make_loss_pass(block, num_microbatches), name=f"{name}_loss"),
                placements[k],
                (whole, whole, split),
                inputs=(totals, *inputs, labels, *constants),
                traced=(k, LOSS),
                donate_argnums=(0, 2, 4) if k else (0, 2),
            )
            return None
        forward = make_forward(block)
        activations, _, pullback = jax.eval_shape(forward, *inputs, *constants)
        structure = jax.tree.structure(pullback)

        def forward_keeping(params, batch_stats, step, x, microbatch, key):
            activations, after, pullback = forward(params, batch_stats, step, x, microbatch, key)
            return activations, after, _without_inputs(jax.tree.leaves(pullback), (params, x))

        def backward(totals, params, x, kept, gradient):
            pullback = jax.tree.unflatten(structure, _with_inputs(kept, (params, x)))
            gradients, input_gradient = pullback(gradient)
            totals = jax.tree.map(jnp.add, totals, (gradients, {}))
            return totals, input_gradient if k else None

        # What is as long as the microbatch is split as it is; the rest is on every device.
        kept = tuple(
            leaf
            if isinstance(leaf, _Input)
            else _struct(leaf, split if leaf.shape[:1] == x.shape[:1] else whole)
            for leaf in jax.eval_shape(forward_keeping, *inputs, *constants)[2]
        )
        kept_shardings = jax.tree.map(lambda leaf: leaf.sharding, kept)
        forwards[k] = block_program(
            jax.named_call(forward_keeping, name=f"{name}_forward"),
            placements[k],
            (split, whole, kept_shardings),
            inputs=(*inputs, *constants),
            traced=(k, FORWARD),
            donate_argnums=1,
        )
        activations = _struct(activations, split)
        is_kept = _Input(len(jax.tree.leaves(state.params))) in kept
        backwards[k] = block_program(
            jax.named_call(backward, name=f"{name}_backward"),
            placements[k],
            (whole, split),
            inputs=(totals, state.params, x, kept, activations),
            traced=(k, BACKWARD),
            donate_argnums=(0, 2) if k and is_kept else 0,
        )
        return activations

    def compile_split(name, x, placement):
        split = lambda x: tuple(jnp.split(x, num_microbatches))
        inputs = (_struct(x, placement.batch),)
        split = jax.named_call(split, name=f"split_{name}")
        splits[name] = block_program(split, placement, placement.batch, inputs=inputs)

    def init_memory(block_states, images):
        compile_split("images", images, placements[0])
        labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
        compile_split("labels", labels, placements[last])
        shape = (images.shape[0] // num_microbatches, *images.shape[1:])
        x = jax.ShapeDtypeStruct(shape, images.dtype)
        for block, state, placement in zip(blocks, block_states, placements, strict=True):
            x = compile_programs(block, state, _struct(x, placement.batch))
        return ()

    def step(state, tasks, batch_at):
        states, metrics = list(state.blocks), {}
        batch = batch_at(tasks[0].batch)
        totals = [zeros[block]() for block in range(last + 1)]
        labels = splits["labels"](place(batch.labels, placements[last].batch))
        images = splits["images"](move(batch.images, placements[0].batch))
        inputs = {(0, microbatch): x for microbatch, x in enumerate(images)}
        del images  # Or no block's input would be freed before the step's end.
        kept, gradients = {}, {}
        for task in tasks:
            block, microbatch, here = task.block, task.microbatch, (task.block, task.microbatch)
            before, input_gradient = states[block], None
            weights = (before.params, before.batch_stats, before.step)
            constants = (numbers[block][microbatch], keys[block])
            if task.operation == FORWARD:
                x, after, kept[here] = forwards[block](*weights, inputs[here], *constants)
                states[block] = before.replace(batch_stats=after)
                inputs[block + 1, microbatch] = move(x, placements[block + 1].batch)
            elif task.operation == LOSS:
                totals[block], after, input_gradient = forwards[block](
                    totals[block], *weights, inputs.pop(here), labels[microbatch], *constants
                )
                states[block] = before.replace(batch_stats=after)
            elif task.operation == BACKWARD:
                totals[block], input_gradient = backwards[block](
                    totals[block],
                    before.params,
                    inputs.pop(here),
                    kept.pop(here),
                    gradients.pop(here),
                )
            else:
                states[block], block_metrics = updates[block](before, totals[block])
                totals[block] = None
                if block_metrics:
                    metrics[block] = block_metrics
            if input_gradient is not None:
                sharding = placements[block - 1].batch
                gradients[block - 1, microbatch] = move(input_gradient, sharding)
        return TrainState(tuple(states), state.memory), metrics

    return Runner(
        step=bound_in_flight(step, steps_in_flight(config.placement, placements)),
        logits=make_logits(blocks, placements),
        init_memory=init_memory,
    )


def _dropout_key(key: jax.Array, block: Block, step: jax.Array, microbatch: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(block_key(key, block), step), microbatch)


def _zero_totals(block: Block, params: Params) -> tuple[Params, dict[str, jax.Array]]:
    """The sums over microbatches before the first: gradients, and the last block's metrics."""
    gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    names = () if block.loss_fn is None else ("loss", "top1")
    return gradients, {name: jnp.zeros([]) for name in names}


def _without_inputs(leaves: Sequence[jax.Array], inputs: Any) -> tuple[Any, ...]:
    """The leaves; those that are one of the inputs are not copied, but named by its place."""
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(inputs))}
    return tuple(_Input(places[id(leaf)]) if id(leaf) in places else leaf for leaf in leaves)


def _with_inputs(kept: Sequence[Any], inputs: Any) -> list[jax.Array]:
    """The inverse."""
    inputs = jax.tree.leaves(inputs)
    return [inputs[leaf.place] if isinstance(leaf, _Input) else leaf for leaf in kept]


def _struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


METHOD = Method(ddg.make_blocks, make_schedule, make_runner, make_block_work, both_ways_bytes)
