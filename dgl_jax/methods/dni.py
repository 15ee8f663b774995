"""Decoupled neural interfaces (Jaderberg et al., ICML 2017): blocks learn from synthetic gradients.

On every block k but the last sits a synthesizer M_k. It predicts from the block's output h_k
(cDNI: and from the labels) the gradient of the network's loss there, and the block learns from
that at once. What arrives at h_k when the block above does the same is M_k's target: only the
last block sees the loss, and its gradient comes down one block a step, through the synthesizers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgl_jax.auxiliary import Synthesizer
from dgl_jax.block import Block, apply_gradients, block_key, forward, forward_layers
from dgl_jax.config import Config
from dgl_jax.losses import LossFn, logits_of
from dgl_jax.methods import dgl
from dgl_jax.methods.method import Method, both_ways_bytes
from dgl_jax.models.network import Network, apply_module
from dgl_jax.pipeline import Runner, bound_in_flight, for_devices, make_logits
from dgl_jax.placement import BlockPlacement
from dgl_jax.types import Batch, BlockState, Metrics, TrainState

# Takes the gradient that arrived at the block's output.
Learn = Callable[[jax.Array], tuple[BlockState, Metrics]]


def make_blocks(
    network: Network,
    cuts: Sequence[int],
    auxiliary_head: Any,
    loss_fn: LossFn | Sequence[LossFn],
    *,
    conditioned: bool,
) -> tuple[Block, ...]:
    """Cuts a network into blocks with a synthesizer each; the last has the network's own head.

    Args:
      network: layers and head.
      cuts: the 0-based layers after which to cut, where the output is a map [B, H, W, C].
      auxiliary_head: not used itself; the synthesizers take its ``num_classes`` and ``dtype``.
      loss_fn: the network's loss, a function of its head's output and the labels; of a sequence
        the last.
      conditioned: whether the synthesizers see the labels (cDNI).

    Example:
      >>> import flax.linen as nn
      >>> from dgl_jax.auxiliary import make_auxiliary
      >>> network = Network("mine", [nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))], head=nn.Dense(10))
      >>> blocks = make_blocks(network, (0,), make_auxiliary("mlp", 10), None, conditioned=True)
      >>> type(blocks[0].head).__name__, blocks[0].head.conditioned, blocks[0].classifies
      ('Synthesizer', True, False)

    Source: Jaderberg et al. 2017, Appendix C.1, as DGL's Figure 2 replicates it.
    Deviation: none.
    """
    heads = auxiliary_head
    if not isinstance(heads, Sequence):
        heads = (heads,) * len(cuts)
    synthesizers = tuple(
        Synthesizer(head.num_classes, conditioned, getattr(head, "dtype", None)) for head in heads
    )
    *lower, last = dgl.make_blocks(network, cuts, synthesizers, loss_fn)
    lower = (dataclasses.replace(block, loss_fn=None, classifies=False) for block in lower)
    return (*lower, last)


def synthesizer_loss(synthetic: jax.Array, target: jax.Array) -> jax.Array:
    """The squared error, summed over the features of an example, the mean over the batch.

    Example:
      >>> float(synthesizer_loss(jnp.ones((2, 3)), jnp.zeros((2, 3))))  # Three features, off by 1.
      3.0

    Source: the scale is that of DGL's replication of DNI.
    """
    dtype = jnp.promote_types(synthetic.dtype, jnp.float32)
    error = synthetic.astype(dtype) - target.astype(dtype)
    return jnp.sum(jnp.square(error)) / len(error)


def make_block_pass(
    block: Block, optimizer: optax.GradientTransformation, *, log_gradient_norm: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array, Learn]]:
    """Returns what one block does in a step, as a pure function.

    Args:
      block: the block.
      optimizer: the transformation of layers and synthesizer.
      log_gradient_norm: whether the metrics have the norm of the gradients it learns from.

    Returns:
      ``run(state, x, labels, key) -> (activations, gradient, learn)``: the block's output; the
      gradient that it sends down, to x; and ``learn(target) -> (state, metrics)``, its update
      once the gradient that its synthesizer is to predict has come from above. The last block
      learns from the loss, and needs no target.
    """

    def update(state, gradients, batch_stats, metrics):
        if log_gradient_norm:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, batch_stats, optimizer), metrics

    def from_synthetic_gradient(state, x, labels, key):
        params, batch_stats = state.params, state.batch_stats

        def layers(params, x):
            return forward_layers(block, params, batch_stats["layers"], x, train=True, key=key)

        h, layers_vjp, layer_stats = jax.vjp(layers, params["layers"], x, has_aux=True)

        def synthesizer(params):
            return apply_module(
                block.head, params, batch_stats["head"], h, train=True, labels=labels
            )

        synthetic, synthesizer_vjp, head_stats = jax.vjp(synthesizer, params["head"], has_aux=True)
        layer_gradients, gradient = layers_vjp(synthetic)

        def learn(target):
            loss, error = jax.value_and_grad(synthesizer_loss)(synthetic, target)
            (head_gradients,) = synthesizer_vjp(error)
            metrics = {"loss": loss, "gradient_cosine": _cosine(synthetic, target)}
            gradients = {"layers": layer_gradients, "head": head_gradients}
            return update(state, gradients, {"layers": layer_stats, "head": head_stats}, metrics)

        return h, gradient, learn

    def from_loss(state, x, labels, key):
        def loss_fn(params, x):
            activations, output, batch_stats = forward(
                block, params, state.batch_stats, x, train=True, key=key
            )
            return block.loss_fn(output, labels), (activations, output, batch_stats)

        (loss, (activations, output, batch_stats)), (gradients, gradient) = jax.value_and_grad(
            loss_fn, argnums=(0, 1), has_aux=True
        )(state.params, x)

        def learn(target):
            del target
            top1 = jnp.mean(jnp.argmax(logits_of(output), axis=-1) == labels)
            return update(state, gradients, batch_stats, {"loss": loss, "top1": top1})

        return activations, gradient, learn

    def run(state: BlockState, x: jax.Array, labels: jax.Array, key: jax.Array):
        step_key = jax.random.fold_in(block_key(key, block), state.step)
        pass_fn = from_loss if block.classifies else from_synthetic_gradient
        return pass_fn(state, x, labels, step_key)

    return run


def make_step(
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    *,
    log_gradient_norm: bool = False,
) -> Callable[..., tuple[tuple[BlockState, ...], dict[int, Metrics]]]:
    """Returns ``step(states, batch, key) -> (states, metrics)``: one update of every block.

    All from the parameters before the update. With f_k the layers of block k,
      h_k = f_k(h_{k-1}),   ĝ_k = M_k(h_k),
      f_k learns from ĝ_k, the last block from the loss,
      g_{k-1} = ĝ_k · ∂f_k/∂h_{k-1},   M_{k-1} learns from |ĝ_{k-1} - g_{k-1}|^2.

    Args:
      blocks: of one network, in order.
      optimizer: the transformation that every block has its own state of.
      log_gradient_norm: as in `make_block_pass`.

    Source: Jaderberg et al. 2017, section 2; the order within a step is dni-pytorch's, which
      DGL's Figure 2 uses: every target comes from the same step.
    Deviation: none.
    """
    passes = [
        make_block_pass(block, optimizer, log_gradient_norm=log_gradient_norm) for block in blocks
    ]

    def step(states: Sequence[BlockState], batch: Batch, key: jax.Array):
        x, gradients, learns = batch.images, [], []
        for block, run, state in zip(blocks, passes, states, strict=True):
            with jax.named_scope(f"block_{block.index}"):
                x, gradient, learn = run(state, x, batch.labels, key)
            gradients.append(gradient)
            learns.append(learn)
        targets = [*gradients[1:], None]
        outcomes = [learn(target) for learn, target in zip(learns, targets, strict=True)]
        states, metrics = zip(*outcomes)
        return states, dict(enumerate(metrics))

    return step


def make_runner(
    config: Config,
    blocks: Sequence[Block],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placements: Sequence[BlockPlacement],
) -> Runner:
    """All blocks in one program on one mesh; the arguments are `make_fused_runner`'s."""
    where = placements[0].state
    step = make_step(blocks, optimizer, log_gradient_norm=config.train.log_gradient_norm)
    step = for_devices(step, placements[0])
    program = jax.jit(step, donate_argnums=0, out_shardings=where)
    key = jax.device_put(key, where)

    def run(state, tasks, batch_at):
        states, metrics = program(state.blocks, batch_at(tasks[0].batch), key)
        return TrainState(states, state.memory), metrics

    return Runner(
        step=bound_in_flight(run, config.placement.max_steps_in_flight),
        logits=make_logits(blocks, placements),
    )


def make_block_work(
    config: Config, block: Block, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[BlockState, jax.Array, jax.Array | None]]:
    """Returns a block's work of one step; its target is zero, which costs the same to learn."""
    del config
    run = make_block_pass(block, optimizer)

    def work(state: BlockState, x: jax.Array, labels: jax.Array, key: jax.Array):
        activations, gradient, learn = run(state, x, labels, key)
        next_state, _ = learn(jnp.zeros_like(activations))
        return next_state, activations, gradient if block.index else None

    return work


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of the angle between two arrays as vectors; 0 where one of them is zero."""
    a, b = (array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in (a, b))
    norms = jnp.sqrt(jnp.sum(jnp.square(a))) * jnp.sqrt(jnp.sum(jnp.square(b)))
    return jnp.sum(a * b) / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)


def _method(conditioned: bool) -> Method:
    return Method(
        functools.partial(make_blocks, conditioned=conditioned),
        dgl.make_schedule,
        make_runner,
        make_block_work,
        both_ways_bytes,
    )


DNI, CDNI = _method(conditioned=False), _method(conditioned=True)
