"""A network is a sequence of layers and a head; here is how one module runs.

This is the seam to flax: outside ``models/`` and ``auxiliary.py`` a module is only ever
handed to `init_module` and `apply_module`.
"""

import dataclasses
import inspect

import flax.linen as nn
import jax

from dgl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Network:
    """A sequence of layers (the smallest units at which it may be cut) and a head.

    A user's own model is just ``Network("mine", (layer, layer, ...), head)``. Layers
    and head are flax.linen modules; ``__call__(x)`` or ``__call__(x, train)``.

    Attributes:
      name: what the network is called in errors.
      layers: modules, each mapping [B, ...] to [B, ...].
      head: the module that maps the last layer's output to logits [B, num_classes].

    Example:
      >>> network = Network("mine", [nn.Dense(8), nn.Dense(8)], head=nn.Dense(10))
      >>> len(network.layers)
      2
    """

    name: str
    layers: tuple[nn.Module, ...]
    head: nn.Module

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))


def train_argument(module: nn.Module, train: bool) -> dict[str, bool]:
    """Modules without a ``train`` argument (nn.Dense, a user's own) are called without it."""
    has_train = "train" in inspect.signature(type(module).__call__).parameters
    return {"train": train} if has_train else {}


def init_module(
    module: nn.Module,
    key: jax.Array,
    x: jax.Array,
    kernel_init: str = "own",
    norm_init: str = "own",
) -> tuple[Params, Params]:
    """Initialises one module.

    Args:
      module: a flax.linen module.
      key: a typed random key.
      x: an example input, [B, ...].
      kernel_init: ``he_normal`` draws all kernels anew by `he_normal_kernels`; ``own`` leaves them.
      norm_init: ``uniform`` draws the weights of all normalisation layers anew by
        `uniform_norm_weights`; ``own`` leaves them.

    Returns:
      ``(params, batch_stats)``; an empty dict where the module has none.

    Raises:
      ValueError: if the module has variables of another kind than these two.
    """
    variables = dict(module.init(key, x, **train_argument(module, False)))
    params = variables.pop("params", {})
    batch_stats = variables.pop("batch_stats", {})
    if variables:
        raise ValueError(
            f"module={type(module).__name__} has variables {sorted(variables)}: only 'params' "
            "and 'batch_stats' are supported; keep other state outside the module"
        )
    if kernel_init == "he_normal":
        params = he_normal_kernels(params, key)
    if norm_init == "uniform":
        params = uniform_norm_weights(params, key)
    return params, batch_stats


def he_normal_kernels(params: Params, key: jax.Array) -> Params:
    """Draws every kernel from He's normal distribution: a variance of 2 / fan-in.

    Source: SEDONA's released code, of all networks and heads.
    """
    draw = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    return _redraw(params, key, "kernel", draw)


def uniform_norm_weights(params: Params, key: jax.Array) -> Params:
    """Draws the weights of all normalisation layers from U(0, 1).

    Source: DGL's small networks: the PyTorch of their time started BatchNorm so.
    """
    return _redraw(params, key, "scale", jax.random.uniform)


def _redraw(params: Params, key: jax.Array, name: str, draw: nn.initializers.Initializer) -> Params:
    """Draws every parameter of this name anew."""
    leaves, structure = jax.tree.flatten_with_path(params)
    drawn = [
        draw(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
        if getattr(path[-1], "key", None) == name
        else leaf
        for index, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def apply_module(
    module: nn.Module,
    params: Params,
    batch_stats: Params,
    x: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
    **inputs: jax.Array,
) -> tuple[jax.Array, Params]:
    """Runs one module.

    Args:
      module: a flax.linen module.
      params: its parameters.
      batch_stats: its BatchNorm statistics.
      x: its input, [B, ...].
      train: whether BatchNorm uses (and updates) the batch's statistics and dropout drops.
      key: the random key of dropout; needed only in training with dropout.
      **inputs: what else the module's ``__call__`` takes, such as a synthesizer's ``labels``.

    Returns:
      ``(y, batch_stats)``; the statistics are the given ones where ``train`` is false.

    Example:
      >>> x = jax.numpy.ones((2, 4))
      >>> params, batch_stats = init_module(nn.Dense(3), jax.random.key(0), x)
      >>> y, batch_stats = apply_module(nn.Dense(3), params, batch_stats, x, train=False)
      >>> y.shape, batch_stats
      ((2, 3), {})
    """
    variables = {"params": params, "batch_stats": batch_stats}
    rngs = {} if key is None else {"dropout": key}
    inputs |= train_argument(module, train)
    if not train:
        return module.apply(variables, x, **inputs), batch_stats
    y, updated = module.apply(variables, x, **inputs, rngs=rngs, mutable=["batch_stats"])
    return y, updated.get("batch_stats", batch_stats)


def output_shape(module: nn.Module, x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """That of a module's output while it is initialised; nothing is computed.

    It is found once for all modules that are equal, which must compute the same.

    Example:
      >>> x = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
      >>> output_shape(nn.Conv(16, (3, 3), strides=2), x).shape
      (1, 4, 4, 16)
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    try:
        hash(module)
    except TypeError:  # It has lists or arrays for attributes.
        return jax.eval_shape(lambda x: _first_output(module, x), shape)
    return _cached_first_output.eval_shape(module, shape)


def _first_output(module: nn.Module, x: jax.Array) -> jax.Array:
    return module.init_with_output(jax.random.key(0), x, **train_argument(module, False))[0]


_cached_first_output = jax.jit(_first_output, static_argnums=0)
