"""Runs of equal layers as one loop, so that a deep network compiles about as fast as a shallow one.

ResNet-152 has 50 layers in 9 runs. A *run* (first, end) is of neighbours that compute the same, but
for the values of their weights.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.models.network import output_shape

Runs = list[tuple[int, int]]


def equal_layers(layers: Sequence[Any], x: jax.Array, others: Sequence[Any] | None = None) -> Runs:
    """The longest runs: of equal modules, whose inputs and outputs are all of one shape.

    Args:
      layers: flax modules, one after another.
      x: the first one's input, an array or its shape.
      others: trees of one a layer, whose shapes must be equal too in a run.
    """
    others = others or (None,) * len(layers)

    def kind(place):
        return layers[place], jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), others[place])

    runs, first = [], 0
    while first < len(layers):
        y = output_shape(layers[first], x)
        end = first + 1
        if (x.shape, x.dtype) == (y.shape, y.dtype):
            while end < len(layers) and is_equal(kind(end), kind(first)):
                end += 1
        runs.append((first, end))
        x, first = y, end
    return runs


def is_equal(a: Any, b: Any) -> bool:
    """``a == b``; False for modules that can't be compared, as those with arrays for attributes."""
    try:
        return bool(a == b)
    except ValueError:
        return False


def stack(runs: Runs, trees: Sequence[Any]) -> list[Any]:
    """One tree a layer in, one a run out; of a run of several layers the leaves are stacked."""
    return [
        trees[first]
        if end == first + 1
        else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees[first:end])
        for first, end in runs
    ]


def unstack(runs: Runs, stacked: Sequence[Any]) -> list[Any]:
    """The inverse of `stack`."""
    trees = []
    for (first, end), tree in zip(runs, stacked):
        if end == first + 1:
            trees.append(tree)
        else:
            trees += [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(end - first)]
    return trees


def scan_layers(
    runs: Runs,
    body: Callable[[int, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Sequence[Any],
    reverse: bool = False,
) -> tuple[Any, list[Any]]:
    """``carry, y = body(place, carry, x)`` for each layer in turn, equal layers as a `lax.scan`.

    Args:
      runs: of `equal_layers`.
      body: ``place`` is the run's first layer.
      carry: the first one.
      xs: one tree a run, as `stack` makes them.
      reverse: whether to go from the last layer to the first.

    Returns:
      The last carry, and one tree a run, as `stack` makes them.
    """
    ys = [None] * len(runs)
    order = range(len(runs))
    for index in reversed(order) if reverse else order:
        first, end = runs[index]
        run_body = functools.partial(body, first)
        if end == first + 1:
            carry, ys[index] = run_body(carry, xs[index])
        else:
            carry, ys[index] = jax.lax.scan(run_body, carry, xs[index], reverse=reverse)
    return carry, ys
