"""Sets that come as whole arrays: the embedded one, and the user's own .npz."""

import dataclasses
import gzip
import importlib.resources
import math
import os
import zlib
from collections.abc import Callable

import numpy as np

from dgl_jax.errors import UserError

ARRAY_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A whole set on the host.

    Attributes:
      name: the name of the set.
      num_classes: labels are in [0, num_classes).
      train_images: uint8 [N, H, W, C].
      train_labels: int32 [N].
      test_images: uint8 [M, H, W, C].
      test_labels: int32 [M].
    """

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.train_images.shape[1:]


def load_embedded(data_dir: str = "") -> Arrays:
    """The part of Fashion-MNIST that ships with the package: 10,000 and 2,000 images.

    Args:
      data_dir: not used.

    Returns:
      The set: images [28, 28, 1], ten classes, as many examples of each.

    Example:
      >>> arrays = load_embedded()
      >>> arrays.train_images.shape, arrays.test_images.shape, arrays.num_classes
      ((10000, 28, 28, 1), (2000, 28, 28, 1), 10)

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017.
    """
    del data_dir
    path = importlib.resources.files("dgl_jax.data.embedded") / "fashion_mnist.npz"
    with path.open("rb") as file, np.load(file) as archive:
        return from_archive("embedded", dict(archive), "the embedded set", num_classes=10)


def load_arrays(data_dir: str) -> Arrays:
    """The user's own set.

    Args:
      data_dir: the path of an .npz with x_train, y_train, x_test and y_test: uint8 images
        [N, H, W] or [N, H, W, C], and integer labels [N] from 0. Or a folder with the four idx
        files of MNIST, Fashion-MNIST and their kind, as they are distributed, gzipped or not.

    Returns:
      The set; its number of classes is the largest label plus one.

    Raises:
      UserError: if the file is missing or is not as described.
    """
    if not data_dir:
        raise UserError(
            "data_dir='' must be the path of an .npz file for name=arrays; write one by"
            " np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    path = os.path.expanduser(data_dir)
    if os.path.isdir(path):
        arrays = {key: _read_idx(path, name, data_dir) for key, name in _IDX_FILES.items()}
        return from_archive("arrays", arrays, f"data_dir={data_dir}", num_classes=None)
    if not os.path.isfile(path):
        raise UserError(
            f"data_dir={data_dir} must be an .npz file, or a folder of idx files, for name=arrays; "
            "check the path"
        )
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise TypeError("one array, not an archive")
            arrays = {key: archive[key] for key in archive.files if key in ARRAY_KEYS}
    except MemoryError:
        raise
    except Exception as error:  # Of zip, of zlib, of numpy's own header: there are many.
        raise UserError(
            f"data_dir={data_dir} must be a readable .npz file ({error}); write it by np.savez"
        ) from error
    return from_archive("arrays", arrays, f"data_dir={data_dir}", num_classes=None)


_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def _read_idx(folder: str, name: str, data_dir: str) -> np.ndarray:
    """An idx file: two zeros, 8 for unsigned bytes, the number of axes, their sizes, the bytes."""
    path, opener = os.path.join(folder, name), open
    if not os.path.exists(path):
        path, opener = path + ".gz", gzip.open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(
            f"data_dir={data_dir} has neither {name} nor {name}.gz; put the four idx files of the "
            "set there, or give an .npz file"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    num_axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * num_axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:start][: 4 * num_axes], ">i4"))
    if not num_axes or len(content) != start + math.prod(shape):
        raise UserError(f"{path} is no whole idx file of unsigned bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def from_archive(
    name: str, arrays: dict[str, np.ndarray], origin: str, *, num_classes: int | None
) -> Arrays:
    """Checks the four arrays of a set and gives them their final shapes and dtypes.

    Args:
      name: the name of the set.
      arrays: by the names x_train, y_train, x_test, y_test.
      origin: how an error names where they came from.
      num_classes: None for the largest label plus one.

    Returns:
      The set.

    Raises:
      UserError: on a missing key, a wrong dtype or shape, or a label out of range.
    """
    missing = [key for key in ARRAY_KEYS if key not in arrays]
    if missing:
        raise UserError(
            f"{origin} must hold {', '.join(ARRAY_KEYS)}; add the missing {', '.join(missing)}"
        )
    images = {side: _check_images(f"x_{side}", arrays[f"x_{side}"], origin) for side in _SIDES}
    labels = {
        side: _check_labels(f"y_{side}", arrays[f"y_{side}"], len(images[side]), origin)
        for side in _SIDES
    }
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise UserError(
            f"x_test.shape={images['test'].shape} must have images of the shape of x_train,"
            f" {images['train'].shape[1:]}, in {origin}; resize one of them"
        )
    largest = max(int(labels[side].max()) for side in _SIDES)
    if num_classes is None:
        num_classes = int(labels["train"].max()) + 1
    if largest >= num_classes:
        raise UserError(
            f"label={largest} must be less than the {num_classes} classes of y_train in {origin};"
            f" number the classes from 0"
        )
    return Arrays(
        name=name,
        num_classes=num_classes,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
    )


_SIDES = ("train", "test")


def _check_images(key: str, images: np.ndarray, origin: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UserError(
            f"{key}.dtype={images.dtype} must be uint8, pixels 0 to 255, in {origin};"
            f" convert by (255 * x).astype('uint8')"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"{key}.shape={images.shape} must be [N, H, W] or [N, H, W, C], none of them 0,"
            f" in {origin}; reshape it"
        )
    return np.ascontiguousarray(images)


def _check_labels(key: str, labels: np.ndarray, num_images: int, origin: str) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{key}.dtype={labels.dtype} must be an integer type in {origin}; use class numbers"
            f" from 0"
        )
    if labels.shape != (num_images,):
        raise UserError(
            f"{key}.shape={labels.shape} must be ({num_images},), one label an image, in {origin};"
            f" reshape it"
        )
    smallest = int(labels.min())
    if smallest < 0:
        raise UserError(
            f"label={smallest} in {key} must not be negative, in {origin}; number the classes"
            f" from 0"
        )
    return labels.astype(np.int32)


ARRAY_SOURCES: dict[str, Callable[[str], Arrays]] = {
    "arrays": load_arrays,
    "embedded": load_embedded,
}
