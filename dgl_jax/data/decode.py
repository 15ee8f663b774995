"""Image files to uint8 arrays on the host, by Pillow. No JAX here: worker processes run it."""

import io
import math

import numpy as np
import PIL.Image

_MODES = {1: "L", 3: "RGB"}

# torchvision's RandomResizedCrop.
_AREA_RANGE = (0.08, 1.0)
_RATIO_RANGE = (3 / 4, 4 / 3)
_NUM_ATTEMPTS = 10
# A 224 crop of an image whose short side is 256, and the same share at other sizes.
_CENTER_FRACTION = 224 / 256


def decode(data: bytes, *, channels: int) -> np.ndarray:
    """A whole image as uint8 [H, W, C]."""
    image = PIL.Image.open(io.BytesIO(data)).convert(_MODES[channels])
    return _as_array(image, channels)


def random_resized_crop(
    data: bytes, rng: np.random.Generator, *, image_size: int, channels: int, flip: bool
) -> np.ndarray:
    """A random part of an image, resized, perhaps mirrored.

    Args:
      data: an encoded image.
      rng: where the crop and the flip come from.
      image_size: S, pixels a side.
      channels: 1 or 3.
      flip: whether to mirror half of the images.

    Returns:
      uint8 [S, S, C].

    Source: torchvision's RandomResizedCrop and RandomHorizontalFlip at their defaults.
    Deviation: a JPEG whose crop is at least twice as large as needed is decoded at 1/2, 1/4 or
      1/8 of its size, where that leaves the crop no smaller than `image_size`; resampling at a
      crop's edge sees the pixels just outside it.
    """
    image = PIL.Image.open(io.BytesIO(data))
    box = random_box(*image.size, rng)
    pixels = _resize(image, box, image_size=image_size, channels=channels)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def center_crop(data: bytes, *, image_size: int, channels: int) -> np.ndarray:
    """The centre of an image: its short side resized to image_size * 256 / 224, then cropped.

    Args:
      data: an encoded image.
      image_size: S, pixels a side.
      channels: 1 or 3.

    Returns:
      uint8 [S, S, C].

    Source: torchvision's Resize(256) and CenterCrop(224).
    Deviation: crop and resize are one operation, so the crop's corner is not rounded to a whole
      pixel; large JPEGs are decoded at a fraction of their size, as in `random_resized_crop`.
    """
    image = PIL.Image.open(io.BytesIO(data))
    width, height = image.size
    side = min(width, height) * _CENTER_FRACTION
    box = ((width - side) / 2, (height - side) / 2, side, side)
    return _resize(image, box, image_size=image_size, channels=channels)


def random_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, upper, width, height) of a random part of an image, as `random_resized_crop` takes it."""
    log_ratio = (math.log(_RATIO_RANGE[0]), math.log(_RATIO_RANGE[1]))
    for _ in range(_NUM_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA_RANGE)
        ratio = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = (
            round(math.sqrt(area * ratio)),
            round(math.sqrt(area / ratio)),
        )
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(0, width - box_width + 1))
            upper = int(rng.integers(0, height - box_height + 1))
            return left, upper, box_width, box_height
    # The image is long and thin: its centre, at the nearest ratio allowed.
    box_width = min(width, round(height * _RATIO_RANGE[1]))
    box_height = min(height, round(width / _RATIO_RANGE[0]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def _resize(
    image: PIL.Image.Image,
    box: tuple[float, float, float, float],
    *,
    image_size: int,
    channels: int,
) -> np.ndarray:
    left, upper, box_width, box_height = box
    full_width, full_height = image.size
    if image.format == "JPEG":
        wanted = (
            math.ceil(full_width * image_size / box_width),
            math.ceil(full_height * image_size / box_height),
        )
        image.draft(_MODES[channels], wanted)  # sets image.size; no smaller than wanted
    x_scale, y_scale = image.size[0] / full_width, image.size[1] / full_height
    scaled = (
        left * x_scale,
        upper * y_scale,
        min((left + box_width) * x_scale, image.size[0]),
        min((upper + box_height) * y_scale, image.size[1]),
    )
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    resized = image.resize((image_size, image_size), PIL.Image.Resampling.BILINEAR, box=scaled)
    return _as_array(resized, channels)


def _as_array(image: PIL.Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels
