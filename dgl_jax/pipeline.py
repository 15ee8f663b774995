"""How blocks run on devices: fused in one program, or pipelined, one program a block.

Both runners offer the same functions and compute the same numbers. They know no loss and no
method: they run a schedule's tasks over blocks.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax import trace
from dgl_jax.block import (
    Block,
    block_key,
    init_block_state,
    make_block_eval,
    make_block_feed,
    make_block_step,
)
from dgl_jax.config import Config, PlacementConfig
from dgl_jax.models.convolution import whole_batch
from dgl_jax.models.equal_layers import is_equal
from dgl_jax.models.network import output_shape
from dgl_jax.placement import BlockPlacement
from dgl_jax.schedule import FEED, UPDATE, Task
from dgl_jax.transfer import announce, is_local, move, place, stand_in
from dgl_jax.types import Batch, BlockState, DeviceStream, Metrics, StepOutput, TrainState

BatchAt = Callable[[int], Batch]
Step = Callable[[TrainState, Sequence[Task], BatchAt], tuple[TrainState, dict[int, Metrics]]]
Steps = Callable[
    [TrainState, Sequence[Sequence[Task]], DeviceStream], tuple[TrainState, dict[int, Metrics]]
]
Logits = Callable[[Sequence[BlockState], jax.Array], dict[int, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs blocks on their devices. `step` and `logits` return without waiting for a device.

    Attributes:
      step: ``step(state, tasks, batch_at) -> (state, metrics)``, the tasks of one step of a
        schedule; the state passed in is donated. Metrics are scalars of each block that made
        an update, by the block's index.
      steps: ``steps(state, tasks_of_steps, stream) -> (state, metrics)``, several steps of the same
        operations, all in one epoch, as one program that takes its batches from a `DeviceStream`;
        metrics are [n]. None where a runner has no such program.
      logits: ``logits(block_states, images)``, the logits of each block that classifies, by
        the block's index, in evaluation mode, all on the last block's devices.
      init_memory: ``init_memory(block_states, images)`` makes the state's memory, where the
        method has one; ``images`` is a ShapeDtypeStruct of a training batch.
      snapshot: the state as it is now, to evaluate and save: for a runner whose blocks train
        on while nobody calls `step`.
      close: ends whatever still runs.
    """

    step: Step
    logits: Logits
    init_memory: Callable[[Sequence[BlockState], jax.ShapeDtypeStruct], Any] = (
        lambda block_states, images: ()
    )
    snapshot: Callable[[TrainState], TrainState] = lambda state: state
    close: Callable[[], None] = lambda: None
    steps: Steps | None = None


def init_states(
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: Sequence[int],
    placements: Sequence[BlockPlacement],
) -> tuple[BlockState, ...]:
    """Initialises every block where it lives.

    Args:
      blocks: of one network, in order.
      optimizer: the transformation every block has its own state of.
      key: the run's random key.
      image_shape: (H, W, C), or whatever shape one example has.
      placements: one a block.

    Returns:
      One state a block, the same numbers for every placement and every way to cut.

    Example:
      See `make_runner`.
    """
    states = []
    shape = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    for block, placement in zip(blocks, placements, strict=True):

        def init(key, block=block, shape=shape):
            return init_block_state(block, optimizer, key, jnp.zeros(shape.shape, shape.dtype))

        init = block_program(
            init, placement, placement.state, compiler_options=run_once(placement.devices[0])
        )
        states.append(init(place(key, placement.state)))
        for layer in block.layers:
            shape = output_shape(layer, shape)
    return tuple(states)


