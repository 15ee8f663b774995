"""The auxiliary heads: pooling, cost, what they accept, and the suite of every head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgl_jax.auxiliary import AUXILIARY, SimilarityHead, head_for_loss, make_auxiliary
from dgl_jax.errors import UserError
from dgl_jax.models.layers import adaptive_avg_pool
from dgl_jax.models.network import apply_module, init_module


def _adaptive_avg_pool_by_loops(x, out_height, out_width):
    batch, height, width, channels = x.shape
    y = np.zeros((batch, out_height, out_width, channels))
    for i in range(out_height):
        for j in range(out_width):
            rows = slice(i * height // out_height, -((i + 1) * height // -out_height))
            columns = slice(j * width // out_width, -((j + 1) * width // -out_width))
            y[:, i, j] = x[:, rows, columns].mean((1, 2))
    return y


@pytest.mark.parametrize(
    ("size", "out_size"),
    [((8, 8), (2, 2)), ((14, 14), (4, 4)), ((7, 5), (2, 2)), ((7, 8), (3, 2)), ((3, 3), (3, 2))],
)
def test_adaptive_avg_pool(size, out_size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    pooled = adaptive_avg_pool(jnp.asarray(x), out_size)
    np.testing.assert_allclose(pooled, _adaptive_avg_pool_by_loops(x, *out_size), atol=1e-6)


def test_adaptive_avg_pool_does_not_enlarge():
    x = jnp.arange(6.0).reshape(1, 1, 3, 2)
    assert adaptive_avg_pool(x, (2, 5)).shape == (1, 1, 3, 2)
    np.testing.assert_array_equal(adaptive_avg_pool(x, (2, 5)), x)


def _kernel_shapes(name, size, channels, **options):
    """The shapes of a head's kernels on [1, size, size, channels], 10 classes, in order."""
    head = make_auxiliary(name, 10, **options)
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    params, _ = jax.eval_shape(lambda x: init_module(head, jax.random.key(0), x), x)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sorted(leaf.shape for path, leaf in leaves if "kernel" in str(path[-1]))


def _multiplications(name, size, channels, positions, **options):
    """Of one example: a convolution's kernel is used at ``positions``, a matrix once."""
    return sum(
        int(np.prod(shape)) * (positions if len(shape) == 4 else 1)
        for shape in _kernel_shapes(name, size, channels, **options)
    )


# The largest layers of DGL's 6-layer network: 3x3, 256 to 256 at 16x16, and 512 to 512 at 8x8.
LARGEST_LAYER = 9 * 256 * 256 * 16 * 16


@pytest.mark.parametrize(
    ("name", "size", "channels", "positions", "per_cent"),
    [
        # Two convolutions like the layer itself: 200 % (and 0.01 % for the linear layer).
        ("cnn", 16, 256, 16 * 16, 200.0),
        # 3 * 1024^2 + 1024 * 10.
        ("mlp", 16, 256, 0, 2.1),
        # 3 * 256^2 * 4 * 4 more.
        ("mlp_sr", 16, 256, 4 * 4, 4.2),
        # 3 * 2048^2 + 2048 * 10.
        ("mlp", 8, 512, 0, 8.3),
        # 3 * 512^2 * 2 * 2 more.
        ("mlp_sr", 8, 512, 2 * 2, 10.4),
    ],
)
def test_cost_relative_to_the_largest_layer(name, size, channels, positions, per_cent):
    # REFERENCE section 1.2's arithmetic; the paper's own rule is "below 5 %".
    assert LARGEST_LAYER == 150_994_944
    cost = 100 * _multiplications(name, size, channels, positions) / LARGEST_LAYER
    assert cost == pytest.approx(per_cent, abs=0.06)


def test_kernel_shapes():
    hidden = [(4 * 6, 4 * 6)] * 3 + [(4 * 6, 10)]
    assert _kernel_shapes("cnn", 8, 6) == sorted([(3, 3, 6, 6)] * 2 + [(4 * 6, 10)])
    assert _kernel_shapes("mlp", 8, 6) == sorted(hidden)
    assert _kernel_shapes("synthesizer", 8, 6) == sorted([(5, 5, 6, 6)] * 3 + [(6, 10)])
    assert _kernel_shapes("mlp_sr", 8, 6) == sorted([(1, 1, 6, 6)] * 3 + hidden)


