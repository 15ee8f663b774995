"""How a convolution is computed: a drop-in for `jax.lax.conv_general_dilated`.

On the CPU, XLA has one fast form of a convolution: the plain forward one. Outside a loop it
brings the gradients into that form by itself; inside a `lax.scan` it does not, and on two
cores, in jax 0.10, the weight gradient of a 3x3 convolution falls from 30-90 GFLOP/s to
about 1, the input gradient from 55-200 to 6-56. Here both gradients are written as plain
forward convolutions, which run at the same speed in a loop and outside. A 1x1 convolution
is a matrix product, outside a loop too 3-13 times as fast in its weight gradient. A
depthwise convolution is a sum of shifted products, 10-30 times as fast as XLA's, which fills
up the kernel with zeros; its gradients 3-20 times. On a GPU or a TPU nothing is changed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with faster gradients on the CPU.

    Meant for ``flax.linen.Conv(conv_general_dilated=conv_general_dilated)``. On the CPU a
    2-D convolution takes one of three other forms: a 1x1 kernel is a strided slice and a
    matrix product, a larger one has its two gradients written out, and a depthwise one (one
    kernel a channel) is a sum over the kernel's places.
    Reverse mode works to any order, also under forward mode (``jvp`` of ``grad``); forward
    mode alone does not work for the second form.

    Args:
      lhs: the input, [B, H, W, C] for the faster forms.
      rhs: the kernel, [kh, kw, C, O] for the faster forms.
      window_strides: as in `lax.conv_general_dilated`, like all that follow.

    Returns:
      The output, [B, H', W', O], in the inputs' dtype.
    """
    plain = (
        jax.default_backend() == "cpu"
        and lhs.ndim == 4
        and 0 not in (*lhs.shape, *rhs.shape)
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and (batch_group_count, preferred_element_type) == (1, None)
        and (feature_group_count == 1 or feature_group_count == lhs.shape[-1] == rhs.shape[-1])
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
        )
    kernel_size, strides = rhs.shape[:2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel_size, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    if feature_group_count > 1:
        return _depthwise(lhs, rhs, strides, padding)
    if kernel_size == (1, 1) and padding == ((0, 0), (0, 0)):
        return jnp.matmul(lhs[:, :: strides[0], :: strides[1]], rhs[0, 0], precision=precision)
    return _convolution(lhs, rhs, strides, padding, precision)


def _depthwise(x, kernel, strides, padding):
    """The sum over the kernel's places of the shifted input, scaled channel by channel."""
    dtype = jnp.result_type(x, kernel)
    wide = jnp.promote_types(dtype, jnp.float32)  # Sums, the gradients' too, are of many terms.
    x, kernel = x.astype(wide), kernel.astype(wide)
    x = lax.pad(x, jnp.zeros([], wide), [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
    height, width = (max(0, n - k + 1) for n, k in zip(x.shape[1:3], kernel.shape))
    terms = (
        x[:, i : i + height : strides[0], j : j + width : strides[1]] * kernel[i, j, None, None]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return sum(terms).astype(dtype)


def _xla_convolution(x, kernel, strides, padding, precision):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_NHWC, precision=precision
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(x, kernel, strides, padding, precision):
    """XLA's convolution; its gradients are written out below."""
    return _xla_convolution(x, kernel, strides, padding, precision)


def _convolution_forward(x, kernel, strides, padding, precision):
    return _xla_convolution(x, kernel, strides, padding, precision), (x, kernel)


def _convolution_backward(strides, padding, precision, residuals, dy):
    # Made of differentiable pieces only, so that a hypergradient can go through it.
    x, kernel = residuals
    dx = _input_gradient(kernel, dy, x.shape, strides, padding, precision)
    return dx, _weight_gradient(x, dy, kernel.shape, strides, padding, precision)


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _input_gradient(kernel, dy, x_shape, strides, padding, precision):
    """The transposed convolution: ``dy``, spread by the strides, with the flipped kernel."""
    dy_padding = [
        (size - 1 - low, size - 1 - high + missed)
        for size, (low, high), missed in zip(
            kernel.shape[:2], padding, _missed(x_shape, kernel.shape, strides, padding), strict=True
        )
    ]
    return lax.conv_general_dilated(
        dy,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        dy_padding,
        lhs_dilation=strides,
        dimension_numbers=_NHWC,
        precision=precision,
    )


def _weight_gradient(x, dy, kernel_shape, strides, padding, precision):
    """``x`` convolved with ``dy``, the batch being the features that are summed over."""
    x_padding = [
        (low, high - missed)
        for (low, high), missed in zip(
            padding, _missed(x.shape, kernel_shape, strides, padding), strict=True
        )
    ]
    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        x_padding,
        rhs_dilation=strides,
        dimension_numbers=_NHWC,
        precision=precision,
    )
    return gradient.transpose(1, 2, 0, 3)


def _missed(x_shape, kernel_shape, strides, padding) -> list[int]:
    """How many of the last rows and columns, with padding, no window reaches."""
    return [
        (size + low + high - kernel_size) % stride
        for size, kernel_size, stride, (low, high) in zip(
            x_shape[1:3], kernel_shape[:2], strides, padding, strict=True
        )
    ]
