"""SEDONA on Tiny-ImageNet with cuts and heads found on CIFAR-10; and backprop and DGL.

    python experiments/train.py --config=experiments/configs/sedona_tiny_imagenet.py:sedona,vgg19 \
        --workdir=runs/sedona_tiny_vgg19 --config.data.data_dir=TFDS_DIR

Words: sedona, dgl, backprop (the method); vgg19, resnet50, resnet101, resnet152; K=4, K=2 (blocks;
not of backprop).

TFDS has no Tiny-ImageNet of its own: TFDS_DIR holds a prepared set ``tiny_imagenet`` whose
features say 64x64 (without a fixed shape it would be streamed, with other crops), or
--config.data.name=arrays and --config.data.data_dir=FILE.npz name one.

Expected (SEDONA's Table 2, K = 4, as TRGL quotes it; test accuracy, %):

                backprop    dgl      sedona
    vgg19       58.74       51.40    56.56
    resnet50    58.10       53.96    54.40
    resnet101   62.01       53.80    59.12
    resnet152   62.32       57.64    64.10

Known differences: those of sedona_cifar10.py; bfloat16 instead of float16 with a loss scale; no
rotations (there up to 20 degrees); nothing is held out; no row
of PredSim, whose published recipe (Adam, 40 classes a batch at first) is not built.
"""

import pathlib

from dgl_jax.config import default_config
from dgl_jax.variants import choose_words

WORDS = (
    ("sedona", "dgl", "backprop"),
    ("vgg19", "resnet50", "resnet101", "resnet152"),
    ("K=4", "K=2"),
)
_PUBLISHED = pathlib.Path(__file__).resolve().parents[1] / "published"


def get_config(variant: str = ""):
    method, network, blocks = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = "backprop" if method == "backprop" else "dgl"
    config.network.name = network
    config.network.form = "tiny_imagenet"
    config.network.dtype = "bfloat16"
    if network == "vgg19":
        config.network.dropout = 0.5
    config.network.kernel_init = "he_normal"
    config.partition.strategy = "uniform"
    config.partition.num_blocks = 4 if method == "backprop" else int(blocks.removeprefix("K="))
    config.auxiliary.name = "mlp_sr"
    if method == "sedona":
        config.partition.from_search = str(_PUBLISHED / f"sedona_{network}.json")
        config.auxiliary.features = 2048
        config.auxiliary.reduction = 4
    config.loss.label_smoothing = 0.1
    config.data.name = "tiny_imagenet"
    config.data.mean = (0.4802, 0.4481, 0.3975)  # The official code's.
    config.data.std = (0.2302, 0.2265, 0.2262)
    config.data.crop_padding = 4
    config.train.batch_size = 256
    config.train.num_steps = 30_000
    config.train.num_epochs = 0.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-3
    return config
