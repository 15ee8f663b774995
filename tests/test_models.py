"""The networks: sizes against hand arithmetic, and one suite that every module joins."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.auxiliary import AUXILIARY, make_auxiliary
from dgl_jax.errors import UserError
from dgl_jax.models import NETWORKS, check_image_shape, layer_shapes, make_network
from dgl_jax.models.network import Network, apply_module, init_module
from dgl_jax.models.resnet import BottleneckBlock


def _num_parameters(network, image_shape):
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    total = 0
    for module in (*network.layers, network.head):

        def init_and_apply(x, module=module):
            params, batch_stats = init_module(module, jax.random.key(0), x)
            return params, apply_module(module, params, batch_stats, x, train=False)[0]

        params, x = jax.eval_shape(init_and_apply, x)
        total += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return total


def _conv(k, c, o, bias=True):
    """Parameters of a k x k convolution and its BatchNorm (scale and bias)."""
    return k * k * c * o + o * bias + 2 * o


def _linear(n, m, batch_norm=False):
    return n * m + m + 2 * m * batch_norm


CNN6_LAYERS = [_conv(3, *c) for c in [(3, 128), (128, 256), (256, 256), (256, 512)]]
CNN6_LAYERS += 2 * [_conv(3, 512, 512)]
ASYNC_WIDTHS = [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]


@pytest.mark.parametrize(
    ("name", "options", "num_classes", "image_shape", "expected"),
    [
        # Torchvision's published figures for the same networks.
        ("resnet18", {"form": "imagenet"}, 1000, (224, 224, 3), 11_689_512),
        ("resnet50", {"form": "imagenet"}, 1000, (224, 224, 3), 25_557_032),
        ("resnet101", {"form": "imagenet"}, 1000, (224, 224, 3), 44_549_160),
        ("resnet152", {"form": "imagenet"}, 1000, (224, 224, 3), 60_192_808),
        ("vgg13", {"form": "imagenet"}, 1000, (224, 224, 3), 133_053_736),
        ("vgg16", {"form": "imagenet"}, 1000, (224, 224, 3), 138_365_992),
        ("vgg19", {"form": "imagenet"}, 1000, (224, 224, 3), 143_678_248),
        # The 3x3 stem has (49 - 9) * 3 * 64 = 7,680 weights less, the head 990 outputs less.
        ("resnet50", {}, 10, (32, 32, 3), 25_557_032 - 7_680 - 990 * 2049),
        # Stem 9*3*16 + 32 = 464; stage 1: 36 convolutions of 9*16*16 + 32 = 2,336; stage 2:
        # 9*16*32 + 64 and 35 of 9*32*32 + 64 = 9,280; stage 3: 9*32*64 + 128 and 35 of
        # 9*64*64 + 128 = 36,992; linear 650. The shortcuts have none.
        (
            "resnet110",
            {},
            10,
            (32, 32, 3),
            464 + 36 * 2_336 + 4_672 + 35 * 9_280 + 18_560 + 35 * 36_992 + 650,  # = 1,727,962
        ),
        ("cnn6", {}, 10, (32, 32, 3), sum(CNN6_LAYERS) + 2 * _linear(2048, 2048, True) + 20_490),
        (
            "cnn6_async",
            {},
            10,
            (32, 32, 3),
            sum(_conv(3, *c, bias=False) for c in ASYNC_WIDTHS)
            + 3 * _linear(2048, 2048, True)
            + _linear(2048, 10),
        ),
        (
            "cnn4",
            {},
            10,
            (32, 32, 3),
            sum(_conv(3, *c) for c in [(3, 64), (64, 128), (128, 128), (128, 256)])
            + 2 * _linear(1024, 1024, True)
            + _linear(1024, 10),
        ),
        # Another size and number of channels: only the first kernel changes.
        (
            "cnn4",
            {},
            10,
            (28, 28, 1),
            sum(_conv(3, *c) for c in [(1, 64), (64, 128), (128, 128), (128, 256)])
            + 2 * _linear(1024, 1024, True)
            + _linear(1024, 10),
        ),
        (
            "dni_cnn",
            {},
            10,
            (32, 32, 3),
            _conv(5, 3, 128) + 2 * _conv(5, 128, 128) + _linear(128, 10),
        ),
        # PredSim's 2.9 million.
        (
            "mlp",
            {},
            10,
            (28, 28, 1),
            _linear(784, 1024, True) + 2 * _linear(1024, 1024, True) + _linear(1024, 10),
        ),
        # SEDONA's CIFAR network: 16-32-64-128-128, linear layers of 1024 on a 1x1 map.
        (
            "vgg13",
            {"width_factor": 0.25},
            10,
            (32, 32, 3),
            sum(_conv(3, *c) for c in [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)])
            + _conv(3, 64, 128)
            + 3 * _conv(3, 128, 128)
            + _linear(128, 1024)
            + _linear(1024, 1024)
            + _linear(1024, 10),
        ),
    ],
)
def test_number_of_parameters(name, options, num_classes, image_shape, expected):
    network = make_network(name, num_classes, **options)
    assert _num_parameters(network, image_shape) == expected


def test_resnet110_is_the_published_size():
    assert _num_parameters(make_network("resnet110", 10), (32, 32, 3)) == 1_727_962


def _maps(*runs):
    """[(layers, size, channels), ...] to one [1, size, size, channels] a layer."""
    return [(1, size, size, channels) for count, size, channels in runs for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "options", "image_shape", "expected"),
    [
        ("cnn6", {}, (32, 32, 3), _maps((1, 32, 128), (2, 16, 256), (3, 8, 512))),
        ("cnn6", {"width_factor": 0.5}, (28, 28, 1), _maps((1, 28, 64), (2, 14, 128), (3, 7, 256))),
        ("cnn4", {}, (32, 32, 3), _maps((1, 32, 64), (2, 16, 128), (1, 8, 256))),
        ("cnn6_async", {}, (32, 32, 3), _maps((2, 32, 128), (2, 16, 256), (2, 8, 512))),
        ("dni_cnn", {}, (32, 32, 3), [*_maps((1, 10, 128), (1, 3, 128), (1, 1, 128)), (1, 128)]),
        ("mlp", {"dropout": 0.1}, (28, 28, 1), [(1, 1024)] * 4),
        (
            "vgg13",
            {"form": "imagenet"},
            (224, 224, 3),
            _maps((2, 224, 64), (2, 112, 128), (2, 56, 256), (2, 28, 512), (2, 14, 512)),
        ),
        (
            "vgg19",
            {"width_factor": 0.25},
            (32, 32, 3),
            _maps((2, 32, 16), (2, 16, 32), (4, 8, 64), (4, 4, 128), (4, 2, 128)),
        ),
        (
            "resnet18",
            {},
            (32, 32, 3),
            _maps((2, 32, 64), (2, 16, 128), (2, 8, 256), (2, 4, 512)),
        ),
        (
            "resnet50",
            {"form": "tiny_imagenet"},
            (64, 64, 3),
            _maps((3, 32, 256), (4, 16, 512), (6, 8, 1024), (3, 4, 2048)),
        ),
        (
            "resnet101",
            {"width_factor": 0.25},
            (32, 32, 3),
            _maps((3, 32, 64), (4, 16, 128), (23, 8, 256), (3, 4, 512)),
        ),
        # DGL cuts after 3 + 8 + 14 bottlenecks: 1024 channels at 14x14.
        (
            "resnet152",
            {"form": "imagenet"},
            (224, 224, 3),
            _maps((3, 56, 256), (8, 28, 512), (36, 14, 1024), (3, 7, 2048)),
        ),
        # DGL cuts after 18 + 8 blocks: 32 channels at 16x16.
        ("resnet110", {}, (32, 32, 3), _maps((18, 32, 16), (18, 16, 32), (18, 8, 64))),
    ],
)
def test_layer_shapes(name, options, image_shape, expected):
    assert layer_shapes(make_network(name, 10, **options), image_shape) == expected


def test_layer_shapes_of_a_batch():
    shapes = layer_shapes(make_network("dni_cnn", 10), (32, 32, 3), batch_size=5)
    assert shapes[-2:] == [(5, 1, 1, 128), (5, 128)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {}, "network.name=resnet20 is unknown; choose one of cnn6, cnn4"),
        ("vgg13", {"form": "cifar10"}, "network.form=cifar10 is unknown; choose one of cifar,"),
        ("cnn6", {"form": "imagenet"}, "network.form=imagenet does not apply to network.name=cnn6"),
        ("resnet18", {"dropout": 0.5}, "network.dropout=0.5 does not apply .*; leave it at 0.0"),
        ("resnet110", {"width_factor": 2.0}, "network.width_factor=2.0 does not apply"),
        ("cnn6", {"width_factor": 0}, "network.width_factor=0 must be above 0; try 1.0"),
        ("vgg13", {"dropout": 1.0}, "network.dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_network(name, 10, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "image_shape", "problem", "smallest"),
    [
        ("dni_cnn", (26, 26, 3), "layer 2 would output an empty", 27),
        ("cnn6", (3, 3, 1), "layer 3 would output an empty", 4),
        ("cnn6", (8, 3, 1), "layer 3 would output an empty", 4),
        ("vgg13", (28, 28, 1), "the head", 32),
    ],
)
def test_check_image_shape(name, image_shape, problem, smallest):
    network = make_network(name, 10)
    check_image_shape(network, (smallest, smallest, image_shape[-1]))
    with pytest.raises(UserError) as error:
        check_image_shape(network, image_shape)
    message = str(error.value)
    height, width, channels = image_shape
    assert f"image_shape={height}x{width}x{channels} does not fit network={name}" in message
    assert problem in message
    assert f"it needs {smallest}x{smallest} or more" in message
    assert "\n" not in message


def test_check_image_shape_finds_an_empty_imagenet_head():
    # Its N(0, 0.01) initialiser makes a [0, 4096] matrix without complaint.
    with pytest.raises(UserError, match="the head would have an empty parameter; it needs 32x32"):
        check_image_shape(make_network("vgg13", 10, form="imagenet"), (28, 28, 3))


def test_check_image_shape_of_a_user_s_network():
    network = Network("mine", [nn.Dense(3), nn.Conv(4, (3, 3), padding="VALID")], nn.Dense(2))
    check_image_shape(network, (5, 5, 1))
    with pytest.raises(UserError, match="network=mine: layer 1 would output an empty .* 3x3 or"):
        check_image_shape(network, (2, 2, 1))
    two_dimensional = Network("flat", [nn.Dense(3), nn.ConvTranspose(4, (3, 3))], nn.Dense(2))
    with pytest.raises(UserError, match="network=flat: layer 1 .*; check its layers"):
        check_image_shape(two_dimensional, (7,))


class FailingLayer(nn.Module):
    make_error: Callable[[], Exception]

    @nn.compact
    def __call__(self, x):
        raise self.make_error()


@pytest.mark.parametrize("error", [RuntimeError, KeyError, NotImplementedError])
def test_check_image_shape_leaves_other_errors_alone(error):
    network = Network("mine", [nn.Dense(3), FailingLayer(error)], nn.Dense(2))
    with pytest.raises(error):
        check_image_shape(network, (5, 5, 1))


def test_check_image_shape_leaves_a_backend_that_does_not_start_alone(monkeypatch):
    def devices():
        raise AssertionError("a backend")

    network = Network("mine", [FailingLayer(AssertionError)], nn.Dense(2))
    with pytest.raises(UserError, match="layer 0 fails"):
        check_image_shape(network, (5, 5, 1))
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(AssertionError, match="a backend"):
        check_image_shape(network, (5, 5, 1))


def test_check_image_shape_leaves_a_module_that_cant_be_traced_alone():
    class Branching(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x if x.sum() > 0 else -x

    network = Network("mine", [Branching()], nn.Dense(2))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        check_image_shape(network, (5, 5, 1))


def test_projection_has_the_stride_on_the_3x3():
    block = BottleneckBlock(4, stride=2)

    def convolution_outputs(x):
        _, state = block.apply(
            block.init(jax.random.key(0), x, False),
            x,
            False,
            capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
            mutable=["intermediates"],
        )
        return state["intermediates"]

    intermediates = jax.eval_shape(convolution_outputs, jnp.ones((1, 8, 8, 8)))
    outputs = {name: value["__call__"][0] for name, value in intermediates.items()}
    assert [outputs[f"Conv_{i}"].shape for i in range(4)] == [
        (1, 8, 8, 4),
        (1, 4, 4, 4),
        (1, 4, 4, 16),
        (1, 4, 4, 16),
    ]


def test_initialisers():
    x = jnp.ones((1, 8, 8, 32))
    layer = make_network("cnn6", 10).layers[1]
    params, _ = init_module(layer, jax.random.key(0), x)
    kernel, bound = params["Conv_0"]["kernel"], 1 / math.sqrt(9 * 32)
    assert bound * 0.99 < jnp.max(jnp.abs(kernel)) <= bound
    np.testing.assert_allclose(jnp.std(kernel), bound / math.sqrt(3), rtol=0.02)
    np.testing.assert_array_equal(params["Conv_0"]["bias"], 0)
    layer = make_network("vgg13", 10).layers[1]
    params, _ = init_module(layer, jax.random.key(0), x)
    np.testing.assert_allclose(
        jnp.std(params["Conv_0"]["kernel"]), math.sqrt(2 / (9 * 64)), rtol=0.02
    )


def test_what_a_layer_of_the_mlp_hands_on_is_dropped_by_the_next():
    """So the block's own head sees all of it: in training each layer's output has no zeros."""
    network = make_network("mlp_zero_head", 10, width_factor=1 / 16, dropout=0.5)
    x, key = jnp.ones((16, 4, 4, 1)) + jnp.arange(16.0).reshape(16, 1, 1, 1), jax.random.key(0)
    dropped = []
    for layer in network.layers:
        params, batch_stats = init_module(layer, key, x)
        x, _ = apply_module(layer, params, batch_stats, x, train=True, key=key)
        dropped.append(float(jnp.mean(x == 0)))
    assert dropped[:3] == [0, 0, 0] and 0.4 < dropped[3] < 0.6
    for name, is_zero in (("mlp_zero_head", True), ("mlp", False)):
        head = make_network(name, 10, width_factor=1 / 16).head
        params, _ = init_module(head, key, x)
        assert bool(jnp.all(params["kernel"] == 0)) == is_zero


# ---- The common suite: every network and every auxiliary head, by name.
# Module by module, so that equal residual blocks compile once.

IMAGE_SHAPES = {"dni_cnn": (27, 27, 3)} | {f"vgg{depth}": (32, 32, 3) for depth in (13, 16, 19)}
WIDTH_FACTORS = {"resnet110": 1.0} | dict.fromkeys(("cnn4", "cnn6", "cnn6_async"), 1 / 16)


def _modules(name):
    """The modules run in a row, and the input's shape."""
    if name in AUXILIARY:
        return [make_auxiliary(name, 5)], (8, 8, 8, 4)
    network = make_network(name, 5, width_factor=WIDTH_FACTORS.get(name, 1 / 32))
    return [*network.layers, network.head], (8, *IMAGE_SHAPES.get(name, (8, 8, 3)))


