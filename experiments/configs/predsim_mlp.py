"""PredSim: local losses of a fully connected network on MNIST, and on Fashion-MNIST.

    python experiments/train.py --config=experiments/configs/predsim_mlp.py:predsim \
        --workdir=DIR --config.data.data_dir=MNIST

MNIST is a folder of the four idx files as they are distributed, packed or not, or an .npz with
x_train, y_train, x_test and y_test.

Words: predsim, pred, sim, backprop (the local loss, or none); mnist, fashion_mnist.

Expected (their README; test error of the last block after the last epoch, %):

                   backprop  pred   sim    predsim
    mnist          0.75      0.68   0.80   0.62     100 epochs
    fashion_mnist  8.37      8.60   9.70   8.54     200 epochs

Every hidden layer is a block, and so is the output layer: K = 4. About 20 minutes for MNIST on two
CPU cores.

Known differences: an epoch leaves out its last, partial batch. Biases start at zero. With predsim
their output layer's loss is weighted with 0.01, which Adam undoes.
"""

from dgl_jax.config import default_config
from dgl_jax.variants import choose_words

WORDS = (("predsim", "pred", "sim", "backprop"), ("mnist", "fashion_mnist"))


def get_config(variant: str = ""):
    loss, data = choose_words(variant, WORDS)
    config = default_config()
    config.data.name = "arrays"
    config.data.crop_padding = 2
    if data == "mnist":
        config.data.flip = False
        config.data.mean, config.data.std = (0.1307,), (0.3081,)
        config.network.dropout = 0.1
        config.train.num_epochs = 100.0
        config.optimizer.drop_epochs = (50.0, 75.0, 89.0, 94.0)
    else:
        config.data.mean, config.data.std = (0.286,), (0.353,)
        config.network.dropout = 0.025
        config.train.num_epochs = 200.0
        config.optimizer.drop_epochs = (100.0, 150.0, 178.0, 188.0)
    if loss == "backprop":
        config.method.name = "backprop"
        config.network.name = "mlp"
    else:
        config.method.name = "dgl"
        config.network.name = "mlp_zero_head"
        config.loss.name = loss
        config.auxiliary.name = "pred"
    config.partition.strategy = "per_layer"
    config.train.batch_size = 128
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "step"
    config.optimizer.drop_factor = 0.25
    return config
