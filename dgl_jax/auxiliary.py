"""The auxiliary heads: small networks that give a block its local loss, or its gradient.

A head takes a block's output (the input is not detached: block and head train together)
and returns logits, or more (`SimilarityHead`); all its widths follow from what it is given. A
`Synthesizer` returns a gradient instead, and is not in the table `AUXILIARY`.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgl_jax.config import AuxiliaryConfig
from dgl_jax.errors import UserError
from dgl_jax.models.layers import (
    Conv,
    PooledMLP,
    adaptive_avg_pool,
    batch_norm,
    torch_default_init,
)
from dgl_jax.models.network import train_argument


def _check_map(name: str, x: jax.Array) -> None:
    if x.ndim != 4:
        raise UserError(
            f"auxiliary.name={name} needs activations [B, H, W, C], but the block's output is "
            f"{list(x.shape)}; use auxiliary.name=mlp"
        )


class CNNAux(nn.Module):
    """Two 3x3 convolutions at full resolution: logits [B, num_classes] from [B, H, W, C].

    Twice (Conv 3x3 of C to C, BatchNorm, ReLU), average pool to 2x2, BatchNorm, Linear. It
    costs up to twice the largest layer.

    Source: DGL Table 1, "CNN-aux".
    Deviation: zero biases at the start (`torch_default_init`), in all heads; maps smaller
      than 2x2 are not enlarged.

    Attributes:
      num_classes: the output's width.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _check_map("cnn", x)
        x = _convolutions(x, 2, 3, train, self.dtype)
        x = batch_norm(train, self.dtype)(adaptive_avg_pool(x, (2, 2)))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=torch_default_init, dtype=self.dtype)(x)


class MLPAux(nn.Module):
    """Average pool to 2x2, then three hidden layers of 4C: logits from [B, H, W, C].

    Also takes [B, F] and [B, T, F] (the mean over T), with hidden layers of F.

    Source: DGL Table 1, "MLP-aux": the "3-layer MLP" has three hidden layers.
    Deviation: `max_hidden`; the default is the paper's.

    Attributes:
      num_classes: the output's width.
      max_hidden: a cap on the hidden layers' width; 0 for none.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    max_hidden: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return PooledMLP(self.num_classes, 3, self.max_hidden, self.dtype)(x, train)


class MLPSRAux(nn.Module):
    """1x1 convolutions at reduced resolution, then `MLPAux`: logits from [B, H, W, C].

    Average pool to a quarter of height and width (rounded up), three times (Conv 1x1 of C
    to C, BatchNorm, ReLU), average pool to 2x2, three hidden layers of 4C, Linear.

    Source: DGL Table 1, "MLP-SR-aux"; the head of the paper's larger networks.
    Deviation: `max_hidden`; the default is the paper's.

    Attributes:
      num_classes: the output's width.
      max_hidden: a cap on the hidden layers' width; 0 for none. Why one may want it: at 512
        channels this head has 10.4 % of the FLOPs of the largest layer of DGL's network
        (`cnn6`), above the paper's rule of 5 %.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    max_hidden: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _check_map("mlp_sr", x)
        _, height, width, _ = x.shape
        x = adaptive_avg_pool(x, (math.ceil(height / 4), math.ceil(width / 4)))
        x = _convolutions(x, 3, 1, train, self.dtype)
        return PooledMLP(self.num_classes, 3, self.max_hidden, self.dtype)(x, train)


