"""The count of floating-point operations against XLA's and against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dgl_jax.auxiliary import AUXILIARY, make_heads
from dgl_jax.flops import flops
from dgl_jax.models import make_network
from dgl_jax.models.network import apply_module, init_module, output_shape


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _check_equals_xla_s(fn, *args):
    # For a TPU, which has the plain convolutions. XLA leaves out what adds a constant 0.
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
    assert flops(fn, *args) == pytest.approx(lowered.cost_analysis().get("flops", 0), rel=1e-3)


def _check_module(module, x):
    params, batch_stats = jax.eval_shape(
        lambda x: init_module(module, jax.random.key(0), x), _shape(*x.shape)
    )

    def run(params, batch_stats, x):
        return apply_module(module, params, batch_stats, x, train=False)[0]

    def gradients(params, batch_stats, x):
        def output_sum(params):
            y, _ = apply_module(module, params, batch_stats, x, train=True, key=jax.random.key(0))
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y))

        return jax.grad(output_sum)(params)

    for fn in (run, gradients):
        _check_equals_xla_s(fn, params, batch_stats, x)


@pytest.mark.parametrize("name", ["cnn6", "dni_cnn", "vgg13", "resnet18", "resnet50"])
def test_a_network_s_are_xla_s(name):
    network = make_network(name, 10, width_factor=0.25)
    x, seen = _shape(2, 32, 32, 3), []
    for module in (*network.layers, network.head):
        if (module, x.shape) not in seen:
            _check_module(module, x)
            seen.append((module, x.shape))
        x = output_shape(module, x)


@pytest.mark.parametrize("name", AUXILIARY)
def test_a_head_s_are_xla_s(name):
    (head,) = make_heads([name], 10)
    _check_module(head, _shape(2, 8, 8, 16))


def test_padding_strides_dilation_and_groups_are_as_xla_counts_them():
    for options in (
        {"padding": ((3, 1), (0, -1))},
        {"window_strides": (2, 3), "padding": "VALID"},
        {"padding": ((1, 0), (2, 3)), "lhs_dilation": (2, 1), "rhs_dilation": (1, 3)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ):
        options = {"window_strides": (1, 1), "padding": "SAME"} | options
        in_features = 6 // options.get("feature_group_count", 1)

        def convolve(x, kernel, options=options):
            return lax.conv_general_dilated(
                x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
            )

        _check_equals_xla_s(convolve, _shape(4, 9, 8, 6), _shape(3, 2, in_features, 8))


def test_a_loop_counts_as_often_as_it_turns():
    def layers(x, kernels):
        return lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    assert flops(layers, _shape(2, 3), _shape(5, 3, 3)) == 5 * (2 * 2 * 3 * 3)
    # How often this one turns is only known when it runs.
    assert flops(lambda x: lax.while_loop(lambda x: x[0] > 1, lambda x: x + x, x), _shape(4)) == 5


def test_of_a_condition_the_costliest_branch_counts():
    def either(chosen, x):
        return lax.cond(chosen, lambda x: x @ x, lambda x: x + x, x)

    # One more makes a number of the condition.
    assert flops(either, jax.ShapeDtypeStruct((), bool), _shape(3, 3)) == 2 * 3 * 3 * 3 + 1


def test_what_no_output_needs_does_not_count():
    def first_of_two(x):
        unused = x @ x
        del unused
        return x + 1.0

    assert flops(first_of_two, _shape(3, 3)) == 9


def test_what_only_moves_numbers_costs_nothing():
    assert flops(lambda x: x.T.reshape(6)[::2], _shape(2, 3)) == 0
    assert flops(lambda x: jnp.concatenate([x, x]), _shape(2, 3)) == 0
    assert flops(lambda x: jnp.sum(x), _shape(2, 3)) == 5
