"""DGL, Figure 2: synthetic gradients (DNI, cDNI) against DGL and backprop, on CIFAR-10.

    python experiments/train.py --config=experiments/configs/figure2.py:cdni \
        --workdir=runs/figure2_cdni --config.data.data_dir=TFDS_DIR

Words: dgl, backprop, cdni, dni (the method).

Expected (the official logs, one seed, mean of the last ten of 1,500 epochs; test accuracy, %,
and training loss of the last block; the accuracy after 50 and 200 epochs):

    backprop 84.6 (loss 0.021), 74.0, 80.6      cdni 81.1 (0.265), 69.2, 76.3
    dgl      85.1 (loss 0.053), 74.4, 79.7      dni  62.0 (1.063), 41.7, 52.8

Synthetic gradients are made after all three convolutions (K = 4, the last block is the linear
layer); DGL has K = 3, the third convolution with the linear layer. The head of DGL has the
synthesizer's body.

Known differences: one optimizer a block instead of one for all, which for Adam is the same;
an epoch leaves out its last, partial batch. Biases start at zero.

BatchNorm's weights start from U(0, 1) (network.norm_init), as the official code's did with the
PyTorch of its time; with ones the upper blocks learn more slowly in the first epochs.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

WORDS = (("dgl", "backprop", "cdni", "dni"),)


def get_config(variant: str = ""):
    (method,) = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = method
    config.network.name = "dni_cnn"
    config.network.norm_init = "uniform"
    config.auxiliary.name = "synthesizer"
    if method == "dgl":
        config.partition.strategy = "explicit"
        config.partition.cuts = (0, 1)
    else:
        config.partition.strategy = "per_layer"
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.std = DGL_CIFAR10_STD
    config.train.batch_size = 256
    config.train.num_epochs = 1500.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-5
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "constant"
    config.eval.every_epochs = 1.0
    return config
