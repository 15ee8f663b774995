"""Networks by name, and whether one can take an image of a given size."""

import functools
import inspect
import math

import flax.errors
import jax
import jax.numpy as jnp

from dgl_jax.errors import UserError
from dgl_jax.models.cnn import cnn4, cnn6, cnn6_async, dni_cnn
from dgl_jax.models.layers import scaled_width
from dgl_jax.models.mlp import mlp
from dgl_jax.models.network import Network, apply_module, init_module, output_shape
from dgl_jax.models.resnet import resnet, resnet110
from dgl_jax.models.vgg import vgg

NETWORKS = {
    "cnn6": cnn6,
    "cnn4": cnn4,
    "cnn6_async": cnn6_async,
    "dni_cnn": dni_cnn,
    "mlp": mlp,
    "mlp_zero_head": functools.partial(mlp, zero_head=True),
    "vgg13": functools.partial(vgg, 13),
    "vgg16": functools.partial(vgg, 16),
    "vgg19": functools.partial(vgg, 19),
    "resnet18": functools.partial(resnet, 18),
    "resnet50": functools.partial(resnet, 50),
    "resnet101": functools.partial(resnet, 101),
    "resnet152": functools.partial(resnet, 152),
    "resnet110": resnet110,
}

_FORMS = ("cifar", "tiny_imagenet", "imagenet")
# What an unsuitable image makes flax or JAX raise.
_SHAPE_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    ZeroDivisionError,
    flax.errors.ScopeParamShapeError,
)


def make_network(
    name: str,
    num_classes: int,
    *,
    form: str = "cifar",
    width_factor: float = 1.0,
    dropout: float = 0.0,
    dtype=None,
) -> Network:
    """Makes a network of the table `NETWORKS`.

    Args:
      name: a key of `NETWORKS`.
      num_classes: the logits' width.
      form: ``cifar``, ``tiny_imagenet`` or ``imagenet``: the stem of a ResNet, the
        initialisation of a VGG.
      width_factor: multiplies every layer's channels.
      dropout: the rate in a VGG's head.
      dtype: of the computation; None for the promoted dtype of input and parameters.

    Returns:
      The network.

    Raises:
      UserError: for an unknown name or form, or an option that the network does not have.
    """
    if name not in NETWORKS:
        raise UserError(f"network.name={name} is unknown; choose one of {', '.join(NETWORKS)}")
    if form not in _FORMS:
        raise UserError(f"network.form={form} is unknown; choose one of {', '.join(_FORMS)}")
    if not width_factor > 0:
        raise UserError(f"network.width_factor={width_factor} must be above 0; try 1.0")
    if not 0 <= dropout < 1:
        raise UserError(f"network.dropout={dropout} must be at least 0 and below 1; try 0.5")
    constructor = NETWORKS[name]
    parameters = inspect.signature(constructor).parameters
    options = {}
    for option, value, default in (
        ("form", form, "cifar"),
        ("width_factor", width_factor, 1.0),
        ("dropout", dropout, 0.0),
    ):
        if option in parameters:
            options[option] = value
        elif option == "width_factor" and "width" in parameters:
            options["width"] = scaled_width(parameters["width"].default, value)
        elif value != default:
            raise UserError(
                f"network.{option}={value} does not apply to network.name={name}; "
                f"leave it at {default}"
            )
    return constructor(num_classes, dtype=dtype, **options)


def layer_shapes(
    network: Network, image_shape: tuple[int, ...], batch_size: int = 1
) -> list[tuple[int, ...]]:
    """The output shape of every layer, without computing anything.

    Args:
      network: the network.
      image_shape: (H, W, C).
      batch_size: B.

    Returns:
      One shape a layer, [B, H', W', C'].

    Example:
      >>> network = make_network("cnn4", num_classes=10, width_factor=0.25)
      >>> [shape[1:] for shape in layer_shapes(network, (28, 28, 1))]
      [(28, 28, 16), (14, 14, 32), (14, 14, 32), (7, 7, 64)]
    """
    x = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    shapes = []
    for layer in network.layers:
        x = output_shape(layer, x)
        shapes.append(x.shape)
    return shapes


def _module_shapes(module, x: jax.ShapeDtypeStruct):
    """The shapes of a module's parameters and of its output."""

    def init_and_apply(x):
        params, batch_stats = init_module(module, jax.random.key(0), x)
        return params, apply_module(module, params, batch_stats, x, train=False)[0]

    return jax.eval_shape(init_and_apply, x)


def check_image_shape(network: Network, image_shape: tuple[int, ...]) -> None:
    """Checks that all layers and the head can take images of this shape.

    Args:
      network: the network.
      image_shape: (H, W, C).

    Raises:
      UserError: if an activation or a parameter would be empty, or a module fails.
    """
    problem = _shape_problem(network, image_shape)
    if problem is None:
        return
    smallest = _smallest_size(network, image_shape[-1]) if len(image_shape) == 3 else None
    remedy = "check its layers" if smallest is None else f"it needs {smallest}x{smallest} or more"
    shape = "x".join(map(str, image_shape))
    raise UserError(f"image_shape={shape} does not fit network={network.name}: {problem}; {remedy}")


def _shape_problem(network: Network, image_shape: tuple[int, ...]) -> str | None:
    """What goes wrong with images of this shape, in words; None if nothing does."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    names = [f"layer {index}" for index in range(len(network.layers))] + ["the head"]
    for name, module in zip(names, (*network.layers, network.head), strict=True):
        try:
            params, x = _module_shapes(module, x)
        except jax.errors.JAXTypeError:  # Of a module that can't be traced, whatever the shape.
            raise
        except _SHAPE_ERRORS as error:
            if isinstance(error, AssertionError):
                jax.devices()  # Where no backend starts, JAX asserts that too; it raises it here.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{name} fails on {list(x.shape)} ({reason})"
        if math.prod(x.shape) == 0:
            return f"{name} would output an empty {list(x.shape)}"
        if any(math.prod(leaf.shape) == 0 for leaf in jax.tree.leaves(params)):
            return f"{name} would have an empty parameter"
    return None


def _smallest_size(network: Network, channels: int, largest: int = 1024) -> int | None:
    """The smallest height and width that works, by doubling and bisection."""

    def works(size):
        return _shape_problem(network, (size, size, channels)) is None

    size = 1
    while not works(size):
        size *= 2
        if size > largest:
            return None
    fails = size // 2
    while size - fails > 1:
        middle = (size + fails) // 2
        size, fails = (middle, fails) if works(middle) else (size, middle)
    return size