def block_program(
    fn: Callable[..., Any],
    placement: BlockPlacement,
    out_shardings: Any,
    *,
    inputs: tuple[Any, ...] | None = None,
    traced: tuple[int, str] | None = None,
    donate_argnums: int | tuple[int, ...] = (),
    compiler_options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``jax.jit(fn)`` where the block lives; elsewhere a function that returns stand-ins.

    Args:
      fn: what a block computes.
      placement: where it lives.
      out_shardings: of fn's outputs, or a prefix of their tree.
      inputs: arrays, or ShapeDtypeStructs with shardings; where they are given it is compiled now,
        so that no step's time is of compiling.
      traced: a block and an operation of the schedule; where a trace is recorded, each run of
        the program is in it.
      donate_argnums: as of `jax.jit`. Nothing is donated to a traced program: what is gone can't
        be waited for.
      compiler_options: as of `jax.jit`.

    Returns:
      The program. In a process that has none of the block's devices, a function that takes
      stand-ins, computes nothing, and has the outputs' stand-ins for it.
    """
    recorder = trace.recorder() if traced else None
    donate_argnums = () if recorder else donate_argnums
    fn = for_devices(fn, placement)
    program = jax.jit(
        fn,
        out_shardings=out_shardings,
        donate_argnums=donate_argnums,
        compiler_options=compiler_options,
    )
    if is_local(placement.state):
        if inputs is not None:
            program = program.lower(*inputs).compile()
        # Of a block on devices of several processes one keeps the record.
        is_first = placement.devices[0].process_index == jax.process_index()
        return recorder.watch(program, *traced, placement) if recorder and is_first else program
    known = {}

    def absent(*args):
        # States keep their shapes; batches differ in training and evaluation.
        shapes = tuple(arg.shape for arg in args if isinstance(arg, jax.Array))
        if shapes not in known:
            known[shapes] = jax.tree.map(
                lambda sharding, outputs: jax.tree.map(
                    lambda leaf: stand_in(leaf.shape, leaf.dtype, sharding), outputs
                ),
                out_shardings,
                jax.eval_shape(fn, *args),
            )
        return known[shapes]

    return absent


def run_once(device: jax.Device) -> dict[str, Any]:
    """Compiler options of a program that runs once: on a CPU it need not be fast.

    It compiles in a quarter of the time; the numbers are the same.
    """
    return {"xla_backend_optimization_level": 0} if device.platform == "cpu" else {}


def for_devices(fn: Callable[..., Any], placement: BlockPlacement) -> Callable[..., Any]:
    """``fn``, traced so that it suits a batch that is split over the devices, if there are several."""
    return whole_batch()(fn) if len(placement.devices) > 1 else fn


def one_for_equal_blocks(
    blocks: Sequence[Block],
    placements: Sequence[BlockPlacement],
    make: Callable[[Block], Callable[..., Any]],
) -> list[Callable[..., Any]]:
    """``make(block)`` for each block, the same function for those that compute the same.

    ``jax.jit`` compiles a function once for all arguments of the same shapes and devices, so blocks
    of equal shape on the same devices share one program. It is named after all of them.

    Args:
      blocks: of one network, in order.
      placements: one a block.
      make: returns what such blocks compute; it may not depend on their places in the network.
    """
    groups: list[list[int]] = []
    for position, block in enumerate(blocks):
        for group in groups:
            first = blocks[group[0]]
            same_place = dataclasses.replace(
                block, index=first.index, first_layer=first.first_layer
            )
            if is_equal(same_place, first) and placements[position] == placements[group[0]]:
                group.append(position)
                break
        else:
            groups.append([position])
    made = {}
    for group in groups:
        name = "_".join(["block", *(str(blocks[position].index) for position in group)])
        made |= dict.fromkeys(group, jax.named_call(make(blocks[group[0]]), name=name))
    return [made[position] for position in range(len(blocks))]


def activation_shapes(
    blocks: Sequence[Block], block_states: Sequence[BlockState], images: jax.ShapeDtypeStruct
) -> list[jax.ShapeDtypeStruct]:
    """The shapes of what each block hands on, [B, ...], for a batch of such images."""
    shapes = [images]
    for block, state in zip(blocks, block_states, strict=True):
        shapes.append(jax.eval_shape(make_block_feed(block), state, shapes[-1]))
    return shapes[1:]


def make_logits(blocks: Sequence[Block], placements: Sequence[BlockPlacement]) -> Logits:
    """Returns `Runner.logits`: one program where all blocks live together, else one a block."""
    evaluates = [make_block_eval(block) for block in blocks]

    def run(block_states, images, evaluates, to_block):
        x, heads = images, {}
        for block, state, evaluate in zip(blocks, block_states, evaluates, strict=True):
            x, logits = evaluate(
                state.params, state.batch_stats, to_block(x, placements[block.index])
            )
            if block.classifies:
                heads[block.index] = logits
        return heads

    if len({placement.devices for placement in placements}) == 1:
        fused = lambda block_states, images: run(
            block_states, images, evaluates, lambda x, placement: x
        )
        return block_program(fused, placements[0], placements[0].batch)

    programs = [
        block_program(evaluate, placement, (placement.batch, placement.batch))
        for evaluate, placement in zip(evaluates, placements)
    ]

    def logits(block_states, images):
        to_block = lambda x, placement: move(x, placement.batch)
        heads = run(block_states, images, programs, to_block)
        return {block: move(logits, placements[-1].batch) for block, logits in heads.items()}

    return logits


def make_fused_step(
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    operations: Sequence[tuple[int, str]],
    *,
    log_gradient_norm: bool = False,
    one_after_another: bool = True,
) -> Callable[..., tuple[tuple[BlockState, ...], dict[int, Metrics]]]:
    """Returns one step of all blocks, each block's backward pass right after its forward pass.

    So a block's activations can die before the next block runs: less memory than backprop.

    Args:
      blocks: of one network, in order.
      optimizer: as in `init_states`.
      operations: (block, `UPDATE` or `FEED`), in order.
      log_gradient_norm: as in `make_block_step`.
      one_after_another: a block begins when the one before has made its update, so that its
        activations are gone by then. Otherwise the compiler may run blocks at once, as nothing
        flows backwards: less time where one block leaves cores idle, and as much memory as
        backprop takes. The numbers agree up to rounding.

    Returns:
      ``step(states, batch, keys) -> (states, metrics)``, pure; ``keys`` are `block_key` of each.
    """
    updates = [
        make_block_step(block, optimizer, log_gradient_norm=log_gradient_norm) for block in blocks
    ]
    feeds = [make_block_feed(block) for block in blocks]

    def step(states, batch, keys):
        states, metrics, x, updated = list(states), {}, batch.images, None
        for block, operation in operations:
            with jax.named_scope(f"block_{block}"):
                if one_after_another and updated is not None:
                    x = _after(states[updated].params, x)
                if operation == UPDATE:
                    output = updates[block](states[block], x, batch.labels, keys[block])
                    states[block], x, updated = output.state, output.activations, block
                    metrics[block] = output.metrics
                else:
                    x = feeds[block](states[block], x)
        return tuple(states), metrics

    return step


def _after(params: Any, x: jax.Array) -> jax.Array:
    """x, unchanged, but to be computed after all of ``params``: it depends on them as data.

    The condition always holds, as 32 bits have at most 32 ones; XLA does not see that, and so has
    to keep the order on every platform. (A `jax.lax.optimization_barrier` it drops before it orders
    a CPU's operations; on a GPU a block a layer took 213 MiB by it, 149 by this.)
    """
    bits = sum(
        jax.lax.bitcast_convert_type(leaf[(0,) * leaf.ndim].astype(jnp.float32), jnp.uint32)
        for leaf in jax.tree.leaves(params)
        if leaf.size
    )
    return jnp.where(jax.lax.population_count(bits) <= 32, x, jnp.zeros_like(x))


def make_fused_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """All blocks in one program on one mesh, see `make_fused_step`.

    Args:
      config: its placement and what it logs.
      blocks: of one network, in order.
      optimizer: as in `init_states`.
      key: the run's random key.
      placements: all of one mesh.
    """
    make_step = functools.partial(
        make_fused_step,
        blocks,
        optimizer,
        log_gradient_norm=config.train.log_gradient_norm,
        one_after_another=config.placement.one_after_another,
    )
    placement = placements[0]
    keys = [place(block_key(key, block), placement.state) for block in blocks]

    # Outputs are pinned to where inputs live: the compiler must not choose anew each step.
    make_program = functools.partial(
        block_program, placement=placement, out_shardings=placement.state, donate_argnums=0
    )

    # A program for each list of operations: one in synchronous training, K in sequential.
    @functools.cache
    def program(operations):
        return make_program(make_step(operations), traced=(operations[-1][0], UPDATE))

    @functools.cache
    def program_of_steps(operations, num_steps, make_batch):
        one_step = make_step(operations)

        def steps(states, source, first_step, keys):
            body = lambda states, step: one_step(states, make_batch(source, step), keys)
            return jax.lax.scan(body, states, first_step + jnp.arange(num_steps, dtype=jnp.int32))

        return make_program(steps)

    def operations_of(tasks):
        return tuple((task.block, task.operation) for task in tasks)

    def step(state, tasks, batch_at):
        batch = batch_at(tasks[0].batch)
        batch = batch.replace(labels=place(batch.labels, placement.batch))
        states, metrics = program(operations_of(tasks))(state.blocks, batch, keys)
        return TrainState(states, state.memory), metrics

    def steps(state, tasks_of_steps, stream):
        first = tasks_of_steps[0]
        run = program_of_steps(operations_of(first), len(tasks_of_steps), stream.batch)
        first_step = place(np.int32(first[0].batch), placement.state)
        source = stream.source_at(first[0].batch)
        states, metrics = run(state.blocks, source, first_step, keys)
        return TrainState(states, state.memory), metrics

    max_in_flight, in_flight = steps_in_flight(config.placement, placements), collections.deque()
    return Runner(
        step=bound_in_flight(step, max_in_flight, in_flight),
        steps=bound_in_flight(steps, max_in_flight, in_flight),
        logits=make_logits(blocks, placements),
    )


def make_pipelined_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """One program a block, each on its own mesh; activations move from mesh to mesh.

    The host only dispatches. A block starts as soon as its input has arrived and its own
    previous update is done, so block 0 works on step t + 1 while block 1 works on step t.

    Args:
      config: its placement and what it logs.
      blocks: of one network, in order.
      optimizer: as in `init_states`.
      key: the run's random key.
      placements: one a block.
    """
    log_norm = config.train.log_gradient_norm
    update_fns = one_for_equal_blocks(
        blocks,
        placements,
        lambda block: make_block_step(block, optimizer, log_gradient_norm=log_norm),
    )
    updates = [
        block_program(
            update,
            placement,
            StepOutput(placement.state, placement.batch, placement.state),
            traced=(block.index, UPDATE),
            donate_argnums=0,
        )
        for block, placement, update in zip(blocks, placements, update_fns, strict=True)
    ]
    feeds = [
        block_program(
            make_block_feed(block), placement, placement.batch, traced=(block.index, FEED)
        )
        for block, placement in zip(blocks, placements)
    ]
    keys = [place(block_key(key, block), where.state) for block, where in zip(blocks, placements)]

    def step(state, tasks, batch_at):
        states, metrics = list(state.blocks), {}
        batch = batch_at(tasks[0].batch)
        x = batch.images
        for task in tasks:
            block = task.block
            x = move(x, placements[block].batch)
            if task.operation == UPDATE:
                labels = place(batch.labels, placements[block].batch)
                output = updates[block](states[block], x, labels, keys[block])
                states[block], x = output.state, output.activations
                metrics[block] = output.metrics
            else:
                x = feeds[block](states[block], x)
        return TrainState(tuple(states), state.memory), metrics

    return Runner(
        step=bound_in_flight(step, steps_in_flight(config.placement, placements)),
        logits=make_logits(blocks, placements),
    )


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """The runner that ``config.placement`` asks for.

    Example:
      One step of two blocks, each with a local loss, on vectors of six numbers. All weights are
      alike, so the logits are too: the loss of three classes is the logarithm of 3.

      >>> import flax.linen as nn
      >>> from dgl_jax.config import LossConfig
      >>> from dgl_jax.losses import make_loss_fn
      >>> from dgl_jax.placement import make_placements
      >>> from dgl_jax.schedule import synchronous
      >>> loss_fn, optimizer, key = make_loss_fn(LossConfig()), optax.sgd(0.1), jax.random.key(0)
      >>> layer, head = [nn.Dense(n, kernel_init=nn.initializers.ones) for n in (4, 3)]
      >>> blocks = [Block(k, k, (layer,), head, loss_fn) for k in (0, 1)]
      >>> placements = make_placements(PlacementConfig(), num_blocks=2)
      >>> runner = make_runner(Config(), blocks, optimizer, key, placements)
      >>> states = init_states(blocks, optimizer, key, (6,), placements)
      >>> batch_at = lambda step: Batch(jnp.ones((2, 6)), jnp.array([0, 2]))
      >>> tasks = next(synchronous(num_blocks=2, num_updates=10).tasks(first_step=0))
      >>> state, metrics = runner.step(TrainState(states), tasks, batch_at)
      >>> [round(float(metrics[block]["loss"]), 4) for block in (0, 1)]
      [1.0986, 1.0986]
    """
    make = {"fused": make_fused_runner, "pipelined": make_pipelined_runner}[config.placement.kind]
    return make(config, blocks, optimizer, key, placements)


def steps_in_flight(config: PlacementConfig, placements: Sequence[BlockPlacement]) -> int:
    """How many steps may be unfinished: ``max_steps_in_flight``, and the pipeline's depth on top.

    On its way through N groups of devices a step has N - 1 others behind it that have begun.
    """
    num_groups = len({placement.devices for placement in placements})
    return num_groups - 1 + config.max_steps_in_flight


def bound_in_flight(
    step: Step | Steps, max_steps_in_flight: int, in_flight: collections.deque | None = None
) -> Step | Steps:
    """Lets the host run ahead of the devices by so many calls of ``step`` and no more.

    Without a bound a fast first block would fill the memory with activations. Functions that take
    turns have one queue ``in_flight``.
    """
    in_flight = collections.deque() if in_flight is None else in_flight

    def bounded_step(state, tasks, batches):
        if len(in_flight) == max_steps_in_flight:
            jax.block_until_ready(in_flight.popleft())
        state, metrics = step(state, tasks, batches)
        done = metrics
        if jax.process_count() > 1 and metrics:
            # A process that has none of the step's last block hears of its end, and so can't
            # run ahead of those that have.
            done = (metrics, announce(jax.tree.leaves(metrics[max(metrics)])[0]))
        in_flight.append(done)
        return state, metrics

    return bounded_step
