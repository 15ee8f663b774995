"""SEDONA on CIFAR-10, and its baselines: backprop, PredSim and DGL.

    python experiments/train.py --config=experiments/configs/sedona_cifar10.py:sedona,resnet50 \
        --workdir=runs/sedona_resnet50 --config.data.data_dir=TFDS_DIR

Words: dgl, predsim, backprop, sedona (the method); vgg19, resnet50, resnet101, resnet152; K=4,
K=2, K=8, K=16 (blocks; not of backprop).

Expected (SEDONA's slides, K = 4; test error, %):

                backprop    predsim    dgl      sedona
    vgg19       12.31       13.87      12.19    11.58
    resnet50     7.99        8.93       8.27     7.53
    resnet101    7.14        7.93       8.30     6.59
    resnet152    6.35        7.41       7.39     6.13

Widths of 16-32-64-128, a quarter of the usual. The cuts of the baselines are uniform; SEDONA's
cuts and heads come from the decision variables that its authors released, in
experiments/published. From K = 8 on those of resnet101 differ by less than 1e-5 where it counts,
so that chance chose among them; a run says so. One's own search takes their place:

    --config.partition.from_search=FILE

also with any other method, network or file of configurations; config.partition.search_heads=False
takes the cuts alone, config.partition.max_imbalance=1.5 bounds the slowest block.

Known differences: learning rate 0.1 to 1e-3 and weight decay 1e-4 are defaults of SEDONA's code,
whose commands leave all three blank for each method. It picks its best state by validation every
100 steps and tests that; here the last is tested, once an epoch, and the best state is kept
beside it. Label smoothing spreads over all classes, there over the wrong ones only. VGG's
convolutions have biases here.
"""

import pathlib

from dgl_jax.config import default_config
from dgl_jax.variants import choose_words

WORDS = (
    ("dgl", "predsim", "backprop", "sedona"),
    ("vgg19", "resnet50", "resnet101", "resnet152"),
    ("K=4", "K=2", "K=8", "K=16"),
)
_PUBLISHED = pathlib.Path(__file__).resolve().parents[1] / "published"


def get_config(variant: str = ""):
    method, network, blocks = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = "backprop" if method == "backprop" else "dgl"
    config.network.name = network
    config.network.width_factor = 0.25
    if network == "vgg19":
        config.network.dropout = 0.5
    config.network.kernel_init = "he_normal"
    config.partition.strategy = "uniform"
    config.partition.num_blocks = 4 if method == "backprop" else int(blocks.removeprefix("K="))
    if method == "predsim":
        config.auxiliary.name = "pred"
        config.auxiliary.max_features = 512
        config.loss.name = "predsim"
        config.loss.similarity_weight = 0.99
    else:
        config.auxiliary.name = "mlp_sr"
        config.loss.label_smoothing = 0.1
    if method == "sedona":
        config.partition.from_search = str(_PUBLISHED / f"sedona_{network}.json")
        config.auxiliary.features = 512
        config.auxiliary.reduction = 4
    config.data.name = "cifar10"
    config.data.crop_padding = 2
    config.data.validation_fraction = 0.1
    config.train.batch_size = 128
    config.train.num_steps = 64_000
    config.train.num_epochs = 0.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-3
    return config
