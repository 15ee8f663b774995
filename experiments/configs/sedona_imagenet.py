"""SEDONA on ImageNet with cuts and heads found on CIFAR-10; and its baselines, backprop and DGL.

    python experiments/train.py --config=experiments/configs/sedona_imagenet.py:sedona,resnet152 \
        --workdir=runs/sedona_imagenet --config.data.data_dir=TFDS_DIR

Words: sedona, dgl, backprop (the method); resnet101, resnet152; K=2, K=4 (blocks; not of
backprop).

Expected (SEDONA's slides; top-1 / top-5 error, %; training speed relative to backprop):

                 resnet101                resnet152
    backprop     21.34 / 5.86             21.22 / 5.79
    dgl K=2      21.53 / 5.84    1.42     21.45 / 5.86    1.51
    dgl K=4      23.13 / 6.82    1.92     22.89 / 6.80    2.23
    sedona K=2   20.72 / 5.39    1.67     20.69 / 5.58    1.61
    sedona K=4   21.32 / 5.83    2.01     21.09 / 5.13    2.02

With the last two heads together resnet152 at K = 4 has 20.2 (Papers with Code).
The searched networks have a quarter of these channels; what is taken over is where they are cut
and how deep each head is. The heads are wider here: 2048 channels before their pool. One's own
search takes the place of the published one with config.partition.from_search=FILE.

Known differences: those of sedona_cifar10.py; bfloat16 instead of float16 with a loss scale;
SEDONA's code picks its best state by the accuracy on the very images that it tests on, here the
last state is tested.
"""

import pathlib

from dgl_jax.config import default_config
from dgl_jax.variants import choose_words

WORDS = (("sedona", "dgl", "backprop"), ("resnet101", "resnet152"), ("K=2", "K=4"))
_PUBLISHED = pathlib.Path(__file__).resolve().parents[1] / "published"


def get_config(variant: str = ""):
    method, network, blocks = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = "backprop" if method == "backprop" else "dgl"
    config.network.name = network
    config.network.form = "imagenet"
    config.network.dtype = "bfloat16"
    config.network.kernel_init = "he_normal"
    config.partition.strategy = "uniform"
    config.partition.num_blocks = 2 if method == "backprop" else int(blocks.removeprefix("K="))
    config.auxiliary.name = "mlp_sr"
    if method == "sedona":
        config.partition.from_search = str(_PUBLISHED / f"sedona_{network}.json")
        config.auxiliary.features = 2048
        config.auxiliary.reduction = 4
    config.loss.label_smoothing = 0.1
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.train.batch_size = 256
    config.train.num_steps = 600_000
    config.train.num_epochs = 0.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-3
    return config
