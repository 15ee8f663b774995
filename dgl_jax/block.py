"""One block: its layers, its head, its local loss; how it starts, learns and is evaluated.

Pure functions that know no device. This is the only file that stops a gradient between blocks:
what a block hands on carries none back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgl_jax.losses import LossFn, logits_of
from dgl_jax.models.equal_layers import Runs, equal_layers, scan_layers, stack, unstack
from dgl_jax.models.network import apply_module, init_module, output_shape
from dgl_jax.types import BlockState, Params, StepOutput

# The head of a block is keyed apart from its layers. Keys go by the layer's place in the
# network, not by the block, so that every cut of a network starts from the same weights.
_HEAD_KEY = 1 << 20

BlockStep = Callable[[BlockState, jax.Array, jax.Array, jax.Array], StepOutput]


@dataclasses.dataclass(frozen=True)
class Block:
    """The layers between two cuts, the head on top of them and the loss of that head.

    Attributes:
      index: 0-based, from the input.
      first_layer: the place in the network of the first of `layers`.
      layers: flax modules.
      head: the auxiliary head, or for the last block the network's own; None for a block that
        learns from a gradient that comes from above.
      loss_fn: maps the head's output and the labels to a scalar.
      classifies: whether the head's output has logits.
      scan_layers: whether runs of equal layers are loops, which compile faster. The state of such
        a run is one tree, whose leaves are its layers' stacked.
      remat: whether the backward pass computes each layer again from its input, instead of
        keeping what is inside it: less memory, more time. Runs of equal layers are loops then too:
        outside of loops XLA's CPU compiler undoes it.
      kernel_init: as of `init_module`.
      norm_init: as of `init_module`.
    """

    index: int
    first_layer: int
    layers: tuple[Any, ...]
    head: Any
    loss_fn: LossFn | None
    classifies: bool = True
    scan_layers: bool = False
    remat: bool = False
    kernel_init: str = "own"
    norm_init: str = "own"


def init_block_state(
    block: Block, optimizer: optax.GradientTransformation, key: jax.Array, x: jax.Array
) -> BlockState:
    """Initialises a block.

    Args:
      block: the block.
      optimizer: the block's own optax transformation.
      key: the run's random key, the same for all blocks.
      x: an example input, [B, ...]; only its shape and dtype matter.

    Returns:
      The state before the first step.

    Example:
      >>> import flax.linen as nn
      >>> block = Block(0, 0, layers=(nn.Dense(3),), head=nn.Dense(2), loss_fn=None)
      >>> state = init_block_state(block, optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 4)))
      >>> state.params["layers"][0]["kernel"].shape, state.params["head"]["kernel"].shape
      ((4, 3), (3, 2))
    """
    start = {"kernel_init": block.kernel_init, "norm_init": block.norm_init}
    layer_params, layer_stats = [], []
    for first, end in _runs(block, x, has_loops=block.scan_layers):
        init = lambda place, x=x, layer=block.layers[first]: init_module(
            layer, jax.random.fold_in(key, block.first_layer + place), x, **start
        )
        if end > first + 1:  # Its outputs are of its inputs' shape.
            params, stats = jax.lax.map(init, jnp.arange(first, end))
        else:
            params, stats = init(first)
            y = output_shape(block.layers[first], x)
            x = jnp.zeros(y.shape, y.dtype)
        layer_params.append(params)
        layer_stats.append(stats)
    last_layer = block.first_layer + len(block.layers) - 1
    head_params, head_stats = (
        ({}, {})
        if block.head is None
        else init_module(block.head, head_key(key, last_layer), x, **start)
    )
    params = {"layers": tuple(layer_params), "head": head_params}
    return BlockState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats={"layers": tuple(layer_stats), "head": head_stats},
        opt_state=optimizer.init(params),
    )


def head_key(key: jax.Array, layer: int) -> jax.Array:
    """The random key from which a head on top of a layer is initialised."""
    return jax.random.fold_in(jax.random.fold_in(key, _HEAD_KEY), layer)


def block_key(key: jax.Array, block: Block) -> jax.Array:
    """The block's own random key, from the run's; its place in the network is in nothing else.

    So blocks that compute the same can share one program.
    """
    return jax.random.fold_in(key, block.index)


def forward(
    block: Block,
    params: Params,
    batch_stats: Params,
    x: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Params]:
    """Runs a block's layers and its head.

    Args:
      block: the block.
      params: as in `BlockState`.
      batch_stats: as in `BlockState`.
      x: the block's input, [B, ...].
      train: whether BatchNorm uses the batch's statistics and dropout drops.
      key: random key of dropout, needed in training only.

    Returns:
      ``(activations, output, batch_stats)``: the last layer's output, the head's, and the
      running statistics after this batch.
    """
    x, layer_stats = forward_layers(
        block, params["layers"], batch_stats["layers"], x, train=train, key=key
    )
    dropout_key = None if key is None else jax.random.fold_in(key, _HEAD_KEY)
    output, head_stats = apply_module(
        block.head, params["head"], batch_stats["head"], x, train=train, key=dropout_key
    )
    return x, output, {"layers": layer_stats, "head": head_stats}


def forward_layers(
    block: Block,
    params: Params,
    batch_stats: Params,
    x: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Params]:
    """Runs a block's layers without its head; the arguments are the parts named ``layers``.

    Returns:
      ``(activations, batch_stats)``.
    """
    places = range(len(block.layers))
    keys = [None if key is None else jax.random.fold_in(key, place) for place in places]
    runs = _runs(block, x, has_loops=block.scan_layers or block.remat)

    def run_layer(place, x, layer):
        params, stats, key = layer
        return apply_module(block.layers[place], params, stats, x, train=train, key=key)

    if block.remat:
        run_layer = jax.checkpoint(run_layer, static_argnums=0)
    if not block.scan_layers:
        params, batch_stats = stack(runs, params), stack(runs, batch_stats)
    layers = list(zip(params, batch_stats, stack(runs, keys), strict=True))
    x, after = scan_layers(runs, run_layer, x, layers)
    return x, tuple(after if block.scan_layers else unstack(runs, after))


def _runs(block: Block, x: jax.Array, *, has_loops: bool) -> Runs:
    return (
        equal_layers(block.layers, x)
        if has_loops
        else [(k, k + 1) for k in range(len(block.layers))]
    )


def make_block_step(
    block: Block, optimizer: optax.GradientTransformation, *, log_gradient_norm: bool = False
) -> BlockStep:
    """Returns the update of one block (DGL, Algorithm 1, lines 4 to 6).

    The returned ``step(state, x, labels, key) -> StepOutput`` is pure; jit it with the state
    donated. Layers and head learn jointly from the block's local loss; the activations handed
    on come from the same forward pass, that is from the parameters before the update.

    Args:
      block: the block.
      optimizer: the transformation whose state `init_block_state` made.
      log_gradient_norm: whether the metrics have the local loss's gradient norm.

    Returns:
      ``step``, whose arguments are the block's state, its input [B, ...], the labels int32
      [B], and `block_key` of the block.

    Example:
      The head starts at zero, so the first loss is the logarithm of 2 and the gradient at the
      logits (0.5 - 1, 0.5) for label 0; with a rate of 1 the bias moves by as much.

      >>> import flax.linen as nn
      >>> from dgl_jax.config import LossConfig
      >>> from dgl_jax.losses import make_loss_fn
      >>> head = nn.Dense(2, kernel_init=nn.initializers.zeros)
      >>> block = Block(0, 0, (nn.Dense(3),), head, make_loss_fn(LossConfig()))
      >>> optimizer, key, x = optax.sgd(1.0), jax.random.key(0), jnp.ones((2, 4))
      >>> state = init_block_state(block, optimizer, key, x)
      >>> step = jax.jit(make_block_step(block, optimizer))
      >>> output = step(state, x, jnp.array([0, 0]), block_key(key, block))
      >>> round(float(output.metrics["loss"]), 4), output.state.params["head"]["bias"].tolist()
      (0.6931, [0.5, -0.5])
      >>> output.activations.shape, int(output.state.step)
      ((2, 3), 1)

    Source: DGL, Algorithm 1.
    Deviation: none.
    """

    def step(state: BlockState, x: jax.Array, labels: jax.Array, key: jax.Array) -> StepOutput:
        step_key = jax.random.fold_in(key, state.step)

        def local_loss(params):
            activations, output, batch_stats = forward(
                block, params, state.batch_stats, x, train=True, key=step_key
            )
            return block.loss_fn(output, labels), (activations, output, batch_stats)

        (loss, (activations, output, batch_stats)), gradients = jax.value_and_grad(
            local_loss, has_aux=True
        )(state.params)
        metrics = {"loss": loss}
        if block.classifies:
            metrics["top1"] = jnp.mean(jnp.argmax(logits_of(output), axis=-1) == labels)
        if log_gradient_norm:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        next_state = apply_gradients(state, gradients, batch_stats, optimizer)
        return StepOutput(next_state, jax.lax.stop_gradient(activations), metrics)

    return step


def apply_gradients(
    state: BlockState,
    gradients: Params,
    batch_stats: Params,
    optimizer: optax.GradientTransformation,
) -> BlockState:
    """The state after one update of the optimizer, with the given running statistics."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return BlockState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )


def make_block_feed(block: Block) -> Callable[[BlockState, jax.Array], jax.Array]:
    """Returns ``feed(state, x) -> activations``: the layers alone, in evaluation mode."""

    def feed(state: BlockState, x: jax.Array) -> jax.Array:
        activations, _ = forward_layers(
            block, state.params["layers"], state.batch_stats["layers"], x, train=False
        )
        return activations

    return feed


def make_block_eval(
    block: Block,
) -> Callable[[Params, Params, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Returns ``evaluate(params, batch_stats, x) -> (activations, logits)``, in evaluation mode.

    The logits are None for a block that does not classify.
    """

    def evaluate(params: Params, batch_stats: Params, x: jax.Array):
        if not block.classifies:
            activations, _ = forward_layers(
                block, params["layers"], batch_stats["layers"], x, train=False
            )
            return activations, None
        activations, output, _ = forward(block, params, batch_stats, x, train=False)
        return activations, logits_of(output)

    return evaluate
