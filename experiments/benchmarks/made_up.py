"""JPEGs as large as photographs, prepared as a set that the library streams."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

_NUM_CLASSES = 10


def photo(number: int, size: int = 1) -> bytes:
    """A JPEG of about 500x400 pixels, times size: noise at all scales, some 4 bits a pixel."""
    rng = np.random.default_rng(number)
    width, height = (size * int(side) for side in rng.integers((450, 350), (551, 451)))
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        grid = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
        layer = PIL.Image.fromarray(grid).resize((width, height), PIL.Image.Resampling.BICUBIC)
        pixels += scale**0.2 * (np.asarray(layer, np.float32) - 127.5)
    pixels = np.clip(127.5 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(data_dir: str, num_photos: int) -> str:
    """Writes a TFDS set of so many training photographs; returns its name."""
    builder = MadeUp(data_dir=data_dir, file_format="array_record")
    builder.num_photos = num_photos
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return builder.name


class MadeUp(tfds.core.GeneratorBasedBuilder):
    """The photographs, written without TensorFlow: they come encoded."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=_NUM_CLASSES)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        photos = self._generate_examples
        return {"train": photos(range(self.num_photos)), "test": photos(range(1))}

    def _generate_examples(self, numbers):
        for number in numbers:
            image = io.BytesIO(photo(number))
            yield number, {"image": image, "label": number % _NUM_CLASSES}
