r"""Makes fashion_mnist.npz: a class-balanced part of Fashion-MNIST.

    python -m dgl_jax.data.embedded.make --idx_dir=/usr/share/datasets/fashion-mnist

after `apt-get install dataset-fashion-mnist` (Debian), or with the four idx files of
https://github.com/zalandoresearch/fashion-mnist in any folder. The first 1,000 training and 200
test images of each class, in stored order: 10,000 and 2,000 images, 5.3 MB, the same bytes each
time. Took 3.5 s.
"""

import gzip
import pathlib
import sys

import numpy as np
from absl import app, flags

from dgl_jax.errors import UserError

_IDX_DIR = flags.DEFINE_string(
    "idx_dir", "/usr/share/datasets/fashion-mnist", "The folder of the idx files."
)
_OUT = flags.DEFINE_string(
    "out",
    str(pathlib.Path(__file__).parent / "fashion_mnist.npz"),
    "The file to write.",
)

_NUM_CLASSES = 10
_NUM_A_CLASS = {"train": 1000, "test": 200}
_PREFIXES = {"train": "train", "test": "t10k"}
_UINT8 = 8  # the idx format's code of the element type


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a gzipped idx file: uint8, of the shape that it says.

    Source: http://yann.lecun.com/exdb/mnist/: two zero bytes, a type code, the rank, then each
      dimension as a big-endian int32.

    Raises:
      UserError: there is no such file, or it is not of uint8.
    """
    if not path.is_file():
        raise UserError(
            f"idx_dir={path.parent} must hold {path.name}; run `apt-get install"
            f" dataset-fashion-mnist`, or give the folder of the idx files"
        )
    data = gzip.decompress(path.read_bytes())
    if data[:2] != b"\0\0" or data[2] != _UINT8:
        raise UserError(f"idx_dir={path.parent} must hold idx files of uint8; check {path.name}")
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, num_a_class: int) -> np.ndarray:
    """The indices of the first `num_a_class` examples of each class, in stored order."""
    firsts = [np.flatnonzero(labels == label)[:num_a_class] for label in range(_NUM_CLASSES)]
    return np.sort(np.concatenate(firsts))


def main(argv: list[str]) -> int:
    """Writes the .npz; the exit code is 2 where the idx files raise a `UserError`."""
    del argv
    arrays = {}
    try:
        for split, prefix in _PREFIXES.items():
            idx_dir = pathlib.Path(_IDX_DIR.value)
            images = read_idx(idx_dir / f"{prefix}-images-idx3-ubyte.gz")
            labels = read_idx(idx_dir / f"{prefix}-labels-idx1-ubyte.gz")
            index = first_of_each_class(labels, _NUM_A_CLASS[split])
            arrays[f"x_{split}"] = images[index]
            arrays[f"y_{split}"] = labels[index]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    np.savez_compressed(_OUT.value, **arrays)
    return 0


if __name__ == "__main__":
    app.run(main)
