"""The CPU's forms of a convolution against XLA's own, in float64 and to second order; where each is."""

import re
from collections import Counter

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgl_jax.flops import flops
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


def test_a_whole_batch_takes_no_loop():
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


# One of each form: a general kernel, a 1x1, a depthwise one.
FORMS = {
    "3x3": ((3, 3, 4, 6), 1),
    "1x1": ((1, 1, 4, 6), 1),
    "depthwise": ((3, 3, 1, 4), 4),
}


def _form_of(name, num_images=2):
    """``(make_loss, x, kernel)``; ``make_loss(convolution)(x, kernel)`` is a scalar."""
    kernel_shape, groups = FORMS[name]
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((num_images, 8, 7, 4)), rng.standard_normal(kernel_shape)

    def make_loss(convolution):
        def loss(x, kernel):
            y = convolution(
                x, kernel, (2, 2), "SAME", dimension_numbers=NHWC, feature_group_count=groups
            )
            return jnp.sum(jnp.sin(y))

        return loss

    return make_loss, x, kernel


def _second_gradients(loss):
    def gradients_squared(x, kernel):
        return sum(jnp.sum(part**2) for part in jax.grad(loss, (0, 1))(x, kernel))

    return jax.grad(gradients_squared, (0, 1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("form", FORMS)
def test_lowered_for_another_platform_it_is_xla_s(form, platform, order):
    make_loss, x, kernel = _form_of(form)

    def computation(convolution):
        """Its operations, without which form was chosen."""
        loss = make_loss(convolution)
        gradients = jax.grad(loss, (0, 1)) if order == 1 else _second_gradients(loss)
        traced = jax.jit(gradients).trace(x, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" not in text
        operations = re.findall(r"stablehlo\.(\w+)", text)
        choice = {"case", "constant", "return"}
        # Of a convolution all that it does: dimensions, window, groups, shapes.
        convolutions = re.findall(r"stablehlo\.convolution\([^)]*\)(.*)", text)
        return Counter(o for o in operations if o not in choice), Counter(convolutions)

    operations, convolutions = computation(conv_general_dilated)
    xla_operations, xla_convolutions = computation(lax.conv_general_dilated)
    assert operations["convolution"] == xla_operations["convolution"] == sum(convolutions.values())
    if order == 1:
        assert (operations, convolutions) == (xla_operations, xla_convolutions)
    else:  # As many convolutions, but with fewer kernels turned round.
        assert operations <= xla_operations


@pytest.mark.parametrize("form", FORMS)
def test_compiled_for_the_cpu_it_is_the_cpu_s_form_alone(form):
    make_loss, x, kernel = _form_of(form)

    def compiled(convolution):
        return jax.jit(jax.grad(make_loss(convolution), (0, 1))).lower(x, kernel).compile()

    names = ("convolution", "dot", "conditional", "call")
    text = compiled(conv_general_dilated).as_text()
    counts = {name: len(re.findall(rf" {name}\(", text)) for name in names}
    convolutions, products = {"3x3": (3, 0), "1x1": (0, 3), "depthwise": (0, 0)}[form]
    assert counts == {"convolution": convolutions, "dot": products, "conditional": 0, "call": 0}


@pytest.mark.parametrize("form", FORMS)
def test_the_default_backend_has_no_part_in_it(form, monkeypatch):
    make_loss, x, kernel = _form_of(form)
    gradients = jax.grad(make_loss(conv_general_dilated), (0, 1))
    before = jax.jit(gradients).lower(x, kernel).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    assert jax.jit(gradients).lower(x, kernel).as_text() == before


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_pass_keeps_input_and_kernel_alone(form):
    _, x, kernel = _form_of(form)
    kernel_shape, groups = FORMS[form]

    def pullback(x, kernel):
        convolution = lambda x, kernel: conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=NHWC, feature_group_count=groups
        )
        return jax.vjp(convolution, x, kernel)[1]

    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pullback, x, kernel))]
    assert sorted(kept) == sorted([x.shape, kernel_shape])


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_those_of_plain_convolutions(form):
    make_loss, x, kernel = _form_of(form, num_images=16)
    for transform in (lambda loss: loss, lambda loss: jax.grad(loss, (0, 1)), _second_gradients):
        ours, plain = (
            flops(transform(make_loss(convolution)), x, kernel)
            for convolution in (conv_general_dilated, lax.conv_general_dilated)
        )
        assert ours == plain > 0


def _scanned(gradients):
    def run(x, kernel):
        def turn(kernel, x):
            dx, dkernel = gradients(x[None], kernel)
            return kernel - 1e-3 * dkernel, dx

        return jax.lax.scan(turn, kernel, x)

    return run


def _over_devices(gradients):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    return whole_batch()(jax.jit(gradients, in_shardings=(split, whole)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss: jax.grad(loss, (0, 1)),  # Without jit.
        lambda loss: jax.jit(jax.vmap(jax.grad(lambda x, k: loss(x[None], k), (0, 1)), (0, None))),
        lambda loss: jax.vmap(jax.grad(loss, (0, 1)), (None, 0)),
        lambda loss: jax.jit(jax.grad(jax.checkpoint(loss), (0, 1))),
        lambda loss: jax.jit(_scanned(jax.grad(loss, (0, 1)))),
        lambda loss: jax.jit(_scanned(_second_gradients(loss))),
        lambda loss: _over_devices(jax.grad(loss, (0, 1))),
    ],
    ids=["eager", "vmap_x", "vmap_kernel", "checkpoint", "scan", "scan_twice", "devices"],
)
@pytest.mark.parametrize("form", FORMS)
def test_transformed_it_equals_xla(form, transform, request):
    make_loss, x, kernel = _form_of(form, num_images=8)
    if "vmap_kernel" in request.node.name:
        kernel = np.stack([kernel, 2 * kernel, -kernel])
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(x), jnp.asarray(kernel)
        ours, xla = (
            transform(make_loss(convolution))(x, kernel)
            for convolution in (conv_general_dilated, lax.conv_general_dilated)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, xla)


def test_one_program_for_several_platforms():
    make_loss, x, kernel = _form_of("1x1")
    gradients = jax.jit(jax.grad(make_loss(conv_general_dilated), (0, 1)))
    exported = jax.export.export(gradients, platforms=("cpu", "tpu"))(x, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        exported.call(x, kernel),
        gradients(x, kernel),
    )


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
