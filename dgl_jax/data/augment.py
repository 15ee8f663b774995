"""Augmentation and normalisation on the device: pure functions inside a jitted program."""

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Pixels to numbers of mean 0 and deviation 1.

    Args:
      images: uint8 [..., C].
      mean: float32 [C], of pixels scaled to [0, 1].
      std: float32 [C].

    Returns:
      float32 [..., C].

    Example:
      >>> images = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1)
      >>> normalized = normalize(images, mean=jnp.array([0.5]), std=jnp.array([0.25]))
      >>> print(normalized.shape, normalized.ravel())
      (2, 1, 1, 1) [-2.  2.]
    """
    return (images.astype(jnp.float32) / 255 - jnp.broadcast_to(mean, images.shape)) / (
        jnp.broadcast_to(std, images.shape)
    )


def gather_crops(
    images: jax.Array,
    index: jax.Array,
    offsets: jax.Array,
    flips: jax.Array,
    *,
    crop_padding: int,
) -> jax.Array:
    """Picks images, each padded with black, cropped to its own size and perhaps mirrored.

    One gather, without a padded copy: on two CPU cores a third of the time of padding and
    slicing.

    Args:
      images: uint8 [N, H, W, C], the whole set.
      index: int32 [B], which images.
      offsets: int32 [B, 2], the crop's corner (row, column) in the padded image, each in
        [0, 2 * crop_padding].
      flips: bool [B], whether the crop is mirrored left to right.
      crop_padding: black pixels on each side.

    Returns:
      uint8 [B, H, W, C].

    Source: torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, which pad the raw
      pixels with 0 before they are normalised.
    Deviation: none.
    """
    height, width = images.shape[1:3]
    column = jnp.arange(width)[None, :]
    rows = jnp.arange(height)[None, :] + offsets[:, :1] - crop_padding
    columns = jnp.where(flips[:, None], width - 1 - column, column) + offsets[:, 1:] - crop_padding
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    crops = images[
        index[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ]
    return jnp.where(inside[..., None], crops, jnp.uint8(0))