class PredAux(nn.Module):
    """Average pool to at most `max_features` numbers, then one linear layer, zero at the start.

    The pool's kernel is doubled in height, then in width, and so on, until few enough numbers
    are left or one pixel is. Activations [B, F] and [B, T, F] are flattened as they are.

    Source: PredSim, the classifier of its "pred" and "predsim" losses, as in the authors' code.
    Deviation: where a kernel does not divide the map, bins overlap (`adaptive_avg_pool`); theirs
      pads the map with zeros.

    Attributes:
      num_classes: the output's width.
      max_features: the most numbers that the linear layer takes of one example; 2048 in most
        of the authors' experiments.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    max_features: int = 2048
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim == 4:
            x = adaptive_avg_pool(x, _pooled_size(*x.shape[1:], self.max_features))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, dtype=self.dtype)(x)


def _pooled_size(height: int, width: int, channels: int, max_features: int) -> tuple[int, int]:
    """Height and width after pooling with `PredAux`'s kernel."""
    size, kernel, axis = [height, width], [1, 1], 0
    while channels * math.prod(size) > max_features and size != [1, 1]:
        kernel[axis] *= 2
        size[axis] = math.ceil((height, width)[axis] / kernel[axis])
        axis = 1 - axis
    return tuple(size)


class SimilarityHead(nn.Module):
    """The head of a similarity loss: a linear map of the block's output, and a classifier.

    Returns ``{"similarity": ..., "logits": ...}``: a 3x3 convolution of C to C without bias on
    [B, H, W, C], or a linear layer of F to F without bias on [B, F] and [B, T, F]; and the
    classifier's logits. Without a classifier there are no logits.

    Source: PredSim's blocks, as in the authors' code.
    Deviation: the classifier may be any head; theirs is `PredAux`. In their networks a block's
      output comes from a LeakyReLU of slope 0.01, here from the network's own ReLU.

    Attributes:
      classifier: the head of the logits; None for the loss ``sim``, which needs none.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    classifier: nn.Module | None
    dtype: jnp.dtype | None = None

    @property
    def classifies(self) -> bool:
        """Whether the output has logits; `methods.dgl.make_blocks` tells the block."""
        return self.classifier is not None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        options = {"use_bias": False, "kernel_init": torch_default_init, "dtype": self.dtype}
        if x.ndim == 4:
            linear = Conv(x.shape[-1], (3, 3), name="similarity", **options)
        else:
            linear = nn.Dense(x.shape[-1], name="similarity", **options)
        output = {"similarity": linear(x)}
        if self.classifier is not None:
            output["logits"] = self.classifier(x, **train_argument(self.classifier, train))
        return output


def head_for_loss(loss: str, classifier: nn.Module, dtype=None) -> nn.Module:
    """The head that a local loss needs.

    Args:
      loss: ``cross_entropy`` or ``pred``: the classifier itself; ``sim``: a similarity map
        alone; ``predsim``: both.
      classifier: a head that returns logits.
      dtype: of the similarity map's computation.
    """
    if loss not in ("sim", "predsim"):
        return classifier
    return SimilarityHead(classifier if loss == "predsim" else None, dtype)


class SynthesizerAux(nn.Module):
    """`Synthesizer`'s convolutions, global average pool, Linear: logits from [B, H, W, C].

    Source: DGL Figure 2: the head of DGL in its comparison with DNI.
    Deviation: none; the last convolution starts at zero here too, so that a block's first
      update is that of its head's last convolution alone.

    Attributes:
      num_classes: the output's width.
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _check_map("synthesizer", x)
        x = jnp.mean(_synthesizer_convolutions(x, train, self.dtype), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=torch_default_init, dtype=self.dtype)(x)


