"""The data: functions of (seed, step), the augmentation's oracle, exact evaluation, errors."""

import functools
import gzip
import importlib.util
import io
import json
import logging
import pathlib
import pickle
import shutil
import socket
import struct
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dgl_jax.data import (
    Description,
    cache,
    decode,
    describe_dataset,
    load_dataset,
    load_dataset_in_parts,
    shardings,
    statistics,
    streaming,
    tfds_source,
)
from dgl_jax.data.sources import load_arrays
from dgl_jax.errors import UserError

REAL_SETS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"
NUM_TRAIN, NUM_TEST, SIDE = 22, 7, 6


def tiny_images(num: int, seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (num, SIDE, SIDE, channels), np.uint8)


TRAIN_IMAGES, TEST_IMAGES = tiny_images(NUM_TRAIN, 0), tiny_images(NUM_TEST, 1)
# As many classes as examples: a label says which example it is.
TRAIN_LABELS, TEST_LABELS = np.arange(NUM_TRAIN), np.arange(NUM_TEST)


def encode(image: np.ndarray, file_format: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, file_format)
    return file.getvalue()


def photo(index: int) -> bytes:
    """A JPEG whose size, and whose mean brightness, say which one it is."""
    shape = (40 + 3 * index, 70 - 2 * index, 3)
    return encode(np.full(shape, 10 * index, np.uint8), "JPEG")


