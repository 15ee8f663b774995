"""DGL, Figures 3 and 4: learning curves of a four-layer network on CIFAR-10, one block a layer.

    python experiments/train.py --config=experiments/configs/figure34.py --workdir=DIR \
        --config.data.data_dir=TFDS_DIR

Words: dgl, sequential, backprop (the method).

Expected (the official logs, one seed, 50 epochs, 50 a block for sequential; test accuracy by
block, %): dgl 78.35 / 85.25 / 87.90 / 89.86, block 3 after 15 epochs 76.2, on average over them
68.41; sequential 78.55 / 85.77 / 88.28 / 89.13, block 3 after 15 of its epochs 85.5, on average
84.29. For backprop nothing was published.

Known differences: the text says six layers; code and logs have four of width 64, and that is
what is here. An epoch leaves out its last, partial batch. Biases start at zero.

BatchNorm's weights start from U(0, 1) (network.norm_init), as the official code's did with the
PyTorch of its time; with ones the upper blocks learn more slowly in the first epochs.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

WORDS = (("dgl", "sequential", "backprop"),)


def get_config(variant: str = ""):
    (method,) = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = method
    config.network.name = "cnn4"
    config.network.norm_init = "uniform"
    config.partition.strategy = "per_layer"
    config.auxiliary.name = "mlp_sr"
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.std = DGL_CIFAR10_STD
    config.train.batch_size = 128
    config.train.num_epochs = 50.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "step"
    config.optimizer.drop_epochs = (15.0, 30.0, 45.0)
    config.optimizer.drop_factor = 0.2
    # The quantities of Proposition 3.1.
    config.eval.log_drift = True
    config.train.log_gradient_norm = True
    if method == "sequential":
        config.eval.every_epochs = 0.25  # One block learns at a time: once in each of its epochs.
    return config
