"""`benchmark.py data`: how fast input arrives, and how fast a training step uses it.

JPEGs of ImageNet's size, streamed by the library's own data set with several numbers of worker
processes; what one of them costs to decode in one thread; and a set in memory, beside a training
step. The JPEGs are made up, unless --data_name and --data_dir give a prepared set.
"""

import io
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from absl import flags

from benchmarks import in_memory, made_up, setting
from dgl_jax.data import decode, load_dataset, tfds_source
from dgl_jax.tables import markdown, spread

_DATA_NAME = flags.DEFINE_string("data_name", "", "data: a prepared set of JPEGs.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "data: the folder of prepared sets.")
_NUM_WORKERS = flags.DEFINE_list("num_workers", ["0", "1", "2"], "data: processes that decode.")
_NUM_PHOTOS = flags.DEFINE_integer("num_photos", 512, "data: JPEGs that are made up.", 1)
_CROP_SIZE = flags.DEFINE_integer("crop_size", 224, "data: pixels a side of JPEGs' crops.", 1)

_DECODED = 128  # JPEGs of a turn, the same ones in each.


def data(folder: pathlib.Path) -> list[str]:
    """Measures all three; returns what failed: nothing, or it raises."""
    num_workers = setting.whole_numbers(_NUM_WORKERS, 0)
    content = setting.machine() | {"device": jax.devices()[0].device_kind}
    with tempfile.TemporaryDirectory() as made_up_dir:
        name, data_dir = _DATA_NAME.value, _DATA_DIR.value
        if not name:
            data_dir = made_up_dir
            name = made_up.prepare(data_dir, max(_NUM_PHOTOS.value, setting.BATCH_SIZE.value))
        tfds_set = tfds_source.find_set(name, data_dir)
        source = tfds_source.EncodedImages(str(tfds_set.directory), "train")
        jpegs = [source[index][0] for index in range(min(_DECODED, len(source)))]
        content |= {"jpegs": name, "mean_bytes": statistics.mean(map(len, jpegs))}
        decoded = {name: jpegs}
        if not _DATA_NAME.value:
            larger = [made_up.photo(number, 2) for number in range(len(jpegs))]
            decoded = {"about 500x400": jpegs, "about 1000x800": larger}

        content["in_memory"] = in_memory.images_per_second()
        content["decoding"] = {key: _time_decoding(jpegs) for key, jpegs in decoded.items()}
        content["streaming"] = _time_streaming(name, data_dir, num_workers)
    _write(folder, content)
    return []


def _time_decoding(jpegs: Sequence[bytes]) -> dict[str, list[float]]:
    """Seconds an image in one thread, of each way in turn; the crops are the same."""
    size = _CROP_SIZE.value

    def whole(data, rng):
        return PIL.Image.open(io.BytesIO(data)).convert("RGB")

    def in_two_passes(data, rng):
        image = whole(data, rng)
        left, upper, width, height = decode.random_box(*image.size, rng)
        crop = image.crop((left, upper, left + width, upper + height))
        pixels = np.asarray(crop.resize((size, size), PIL.Image.Resampling.BILINEAR))
        return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)

    def in_one_pass(data, rng):
        return decode.random_resized_crop(data, rng, image_size=size, channels=3, flip=True)

    def turn(way):
        def run(number):
            for index in range(number):
                way(jpegs[index], np.random.default_rng(index))

        return run

    ways = {"whole": whole, "two_passes": in_two_passes, "one_pass": in_one_pass}
    turns = {name: turn(way) for name, way in ways.items()}
    return setting.interleaved_seconds(turns, setting.ROUNDS.value, len(jpegs))


def _time_streaming(name: str, data_dir: str, num_workers: Sequence[int]) -> list[dict[str, Any]]:
    """Images a second by number of workers; in each turn they start anew, outside the time."""
    steps, batch_size, num_cpus = setting.STEPS.value, setting.BATCH_SIZE.value, os.cpu_count()
    datasets = [
        load_dataset(
            name=name, data_dir=data_dir, batch_size=batch_size, eval_batch_size=1, seed=0,
            image_size=_CROP_SIZE.value, num_workers=number, streaming=True,
        )
        for number in num_workers
    ]  # fmt: skip
    # Without workers the data set decodes in a thread a core, at most 16.
    rows = [
        {"num_workers": number, "num_cores": min(number or 16, num_cpus), "images_per_second": []}
        for number in num_workers
    ]
    for _ in range(setting.ROUNDS.value):
        for dataset, row in zip(datasets, rows, strict=True):
            # Batches come in bursts, one of each reader, and what they had read ahead when the
            # clock started they have again when it stops.
            readers = max(row["num_workers"], row["num_cores"])
            first, timed = 1 + 2 * readers, -(-steps // readers) * readers
            for step in range(first + timed):
                if step == first:
                    start = time.perf_counter()
                jax.block_until_ready(dataset.batch_at(step))
            row["images_per_second"].append(timed * batch_size / (time.perf_counter() - start))
            dataset.close()
    return rows


def _write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    batch_size, size = setting.BATCH_SIZE.value, _CROP_SIZE.value
    streaming = []
    for row in content["streaming"]:
        rates = row["images_per_second"]
        a_core = statistics.median(rates) / row["num_cores"]
        workers = str(row["num_workers"] or "0, in threads")
        streaming.append([workers, spread(rates, ".0f"), f"{a_core:.0f}"])
    ways = {
        "whole": "decoded whole, and no more",
        "two_passes": "decoded whole, cropped, resized",
        "one_pass": "`decode.random_resized_crop`",
    }
    decoding = []
    for way, words in ways.items():
        cells = [words]
        for seconds in content["decoding"].values():
            millis = [1e3 * value for value in seconds[way]]
            cells.append(spread(millis, ".2f"))
        decoding.append(cells)
    cells = ["two passes over one"]
    for seconds in content["decoding"].values():
        pairs = zip(seconds["two_passes"], seconds["one_pass"], strict=True)
        cells.append(spread([two / one for two, one in pairs], ".2f"))
    decoding.append(cells)
    sizes = [f"{key}, ms" for key in content["decoding"]]

    notes = (
        f"{setting.on_what(content)}; device {content['device']}. Medians of "
        f"{setting.ROUNDS.value} rounds in which all rows of a table have turns, and their range."
    )
    about_streaming = (
        f"Random resized crops of {size} pixels from JPEGs of {content['mean_bytes'] / 1e3:.0f} kB "
        f"on average ({content['jpegs']}), in batches of {batch_size}, normalised on the device; "
        f"{setting.STEPS.value} batches a turn or a few more, as many of each worker. A core: "
        "of those that decode, one a worker or thread while there are enough."
    )
    about_decoding = (
        "Milliseconds an image. `decode.random_resized_crop` decodes at 1/2, 1/4 or 1/8 of the "
        "size where the crop stays large enough, and crops while it resizes."
    )
    title = f"Input: batches of {batch_size}, streamed JPEGs, decoding, a set in memory"
    parts = [markdown(["workers", "images/s", "a core"], streaming), about_streaming]
    parts += [markdown(["one thread", *sizes], decoding), about_decoding]
    parts += [*in_memory.table_and_notes(content["in_memory"]), notes]
    setting.write(folder, "data", content, title, parts)
    print("\n\n".join(parts))
