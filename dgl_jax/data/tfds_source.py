"""Sets prepared by TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np

from dgl_jax.data import cache
from dgl_jax.data.sources import ARRAY_SOURCES, Arrays, from_archive
from dgl_jax.errors import UserError

# The names in the papers' experiments; any other prepared set with image and label will do.
KNOWN_NAMES = (
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "imagenet2012",
    "imagenette",
    "mnist",
    "svhn",
    "svhn_cropped",
    "tiny_imagenet",
)
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_MAX_BYTES_IN_MEMORY = 2 * 2**30
_READ_CHUNK = 1000
_CACHE_FORMAT = "1"  # to be changed with whatever changes the cached arrays


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """A prepared set that was found and checked.

    Attributes:
      name: "cifar10", or "imagenette/320px-v2" with a configuration.
      directory: of its version, with dataset_info.json and the shards.
      num_classes: labels are in [0, num_classes).
      image_shape: (H, W, C); H and W are None if the images differ.
      test_split: the name of the split that is tested on.
      num_examples: by split.
    """

    name: str
    directory: pathlib.Path
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    test_split: str
    num_examples: dict[str, int]


class EncodedImages:
    """(encoded image, label) by stored index. Opens its files when first read, in each process."""

    def __init__(self, directory: str, split: str):
        self._directory = directory
        self._split = split

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._directory)
        decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self._split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        example = self._source[int(index)]
        return example["image"], int(example["label"])

    def __getitems__(self, indices) -> list[tuple[bytes, int]]:
        examples = self._source.__getitems__([int(index) for index in indices])
        return [(example["image"], int(example["label"])) for example in examples]

    def __getstate__(self) -> dict[str, str]:
        return {"_directory": self._directory, "_split": self._split}

    def __repr__(self) -> str:
        return f"EncodedImages({self._directory}, {self._split})"


def tfds_name(name: str) -> str:
    """TFDS's own name of a set: "svhn" is short for "svhn_cropped"."""
    base, slash, config = name.partition("/")
    return {"svhn": "svhn_cropped"}.get(base, base) + slash + config


def prepare_command(name: str, data_dir: str) -> str:
    """The command that prepares a set."""
    return f"python -m dgl_jax.data.prepare --name={name} --data_dir={data_dir}"


def find_set(name: str, data_dir: str) -> TfdsSet:
    """Finds a prepared set at data_dir/name[/config]/version and checks that it can be read.

    Args:
      name: "cifar10", or "name/config" where several configurations were prepared.
      data_dir: the folder of prepared sets.

    Returns:
      The newest version of the set.

    Raises:
      UserError: if it is missing, half prepared, in another file format, or has no image and
        label.
    """
    base, _, config = tfds_name(name).partition("/")
    if not data_dir:
        if base not in KNOWN_NAMES:
            raise UserError(_unknown_name(name))
        raise UserError(
            f"data_dir='' must be the folder of prepared TFDS sets for name={name}; prepare it by"
            f" `{prepare_command(name, 'DIR')}`, or use name=embedded, which needs none"
        )
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data_dir={data_dir} must be a folder; check the path, or create it")
    if not base or not (root / base).is_dir():
        if base not in KNOWN_NAMES:
            raise UserError(_unknown_name(name, f" ({root / base} does not exist)"))
        raise UserError(
            f"name={name} must be prepared, but there is no {root / base}; run"
            f" `{prepare_command(name, data_dir)}`"
        )
    directory = _newest_version(root / base, name, config, data_dir)
    return _open(directory, root, name, data_dir)


def fits_in_memory(tfds_set: TfdsSet) -> bool:
    """Whether the decoded images are all of one shape and take at most 2 GiB."""
    if None in tfds_set.image_shape:
        return False
    num_images = tfds_set.num_examples["train"] + tfds_set.num_examples[tfds_set.test_split]
    return num_images * int(np.prod(tfds_set.image_shape)) <= _MAX_BYTES_IN_MEMORY


def read_arrays(tfds_set: TfdsSet) -> Arrays:
    """Decodes a whole set, or takes it from the cache (`dgl_jax.data.cache`).

    Args:
      tfds_set: a set whose images are all of one shape.

    Returns:
      The set, in stored order.

    Raises:
      UserError: if its images differ in shape, or a label is out of range.
    """
    if None in tfds_set.image_shape:
        raise UserError(
            f"streaming=False needs images of one shape, but name={tfds_set.name} declares"
            f" {tfds_set.image_shape}; use streaming=True"
        )

    def build() -> dict[str, np.ndarray]:
        x_train, y_train = _decode_split(tfds_set, "train")
        x_test, y_test = _decode_split(tfds_set, tfds_set.test_split)
        return {
            "x_train": x_train,
            "y_train": y_train,
            "x_test": x_test,
            "y_test": y_test,
        }

    arrays = cache.load_or_build(_cache_key(tfds_set), build)
    return from_archive(
        tfds_set.name, arrays, f"name={tfds_set.name}", num_classes=tfds_set.num_classes
    )


def _unknown_name(name: str, found: str = "") -> str:
    known = (*ARRAY_SOURCES, *KNOWN_NAMES)
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}?" if close else "use name=embedded to try things out"
    return (
        f"name={name} must be one of {', '.join(known)}, or another prepared TFDS set{found};"
        f" {advice}"
    )


