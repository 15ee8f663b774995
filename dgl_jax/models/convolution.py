"""How a convolution is computed: a drop-in for `jax.lax.conv_general_dilated`.

On the CPU, XLA has one fast form of a convolution: the plain forward one. Outside a loop it
brings the gradients into that form by itself; inside a `lax.scan` it does not, and on two
cores, in jax 0.10, the weight gradient of a 3x3 convolution falls from 30-90 GFLOP/s to
about 1, the input gradient from 55-200 to 6-56. Here both gradients are written as plain
forward convolutions, which run at the same speed in a loop and outside. The weight gradient is
summed over parts of the batch that fit a core's cache (a step of ResNet-110: 3 times as fast); that
of a wide 3x3 convolution is 36 matrix products, by Winograd's method, 1.2-2.5 times as fast. A 1x1
convolution is a matrix product, outside a loop too 3-13 times as fast in its weight gradient. A
depthwise convolution is a sum of shifted products, 10-30 times as fast as XLA's, which fills
up the kernel with zeros; its gradients 3-20 times.

The platform that a program is lowered for decides, not the host's default backend: programs are
also compiled for devices that the host lacks. So `lax.platform_dependent` chooses, and inside each
of the three maps that a convolution and its gradients are. Then the rest is the same everywhere:
the backward pass keeps the input and the kernel, and nothing of a form that was not chosen. For a
GPU or a TPU the three maps are the convolutions that JAX's own differentiation makes, and the
compiled program is the same as without this file.
"""

import contextlib
import contextvars
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dgl_jax.models import winograd

_CACHED_BYTES = 2**19
_NHWC = ("NHWC", "HWIO", "NHWC")
_in_parts = contextvars.ContextVar("in_parts", default=True)