def _random_variables(module, x):
    """Parameters and statistics drawn by numpy: compiling the initialisers takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return np.abs(noise) + 1 if path[-1].key in ("scale", "var") else noise / 4

    shapes = jax.eval_shape(lambda x: init_module(module, jax.random.key(0), x), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, batch_stats, x):
    """Evaluates and trains one module, on a local loss."""
    evaluated = apply_module(module, params, batch_stats, x, train=False)

    def loss(params, x):
        trained = apply_module(module, params, batch_stats, x, train=True)
        return jnp.sum(jnp.sin(trained[0])), trained

    gradients, trained = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return evaluated, trained, gradients


def _before_batch_norm(path, params):
    """Whether a parameter is a bias that the next BatchNorm cancels."""
    *scope, name = [entry.key for entry in path]
    if not scope:
        return False
    for key in scope[:-1]:
        params = params[key]
    layer, _, index = scope[-1].rpartition("_")
    return name == "bias" and layer in ("Conv", "Dense") and f"BatchNorm_{index}" in params


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *AUXILIARY])
def test_every_module_trains(name):
    modules, shape = _modules(name)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for module in modules:
        params, batch_stats = _random_variables(module, x)
        (y_eval, kept), (y, updated), (gradients, dx) = _run(module, params, batch_stats, x)
        assert y.shape == y_eval.shape and y.dtype == y_eval.dtype == jnp.float32
        jax.tree.map(np.testing.assert_array_equal, kept, batch_stats)
        assert jax.tree.structure(updated) == jax.tree.structure(batch_stats)
        for before, after in zip(
            jax.tree.leaves(batch_stats), jax.tree.leaves(updated), strict=True
        ):
            assert not np.array_equal(before, after)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.all(np.isfinite(gradient)), (module, path)
            if not _before_batch_norm(path, params):
                assert np.any(gradient != 0), (module, path)
        assert np.all(np.isfinite(dx)) and np.any(dx != 0), module
        x = y
    assert x.shape == (8, 5)


@pytest.mark.parametrize("name", [*NETWORKS, *AUXILIARY])
def test_every_module_computes_in_bfloat16_with_float32_variables(name):
    if name in AUXILIARY:
        modules, shape = [make_auxiliary(name, 5, dtype=jnp.bfloat16)], (8, 8, 8, 4)
    else:
        network = make_network(name, 5, dtype=jnp.bfloat16)
        modules, shape = [*network.layers, network.head], (8, 32, 32, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    for module in modules:

        def init_and_train(x, module=module):
            params, batch_stats = init_module(module, jax.random.key(0), x)
            y, updated = apply_module(module, params, batch_stats, x, train=True)
            return (params, batch_stats, updated), y

        variables, x = jax.eval_shape(init_and_train, x)
        assert x.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", [*NETWORKS, *AUXILIARY])
def test_every_module_computes_in_float64(name):
    modules, shape = _modules(name)
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct(shape, jnp.float64)
        for module in modules:

            def init_and_train(x, module=module):
                params, batch_stats = init_module(module, jax.random.key(0), x)
                return apply_module(module, params, batch_stats, x, train=True)[0]

            x = jax.eval_shape(init_and_train, x)
            assert x.dtype == jnp.float64


def test_dropout_needs_a_key_and_drops_in_training_only():
    head = make_network("vgg13", 5, width_factor=1 / 32, dropout=0.5).head
    x = jax.random.normal(jax.random.key(0), (2, 2, 2, 16))
    params, batch_stats = init_module(head, jax.random.key(1), x)
    evaluate = apply_module(head, params, batch_stats, x, train=False)[0]
    keys = jax.random.split(jax.random.key(2), 2)
    first, again, other = (
        apply_module(head, params, batch_stats, x, train=True, key=key)[0]
        for key in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, evaluate)
