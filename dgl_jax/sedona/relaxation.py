"""The continuous relaxation: decision variables, and a network with every candidate head.

A network of L layers has L - 1 places for a cut, one after each layer but the last. At each
place two decisions are relaxed: which learning signal the layers below get (the local loss's
gradient, or the one from above), and which of M candidate heads gives the local loss.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from dgl_jax.block import head_key
from dgl_jax.losses import LossFn
from dgl_jax.models.network import Network, apply_module, init_module
from dgl_jax.types import BlockState, Params


@flax.struct.dataclass
class DecisionVariables:
    """What the search learns.

    Attributes:
      alpha: float32 [L - 1, 2], logits of (local, from above).
      beta: float32 [L - 1, M], logits of the candidate heads.
    """

    alpha: jax.Array
    beta: jax.Array


@flax.struct.dataclass
class Decisions:
    """Decision variables after their softmax; rows sum to 1. One-hot rows are hard decisions.

    Attributes:
      signal: float [L - 1, 2], the weights of (local, from above).
      head: float [L - 1, M], the weights of the candidate heads.
    """

    signal: jax.Array
    head: jax.Array


def init_variables(num_layers: int, num_candidates: int) -> DecisionVariables:
    """Zeros: 0.5 of each signal, and all candidates alike."""
    places = num_layers - 1
    return DecisionVariables(jnp.zeros((places, 2)), jnp.zeros((places, num_candidates)))


def relax(variables: DecisionVariables) -> Decisions:
    """The softmax of each row.

    Example:
      >>> decisions = relax(init_variables(num_layers=2, num_candidates=4))
      >>> print(decisions.signal, decisions.head)
      [[0.5 0.5]] [[0.25 0.25 0.25 0.25]]

    Source: SEDONA, the continuous relaxation; temperature 1.
    Deviation: none.
    """
    return Decisions(
        jax.nn.softmax(variables.alpha, axis=-1), jax.nn.softmax(variables.beta, axis=-1)
    )


@dataclasses.dataclass(frozen=True)
class RelaxedNetwork:
    """A network with every candidate head at every place for a cut.

    Attributes:
      layers: L flax modules.
      candidates: M heads; each place has parameters of its own for each of them.
      head: the network's own, on the last layer.
      loss_fn: of logits and labels, the same at all places.
    """

    layers: tuple[nn.Module, ...]
    candidates: tuple[nn.Module, ...]
    head: nn.Module
    loss_fn: LossFn


def relaxed_network(
    network: Network, candidates: Sequence[nn.Module], loss_fn: LossFn
) -> RelaxedNetwork:
    """Puts the candidates at every place of a network; as `methods.dgl.make_blocks` does one."""
    return RelaxedNetwork(network.layers, tuple(candidates), network.head, loss_fn)


def init_state(
    network: RelaxedNetwork,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    x: jax.Array,
    kernel_init: str = "own",
    norm_init: str = "own",
    compiler_options: dict[str, Any] | None = None,
) -> BlockState:
    """Initialises all layers and candidates, as `block.init_block_state` does one block.

    Args:
      network: the relaxed network.
      optimizer: the inner optimizer.
      key: the run's random key.
      x: an example input, [B, ...]; only its shape and dtype matter.
      kernel_init: as of `init_module`.
      norm_init: as of `init_module`.
      compiler_options: as of `jax.jit`.

    Returns:
      The state before the first inner step. Its parameters (and statistics) are
      ``{"layers": L trees, "candidates": L - 1 tuples of M trees, "head": tree}``.
    """
    # A program for each kind of module and shape, not one for all: a deep network has few kinds.
    init = functools.partial(init_module, kernel_init=kernel_init, norm_init=norm_init)
    init = jax.jit(init, static_argnums=0, compiler_options=compiler_options)
    layers, candidates = [], []
    for place, layer in enumerate(network.layers):
        params, stats = init(layer, jax.random.fold_in(key, place), x)
        layers.append((params, stats))
        run = functools.partial(apply_module, layer, train=False)
        y, _ = jax.eval_shape(run, params, stats, x)
        x = jnp.zeros(y.shape, y.dtype)
        place_key = head_key(key, place)
        if place < len(network.layers) - 1:
            candidates.append(
                [
                    init(candidate, jax.random.fold_in(place_key, index), x)
                    for index, candidate in enumerate(network.candidates)
                ]
            )
    head = init(network.head, place_key, x)

    def part(index):
        return {
            "layers": tuple(pair[index] for pair in layers),
            "candidates": tuple(tuple(pair[index] for pair in row) for row in candidates),
            "head": head[index],
        }

    return BlockState(jnp.zeros([], jnp.int32), part(0), part(1), optimizer.init(part(0)))


def head_logits(
    network: RelaxedNetwork,
    place: int,
    params: Params,
    batch_stats: Params,
    weights: jax.Array | None,
    x: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, Params]:
    """The logits after a layer, in training mode: the candidates', weighted.

    Args:
      network: the relaxed network.
      place: the layer, 0-based.
      params: the place's, as `head_part` returns them.
      batch_stats: likewise.
      weights: float [M], `Decisions.head` of the place; not used after the last layer.
      x: the layer's output, [B, ...].
      key: random key of dropout.

    Returns:
      ``(logits [B, num_classes], batch_stats)``.

    Source: SEDONA's released code, which averages logits, not losses.
    Deviation: it divides the head's input by the local signal's weight and multiplies the
      logits with it, to keep that weight out of the head's gradient, which by the paper has it
      not. Here the head's gradient is simply taken apart (`inner.blended_gradient`).
    """
    if place == len(network.layers) - 1:
        return apply_module(network.head, params, batch_stats, x, train=True, key=key)
    outputs = [
        apply_module(candidate, params[index], batch_stats[index], x, train=True, key=key)
        for index, candidate in enumerate(network.candidates)
    ]
    logits = sum(weight * logits for weight, (logits, _) in zip(weights, outputs))
    return logits, tuple(stats for _, stats in outputs)


def head_part(tree: Params, place: int) -> Params:
    """The part of the parameters (or statistics) that the heads after a layer have."""
    is_last = place == len(tree["layers"]) - 1
    return tree["head"] if is_last else tree["candidates"][place]


def with_head_parts(layers: Sequence[Params], heads: Sequence[Params]) -> Params:
    """The whole tree, from one part a layer and one `head_part` a layer."""
    return {"layers": tuple(layers), "candidates": tuple(heads[:-1]), "head": heads[-1]}


def eval_logits(
    network: RelaxedNetwork, params: Params, batch_stats: Params, x: jax.Array
) -> jax.Array:
    """The network's own logits [B, num_classes] in evaluation mode, without the candidates."""
    for place, layer in enumerate(network.layers):
        x, _ = apply_module(
            layer, params["layers"][place], batch_stats["layers"][place], x, train=False
        )
    return apply_module(network.head, params["head"], batch_stats["head"], x, train=False)[0]
