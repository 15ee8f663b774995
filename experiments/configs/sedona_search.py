"""SEDONA's search of cuts and heads on CIFAR-10.

    python experiments/search.py --config=experiments/configs/sedona_search.py:resnet50 \
        --workdir=runs/search_resnet50 --config.data.data_dir=TFDS_DIR

Words: resnet50, vgg19, resnet101, resnet152, resnet18 (the network); unrolled, official (how the
outer gradient is taken, and which snapshots are kept: the released code's way); heads,
cuts_only (no choice of heads: MLP-SR-aux at every cut); full, short.

The result, WORKDIR/search.json, is for training:

    python experiments/train.py --config=experiments/configs/sedona_cifar10.py:sedona,resnet50,K=4 \
        --workdir=runs/sedona_resnet50 --config.data.data_dir=TFDS_DIR \
        --config.partition.from_search=runs/search_resnet50/search.json

Published: the decision variables that the authors released (experiments/published), and errors
with them, on top of sedona_cifar10.py. Of their search they publish no figures.

full: 40,000 steps of pretraining, 2,000 outer steps of T = 5 inner steps, 40 % of the training
images held out for the decision variables; SGD with momentum 0.9, learning rate 0.1 to 1e-3 by a
cosine, L2 1e-4, label smoothing 0.1. Known differences from the released code: see the
docstrings in dgl_jax/sedona.

short: the embedded images (CIFAR-10 with vgg19), an eighth of the usual width, smaller heads and
each module's own initial weights: minutes on two CPU cores with resnet18, most of them compiling.
"""

from dgl_jax.config import SearchConfig, default_config
from dgl_jax.variants import choose_words

WORDS = (
    ("resnet50", "vgg19", "resnet101", "resnet152", "resnet18"),
    ("unrolled", "official"),
    ("heads", "cuts_only"),
    ("full", "short"),
)


def get_config(variant: str = ""):
    network, estimator, pool, budget = choose_words(variant, WORDS)
    config = default_config(SearchConfig)
    config.network.name = network
    config.network.width_factor = 0.25
    if network == "vgg19":
        config.network.dropout = 0.5
    config.search.hypergradient = estimator
    config.search.snapshots = "official" if estimator == "official" else "spread"
    if pool == "cuts_only":
        config.search.candidates = ("mlp_sr",)
    else:
        config.auxiliary.features = 512
        config.auxiliary.reduction = 1 if network == "resnet18" else 4
    if budget == "full":
        config.network.kernel_init = "he_normal"
    config.loss.label_smoothing = 0.1
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-3
    config.data.name = "cifar10"
    config.data.crop_padding = 2
    config.data.validation_fraction = 0.4
    if budget == "short":
        config.network.width_factor = 0.125
        if pool == "heads":
            config.auxiliary.features = 64
        if network != "vgg19":  # Its five pools need images of 32x32.
            config.data.name = "embedded"
            config.data.crop_padding = 0
        config.search.batch_size = 64
        config.search.validation_batch_size = 256
        config.search.num_pretraining_steps = 300
        config.search.num_outer_steps = 150
        config.search.learning_rate = 0.03
        config.search.num_inner_steps = 2
        config.search.num_snapshots = 10
        config.search.snapshot_interval = 5
        config.search.num_blocks = (2, 4)
        config.search.backprop_steps = 600
        config.search.log_every_steps = 10
    return config