# REFERENCE section 3.2, on 16 channels: p = 16 / reduction, and the third depth widens by p/2.
_SEPCONV_FIRST = {4: [(1, 1, 16, 4), (3, 3, 1, 4)], 1: [(1, 1, 16, 16), (3, 3, 1, 16)]}
_SEPCONV_RESIDUALS = {
    4: [
        [(1, 1, 4, 16), (3, 3, 1, 16), (1, 1, 16, 4)],
        [(1, 1, 4, 16), (3, 3, 1, 16), (1, 1, 16, 6)],
        [(1, 1, 6, 24), (3, 3, 1, 24), (1, 1, 24, 6)],
    ],
    1: [
        [(1, 1, 16, 16), (3, 3, 1, 16), (1, 1, 16, 16)],
        [(1, 1, 16, 16), (3, 3, 1, 16), (1, 1, 16, 24)],
        [(1, 1, 24, 24), (3, 3, 1, 24), (1, 1, 24, 24)],
    ],
}


@pytest.mark.parametrize("reduction", [4, 1])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_sepconv_written_out(depth, reduction):
    """Its kernels in order, and the height and width after each convolution."""
    head = make_auxiliary(f"sepconv_{depth}", 10, features=8, reduction=reduction)
    x = jax.ShapeDtypeStruct((2, 9, 9, 16), jnp.float32)

    def outputs(x):
        _, variables = head.init_with_output(
            jax.random.key(0), x, train=False, capture_intermediates=True
        )
        return variables

    variables = jax.eval_shape(outputs, x)
    first, residuals = _SEPCONV_FIRST[reduction], _SEPCONV_RESIDUALS[reduction][: depth - 1]
    kernels = [*first, *(kernel for residual in residuals for kernel in residual)]
    kernels.append((1, 1, kernels[-1][-1], 8))
    # 9 pixels, 5 after the first stride, 3 after that of the second residual.
    sizes = [9, 5, *[5, 5, 5, 5, 3, 3, 3, 3, 3][: 3 * (depth - 1)]]
    sizes.append(sizes[-1])
    for index, (kernel, size) in enumerate(zip(kernels, sizes, strict=True)):
        assert variables["params"][f"Conv_{index}"]["kernel"].shape == kernel
        (output,) = variables["intermediates"][f"Conv_{index}"]["__call__"]
        assert output.shape == (2, size, size, kernel[-1])
        assert "bias" not in variables["params"][f"Conv_{index}"]
    assert f"Conv_{len(kernels)}" not in variables["params"]
    norms = [name for name in variables["params"] if name.startswith("BatchNorm")]
    assert len(norms) == len(kernels)
    assert variables["params"]["Dense_0"]["kernel"].shape == (8, 10)


def test_sepconv_on_a_map_that_is_one_pixel_after_the_first_stride():
    """The second residual neither strides nor widens then, and keeps its shortcut."""
    head = make_auxiliary("sepconv_4", 10, features=8)
    x = jax.ShapeDtypeStruct((2, 2, 2, 16), jnp.float32)
    params, _ = jax.eval_shape(lambda x: init_module(head, jax.random.key(0), x), x)
    shapes = [params[f"Conv_{index}"]["kernel"].shape for index in range(12)]
    residual = [(1, 1, 4, 16), (3, 3, 1, 16), (1, 1, 16, 4)]
    assert shapes == [(1, 1, 16, 4), (3, 3, 1, 4), *residual * 3, (1, 1, 4, 8)]


