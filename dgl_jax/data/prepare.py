r"""Prepares a TFDS set in the file format that needs no TensorFlow to be read.

    python -m dgl_jax.data.prepare --name=cifar10 --data_dir=DIR

TensorFlow is needed here, once; nowhere else.
"""

import importlib.util
import sys

from absl import app, flags, logging

from dgl_jax.data import tfds_source
from dgl_jax.errors import UserError

_NAME = flags.DEFINE_string("name", "", "The TFDS set: cifar10, imagenette/320px-v2 ...")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The folder of prepared sets.")


def prepare(name: str, data_dir: str) -> None:
    """Downloads and prepares a set.

    Args:
      name: of the TFDS set, with "/config" for a configuration other than its first.
      data_dir: the folder of prepared sets.

    Raises:
      UserError: if an argument is missing, TensorFlow is, or TFDS has no such set or cannot
        fetch it.
    """
    if not name:
        raise UserError("name='' must be the name of a TFDS set; try --name=cifar10")
    if not data_dir:
        raise UserError("data_dir='' must be a folder to prepare in; try --data_dir=data")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"name={name} must be prepared with TensorFlow, which is not installed; run"
            " `pip install tensorflow-cpu` here, or prepare on another machine and copy data_dir"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(
            tfds_source.tfds_name(name), data_dir=data_dir, file_format="array_record"
        )
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"name={name} must be a TFDS set ({first_line}); see"
            " https://www.tensorflow.org/datasets/catalog"
        ) from error
    try:
        builder.download_and_prepare()
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        # An AssertionError says what a set that cannot be fetched (ImageNet) must be given.
        reason = " ".join(str(error).split())
        raise UserError(
            f"name={name} must be fetched, but that failed ({reason}); check the network, or the"
            f" set's page at https://www.tensorflow.org/datasets/catalog"
        ) from error


def main(argv: list[str]) -> int:
    """Runs `prepare` on the flags; the exit code is 2 where there was a `UserError`."""
    logging.set_verbosity(logging.WARNING)  # TFDS logs its every search for files
    try:
        if len(argv) > 1:
            raise UserError(f"argument={argv[1]} must be a flag; try --name={argv[1]}")
        prepare(_NAME.value, _DATA_DIR.value)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