@contextlib.contextmanager
def whole_batch():
    """What is traced within takes each weight gradient by one convolution of the whole batch.

    For a batch that is split over devices, which would have to sum over all of them part by part.
    """
    token = _in_parts.set(False)
    try:
        yield
    finally:
        _in_parts.reset(token)


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
    kernel a channel) is a sum over the kernel's places. In float32 the weight gradient of a wide
    3x3 kernel is exact to some 1e-5 of its largest entry (`winograd`), unless a ``precision`` is
    given.
    Of these convolutions reverse mode works to any order, on all platforms; forward mode
    (``jvp``) does not.

    Args:
      lhs: the input, [B, H, W, C] for the faster forms.
      rhs: the kernel, [kh, kw, C, O] for the faster forms.
      window_strides: as in `lax.conv_general_dilated`, like all that follow.

    Returns:
      The output, [B, H', W', O], in the inputs' dtype.
    """
    if not (
        lhs.ndim == 4
        and 0 not in (*lhs.shape, *rhs.shape)
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and (batch_group_count, preferred_element_type) == (1, None)
        and (feature_group_count == 1 or feature_group_count == lhs.shape[-1] == rhs.shape[-1])
    ):
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
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    form = _Form(
        lhs.shape, rhs.shape, strides, padding, feature_group_count, precision, _in_parts.get()
    )
    return _convolution(lhs, rhs, form)


class _Form(NamedTuple):
    """What a convolution and its gradients have in common."""

    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    num_groups: int
    precision: Any
    in_parts: bool

    @property
    def is_depthwise(self) -> bool:
        return self.num_groups > 1

    @property
    def is_matmul(self) -> bool:
        one_pixel = self.kernel_shape[:2] == (1, 1) and self.padding == ((0, 0), (0, 0))
        return one_pixel and not self.is_depthwise


# ---- A convolution and its two gradients are each linear in two of (x, kernel, dy), and the
# gradients of any of the three are the other two. So all orders of reverse mode run on these three.
# Each chooses its form itself: what is kept for a backward pass does not depend on the platform.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x, kernel, form):
    if not (form.is_depthwise or form.is_matmul):
        return _plain(x, kernel, form)
    return _for_platform(_cpu_convolution, _plain, form, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(kernel, dy, form):
    return _for_platform(_cpu_input_gradient, _plain_input_gradient, form, kernel, dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weight_gradient(x, dy, form):
    return _for_platform(_cpu_weight_gradient, _plain_weight_gradient, form, x, dy)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _for_platform(on_cpu, elsewhere, form, *arrays):
    """One of two functions ``(*arrays, form)``; jitted, so as to be traced once for equal forms."""
    on_cpu, elsewhere = (functools.partial(fn, form=form) for fn in (on_cpu, elsewhere))
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def _convolution_forward(x, kernel, form):
    return _convolution(x, kernel, form), (x, kernel)


def _convolution_backward(form, residuals, dy):
    x, kernel = residuals
    return _input_gradient(kernel, dy, form), _weight_gradient(x, dy, form)


def _input_gradient_forward(kernel, dy, form):
    return _input_gradient(kernel, dy, form), (kernel, dy)


def _input_gradient_backward(form, residuals, x):
    kernel, dy = residuals
    return _weight_gradient(x, dy, form), _convolution(x, kernel, form)


def _weight_gradient_forward(x, dy, form):
    return _weight_gradient(x, dy, form), (x, dy)


def _weight_gradient_backward(form, residuals, kernel):
    x, dy = residuals
    return _input_gradient(kernel, dy, form), _convolution(x, kernel, form)


_convolution.defvjp(_convolution_forward, _convolution_backward)
_input_gradient.defvjp(_input_gradient_forward, _input_gradient_backward)
_weight_gradient.defvjp(_weight_gradient_forward, _weight_gradient_backward)


# ---- Elsewhere than on a CPU: what JAX's own differentiation makes.


def _plain(x, kernel, form):
    return lax.conv_general_dilated(
        x,
        kernel,
        form.strides,
        form.padding,
        dimension_numbers=_NHWC,
        feature_group_count=form.num_groups,
        precision=form.precision,
    )


def _plain_input_gradient(kernel, dy, form):
    return _input_transpose(_plain, kernel, dy, form)


def _plain_weight_gradient(x, dy, form):
    return _weight_transpose(_plain, x, dy, form)


def _input_transpose(convolution, kernel, dy, form):
    x = jax.ShapeDtypeStruct(form.x_shape, dy.dtype)
    return jax.linear_transpose(lambda x: convolution(x, kernel, form), x)(dy)[0]


def _weight_transpose(convolution, x, dy, form):
    kernel = jax.ShapeDtypeStruct(form.kernel_shape, dy.dtype)
    return jax.linear_transpose(lambda kernel: convolution(x, kernel, form), kernel)(dy)[0]


# ---- On a CPU.


def _matmul(x, kernel, form):
    x = x[:, :: form.strides[0], :: form.strides[1]]
    return jnp.matmul(x, kernel[0, 0], precision=form.precision)


def _cpu_convolution(x, kernel, form):
    if form.is_matmul:
        return _matmul(x, kernel, form)
    return _depthwise(x, kernel, form.strides, form.padding)


def _cpu_input_gradient(kernel, dy, form):
    """The transposed convolution: ``dy``, spread by the strides, with the flipped kernel."""
    if form.is_matmul:
        return _input_transpose(_matmul, kernel, dy, form)
    dy_padding = [
        (size - 1 - low, size - 1 - high + missed)
        for size, (low, high), missed in zip(
            form.kernel_shape[:2], form.padding, _missed(form), strict=True
        )
    ]
    flipped = jnp.flip(kernel, (0, 1))
    if form.is_depthwise:
        return _depthwise(_spread(dy, form.strides), flipped, (1, 1), dy_padding)
    return lax.conv_general_dilated(
        dy,
        flipped.swapaxes(2, 3),
        (1, 1),
        dy_padding,
        lhs_dilation=form.strides,
        dimension_numbers=_NHWC,
        precision=form.precision,
    )


def _cpu_weight_gradient(x, dy, form):
    """``x`` convolved with ``dy``, the batch being the features that are summed over."""
    if form.is_matmul:
        return _weight_transpose(_matmul, x, dy, form)
    if form.is_depthwise:
        return _depthwise_weight_gradient(x, dy, form.kernel_shape, form.strides, form.padding)
    if _is_for_winograd(x, form):
        return winograd.weight_gradient(x, dy)
    x_padding = [
        (low, high - missed)
        for (low, high), missed in zip(form.padding, _missed(form), strict=True)
    ]

    def of_images(x, dy):
        gradient = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            dy.transpose(1, 2, 0, 3),
            (1, 1),
            x_padding,
            rhs_dilation=form.strides,
            dimension_numbers=_NHWC,
            precision=form.precision,
        )
        return _wide(gradient.transpose(1, 2, 0, 3))

    num_parts = _num_parts(x) if form.in_parts else 1
    if num_parts == 1:
        return of_images(x, dy).astype(dy.dtype)
    # Each part has every num_parts-th image.
    x, dy = (a.reshape(-1, num_parts, *a.shape[1:]) for a in (x, dy))
    part = lambda i: (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (x, dy))
    add = lambda i, gradient: gradient + of_images(*part(i))
    zeros = jnp.zeros(form.kernel_shape, jnp.promote_types(dy.dtype, jnp.float32))
    return lax.fori_loop(0, num_parts, add, zeros).astype(dy.dtype)


def _num_parts(x) -> int:
    """So many parts of the batch that what is transposed of ``x`` stays in a core's cache.

    XLA transposes element by element: of a whole batch each would come from memory again.
    """
    num_parts, num_bytes = 1, x.size * x.dtype.itemsize
    while num_bytes > num_parts * _CACHED_BYTES and len(x) % (2 * num_parts) == 0:
        num_parts *= 2
    return num_parts


def _is_for_winograd(x, form) -> bool:
    """Where its weight gradient was found to be 1.2-2.5 times as fast, on two cores."""
    batch_size, height, width, _ = x.shape
    return (
        form.in_parts
        and form.kernel_shape[:2] == (3, 3)
        and form.strides == (1, 1)
        and form.padding == ((1, 1), (1, 1))
        and form.precision is None
        and height % winograd.TILE == width % winograd.TILE == 0
        and height * width <= 16 * 16
        and batch_size * height * width >= 256 * winograd.TILE**2
        and min(form.kernel_shape[2:]) >= 128
        and x.dtype in (jnp.float32, jnp.float64)
    )


def _missed(form) -> list[int]:
    """How many of the last rows and columns, with padding, no window reaches."""
    return [
        (size + low + high - kernel_size) % stride
        for size, kernel_size, stride, (low, high) in zip(
            form.x_shape[1:3], form.kernel_shape[:2], form.strides, form.padding, strict=True
        )
    ]


def _depthwise(x, kernel, strides, padding):
    """The sum over the kernel's places of the shifted input, scaled channel by channel."""
    dtype = jnp.result_type(x, kernel)
    weights = _wide(kernel).reshape(-1, 1, 1, 1, kernel.shape[-1])
    shares = _shares(_wide(x), kernel.shape, strides, padding)
    return sum(share * weight for share, weight in zip(shares, weights)).astype(dtype)


def _depthwise_weight_gradient(x, dy, kernel_shape, strides, padding):
    shares = _shares(_wide(x), kernel_shape, strides, padding)
    gradients = [jnp.sum(share * _wide(dy), axis=(0, 1, 2)) for share in shares]
    return jnp.stack(gradients).reshape(kernel_shape).astype(dy.dtype)


def _shares(x, kernel_shape, strides, padding):
    """What each of the kernel's places meets of the padded input, row by row."""
    x = _pad(x, [(low, high, 0) for low, high in padding])
    height, width = (max(0, n - k + 1) for n, k in zip(x.shape[1:3], kernel_shape))
    return [
        x[:, i : i + height : strides[0], j : j + width : strides[1]]
        for i in range(kernel_shape[0])
        for j in range(kernel_shape[1])
    ]


def _spread(dy, strides):
    """Zeros between rows and columns."""
    return _pad(dy, [(0, 0, stride - 1) for stride in strides])


def _pad(x, height_and_width):
    return lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *height_and_width, (0, 0, 0)])


def _wide(x):
    """In float32 at least: sums, the gradients' too, are of many terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
