"""The weight gradient of a 3x3 convolution as 36 matrix products, by Winograd's method.

The output's gradient is cut into tiles of 4x4; each meets a tile of 6x6 of the input. After a
transform of both, one product at each of the 36 places replaces the 4x4 x 3x3 = 144 of a direct
convolution: a quarter of the multiplications, for transforms that cost little where channels are
many.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016 (arXiv:1509.09308),
F(4x4, 3x3), transposed to the kernel; interpolation points 0, 1, -1, 2, -2. Rounding errors are
larger: in float32 some 1e-5 of the largest entry, where a direct convolution has 1e-6.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# In one dimension y = OUTPUT ((INPUT x) * (KERNEL k)), for 6 entries of x, 3 of k and 4 of y. That is
# linear in k: the gradient by k is KERNEL^T ((INPUT x) * (OUTPUT^T dy)).
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)
TILE = len(_OUTPUT)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient by the kernel of a 3x3 convolution, of stride 1 with one zero around.

    Args:
      x: the input, [B, H, W, C]; H and W are multiples of `TILE`.
      dy: the gradient by the output, [B, H, W, O].

    Returns:
      The gradient, [3, 3, C, O].
    """
    x_tiles = _transformed_tiles(_INPUT, jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    dy_tiles = _transformed_tiles(_OUTPUT.T, dy)
    products = [x_tile.T @ dy_tile for x_tile, dy_tile in zip(x_tiles, dy_tiles, strict=True)]
    products = jnp.stack(products).reshape(6, 6, x.shape[-1], dy.shape[-1])
    kernel = _KERNEL.astype(dy.dtype)
    return jnp.einsum("ik,jl,ijco->klco", kernel, kernel, products)


def _transformed_tiles(matrix: np.ndarray, x: jax.Array) -> list[jax.Array]:
    """Tiles ``TILE`` apart, transformed in both directions: of each place, [B tiles, C]."""
    size = matrix.shape[1]
    height, width = (length - size + 1 for length in x.shape[1:3])
    rows = _combinations(matrix, [x[:, i : i + height : TILE] for i in range(size)])
    return [
        tile.reshape(-1, x.shape[-1])
        for row in rows
        for tile in _combinations(matrix, [row[:, :, j : j + width : TILE] for j in range(size)])
    ]


def _combinations(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """``matrix`` times the column of arrays, without its zeros."""
    return [
        sum(float(factor) * array for factor, array in zip(row, arrays, strict=True) if factor)
        for row in matrix
    ]