@pytest.mark.parametrize("name", ["mlp", "mlp_sr"])
def test_max_hidden(name):
    capped = [shape for shape in _kernel_shapes(name, 8, 6, max_hidden=5) if len(shape) == 2]
    assert capped == sorted([(24, 5), (5, 5), (5, 5), (5, 10)])
    assert _kernel_shapes(name, 8, 6, max_hidden=100) == _kernel_shapes(name, 8, 6)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_activations_without_height_and_width(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    head = make_auxiliary("mlp", 10)
    params, batch_stats = init_module(head, jax.random.key(1), x)
    logits, _ = apply_module(head, params, batch_stats, x, train=False)
    assert logits.shape == (4, 10)
    for name in ("cnn", "mlp_sr", "synthesizer"):
        with pytest.raises(UserError, match="use auxiliary.name=mlp"):
            init_module(make_auxiliary(name, 10), jax.random.key(1), x)


def test_errors():
    with pytest.raises(UserError, match="auxiliary.name=mlpsr is unknown; choose one of cnn, mlp"):
        make_auxiliary("mlpsr", 10)
    with pytest.raises(UserError, match="auxiliary.max_hidden=8 does not apply"):
        make_auxiliary("cnn", 10, max_hidden=8)
    with pytest.raises(UserError, match="auxiliary.max_features=8 does not apply to .*=mlp;"):
        make_auxiliary("mlp", 10, max_features=8)
    with pytest.raises(UserError, match="auxiliary.max_hiden is unknown; choose from max_hidden,"):
        make_auxiliary("mlp", 10, max_hiden=8)


def test_global_size_one_map():
    x = jnp.ones((2, 1, 1, 4))
    for name in AUXILIARY:
        head = make_auxiliary(name, 3)
        params, batch_stats = init_module(head, jax.random.key(0), x)
        logits, _ = apply_module(head, params, batch_stats, x, train=False)
        assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("size", "channels", "max_features", "features"),
    [
        ((32, 32), 128, 2048, 4 * 4 * 128),  # Twice doubled in each direction and once more.
        ((32, 32), 128, 4096, 4 * 8 * 128),  # Height is doubled before width.
        ((8, 8), 4, 256, 8 * 8 * 4),
        ((8, 8), 4, 255, 4 * 8 * 4),
        ((2, 2), 4096, 2048, 4096),  # One pixel is left, however many channels.
        ((7, 5), 10, 200, 4 * 5 * 10),
        ((7, 5), 10, 199, 4 * 3 * 10),
        ((1, 8), 10, 40, 4 * 10),
    ],
)
def test_pred_pools_until_few_enough_features_are_left(size, channels, max_features, features):
    head = make_auxiliary("pred", 3, max_features=max_features)
    x = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
    params, _ = jax.eval_shape(lambda x: init_module(head, jax.random.key(0), x), x)
    assert params["Dense_0"]["kernel"].shape == (features, 3)


def test_pred_is_an_average_pool_and_a_linear_layer_of_zeros():
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 2)).astype(np.float32)
    head = make_auxiliary("pred", 3, max_features=2 * 3 * 3)
    params, _ = init_module(head, jax.random.key(0), jnp.asarray(x))
    assert not np.any(params["Dense_0"]["kernel"])
    kernel = np.random.default_rng(1).standard_normal((18, 3)).astype(np.float32)
    logits, _ = apply_module(
        head, {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(3)}}, {}, x, train=True
    )
    pooled = _adaptive_avg_pool_by_loops(x, 3, 3).reshape(2, 18)
    np.testing.assert_allclose(logits, pooled @ kernel, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 6), (2, 3, 6)])
@pytest.mark.parametrize("loss", ["sim", "predsim"])
def test_similarity_head(shape, loss):
    """The classifier sees the block's output, not the similarity map."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    classifier = make_auxiliary("mlp", 3)
    head = head_for_loss(loss, classifier)
    assert head.classifies == (loss == "predsim")
    params, batch_stats = init_module(head, jax.random.key(0), jnp.asarray(x))
    output, updated = apply_module(head, params, batch_stats, x, train=True)
    assert output.keys() == ({"similarity", "logits"} if head.classifies else {"similarity"})
    kernel = params["similarity"]["kernel"]
    assert params["similarity"].keys() == {"kernel"}
    if len(shape) == 4:
        assert kernel.shape == (3, 3, 6, 6)
        expected = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    else:
        expected = x @ kernel
    np.testing.assert_allclose(output["similarity"], expected, atol=1e-5)
    if head.classifies:
        logits, stats = apply_module(
            classifier, params["classifier"], batch_stats["classifier"], x, train=True
        )
        np.testing.assert_array_equal(output["logits"], logits)
        jax.tree.map(np.testing.assert_array_equal, updated["classifier"], stats)


def test_head_for_loss(small_head):
    assert head_for_loss("cross_entropy", small_head) is small_head
    assert head_for_loss("pred", small_head) is small_head
    # A user's own classifier may have no train argument.
    x = jnp.ones((2, 4, 4, 3))
    head = SimilarityHead(small_head)
    params, batch_stats = init_module(head, jax.random.key(0), x)
    output, _ = apply_module(head, params, batch_stats, x, train=False)
    assert output["logits"].shape == (2, 4)


def test_similarity_head_computes_in_bfloat16_with_float32_variables():
    head = head_for_loss("sim", make_auxiliary("pred", 3), jnp.bfloat16)
    x = jnp.ones((2, 4, 4, 3))
    params, _ = init_module(head, jax.random.key(0), x)
    output, _ = apply_module(head, params, {}, x, train=False)
    assert output["similarity"].dtype == jnp.bfloat16
    assert params["similarity"]["kernel"].dtype == jnp.float32