class Synthesizer(nn.Module):
    """Predicts the gradient that will arrive at a block's output [B, H, W, C], of its shape.

    Twice (Conv 5x5 of C to C, BatchNorm, ReLU), and a Conv 5x5 whose kernel starts at zero.
    Where it is conditioned, a linear map of the one-hot labels is added before the first
    BatchNorm, the same at all places.

    Source: Jaderberg et al. 2017, Appendix C.1, as DGL's Figure 2 replicates it.
    Deviation: zero biases at the start (`torch_default_init`): the last convolution's too,
      which the replication draws, so that the first synthetic gradients are exactly zero.

    Attributes:
      num_classes: the one-hot labels' width.
      conditioned: whether it sees the labels (cDNI).
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    conditioned: bool
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, labels: jax.Array | None = None) -> jax.Array:
        """``labels``: int32 [B]; None only where shapes alone matter, as at initialisation."""
        if x.ndim != 4:
            raise UserError(
                f"method.name={'cdni' if self.conditioned else 'dni'} needs blocks that output "
                f"maps [B, H, W, C] to synthesize gradients for, but one outputs "
                f"{list(x.shape)}; choose other partition.cuts, or method.name=dgl"
            )
        context = 0.0
        if self.conditioned:
            labels = jnp.zeros(x.shape[:1], jnp.int32) if labels is None else labels
            one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=x.dtype)
            linear = nn.Dense(x.shape[-1], kernel_init=torch_default_init, dtype=self.dtype)
            context = linear(one_hot)[:, None, None, :]
        return _synthesizer_convolutions(x, train, self.dtype, context).astype(x.dtype)


def _synthesizer_convolutions(x: jax.Array, train: bool, dtype, context=0.0) -> jax.Array:
    """Convolutions 5x5 of C to C: two with BatchNorm and ReLU, one that starts at zero."""
    convolution = functools.partial(Conv, x.shape[-1], (5, 5), padding=2, dtype=dtype)
    x = convolution(kernel_init=torch_default_init)(x) + context
    x = nn.relu(batch_norm(train, dtype)(x))
    x = convolution(kernel_init=torch_default_init)(x)
    x = nn.relu(batch_norm(train, dtype)(x))
    return convolution(kernel_init=nn.initializers.zeros)(x)


def _convolutions(x: jax.Array, count: int, kernel: int, train: bool, dtype) -> jax.Array:
    """``count`` times: convolution of C to C without bias, BatchNorm, ReLU."""
    for _ in range(count):
        x = Conv(
            x.shape[-1],
            (kernel, kernel),
            use_bias=False,
            kernel_init=torch_default_init,
            dtype=dtype,
        )(x)
        x = nn.relu(batch_norm(train, dtype)(x))
    return x


class SepConvAux(nn.Module):
    """SEDONA's candidate of a given depth: logits [B, num_classes] from [B, H, W, C].

    With p = C / reduction: Conv 1x1 of C to p, BatchNorm, ReLU, depthwise Conv 3x3 of stride 2,
    BatchNorm, ReLU; ``depth - 1`` inverted residuals, which widen by `reduction` inside, the
    second of stride 2 and to p + p/2 channels unless the map is one pixel; Conv 1x1 to `features`,
    BatchNorm, ReLU; global average pool, Linear. Weights start from He's normal distribution.

    Source: SEDONA's released code; the search chooses among depths 1 to 4.
    Deviation: with a reduction of 1, residuals have no first 1x1 convolution in the released code,
    and the second widens to 2p.

    Attributes:
      num_classes: the output's width.
      depth: 1 to 4.
      features: the channels that are pooled; 512 on networks of a quarter of the usual width
        (CIFAR-10), 2048 on those of full width.
      reduction: 4; 1 for networks of basic blocks (ResNet-18 and 34).
      dtype: of the computation; None for the promoted dtype of input and parameters.
    """

    num_classes: int
    depth: int
    features: int = 512
    reduction: int = 4
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _check_map(f"sepconv_{self.depth}", x)
        width = max(1, x.shape[-1] // self.reduction)
        x = nn.relu(self._pointwise(x, width, train))
        x = nn.relu(self._depthwise(x, 2, train))
        for index in range(self.depth - 1):
            stride = 2 if index == 1 and max(x.shape[1:3]) > 1 else 1
            width += width // 2 if stride == 2 else 0
            y = nn.relu(self._pointwise(x, self.reduction * x.shape[-1], train))
            y = nn.relu(self._depthwise(y, stride, train))
            y = self._pointwise(y, width, train)
            x = y if stride == 2 else x + y
        x = nn.relu(self._pointwise(x, self.features, train))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=_he_normal, dtype=self.dtype)(x)

    def _pointwise(self, x: jax.Array, features: int, train: bool) -> jax.Array:
        convolution = Conv(
            features, (1, 1), use_bias=False, kernel_init=_he_normal, dtype=self.dtype
        )
        return batch_norm(train, self.dtype)(convolution(x))

    def _depthwise(self, x: jax.Array, stride: int, train: bool) -> jax.Array:
        convolution = Conv(
            x.shape[-1],
            (3, 3),
            strides=stride,
            padding=1,
            feature_group_count=x.shape[-1],
            use_bias=False,
            kernel_init=_he_normal,
            dtype=self.dtype,
        )
        return batch_norm(train, self.dtype)(convolution(x))


_he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

AUXILIARY = {
    "cnn": CNNAux,
    "mlp": MLPAux,
    "mlp_sr": MLPSRAux,
    "pred": PredAux,
    "synthesizer": SynthesizerAux,
    **{f"sepconv_{depth}": functools.partial(SepConvAux, depth=depth) for depth in (1, 2, 3, 4)},
}


# The options of the heads' configuration, with the values that are no one's choice.
OPTIONS = {
    field.name: field.default
    for field in dataclasses.fields(AuxiliaryConfig)
    if field.name not in ("name", "per_block")
}


def make_auxiliary(name: str, num_classes: int, *, dtype=None, **options: int) -> nn.Module:
    """Makes a head of the table `AUXILIARY`.

    Args:
      name: a key of `AUXILIARY`.
      num_classes: the logits' width.
      dtype: of the computation; None for the promoted dtype of input and parameters.
      **options: fields of `AuxiliaryConfig`: ``max_hidden``, ``max_features`` ...

    Returns:
      The head.

    Raises:
      UserError: for an unknown name, or an option that the head does not have.

    Example:
      Activations of three channels, pooled to 2x2: three hidden layers of 12 with BatchNorm have
      3 x (12 x 12 + 12 + 2 x 12) parameters, the logits 12 x 10 + 10.

      >>> head = make_auxiliary("mlp", num_classes=10)
      >>> x = jnp.zeros((1, 8, 8, 3))
      >>> variables = jax.eval_shape(lambda: head.init(jax.random.key(0), x, train=False))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      670
    """
    return make_heads((name,), num_classes, dtype=dtype, **options)[0]


def make_heads(
    names: Sequence[str],
    num_classes: int,
    *,
    dtype=None,
    field: str = "auxiliary.name",
    **options: int,
) -> tuple[nn.Module, ...]:
    """Makes several heads of the table `AUXILIARY`, with the same options.

    Args:
      names: keys of `AUXILIARY`, at least one.
      num_classes: the logits' width.
      dtype: of the computation; None for the promoted dtype of input and parameters.
      field: what the names are called in an error.
      **options: as in `make_auxiliary`; each goes to those heads that have it.

    Returns:
      One head a name.

    Raises:
      UserError: for an unknown name, or an option that none of the heads has.
    """
    for name in names:
        if name not in AUXILIARY:
            raise UserError(f"{field}={name} is unknown; choose one of {', '.join(AUXILIARY)}")
    for option in options:
        if option not in OPTIONS:
            raise UserError(f"auxiliary.{option} is unknown; choose from {', '.join(OPTIONS)}")
    has = {name: _options_of(name) for name in names}
    chosen = {option: value for option, value in options.items() if value != OPTIONS[option]}
    for option, value in chosen.items():
        if not any(option in parameters for parameters in has.values()):
            raise UserError(
                f"auxiliary.{option}={value} does not apply to {field}={', '.join(has)}; "
                f"leave it at {OPTIONS[option]}"
            )
    return tuple(
        AUXILIARY[name](
            num_classes, dtype=dtype, **{o: v for o, v in chosen.items() if o in has[name]}
        )
        for name in names
    )


def options_that_apply(names: Sequence[str], options: Mapping[str, int]) -> dict[str, int]:
    """Those of the options that one of the heads has, for heads that no one chose by hand.

    Args:
      names: keys of `AUXILIARY`.
      options: fields of `AuxiliaryConfig` with their values.
    """
    return {o: value for o, value in options.items() if any(o in _options_of(n) for n in names)}


def _options_of(name: str) -> Collection[str]:
    return inspect.signature(AUXILIARY[name]).parameters.keys()