class TinyIcons(tfds.core.GeneratorBasedBuilder):
    """The arrays above as a TFDS set. Written without TensorFlow: its images come encoded."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
            "label": tfds.features.ClassLabel(num_classes=NUM_TRAIN),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._examples(TRAIN_IMAGES), "test": self._examples(TEST_IMAGES)}

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self, images):
        for index, image in enumerate(images):
            example = {"image": io.BytesIO(encode(image, "PNG")), "label": index, "id": str(index)}
            yield index, example


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """JPEGs of different sizes; its test split has no labels, as ImageNet's."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=9),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._examples(range(9), True),
            "validation": self._examples(range(5), True),
            "test": self._examples(range(3), False),
        }

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self, indices, labelled):
        for index in indices:
            image = io.BytesIO(photo(index))
            yield index, {"image": image, "label": index if labelled else -1}


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A set without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._examples(), "test": self._examples()}

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self):
        yield 0, {"text": "a"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """A folder of really prepared sets."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for builder in (TinyIcons, TinyPhotos, TinyTexts):
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> pathlib.Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DGL_JAX_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("arrays") / "tiny.npz"
    np.savez(path, **tiny_arrays())
    return str(path)


def tiny_arrays() -> dict[str, np.ndarray]:
    return {
        "x_train": TRAIN_IMAGES,
        "y_train": TRAIN_LABELS,
        "x_test": TEST_IMAGES,
        "y_test": TEST_LABELS,
    }


def load(**kwargs):
    return load_dataset(**{"batch_size": 4, "eval_batch_size": 3, "seed": 0} | kwargs)


def load_tiny(npz, **kwargs):
    return load(**{"name": "arrays", "data_dir": npz, "crop_padding": 2} | kwargs)


def load_photos(prepared, **kwargs):
    return load(
        **{"name": "tiny_photos", "data_dir": str(prepared), "image_size": 16, "batch_size": 2}
        | kwargs
    )


def unnormalized(images, mean, std) -> np.ndarray:
    """Back to pixels; exact, since neighbouring pixel values are far apart."""
    return np.round((np.asarray(images) * std + mean) * 255).astype(np.uint8)


def assert_same(batch, other):
    np.testing.assert_array_equal(np.asarray(batch.images), np.asarray(other.images))
    np.testing.assert_array_equal(np.asarray(batch.labels), np.asarray(other.labels))


class CompilationLog(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "Finished XLA compilation" in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def compilations():
    """Lines of jax's log, one a compilation."""
    handler, logger = CompilationLog(), logging.getLogger("jax._src.dispatch")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


# ---- Batches are functions of (seed, step)


KINDS = ("in_memory", "streamed")


@pytest.fixture(params=KINDS)
def load_kind(request, npz, prepared):
    """Loads a small set of either kind."""
    if request.param == "in_memory":
        return lambda **kwargs: load_tiny(npz, **kwargs)
    return lambda **kwargs: load_photos(prepared, **kwargs)


def test_parts_are_those_of_the_whole(load_kind, monkeypatch):
    """A process's images and everybody's labels: of the same examples, in every step and epoch."""
    whole = load_kind(seed=3)
    in_parts = functools.partial(load_dataset_in_parts, sharding=shardings.default_sharding())
    monkeypatch.setattr(sys.modules[__name__], "load_dataset", in_parts)
    parts = load_kind(seed=3)
    for step in (0, 1, whole.steps_per_epoch, 5 * whole.steps_per_epoch + 1):
        assert_same(parts.batch_at(step), whole.batch_at(step))
    together = zip(parts.eval_batches("test"), whole.eval_batches("test"), strict=True)
    for part, batch in together:
        jax.tree.map(np.testing.assert_array_equal, tuple(part), tuple(batch))


def test_of_a_stream_labels_are_read_once():
    class Source(list):
        reads = 0

        def __getitem__(self, position):
            self.reads += 1
            return super().__getitem__(position)

    source = Source((b"image", label) for label in (2, 0, 1))
    labels = streaming.Labels(source)
    for _ in range(3):
        assert [labels[position] for position in (2, 0, 1)] == [(b"", 1), (b"", 2), (b"", 0)]
    assert len(labels) == source.reads == 3


def test_batch_is_a_function_of_seed_and_step(load_kind):
    one, other = load_kind(seed=3), load_kind(seed=3)
    steps = [0, 1, 2, 3, one.steps_per_epoch, 7 * one.steps_per_epoch + 1]
    forward = {step: one.batch_at(step) for step in steps}
    for step in reversed(steps):
        assert_same(other.batch_at(step), forward[step])
        assert_same(one.batch_at(step), forward[step])
    different = load_kind(seed=4).batch_at(0)
    assert not np.array_equal(np.asarray(different.images), np.asarray(forward[0].images))
    for dataset in (one, other):
        dataset.close()


def test_shapes_and_dtypes(load_kind):
    dataset = load_kind(batch_size=4)
    batch = dataset.batch_at(1)
    assert batch.images.shape == (4, *dataset.image_shape)
    assert batch.images.dtype == np.float32
    assert batch.labels.shape == (4,)
    assert batch.labels.dtype == np.int32
    for images, labels, mask in dataset.eval_batches("test"):
        assert images.shape == (3, *dataset.image_shape)
        assert (labels.shape, mask.shape) == ((3,), (3,))
        assert (images.dtype, labels.dtype, mask.dtype) == (np.float32, np.int32, np.float32)


def test_an_epoch_visits_all_examples_but_the_remainder_once(load_kind):
    dataset = load_kind(batch_size=4)
    assert dataset.steps_per_epoch == dataset.num_train // 4
    left_out = []
    for epoch in range(4):
        steps = range(epoch * dataset.steps_per_epoch, (epoch + 1) * dataset.steps_per_epoch)
        seen = np.concatenate([np.asarray(dataset.batch_at(step).labels) for step in steps])
        assert len(set(seen.tolist())) == len(seen) == dataset.steps_per_epoch * 4
        left_out.append(frozenset(range(dataset.num_train)) - frozenset(seen.tolist()))
    assert len(set(left_out)) > 1


def test_validation_split_is_disjoint_and_complete(load_kind):
    dataset = load_kind(validation_fraction=0.34, batch_size=1, eval_batch_size=4)
    labels = {split: eval_labels(dataset, split) for split in ("train", "validation")}
    total = dataset.num_train + dataset.num_validation
    assert len(labels["validation"]) == dataset.num_validation == round(0.34 * total)
    assert len(labels["train"]) == dataset.num_train
    assert sorted(labels["train"] + labels["validation"]) == list(range(total))
    steps = range(2 * dataset.steps_per_epoch)
    trained = {int(dataset.batch_at(step).labels[0]) for step in steps}
    assert trained == set(labels["train"])
    again = load_kind(validation_fraction=0.34, batch_size=1, eval_batch_size=4)
    assert eval_labels(again, "validation") == labels["validation"]


def eval_labels(dataset, split: str) -> list[int]:
    kept = []
    for _, labels, mask in dataset.eval_batches(split):
        kept += np.asarray(labels)[np.asarray(mask) == 1].tolist()
    return kept


def test_evaluation_is_exact(load_kind):
    dataset = load_kind()
    for split, size in (("test", dataset.num_test), ("train", dataset.num_train)):
        batches = list(dataset.eval_batches(split))
        assert len(batches) == -(-size // 3)
        assert sum(float(mask.sum()) for _, _, mask in batches) == size
        # array_record sets keep the order in which TFDS hashed the examples.
        assert sorted(eval_labels(dataset, split)) == list(range(size))
        assert eval_labels(dataset, split) == eval_labels(dataset, split)


def test_no_implicit_transfer_and_no_compilation_after_the_first_batch(load_kind, compilations):
    jax.clear_caches()
    dataset = load_kind()
    with jax.transfer_guard("disallow"):
        dataset.batch_at(0)
        list(dataset.eval_batches("test"))
        assert compilations
        compilations.clear()
        for step in range(1, 3 * dataset.steps_per_epoch):
            dataset.batch_at(step)
        list(dataset.eval_batches("test"))
    assert not compilations
    dataset.close()


@pytest.mark.parametrize("spec", [PartitionSpec("data", None), PartitionSpec()])
def test_sharded_over_four_devices(load_kind, spec):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[2:6])
    sharding = NamedSharding(mesh, spec)
    labels = NamedSharding(mesh, PartitionSpec(*spec[:1]))
    sharded = load_kind(batch_size=4, eval_batch_size=8, sharding=sharding)
    single = load_kind(batch_size=4, eval_batch_size=8)
    with jax.transfer_guard("disallow"):
        batches = [sharded.batch_at(step) for step in range(sharded.steps_per_epoch + 2)]
        evaluation = list(sharded.eval_batches("test"))
    for step, batch in enumerate(batches):
        assert batch.images.sharding.is_equivalent_to(sharding, 4)
        assert batch.labels.sharding.is_equivalent_to(labels, 1)
        assert_same(batch, single.batch_at(step))
    for ours, theirs in zip(evaluation, single.eval_batches("test"), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert len(one.sharding.device_set) == 4
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_placed_on_one_device(load_kind):
    device = jax.devices()[5]
    dataset = load_kind(sharding=SingleDeviceSharding(device))
    with jax.transfer_guard("disallow"):
        assert dataset.batch_at(0).images.devices() == {device}
        assert dataset.batch_at(0).labels.devices() == {device}
        assert next(iter(dataset.eval_batches("test")))[2].devices() == {device}


PROCESS = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

port, rank, npz, prepared = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)

from dgl_jax.data import load_dataset

sharding = NamedSharding(jax.make_mesh((4,), ("data",), (AxisType.Auto,)), PartitionSpec("data"))
for options in (
    {"name": "arrays", "data_dir": npz, "crop_padding": 2},
    {"name": "tiny_photos", "data_dir": prepared, "image_size": 16},
):
    options |= {"batch_size": 4, "eval_batch_size": 8, "seed": 1}
    alone, together = load_dataset(**options), load_dataset(**options, sharding=sharding)
    for step in (0, 5, 6):
        with jax.transfer_guard("disallow"):
            ours = jax.tree.leaves(together.batch_at(step)) + list(*together.eval_batches("test"))
            theirs = jax.tree.leaves(alone.batch_at(step)) + list(*alone.eval_batches("test"))
        for one, other in zip(ours, theirs, strict=True):
            for shard in one.addressable_shards:
                np.testing.assert_array_equal(
                    np.asarray(shard.data), np.asarray(other)[shard.index]
                )
    together.close()
    alone.close()
print("equal")
"""


def test_two_processes_get_their_parts_of_the_same_batches(npz, prepared):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    root = pathlib.Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(rank), npz, str(prepared)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        assert output.splitlines()[-1] == "equal", output


# ---- In memory: augmentation and normalisation


@pytest.mark.parametrize("crop_padding", [0, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_flipped_crops_of_the_padded_originals(npz, crop_padding, flip):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    dataset = load_tiny(npz, crop_padding=crop_padding, flip=flip, mean=mean, std=std)
    width = 2 * crop_padding
    padding = ((0, 0), (crop_padding,) * 2, (crop_padding,) * 2, (0, 0))
    padded = np.pad(TRAIN_IMAGES, padding)
    found = set()
    for step in range(30):
        batch = dataset.batch_at(step)
        pixels = unnormalized(batch.images, mean, std)
        for image, label in zip(pixels, np.asarray(batch.labels), strict=True):
            crops = {
                (row, column, flipped): padded[label, row : row + SIDE, column : column + SIDE][
                    :, :: -1 if flipped else 1
                ]
                for row in range(width + 1)
                for column in range(width + 1)
                for flipped in ((False, True) if flip else (False,))
            }
            matches = [which for which, crop in crops.items() if np.array_equal(crop, image)]
            assert len(matches) == 1
            found.add(matches[0])
    # 120 draws: every crop of a small padding occurs, and most of the fifty of padding 2.
    num_crops = (width + 1) ** 2 * (2 if flip else 1)
    assert len(found) == num_crops if num_crops <= 18 else len(found) > 0.75 * num_crops


def test_normalisation_matches_numpy(npz):
    mean, std = statistics.of_images(TRAIN_IMAGES)
    np.testing.assert_allclose(mean, (TRAIN_IMAGES / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (TRAIN_IMAGES / 255).std((0, 1, 2)), rtol=1e-12)
    dataset = load_tiny(npz, augment=False)
    batch = dataset.batch_at(2)
    want = (TRAIN_IMAGES[np.asarray(batch.labels)] / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(np.asarray(batch.images), want, rtol=1e-5, atol=1e-6)
    images, labels, _ = next(iter(dataset.eval_batches("test")))
    want = (TEST_IMAGES[np.asarray(labels)] / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(np.asarray(images), want, rtol=1e-5, atol=1e-6)


def test_evaluation_of_arrays_is_in_stored_order(npz):
    assert eval_labels(load_tiny(npz), "test") == list(range(NUM_TEST))
    assert eval_labels(load_tiny(npz), "train") == list(range(NUM_TRAIN))


def test_statistics_can_be_given_one_by_one():
    dgl = statistics.choose("cifar10", 3, (), statistics.DGL_CIFAR10_STD, None)
    assert dgl == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert statistics.choose("imagenette/320px-v2", 3, (), (), None) == statistics.IMAGENET
    constant = np.full((2, 3, 3, 1), 51, np.uint8)
    assert statistics.of_images(constant) == ((pytest.approx(0.2),), (1.0,))


def test_grey_images_without_a_channel_axis(tmp_path):
    arrays = tiny_arrays()
    np.savez(tmp_path / "a.npz", **arrays | {k: arrays[k][..., 0] for k in ("x_train", "x_test")})
    dataset = load_tiny(str(tmp_path / "a.npz"))
    assert dataset.image_shape == (SIDE, SIDE, 1)
    assert dataset.batch_at(0).images.shape == (4, SIDE, SIDE, 1)


def test_embedded():
    dataset = load(name="embedded", batch_size=100, eval_batch_size=600)
    assert (dataset.num_train, dataset.num_test, dataset.num_classes) == (10_000, 2000, 10)
    assert dataset.image_shape == (28, 28, 1)
    for split, num_a_class in (("train", 1000), ("test", 200)):
        counts = np.bincount(eval_labels(dataset, split))
        assert counts.tolist() == [num_a_class] * 10
    # The whole set's first test labels, of which none is beyond its class's first 200:
    # zcat t10k-labels-idx1-ubyte.gz | tail -c +9 | head -c 10 | od -An -tu1
    assert eval_labels(dataset, "test")[:10] == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    pixels = np.concatenate([np.asarray(x) for x, _, _ in dataset.eval_batches("train")])[:10_000]
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01
    root = pathlib.Path(streaming.__file__).parent / "embedded"
    assert (root / "fashion_mnist.npz").stat().st_size < 6e6
    assert "Copyright (c) 2017 Zalando SE" in (root / "LICENSE").read_text()


# ---- Prepared TFDS sets


def test_small_prepared_set_goes_in_memory_and_is_cached(prepared, cache_folder, monkeypatch):
    def run():
        dataset = load(name="tiny_icons", data_dir=str(prepared), crop_padding=1)
        images = {}
        for batch, labels, mask in dataset.eval_batches("train"):
            pixels = unnormalized(batch, *statistics.of_images(TRAIN_IMAGES))
            images |= {
                int(label): image
                for image, label, keep in zip(pixels, labels, mask, strict=True)
                if keep
            }
        np.testing.assert_array_equal(np.stack([images[i] for i in range(22)]), TRAIN_IMAGES)

    run()
    (cached,) = cache_folder.iterdir()
    assert cached.name.startswith("tiny_icons-1.0.0-")
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode", None)  # a second read of the set would fail
        run()
    whole = cached.read_bytes()
    middle = len(whole) // 2  # inside the train images
    for damaged in (whole[:100], b"", whole[:middle] + b"damaged!" + whole[middle + 8 :]):
        cached.write_bytes(damaged)
        run()
        assert cached.read_bytes() == whole
    assert list(cache_folder.iterdir()) == [cached]


def test_a_cache_that_cannot_be_written_is_no_error(prepared, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DGL_JAX_CACHE", str(tmp_path / "file" / "folder"))
    assert load(name="tiny_icons", data_dir=str(prepared), crop_padding=1).num_train == NUM_TRAIN
    monkeypatch.delenv("DGL_JAX_CACHE")
    assert cache.cache_dir() == pathlib.Path.home() / ".cache" / "dgl_jax"


def test_small_prepared_set_can_be_streamed(prepared):
    dataset = load(
        name="tiny_icons", data_dir=str(prepared), streaming=True, image_size=SIDE, augment=False
    )
    assert sorted(eval_labels(dataset, "test")) == list(range(NUM_TEST))
    assert dataset.batch_at(0).images.shape == (4, SIDE, SIDE, 3)
    dataset.close()


def test_unlabelled_test_split_is_passed_over(prepared):
    assert load_photos(prepared).num_test == 5


def test_newest_version_and_configurations(prepared, tmp_path):
    source = prepared / "tiny_icons" / "1.0.0"
    for version in ("1.9.0", "1.10.0", "1.11.0.incompleteABC"):
        shutil.copytree(source, tmp_path / "tiny_icons" / version)
    found = tfds_source.find_set("tiny_icons", str(tmp_path))
    assert found.directory == tmp_path / "tiny_icons" / "1.10.0"
    shutil.copytree(source, tmp_path / "icons" / "small" / "1.0.0")
    assert tfds_source.find_set("icons", str(tmp_path)).name == "icons/small"
    shutil.copytree(source, tmp_path / "icons" / "large" / "1.0.0")
    assert tfds_source.find_set("icons/large", str(tmp_path)).name == "icons/large"
    with pytest.raises(
        UserError, match="name=icons must say which .* large, small in .*; use name=icons/large"
    ):
        tfds_source.find_set("icons", str(tmp_path))


@pytest.mark.skipif(not (REAL_SETS / "cifar10").exists(), reason="CIFAR-10 is not here")
def test_real_cifar10():
    found = tfds_source.find_set("cifar10", str(REAL_SETS))
    assert tfds_source.fits_in_memory(found)
    assert (found.num_classes, found.image_shape) == (10, (32, 32, 3))
    assert found.num_examples == {"train": 50_000, "test": 10_000}
    source = tfds.builder_from_directory(found.directory).as_data_source(
        "test", decoders={"image": tfds.decode.SkipDecoding()}
    )
    by_id = sorted((example["id"], example["label"]) for example in source)
    assert [label for _, label in by_id[:10]] == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


@pytest.mark.skipif(not (REAL_SETS / "imagenette").exists(), reason="Imagenette is not here")
def test_real_imagenette():
    dataset = load(name="imagenette", data_dir=str(REAL_SETS), batch_size=8)
    assert (dataset.num_train, dataset.num_test) == (3000, 1000)
    assert dataset.image_shape == (224, 224, 3)
    images = np.asarray(dataset.batch_at(0).images)
    assert 0.5 < images.std() < 2
    dataset.close()


# ---- Streaming


def test_worker_processes_change_nothing(prepared):
    want = load_photos(prepared)
    got = load_photos(prepared, num_workers=2)
    for step in (5, 6, 7):
        assert_same(got.batch_at(step), want.batch_at(step))
    got.close()
    want.close()


def test_resume_inside_a_stream(prepared):
    uninterrupted = load_photos(prepared)
    batches = [uninterrupted.batch_at(step) for step in range(8)]
    resumed = load_photos(prepared)
    for step in range(5, 8):
        assert_same(resumed.batch_at(step), batches[step])
    resumed.close()
    assert_same(resumed.batch_at(2), batches[2])


def test_rows_of_processes_make_up_the_batch():
    source = [(photo(index), index) for index in range(9)]
    options = {"batch_size": 4, "seed": 1, "image_size": 16, "channels": 3, "augment": True}
    whole = streaming.train_batches(source, rows=(0, 4), flip=True, **options)
    parts = [
        streaming.train_batches(source, rows=rows, flip=True, **options)
        for rows in ((0, 3), (3, 4))
    ]
    for step in (0, 3, 11):
        for key in ("images", "labels"):
            rows = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(rows, whole[step][key])
    options = {"batch_size": 4, "image_size": 16, "channels": 3}
    parts = [streaming.eval_batches(source, rows=rows, **options) for rows in ((0, 2), (2, 4))]
    assert [len(part) for part in parts] == [3, 3]
    last = np.concatenate([part[2]["mask"] for part in parts])
    assert last.tolist() == [1, 0, 0, 0]


def test_local_rows():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    for spec in (PartitionSpec("data"), PartitionSpec()):
        assert shardings.local_rows(NamedSharding(mesh, spec), 8) == (0, 8)


def test_center_crop_matches_resize_then_crop():
    ramp = np.add.outer(np.arange(128), np.arange(192)) % 256
    image = np.repeat(ramp[..., None], 3, -1).astype(np.uint8) // 2
    got = decode.center_crop(encode(image, "PNG"), image_size=56, channels=3)
    resized = PIL.Image.fromarray(image).resize((96, 64), PIL.Image.Resampling.BILINEAR)
    want = np.asarray(resized)[4:60, 20:76]
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("shape", [(50, 70), (40, 400), (400, 40), (1, 1), (600, 600)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_random_resized_crops(shape, file_format):
    """The gradient along each axis says where a crop lies: inside the image, of legal area."""
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, height)[:, None]
    image[..., 1] = np.linspace(0, 255, width)[None, :]
    data = encode(image, file_format)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(20):
        crop = decode.random_resized_crop(data, rng, image_size=24, channels=3, flip=True)
        assert crop.shape == (24, 24, 3)
        assert crop.dtype == np.uint8
        rises = crop[:, -1, 1].astype(int).mean() - crop[:, 0, 1].astype(int).mean()
        flipped += rises < 0
    if width > 1:
        assert 3 <= flipped <= 17


def test_random_boxes_are_torchvisions():
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(2000):
        left, upper, width, height = decode.random_box(300, 200, rng)
        assert left >= 0 and upper >= 0 and left + width <= 300 and upper + height <= 200
        areas.append(width * height / 60_000)
        ratios.append(width / height)
    assert 0.075 < min(areas) and max(areas) <= 1
    assert 0.73 < min(ratios) and max(ratios) < 1.36
    assert decode.random_box(1000, 10, rng) == (493, 0, 13, 10)
    assert decode.random_box(10, 1000, rng) == (0, 493, 10, 13)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1"])
def test_any_image_mode_decodes(mode, channels):
    image = PIL.Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).convert(mode)
    for file_format in ("JPEG", "PNG", "TIFF"):
        if (file_format, mode) in {("JPEG", "RGBA"), ("JPEG", "P"), ("PNG", "CMYK")}:
            continue
        file = io.BytesIO()
        image.save(file, file_format)
        whole = decode.decode(file.getvalue(), channels=channels)
        assert whole.shape == (20, 30, channels)
        crop = decode.center_crop(file.getvalue(), image_size=8, channels=channels)
        assert crop.shape == (8, 8, channels)
        assert abs(int(crop.mean()) - 200) <= (60 if mode == "1" else 3)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = PIL.Image.fromarray(coarse).resize((512, 512), PIL.Image.Resampling.BICUBIC)
    jpeg, png = (encode(np.asarray(image), kind) for kind in ("JPEG", "PNG"))
    small = decode.center_crop(jpeg, image_size=64, channels=3).astype(int)
    exact = decode.center_crop(png, image_size=64, channels=3).astype(int)
    assert np.abs(small - exact).mean() < 3


def test_sources_pickle_without_open_files(prepared):
    source = tfds_source.EncodedImages(str(prepared / "tiny_photos" / "1.0.0"), "train")
    assert len(source) == 9
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data)[3] == source[3]
    assert source.__getitems__([3, 1]) == [source[3], source[1]]


# ---- Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1; try 128"),
        ({"eval_batch_size": -2}, "eval_batch_size=-2 must be at least 1; try 128"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2\*\*32\); try 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be in \[0, 1\); try 0.1"),
        ({"validation_fraction": 0.001}, "validation_fraction=0.001 must hold out at least one"),
        ({"batch_size": 23}, "batch_size=23 must not exceed the 22 training examples; try 22"),
        (
            {"batch_size": 20, "validation_fraction": 0.5},
            "batch_size=20 must not exceed the 11 training examples; try 11",
        ),
        ({"crop_padding": -1}, "crop_padding=-1 must not be negative; try 4"),
        ({"crop_padding": 6}, "crop_padding=6 must be less than the image's side 6; try 0"),
        ({"image_size": -3}, "image_size=-3 must not be negative; try 224"),
        ({"image_size": 32}, "image_size=32 must be 0 or 6, the stored size"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative; try 0"),
        ({"streaming": True}, "streaming=True needs a TFDS set, not name=arrays"),
        ({"mean": (0.5,)}, r"mean=\(0.5,\) must have 3 numbers, one a channel of arrays"),
        ({"std": (1.0, 0.0, 1.0)}, r"std=\(1.0, 0.0, 1.0\) must be positive"),
    ],
)
def test_errors_of_options(npz, kwargs, message):
    with pytest.raises(UserError, match=message):
        load_tiny(npz, **kwargs)


def test_a_description_is_what_loading_gives(npz, prepared):
    for loaded, options in (
        (load_tiny(npz), {"name": "arrays", "data_dir": npz}),
        (
            load_photos(prepared),
            {"name": "tiny_photos", "data_dir": str(prepared), "image_size": 16},
        ),
        (
            load(name="tiny_icons", data_dir=str(prepared)),
            {"name": "tiny_icons", "data_dir": str(prepared)},
        ),
    ):
        description = describe_dataset(**options)
        num_examples = loaded.num_train + loaded.num_validation
        assert description == Description(loaded.image_shape, loaded.num_classes, num_examples)
    for options, message in (
        ({"name": "arrays", "data_dir": npz, "image_size": 32}, "must be 0 or 6, the stored size"),
        ({"name": "arrays", "image_size": -3}, "image_size=-3 must not be negative; try 224"),
        ({"name": "arrays", "data_dir": "nowhere"}, "data_dir=nowhere must be an .npz file"),
        ({"name": "cifar10", "data_dir": str(prepared)}, "name=cifar10 must be prepared"),
    ):
        with pytest.raises(UserError, match=message):
            describe_dataset(**options)


def test_errors_of_calls(npz):
    dataset = load_tiny(npz)
    with pytest.raises(UserError, match="split=valid must be one of test, validation, train"):
        dataset.eval_batches("valid")
    with pytest.raises(UserError, match="split=validation needs held-out examples; set"):
        dataset.eval_batches("validation")
    with pytest.raises(UserError, match=r"step=-1 must be in \[0, 2\*\*31\)"):
        dataset.batch_at(-1)


def test_error_of_indivisible_batch(npz):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with pytest.raises(
        UserError, match="^batch_size=6 must be divisible by the 4 devices.* try 4$"
    ):
        load_tiny(npz, batch_size=6, sharding=sharding)
    with pytest.raises(UserError, match="eval_batch_size=3 must be divisible by the 4 devices"):
        load_tiny(npz, sharding=sharding)


FLOAT = TRAIN_IMAGES.astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "must hold x_train, y_train, x_test, y_test; add the missing y_test"),
        ({"x_train": FLOAT}, "x_train.dtype=float32 must be uint8"),
        ({"x_train": TRAIN_IMAGES[0, 0]}, r"x_train.shape=\(6, 3\) must be \[N, H, W\]"),
        ({"x_test": TEST_IMAGES[:0]}, r"x_test.shape=\(0, 6, 6, 3\) must be"),
        ({"x_test": TEST_IMAGES[:, 1:]}, r"x_test.shape=\(7, 5, 6, 3\) must have images of"),
        ({"y_train": TRAIN_LABELS / 2}, "y_train.dtype=float64 must be an integer type"),
        ({"y_train": TRAIN_LABELS[1:]}, r"y_train.shape=\(21,\) must be \(22,\), one label"),
        ({"y_train": TRAIN_LABELS - 1}, "label=-1 in y_train must not be negative"),
        ({"y_test": TEST_LABELS + 40}, "label=46 must be less than the 22 classes of y_train"),
    ],
)
def test_errors_of_arrays(tmp_path, change, message):
    arrays = {k: v for k, v in (tiny_arrays() | change).items() if v is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_tiny(str(tmp_path / "a.npz"))
    assert "\n" not in str(caught.value)


def test_errors_of_the_arrays_file(tmp_path):
    with pytest.raises(UserError, match="data_dir='' must be the path of an .npz file"):
        load_tiny("")
    with pytest.raises(UserError, match="data_dir=/no/such.npz must be an .npz file"):
        load_tiny("/no/such.npz")
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="must be a readable .npz file"):
        load_tiny(str(tmp_path / "a.npz"))
    np.savez_compressed(tmp_path / "a.npz", x_train=TRAIN_IMAGES)
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[30 + sum(damaged[26:30:2])] = 0xFF  # The first byte after the file's header.
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(UserError, match="must be a readable .npz file .*invalid block type"):
        load_tiny(str(tmp_path / "a.npz"))
    np.save(tmp_path / "b.npy", TRAIN_IMAGES)
    with pytest.raises(UserError, match="must be a readable .npz file .one array"):
        load_tiny(str(tmp_path / "b.npy"))


@pytest.mark.parametrize("is_packed", [False, True])
def test_idx_files(tmp_path, is_packed):
    """As MNIST is distributed: big-endian sizes before the bytes."""
    rng = np.random.default_rng(0)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    arrays = [
        rng.integers(0, 256, (30, 5, 4)), np.arange(30) % 3,
        rng.integers(0, 256, (6, 5, 4)), np.arange(6) % 3,
    ]  # fmt: skip
    for name, array in zip(names, arrays):
        header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        content = header + array.astype(np.uint8).tobytes()
        path = tmp_path / f"{name}-ubyte{'.gz' if is_packed else ''}"
        path.write_bytes(gzip.compress(content) if is_packed else content)
    found = load_arrays(str(tmp_path))
    assert found.num_classes == 3 and found.image_shape == (5, 4, 1)
    for mine, array in zip(
        (
            found.train_images[..., 0],
            found.train_labels,
            found.test_images[..., 0],
            found.test_labels,
        ),
        arrays,
    ):
        np.testing.assert_array_equal(mine, array)
    whole = path.read_bytes()
    for broken, message in (
        (whole[:-3], "fetch it again"),
        (b"", "fetch it again"),
        (None, f"has neither {names[3]}-ubyte nor {names[3]}-ubyte.gz"),
    ):
        path.unlink() if broken is None else path.write_bytes(broken)
        with pytest.raises(UserError, match=message):
            load_arrays(str(tmp_path))


def test_errors_of_finding_a_set(tmp_path):
    def find(name, data_dir=tmp_path):
        return load(name=name, data_dir=str(data_dir))

    with pytest.raises(UserError, match="name=cifra10 must be one of arrays, .* mean cifar10?"):
        find("cifra10", "")
    with pytest.raises(UserError, match="name=cifra10 must be one of .*cifra10 does not exist"):
        find("cifra10")
    with pytest.raises(UserError, match="data_dir='' must be the folder of prepared TFDS sets"):
        find("cifar10", "")
    with pytest.raises(UserError, match="data_dir=/no/where must be a folder"):
        find("cifar10", "/no/where")
    message = "name=svhn must be prepared, but there is no .*/svhn_cropped; run .*--name=svhn "
    with pytest.raises(UserError, match=message):
        find("svhn")
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match="cifar10 holds no prepared version; run .*prepare"):
        find("cifar10")
    (tmp_path / "cifar10" / "3.0.2.incompleteXYZ").mkdir()
    with pytest.raises(UserError, match="cifar10 holds only an unfinished preparation"):
        find("cifar10")


def test_errors_of_a_half_prepared_set(prepared, tmp_path):
    directory = tmp_path / "tiny_icons" / "1.0.0"

    def check(message, break_fn):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(prepared / "tiny_icons" / "1.0.0", directory)
        break_fn()
        with pytest.raises(UserError, match=message) as caught:
            load(name="tiny_icons", data_dir=str(tmp_path))
        assert "\n" not in str(caught.value)

    info = directory / "dataset_info.json"
    check("wholly prepared, but .* has no dataset_info.json", info.unlink)
    check("has no features.json", lambda: (directory / "features.json").unlink())
    check("dataset_info.json cannot be parsed", lambda: info.write_text('{"name": '))
    shard = "tiny_icons-train.array_record-00000-of-00001"
    check(f"{shard} is missing .1 missing in all.", lambda: (directory / shard).unlink())

    def truncate():
        (directory / shard).write_bytes((directory / shard).read_bytes()[:200])

    check(f"{shard} cannot be read", truncate)

    def edit(**changes):
        info.write_text(json.dumps(json.loads(info.read_text()) | changes))

    message = "file_format=tfrecord of .* must be array_record"
    check(message, lambda: edit(fileFormat="tfrecord"))
    splits = json.loads((prepared / "tiny_icons/1.0.0/dataset_info.json").read_text())["splits"]
    check("must have a split train, but it has test", lambda: edit(splits=splits[1:]))
    check("must have a labelled split test or validation", lambda: edit(splits=splits[:1]))


def test_errors_of_features(prepared):
    with pytest.raises(UserError, match="must have the features image .* but it has text"):
        load(name="tiny_texts", data_dir=str(prepared))
    with pytest.raises(UserError, match="streaming=False needs images of one shape"):
        load_photos(prepared, streaming=False)


# ---- Scripts


def run_module(module: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", module, *args]
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name='' must be the name of a TFDS set; try --name=cifar10"),
        (("--nam=cifar10",), "Unknown command line flag 'nam'"),
        (("--name=cifar10", "--data_dir=d"), "must be prepared with TensorFlow"),
    ],
)
def test_prepare_says_what_is_wrong(args, message):
    if "TensorFlow" in message and importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    result = run_module("dgl_jax.data.prepare", *args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_make_embedded_names_the_missing_file(tmp_path):
    result = run_module("dgl_jax.data.embedded.make", f"--idx_dir={tmp_path}")
    assert result.returncode == 2, result.stderr
    assert "must hold train-images-idx3-ubyte.gz; run `apt-get install" in result.stderr
