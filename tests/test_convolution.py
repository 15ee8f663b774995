"""The CPU's forms of a convolution against XLA's own, in float64 and to second order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dgl_jax import cost
from dgl_jax.models import winograd
from dgl_jax.models.convolution import conv_general_dilated, whole_batch
from dgl_jax.models.layers import Conv, max_pool_2x2

NHWC = ("NHWC", "HWIO", "NHWC")

# (height, width), (in, out) channels, kernel, strides, padding.
CASES = {
    "1x1": ((6, 5), (5, 4), (1, 1), (1, 1), "SAME"),
    "1x1_stride_2": ((7, 6), (5, 4), (1, 1), (2, 2), "SAME"),
    "1x1_padded": ((5, 5), (3, 4), (1, 1), (2, 2), ((1, 1), (1, 1))),
    "3x3": ((6, 5), (5, 4), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "3x3_image": ((6, 6), (3, 8), (3, 3), (1, 1), "SAME"),
    "3x3_valid": ((6, 5), (5, 4), (3, 3), (1, 1), "VALID"),
    "3x3_stride_2": ((8, 7), (5, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "3x3_stride_2_same": ((8, 7), (5, 4), (3, 3), (2, 2), "SAME"),
    "3x3_wide_padding": ((4, 4), (2, 3), (3, 3), (1, 1), ((3, 3), (3, 3))),
    "3x3_negative_padding": ((6, 6), (2, 3), (3, 3), (1, 1), ((-1, 0), (0, -1))),
    "2x2_stride_2": ((7, 6), (3, 4), (2, 2), (2, 2), ((0, 0), (0, 0))),
    "1x3_stride_3": ((6, 8), (3, 4), (1, 3), (1, 3), ((0, 0), (1, 2))),
    "5x5": ((6, 7), (3, 4), (5, 5), (1, 1), ((2, 2), (2, 2))),
    "7x7_stride_2": ((11, 10), (3, 4), (7, 7), (2, 2), ((3, 3), (3, 3))),
}
# Of one kernel a channel.
DEPTHWISE_CASES = {
    "3x3": ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "3x3_stride_2": ((8, 7), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "3x3_stride_2_of_one_pixel": ((1, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "3x3_same_stride_2": ((8, 7), (3, 3), (2, 2), "SAME"),
    "2x3_stride_1_3_negative_padding": ((7, 9), (2, 3), (1, 3), ((0, 1), (-1, 2))),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_xla_to_second_order(case):
    size, (in_features, out_features), kernel_size, strides, padding = CASES[case]
    kernel_shape = (*kernel_size, in_features, out_features)
    _check_equals_xla((2, *size, in_features), kernel_shape, strides, padding, groups=1)


def _xla_weight_gradient(x, dy):
    def convolved(kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.vjp(convolved, kernel)[1](dy)[0]


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 4)])
def test_winograds_weight_gradient_equals_xlas(size):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, dy = rng.standard_normal((2, *size, 5)), rng.standard_normal((2, *size, 7))
        ours, xlas = winograd.weight_gradient(x, dy), _xla_weight_gradient(x, dy)
        np.testing.assert_allclose(ours, xlas, rtol=1e-11, atol=1e-11)
    x, dy = jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32)
    ours = winograd.weight_gradient(x, dy)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, xlas, atol=2e-5 * np.abs(xlas).max())


@pytest.mark.parametrize(
    ("x_shape", "features", "options", "is_winograds"),
    [
        ((64, 8, 8, 128), 128, {}, True),
        ((16, 16, 16, 128), 256, {}, True),
        ((64, 8, 8, 128), 128, {"precision": lax.Precision.HIGHEST}, False),
        ((64, 8, 8, 128), 128, {"dtype": jnp.bfloat16}, False),
        ((64, 16, 16, 128), 128, {"strides": (2, 2)}, False),
        ((64, 8, 8, 128), 64, {}, False),
        ((64, 8, 8, 64), 128, {}, False),
        ((63, 8, 8, 128), 128, {}, False),
        ((64, 10, 8, 128), 128, {}, False),
        ((64, 32, 32, 128), 128, {}, False),
    ],
)
def test_where_the_weight_gradient_is_winograds(x_shape, features, options, is_winograds):
    x, kernel = jnp.zeros(x_shape), jnp.zeros((3, 3, x_shape[-1], features))
    options = {"strides": (1, 1), "dtype": jnp.float32} | options
    x, kernel = (array.astype(options["dtype"]) for array in (x, kernel))
    program = _primitives(
        conv_general_dilated, x, kernel, options["strides"], ((1, 1), (1, 1)),
        dimension_numbers=NHWC, precision=options.get("precision"),
    )  # fmt: skip
    assert ("dot_general" in program) == is_winograds


@pytest.mark.parametrize("batch_size", [24, 15])
def test_weight_gradient_over_parts_of_the_batch(batch_size):
    # In float32 24 images of 40 KiB are summed over in two parts, an odd number at once.
    x_shape, kernel_shape = (batch_size, 32, 32, 10), (3, 3, 10, 4)
    _check_equals_xla(x_shape, kernel_shape, (2, 2), "SAME", groups=1)
    x, kernel = jnp.ones(x_shape), jnp.ones(kernel_shape)
    program = _primitives(conv_general_dilated, x, kernel, (2, 2), "SAME", dimension_numbers=NHWC)
    assert ("while" in program or "scan" in program) == (batch_size == 24)


def test_a_whole_batch_takes_no_loop_and_all_its_flops_are_counted():
    x, kernel = jnp.ones((32, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
    weight_gradient = jax.grad(
        lambda kernel: conv_general_dilated(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC
        ).sum()
    )
    whole = whole_batch()(weight_gradient)
    loops = [str(jax.make_jaxpr(fn)(kernel)).count("scan[") for fn in (weight_gradient, whole)]
    assert loops == [1, 0]
    np.testing.assert_allclose(weight_gradient(kernel), whole(kernel), rtol=1e-5)
    # One convolution, without what the padding's zeros would be multiplied with.
    expected = 2 * 32 * (3 * 32 - 2) ** 2 * 16 * 16
    assert cost.flops(whole, kernel) == pytest.approx(expected, rel=0.02)
    assert cost.flops(weight_gradient, kernel) < 0.7 * expected


def test_winograds_weight_gradient_to_second_order():
    _check_equals_xla((64, 8, 8, 128), (3, 3, 128, 128), (1, 1), "SAME", groups=1)


@pytest.mark.parametrize("case", DEPTHWISE_CASES)
def test_depthwise_equals_xla_to_second_order(case):
    size, kernel_size, strides, padding = DEPTHWISE_CASES[case]
    _check_equals_xla((2, *size, 3), (*kernel_size, 1, 3), strides, padding, groups=3)


def _check_equals_xla(x_shape, kernel_shape, strides, padding, groups):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.standard_normal(x_shape), rng.standard_normal(kernel_shape)
        x_direction, kernel_direction = rng.standard_normal(x.shape), np.cos(kernel)

        def values_and_gradients(convolution, x, kernel):
            def loss(x, kernel):
                y = convolution(
                    x,
                    kernel,
                    strides,
                    padding,
                    dimension_numbers=NHWC,
                    feature_group_count=groups,
                )
                return jnp.sum(jnp.sin(y)), y

            def gradient_along_a_direction(x, kernel):
                dx, dkernel = jax.grad(loss, (0, 1), has_aux=True)(x, kernel)[0]
                return jnp.sum(dx * x_direction) + jnp.sum(dkernel * kernel_direction)

            return (
                loss(x, kernel),
                jax.grad(loss, (0, 1), has_aux=True)(x, kernel),
                jax.grad(gradient_along_a_direction, (0, 1))(x, kernel),
            )

        compute = jax.jit(values_and_gradients, static_argnums=0)
        ours = compute(conv_general_dilated, x, kernel)
        xla = compute(lax.conv_general_dilated, x, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, xla)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(ours))


def _primitives(convolution, x, kernel, *args, **kwargs) -> str:
    """The program of the value and both gradients, as text."""

    def loss(x, kernel):
        return jnp.sum(convolution(x, kernel, *args, **kwargs) ** 2)

    return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel))


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "options"),
    [
        ((2, 6, 6, 4), (3, 3, 4, 4), {"rhs_dilation": (2, 2), "dimension_numbers": NHWC}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"lhs_dilation": (2, 2), "dimension_numbers": NHWC}),
        ((2, 6, 6, 4), (3, 3, 2, 4), {"feature_group_count": 2, "dimension_numbers": NHWC}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"batch_group_count": 2, "dimension_numbers": NHWC}),
        ((2, 4, 6, 6), (4, 4, 3, 3), {}),
    ],
)
def test_other_convolutions_are_xla_s(x_shape, kernel_shape, options):
    x, kernel = jnp.ones(x_shape), jnp.ones(kernel_shape)
    arguments = (x, kernel, (1, 1), ((1, 1), (1, 1)))
    ours = _primitives(conv_general_dilated, *arguments, **options)
    assert ours == _primitives(lax.conv_general_dilated, *arguments, **options)


def test_other_backends_get_xla_s(monkeypatch):
    arguments = (jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 4)), (1, 1), "SAME")
    xla = _primitives(lax.conv_general_dilated, *arguments, dimension_numbers=NHWC)
    assert _primitives(conv_general_dilated, *arguments, dimension_numbers=NHWC) != xla
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _primitives(conv_general_dilated, *arguments, dimension_numbers=NHWC) == xla


def test_layers_use_it():
    convolution = Conv(4, (3, 3))
    variables = convolution.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
    program = jax.make_jaxpr(convolution.apply)(variables, jnp.ones((1, 6, 6, 4)))
    assert "custom_vjp_call" in str(program)


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_bfloat16_weight_gradient_sums_in_float32(kernel_size, groups):
    # The sum over 16*16*16 = 4096 ones stops at 256 if each addition rounds to bfloat16.
    x = jnp.ones((16, 16, 16, groups), jnp.bfloat16)
    kernel = jnp.ones((kernel_size, kernel_size, 1, groups), jnp.bfloat16)

    def loss(kernel):
        y = conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups
        )
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.grad(loss)(kernel)
    assert gradient.dtype == jnp.bfloat16
    assert gradient[kernel_size // 2, kernel_size // 2, 0, 0] == 16 * 16 * 16


def test_empty_output_is_xla_s():
    shape = jax.eval_shape(
        lambda x, kernel: conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=NHWC),
        jnp.ones((1, 2, 2, 3)),
        jnp.ones((3, 3, 3, 4)),
    ).shape
    assert shape == (1, 0, 0, 4)


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 5, 3)])
def test_max_pool_is_xlas_also_where_maxima_are_equal(shape):
    # Few different values: most windows have several maxima.
    x = jax.random.randint(jax.random.key(0), shape, 0, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (2, shape[1] // 2, shape[2] // 2, 3))
    results = [
        jax.value_and_grad(lambda x, pool=pool: jnp.sum(pool(x) * weights))(x)
        for pool in (max_pool_2x2, lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