def _newest_version(base: pathlib.Path, name: str, config: str, data_dir: str) -> pathlib.Path:
    """The folder of the newest version, of the configuration asked for or of the only one."""
    folder = base / config if config else base
    versions = _versions(folder)
    if not versions and not config and base.is_dir():
        configs = sorted(path.name for path in base.iterdir() if path.is_dir() and _versions(path))
        if len(configs) > 1:
            raise UserError(
                f"name={name} must say which of the configurations {', '.join(configs)} in {base};"
                f" use name={name}/{configs[0]}"
            )
        if configs:
            folder = base / configs[0]
            versions = _versions(folder)
    if versions:
        return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    unfinished = folder.is_dir() and any("incomplete" in p.name for p in folder.rglob("*"))
    state = "holds only an unfinished preparation" if unfinished else "holds no prepared version"
    raise UserError(
        f"name={name} must be prepared, but {folder} {state}; run"
        f" `{prepare_command(name, data_dir)}`"
    )


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _VERSION.fullmatch(path.name)]


def _open(directory: pathlib.Path, root: pathlib.Path, name: str, data_dir: str) -> TfdsSet:
    again = f"remove that folder and run `{prepare_command(name, data_dir)}`"
    for file_name in ("dataset_info.json", "features.json"):
        if not (directory / file_name).is_file():
            raise UserError(
                f"name={name} must be wholly prepared, but {directory} has no {file_name}; {again}"
            )
    try:
        file_format = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat")
    except json.JSONDecodeError as error:
        raise UserError(
            f"name={name} must be wholly prepared, but {directory}/dataset_info.json cannot be"
            f" parsed ({error}); {again}"
        ) from error
    # Sets of before TFDS 4.4 name no format and are tfrecord.
    if file_format != "array_record":
        raise UserError(
            f"file_format={file_format or 'tfrecord'} of {directory} must be array_record, to be"
            f" read without TensorFlow; run `{prepare_command(name, data_dir)}` in another"
            f" data_dir, or convert it by tfds.scripts.convert_format"
        )
    import tensorflow_datasets as tfds  # Takes a second, and only prepared sets need it.

    info = tfds.builder_from_directory(directory).info
    missing = [
        path for split in info.splits.values() for path in split.filepaths if not path.exists()
    ]
    if missing:
        raise UserError(
            f"name={name} must be wholly prepared, but {missing[0]} is missing"
            f" ({len(missing)} missing in all); {again}"
        )
    channels, num_classes, shape = _check_features(info.features, name)
    for split_info in info.splits.values():
        _check_shards(directory, split_info, name, again)
    splits = {split: info.splits[split].num_examples for split in info.splits}
    return TfdsSet(
        name=directory.parent.relative_to(root).as_posix(),
        directory=directory,
        num_classes=num_classes,
        image_shape=(*shape, channels),
        test_split=_test_split(directory, splits, name),
        num_examples=splits,
    )


def _check_shards(directory: pathlib.Path, split_info: Any, name: str, again: str) -> None:
    """Reads one example of each shard: a file cut short has lost the index at its end."""
    source = EncodedImages(str(directory), split_info.name)
    start = 0
    for path, length in zip(split_info.filepaths, split_info.shard_lengths, strict=True):
        try:
            if length:
                _ = source[start]
        except RuntimeError as error:
            raise UserError(
                f"name={name} must be wholly prepared, but {path} cannot be read ({error}); {again}"
            ) from error
        start += length


def _check_features(features: Any, name: str) -> tuple[int, int, tuple[int | None, int | None]]:
    """(channels, num_classes, (height, width)) of a set's features."""
    import tensorflow_datasets as tfds

    by_key = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = by_key.get("image"), by_key.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        found = ", ".join(by_key) or type(features).__name__
        raise UserError(
            f"name={name} must have the features image (an Image) and label (a ClassLabel), but it"
            f" has {found}; use a classification set, or name=arrays"
        )
    height, width, channels = image.shape
    if channels not in (1, 3) or image.np_dtype != np.uint8:
        raise UserError(
            f"image={image} of name={name} must be uint8 with 1 or 3 channels; use name=arrays"
        )
    return channels, label.num_classes, (height, width)


def _test_split(directory: pathlib.Path, splits: dict[str, int], name: str) -> str:
    if not splits.get("train"):
        raise UserError(
            f"name={name} must have a split train, but it has {', '.join(splits)}; use another set"
        )
    for split in ("test", "validation"):
        # ImageNet's test split has no labels: TFDS writes -1.
        if splits.get(split) and EncodedImages(str(directory), split)[0][1] >= 0:
            return split
    raise UserError(
        f"name={name} must have a labelled split test or validation, but it has"
        f" {', '.join(splits)}; use another set, or name=arrays"
    )


def _decode_split(tfds_set: TfdsSet, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tqdm

    from dgl_jax.data.decode import decode  # Imports Pillow.

    source = EncodedImages(str(tfds_set.directory), split)
    images = np.empty((len(source), *tfds_set.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm.tqdm(
        total=len(source), desc=f"{tfds_set.name} {split}", unit="images", disable=None,
        file=sys.stderr,
    ) as bar:  # fmt: skip
        for start in range(0, len(source), _READ_CHUNK):
            stop = min(start + _READ_CHUNK, len(source))
            for index, (data, label) in enumerate(source.__getitems__(range(start, stop)), start):
                images[index] = decode(data, channels=tfds_set.image_shape[2])
                labels[index] = label
            bar.update(stop - start)
    return images, labels


def _cache_key(tfds_set: TfdsSet) -> str:
    digest = hashlib.sha256(_CACHE_FORMAT.encode())
    digest.update(tfds_set.test_split.encode())
    digest.update((tfds_set.directory / "dataset_info.json").read_bytes())
    for path in sorted(tfds_set.directory.glob("*.array_record-*")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    name = tfds_set.name.replace("/", "-")
    return f"{name}-{tfds_set.directory.name}-{digest.hexdigest()[:16]}"
